"""The parts of a rung, simulated: the UNet's branches, and pixels from and to latents.

Streaming passes a picture through the VAE in chunks of rows, hundreds of them at 16384 px, which
are alike. Its cost grows along a line with the rows of a band, so two short bands are run instead
of a long one.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine import codec, ladder, memory
from engine.bands import DisplacedExchange, ExactExchange, Exchange, Mesh, Traffic
from engine.bands.boundary import (
    Boundary,
    Layout,
    UNetBoundary,
    VAEBoundary,
    downsampling_factor,
    with_boundary,
    without_boundary,
)
from engine.config import Settings
from engine.diffusion import Conditions, Denoiser, dilated
from engine.ladder import Rung
from engine.output import sample_of
from engine.parallel import band_layers, fold_upsampling, share_out
from engine.simulation import META, Cost, Kernels, PretendedMesh, simulate


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
class Job:
    """What all parts of a job have in common.

    Attributes:
        networks: without numbers, on the meta device; they change as the job goes on.
        rungs: the whole ladder.
    """

    settings: Settings
    networks: SimpleNamespace
    dtype: torch.dtype
    kernels: Kernels
    ranks: int
    rungs: list[Rung]

    @property
    def row_multiple(self) -> int:
        """Rows of the latent that a UNet's band begins on a multiple of."""
        return downsampling_factor(self.networks.unet.config.block_out_channels)

    def guided(self, rung: Rung) -> bool:
        """Whether there are two sides of guidance."""
        return rung.guidance_scale > 1 and self.networks.unet.config.time_cond_proj_dim is None

    def groups(self, rung: Rung) -> int:
        """Groups of ranks that share out the sides of guidance."""
        at_once = self.guided(rung) and not self.settings.memory.guidance_in_turn
        return ladder.groups(self.settings, rung, self.ranks, self.row_multiple, at_once)

    def latent(self, rung: Rung, rows: int | None = None) -> Tensor:
        """[1, C, H, W], or as many rows of it."""
        channels = self.networks.unet.config.in_channels
        shape = (1, channels, rows or rung.height // 8, rung.width // 8)
        return torch.empty(shape, dtype=self.dtype, device=META)

    def kept_bytes(self, rung: Rung) -> int:
        """Of the latents that a rank holds while a rung is painted."""
        return _KEPT_LATENTS * self.latent(rung).nbytes


# The latent, the reference and its noise, the prediction of either branch, and the last of it that
# a multistep scheduler remembers.
_KEPT_LATENTS = 6


# --- the UNet -------------------------------------------------------------------------------------


def unet_parts(job: Job, rung: Rung) -> list[Part]:
    """The UNet, and where the strategy has it, the dilated one."""
    unet, traffic, kept = job.networks.unet, Traffic(), job.kept_bytes(rung)
    memory.apply(unet, memory_options(job.settings))
    without_boundary(unet)
    if job.ranks > 1:
        groups = job.groups(rung)
        mesh = PretendedMesh.of(job.ranks, rung.height // 8, job.row_multiple, groups)
        exchange = _exchange(job.settings)
        _band(unet, UNetBoundary, share_out(mesh, groups, exchange, False, traffic))
    else:
        fold_upsampling(unet)
    parts = [Part("UNet", _step(job, rung, traffic), rung.steps_run, kept)]
    if calls := dilated_steps(job.settings, rung):
        with dilated(unet, rung.scale):
            parts.append(Part("dilated UNet", _step(job, rung, traffic), calls, kept))
    return parts


def memory_options(settings: Settings) -> memory.MemoryOptions:
    """Those that change what the UNet's forward allocates; shared weights are counted apart."""
    asked = settings.memory
    return memory.MemoryOptions(
        token_chunks=asked.token_chunks,
        row_chunks=asked.row_chunks,
        inplace_activations=asked.inplace_activations,
        skips_on_host=asked.skips_on_host,
    )


def _step(job: Job, rung: Rung, traffic: Traffic) -> Cost:
    """One prediction of the guided UNet."""
    conditions = _conditions(job, 2 if job.guided(rung) else 1)
    in_turn = job.settings.memory.guidance_in_turn
    model = Denoiser(job.networks, conditions, rung.guidance_scale, in_turn)
    latent, time = job.latent(rung), torch.empty((), dtype=torch.int64, device=META)

    def steps(count: int) -> Cost:
        def paint() -> None:
            for _ in range(count):
                model(latent, time)

        return simulate(paint, job.kernels, traffic)

    one = steps(1)
    if job.settings.mesh.synchronisation == "exact" or job.ranks == 1:
        return one
    # What two steps have sent is held for the third.
    return replace(one, peak_bytes=steps(3).peak_bytes)


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


def _conditions(job: Job, sides: int) -> Conditions:
    """A prompt's embeddings, without numbers."""
    config, empty = job.networks.unet.config, partial(torch.empty, dtype=job.dtype, device=META)
    text = empty(sides, _TOKENS, config.cross_attention_dim)
    if config.addition_embed_type != "text_time":
        return Conditions(text)
    sizes = 6  # original size, crop and target size, two numbers each
    pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
    added = {"text_embeds": empty(sides, pooled), "time_ids": empty(sides, sizes)}
    return Conditions(text, added)


# --- pixels ---------------------------------------------------------------------------------------


CodecMode = Literal["exact", "streaming"]


def codec_parts(job: Job, rung: Rung, mode: CodecMode) -> list[Part]:
    """From the rung below to this one's latent, and on to pixels: a rung's encoder and decoder.

    Raises:
        UserError: the exact codec would make tensors that no kernel takes.
    """
    parts = []
    if rung.index:
        parts.append(_encoder(job, job.rungs[rung.index - 1], rung, mode))
    if rung.steps_run:  # and not the picture that a ladder begins with
        parts.append(_decoder(job, rung, mode, is_last=rung == job.rungs[-1]))
    return parts


def _encoder(job: Job, below: Rung, rung: Rung, mode: CodecMode) -> Part:
    def encode(vae: Any, rows: int, codec_: codec.Codec) -> Callable[[], object]:
        rows_below = max(job.ranks, rows * below.height // rung.height)
        small = _own_pixels(vae, rows_below, below)

        def run() -> Tensor:
            sizes = (8 * rows_below, below.width), (8 * rows, rung.width)
            _, pixels = codec.resize(vae, small, *sizes)
            return codec.encode(vae, pixels.clamp_(-1, 1), 8 * rows, codec_)

        return run

    cost = _passage(job, rung, mode, encode)
    pixels = _own_pixels(job.networks.vae, below.height // 8, below)
    return Part("encoder", cost, 1, job.kept_bytes(rung) + pixels.nbytes)


def _decoder(job: Job, rung: Rung, mode: CodecMode, is_last: bool) -> Part:
    sample = sample_of(job.settings.output, job.settings.file)

    def decode(vae: Any, rows: int, codec_: codec.Codec) -> Callable[[], object]:
        latent = job.latent(rung, rows)

        def run() -> Tensor:
            _, pixels = codec.decode(vae, latent, codec_)
            pixels.clamp_(-1, 1)
            return codec.to_samples(pixels, sample) if is_last else pixels

        return run

    return Part("decoder", _passage(job, rung, mode, decode), 1, job.kept_bytes(rung))


def _own_pixels(vae: Any, rows: int, rung: Rung) -> Tensor:
    """This rank's share [1, 3, h, W] of the pixels over `rows` of a rung's latent."""
    layout = codec.layout_of(vae)
    own = layout.own(layout.bands(rows))
    return torch.empty(1, 3, 8 * len(own), rung.width, dtype=vae.dtype, device=META)


# (VAE, rows of the latent, codec) -> what runs with a latent of so many rows
Passage = Callable[[Any, int, codec.Codec], Callable[[], object]]


def _passage(job: Job, rung: Rung, mode: CodecMode, passage: Passage) -> Cost:
    """The cost of a whole band; of a long stream, what short ones tell."""
    rows, asked = rung.height // 8, codec.choose(job.settings.codec, mode)

    def run(rows: int, codec_: codec.Codec) -> Cost:
        return _run(job, rung, passage, rows, codec_)

    if not isinstance(asked, codec.Streaming) or rows <= job.ranks * _LONG_BAND:
        return run(rows, asked)
    short, longer = (job.ranks * band for band in _short_bands(asked.chunk_rows))
    once = replace(asked, passes=0)
    low, high = run(short, once), run(longer, once)
    whole = _line(low, high, (rows - short) / (longer - short))
    if not asked.passes:
        return whole
    return _with_passes(whole, low, run(short, replace(asked, passes=1)), asked.passes)


# Rows of a latent. From here on it is the stream that needs most memory, not the thinned picture
# that it takes its statistics from.
_LONG_BAND = 128


def _short_bands(chunk_rows: int) -> tuple[int, int]:
    """A few chunks, but more rows than a stream has for a margin, and a few more."""
    chunks = max(4, -(-24 // chunk_rows))
    return chunks * chunk_rows, (chunks + 4) * chunk_rows


def _run(job: Job, rung: Rung, passage: Passage, rows: int, codec_: codec.Codec) -> Cost:
    vae, traffic = job.networks.vae, Traffic()
    without_boundary(vae)
    if job.ranks > 1:
        mesh = PretendedMesh.of(job.ranks, rows)
        _band(vae, VAEBoundary, share_out(mesh, 1, ExactExchange, False, traffic))
    else:
        fold_upsampling(vae)
    if isinstance(codec_, codec.Streaming):
        # It thins the picture out to every s-th row and column: the same s for fewer rows.
        share = max(8 * rows, rung.width) / max(rung.height, rung.width)
        codec_ = replace(codec_, statistics_px=max(64, math.ceil(codec_.statistics_px * share)))
    return simulate(passage(vae, rows, codec_), job.kernels, traffic)


def _line(low: Cost, high: Cost, place: float) -> Cost:
    """The cost at `place` on the line that is `low` at 0 and `high` at 1."""

    def at(a: int, b: int) -> int:
        return round(a + (b - a) * place)

    flops = {kind: at(low.flops[kind], high.flops[kind]) for kind in high.flops}
    numbers = {name: at(getattr(low, name), getattr(high, name)) for name in _LINEAR}
    return replace(high, **numbers, flops=Counter(flops))


_LINEAR = ("peak_bytes", "bytes_moved", "operations", "bytes_sent")


def _with_passes(whole: Cost, short: Cost, measured: Cost, passes: int) -> Cost:
    """`whole` with passes that measure, given a `short` stream without and with one of them."""

    def longer(name: str) -> int:
        least, most = getattr(short, name), getattr(measured, name)
        return round(getattr(whole, name) * (1 + passes * (most - least) / max(least, 1)))

    more = measured.flops.total() / max(short.flops.total(), 1) - 1
    return replace(
        whole,
        peak_bytes=whole.peak_bytes + max(0, measured.peak_bytes - short.peak_bytes),
        flops=Counter({kind: round(n * (1 + passes * more)) for kind, n in whole.flops.items()}),
        bytes_moved=longer("bytes_moved"),
        operations=longer("operations"),
        bytes_sent=whole.bytes_sent + passes * (measured.bytes_sent - short.bytes_sent),
        rounds=whole.rounds + passes * (measured.rounds - short.rounds),
    )


def _band(network: nn.Module, boundary: type[Boundary], layout: Layout) -> None:
    band_layers(network)
    with_boundary(network, boundary, layout)
