"""The UNet's convolutional layers in chunks of rows: within one rank, a chunk is to its band what a
band is to the picture.

Walk a residual block's input x [B, C, h, W] through it, three chunks of rows:

    plain      x -> norm(x) -> silu(norm(x)) -> conv1: three tensors of x's size, and the result
    chunked    statistics of x, chunk by chunk     a few numbers per group; over bands, all-reduced
               rows 0 ... h/3 of norm, silu        one third of x, with a row more below
               conv1 of these, written into the result; the next third

Nothing but x and the result is ever held whole. The second half of the block writes its output over
its own input: a chunk needs the row above it as it was, which the chunk before it leaves behind.

Up-sampling goes the same way: four times the input's size is never held beside the convolution's
result, which has that size too. And in the UNet's last blocks the input is two tensors, hidden
states and skip, which diffusers would first copy into one (`torch.cat`, 960 channels at 320): here
they stay two, and only chunks of them are joined.

Each is the plain layer up to rounding: statistics are the whole picture's, and halo rows between
chunks are the true rows. Between bands they are exchanged once per convolution, as ever, and with
the sums of the norm before it (`engine.bands.resnet`).
"""

from collections.abc import Callable, Iterator

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bands.context import banded, current_exchange
from engine.bands.exchange import Exchange, is_fused
from engine.bands.layers import (
    BandUpsample2D,
    can_double,
    global_statistics,
    normalise_and_activate,
    plain_convolution,
)
from engine.bands.resnet import asks_ahead, normalise_and_convolve
from engine.config import UserError
from engine.kernels.convolution import convolve_doubled
from engine.kernels.layout import join_rows, room_for

Rows = Callable[[int, int], Tensor]  # rows [start, stop) of a tensor that is never held whole


def split_evenly(length: int, chunks: int) -> list[range]:
    """At most `chunks` ranges of nearly equal length, none of them empty."""
    step = -(-length // min(chunks, length))
    return [range(start, min(start + step, length)) for start in range(0, length, step)]


Edges = tuple[Tensor | None, Tensor | None]  # the rows of the bands above and below


def convolve(
    conv: nn.Module, read: Rows, height: int, chunks: int, edges: Edges | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, `conv` of these rows) of what `read` reads, a band `height` rows high.

    Args:
        conv: keeps the number of rows; a `Conv2d`, or a LoRA around one.
        read: never asked for rows that were yielded before, which may be overwritten meanwhile.
        edges: of the other bands, where they are here already.
    """
    plain = plain_convolution(conv)
    if plain.padding_mode != "zeros":
        raise UserError(
            f"a convolution pads with {plain.padding_mode!r}, which chunks of rows do not: set "
            "padding_mode to 'zeros', or leave row_chunks out"
        )
    reach = int(plain.padding[0])  # rows that it looks up, and as many down
    above, below = edges or _edges(conv, read, height, reach)
    for rows in split_evenly(height, chunks):
        pieces = [read(rows.start, min(rows.stop + reach, height))]
        if above is not None:
            pieces.insert(0, above)
        if below is not None and rows.stop + reach > height:
            pieces.append(below[:, :, : rows.stop + reach - height])
        x = pieces[0] if len(pieces) == 1 else join_rows(pieces, like=pieces[above is not None])
        top = 0 if above is None else above.shape[2]
        with banded(None):  # beyond `x` there are only the picture's edges, or rows to be cut off
            y = conv(x)
        above = x[:, :, max(0, top + len(rows) - reach) : top + len(rows)].clone()
        yield slice(rows.start, rows.stop), y[:, :, top : top + len(rows)]


def _edges(conv: nn.Module, read: Rows, height: int, reach: int) -> Edges:
    """The rows of the bands above and below: one round, as for a convolution of the whole band."""
    exchange = current_exchange()
    if exchange is None or reach == 0:
        return None, None
    if reach > 1:  # a dilated convolution's halo may come from rows anywhere in several bands
        return exchange.halo(plain_convolution(conv), read(0, height), reach, reach)
    return exchange.halo(plain_convolution(conv), _outermost(read, height), 1, 1)


def _outermost(read: Rows, height: int) -> Tensor:
    """The first and the last row of a band, [B, C, 2, W]: all that its neighbours see of it."""
    return torch.cat([read(0, 1), read(height - 1, height)], dim=2)


class InplaceResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """A residual block whose activations, and sums, overwrite what they are made of."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """[B, C, h, W] -> [B, C', h, W]"""
        activate = _SILU_IN_PLACE
        hidden = normalise_and_convolve(self.norm1, activate, self.conv1, input_tensor)
        hidden = add_in_place(hidden, self._time_shift(temb))
        hidden = normalise_and_convolve(self.norm2, activate, self.conv2, hidden)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        hidden = add_in_place(hidden, input_tensor)
        return hidden if self.output_scale_factor == 1 else hidden.div_(self.output_scale_factor)

    def _time_shift(self, temb: Tensor) -> Tensor:
        """[B, T] -> [B, C', 1, 1]. All blocks share temb, so it alone is not overwritten."""
        active = temb if self.skip_time_act else self.nonlinearity(temb)
        return self.time_emb_proj(active)[:, :, None, None]


class ChunkedResnetBlock2D(InplaceResnetBlock2D):
    """A residual block in chunks of rows, whose input may be two tensors not yet joined.

    Attributes:
        row_chunks: how many.
    """

    row_chunks: int

    def forward(self, input_tensor: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, C, h, W] (and skip [B, C2, h, W]) -> [B, C', h, W]"""
        parts = [input_tensor] if skip is None else [input_tensor, skip]
        hidden = self._first_half(parts, self._time_shift(temb))
        return self._second_half(hidden, parts)

    def _first_half(self, parts: list[Tensor], shift: Tensor) -> Tensor:
        """conv1(silu(norm1(x))) + shift"""
        read, edges = _activated(self.norm1, _SILU_IN_PLACE, self.conv1, parts)
        height, out = parts[0].shape[2], None
        for rows, y in convolve(self.conv1, read, height, self.row_chunks, edges):
            out = room_for(y, height) if out is None else out
            torch.add(y, shift, out=out[:, :, rows])
        assert out is not None
        return out

    def _second_half(self, hidden: Tensor, parts: list[Tensor]) -> Tensor:
        """(conv2(silu(norm2(hidden))) + shortcut(x)) / scale, written over `hidden`."""
        read, edges = _activated(self.norm2, _SILU_IN_PLACE, self.conv2, [hidden])
        dtype = torch.promote_types(hidden.dtype, parts[0].dtype)  # they differ under autocast
        out = hidden if hidden.dtype == dtype else torch.empty_like(hidden, dtype=dtype)
        for rows, y in convolve(self.conv2, read, hidden.shape[2], self.row_chunks, edges):
            total = y + self._shortcut(_join(parts, rows.start, rows.stop))
            out[:, :, rows] = total.div_(self.output_scale_factor)
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.conv_shortcut is None:
            return x
        with banded(None):  # 1x1: looks at no other row
            return self.conv_shortcut(x)


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of x wherever the sum has its dtype; under autocast it may not."""
    return x.add_(y) if torch.promote_types(x.dtype, y.dtype) == x.dtype else x + y


_SILU_IN_PLACE = nn.SiLU(inplace=True)


def _activated(
    norm: nn.GroupNorm, activate: nn.SiLU, conv: nn.Module, parts: list[Tensor]
) -> tuple[Rows, Edges | None]:
    """silu(norm(x)) of the parts' channels one after the other, on its way to `conv`.

    Returns:
        What reads its rows, and the other bands' where they came with the norm's sums.
    """
    exchange, halo = current_exchange(), None

    def raw(start: int, stop: int) -> Tensor:
        return _join(parts, start, stop)

    if exchange is not None and asks_ahead(exchange, norm, conv):
        outermost = _outermost(raw, parts[0].shape[2])
        halo = exchange.halo_later(plain_convolution(conv), outermost, 1, 1, shared=True)
    mean, variance = global_statistics(norm, exchange, parts)

    def normalised(x: Tensor) -> Tensor:
        return normalise_and_activate(norm, activate, x, mean, variance)

    def read(start: int, stop: int) -> Tensor:
        return normalised(raw(start, stop))

    if halo is None:
        return read, None
    over, under = (None if rows is None else normalised(rows) for rows in halo())
    return read, (over, under)


def _join(parts: list[Tensor], start: int, stop: int) -> Tensor:
    pieces = [part[:, :, start:stop] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class ChunkedUpsample2D(BandUpsample2D):
    """Doubling and its convolution, in chunks of rows.

    Attributes:
        row_chunks: how many.
    """

    row_chunks: int

    def forward(
        self,
        hidden_states: Tensor,
        output_size: tuple[int, int] | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """[B, C, h, W] -> [B, C', 2h, 2W], or a row or a column less, as `output_size` says."""
        doubled = [2 * side for side in hidden_states.shape[-2:]]
        height, width = doubled if output_size is None else output_size
        is_doubling = doubled[0] - height in (0, 1) and doubled[1] - width in (0, 1)
        if can_double(self) or not is_doubling:
            return super().forward(hidden_states, output_size)

        def read(start: int, stop: int) -> Tensor:
            first = start // 2
            x = F.interpolate(hidden_states[:, :, first : (stop + 1) // 2], scale_factor=2.0)
            return x[:, :, start - 2 * first : stop - 2 * first, :width]

        out: Tensor | None = None
        for rows, y in convolve(self.conv, read, height, self.row_chunks):
            out = room_for(y, height) if out is None else out
            out[:, :, rows] = y
        assert out is not None
        return out

    def _double(self, exchange: Exchange, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        batch, channels, height, width = x.shape
        outermost = torch.cat([x[:, :, :1], x[:, :, -1:]], dim=2)
        edges = exchange.halo(self.conv, outermost, 1, 1)
        above, below = (
            x.new_zeros(batch, channels, 1, width) if rows is None else rows for rows in edges
        )
        all_rows, columns = size or (2 * height, 2 * width)
        weight, bias, out = self.conv.weight, self.conv.bias, None
        for rows in split_evenly(height, self.row_chunks):
            pieces = [x[:, :, max(0, rows.start - 1) : rows.stop + 1]]
            if rows.start == 0:
                pieces.insert(0, above)
            if rows.stop == height:
                pieces.append(below)
            stop = min(2 * rows.stop, all_rows)
            shape = (stop - 2 * rows.start, columns)
            room = join_rows(pieces, like=x)
            y = convolve_doubled(room, weight, bias, shape, is_fused(self))
            out = room_for(y, all_rows) if out is None else out
            out[:, :, 2 * rows.start : stop] = y
        assert out is not None
        return out
