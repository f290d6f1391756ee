"""The student: the teacher's network with linear self-attention, and the three losses.

    L = a |e_student - e|^2 + b |e_student - e_teacher|^2 + c mean_l |f_student^l - f_teacher^l|^2

e is the noise (or the velocity), f^l what the l-th self-attention puts out, each network seeing its
own features on the way there; LinFusion's weights are 1, 0.5, 0.5 (arXiv:2409.02097, section 3.3).
Each loss is of one picture, so that pictures may be shared out over ranks in any way.

All tensors but the self-attentions' are the teacher's own, not copies of them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import linfusion
from engine.distill.settings import LossSettings
from engine.distill.teacher import Conditions, Teacher

PARTS = ("noise", "output", "features")


@dataclass(frozen=True)
class Lesson:
    """What both networks see, and what the first loss wants told.

    Attributes:
        noisy, target: [B, 4, h, w]
        times: [B]
    """

    noisy: Tensor
    times: Tensor
    conditions: Conditions
    target: Tensor


@dataclass(frozen=True)
class Answer:
    """What a UNet made of a lesson: output [B, 4, h, w], and [B, n, C] of each self-attention."""

    output: Tensor
    features: list[Tensor]


def build_student(
    teacher: nn.Module, begin: Path | None = None, own: bool = False, seed: int = 0,
    mixer: linfusion.Mixer = linfusion.LinearAttention.from_attention,
) -> nn.Module:  # fmt: skip
    """A student of the UNet `teacher`; its self-attentions require gradients and are in fp32.

    Args:
        begin: LinFusion modules to go on from; by default the teacher's own projections, and MLPs
            of random weights that depend on `seed` alone.
        own: all tensors are copies, for a backend that shares them out over ranks.
        mixer: makes the self-attentions where they do not begin from modules.

    Raises:
        UserError: the modules in `begin` do not fit.
    """
    shared = {} if own else {id(x): x for x in (*teacher.parameters(), *teacher.buffers())}
    student = copy.deepcopy(teacher, shared)
    if begin is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            linfusion.convert(student, mixer)
    else:
        linfusion.load(student, begin)
    for attention in attentions(student):
        attention.float().requires_grad_(True)
    return student


def attentions(unet: nn.Module) -> list[nn.Module]:
    """Its self-attentions, in the network's own order."""
    return [attention for _, attention in linfusion.self_attentions(unet)]


def learning(student: nn.Module) -> list[nn.Parameter]:
    """The parameters of a student that learn, in the network's own order."""
    return [parameter for part in attentions(student) for parameter in part.parameters()]


def answer(unet: nn.Module, lesson: Lesson) -> Answer:
    """Run `unet`, and note what its self-attentions put out."""
    with _noted(unet) as features:
        output = unet(
            lesson.noisy,
            lesson.times,
            lesson.conditions.text,
            added_cond_kwargs=lesson.conditions.added or None,
        ).sample
    return Answer(output.float(), features)


@contextmanager
def _noted(unet: nn.Module) -> Iterator[list[Tensor]]:
    features: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        features.append(output)

    hooks = [attention.register_forward_hook(note) for attention in attentions(unet)]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


class Distiller(nn.Module):
    """A student that is asked for its losses: what a backend wraps."""

    def __init__(self, student: nn.Module, teacher: Teacher, loss: LossSettings) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # a tuple hides it: it is no part of what is trained
        self._relative = loss.relative

    def forward(self, lesson: Lesson) -> Tensor:
        """The losses `PARTS` of each picture, [3, B]."""
        (teacher,) = self._teacher
        with teacher.computing():
            with torch.no_grad():
                theirs = answer(teacher.unet, lesson)
            mine = answer(self.student, lesson)
        return losses(mine, theirs, lesson.target, self._relative)


def losses(mine: Answer, theirs: Answer, target: Tensor, relative: bool) -> Tensor:
    """The losses `PARTS` of each picture, [3, B], unweighted.

    Args:
        relative: features in units of their own mean square, of each picture and layer.
    """
    layers = [
        _relative(a, b) if relative else _distance(a, b)
        for a, b in zip(mine.features, theirs.features, strict=True)
    ]
    features = torch.stack(layers).mean(0)
    return torch.stack(
        [_distance(mine.output, target), _distance(mine.output, theirs.output), features]
    )


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean square of the difference, [B, ...] twice -> [B]."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return _distance(a, b) / b.float().square().flatten(1).mean(1).clamp(min=1e-6)
