"""What a job takes, whatever there is: each rung of its ladder, run on networks without numbers.

    UNet(16384x8192) on rank 3 of 8     simulate(one step) x the steps of the rung
    encoder, decoder                    simulate(one call)

The networks are built from configuration files on the meta device, laid out over a pretended mesh
as `engine.distribute` would, and called by the code that paints: `engine.diffusion.Denoiser` for
both sides of guidance, `engine.codec` for pixels. Of all ranks, the one that has most rows is run.
"""

import contextlib
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from engine import ladder
from engine.bands import split_rows
from engine.config import Settings, UserError
from engine.ladder import Rung
from engine.linfusion import LinearAttention
from engine.loading import Description, picture_size
from engine.plan.parts import CodecMode, Job, Part, codec_parts, unet_parts
from engine.simulation import META, Cost, CudaKernels, Kernels, pretended


@dataclass(frozen=True)
class RungPlan:
    """One rung: the rows of every rank, and the parts of the rank that has most of them.

    Attributes:
        rows: of the picture, in pixels, that each band is painted on; top to bottom.
        groups: of ranks that share out the sides of guidance; each has all bands.
        codec: between the latents of this rung and pixels, what 'auto' comes to.
    """

    rung: Rung
    rows: list[int]
    groups: int
    codec: CodecMode
    parts: list[Part]

    @property
    def cost(self) -> Cost:
        """Of all parts."""
        return sum((part.cost for part in self.parts), Cost())

    @property
    def largest(self) -> Part:
        """The part that needs most memory."""
        return max(self.parts, key=lambda part: part.peak_bytes)


@dataclass(frozen=True)
class Needs:
    """What a job takes on `ranks` ranks, whatever there is.

    Attributes:
        weights: bytes of each network that a rank holds.
    """

    ranks: int
    weights: dict[str, int]
    rungs: list[RungPlan]

    @property
    def weight_bytes(self) -> int:
        """Of all networks."""
        return sum(self.weights.values())

    @property
    def highest(self) -> RungPlan:
        """The rung that needs most memory."""
        return max(self.rungs, key=lambda rung: rung.largest.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that a rank needs at any time."""
        return self.weight_bytes + self.highest.largest.peak_bytes


class DryRun:
    """Simulates jobs with one model, in one precision, on one kind of device.

    Args:
        text_bytes: of the text encoders, which run once and briefly.
        limit_bytes: that a rank may use; what does not fit is streamed, where the codec is 'auto'.
    """

    def __init__(
        self,
        model: Description,
        dtype: torch.dtype,
        kernels: Kernels,
        text_bytes: int = 0,
        limit_bytes: float = math.inf,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._model = model
        self._dtype = dtype
        self._kernels = kernels
        self._text_bytes = text_bytes
        # Jobs that differ in the codec alone have their UNet's parts in common, and so on.
        self._known_steps: dict[Any, list[Part]] = {}
        self._known_codecs: dict[Any, list[Part]] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether the device that is meant is one."""
        return isinstance(self._kernels, CudaKernels)

    def needs(self, settings: Settings, ranks: int, only: set[int] | None = None) -> Needs:
        """What the job takes on `ranks` ranks, or the rungs `only` of it.

        Raises:
            UserError: the ladder does not fit the picture, a rung has too few rows, or the exact
                codec would make tensors that no kernel takes.
        """
        start = settings.ladder.upscale
        rungs = ladder.rungs(
            settings, self._model.native_side, picture_size(start) if start else None
        )
        job = Job(settings, self._networks, self._dtype, self._kernels, ranks, rungs)
        weights = self.weights(settings, ranks)
        room = self.limit_bytes - sum(weights.values())
        plans = [
            self._rung(job, rung, room) for rung in rungs if only is None or rung.index in only
        ]
        return Needs(ranks, weights, [plan for plan in plans if plan.parts])

    def weights(self, settings: Settings, ranks: int) -> dict[str, int]:
        """Bytes of each network that a rank holds."""
        shares = ranks if settings.memory.sharded_weights else 1
        return {
            "UNet": _unet_bytes(self._networks.unet, shares),
            "VAE": _weight_bytes(self._networks.vae),
            "text encoders": self._text_bytes,
        }

    def shallow(self) -> "DryRun":
        """The same with two layers in each transformer of the UNet: other costs, the same peaks.

        Layers run one after the other, and the third needs no more memory than the second.
        """
        return _ShallowDryRun(self)

    def _rung(self, job: Job, rung: Rung, room_bytes: float) -> RungPlan:
        settings = job.settings
        codec, parts = self._codec_parts(job, rung, room_bytes)
        if rung.steps_run:
            key = (rung, job.ranks, settings.memory, settings.mesh, settings.ladder)
            if key not in self._known_steps:
                self._known_steps[key] = unet_parts(job, rung)
            parts = [*parts[:-1], *self._known_steps[key], *parts[-1:]]  # the decoder comes last
        groups = job.groups(rung)
        bands = split_rows(rung.height // 8, job.ranks // groups, job.row_multiple)
        return RungPlan(rung, [8 * len(band) for band in bands], groups, codec, parts)

    def _codec_parts(self, job: Job, rung: Rung, room_bytes: float) -> tuple[CodecMode, list[Part]]:
        """Those of the codec asked for, or of the exact one if it fits, else the streaming one."""

        def parts_by(mode: CodecMode) -> list[Part]:
            key = (rung, job.ranks, job.settings.codec, job.settings.ladder, mode)
            if key not in self._known_codecs:
                self._known_codecs[key] = codec_parts(job, rung, mode)
            return self._known_codecs[key]

        asked = job.settings.codec.asked(rung.index)
        if asked != "auto":
            return asked, parts_by(asked)
        with contextlib.suppress(UserError):  # of tensors that no kernel takes
            exact = parts_by("exact")
            if all(part.peak_bytes <= room_bytes for part in exact):
                return "exact", exact
        return "streaming", parts_by("streaming")

    @cached_property
    def _networks(self) -> SimpleNamespace:
        """As much of a pipeline as the denoiser and the codec look at."""
        with pretended(self._dtype):
            unet = UNet2DConditionModel.from_config(self._model.unet).eval()
            for entry in self._model.linear_modules or ():
                softmax = unet.get_submodule(entry["module_name"])
                linear = LinearAttention.from_attention(softmax, entry["projection_mid_dim"])
                unet.set_submodule(entry["module_name"], linear)
        # As `engine.codec` does it for a VAE whose activations overflow half precision.
        is_upcast = self._dtype == torch.float16 and self._model.vae.get("force_upcast", True)
        with pretended(torch.float32 if is_upcast else self._dtype):
            vae = AutoencoderKL.from_config(self._model.vae).eval()
        return SimpleNamespace(unet=unet, vae=vae, get_guidance_scale_embedding=_embedding)


class _ShallowDryRun(DryRun):
    def __init__(self, whole: DryRun) -> None:
        super().__init__(_shallow(whole._model), whole._dtype, whole._kernels, 0, whole.limit_bytes)
        self._whole = whole
        self._known_codecs = whole._known_codecs

    def weights(self, settings: Settings, ranks: int) -> dict[str, int]:
        return self._whole.weights(settings, ranks)


def _shallow(model: Description) -> Description:
    """A model with two layers in each transformer, or one where it has no more."""
    layers = model.unet.get("transformer_layers_per_block", 1)
    fewer = [min(2, n) for n in layers] if isinstance(layers, list | tuple) else min(2, layers)
    kept = re.compile(r".*transformer_blocks\.[01]\.")
    modules = model.linear_modules and [
        entry for entry in model.linear_modules if kept.match(entry["module_name"])
    ]
    unet = {**model.unet, "transformer_layers_per_block": fewer}
    return replace(model, unet=unet, linear_modules=modules)


def _embedding(scale: Tensor, embedding_dim: int) -> Tensor:
    return torch.empty(len(scale), embedding_dim, device=META)


def _weight_bytes(network: nn.Module) -> int:
    return sum(weight.nbytes for weight in network.parameters())


def _unet_bytes(unet: nn.Module, shares: int) -> int:
    """All weights, or this rank's share of them beside the two blocks that are gathered at once."""
    whole = _weight_bytes(unet)
    if shares == 1:
        return whole
    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock2D | BasicTransformerBlock)]
    return whole // shares + 2 * max(map(_weight_bytes, blocks))
