"""From latent to pixels and back over bands: each rank has its own rows of the picture.

    decode   latent [B, 4, H, W] on every rank -> own rows of pixels [B, 3, 8h, 8W]
    resize   own rows of one picture -> own rows of a larger one
    encode   own rows of pixels [B, 3, 8h, 8W] -> latent [B, 4, H, W] on every rank

A rank's own rows are always the band that `decode` gives it, 8 pixel rows for each latent row. Two
codecs do the work; they have the same methods and differ in what they cost:

`Exact` runs the VAE over bands: group norms, convolutions and the mid-block's attention see the
whole picture through `engine.bands.layers`, so N ranks give what one rank gives. All of a band's
activations are there at once, 128 or 256 channels wide at full size: 16384 x 16384 px on 8 ranks
take 52 GB each. And attention grows with the square of the pixels.

`Streaming` passes the rows of the picture through the VAE in chunks (`engine.bands.stream`), so
that memory holds a chunk of each layer, not the band. No layer is computed twice for a row, and
convolutions are exact. Group norms and attention are told what they cannot see: statistics, keys
and values of the whole picture, measured in `passes` streams before the one that counts. They are
the same on every rank, and so is the picture, whatever the number of ranks and the size of chunks.
Each rank streams its own rows and a margin, as many as the VAE's convolutions reach across: the
decoder's ranks have them anyway, the encoder's fetch them. Neither then waits for the others.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bands import Mesh, banded, fetch_rows, scale_rows
from engine.bands.boundary import Layout, downsampling_factor
from engine.bands.measure import Passage
from engine.bands.resize import resize as resize_bands
from engine.bands.rows import halo_rows
from engine.bands.stream import Course, thin, thin_rows
from engine.config import CodecSettings, UserError
from engine.parallel import band_layers

MAX_ELEMENTS = 2**31
"""Kernels count the elements of a tensor in 32 bits."""


class Codec(ABC):
    """How bands get through the VAE. The methods get what `decode` and `encode` have prepared."""

    @abstractmethod
    def decode(self, vae: AutoencoderKL, layout: Layout, latent: Tensor) -> Tensor:
        """[B, 4, H, W], whole and unscaled -> this rank's rows [B, 3, 8h, 8W]"""

    @abstractmethod
    def encode(self, vae: AutoencoderKL, layout: Layout, pixels: Tensor, height: int) -> Tensor:
        """This rank's rows [B, 3, 8h, 8W] -> its rows of the posterior's mean [B, 4, h, W].

        `height` is that of the whole latent.
        """


def decode(vae: AutoencoderKL, latent: Tensor, codec: Codec | None = None) -> tuple[range, Tensor]:
    """Decode this rank's rows of `latent` [B, 4, H, W], which is the same on every rank.

    Args:
        vae: distributed (`engine.parallel.distribute`), or plain on a single rank.
        codec: `Exact()` by default.

    Returns:
        (pixel rows, pixels [B, 3, h, W] in -1 ... 1)

    Raises:
        UserError: more ranks than latent rows, or too few for the exact codec.
    """
    layout = _prepare(vae)
    latent = _unscale(vae, latent.to(vae.dtype))
    rows = layout.own(layout.bands(latent.shape[-2]))
    pixels = (codec or Exact()).decode(vae, layout, latent)
    return scale_rows(rows, downsampling_factor(vae.config.block_out_channels)), pixels


def encode(vae: AutoencoderKL, pixels: Tensor, height: int, codec: Codec | None = None) -> Tensor:
    """Encode a picture of which each rank has its own rows, those that `decode` gives.

    The latent is the mean of the posterior, not a draw from it: noise far above the posterior's
    spread is added right after, where the picture is painted on.

    Args:
        vae: distributed (`engine.parallel.distribute`), or plain on a single rank.
        pixels: [B, 3, h, 8W] in -1 ... 1.
        height: of the whole picture, in pixels.
        codec: `Exact()` by default.

    Returns:
        [B, 4, H, W], whole and the same on every rank, scaled as the UNet wants it.

    Raises:
        UserError: sides that are no multiples of the VAE's factor of 8, more ranks than latent
            rows, or too few for the exact codec.
    """
    layout = _prepare(vae)
    factor = downsampling_factor(vae.config.block_out_channels)
    if height % factor or pixels.shape[-1] % factor:
        raise UserError(
            f"a picture of {pixels.shape[-1]}x{height} px has no latent of whole rows and columns: "
            f"make both sides multiples of {factor}"
        )
    bands = layout.bands(height // factor)
    own = layout.own(bands)
    assert pixels.shape[-2] == factor * len(own), "each rank brings the rows that `decode` gives"
    mean = (codec or Exact()).encode(vae, layout, pixels.to(vae.dtype), height // factor)
    return _scale(vae, layout.gather_bands(vae, mean, [len(band) for band in bands]))


def resize(
    vae: AutoencoderKL, pixels: Tensor, size: tuple[int, int], new_size: tuple[int, int]
) -> tuple[range, Tensor]:
    """Resize a picture (height, width) of which each rank has its own rows; see `bands.resize`.

    Returns:
        (own rows of the new picture, pixels [B, 3, h2, W2])
    """
    factor = downsampling_factor(vae.config.block_out_channels)
    return resize_bands(layout_of(vae), pixels, size, new_size, factor)


def layout_of(vae: AutoencoderKL) -> Layout:
    """How a distributed VAE shares its rows; for a plain one, that a single rank has them all."""
    layout: Layout | None = getattr(vae, "layout", None)
    alone = Mesh(0, 1, vae.device, None)
    return layout or Layout(alone, alone)


def _prepare(vae: AutoencoderKL) -> Layout:
    """The layout of a VAE that is fit to run over bands."""
    if vae.use_tiling:
        raise UserError(
            "VAE tiling blends tiles that each see a part of the picture, which bands and streams "
            "make needless and would spoil: call pipe.vae.disable_tiling()"
        )
    if vae.config.force_upcast and vae.dtype == torch.float16:
        vae.to(torch.float32)  # SDXL's activations overflow fp16, as its configuration says
    return layout_of(vae)


# --- exact ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact(Codec):
    """Whole bands at once; every layer exchanges with the other ranks."""

    def decode(self, vae: AutoencoderKL, layout: Layout, latent: Tensor) -> Tensor:
        _, _, height, width = latent.shape
        rows = layout.own(bands := layout.bands(height))
        _refuse_large(vae.config, max(map(len, bands)), width, latent.shape[0])
        with banded(layout.exchange):
            return vae.decode(latent[:, :, rows.start : rows.stop]).sample

    def encode(self, vae: AutoencoderKL, layout: Layout, pixels: Tensor, height: int) -> Tensor:
        factor = downsampling_factor(vae.config.block_out_channels)
        rows = max(map(len, layout.bands(height)))
        _refuse_large(vae.config, rows, pixels.shape[-1] // factor, pixels.shape[0])
        with banded(layout.exchange):
            return vae.encode(pixels).latent_dist.mode()


def largest_activation(config: Mapping[str, Any], rows: int, width: int) -> int:
    """Elements of the largest tensor that a kernel gets when latent [1, 4, rows, width] is decoded.

    That is the input of a convolution behind the last doubling, still as wide in channels as the
    level before, with a halo row above and below. Encoding stays below that.
    """
    channels = list(config["block_out_channels"])
    deeper = [*channels[1:], channels[-1]]
    sizes = []
    for level, widest in enumerate(map(max, channels, deeper)):
        scale = 2 ** (len(channels) - 1 - level)
        sizes.append(widest * (scale * rows + 2) * scale * width)
    return int(max(sizes))


def _refuse_large(config: Mapping[str, Any], rows: int, width: int, batch: int) -> None:
    """Every rank is told of the tallest band, so that all refuse alike."""
    if batch * largest_activation(config, rows, width) <= MAX_ELEMENTS:
        return
    fitting = _fitting_rows(config, width, batch)
    ranks = f"start {math.ceil(rows / fitting)} times as many ranks or " if fitting else ""
    raise UserError(
        f"the exact codec would make tensors of more than 2^31 elements of {rows} latent rows on a "
        f"rank: {ranks}choose the streaming codec"
    )


def _fitting_rows(config: Mapping[str, Any], width: int, batch: int = 1) -> int:
    """The most latent rows whose activations all stay within `MAX_ELEMENTS`; 0 if none do."""
    two = batch * largest_activation(config, 2, width)
    one = batch * largest_activation(config, 1, width)
    return 0 if one > MAX_ELEMENTS else 1 + (MAX_ELEMENTS - one) // (two - one)


# --- streaming ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streaming(Codec):
    """A chunk of rows at a time, with statistics measured beforehand.

    Args:
        statistics_px: the longer side of the thinned picture that statistics are modelled on; a
            picture no larger than this is streamed by its own exact statistics.
        passes: how often the whole picture streams through to measure them, before it streams
            through to be kept. Each costs as much as that.
        chunk_rows: latent rows that go through at a time.
    """

    statistics_px: int = 512
    passes: int = 2
    chunk_rows: int = 8

    def __post_init__(self) -> None:
        if self.statistics_px < 64 or self.passes < 0 or self.chunk_rows < 1:
            raise UserError(
                f"a streaming codec of {self.statistics_px} px, {self.passes} passes and "
                f"{self.chunk_rows} chunk rows cannot work: 64 px, 0 passes and 1 row are the least"
            )

    def decode(self, vae: AutoencoderKL, layout: Layout, latent: Tensor) -> Tensor:
        with torch.no_grad(), _stream_layers(vae):
            pictures = [self._decode(vae, layout, one) for one in latent.split(1)]
        return _batch(pictures)

    def encode(self, vae: AutoencoderKL, layout: Layout, pixels: Tensor, height: int) -> Tensor:
        with torch.no_grad(), _stream_layers(vae):
            means = [self._encode(vae, layout, one, height) for one in pixels.split(1)]
        return _batch(means)

    def _decode(self, vae: AutoencoderKL, layout: Layout, latent: Tensor) -> Tensor:
        """[1, 4, H, W] -> [1, 3, 8h, 8W]"""
        _, _, height, width = latent.shape
        course = self._course(vae, layout, decoder_margin(vae), height, width)
        passage = Passage(
            layout,
            course,
            network=lambda z: vae.decode(z).sample,
            source=latent[:, :, course.fed.start : course.fed.stop],
            thinned=thin(latent, range(height), course.stride),
            rows_in=1,
            rows_out=downsampling_factor(vae.config.block_out_channels),
        )
        return passage.run(self.passes)

    def _encode(self, vae: AutoencoderKL, layout: Layout, pixels: Tensor, height: int) -> Tensor:
        """[1, 3, 8h, 8W] -> [1, 4, h, W]"""
        factor = downsampling_factor(vae.config.block_out_channels)
        width = pixels.shape[-1] // factor
        course = self._course(vae, layout, encoder_margin(vae), height, width)
        passage = Passage(
            layout,
            course,
            network=lambda x: vae.encode(x).latent_dist.mode(),
            source=_with_margin(layout, pixels, course, factor),
            thinned=_thin_bands(layout, pixels, course, factor),
            rows_in=factor,
            rows_out=1,
        )
        return passage.run(self.passes)

    def _course(
        self, vae: AutoencoderKL, layout: Layout, margin: int, height: int, width: int
    ) -> Course:
        fitting = _fitting_rows(vae.config, width)
        if not fitting:
            raise UserError(
                f"a latent of {width} columns makes tensors of more than 2^31 elements of a single "
                "row: ask for a narrower picture"
            )
        return Course(
            own=layout.own(layout.bands(height)),
            height=height,
            width=width,
            margin=margin,
            chunk_rows=min(self.chunk_rows, fitting),
            stride=self._stride(vae.config, height, width),
        )

    def _stride(self, config: Mapping[str, Any], height: int, width: int) -> int:
        """Every how-many-eth row and column of the picture are kept for its statistics."""
        factor = downsampling_factor(config["block_out_channels"])
        stride = math.ceil(factor * max(height, width) / self.statistics_px)
        # Of a very long picture some rows and columns are kept all the same.
        stride = min(stride, max(1, min(height, width) // 4))
        kept = largest_activation(config, -(-height // stride), -(-width // stride))
        if kept > MAX_ELEMENTS:
            raise UserError(
                f"statistics of {self.statistics_px} px make tensors of more than 2^31 elements: "
                "choose a smaller size for them, such as 512 px"
            )
        return stride


def choose(settings: CodecSettings, mode: str) -> Codec:
    """The "exact" or the "streaming" codec, as the settings would have it."""
    if mode == "exact":
        return Exact()
    assert mode == "streaming", "'auto' is one of the two by now"
    return Streaming(settings.statistics_px, settings.passes, settings.chunk_rows)


def _batch(pictures: list[Tensor]) -> Tensor:
    """[1, ...] each -> [B, ...]; a single one is not copied, since it may be all that fits."""
    return pictures[0] if len(pictures) == 1 else torch.cat(pictures)


@contextmanager
def _stream_layers(vae: AutoencoderKL) -> Iterator[None]:
    """Inside, the VAE's layers ask the current exchange; afterwards each is of the class it was.

    A distributed VAE has its layers over bands already. In a plain one all are swapped.
    """
    classes = {module: type(module) for module in vae.modules()}
    try:
        band_layers(vae)
        _refuse_hooks(vae, classes)
        yield
    finally:
        for module, before in classes.items():
            module.__class__ = before


def _refuse_hooks(vae: AutoencoderKL, before: dict[nn.Module, type[nn.Module]]) -> None:
    """Hooks of accelerate and diffusers keep the `forward` of the class that a layer had."""
    for name, module in vae.named_modules():
        hooked = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
        if hooked and type(module) is not before[module]:
            raise UserError(
                f"the VAE's {name} has an offload hook, which would bypass the stream: offload "
                "whole models (enable_model_cpu_offload), or keep the VAE where it is"
            )


def _with_margin(layout: Layout, pixels: Tensor, course: Course, factor: int) -> Tensor:
    """The rows `course.fed` of a picture of which each rank has its own."""
    if layout.exchange is None:
        return pixels
    have = layout.bands(course.height)
    want = [replace(course, own=band).fed for band in have]
    have, want = ([scale_rows(rows, factor) for rows in runs] for runs in (have, want))
    return fetch_rows(layout.exchange.mesh, layout.traffic, _Margin, pixels, have, want)


def _thin_bands(layout: Layout, pixels: Tensor, course: Course, factor: int) -> Tensor:
    """The whole of a picture in bands, thinned out, and cut to what has whole latent rows."""
    bands = [scale_rows(band, factor) for band in layout.bands(course.height)]
    own = thin(pixels, layout.own(bands), course.stride)
    lengths = [len(thin_rows(band, course.stride)) for band in bands]
    whole = layout.gather_bands(_Margin, own, lengths)
    height, width = (size // factor * factor for size in whole.shape[2:])
    return whole[:, :, :height, :width]


class _Margin:
    """Labels what travels before a stream in the count of traffic."""

    traffic_kind = "margin of a stream"


# --- how far the convolutions reach ---------------------------------------------------------------


def decoder_margin(vae: AutoencoderKL) -> int:
    """Latent rows above and below a row of the latent that reach into the pixels decoded from it.

    From the pixels back to the latent: each convolution reaches its halo further, and before each
    doubling of rows half as many rows, rounded up, were as much. A doubling and its convolution
    are one (`BandUpsample2D`), which reaches a row of what is not doubled yet.
    """
    rows = _reach(vae.decoder.conv_out)
    for block in reversed(vae.decoder.up_blocks):
        if block.upsamplers is not None:
            rows = -(-rows // 2) + _reach(block.upsamplers)
        rows += _reach(block.resnets)
    return rows + _reach(vae.decoder.mid_block) + _reach(vae.decoder.conv_in)


def encoder_margin(vae: AutoencoderKL) -> int:
    """Latent rows above and below a row of the latent whose pixels it is encoded from."""
    rows = _reach(vae.encoder.conv_out) + _reach(vae.encoder.mid_block)
    for block in reversed(vae.encoder.down_blocks):
        if block.downsamplers is not None:
            rows = 2 * rows + _reach(block.downsamplers)
        rows += _reach(block.resnets)
    rows += _reach(vae.encoder.conv_in)
    return -(-rows // downsampling_factor(vae.config.block_out_channels))


def _reach(network: nn.Module) -> int:
    """Rows that the convolutions of `network`, one behind the other, reach up or down."""
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    halos = [
        halo_rows(m.kernel_size[0], m.stride[0], int(m.padding[0]), m.dilation[0])
        for m in convolutions
    ]
    return sum(max(halo) for halo in halos)


# --- numbers --------------------------------------------------------------------------------------


def _unscale(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    """Undo the scaling (and, for some VAEs, the shift) that the UNet's latents carry."""
    if (moments := _latent_moments(vae, latent)) is None:
        return latent / vae.config.scaling_factor
    mean, std = moments
    return latent / vae.config.scaling_factor * std + mean


def _scale(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    """From the posterior to what the UNet works on."""
    if (moments := _latent_moments(vae, latent)) is None:
        return latent * vae.config.scaling_factor
    mean, std = moments
    return (latent - mean) / std * vae.config.scaling_factor


def _latent_moments(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mean and spread of each channel, for VAEs that have them."""
    if vae.config.latents_mean is None or vae.config.latents_std is None:
        return None
    mean, std = (
        torch.tensor(numbers, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@torch.no_grad()
def glimpse(vae: AutoencoderKL, latent: Tensor, side_px: int = 512) -> np.ndarray:
    """What a latent [1, 4, H, W] in the making looks like, in small: [h, w, 3] of 8 bits.

    It is thinned, and decoded by this rank alone. Noise above the latents' own spread, as some
    schedulers have it, is scaled down to that.

    Args:
        side_px: the longer side at the most.
    """
    factor = downsampling_factor(vae.config.block_out_channels)
    share = min(1.0, side_px / factor / max(latent.shape[-2:]))
    size = [max(1, round(side * share)) for side in latent.shape[-2:]]
    small = F.interpolate(latent.float(), size, mode="area")
    small = _unscale(vae, (small / small.std(correction=0).clamp(min=1)).to(vae.dtype))
    if vae.post_quant_conv is not None:
        small = vae.post_quant_conv(small)
    pixels = vae.decoder(small)  # past the boundary, which would call for the other ranks
    return to_samples(pixels, "uint8")[0].cpu().numpy()


_CHUNK_ROWS = 64


def to_samples(pixels: Tensor, sample: str) -> Tensor:
    """Pixels as a file takes them: [B, 3, h, W] in -1 ... 1 -> [B, h, W, 3].

    Rows by rows, since at 16384 px each step on the way would be as large as the picture in floats.

    Args:
        sample: "uint8" or "uint16", rounded to nearest, or "float16" in linear light, 0 ... 1.
    """
    batch, channels, height, width = pixels.shape
    samples = pixels.new_empty(batch, height, width, channels, dtype=getattr(torch, sample))
    for top in range(0, height, _CHUNK_ROWS):
        rows = pixels[:, :, top : top + _CHUNK_ROWS].float().permute(0, 2, 3, 1)
        rows = (rows / 2 + 0.5).clamp_(0, 1)
        if sample == "float16":
            rows = _to_linear(rows)
        else:
            rows = rows.mul_(torch.iinfo(samples.dtype).max).round_()
        samples[:, top : top + _CHUNK_ROWS] = rows
    return samples


def _to_linear(rows: Tensor) -> Tensor:
    """Light, from what sRGB's transfer function makes of it (IEC 61966-2-1)."""
    return torch.where(rows <= 0.04045, rows / 12.92, ((rows + 0.055) / 1.055) ** 2.4)
