"""The processes that paint one picture: their device, their group, their time-outs.

`torchrun` tells each process its place in the environment; this is the only file that reads it.
Collectives go over NCCL where every rank has a GPU of its own, over gloo on CPUs, and every one of
them has a time-out: a rank that is gone ends the job, it does not hang it.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """One rank's view of all ranks. `group` is None in a world of one, where nobody communicates.

    Attributes:
        rank, size: this rank's place among the bands, top to bottom.
        device: where this rank computes.
        timeout_s: how long a collective may take, in seconds, before the job fails.
        crowd: how many ranks of the whole job are on this host, where these are not all of them.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    timeout_s: float = 600.0
    crowd: int | None = None

    def global_rank(self, rank: int) -> int:
        """The rank in the whole job of band `rank`, as `torch.distributed` wants its peers."""
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)

    def on_device(self, wanted: str) -> Self:
        """This mesh, computing on `wanted`: "cuda", "cpu", or "auto".

        "auto" takes the GPUs where there are any.

        Raises:
            UserError: some host has too few GPUs for its ranks, or only some hosts have them.
        """
        device = self.agree(lambda: _choose_device(wanted))
        if len(set(self.gather_objects(device.type))) > 1:
            raise UserError(
                "only some hosts have a GPU for each of their ranks: choose --device cpu, or leave "
                "the others out"
            )
        return replace(self, device=device)

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank; the same answer on all."""
        if self.group is None:
            return flag
        total = torch.tensor([int(flag)])
        dist.all_reduce(total, group=self.group)
        return bool(total.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        self.gather_objects(None)

    def gather_small(self, numbers: Tensor) -> list[list[int]]:
        """Every rank's few integers, in rank order, sent from the device that they are on."""
        if self.group is None:
            return [numbers.tolist()]
        parts = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(parts, numbers, group=self.group)
        return torch.stack(parts).tolist()

    def gather_lengths(self, own: int) -> list[int]:
        """Every rank's number, in rank order, by way of this rank's device."""
        return [n for (n,) in self.gather_small(torch.tensor([own], device=self.device))]

    def all_reduce(self, x: Tensor) -> list[dist.Work]:
        """Set off the sum of `x` over all ranks, in place. Done when the works are waited for."""
        return [dist.all_reduce(x, group=self.group, async_op=True)]

    def all_gather(self, parts: list[Tensor], x: Tensor) -> list[dist.Work]:
        """Set off the copies of every rank's `x` into `parts`, which are as large."""
        return [dist.all_gather(parts, x, group=self.group, async_op=True)]

    def swap(
        self, outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]]
    ) -> list[dist.Work]:
        """Set off all messages (peer, x) at once; between two ranks, in the order of the lists."""
        operations = [
            dist.P2POp(send_or_receive, x, self.global_rank(peer), self.group)
            for send_or_receive, messages in ((dist.isend, outgoing), (dist.irecv, incoming))
            for peer, x in messages
            if x.numel()
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def split(self, parts: int) -> tuple[Self, Self]:
        """Two axes of this mesh: (across, within) `parts` equal runs of neighbouring ranks.

        Rank r of 8 with parts=2 is rank r // 4 of 2 across, and rank r % 4 of 4 within. Every rank
        has to make the same call.

        Raises:
            UserError: the ranks do not divide into that many parts.
        """
        if self.size % parts:
            raise UserError(
                f"{self.size} ranks do not fall into {parts} equal groups: start a multiple of "
                f"{parts} ranks"
            )
        run = self.size // parts
        rows = [list(range(part * run, (part + 1) * run)) for part in range(parts)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        return self._axis(columns), self._axis(rows)

    def _axis(self, groups: list[list[int]]) -> Self:
        """The one of `groups` (of ranks of this mesh) that this rank is in, as a mesh."""
        if len(groups[0]) == 1:
            return replace(self, rank=0, size=1, group=None)
        if len(groups) == 1:
            return self
        timeout = timedelta(seconds=self.timeout_s)
        own = next(i for i, group in enumerate(groups) if self.rank in group)
        everyone = [[self.global_rank(rank) for rank in group] for group in groups]
        if self.size == dist.get_world_size():
            made = [dist.new_group(ranks, timeout) for ranks in everyone][own]
        else:  # ranks beyond this mesh do not come to make them
            made = dist.new_group(everyone[own], timeout, use_local_synchronization=True)
        place = groups[own].index(self.rank)
        return replace(self, rank=place, size=len(groups[own]), group=made)

    def side_by_side(self, parts: int) -> Self:
        """The one of `parts` equal runs of neighbouring ranks that this rank is in.

        Each paints pictures of its own. Every rank has to make the same call.

        Raises:
            UserError: the ranks do not divide into that many parts.
        """
        if parts == 1:
            return self
        hosts = self.gather_objects(socket.gethostname())
        _, within = self.split(parts)
        return replace(within, crowd=hosts.count(hosts[self.rank]))

    def again(self, timeout_s: float) -> Self:
        """The same ranks, with collectives that those of this mesh cannot be mistaken for."""
        if self.group is None:
            return self
        group = dist.new_group(
            dist.get_process_group_ranks(self.group),
            timedelta(seconds=timeout_s),
            use_local_synchronization=True,
        )
        return replace(self, group=group, timeout_s=timeout_s)

    def close(self) -> None:
        """Give up this group of ranks, which must not be used any more."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where it fails on any, raise that failure on all.

        For whatever may go wrong on one rank alone (a disk, a file, a device): the others learn of
        it here instead of waiting for it in the next collective until the time-out.

        Raises:
            UserError: `action` raised one on some rank.
            RuntimeError: `action` raised anything else on another rank.
            Exception: what `action` raised on this rank.
        """
        result, failure = _attempt(action)
        failures = self.gather_objects(_describe(failure))
        if isinstance(failure, Exception) and not isinstance(failure, UserError):
            raise failure
        for rank, (is_users, text) in enumerate(failures):
            if text and is_users:
                raise UserError(text)
            if text:
                raise RuntimeError(f"rank {rank} failed: {text}")
        return result  # type: ignore[return-value]


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # every rank must reach the collective that follows
        return None, error


def _describe(failure: Exception | None) -> tuple[bool, str]:
    if failure is None:
        return False, ""
    text = (
        str(failure) if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
    )
    return isinstance(failure, UserError), text


@contextmanager
def open_mesh(timeout_s: float = 600.0) -> Iterator[Mesh]:
    """Join the ranks that torchrun started (or stand alone), and leave them at the end.

    Args:
        timeout_s: how long a collective may take before the job fails.
    """
    owns_group = not dist.is_initialized()
    yield join_mesh(timeout_s)
    # Only after success: with a peer gone, leaving in good order could wait for it.
    if owns_group and dist.is_initialized():
        dist.destroy_process_group()


def join_mesh(timeout_s: float = 600.0) -> Mesh:
    """As `open_mesh`, for a program that stays until it ends: two lines in a script of its own.

    A process group that the program has made itself is used as it is.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Objects and errors travel over gloo even where tensors travel over NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    cpu = torch.device("cpu")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Mesh(0, 1, cpu, None, timeout_s)
    return Mesh(dist.get_rank(), dist.get_world_size(), cpu, dist.group.WORLD, timeout_s)


def is_first_process() -> bool:
    """Whether this process is the one that speaks, known before any group exists."""
    return os.environ.get("RANK", "0") == "0"


def first_host() -> str:
    """Where the other processes find the host of rank 0, by the launcher's word."""
    return os.environ.get("MASTER_ADDR", "localhost")


def tell_deepspeed(device: torch.device) -> None:
    """Before its import: which device it is to use, and, without a launcher, this rank's place.

    It asks the environment for both, and would take a GPU wherever there is one.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))


def _choose_device(wanted: str) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    # Some launchers show each rank a single GPU, its own.
    shown_its_own = gpus == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "").isdigit()
    if gpus < local_size and not shown_its_own:
        raise UserError(
            f"device {wanted} needs a GPU for each of the {local_size} ranks on this host, which "
            f"has {gpus}: start {gpus or 'no'} ranks here, or choose --device cpu"
        )
    index = 0 if shown_its_own else local_rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
