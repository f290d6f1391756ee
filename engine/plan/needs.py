"""What a job takes, whatever there is: each rung of its ladder, run on networks without numbers.

    UNet(16384x8192) on rank 3 of 8     simulate(one step) x the steps of the rung
    encoder, decoder                    simulate(one call)

The networks are built from configuration files on the meta device, laid out over a pretended mesh
as `engine.distribute` would, and called by the code that paints: `engine.diffusion.Denoiser` for
both sides of guidance, `engine.codec` for pixels. Of all ranks, the one that has most rows is run.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from engine import codec, ladder
from engine.bands import DisplacedExchange, ExactExchange, Exchange, Mesh, Traffic, split_rows
from engine.bands.boundary import (
    Boundary,
    Layout,
    UNetBoundary,
    VAEBoundary,
    downsampling_factor,
    with_boundary,
)
from engine.config import Settings
from engine.diffusion import Conditions, Denoiser, dilated
from engine.ladder import Rung
from engine.linfusion import LinearAttention
from engine.loading import Description, picture_size
from engine.parallel import band_layers, share_out
from engine.simulation import META, Cost, Kernels, PretendedMesh, pretended, simulate


@dataclass(frozen=True)
class Part:
    """One network's work on a rung.

    Attributes:
        once: the cost of one call.
        calls: how many there are.
        kept_bytes: what this rank holds meanwhile, besides weights: latents, pixels.
    """

    name: str
    once: Cost
    calls: int
    kept_bytes: int

    @property
    def cost(self) -> Cost:
        """Of all calls."""
        return self.once * self.calls

    @property
    def peak_bytes(self) -> int:
        """What a rank needs for this part, besides weights."""
        return self.once.peak_bytes + self.kept_bytes


@dataclass(frozen=True)
class RungPlan:
    """One rung: the rows of every rank, and the parts of the rank that has most of them.

    Attributes:
        rows: of the picture, in pixels, that each band is painted on; top to bottom.
        groups: of ranks that share out the sides of guidance; each has all bands.
    """

    rung: Rung
    rows: list[int]
    groups: int
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


class Rehearsal:
    """Simulates jobs with one model, in one precision, on one kind of device.

    Args:
        text_bytes: of the text encoders, which run once and briefly.
    """

    def __init__(
        self, model: Description, dtype: torch.dtype, kernels: Kernels, text_bytes: int = 0
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._kernels = kernels
        self._text_bytes = text_bytes
        self._multiple = downsampling_factor(model.unet["block_out_channels"])

    def needs(self, settings: Settings, ranks: int, only: set[int] | None = None) -> Needs:
        """What the job takes on `ranks` ranks, or the rungs `only` of it.

        Raises:
            UserError: the ladder does not fit the picture, or a rung has too few rows.
        """
        start = settings.ladder.upscale
        rungs = ladder.rungs(
            settings, self._model.native_side, picture_size(start) if start else None
        )
        networks = self._networks()
        plans = [
            _RungRehearsal(self, networks, settings, rung, ranks, is_last=rung is rungs[-1]).plan()
            for rung in rungs
            if only is None or rung.index in only
        ]
        weights = {"UNet": _weight_bytes(networks.unet), "VAE": _weight_bytes(networks.vae)}
        return Needs(ranks, {**weights, "text encoders": self._text_bytes}, plans)

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


# What a rank holds while a rung is painted: the latent, the reference and its noise, the prediction
# of either branch, and the last of it that a multistep scheduler remembers.
_KEPT_LATENTS = 6


class _RungRehearsal:
    """One rung on the rank that has most to do."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        networks: SimpleNamespace,
        settings: Settings,
        rung: Rung,
        ranks: int,
        is_last: bool,
    ) -> None:
        self._job, self._networks, self._settings = rehearsal, networks, settings
        self._rung, self._ranks, self._is_last = rung, ranks, is_last
        self._traffic = Traffic()
        unet = networks.unet.config
        self._guided = rung.guidance_scale > 1 and unet.time_cond_proj_dim is None
        at_once = self._guided and not settings.memory.guidance_in_turn
        self._groups = ladder.groups(settings, rung, ranks, rehearsal._multiple, at_once)
        self._latent = self._empty(rehearsal._dtype, unet.in_channels, rung.height // 8, 8)
        self._kept_bytes = _KEPT_LATENTS * self._latent.nbytes

    def _empty(self, dtype: torch.dtype, channels: int, rows: int, factor: int) -> Tensor:
        return torch.empty(1, channels, rows, self._rung.width // factor, dtype=dtype, device=META)

    def plan(self) -> RungPlan:
        """All parts, in their order."""
        bands = split_rows(self._rung.height // 8, self._ranks // self._groups, self._job._multiple)
        parts = [] if self._rung.index == 0 else [self._encoder()]
        if self._rung.steps_run:
            parts += self._branches()
        if self._rung.steps_run or self._is_last:  # and not the picture that a ladder begins with
            parts.append(self._decoder())
        return RungPlan(self._rung, [8 * len(band) for band in bands], self._groups, parts)

    def _branches(self) -> Iterator[Part]:
        """The UNet, and where the strategy has it, the dilated one."""
        settings, rung, unet = self._settings, self._rung, self._networks.unet
        if self._ranks > 1:
            height = self._latent.shape[-2]
            mesh = PretendedMesh.of(self._ranks, height, self._job._multiple, self._groups)
            exchange = _exchange(settings)
            _band(unet, UNetBoundary, share_out(mesh, self._groups, exchange, False, self._traffic))
        yield Part("UNet", self._step(), rung.steps_run, self._kept_bytes)
        if calls := dilated_steps(settings, rung):
            with dilated(unet, rung.scale):
                yield Part("dilated UNet", self._step(), calls, self._kept_bytes)

    def _step(self) -> Cost:
        """One prediction of the guided UNet."""
        in_turn = self._settings.memory.guidance_in_turn
        conditions = _conditions(self._networks.unet, 2 if self._guided else 1, self._job._dtype)
        model = Denoiser(self._networks, conditions, self._rung.guidance_scale, in_turn)
        time = torch.empty((), dtype=torch.int64, device=META)

        def steps(count: int) -> Cost:
            def paint() -> None:
                for _ in range(count):
                    model(self._latent, time)

            return simulate(paint, self._job._kernels, self._traffic)

        one = steps(1)
        if self._settings.mesh.synchronisation == "exact" or self._ranks == 1:
            return one
        # What two steps have sent is held for the third.
        return replace(one, peak_bytes=steps(3).peak_bytes)

    def _encoder(self) -> Part:
        vae = self._banded_vae()
        pixels = self._empty(vae.dtype, 3, self._rung.height, 1)
        cost = self._simulate(lambda: vae.encode(pixels).latent_dist.mode())
        own_bytes = pixels.nbytes * self._tallest_band() // (self._rung.height // 8)
        return Part("encoder", cost, 1, self._kept_bytes + own_bytes)

    def _decoder(self) -> Part:
        vae = self._banded_vae()

        def decode() -> Tensor:
            _, pixels = codec.decode(vae, self._latent)
            return codec.to_uint8(pixels) if self._is_last else pixels

        return Part("decoder", self._simulate(decode), 1, self._kept_bytes)

    def _simulate(self, function: Callable[[], object]) -> Cost:
        return simulate(function, self._job._kernels, self._traffic)

    def _banded_vae(self) -> Any:
        vae = self._networks.vae
        if self._ranks > 1:
            mesh = PretendedMesh.of(self._ranks, self._latent.shape[-2])
            _band(vae, VAEBoundary, share_out(mesh, 1, ExactExchange, False, self._traffic))
        return vae

    def _tallest_band(self) -> int:
        return max(len(band) for band in split_rows(self._latent.shape[-2], self._ranks))


def _band(network: nn.Module, boundary: type[Boundary], layout: Layout) -> None:
    band_layers(network)
    with_boundary(network, boundary, layout)


def _exchange(settings: Settings) -> Callable[[Mesh, Traffic], Exchange]:
    if settings.mesh.synchronisation == "exact":
        return ExactExchange
    return partial(DisplacedExchange, warmup_steps=1)  # how long it lasts changes no memory


def dilated_steps(settings: Settings, rung: Rung) -> int:
    """In how many steps of a rung the dilated branch weighs enough to be run.

    As `engine.ladder.demofusion` decides it, the timesteps taken to be evenly spaced.
    """
    if settings.ladder.strategy != "demofusion" or rung.index == 0 or rung.scale == 1:
        return 0
    times = (rung.strength * (1 - step / rung.steps_run) for step in range(rung.steps_run))
    factors = (0.5 * (1 + math.cos(math.pi * (1 - time))) for time in times)
    exponent, threshold = settings.ladder.dilation_exponent, settings.ladder.threshold
    return sum(factor**exponent >= threshold for factor in factors)


_TOKENS = 77  # of CLIP, in all published models


def _conditions(unet: UNet2DConditionModel, sides: int, dtype: torch.dtype) -> Conditions:
    """A prompt's embeddings, without numbers."""
    config, empty = unet.config, partial(torch.empty, dtype=dtype, device=META)
    text = empty(sides, _TOKENS, config.cross_attention_dim)
    if config.addition_embed_type != "text_time":
        return Conditions(text)
    sizes = 6  # original size, crop and target size, two numbers each
    pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
    added = {"text_embeds": empty(sides, pooled), "time_ids": empty(sides, sizes)}
    return Conditions(text, added)


def _embedding(scale: Tensor, embedding_dim: int) -> Tensor:
    return torch.empty(len(scale), embedding_dim, device=META)


def _weight_bytes(network: nn.Module) -> int:
    return sum(weight.nbytes for weight in network.parameters())
