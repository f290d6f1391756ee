"""Where whole tensors become bands and back: the edges of a distributed UNet, ControlNet and VAE.

    sample [B, C, H, W], the same on every rank
      -> this rank's share of the batch (image and guidance axes) and of the rows (band axis)
      -> the network, each layer over bands
      -> gathered over both axes: output [B, C, H, W], the same on every rank

A boundary is a class put in front of the network's own (`with_boundary`), so that attributes,
hooks and state-dict keys stay as they were, and the network saves under its own class name.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from engine.bands.context import banded, current_exchange
from engine.bands.exchange import Exchange, Traffic, gather_parts
from engine.bands.functions import GlobalMean
from engine.bands.mesh import Mesh
from engine.bands.rows import scale_rows, split_rows
from engine.config import UserError


@dataclass
class Layout:
    """How the ranks share a network's work.

    Attributes:
        world: all ranks of the job.
        batch: the ranks that have this rank's rows and share out the batch.
        exchange: how this rank's band reaches the others; None where pictures stay whole.
        traffic: what this rank has sent.
        check_drift: whether what enters the UNet is compared over all ranks.
    """

    world: Mesh
    batch: Mesh
    exchange: Exchange | None = None
    traffic: Traffic = field(default_factory=Traffic)
    check_drift: bool = True

    def bands(self, height: int, multiple: int = 1) -> list[range]:
        """The rows of every band. Raises UserError where there are too few rows for all."""
        return split_rows(height, 1 if self.exchange is None else self.exchange.mesh.size, multiple)

    def own(self, bands: list[range]) -> range:
        """This rank's rows."""
        return bands[0 if self.exchange is None else self.exchange.mesh.rank]

    def gather_bands(self, network: object, x: Tensor, lengths: list[int]) -> Tensor:
        """[B, C, h, W] of every band -> [B, C, H, W]. Never stale, in whichever mode."""
        if self.exchange is None:
            return x
        return gather_parts(self.exchange.mesh, self.traffic, network, x, 2, lengths)

    def batch_parts(self, batch: int) -> list[range]:
        """Contiguous shares of a batch: [uncond | cond] falls apart there, and pictures too.

        A batch smaller than the axis is not shared: every part computes all of it, since a rank
        that waits is no faster than one that computes the same.
        """
        parts = self.batch.size
        if batch < parts:
            return [range(batch)] * parts
        cuts = [batch * part // parts for part in range(parts + 1)]
        return [range(cuts[part], cuts[part + 1]) for part in range(parts)]

    def own_batch(self, batch: int) -> range:
        """This rank's share of a batch."""
        return self.batch_parts(batch)[self.batch.rank]

    def gather_batch(self, network: object, x: Tensor, batch: int) -> Tensor:
        """[b, ...] of every share -> [B, ...]"""
        if self.batch.size == 1 or batch < self.batch.size:
            return x
        lengths = [len(part) for part in self.batch_parts(batch)]
        return gather_parts(self.batch, self.traffic, network, x, 0, lengths)

    def start(self, call: dict[str, Any]) -> None:
        """What every forward of a network begins with, given all its arguments."""
        if torch.is_grad_enabled() and call["sample"].requires_grad:
            raise UserError(
                "gradients do not flow through the exchange between bands: call the pipeline "
                "without them, or on one rank"
            )
        if self.check_drift:
            # Prompts too: each rank's rows would follow its own, and the gathered whole be alike.
            whole = {k: value for k, value in call.items() if k not in _CONTROLNET_RESIDUALS}
            require_no_drift(self.world, _tensors(whole), call["sample"].device)
        if self.exchange is not None:
            self.exchange.start(call["sample"])

    def close(self) -> None:
        """Give up the groups of ranks that were made for this layout."""
        bands = self.world if self.exchange is None else self.exchange.mesh
        for mesh in (self.batch, bands):
            if mesh.group is not self.world.group:
                mesh.close()


class Boundary:
    """What all boundaries have: the layout, a label in the traffic, and the base class below."""

    layout: Layout
    traffic_kind = "boundary"


def with_boundary(network: Any, boundary: type[Boundary], layout: Layout) -> None:
    """Put `boundary` in front of the class of `network`, in place, replacing one that is there.

    The new class keeps the name and module of the old one, which diffusers writes into files.
    """
    without_boundary(network)
    base = type(network)
    attributes = {"layout": layout, "__module__": base.__module__, "__doc__": base.__doc__}
    network.__class__ = type(base.__name__, (boundary, base), attributes)


def without_boundary(network: Any) -> None:
    """Give a network back the class that it had before `with_boundary`."""
    if isinstance(network, Boundary):
        _, network.__class__ = type(network).__bases__


class UNetBoundary(Boundary):
    """Scatters what enters `UNet2DConditionModel.forward`, gathers what leaves it."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's own, whole tensors in and out; inside of bands, bands in and out."""
        forward = super().forward  # type: ignore[misc]
        if current_exchange() is not None:
            return forward(*args, **kwargs)
        call, layout = _arguments(forward, args, kwargs), self.layout
        return_dict = call.pop("return_dict", True)
        batch, _, height, width = call["sample"].shape
        layout.start(call)
        bands = layout.bands(height, downsampling_factor(self.config.block_out_channels))
        rows = layout.own(bands)
        call = _share_batch(call, batch, layout.own_batch(batch))
        for name in _RESIDUALS & call.keys():
            call[name] = _share_residuals(call[name], rows, height, width)
        call["sample"] = call["sample"][:, :, rows.start : rows.stop]
        with banded(layout.exchange):
            (output,) = forward(**call, return_dict=False)
        output = layout.gather_bands(self, output, [len(band) for band in bands])
        output = layout.gather_batch(self, output, batch)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


class ControlNetBoundary(Boundary):
    """Scatters what enters a ControlNet; its residuals stay bands on their way to the UNet."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's own, but for the residuals: this rank's rows, this rank's share."""
        forward = super().forward  # type: ignore[misc]
        call, layout = _arguments(forward, args, kwargs), self.layout
        batch, _, height, _ = call["sample"].shape
        # In guess mode the residuals are completed to another batch before they reach the UNet.
        if not call.get("guess_mode"):
            call = _share_batch(call, batch, layout.own_batch(batch))
        bands = layout.bands(height, downsampling_factor(self.config.block_out_channels))
        rows, sample = layout.own(bands), call["sample"]
        call["controlnet_cond"] = _map_tensors(
            lambda picture: _picture_rows(picture, rows, height).to(sample.device),
            call["controlnet_cond"],
        )
        call["sample"] = sample[:, :, rows.start : rows.stop]
        with banded(layout.exchange), GlobalMean(self):
            return forward(**call)


class VAEBoundary(Boundary):
    """Encodes and decodes over bands: whole pictures and latents in, whole ones out."""

    config: Any
    use_tiling: bool

    def _encode(self, x: Tensor) -> Tensor:
        """[B, 3, 8H, 8W] -> moments [B, 2C, H, W]"""
        encode = super()._encode  # type: ignore[misc]
        if current_exchange() is not None or self.layout.exchange is None:
            return encode(x)
        self.refuse_tiling()
        factor = downsampling_factor(self.config.block_out_channels)
        latent_bands = self.layout.bands(x.shape[-2] // factor)
        rows = scale_rows(self.layout.own(latent_bands), factor)
        # Rows beyond the last whole block count for the last band, as they do for the whole.
        stop = x.shape[-2] if rows.stop == x.shape[-2] // factor * factor else rows.stop
        with banded(self.layout.exchange):
            moments = encode(x[:, :, rows.start : stop])
        return self.layout.gather_bands(self, moments, [len(band) for band in latent_bands])

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """[B, C, H, W] -> [B, 3, 8H, 8W]"""
        decode = super()._decode  # type: ignore[misc]
        if current_exchange() is not None or self.layout.exchange is None:
            return decode(z, return_dict)
        self.refuse_tiling()
        bands = self.layout.bands(z.shape[-2])
        rows = self.layout.own(bands)
        with banded(self.layout.exchange):
            (pixels,) = decode(z[:, :, rows.start : rows.stop], False)
        factor = downsampling_factor(self.config.block_out_channels)
        pixels = self.layout.gather_bands(self, pixels, [factor * len(band) for band in bands])
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def refuse_tiling(self) -> None:
        """Raises UserError where tiling is on."""
        if self.use_tiling:
            raise UserError(
                "VAE tiling blends tiles that each see a part of the picture, which bands make "
                "needless and would spoil: call pipe.vae.disable_tiling()"
            )


def downsampling_factor(block_out_channels: list[int]) -> int:
    """How often a diffusers UNet or VAE halves its picture, as a factor: all blocks but the last.

    A UNet's bands begin on multiples of it; a VAE has that many pixels per latent row.
    """
    return int(2 ** (len(block_out_channels) - 1))


def require_no_drift(world: Mesh, tensors: list[Tensor], device: torch.device) -> None:
    """Compare a digest of `tensors` over all ranks: one round of 16 bytes, from `device`.

    Raises:
        UserError: on every rank, naming the first rank that differs from rank 0.
    """
    if world.group is None:
        return
    digests = world.gather_small(digest(tensors, device))
    for rank, theirs in enumerate(digests):
        if theirs != digests[0]:
            raise UserError(
                f"rank {rank} works on another latent, prompt or picture than rank 0: give every "
                "rank the same ones, and draw noise from generators that are seeded alike"
            )


_DIGEST_CHUNK = 1 << 22  # numbers


def digest(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Two 64-bit numbers on `device`, equal for tensors of equal bits, and hardly for others."""
    total = torch.zeros(2, dtype=torch.int64, device=device)
    for tensor in tensors:
        total = 31 * total + _digest(tensor.detach()).to(device)
    return total


def _digest(x: Tensor) -> Tensor:
    """Two 64-bit sums of the very bits of `x`, one weighted by position.

    Chunk by chunk: a condition picture of 16384 px is not widened to 64 bits all at once.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    total = torch.zeros(2, dtype=torch.int64, device=x.device)
    for chunk in x.contiguous().view(integer).flatten().split(_DIGEST_CHUNK):
        bits = chunk.to(torch.int64)
        places = torch.arange(1, bits.numel() + 1, device=bits.device)
        total = 31 * total + torch.stack([bits.sum(), (bits * places).sum()])
    return total


# --- shares of arguments --------------------------------------------------------------------------

# A ControlNet's are this rank's rows already, a T2I-Adapter's are whole.
_CONTROLNET_RESIDUALS = {"down_block_additional_residuals", "mid_block_additional_residual"}
_RESIDUALS = _CONTROLNET_RESIDUALS | {"down_intrablock_additional_residuals"}


def _arguments(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


def _map_tensors(function: Any, value: Any) -> Any:
    """Apply `function` to every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(function, item) for item in value)
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts, in order."""
    found: list[Tensor] = []
    _map_tensors(found.append, value)
    return found


def _share_batch(call: dict[str, Any], batch: int, own: range) -> dict[str, Any]:
    """The rows `own` of every tensor that has one row for each sample of the batch."""
    if len(own) == batch:
        return call

    def share(x: Tensor) -> Tensor:
        return x[own.start : own.stop] if x.ndim and x.shape[0] == batch else x

    return {name: _map_tensors(share, value) for name, value in call.items()}


def _share_residuals(value: Any, rows: range, height: int, width: int) -> Any:
    """`rows`, given in rows of the sample, of residuals at any level of the network.

    A T2I-Adapter's are whole; a ControlNet's are bands already, or pooled to one pixel.
    """
    return _map_tensors(lambda x: _residual_rows(x, rows, height, width), value)


def _residual_rows(x: Tensor, rows: range, height: int, width: int) -> Tensor:
    if x.shape[-2:] == (1, 1):
        return x
    for factor in (1, 2, 4, 8, 16, 32):
        start, stop, whole = -(-rows.start // factor), -(-rows.stop // factor), -(-height // factor)
        if x.shape[-1] == -(-width // factor) and x.shape[-2] == stop - start:
            return x
        if x.shape[-1] == -(-width // factor) and x.shape[-2] == whole:
            return x[:, :, start:stop]
    raise UserError(
        f"a residual of {x.shape[-2]}x{x.shape[-1]} fits no level of a latent of {height}x{width}: "
        "make the condition picture as large as the picture to be painted"
    )


def _picture_rows(picture: Tensor, rows: range, latent_height: int) -> Tensor:
    """The pixel rows [B, C, 8h, 8W] of a condition picture over latent `rows`."""
    pixels = scale_rows(rows, picture.shape[-2] // latent_height)
    return picture[:, :, pixels.start : pixels.stop]
