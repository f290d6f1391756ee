"""What travels between the ranks of one picture.

A synchronisation mode is one class with three methods: halo rows from the neighbours, a sum over
all bands, and all bands' tokens. Every method is told the `layer` that asks: it labels the count of
bytes, and a mode that remembers can remember per layer. Rows and sums may be set off first and
waited for later (`halo_later`, `sum_later`), so that a layer computes what it can meanwhile.

What travels is the same in all modes, and is set off by `send_halo`, `send_sum` and `send_parts`,
each of which returns a `Transfer` at once. The modes differ in when they wait for it:
`ExactExchange` in the layer that it belongs to, so that N ranks compute what one rank computes;
`engine.bands.displaced` when the layer is next asked, one denoising step later.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from engine.bands.mesh import Mesh
from engine.bands.rows import overlap, stack_rows
from engine.kernels import norms
from engine.kernels.layout import join_rows

T = TypeVar("T")
Halo = tuple[Tensor | None, Tensor | None]


@dataclass
class Traffic:
    """Bytes that this rank sent, and rounds that it took part in, by kind of layer.

    An all-reduce of S bytes over N ranks counts as the ring algorithm's 2 (N-1)/N S, a gather as
    the (N-1) times that each rank's own share is passed on; halos as the rows really sent.
    """

    bytes_sent: Counter[str] = field(default_factory=Counter)
    rounds: Counter[str] = field(default_factory=Counter)

    def count(self, layer: object, sent: float, shared: bool = False) -> None:
        """Add the bytes that this rank sent for `layer`, in a round of its own or another's."""
        kind = _kind(layer)
        self.bytes_sent[kind] += round(sent)
        if not shared:
            self.rounds[kind] += 1

    def add(self, other: "Traffic") -> None:
        """Count what `other` has counted, too."""
        self.bytes_sent.update(other.bytes_sent)
        self.rounds.update(other.rounds)

    def since(self, before: "Traffic") -> "Traffic":
        """What was counted after a copy of this was made."""
        return Traffic(self.bytes_sent - before.bytes_sent, self.rounds - before.rounds)

    @property
    def megabytes(self) -> float:
        """All bytes sent, in MB of 10^6 bytes."""
        return sum(self.bytes_sent.values()) / 1e6


def _kind(layer: object) -> str:
    """A layer's label in the traffic: its `traffic_kind`, or the name of its class."""
    return getattr(layer, "traffic_kind", type(layer).__name__)


class Exchange(ABC):
    """What a layer may ask of the other bands.

    Attributes:
        halo_ahead: a layer may ask for its neighbours' rows before it has normalised its own, since
            theirs are normalised like its own when they come.
    """

    halo_ahead = True

    def __init__(self, mesh: Mesh, traffic: Traffic) -> None:
        assert mesh.size > 1, "a single rank has nobody to exchange with"
        self.mesh = mesh
        self.traffic = traffic

    @property
    def is_top(self) -> bool:
        """This band begins at the upper edge of the picture."""
        return self.mesh.rank == 0

    @property
    def is_bottom(self) -> bool:
        """This band ends at the lower edge of the picture."""
        return self.mesh.rank == self.mesh.size - 1

    def halo(self, layer: object, x: Tensor, above: int, below: int) -> Halo:
        """The rows next to `x` [B, C, h, W]: `above` rows over it, `below` rows under it.

        Every rank asks for the same numbers. None stands at the picture's edges, or for no rows;
        rows that would lie beyond an edge that is not this band's own are zeros.
        """
        return self.halo_later(layer, x, above, below)()

    @abstractmethod
    def halo_later(
        self, layer: object, x: Tensor, above: int, below: int, shared: bool = False
    ) -> Callable[[], Halo]:
        """`halo`, set off; the function returned waits for it. `x` may change in between.

        Args:
            shared: another round follows at once, and both travel together: counted as one.
        """

    def between(self, layer: object, x: Tensor, halo: tuple[int, int], edge: int) -> Tensor:
        """`x` [B, C, h, W] between its neighbours' rows, `halo` of them (above, below).

        Args:
            edge: rows of zeros in their place where the picture ends.
        """
        over, under = self.halo(layer, x, *halo)
        zeros = x.new_zeros(*x.shape[:2], edge, x.shape[3])
        pieces = [zeros if over is None else over, x, zeros if under is None else under]
        return join_rows(pieces, like=x)

    def wide_halo(self, layer: object, x: Tensor, above: int, below: int) -> Halo:
        """`halo` for any number of rows, from as many bands as they reach into; waited for."""
        lengths = self.lengths(layer, x.shape[2])
        have = stack_rows(lengths)
        height = have[-1].stop
        want = [
            [range(max(0, b.start - above), b.start), range(b.stop, min(height, b.stop + below))]
            for b in have
        ]
        over, under = fetch_pieces(self.mesh, self.traffic, layer, x, have, want)
        return (
            None if self.is_top else F.pad(over, (0, 0, above - over.shape[2], 0)),
            None if self.is_bottom else F.pad(under, (0, 0, 0, below - under.shape[2])),
        )

    def sum(self, layer: object, x: Tensor) -> Tensor:
        """The sum over all bands of `x`, which has the same shape on each of them."""
        return self.sum_later(layer, x)()

    @abstractmethod
    def sum_later(self, layer: object, x: Tensor) -> Callable[[], Tensor]:
        """`sum`, set off; the function returned waits for it. Nobody may change `x` or the sum."""

    @abstractmethod
    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        """All bands' `x`, one after the other along `dim`, where they may differ in length."""

    def statistics(
        self, layer: object, parts: list[Tensor], groups: int, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance [B, groups] over all bands, for a group norm; arguments as `moments`'.

        No data vary less than a part of them does; rounding, or a guess of what the other bands
        have by now (`engine.bands.displaced`), could say otherwise, so the own part is the least.
        """
        own = moments(parts, groups, shift, is_fused(layer))
        total = self.sum(layer, own)
        mean, variance = mean_and_variance(total)
        own_share = mean_and_variance(own)[1] * own[0] / total[0]
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        return mean.to(dtype), torch.maximum(variance, own_share).clamp(min=0).to(dtype)

    def delay(self, layer: object, x: Tensor) -> Callable[[int], list[Tensor]]:
        """Hold `x` [B, C, h, W] until it is added to what the layer's convolutions make of it.

        Returns a function that is told the rows that they made and gives those of `x` which belong
        to them, piece by piece from the top: all of them, unless rows come in chunks
        (`engine.bands.stream`).
        """
        return lambda rows: [x]

    def lengths(self, layer: object, own: int) -> list[int]:
        """Every band's `own`, in order from the top: how many tokens each has, say."""
        lengths = self.mesh.gather_lengths(own)
        self.traffic.count(layer, (self.mesh.size - 1) * 8)
        return lengths

    def start(self, sample: Tensor) -> None:  # noqa: B027
        """A network begins a forward on `sample`, the whole one; for modes that remember."""

    def reset(self) -> None:  # noqa: B027
        """Another picture begins; for modes that remember."""


class ExactExchange(Exchange):
    """Every layer waits for what it needs: N ranks give what one rank gives, up to rounding."""

    def halo_later(
        self, layer: object, x: Tensor, above: int, below: int, shared: bool = False
    ) -> Callable[[], Halo]:
        if max(above, below) > 1:  # more than the shortest band may have
            halo = self.wide_halo(layer, x, above, below)
            return lambda: halo
        return send_halo(self.mesh, self.traffic, layer, x, above, below, shared).wait

    def sum_later(self, layer: object, x: Tensor) -> Callable[[], Tensor]:
        return send_sum(self.mesh, self.traffic, layer, x).wait

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        lengths = self.lengths(layer, x.shape[dim])
        return gather_parts(self.mesh, self.traffic, layer, x, dim, lengths)


# --- moments --------------------------------------------------------------------------------------


def is_fused(layer: object) -> bool:
    """Whether a layer computes by kernels, where they can; see `engine.fuse`."""
    return getattr(layer, "fused", False)


def moments(
    parts: list[Tensor], groups: int, shift: Tensor | None = None, fused: bool = False
) -> Tensor:
    """[count, sum, sum of squares] of each group of channels: [3, B, groups] in fp64.

    Mean and variance are taken in fp32 in two passes, and only their recombination, a few numbers
    per channel, goes through a sum of squares, in fp64, where the cancellation of E[x^2] - E[x]^2
    does no harm. fp16 activations never get squared in fp16.

    Args:
        parts: [B, C_i, ...] each, whose channels one after the other are grouped: a group may lie
            across two of them.
        shift: [B or 1, C], what is still to be added to the channels.
        fused: by the kernel of `engine.kernels.norms`, where it can.
    """
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    by_channel = torch.cat([_channel_moments(part, dtype, fused) for part in parts], dim=-1)
    if shift is not None:
        count, total, squares = by_channel
        by = shift.double()
        moved = [count, total + count * by, squares + 2 * by * total + count * by**2]
        by_channel = torch.stack(moved)
    return by_channel.unflatten(-1, (groups, -1)).sum(-1)


_STATISTICS_ELEMENTS = 2**25  # of a chunk that is widened to fp32, or copied by a kernel


def _channel_moments(x: Tensor, dtype: torch.dtype, fused: bool) -> Tensor:
    """[count, sum, sum of squares] of every channel of x [B, C, ...]: [3, B, C] in fp64.

    Chunk by chunk, so that half precision is never widened all at once, if not by a kernel.
    """
    if fused and norms.can_compute(x):
        mean, variance = norms.channel_moments(x)
        count = torch.full_like(mean, x[0, 0].numel())
        return torch.stack([count, count * mean, count * (variance + mean**2)])
    places = max(1, _STATISTICS_ELEMENTS // max(1, x.numel() // x.shape[2]))
    moments = x.new_zeros(3, *x.shape[:2], dtype=torch.float64)
    for chunk in x.split(places, dim=2):
        mean, variance = _mean_and_variance(chunk.to(dtype))
        count = torch.full_like(mean, chunk[0, 0].numel())
        moments += torch.stack([count, count * mean, count * (variance + mean**2)])
    return moments


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every channel of x [B, C, ...]: [B, C] each, in fp64."""
    if x.device.type == "cuda":
        variance, mean = torch.var_mean(x, dim=tuple(range(2, x.ndim)), correction=0)
        return mean.double(), variance.double()
    # On a CPU `var_mean` takes ten times as long as this kernel, which normalises besides.
    batch, channels = x.shape[:2]
    size = x.numel() // (batch * channels)
    options = (batch, channels, size, channels, 0.0)
    _, mean, scale = torch.native_group_norm(x.contiguous(), None, None, *options)
    return mean.double(), scale.double() ** -2


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[3, ...] -> the mean and the variance [...] of all that was counted."""
    count, total, squares = moments
    mean = total / count
    return mean, squares / count - mean**2


# --- what every mode sends ------------------------------------------------------------------------


@dataclass(eq=False)
class Transfer(Generic[T]):
    """Tensors on their way between ranks. Every rank sets off the same ones in the same order.

    Attributes:
        result: what arrives; complete after `wait()`.
        own: what this rank put in. Nobody may change it, nor `result`.
        works: what `torch.distributed` is still busy with.
        buffers: all tensors that the transfer holds, each once.
    """

    result: T
    own: list[Tensor]
    works: list[dist.Work]
    buffers: list[Tensor]

    def wait(self) -> T:
        """The result, once all of it is here and all of `own` is away."""
        for work in self.works:
            work.wait()
        self.works = []
        return self.result


def send_halo(
    mesh: Mesh,
    traffic: Traffic,
    layer: object,
    x: Tensor,
    above: int,
    below: int,
    shared: bool = False,
) -> Transfer[Halo]:
    """Swap a row with each neighbour: `Exchange.halo_later`."""
    batch, channels, rows, width = x.shape
    assert max(above, below) <= 1 <= rows, "a wider halo may reach beyond the neighbour's rows"
    is_top, is_bottom = mesh.rank == 0, mesh.rank == mesh.size - 1
    from_above = None if is_top else x.new_empty(batch, channels, above, width)
    from_below = None if is_bottom else x.new_empty(batch, channels, below, width)
    swaps = [
        (mesh.rank + 1, x[:, :, rows - above :], from_below),
        (mesh.rank - 1, x[:, :, :below], from_above),
    ]
    # Cloned, since the layer may go on to change its activations before they are away.
    pairs = [
        (peer, rows_out.clone(memory_format=torch.contiguous_format), rows_in)
        for peer, rows_out, rows_in in swaps
        if rows_in is not None
    ]
    own, arriving = [out for _, out, _ in pairs], [rows_in for _, _, rows_in in pairs]
    traffic.count(layer, sum(rows_out.nbytes for rows_out in own), shared)
    works = mesh.swap(
        outgoing=[(peer, rows_out) for peer, rows_out, _ in pairs],
        incoming=[(peer, rows_in) for peer, _, rows_in in pairs],
    )
    return Transfer((from_above, from_below), own, works, own + arriving)


def fetch_rows(
    mesh: Mesh, traffic: Traffic, layer: object, x: Tensor, have: list[range], want: list[range]
) -> Tensor:
    """Rows `want[rank]` of a picture of which each rank r holds the rows `have[r]`.

    Args:
        x: [B, C, h, W], this rank's rows.
        have, want: the same lists on every rank.

    Returns:
        [B, C, len(want[rank]), W]
    """
    (rows,) = fetch_pieces(mesh, traffic, layer, x, have, [[piece] for piece in want])
    return rows


def fetch_pieces(
    mesh: Mesh,
    traffic: Traffic,
    layer: object,
    x: Tensor,
    have: list[range],
    want: list[list[range]],
) -> list[Tensor]:
    """As `fetch_rows`, several pieces for each rank in one round."""
    batch, channels, height, width = x.shape
    assert height == len(have[mesh.rank]), "the others count on the rows that this rank has"
    pieces = [x.new_empty(batch, channels, len(piece), width) for piece in want[mesh.rank]]
    outgoing, incoming, places = [], [], []
    for peer in range(mesh.size):
        for piece in want[peer]:
            going = overlap(have[mesh.rank], piece)
            if going and peer != mesh.rank:
                outgoing.append((peer, _rows_of(x, have[mesh.rank], going).contiguous()))
        for piece, rows in zip(want[mesh.rank], pieces, strict=True):
            coming = overlap(have[peer], piece)
            place = _rows_of(rows, piece, coming)
            if coming and peer == mesh.rank:
                place.copy_(_rows_of(x, have[peer], coming))
            elif coming:
                # Into its place, where that is one piece of memory, as it is for a single channel.
                incoming.append((peer, place if place.is_contiguous() else torch.empty_like(place)))
                places.append(place)
    traffic.count(layer, sum(rows.nbytes for _, rows in outgoing))
    for work in mesh.swap(outgoing, incoming):
        work.wait()
    for place, (_, rows) in zip(places, incoming, strict=True):
        if rows is not place:
            place.copy_(rows)
    return pieces


def _rows_of(x: Tensor, have: range, rows: range) -> Tensor:
    """The picture's `rows` of `x`, which holds the rows `have`."""
    return x[:, :, rows.start - have.start : rows.stop - have.start]


def send_sum(mesh: Mesh, traffic: Traffic, layer: object, x: Tensor) -> Transfer[Tensor]:
    """All-reduce `x`: `Exchange.sum_later`."""
    total = x.clone(memory_format=torch.contiguous_format)
    works = mesh.all_reduce(total)
    traffic.count(layer, 2 * (mesh.size - 1) / mesh.size * total.nbytes)
    return Transfer(total, [x], works, [total, x])


def send_parts(
    mesh: Mesh, traffic: Traffic, layer: object, x: Tensor, dim: int, lengths: list[int]
) -> Transfer[list[Tensor]]:
    """All-gather `x`, not waited for: parts for `join_parts`, each as long as the longest."""
    assert x.shape[dim] == lengths[mesh.rank]
    # The collective wants equal shapes, so shorter pieces travel padded to the longest.
    front = x.movedim(dim, 0)
    padded = front.new_zeros(max(lengths), *front.shape[1:])
    padded[: len(front)] = front
    parts = [padded if r == mesh.rank else torch.empty_like(padded) for r in range(mesh.size)]
    works = mesh.all_gather(parts, padded)
    traffic.count(layer, (mesh.size - 1) * padded.nbytes)
    return Transfer(parts, [padded], works, parts)


def join_parts(parts: list[Tensor], dim: int, lengths: list[int]) -> Tensor:
    """The first `lengths[r]` of each rank r's part, one after the other along `dim`."""
    joined = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
    return joined.movedim(0, dim)


def gather_parts(
    mesh: Mesh, traffic: Traffic, layer: object, x: Tensor, dim: int, lengths: list[int]
) -> Tensor:
    """Every rank's `x`, one after the other along `dim`, where rank r has `lengths[r]`."""
    parts = send_parts(mesh, traffic, layer, x, dim, lengths).wait()
    return join_parts(parts, dim, lengths)
