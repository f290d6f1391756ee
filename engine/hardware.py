"""What there is: memory and disk that are free, and how fast this job's ranks are.

    free_memory_bytes(mesh)              per rank: of its GPU, or its share of the host's
    speeds = measure(mesh, dtype, width) two seconds, on all ranks at once, as they will paint
    speeds.seconds(cost)                 an estimate

Ranks on one host share its memory, its cores and their bandwidth, so everything is measured while
the others measure too, and what counts is the slowest rank's speed and the smallest rank's room.
"""

import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.bands import Mesh
from engine.output import deflate
from engine.simulation import Cost, CpuKernels, CudaKernels, Kernels


def kernels_of(device: torch.device, fused: bool = False) -> Kernels:
    """What the kernels of `device` need beside their results; `fused` as in `engine.fuse`."""
    if device.type == "cuda":
        return CudaKernels(channels_last=fused)
    return CpuKernels(torch.get_num_threads())


# --- room -----------------------------------------------------------------------------------------


def free_memory_bytes(mesh: Mesh) -> int:
    """What each rank may still allocate where it computes: the least of all ranks."""
    return min(mesh.gather_objects(_own_free_memory(mesh)))


def _own_free_memory(mesh: Mesh) -> int:
    hosts = mesh.gather_objects(socket.gethostname())
    if mesh.device.type == "cuda":
        return int(torch.cuda.mem_get_info(mesh.device)[0])
    return free_host_bytes() // (mesh.crowd or hosts.count(hosts[mesh.rank]))


def free_host_bytes() -> int:
    """What this process and others on its host may still allocate."""
    return min([psutil.virtual_memory().available, *cgroup_room()])


def cgroup_room(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What is left under each memory limit that a container or a scheduler has set on this process.

    Pages that only cache files count as used, but go when they are needed.
    """
    rooms = []
    for folder in _memory_groups(root, own):
        for limit, usage, cache in _CGROUP_FILES:
            total, used = _number(folder / limit), _number(folder / usage)
            if total is not None and used is not None:
                rooms.append(max(0, total - used + _statistic(folder / "memory.stat", cache)))
    return rooms


# Names in version 2 and version 1: the limit, what is used, and how the cache is called.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _memory_groups(root: Path, own: Path) -> Iterator[Path]:
    """This process's control group and those around it, as far as they show in a container."""
    lines = own.read_text().splitlines() if own.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        folder = top / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top))


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no file, or it says 'max'."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
        return next((int(value) for key, value in pairs if key == name), 0)
    except (OSError, ValueError):
        return 0


def free_disk_bytes(path: Path) -> int:
    """Room for a file at `path`, whose folder need not be there yet."""
    folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    return shutil.disk_usage(folder).free


# --- speed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """What a rank does in a second, measured while all others do the same.

    Attributes:
        product_flops, convolution_flops: of arithmetic, per second.
        moved_bytes: read and written by operations that only pass over memory, per second.
        deflated_bytes: of raw pixels compressed as `engine.output` does it, per second.
        operations: that can be started, per second.
        rounds: small all-reduces, per second; infinite for a single rank.
        sent_bytes: in large all-reduces, per second; infinite for a single rank.
    """

    product_flops: float
    convolution_flops: float
    moved_bytes: float
    deflated_bytes: float
    operations: float
    rounds: float
    sent_bytes: float

    def slowest(self, others: "list[Speeds]") -> "Speeds":
        """The least of each."""
        everyone = [self, *others]
        return Speeds(*(min(getattr(s, f.name) for s in everyone) for f in fields(Speeds)))

    def seconds(self, cost: Cost) -> float:
        """How long `cost` takes, one thing after the other: nothing is taken to overlap."""
        return (
            cost.flops["product"] / self.product_flops
            + cost.flops["convolution"] / self.convolution_flops
            + cost.bytes_moved / self.moved_bytes
            + cost.operations / self.operations
            + cost.rounds / self.rounds
            + cost.bytes_sent / self.sent_bytes
        )


def measure(mesh: Mesh, dtype: torch.dtype, width: int, fused: bool = False) -> Speeds:
    """Some two seconds of trials on every rank at once, in the job's dtype and on its device.

    Args:
        width: channels of a typical layer, since small layers are slower than large ones.
        fused: whether pictures lie channels last, as for `engine.fuse`.
    """
    layout = torch.channels_last if fused else torch.contiguous_format
    mesh.barrier()
    with torch.inference_mode():
        own = Speeds(
            product_flops=_rate(mesh, lambda n: _product(mesh, dtype, width, n)),
            convolution_flops=_rate(mesh, lambda n: _convolution(mesh, dtype, width, layout, n)),
            moved_bytes=_rate(mesh, lambda n: _pass(mesh, dtype, n)),
            deflated_bytes=_rate(mesh, _deflate, largest=1),
            operations=_rate(mesh, lambda n: _start(mesh, n)),
            rounds=_rounds(mesh),
            sent_bytes=_sent_bytes(mesh),
        )
    return own.slowest(mesh.gather_objects(own))


Trial = tuple[Callable[[], object], float]
_TRIAL_S = 0.05
_LARGEST = 1 << 10


def _rate(mesh: Mesh, trial: Callable[[int], Trial], largest: int = _LARGEST) -> float:
    """Work a second of the first trial that is large enough to be timed, in sizes 1, 4, 16, ...

    So a slow dtype is not tried at the size that a GPU needs.
    """
    size = 1
    while True:
        run, work = trial(size)
        run()  # libraries choose their kernels
        seconds = min(_seconds(mesh.device, run) for _ in range(2))
        if seconds > _TRIAL_S or size >= largest:
            return work / seconds
        size *= 4


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_TOKENS = 256
_PIXELS = 1 << 16


def _product(mesh: Mesh, dtype: torch.dtype, width: int, size: int) -> Trial:
    tokens = torch.ones(_TOKENS * size, width, dtype=dtype, device=mesh.device)
    weight = torch.ones(width, width, dtype=dtype, device=mesh.device)
    return lambda: F.linear(tokens, weight), 2.0 * len(tokens) * width * width


def _convolution(
    mesh: Mesh, dtype: torch.dtype, width: int, layout: torch.memory_format, size: int
) -> Trial:
    x = torch.ones(1, width, 16, 16 * size, dtype=dtype, device=mesh.device)
    weight = torch.ones(width, width, 3, 3, dtype=dtype, device=mesh.device)
    x, weight = (t.contiguous(memory_format=layout) for t in (x, weight))
    flops = 2.0 * 9 * width * width * x.shape[2] * x.shape[3]
    return lambda: F.conv2d(x, weight, padding=1), flops


def _pass(mesh: Mesh, dtype: torch.dtype, size: int) -> Trial:
    x = torch.ones(_PIXELS * size, dtype=dtype, device=mesh.device)
    return lambda: F.silu(x), 2.0 * x.nbytes


def _deflate(size: int) -> Trial:
    # As `engine.output` does it. Noise of 5 bits: a picture's filtered rows deflate about so.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(32, (_PIXELS * size,), dtype=torch.uint8, generator=generator)
    raw = noise.numpy().tobytes()
    return lambda: deflate.compress(raw), float(len(raw))


def _start(mesh: Mesh, size: int) -> Trial:
    x = torch.ones(64, device=mesh.device)

    def run() -> None:
        for _ in range(100 * size):
            x.add(1)

    return run, 100.0 * size


def _rounds(mesh: Mesh) -> float:
    """Small all-reduces a second."""
    return _reductions(mesh, torch.zeros(128, device=mesh.device), 20)


def _sent_bytes(mesh: Mesh) -> float:
    """Bytes that a rank sends a second in large all-reduces, counted as the ring algorithm's."""
    x = torch.zeros(1 << 20, device=mesh.device)
    sent = 2 * (mesh.size - 1) / mesh.size * x.nbytes
    return _reductions(mesh, x, 2) * (sent or 1.0)


def _reductions(mesh: Mesh, x: Tensor, count: int) -> float:
    """All-reduces a second. Every rank makes as many, whatever its clock says."""
    if mesh.size == 1:
        return math.inf

    def run() -> None:
        for _ in range(count):
            for work in mesh.all_reduce(x):
                work.wait()

    run()
    return count / _seconds(mesh.device, run)
