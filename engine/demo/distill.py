"""Distillation: the UNet's softmax self-attention is replaced by LinFusion's linear attention.

The softmax UNet is the teacher, and a copy of it with linear attention the student; only the
attention modules of the copy learn. As in LinFusion (arXiv:2409.02097, section 3.3) the loss is
the diffusion loss, plus half the distance of the outputs, plus half that of what each
self-attention puts out, relative to its size.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from engine import linfusion
from engine.demo.fit import Run, Stage, fit
from engine.demo.unet import Latents, PromptedUNet

STEPS = 600
LARGE = 0.6
"""share of the batches that are of large pictures"""


def train(run: Run, teacher: PromptedUNet) -> UNet2DConditionModel:
    """The student: a UNet whose attention modules are all that differs from the teacher's."""
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher.unet)
    linfusion.convert(student)
    for _, attention in linfusion.self_attentions(student):
        attention.requires_grad_(True)
    latents = Latents(run)
    taught, learnt = (_record_attention(unet) for unet in (teacher.unet, student))
    stage = Stage("distill", 3 if run.fast else STEPS, lr=1e-3, decay=0.5, averaging=0.99)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = latents.draw(step, LARGE, generator)
        with run.bfloat16():
            with torch.no_grad():
                prompts = teacher.encode(batch.prompts)
                target = teacher.unet(batch.noisy, batch.times, prompts).sample.float()
            painted = student(batch.noisy, batch.times, prompts).sample.float()
        features = [
            _relative(mine, theirs) for mine, theirs in zip(learnt(), taught(), strict=True)
        ]
        return (
            F.mse_loss(painted, batch.velocity)
            + 0.5 * F.mse_loss(painted, target)
            + 0.5 * torch.stack(features).mean()
        )

    fit(stage, student, loss, run)
    return student


def _relative(mine: Tensor, theirs: Tensor) -> Tensor:
    theirs = theirs.float()
    return F.mse_loss(mine.float(), theirs) / theirs.square().mean().clamp(min=1e-6)


def _record_attention(unet: UNet2DConditionModel) -> Callable[[], list[Tensor]]:
    """A function that hands out what the self-attentions put out since it was called last."""
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs.append(output)

    for _, attention in linfusion.self_attentions(unet):
        attention.register_forward_hook(record)

    def take() -> list[Tensor]:
        taken = outputs.copy()
        outputs.clear()
        return taken

    return take
