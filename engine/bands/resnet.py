"""Residual blocks over bands: two rounds of messages each, not four.

    x [B, C, h, W] -> group norm -> SiLU -> 3x3 convolution, and once more, shifted by time between

Layer by layer, the norm's sums would be one round and the convolution's halo another. But once its
mean and variance are known a norm looks at each number by itself. So the neighbours' rows are asked
for as they come *into* the norm, travel while its sums are taken and added up, and are normalised
here, by the very statistics that their own rank has:

    set off    rows next to the band, raw
    all-reduce [count, sum, sum of squares]; then both are here
    room [B, C, h + 2, W] = SiLU(norm(rows above | x | rows below)), zeros where the picture ends
    convolution of the room
"""

from collections.abc import Callable

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from engine.bands.alone import Fetched
from engine.bands.context import banded, current_exchange
from engine.bands.exchange import Exchange
from engine.bands.layers import (
    BandConv2d,
    BandGroupNorm,
    has_hooks,
    normalise_and_activate,
    plain_convolution,
)


class BandResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """A residual block, of a UNet or a VAE; see `is_usual`.

    On whole bands as many rows are convolved as go around the convolutions. In a stream the
    convolutions are a few rows late, so the others wait for as long: `Exchange.delay`.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, C, h, W] -> [B, C', h', W]"""
        exchange = current_exchange()
        if exchange is None:
            return super().forward(input_tensor, temb)
        around = exchange.delay(self, input_tensor)
        hidden = normalise_and_convolve(self.norm1, self.nonlinearity, self.conv1, input_tensor)
        if self.time_emb_proj is not None:
            active = temb if self.skip_time_act else self.nonlinearity(temb)
            hidden = hidden + self.time_emb_proj(active)[:, :, None, None]
        activate = self._activate if self._drops() else self.nonlinearity
        hidden = normalise_and_convolve(self.norm2, activate, self.conv2, hidden)
        shortcut = around(hidden.shape[2])
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        return (shortcut + hidden) / self.output_scale_factor

    def _activate(self, x: Tensor) -> Tensor:
        return self.dropout(self.nonlinearity(x))

    def _drops(self) -> bool:
        return self.dropout.training or has_hooks(self.dropout)


def is_usual(block: ResnetBlock2D) -> bool:
    """Whether a block is as Stable Diffusion has it: no resizing inside, time only added."""
    return (
        block.upsample is block.downsample is None
        and block.time_embedding_norm != "scale_shift"
        and (block.time_emb_proj is None or block.time_embedding_norm == "default")
    )


def asks_ahead(exchange: Exchange, norm: nn.Module, conv: nn.Module) -> bool:
    """Whether the rows for `conv` may come from before `norm`; the same answer on all ranks."""
    plain = plain_convolution(conv)
    return (
        exchange.halo_ahead
        and isinstance(norm, BandGroupNorm)
        and isinstance(plain, BandConv2d)
        and plain.halo_rows() == (1, 1)  # a dilated one reaches further
        and not has_hooks(norm)
    )


def normalise_and_convolve(
    norm: nn.GroupNorm, activate: Callable[[Tensor], Tensor], conv: nn.Module, x: Tensor
) -> Tensor:
    """conv(activate(norm(x))), in one round of messages where `asks_ahead`.

    Args:
        activate: looks at each number by itself, and may change what it is given.
        x: [B, C, h, W]
    """
    exchange = current_exchange()
    if exchange is None or not asks_ahead(exchange, norm, conv):
        return conv(_normalise_and_activate(norm, activate, exchange, x))
    halo = exchange.halo_later(plain_convolution(conv), x, 1, 1, shared=True)
    mean, variance = exchange.statistics(norm, [x], norm.num_groups)
    batch, channels, height, width = x.shape
    room = x.new_empty(batch, channels, height + 2, width)
    normalise_and_activate(norm, activate, x, mean, variance, out=room[:, :, 1:-1])
    for place, rows in zip((0, height + 1), halo(), strict=True):
        row = room[:, :, place : place + 1]
        if rows is None:
            row.zero_()
        else:
            normalise_and_activate(norm, activate, rows, mean, variance, out=row)
    with banded(Fetched(room)):
        return conv(room[:, :, 1:-1])


def _normalise_and_activate(
    norm: nn.GroupNorm, activate: Callable[[Tensor], Tensor], exchange: Exchange | None, x: Tensor
) -> Tensor:
    """activate(norm(x)); over bands the norm takes its sums apart, so one kernel may do the rest.

    Of a whole picture torch's norm does both, and sums taken apart would cost what that kernel
    saves.
    """
    if exchange is None or not isinstance(norm, BandGroupNorm) or has_hooks(norm):
        return activate(norm(x))
    mean, variance = exchange.statistics(norm, [x], norm.num_groups)
    return normalise_and_activate(norm, activate, x, mean, variance)
