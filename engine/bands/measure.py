"""What a stream cannot see for itself: statistics and keys of the whole picture, measured before.

A group norm in a stream (`engine.bands.stream`) has to be told the mean and variance of all rows
while it has seen a few. The picture is *thinned out* to every s-th row and column, which keeps the
contrast between neighbours that averaging would take away, and goes through the network whole: a
first guess, and a poor one. So the picture then streams through with that guess, and each norm
notes what really arrives at it.

    thinned picture, corrected -> guess -> the picture streams through -> what arrived
           ^                                                                  |
           +---- corrections: what arrived there, against what arrived here --+

To take what arrived for the truth would be right for the first norm only. What arrives at the
second depends on what the first did, and so on: as many passes as norms. Instead, what arrived at
each norm is held against what the thinned picture had at the same place under the same guess, as a
shift of the mean and a ratio of the variances. The thinned picture goes through once more, each of
its norms corrected by these before it is used (`Rehearsal`), and so the corrections of early norms
reach all later ones in one cheap run. This is a quasi-Newton iteration with the thinned picture for
a model of the whole one. Where it comes to rest, it is exact; `benchmarks/codec.py` measures how
near two or three passes come.

The mid-block's attention gets keys and values that were noted by the way, at every s-th row and
column of the true ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.bands.alone import Alone
from engine.bands.boundary import Layout
from engine.bands.context import banded
from engine.bands.exchange import gather_parts, mean_and_variance
from engine.bands.rows import scale_rows
from engine.bands.stream import Course, Frozen, Moments, Stream, run_stream, thin_rows

_FLOOR = 1e-6
"""What the VAE's norms add to a variance: below it, variances make no difference."""


@dataclass(frozen=True)
class Correction:
    """From the statistics of the thinned picture to those of the whole one."""

    shift: Tensor | float = 0.0  # of the mean, in standard deviations
    ratio: Tensor | float = 1.0  # of the variances

    @classmethod
    def between(cls, thinned: Moments, whole: Moments) -> "Correction":
        """The correction that turns `thinned` into `whole`."""
        variance = thinned[1] + _FLOOR
        return cls((whole[0] - thinned[0]) / variance.sqrt(), (whole[1] + _FLOOR) / variance)

    def apply(self, thinned: Moments) -> Moments:
        """The whole picture's (mean, variance)."""
        mean, variance = thinned[0], thinned[1] + _FLOOR
        return mean + self.shift * variance.sqrt(), (variance * self.ratio - _FLOOR).clamp_min(0)


class Rehearsal(Alone):
    """A whole (thinned) picture goes through the network; its norms are corrected, and noted.

    Args:
        corrections: how each norm's (mean, variance) here is turned into the whole picture's;
            none where nothing is known yet.

    Attributes:
        seen: the statistics that arrived at each norm.
        used: what it normalised by, and the keys and values of attention.
    """

    def __init__(self, corrections: dict[object, Correction]) -> None:
        self.corrections = corrections
        self.seen: dict[object, Moments] = {}
        self.used = Frozen()

    def statistics(
        self, layer: object, parts: list[Tensor], groups: int, shift: Tensor | None = None
    ) -> Moments:
        self.seen[layer] = super().statistics(layer, parts, groups, shift)
        correction = self.corrections.get(layer, Correction())
        self.used.norms[layer] = correction.apply(self.seen[layer])
        return self.used.norms[layer]

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        self.used.keys[layer] = x
        return x


@dataclass(frozen=True)
class Passage:
    """One picture on its way through a network, chunk by chunk.

    Attributes:
        network: from a chunk of rows to what comes out.
        source: the rows `course.fed` of what goes in.
        thinned: all of what goes in, thinned out; the same on every rank.
        rows_in, rows_out: rows going in and coming out for each row of the latent.
    """

    layout: Layout
    course: Course
    network: Callable[[Tensor], Tensor]
    source: Tensor
    thinned: Tensor
    rows_in: int
    rows_out: int

    def run(self, passes: int) -> Tensor:
        """This rank's rows of the result, after as many passes that measure."""
        frozen = self._measure(passes)
        course, result = self.course, None
        own, row = scale_rows(course.own, self.rows_out), course.start * self.rows_out
        for piece in run_stream(self.network, self.source, self.rows_in, Stream(course, frozen)):
            if result is None:
                result = piece.new_empty(1, piece.shape[1], len(own), piece.shape[3])
            kept = piece[:, :, max(0, own.start - row) : max(0, own.stop - row)]
            first = max(0, row - own.start)
            result[:, :, first : first + kept.shape[2]] = kept
            row += piece.shape[2]
        assert result is not None, "the margin is at least what the network is late by"
        assert row >= own.stop, "the margin is at least what the network is late by"
        return result

    def _measure(self, passes: int) -> Frozen:
        """The statistics, keys and values of the whole picture, as near as `passes` come."""
        corrections: dict[object, Correction] = {}
        sample: dict[object, Tensor] = {}
        # What is not thinned is no model but the picture itself, and knows all.
        for _ in range(passes if self.course.stride > 1 else 0):
            rehearsal = self._rehearse(corrections)
            frozen = Frozen(rehearsal.used.norms, rehearsal.used.keys | sample)
            stream = Stream(self.course, frozen, measures=True)
            for _ in run_stream(self.network, self.source, self.rows_in, stream):
                pass  # what comes out is not good enough yet
            corrections = self._compare(rehearsal.seen, stream.moments)
            sample = {layer: self._join(layer, parts) for layer, parts in stream.samples.items()}
        used = self._rehearse(corrections).used
        return Frozen(used.norms, used.keys | sample)

    def _rehearse(self, corrections: dict[object, Correction]) -> Rehearsal:
        """Pass the thinned picture through the network, on every rank alike."""
        rehearsal = Rehearsal(corrections)
        with banded(rehearsal):
            self.network(self.thinned)
        return rehearsal

    def _compare(
        self, thinned: dict[object, Moments], own: dict[object, Tensor]
    ) -> dict[object, Correction]:
        """What turns the thinned picture's statistics into those of all ranks' rows: one round."""
        total = torch.cat([own[layer].flatten() for layer in thinned])
        if self.layout.exchange is not None:
            total = self.layout.exchange.sum(self, total)
        parts = total.split([own[layer].numel() for layer in thinned])
        corrections = {}
        for (layer, seen), part in zip(thinned.items(), parts, strict=True):
            mean, variance = mean_and_variance(part.view_as(own[layer]))
            corrections[layer] = Correction.between(seen, (mean.to(seen[0]), variance.to(seen[1])))
        return corrections

    def _join(self, layer: object, parts: list[Tensor]) -> Tensor:
        """All ranks' samples of keys and values [1, n, C], one after the other."""
        own, layout, stride = torch.cat(parts, 1), self.layout, self.course.stride
        if layout.exchange is None:
            return own
        columns = len(thin_rows(range(self.course.width), stride))
        rows = [len(thin_rows(band, stride)) for band in layout.bands(self.course.height)]
        lengths = [columns * count for count in rows]
        return gather_parts(layout.exchange.mesh, layout.traffic, layer, own, 1, lengths)
