"""What travels between the ranks of one picture.

A synchronisation mode is one class with three methods: halo rows from the neighbours, a sum over
all bands, and all bands' tokens. Every method is told the `layer` that asks: it labels the count of
bytes, and a mode that remembers can remember per layer.

What travels is the same in all modes, and is set off by `send_halo`, `send_sum` and `send_parts`,
each of which returns a `Transfer` at once. The modes differ in when they wait for it:
`ExactExchange` in the layer that it belongs to, so that N ranks compute what one rank computes;
`engine.bands.displaced` when the layer is next asked, one denoising step later.
"""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.bands.mesh import Mesh

T = TypeVar("T")


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
        return send_halo(self.mesh, self.traffic, layer, x, above, below).wait()

    def sum(self, layer: object, x: Tensor) -> Tensor:
        return send_sum(self.mesh, self.traffic, layer, x).wait()

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        lengths = self.lengths(layer, x.shape[dim])
        return gather_parts(self.mesh, self.traffic, layer, x, dim, lengths)


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


Halo = tuple[Tensor | None, Tensor | None]


def send_halo(
    mesh: Mesh, traffic: Traffic, layer: object, x: Tensor, above: int, below: int
) -> Transfer[Halo]:
    """Swap rows with the neighbours: `Exchange.halo`, not waited for."""
    batch, channels, rows, width = x.shape
    # Every rank has the same plan, but only one may hold the short band; the boundary refuses
    # such plans on all ranks alike (`distribute`), so this cannot be a user's mistake.
    assert max(above, below) <= rows, f"a band of {rows} rows cannot serve {above, below}"
    is_top, is_bottom = mesh.rank == 0, mesh.rank == mesh.size - 1
    from_above = None if is_top else x.new_empty(batch, channels, above, width)
    from_below = None if is_bottom else x.new_empty(batch, channels, below, width)
    swaps = [
        (mesh.rank + 1, x[:, :, rows - above :], from_below),
        (mesh.rank - 1, x[:, :, :below], from_above),
    ]
    # Cloned, since the layer may go on to change its activations before they are away.
    pairs = [
        (mesh.global_rank(peer), rows_out.clone(memory_format=torch.contiguous_format), rows_in)
        for peer, rows_out, rows_in in swaps
        if rows_in is not None
    ]
    own, arriving = [out for _, out, _ in pairs], [rows_in for _, _, rows_in in pairs]
    traffic.count(layer, sum(rows_out.nbytes for rows_out in own))
    return Transfer((from_above, from_below), own, _swap(mesh, pairs), own + arriving)


def _swap(mesh: Mesh, pairs: list[tuple[int, Tensor, Tensor]]) -> list[dist.Work]:
    """Send and receive with each (peer, out, in) at once."""
    operations = []
    for peer, rows_out, rows_in in pairs:
        if rows_out.numel():
            operations.append(dist.P2POp(dist.isend, rows_out, peer, mesh.group))
        if rows_in.numel():
            operations.append(dist.P2POp(dist.irecv, rows_in, peer, mesh.group))
    return dist.batch_isend_irecv(operations) if operations else []


def send_sum(mesh: Mesh, traffic: Traffic, layer: object, x: Tensor) -> Transfer[Tensor]:
    """All-reduce `x`: `Exchange.sum`, not waited for."""
    total = x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(total, group=mesh.group, async_op=True)
    traffic.count(layer, 2 * (mesh.size - 1) / mesh.size * total.nbytes)
    return Transfer(total, [x], [work], [total, x])


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
    work = dist.all_gather(parts, padded, group=mesh.group, async_op=True)
    traffic.count(layer, (mesh.size - 1) * padded.nbytes)
    return Transfer(parts, [padded], [work], parts)


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
