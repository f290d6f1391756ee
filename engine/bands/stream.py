"""A stream: rows of one picture pass through the VAE in chunks, and nothing is computed twice.

    chunk of rows -> conv: [rows carried from the chunk before | chunk] -> all rows that these
    suffice for; the last ones stay behind for the next chunk -> ... -> a chunk of rows, a bit late

A stream is one more exchange that layers ask (`current_exchange`). To a convolution it says: above
you are the last rows of the chunk before, below you nothing yet. So each 3x3 convolution makes its
rows one later than it could with the row below, and a network as many as it has of them. The first
chunks do not reach its end: a convolution that has not enough rows yet is `Starved`, which ends the
chunk's way. The peak of memory is a chunk, whatever the height of the picture.

At its upper edge the stream puts zeros above the rows, as a plain convolution does. If it begins
within the picture, these are wrong, and so is all that they reach; it then begins `margin` rows
early, and what is wrong is cropped. Below the picture the stream goes on for as many rows, of which
each convolution takes the ones beyond the edge for zeros: what is late comes out, chunk by chunk.

Two layers want to see the whole picture at once, which no stream can show them:

    a group norm    is told its mean and variance (`Frozen.norms`);
    attention       is told keys and values of a regular sample of the picture (`Frozen.keys`),
                    the same for every query, so that there are no windows and no seams.

`engine.bands.measure` tells where they come from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.bands.alone import Alone
from engine.bands.context import banded
from engine.bands.exchange import Halo, is_fused, moments
from engine.bands.rows import overlap, scale_rows
from engine.kernels.layout import join_rows

Moments = tuple[Tensor, Tensor]
"""mean, variance; each [B, groups]"""


@dataclass
class Frozen:
    """What the layers of a stream are told instead of looking at the whole picture."""

    norms: dict[object, Moments] = field(default_factory=dict)
    keys: dict[object, Tensor] = field(default_factory=dict)


class Starved(Exception):
    """A convolution has not enough rows yet to make one of its own."""


@dataclass(frozen=True)
class Course:
    """Where a stream runs. Rows and columns are those of the latent.

    Attributes:
        own: the rows that are wanted.
        height, width: of the whole picture.
        margin: rows above and below `own` that its results depend on.
        chunk_rows: rows that go through the network at a time.
        stride: attention's keys are sampled at every `stride`-th row and column.
    """

    own: range
    height: int
    width: int
    margin: int
    chunk_rows: int
    stride: int = 1

    @property
    def start(self) -> int:
        """The first row that goes through the network."""
        return max(0, self.own.start - self.margin)

    @property
    def fed(self) -> range:
        """The rows of the picture that go through the network."""
        return range(self.start, min(self.height, self.own.stop + self.margin))

    def chunks(self) -> Iterator[range]:
        """All rows to be fed, chunk by chunk; they may go on below the picture."""
        stop = self.own.stop + self.margin
        for first in range(self.start, stop, self.chunk_rows):
            yield range(first, min(stop, first + self.chunk_rows))


class Stream(Alone):
    """One run of a network over the rows of `course`.

    Args:
        frozen: statistics and keys for the layers; none for a layer means that it need not be told.
        measures: whether to note what the whole picture's would be: `measured_moments`.
    """

    halo_ahead = False  # beyond the picture there are zeros, also behind a norm

    def __init__(self, course: Course, frozen: Frozen, measures: bool = False) -> None:
        self.course = course
        self.frozen = frozen
        self.measures = measures
        self.moments: dict[object, Tensor] = {}
        self.samples: dict[object, list[Tensor]] = {}
        self._carried: dict[object, Tensor] = {}
        self._held: dict[object, list[Tensor]] = {}
        self._next: dict[object, int] = {}

    @property
    def is_bottom(self) -> bool:
        return False  # `halo` makes zeros of what is below the picture

    def _scale(self, width: int) -> int:
        """Rows of a layer per row of the latent, a power of two; down-sampling pads a column."""
        return 1 << ((width // self.course.width).bit_length() - 1)

    def _rows(self, layer: object, count: int, scale: int) -> range:
        """Which rows of the picture, at that scale, the next `count` are that reach `layer`."""
        first = self._next.get(layer, self.course.start * scale)
        self._next[layer] = first + count
        return range(first, first + count)

    def halo_later(
        self, layer: Any, x: Tensor, above: int, below: int, shared: bool = False
    ) -> Callable[[], Halo]:
        """Rows carried over from the chunk before, and none below. Nothing is waited for.

        A convolution of extent e and stride s makes floor((available - e) / s) + 1 rows. It will
        need again all that comes behind the first s of each of them.
        """
        self._end_picture(layer, x)
        over = self._carried.pop(layer, None)
        if over is None:
            over = x.new_zeros(*x.shape[:2], above, x.shape[3])
        self._carry(layer, [over, x], above + below)
        halo = over, x.new_empty(*x.shape[:2], 0, x.shape[3])
        return lambda: halo

    def rows_carried(self, layer: object) -> int:
        """Rows above the next chunk that a 3x3 convolution gets with it."""
        carried = self._carried.get(layer)
        return 1 if carried is None else carried.shape[2]

    def carry_into(self, layer: Any, room: Tensor) -> None:
        """What `halo` gives a 3x3 convolution, without a copy of the chunk.

        Args:
            room: [B, C, rows_carried + h, W], with the chunk at its end; the rows above it are
                written.
        """
        above = self.rows_carried(layer)
        self._end_picture(layer, room[:, :, above:])
        over = self._carried.pop(layer, None)
        if over is None:
            room[:, :, :above].zero_()
        else:
            room[:, :, :above].copy_(over)
        self._carry(layer, [room], 2)

    def _end_picture(self, layer: object, x: Tensor) -> None:
        """Take the next rows `x` for zeros where they lie below the picture."""
        scale = self._scale(x.shape[3])
        rows, height = self._rows(layer, x.shape[2], scale), self.course.height * scale
        if rows.stop > height:
            x[:, :, max(0, height - rows.start) :] = 0  # beyond the picture nothing is lost

    def _carry(self, layer: Any, pieces: list[Tensor], halo: int) -> None:
        """Keep what the convolution will need again of the rows that it can have now."""
        available, stride = sum(piece.shape[2] for piece in pieces), layer.stride[0]
        outputs = max(0, (available - (halo + stride)) // stride + 1)
        self._carried[layer] = _last_rows(pieces, available - outputs * stride)
        if not outputs:
            raise Starved

    def delay(self, layer: object, x: Tensor) -> Callable[[int], list[Tensor]]:
        """`x` queues behind the rows of the chunks before that have not been asked for yet."""
        queue = self._held[layer] = [*self._held.get(layer, []), x]

        def take(rows: int) -> list[Tensor]:
            total = sum(piece.shape[2] for piece in queue)
            self._held[layer] = [_last_rows(queue, total - rows)]
            return _first_rows(queue, rows)

        return take

    def statistics(
        self, layer: object, parts: list[Tensor], groups: int, shift: Tensor | None = None
    ) -> Moments:
        """The frozen ones; what the own rows add to the true ones is noted by the way."""
        if self.measures:
            rows, own = self._own_rows(layer, torch.cat(parts, 1) if len(parts) > 1 else parts[0])
            if len(rows):
                part = moments([own], groups, shift, is_fused(layer))
                self.moments[layer] = self.moments[layer] + part if layer in self.moments else part
        return self.frozen.norms[layer]

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        """The frozen keys and values; the own part of a sample of the true ones is noted."""
        if self.measures:
            rows, own = self._own_rows(layer, x.transpose(1, 2))
            sample = thin(own, rows, self.course.stride)
            self.samples.setdefault(layer, []).append(sample.flatten(2).transpose(1, 2))
        return self.frozen.keys[layer]

    def _own_rows(self, layer: object, x: Tensor) -> tuple[range, Tensor]:
        """The own ones among the next rows of `x`: [B, C, h, W], or of the latent as [B, C, n]."""
        x = x.unflatten(-1, (-1, self.course.width)) if x.ndim == 3 else x
        scale = self._scale(x.shape[-1])
        rows = self._rows(layer, x.shape[2], scale)
        own = overlap(rows, scale_rows(self.course.own, scale))
        return own, x[:, :, own.start - rows.start : own.stop - rows.start]


def _last_rows(pieces: list[Tensor], rows: int) -> Tensor:
    """A copy of the last `rows` of all pieces [B, C, h, W], which holds no more than these."""
    kept: list[Tensor] = []
    for piece in reversed(pieces):
        take = min(rows, piece.shape[2])
        kept.insert(0, piece[:, :, piece.shape[2] - take :])
        rows -= take
    return join_rows(kept, like=pieces[-1])


def _first_rows(pieces: list[Tensor], rows: int) -> list[Tensor]:
    """The first `rows` of all pieces [B, C, h, W], piece by piece and not copied."""
    taken: list[Tensor] = []
    for piece in pieces:
        part = piece[:, :, :rows]
        rows -= part.shape[2]
        taken += [part] if part.shape[2] else []
    return taken


def run_stream(
    network: Callable[[Tensor], Tensor], source: Tensor, per_row: int, stream: Stream
) -> Iterator[Tensor]:
    """Pass the rows of a picture through `network`, and yield what comes out, row after row.

    Args:
        source: [B, C, h, W], the rows `stream.course.fed`.
        per_row: rows of `source` for each row of the latent.
    """
    course = stream.course
    for chunk in course.chunks():
        rows = source[:, :, per_row * (chunk.start - course.start) :][:, :, : per_row * len(chunk)]
        # Memory of its own, since `halo` may write into it; rows as if the picture went on.
        x = source.new_zeros(*source.shape[:2], per_row * len(chunk), source.shape[3])
        x[:, :, : rows.shape[2]] = rows
        try:
            with banded(stream):
                y = network(x)
        except Starved:
            continue
        yield y


def thin_rows(rows: range, stride: int) -> range:
    """Those of a picture's `rows` that are kept: every `stride`-th of the whole picture."""
    first = rows.start + (stride // 2 - rows.start) % stride
    return range(first, max(first, rows.stop), stride)


def thin(x: Tensor, rows: range, stride: int) -> Tensor:
    """The rows and columns that are kept of `x` [B, C, h, W], which holds `rows` of a picture."""
    first = thin_rows(rows, stride).start - rows.start
    return x[:, :, first::stride, stride // 2 :: stride]
