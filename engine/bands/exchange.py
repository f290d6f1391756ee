"""What travels between the ranks of one picture.

A synchronisation mode is one class with three methods: halo rows from the neighbours, a sum over
all bands, and all bands' tokens. `ExactExchange` waits for each in the step that it belongs to, so
that N ranks compute what one rank computes. Every method is told the `layer` that asks: it labels
the count of bytes, and a mode that remembers (stale halos, stale sums) can remember per layer.
"""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from engine.bands.mesh import Mesh


@dataclass
class Traffic:
    """Bytes that this rank sent, and rounds that it took part in, by kind of layer.

    An all-reduce of S bytes over N ranks counts as the ring algorithm's 2 (N-1)/N S, a gather as
    the (N-1) times that each rank's own share is passed on; halos as the rows really sent.
    """

    bytes_sent: Counter[str] = field(default_factory=Counter)
    rounds: Counter[str] = field(default_factory=Counter)

    def count(self, layer: object, sent: float) -> None:
        """Add one round of `layer` in which this rank sent that many bytes."""
        kind = _kind(layer)
        self.bytes_sent[kind] += round(sent)
        self.rounds[kind] += 1

    @property
    def megabytes(self) -> float:
        """All bytes sent, in MB of 10^6 bytes."""
        return sum(self.bytes_sent.values()) / 1e6


def _kind(layer: object) -> str:
    """A layer's label in the traffic: its `traffic_kind`, or the name of its class."""
    return getattr(layer, "traffic_kind", type(layer).__name__)


class Exchange(ABC):
    """What a layer may ask of the other bands."""

    def __init__(self, mesh: Mesh, traffic: Traffic) -> None:
        assert mesh.group is not None, "a single rank has nobody to exchange with"
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

    @abstractmethod
    def halo(
        self, layer: object, x: Tensor, above: int, below: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The neighbours' rows next to `x` [B, C, h, W]: `above` rows over it, `below` under it.

        Every rank asks for the same numbers. None stands where the picture ends, or for no rows.
        """

    @abstractmethod
    def sum(self, layer: object, x: Tensor) -> Tensor:
        """The sum over all bands of `x`, which has the same shape on each of them."""

    @abstractmethod
    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        """All bands' `x`, one after the other along `dim`, where they may differ in length."""

    def lengths(self, layer: object, own: int) -> list[int]:
        """Every band's `own`, in order from the top: how many tokens each has, say."""
        counts = self.mesh.gather_small(torch.tensor([own], device=self.mesh.device))
        self.traffic.count(layer, (self.mesh.size - 1) * 8)
        return [count for (count,) in counts]

    def start(self, sample: Tensor) -> None:  # noqa: B027
        """A network begins a forward on `sample`, the whole one; for modes that remember."""

    def reset(self) -> None:  # noqa: B027
        """Another picture begins; for modes that remember."""


class ExactExchange(Exchange):
    """Every layer waits for what it needs: N ranks give what one rank gives, up to rounding."""

    def halo(
        self, layer: object, x: Tensor, above: int, below: int
    ) -> tuple[Tensor | None, Tensor | None]:
        batch, channels, rows, width = x.shape
        # Every rank has the same plan, but only one may hold the short band; the boundary refuses
        # such plans on all ranks alike (`distribute`), so this cannot be a user's mistake.
        assert max(above, below) <= rows, f"a band of {rows} rows cannot serve {above, below}"
        from_above = None if self.is_top else x.new_empty(batch, channels, above, width)
        from_below = None if self.is_bottom else x.new_empty(batch, channels, below, width)
        up, down = self.mesh.rank - 1, self.mesh.rank + 1
        sends = [(down, x[:, :, rows - above :], from_below), (up, x[:, :, :below], from_above)]
        sent = self._swap(
            [(peer, rows_out.contiguous(), rows_in) for peer, rows_out, rows_in in sends]
        )
        self.traffic.count(layer, sent)
        return from_above, from_below

    def _swap(self, pairs: list[tuple[int, Tensor, Tensor | None]]) -> int:
        """Send and receive with each (peer, out, in) at once; a peer outside is skipped."""
        operations, sent = [], 0
        for peer, rows_out, rows_in in pairs:
            if rows_in is None:
                continue
            to = self.mesh.global_rank(peer)
            if rows_out.numel():
                operations.append(dist.P2POp(dist.isend, rows_out, to, self.mesh.group))
                sent += rows_out.nbytes
            if rows_in.numel():
                operations.append(dist.P2POp(dist.irecv, rows_in, to, self.mesh.group))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return sent

    def sum(self, layer: object, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self.mesh.group)
        size = self.mesh.size
        self.traffic.count(layer, 2 * (size - 1) / size * total.nbytes)
        return total

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        lengths = self.lengths(layer, x.shape[dim])
        return gather_parts(self.mesh, self.traffic, layer, x, dim, lengths)


def gather_parts(
    mesh: Mesh, traffic: Traffic, layer: object, x: Tensor, dim: int, lengths: list[int]
) -> Tensor:
    """Every rank's `x`, one after the other along `dim`, where rank r has `lengths[r]`."""
    assert x.shape[dim] == lengths[mesh.rank]
    # The collective wants equal shapes, so shorter pieces travel padded to the longest.
    front = x.movedim(dim, 0)
    padded = front.new_zeros(max(lengths), *front.shape[1:])
    padded[: len(front)] = front
    pieces = [torch.empty_like(padded) for _ in range(mesh.size)]
    dist.all_gather(pieces, padded, group=mesh.group)
    traffic.count(layer, (mesh.size - 1) * padded.nbytes)
    joined = torch.cat([piece[:n] for piece, n in zip(pieces, lengths, strict=True)])
    return joined.movedim(0, dim)
