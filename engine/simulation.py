"""What a function would cost: its memory, arithmetic and messages, without doing any of it.

    with pretended(): unet = UNet2DConditionModel.from_config(...)     shapes, and no numbers
    cost = simulate(lambda: unet(sample, t, text), kernels=CpuKernels(threads=2))
    cost.peak_bytes, cost.flops, cost.bytes_moved

PyTorch's meta device computes with shapes alone: the sum of two tensors of 6 GB takes no memory and
some 20 microseconds. The real network is really called there, layer by layer, by the very code that
will paint; `simulate` watches every operation that PyTorch carries out.

    memory   a storage counts from the operation that made it until Python and PyTorch have let go
             of it, which a weak reference tells. So what a local variable of some frame keeps alive
             is counted, and views, which share a storage, are counted once.
    kernels  may need room besides for as long as they run; `CpuKernels` and `CudaKernels` say what.
    flops    of products, by PyTorch's own formulas; `bytes_moved` is what all other operations read
             and write. Products are bound by arithmetic, the others by memory, so that the two
             times add up.
    ranks    `PretendedMesh` stands for ranks that are not there: all that would arrive from them
             has its shape. Halos, sums and the count of what is sent are those of `engine.bands`.

Compared with the real peak of a process on a CPU (`tests/test_simulation.py`), the count is within
some percent where activations are large.
"""

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from engine.bands import Mesh, Traffic, split_rows

T = TypeVar("T")

META = torch.device("meta")
aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """What a computation takes on one rank. Costs add up: one after the other, the higher peak.

    Attributes:
        peak_bytes: the most that was alive at once, of what was allocated inside.
        host_bytes: the same of what was parked on the host.
        flops: of "convolution" and "product" (matrix products, attention).
        bytes_moved: read and written by all other operations.
        operations: that PyTorch carried out, views aside.
        bytes_sent: by this rank to others.
        rounds: of messages that this rank took part in.
    """

    peak_bytes: int = 0
    host_bytes: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    bytes_moved: int = 0
    operations: int = 0
    bytes_sent: int = 0
    rounds: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            max(self.peak_bytes, other.peak_bytes),
            max(self.host_bytes, other.host_bytes),
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.operations + other.operations,
            self.bytes_sent + other.bytes_sent,
            self.rounds + other.rounds,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(
            self.peak_bytes if times else 0,
            self.host_bytes if times else 0,
            Counter({kind: times * number for kind, number in self.flops.items()}),
            times * self.bytes_moved,
            times * self.operations,
            times * self.bytes_sent,
            times * self.rounds,
        )


def simulate(
    function: Callable[[], object], kernels: "Kernels", traffic: Traffic | None = None
) -> Cost:
    """The cost of `function`, which computes on the meta device.

    Args:
        function: makes its tensors on the meta device, or like others that are there.
        kernels: of the device that is meant.
        traffic: where the exchange that `function` uses counts what it sends.
    """
    traffic = traffic or Traffic()
    bytes_before, rounds_before = traffic.bytes_sent.total(), traffic.rounds.total()
    watch = _Watch(kernels)
    with torch.no_grad(), _FusedAttention(), watch:
        result = function()
    del result
    return Cost(
        watch.peak_bytes,
        watch.host_peak_bytes,
        watch.flops,
        watch.bytes_moved,
        watch.operations,
        traffic.bytes_sent.total() - bytes_before,
        traffic.rounds.total() - rounds_before,
    )


@contextmanager
def pretended(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, networks are made of shapes of `dtype` on the meta device, in no time."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META:
            yield
    finally:
        torch.set_default_dtype(default)


# --- watching PyTorch -----------------------------------------------------------------------------


class _FusedAttention(TorchFunctionMode):
    """Softmax attention by the kernel that real devices have, which keeps no matrix of scores.

    The meta device has none and would be seen multiplying all queries with all keys.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        mixed: Tensor = _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]
        return mixed


# Matrix products, and which of their arguments is the left factor.
_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_NORMS = {aten.native_layer_norm, aten.native_group_norm, aten.native_batch_norm}


class _Watch(TorchDispatchMode):
    """Counts what every operation allocates, reads, writes and multiplies."""

    def __init__(self, kernels: "Kernels") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = self.host_peak_bytes = 0
        self.bytes_moved = self.operations = 0
        self.flops: Counter[str] = Counter()
        self._kernels = kernels
        self._live_bytes = self._host_bytes = 0
        # By the address of a storage: a weak reference that tells of its end.
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._on_host: set[int] = set()
        self._known: dict[Any, list[Any]] = {}  # results by the shapes that they are made of

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # more than half of all operations, and free
            return func(*args, **kwargs)
        before = _tensors(args)
        for x in before:
            self._use(x)
        to_host = func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if to_host:  # there is nothing to copy; what counts is where it is kept
            kwargs = {**kwargs, "device": META}
        out = self._compute(func, args, kwargs)
        after = _tensors(out)
        for x in after:
            self._keep(x, to_host)
        workspace = self._kernels.workspace(func.overloadpacket, args, out)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes + workspace)
        self._charge(func.overloadpacket, args, kwargs, out, before + after)
        return out

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` makes of shapes; it takes PyTorch up to a millisecond to find out, so once.

        A network has the same layer on the same shape dozens of times.
        """
        if func._schema.is_mutable:
            return func(*args, **kwargs)
        key = (func, _shapes(args), _shapes(tuple(kwargs.items())))
        if key in self._known:
            made = [
                torch.empty_strided(shape, strides, dtype=dtype, device=META)
                for shape, strides, dtype in self._known[key]
            ]
            return made[0] if len(made) == 1 else tuple(made)
        out = func(*args, **kwargs)
        tensors = list(out) if isinstance(out, tuple) else [out]
        own = {_address(x) for x in _tensors(args)}
        if all(isinstance(x, Tensor) and x.is_meta and _address(x) not in own for x in tensors):
            self._known[key] = [(x.shape, x.stride(), x.dtype) for x in tensors]
        return out

    def _charge(self, packet: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        self.operations += 1
        if packet in _PRODUCTS or packet is aten.convolution:
            kind = "product" if packet in _PRODUCTS else "convolution"
            self.flops[kind] += int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet is _ATTENTION:
            self.flops["product"] += int(sdpa_flop_count(*(x.shape for x in args[:3])))
        else:
            self.bytes_moved += sum(x.nbytes for x in tensors)

    def _use(self, x: Tensor) -> None:
        """An operation reads `x`: if it waited on the host, it has come back to its device."""
        address = _address(x)
        if address not in self._storages:
            self._remember(x, 0)  # it was there before, and is not ours to count
        elif address in self._on_host:
            self._on_host.remove(address)
            size = x.untyped_storage().nbytes()
            self._host_bytes -= size
            self._live_bytes += size

    def _keep(self, x: Tensor, on_host: bool) -> None:
        """Count the storage of `x`, unless it is known already.

        What has numbers is small: places of rows and the like, worked out on the host.
        """
        address = _address(x)
        if address in self._storages or not x.is_meta:
            return
        size = x.untyped_storage().nbytes()
        self._remember(x, size)
        if on_host:
            self._on_host.add(address)
            self._host_bytes += size
            self.host_peak_bytes = max(self.host_peak_bytes, self._host_bytes)
        else:
            self._live_bytes += size

    def _remember(self, x: Tensor, size: int) -> None:
        """Know the storage of `x`, and when it ends, count it no more."""
        address = _address(x)

        def end(_: object) -> None:
            del self._storages[address]
            if address in self._on_host:
                self._on_host.remove(address)
                self._host_bytes -= size
            else:
                self._live_bytes -= size

        self._storages[address] = weakref.ref(x.untyped_storage(), end)


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _shapes(value: Any) -> Any:
    """Arguments with shapes in the place of tensors, to look results up by."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(_shapes(item) for item in value)
    return type(value), value


def _tensors(value: Any) -> list[Tensor]:
    """All tensors among an operation's arguments or results, which are lists at most."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [x for item in value for x in _tensors(item)]
    return []


# --- the room that kernels need -------------------------------------------------------------------


class Kernels(ABC):
    """What the kernels of a kind of device allocate besides their results."""

    def workspace(self, packet: Any, args: Any, out: Any) -> int:
        """Bytes at the height of one operation, beyond its arguments and its result."""
        if packet is aten.convolution:
            return self.convolution(args[0], args[1], out, stride=args[3], dilation=args[5])
        if packet in _NORMS:
            return _contiguous_copy(args[0])
        if packet in _PRODUCTS:
            return self.product(args[_PRODUCTS[packet]])
        return 0

    @abstractmethod
    def convolution(
        self, x: Tensor, weight: Tensor, out: Tensor, stride: list[int], dilation: list[int]
    ) -> int:
        """[B, C, h, W] by [C', C, k, k]"""

    def product(self, x: Tensor) -> int:
        """Of a matrix product whose left factor is `x`."""
        return 0


class CpuKernels(Kernels):
    """oneDNN's and PyTorch's own kernels, as measured: see `tests/test_simulation.py`.

    oneDNN convolves in a layout of its own, channels in blocks of a vector register. It converts
    the input, computes, drops the converted input, and converts the output back:

        input + input in blocks + output in blocks, then input + output in blocks + output

    In float64, which oneDNN does not know, and fp16 where the processor does not, PyTorch gathers
    the k x k values under each output pixel into a matrix: 9 times the input.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        self._block = 16 if wide else 8  # fp32 numbers in a register

    def convolution(
        self, x: Tensor, weight: Tensor, out: Tensor, stride: list[int], dilation: list[int]
    ) -> int:
        copied = _contiguous_copy(x)
        is_pointwise = weight.shape[-2:] == (1, 1) and max(stride) == 1
        if self._is_onednn(x, is_pointwise):
            x_blocked, out_blocked = self._blocked(x), self._blocked(out)
            return copied + max(x_blocked, out.nbytes) + out_blocked - out.nbytes
        if is_pointwise:
            return copied
        # Dilated ones take one picture of the batch after the other.
        pictures = 1 if max(dilation) > 1 else out.shape[0]
        columns = weight[0].numel() * out.shape[-2] * out.shape[-1]
        return copied + pictures * columns * x.element_size()

    def product(self, x: Tensor) -> int:
        return _contiguous_copy(x) if x.element_size() == 2 else 0

    def _is_onednn(self, x: Tensor, is_pointwise: bool) -> bool:
        if x.dtype == torch.float32:
            return self._threads > 1 or not is_pointwise
        if x.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return x.dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())

    def _blocked(self, x: Tensor) -> int:
        """Bytes of `x` with its channels filled up to whole blocks."""
        channels = -(-x.shape[1] // self._block) * self._block
        return x.nbytes // x.shape[1] * channels


class CudaKernels(Kernels):
    """cuDNN's, as measured on an H200.

    Tensor cores want channels last, so a half-precision convolution of pictures that lie otherwise
    copies both input and output; where that room is missing, PyTorch takes another of cuDNN's
    algorithms.

    Args:
        channels_last: whether pictures lie so, as they do for fused kernels (`engine.fuse`).
    """

    def __init__(self, channels_last: bool = False) -> None:
        self._channels_last = channels_last

    def convolution(
        self, x: Tensor, weight: Tensor, out: Tensor, stride: list[int], dilation: list[int]
    ) -> int:
        copies = x.element_size() == 2 and not self._channels_last
        return x.nbytes + out.nbytes if copies else 0


def _contiguous_copy(x: Tensor) -> int:
    """Bytes of the copy that a kernel makes of an input with gaps or in another order."""
    return 0 if x.is_contiguous() else x.nbytes


# --- ranks that are not there ---------------------------------------------------------------------


@dataclass(frozen=True)
class PretendedMesh(Mesh):
    """One rank among others that are not there; what they would send has its shape.

    Attributes:
        height: of what the ranks share out, in rows.
        multiple: of which the bands begin on one.
    """

    height: int = 0
    multiple: int = 1

    @classmethod
    def of(cls, size: int, height: int, multiple: int = 1, groups: int = 1) -> "PretendedMesh":
        """The rank that has most to do, of `size` in `groups` that share `height` rows each.

        Bands differ in their number of rows by a block; inner ones have two neighbours.
        """
        bands = split_rows(height, size // groups, multiple)
        inner = range(1, len(bands) - 1) or range(len(bands))
        rank = max(inner, key=lambda band: len(bands[band]))
        return cls(rank, size, META, None, height=height, multiple=multiple)

    def global_rank(self, rank: int) -> int:
        return rank

    def gather_small(self, numbers: Tensor) -> list[list[int]]:
        raise AssertionError("the others' numbers are not known")

    def gather_lengths(self, own: int) -> list[int]:
        """Whatever a rank has of something, tokens say, the others have in proportion."""
        rows = [len(band) for band in split_rows(self.height, self.size, self.multiple)]
        return [-(-own * other // rows[self.rank]) for other in rows]

    def gather_objects(self, value: T) -> list[T]:
        return [value] * self.size

    def all_reduce(self, x: Tensor) -> list[dist.Work]:
        return []

    def all_gather(self, parts: list[Tensor], x: Tensor) -> list[dist.Work]:
        return []

    def swap(
        self, outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]]
    ) -> list[dist.Work]:
        return []

    def _axis(self, groups: list[list[int]]) -> Self:
        own = next(group for group in groups if self.rank in group)
        return replace(self, rank=own.index(self.rank), size=len(own))
