"""The settings of a distillation; how they are read is `engine.parsing`.

As in `engine.config`, nothing heavy is imported here, and a setting that would be ignored is
refused.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from engine.config import Group, Pixels, Real, Whole
from engine.parsing import parse

LANDSCAPES = "landscapes"
PROG = "python -m engine.distill"

_Share = Annotated[Real, Field(ge=0, lt=1)]


def _spell_whole(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class DataSettings(Group):
    """Pictures with captions, and the shapes that they are cut to."""

    source: str = Field(
        default=LANDSCAPES,
        description="'landscapes' (drawn, for the demo model), a folder of pictures with a .txt "
        "beside each, or .tar files of such pairs (webdataset): a pattern such as 'data/*.tar'.",
    )
    pictures: Whole = Field(default=8000, ge=20, description="How many landscapes are drawn.")
    side: Pixels | None = Field(
        default=None,
        description="Pictures are cut to about side x side px; by default what the model is for.",
    )
    multiple: Pixels = Field(default=64, description="Sides of all shapes are multiples of it, px.")
    aspect: Real = Field(
        default=2.0, ge=1, le=8, description="Long side over short side of the longest shape."
    )
    held_out: Whole = Field(
        default=64, ge=1, description="Pictures that are not trained on, for evaluation."
    )
    cache: Path | None = Field(
        default=None, description="Where latents are kept; by default in the output folder."
    )

    def idle(self) -> dict[str, str]:
        if self.source == LANDSCAPES:
            return dict.fromkeys(("side", "multiple", "aspect"), "pictures of your own")
        return {"pictures": "data.source landscapes"}


class LossSettings(Group):
    """How much each part of the loss weighs (LinFusion's own weights by default)."""

    noise: Real = Field(default=1.0, ge=0, description="Error against the true noise (or v).")
    output: Real = Field(default=0.5, ge=0, description="Distance from the teacher's output.")
    features: Real = Field(
        default=0.5, ge=0, description="Distance from what the teacher's self-attentions put out."
    )
    relative: bool = Field(
        default=False,
        description="Features relative to their own size, so that every layer counts alike.",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.noise + self.output + self.features:
            raise ValueError("all parts of the loss are 0: nothing would be learnt; raise one")
        return self


class OptimizerSettings(Group):
    """AdamW, and the average of the weights that is exported."""

    rate: Real = Field(default=1e-4, gt=0, description="Learning rate, at its highest.")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="How the rate goes on after the warm-up."
    )
    warmup: Whole = Field(default=100, ge=0, description="Steps in which the rate rises to that.")
    weight_decay: Real = Field(default=0.01, ge=0, description="AdamW's.")
    clip: Real = Field(default=1.0, gt=0, description="Norm of the gradient, at most.")
    average: _Share = Field(
        default=0.999, description="Of the moving average of the weights (EMA); 0 is none."
    )

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of one of so many steps: up in the warm-up, then down, if it does."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "constant":
            return self.rate * warm
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


class BackendSettings(Group):
    """How several processes train one student."""

    name: Literal["ddp", "deepspeed"] = Field(
        default="ddp", description="torch's DistributedDataParallel, or DeepSpeed's ZeRO."
    )
    stage: Annotated[Literal["1", "2", "3"], BeforeValidator(_spell_whole)] = Field(
        default="2",
        description="What ZeRO shares out: the optimizer's state (1), gradients too (2), weights "
        "too (3).",
    )
    offload: bool = Field(
        default=False, description="ZeRO keeps the optimizer's state in the memory of the host."
    )

    def idle(self) -> dict[str, str]:
        if self.name == "deepspeed":
            return {}
        return dict.fromkeys(("stage", "offload"), "backend.name deepspeed")


class EvaluationSettings(Group):
    """What the student is held to, on pictures and captions that it has not trained on."""

    every: Whole = Field(
        default=0, ge=0, description="Steps from one to the next; with 0 there is one at the end."
    )
    pictures: Whole = Field(
        default=8, ge=0, description="Painted by teacher and student from the same noise."
    )
    steps: Whole = Field(default=20, ge=1, description="Denoising steps of each of them.")
    guidance_scale: Real = Field(default=4.0, ge=0, description="Guidance of each of them.")
    beside: Path | None = Field(
        default=None, description="A folder of other LinFusion modules to evaluate beside them."
    )
    inception: Path | None = Field(
        default=None,
        description="For FID: a TorchScript file from [B, 3, H, W] in 0..255 to features [B, n].",
    )
    clip: Path | None = Field(
        default=None, description="For the CLIP score: a folder of a CLIP model (transformers)."
    )

    def idle(self) -> dict[str, str]:
        if self.pictures:
            return {}
        names = ("steps", "guidance_scale", "inception", "clip")
        return dict.fromkeys(names, "evaluation.pictures")


class DistillSettings(Group):
    """Distil a Stable Diffusion model's self-attention into LinFusion's linear attention."""

    model: str = Field(
        default="demo",
        description="The teacher: 'demo', a diffusers folder, a .safetensors file or a hub id.",
    )
    begin: Path | None = Field(
        default=None,
        description="A folder of LinFusion modules to go on from, instead of the teacher's own "
        "projections.",
    )
    output: Path = Field(
        default=Path("outputs/distill"),
        description="A folder; the modules come to lie in its subfolder linfusion.",
    )
    export: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="Precision of the modules that are written."
    )
    steps: Whole = Field(default=2000, ge=1, description="Updates of the weights.")
    batch: Whole = Field(default=16, ge=1, description="Pictures of a step, on all ranks together.")
    batch_px: Annotated[Whole, Field(ge=64)] | None = Field(
        default=None,
        description="Pixels of a step at most: of larger shapes there are fewer pictures.",
    )
    micro_batch: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None,
        description="Pictures that a rank computes at once; the rest of its share comes after, "
        "gradients add up. By default its whole share.",
    )
    dropout: _Share = Field(
        default=0.1, description="Share of the captions left out, for classifier-free guidance."
    )
    seed: Whole = Field(default=0, ge=0, description="Of everything that is drawn.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute; 'auto' takes the GPUs where there are any."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="In which networks compute; what learns is kept in float32 at any rate.",
    )
    data: DataSettings = Field(default=DataSettings(), description="What is learnt from.")
    loss: LossSettings = Field(default=LossSettings(), description="What is asked for.")
    optimizer: OptimizerSettings = Field(default=OptimizerSettings(), description="How it learns.")
    backend: BackendSettings = Field(default=BackendSettings(), description="On several ranks.")
    evaluation: EvaluationSettings = Field(
        default=EvaluationSettings(), description="How good the student is."
    )
    checkpoint_every: Whole = Field(
        default=100, ge=1, description="Steps from one checkpoint to the next."
    )
    samples_every: Whole = Field(
        default=0, ge=0, description="Steps from one sheet of samples to the next; 0 is none."
    )
    resume: bool = Field(
        default=False, description="Go on from the checkpoint in the output folder, if any."
    )
    progress: Literal["bars", "plain", "openjd", "alf", "json", "none"] = Field(
        default="bars",
        description="How to say how far it is: bars on a terminal, or lines for machines.",
    )
    timeout_s: Real = Field(
        default=1800.0,
        gt=0,
        le=30 * 24 * 3600.0,
        description="Seconds after which a rank that waits for another one gives up.",
    )
    stall_s: Real = Field(
        default=600.0,
        gt=0,
        description="Seconds without any progress after which the job fails and names the rank.",
    )

    @model_validator(mode="after")
    def _sheets_have_pictures(self) -> Self:
        if self.samples_every and not self.evaluation.pictures:
            raise ValueError(
                "samples_every: sheets show evaluation.pictures, and these are 0; choose some, or "
                "leave samples_every out"
            )
        return self

    @classmethod
    def load(cls, argv: Sequence[str] | None = None) -> Self:
        """The settings of a command line and of the `--config` file in it. See `parse`."""
        return parse(cls, argv, prog=PROG)

    def count_of(self, height: int, width: int) -> int:
        """Pictures of a step of that shape, px; of any number of ranks."""
        if self.batch_px is None:
            return self.batch
        return max(1, min(self.batch, self.batch_px // (height * width)))

    def facts(self) -> dict[str, Any]:
        """All that determines the curve: what a checkpoint must agree about. JSON-able."""
        elsewhere = {"output", "export", "micro_batch", "device", "evaluation", "resume"}
        elsewhere |= {"checkpoint_every", "samples_every", "progress", "timeout_s", "stall_s"}
        if self.optimizer.schedule == "constant":
            elsewhere |= {"steps"}  # more of them may be asked for later
        facts = self.model_dump(mode="json", exclude=elsewhere)
        facts["data"].pop("cache")
        facts["backend"] = self.backend.effective()
        return facts
