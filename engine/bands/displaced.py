"""The displaced mode: other bands' activations are those of the step before, fetched meanwhile.

Neighbouring denoising steps see nearly the same picture. DistriFusion (Li et al. 2024, "Distributed
Parallel Inference for High-Resolution Diffusion Models", arXiv:2402.19481, section 4: displaced
patch parallelism) therefore lets each rank compute with its own fresh activations and its
neighbours' of one step ago, while the fresh ones travel. Nobody waits for a message that has had a
whole step to arrive: the option for small pictures on many GPUs, where latency rules.

Every layer asks at the same places in each step, its call sites. At step t, site by site,

    halo     own rows of t between the neighbours' rows of t-1
    sum      own x of t + (total of t-1 - own x of t-1)
    gather   own tokens of t among the others' tokens of t-1

and what was sent in t is waited for when the site comes round in t+1.

As the noise goes, sums change with a trend, not at random, so that what is a step old is wrong in
the same direction at each step: the picture gets a tint. By default, therefore, the others' sum of
t is taken from the straight line through those of t-1 and t-2 (`extrapolate`), which leaves an
error of second order in the change. `benchmarks/quality.py` measures it with and without. Halos
stay as they were: a line through them feeds back between neighbours, and rings. DistriFusion meets
the trend otherwise, in group norms only: it adds the *whole* change of its own band's mean to the
mean of all bands, as if all had changed alike ("corrected asynchronous GroupNorm").

No guess may make sums that no data have. The line is followed to half or double of each sum at
most, so that linear attention's normaliser stays positive and its numerator in proportion; and a
band's own share of the variance is the least that `BandGroupNorm` lets the whole have.

The first steps, which lay out the picture and differ most, are warm-up: each site waits, as in
exact mode. A picture of S steps with W of them costs W exact steps and S - W displaced ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.bands.exchange import (
    Exchange,
    Halo,
    Traffic,
    Transfer,
    join_parts,
    send_halo,
    send_parts,
    send_sum,
)
from engine.bands.mesh import Mesh
from engine.config import UserError

T = TypeVar("T")


@dataclass
class _Site:
    """One call of one layer in every forward: what it sent last, latest first, and how often."""

    layer: object  # held, so that no other layer can come to have its id
    sent: list[Transfer[Any]] = field(default_factory=list)
    uses: int = 0


@dataclass
class _Memory:
    """What a picture in the making has sent so far, by call site.

    A site is a layer, the how-many-eth call of it in this forward, and the shapes that it sends.
    All ranks see the same sites come round at the same time: shapes that only some of them see
    change, such as the number of own rows, are no part of it.
    """

    sites: dict[tuple[object, ...], _Site] = field(default_factory=dict)
    lengths: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def next_call(self, layer: object) -> tuple[int, int]:
        """(the layer, its how-many-eth call in this forward)"""
        call = self.calls.get(id(layer), 0)
        self.calls[id(layer)] = call + 1
        return id(layer), call


class DisplacedExchange(Exchange):
    """Others' halos, sums and tokens are those of the forwards before, once warmed up.

    "Before" is counted in forwards of the network: a scheduler that calls it twice a step (Heun)
    gets what is half a step old. Buffers hold what was sent and received in one forward or two:
    `buffer_bytes`. A new pipeline call forgets them, and so does a sample of another shape; who
    calls a network without a pipeline says `reset()` when another picture begins, and once more at
    the end.

    Args:
        warmup_steps: how many forwards of each picture are exact, one at least; DistriFusion's
            default is 4.
        extrapolate: let the others' sums follow the trend of the last two forwards; otherwise they
            stand as they were in the last one.
    """

    def __init__(
        self, mesh: Mesh, traffic: Traffic, warmup_steps: int = 4, extrapolate: bool = True
    ) -> None:
        super().__init__(mesh, traffic)
        if warmup_steps < 1:
            raise UserError(
                f"warmup_steps is {warmup_steps}: it must be 1 or more, since the first step has "
                "none before it to take anything from"
            )
        self.warmup_steps = warmup_steps
        self.extrapolate = extrapolate
        self._memory = _Memory()
        self._sample: tuple[object, ...] = ()

    def halo_later(
        self, layer: object, x: Tensor, above: int, below: int, shared: bool = False
    ) -> Callable[[], Halo]:
        if max(above, below) > 1:  # reaches over any number of bands, and is waited for
            halo = self.wide_halo(layer, x, above, below)
            return lambda: halo
        fresh = send_halo(self.mesh, self.traffic, layer, x, above, below, shared)
        return self._displace(layer, fresh)[0].wait

    def sum_later(self, layer: object, x: Tensor) -> Callable[[], Tensor]:
        fresh = send_sum(self.mesh, self.traffic, layer, x)
        used = self._displace(layer, fresh, forwards=2 if self.extrapolate else 1)
        if used[0] is fresh:
            return fresh.wait

        def total() -> Tensor:
            # The difference is off by eps * total, which matters only where the own share shrinks
            # by orders of magnitude in one step; other ranks, with the old one, are off by more.
            return x + _continue([transfer.wait() - transfer.own[0] for transfer in used])

        return total

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        lengths = self.lengths(layer, x.shape[dim])
        fresh = send_parts(self.mesh, self.traffic, layer, x, dim, lengths)
        parts = list(self._displace(layer, fresh)[0].wait())
        parts[self.mesh.rank] = fresh.own[0]
        return join_parts(parts, dim, lengths)

    def lengths(self, layer: object, own: int) -> list[int]:
        """As in exact mode, but asked once a picture: bands do not change while it is made."""
        call = self._memory.next_call(layer)
        if call not in self._memory.lengths:
            self._memory.lengths[call] = super().lengths(layer, own)
        lengths = self._memory.lengths[call]
        assert lengths[self.mesh.rank] == own, "the bands changed without a reset"
        return lengths

    def _displace(self, layer: object, fresh: Transfer[T], forwards: int = 1) -> list[Transfer[T]]:
        """What this call site computes with: `fresh` in warm-up, then what it sent before.

        That is the transfers of the last `forwards`, latest first, or as many as there were.
        """
        shapes = tuple((buffer.shape, buffer.dtype) for buffer in fresh.buffers)
        key = (*self._memory.next_call(layer), shapes)
        site = self._memory.sites.setdefault(key, _Site(layer))
        used = [fresh] if site.uses < self.warmup_steps else site.sent
        site.sent = [fresh, *site.sent][:forwards]
        site.uses += 1
        return used

    @property
    def buffer_bytes(self) -> int:
        """Memory held for the next forward: what was sent and what has come or is on its way.

        Per layer, for an element size of e bytes and N bands: twice the halo rows, 2 b C w e for
        each neighbour of a 3x3 convolution; all bands' keys and values, 2 N b n C e, for softmax
        attention with n tokens in the longest; and twice the summed tensor, 6 b G 8 for a group
        norm of G groups and 2 e (b heads d (d+1) + 1) for linear attention, whatever the picture's
        size, all that twice with `extrapolate`.
        """
        transfers = [transfer for site in self._memory.sites.values() for transfer in site.sent]
        return sum(buffer.nbytes for transfer in transfers for buffer in transfer.buffers)

    def start(self, sample: Tensor) -> None:
        """Another forward: layers count their calls anew. Another shape of sample: as `reset`."""
        kind = (sample.shape, sample.dtype)
        if kind != self._sample:
            self.reset()
            self._sample = kind
        self._memory.calls.clear()

    def reset(self) -> None:
        """Wait for what is still on its way and forget it. Every rank makes this call alike."""
        forgotten, self._memory = self._memory, _Memory()
        for site in forgotten.sites.values():
            for transfer in reversed(site.sent):
                transfer.wait()


def _continue(history: list[Tensor]) -> Tensor:
    """What comes after `history`, latest first: the same again, or what the line through two says.

    The line is bounded by half and double of the latest.
    """
    if len(history) == 1:
        return history[0]
    last, before = history
    half, double = last / 2, last * 2
    line = torch.lerp(before, last, 2)
    return line.clamp(torch.minimum(half, double), torch.maximum(half, double))
