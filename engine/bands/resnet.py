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

In a stream (`engine.bands.stream`) the room begins with the rows that the chunk before has left.
"""

from collections.abc import Callable

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from engine.bands.alone import Fetched
from engine.bands.context import banded, current_exchange
from engine.bands.exchange import Exchange
from engine.bands.layers import (
    BandConv2d,
    BandGroupNorm,
    FusedGroupNorm,
    by_tokens,
    can_fuse,
    global_statistics,
    normalise_and_activate,
    plain_convolution,
)
from engine.bands.stream import Stream
from engine.kernels import pointwise
from engine.kernels.layout import has_hooks, join_rows, room_for


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
        pieces = around(hidden.shape[2])
        shortcut = pieces[0] if len(pieces) == 1 else join_rows(pieces, like=hidden)
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        return (shortcut + hidden) / self.output_scale_factor

    def _activate(self, x: Tensor) -> Tensor:
        return self.dropout(self.nonlinearity(x))

    def _drops(self) -> bool:
        return self.dropout.training or has_hooks(self.dropout)


class FusedResnetBlock2D(BandResnetBlock2D):
    """The same in fewer passes over memory, on bands or not, where its norms are fused.

    Each norm is one with its SiLU. No bias is added by itself: that of the first convolution, and
    the time's shift, are what the second norm's kernel adds to its input; those of the second
    convolution and of the shortcut are added where these two are.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, C, h, W] -> [B, C', h', W]"""
        if not self._is_plain():
            return super().forward(input_tensor, temb)
        exchange = current_exchange()
        around = exchange.delay(self, input_tensor) if exchange else lambda rows: [input_tensor]
        silu = self.nonlinearity
        hidden = normalise_and_convolve(self.norm1, silu, self.conv1, input_tensor, biased=False)
        shift = None if self.conv1.bias is None else self.conv1.bias[None]
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(temb if self.skip_time_act else silu(temb))
            shift = time if shift is None else time + shift
        hidden = normalise_and_convolve(
            self.norm2, silu, self.conv2, hidden, shift=shift, biased=False
        )
        total = self._add_shortcut(hidden, around(hidden.shape[2]))
        return total if self.output_scale_factor == 1 else total / self.output_scale_factor

    def _add_shortcut(self, hidden: Tensor, pieces: list[Tensor]) -> Tensor:
        """`hidden` and what goes around the convolutions, of which `pieces` are rows from the top.

        The biases of both convolutions, and of the shortcut's, are added here.
        """
        shortcut, bias = self.conv_shortcut, self.conv2.bias
        if shortcut is not None and shortcut.bias is not None:
            bias = shortcut.bias if bias is None else bias + shortcut.bias
        around = pieces if shortcut is None else [_without_bias(shortcut, p) for p in pieces]
        if len(around) == 1:
            return pointwise.add(hidden, around[0], bias)
        lengths = [piece.shape[2] for piece in around]
        for rows, piece in zip(hidden.split(lengths, dim=2), around, strict=True):
            total = pointwise.add(rows, piece, bias)
            if total is not rows:
                rows.copy_(total)
        return hidden

    def _is_plain(self) -> bool:
        convolutions = (self.conv1, self.conv2, self.conv_shortcut)
        return (
            isinstance(self.norm1, FusedGroupNorm)
            and isinstance(self.norm2, FusedGroupNorm)
            and type(self.nonlinearity) is nn.SiLU
            and all(conv is None or _is_plain_convolution(conv) for conv in convolutions)
            and not (torch.is_grad_enabled() or self._drops())
        )


def _is_plain_convolution(conv: nn.Module) -> bool:
    return type(conv) in (nn.Conv2d, BandConv2d) and not has_hooks(conv)


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` of x, whose bias is added elsewhere."""
    return conv._conv_forward(x, conv.weight, None)


def is_usual(block: ResnetBlock2D) -> bool:
    """Whether a block is as Stable Diffusion has it: no resizing inside, time only added."""
    return (
        block.upsample is block.downsample is None
        and block.time_embedding_norm != "scale_shift"
        and (block.time_emb_proj is None or block.time_embedding_norm == "default")
    )


def asks_ahead(exchange: Exchange, norm: nn.Module, conv: nn.Module) -> bool:
    """Whether the rows for `conv` may come from before `norm`; the same answer on all ranks."""
    return exchange.halo_ahead and can_join(norm, conv)


def can_join(norm: nn.Module, conv: nn.Module) -> bool:
    """Whether `norm` may write where `conv` reads, between the rows of its neighbours."""
    plain = plain_convolution(conv)
    return (
        isinstance(norm, BandGroupNorm)
        and isinstance(plain, BandConv2d)
        and plain.halo_rows() == (1, 1)  # a dilated one reaches further
        and not has_hooks(norm)
    )


def normalise_and_convolve(
    norm: nn.GroupNorm,
    activate: Callable[[Tensor], Tensor],
    conv: nn.Module,
    x: Tensor,
    *,
    shift: Tensor | None = None,
    biased: bool = True,
) -> Tensor:
    """conv(activate(norm(x + shift))), in one round of messages where `asks_ahead`.

    Args:
        activate: looks at each number by itself, and may change what it is given.
        x: [B, C, h, W]
        shift: [B or 1, C]
        biased: whether the convolution adds its bias; if not, it is a plain one.
    """
    exchange = current_exchange()

    def convolve(rows: Tensor) -> Tensor:
        return conv(rows) if biased else _without_bias(conv, rows)  # type: ignore[arg-type]

    if exchange is None or not can_join(norm, conv):
        return convolve(_normalise_and_activate(norm, activate, exchange, x, shift))
    x = by_tokens(norm, x)
    if isinstance(exchange, Stream):
        room = _room_in_stream(exchange, norm, activate, conv, x, shift)
    else:
        room = _room_on_bands(exchange, norm, activate, conv, x, shift)
    with banded(Fetched(room)):
        return convolve(room[:, :, 1:-1])


def _room_on_bands(
    exchange: Exchange,
    norm: nn.GroupNorm,
    activate: Callable[[Tensor], Tensor],
    conv: nn.Module,
    x: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """[B, C, h + 2, W]: activate(norm(x + shift)) between the rows of the neighbours."""
    assert exchange.halo_ahead, "else rows are normalised before they travel"
    halo = exchange.halo_later(plain_convolution(conv), x, 1, 1, shared=True)
    mean, variance = exchange.statistics(norm, [x], norm.num_groups, shift)
    room = room_for(x, x.shape[2] + 2)

    def fill(rows: Tensor, out: Tensor) -> None:
        normalise_and_activate(norm, activate, rows, mean, variance, out, shift)

    fill(x, room[:, :, 1:-1])
    for row, rows in zip((room[:, :, :1], room[:, :, -1:]), halo(), strict=True):
        if rows is None:
            row.zero_()
        else:
            fill(rows, row)
    return room


def _room_in_stream(
    exchange: Stream,
    norm: nn.GroupNorm,
    activate: Callable[[Tensor], Tensor],
    conv: nn.Module,
    x: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """The same below the rows that the stream has carried here from the chunk before."""
    layer = plain_convolution(conv)
    above = exchange.rows_carried(layer)
    mean, variance = exchange.statistics(norm, [x], norm.num_groups, shift)
    room = room_for(x, above + x.shape[2])
    normalise_and_activate(norm, activate, x, mean, variance, room[:, :, above:], shift)
    exchange.carry_into(layer, room)
    return room


def _normalise_and_activate(
    norm: nn.GroupNorm,
    activate: Callable[[Tensor], Tensor],
    exchange: Exchange | None,
    x: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """activate(norm(x + shift)); where the norm takes its sums apart, one kernel may do the rest.

    Of a whole picture torch's norm does both, and sums taken apart would cost what that kernel
    saves, if it is not fused.
    """
    is_apart = isinstance(norm, BandGroupNorm) and exchange is not None
    if has_hooks(norm) or not (is_apart or can_fuse(norm, x)):
        return activate(norm(x if shift is None else x + shift[:, :, None, None]))
    x = by_tokens(norm, x)
    mean, variance = global_statistics(norm, exchange, [x], shift)
    return normalise_and_activate(norm, activate, x, mean, variance, shift=shift)
