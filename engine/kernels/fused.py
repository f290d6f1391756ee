"""Linear attention on GPUs in two passes over the tokens, by Triton, in fp16, bf16 and fp32.

    state    reads k and v once,                  writes phi(k)^T [v, 1], d x (d+1) a head
    apply    reads q once and writes out once:    phi(q) S / (phi(q) z + eps)

`engine.kernels.formula` does the same by some ten passes, each of which writes and reads n x C
numbers, most of them in fp32.

Where precision goes, in half precision. The state's products are of phi(k) rounded to the type of
k, which is what tensor cores take, summed up in fp32: in fp16, phi(k) loses digits below k = -9.7
and is zero below -17.3, where z counts for nothing beside its eps. In `apply` the products are of
phi(q), each row of it scaled to be 1 at the most and rounded, and of S as a sum of two numbers, so
that neither need fit into fp16. Relative error of `apply` against float64, for 4096 tokens, d = 40,
v ~ N(0, 50):

    q, k ~               N(0, 1)   N(-8, 1)   N(-12, 1)   N(0, 16)   output rounded, nothing else
    fp16                 2.2e-4    2.3e-4     6.4e-4      2.2e-4     2.1e-4 (N(-12, 1): 4.8e-4)
    bf16                 1.7e-3    1.9e-3     1.8e-3      1.8e-3     1.7e-3

These figures are by the same arithmetic in torch; tests/gpu.py holds a GPU to them. In fp32 the
products are of three of TF32 each, 1e-7 on an H200.

Tiles are what is fastest on an H200 of what was tried, or where a GPU has less shared memory, what
fits; tests/test_fused.py compiles them for A100 and RTX 30.

How far from memory's own pace (one read of k and v; one read of q and a write), on an H200 in half
precision, 1 million tokens: heads of 64 (SDXL) 1.5 and 1.7 times as long, of 40 (SD-1.5's first
level, padded to 64) 2.6 and 2.7, of 80 3.6 and 4.5, of 160 10 and 8. The last two are of a fourth
and a sixteenth of the tokens; all together are 5 % of a forward of SD-1.5, and 4 % of one of SDXL.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from engine.kernels.formula import NORMALISER_EPS

logger = logging.getLogger(__name__)

MOST_WIDE = 160
"""what a head may measure: a state of more does not stay in registers"""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""what there are kernels for"""


@cache
def is_installed() -> bool:
    """Whether there is Triton. torch for CUDA brings it, torch for CPUs does not."""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), slowly, for tests."""
    if not is_installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on tensors there: on GPUs from Ampere on."""
    if not is_installed() or device.type != "cuda":
        return is_installed() and is_interpreted()
    return _is_recent(device)


@cache  # it is asked for every layer, and torch asks the driver
def _is_recent(device: torch.device) -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def runs(device: torch.device) -> bool:
    """Whether a kernel really runs there, by trying: Triton builds its launchers by a C compiler,
    which a container may lack.
    """
    if not is_available(device):
        return False
    x = torch.zeros(1, 1, 16, 16, device=device)
    try:
        fused_state(x, x)
    except Exception as error:  # Triton's, a compiler's, the driver's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("kernels are plain, since fused ones do not run here: %s", reason)
        return False
    return True


def has_kernels(x: Tensor) -> bool:
    """Whether there are any for the numbers of `x`, however they lie, in inference."""
    return not torch.is_grad_enabled() and x.dtype in DTYPES and is_available(x.device)


def can_compute(x: Tensor, width: int) -> bool:
    """Whether the kernels take tensors like `x`, in heads so wide. They have no gradients."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    return width <= MOST_WIDE and x.dtype in DTYPES and not wanted and is_available(x.device)


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts up its work.

    Attributes:
        wide, columns: of a head, padded; that a program makes.
        block: tokens that are multiplied at once.
        warps, stages: of a program; blocks that are on their way from memory meanwhile.
    """

    wide: int
    columns: int
    block: int
    warps: int
    stages: int


def tiles_of_state(width: int, dtype: torch.dtype, room: int) -> Tiles:
    """The first that fit into so many bytes of shared memory, of those in order of speed."""
    wide = _padded(width)
    if dtype == torch.float32:
        return Tiles(wide, min(wide, 64), block=32, warps=4 if wide <= 64 else 8, stages=1)
    if wide <= 64:
        return Tiles(wide, wide, block=64, warps=4, stages=3)
    if wide == 128:
        return Tiles(wide, wide, block=64, warps=4, stages=2)
    if room >= 131072:
        return Tiles(wide, 128, block=64, warps=8, stages=3)
    return Tiles(wide, 64, block=32, warps=8, stages=2)


def tiles_of_apply(width: int, dtype: torch.dtype, room: int) -> Tiles:
    """The same for the other kernel."""
    wide = _padded(width)
    if dtype == torch.float32:
        columns = 64 if wide <= 128 or room >= 163840 else 32
        return Tiles(wide, min(wide, columns), block=32, warps=4 if wide <= 64 else 8, stages=1)
    if wide <= 64:
        return Tiles(wide, wide, block=64, warps=4, stages=3)
    if wide == 128:
        fast, small = Tiles(wide, 128, 64, 4, 3), Tiles(wide, 64, 64, 4, 2)
        return fast if room >= 114688 else small
    fast, small = Tiles(wide, 128, 128, 8, 1), Tiles(wide, 64, 64, 8, 1)
    return fast if room >= 196608 else small


def _padded(width: int) -> int:
    return 1 << max(4, (width - 1).bit_length())


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have; on a CPU, where kernels are interpreted, any number."""
    if device.type != "cuda":
        return 1 << 30
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def tokens_of_state(tokens: int) -> int:
    """Tokens that one program sums up: a power of two.

    More programs are more parallel, and more partial sums: d / this of what is read. It depends on
    nothing but the number of tokens, so that neither a batch nor a GPU changes the rounding.
    """
    return min(4096, max(256, 1 << (tokens // 64).bit_length()))


_TOKENS_OF_APPLY = 1024  # of one program: it reads the state, 4 d^2 bytes, for 4 d bytes of each


def fused_state(key: Tensor, value: Tensor) -> Tensor:
    """`formula.attention_state` in one pass: [B, heads, n, d] twice -> [B, heads, d, d+1] fp32.

    Any strides will do. Programs share nothing; their sums are added up by torch, in an order that
    is always the same.
    """
    from engine.kernels import fused_triton

    batch, heads, tokens, width = key.shape
    assert key.shape == value.shape
    assert key.dtype == value.dtype
    tiles = tiles_of_state(width, key.dtype, shared_memory(key.device))
    of_program, pairs = tokens_of_state(tokens), batch * heads
    splits, blocks = -(-tokens // of_program), -(-width // tiles.columns)
    partials = key.new_empty(splits, batch, heads, width, width + 1, dtype=torch.float32)
    unit = _unit(key, value)
    with torch.cuda.device_of(key):
        fused_triton.state[(splits * pairs * blocks,)](
            key, value, partials, tokens, heads, pairs, blocks,
            *_in_units(key, unit), *_in_units(value, unit),
            UNIT=unit, HEAD=width, WIDE=tiles.wide, COLUMNS=tiles.columns,
            TOKENS=of_program, BLOCK=tiles.block, OPERAND=_operand(key.dtype),
            PRECISION="tf32x3",
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return partials.sum(0)


def fused_apply(query: Tensor, mean_state: Tensor) -> Tensor:
    """`formula.apply_state` in one pass: [B, heads, n, d], [B, heads, d, d+1] -> as `query`.

    Any strides will do, and the result has those of `query` where they leave no gaps.
    """
    from engine.kernels import fused_triton

    batch, heads, tokens, width = query.shape
    assert mean_state.shape == (batch, heads, width, width + 1)
    assert mean_state.dtype == torch.float32
    tiles, pairs = tiles_of_apply(width, query.dtype, shared_memory(query.device)), batch * heads
    blocks = -(-width // tiles.columns)
    out = torch.empty_like(query)
    unit = _unit(query, out)
    with torch.cuda.device_of(query):
        fused_triton.apply[(-(-tokens // _TOKENS_OF_APPLY) * pairs * blocks,)](
            query, mean_state.contiguous(), out, tokens, heads, pairs, blocks, NORMALISER_EPS,
            *_in_units(query, unit), *_in_units(out, unit),
            UNIT=unit, HEAD=width, WIDE=tiles.wide, COLUMNS=tiles.columns,
            TOKENS=_TOKENS_OF_APPLY, BLOCK=tiles.block, OPERAND=_operand(query.dtype),
            PRECISION="tf32x3",
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def _strides(x: Tensor) -> list[int]:
    """Of pictures, heads and tokens; where there is one only, its stride means nothing."""
    pairs = zip(x.shape[:3], x.stride()[:3], strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]


def _unit(*tensors: Tensor) -> int:
    """The power of two, 16 at most, that divides all strides but those within a head."""
    return math.gcd(16, *(stride for x in tensors for stride in _strides(x)))


def _in_units(x: Tensor, unit: int) -> list[int]:
    """The strides of `x` as the kernels take them."""
    return [*(stride // unit for stride in _strides(x)), x.stride(3)]


def _operand(dtype: torch.dtype) -> object:
    """What the state's products are of, in Triton's words.

    The interpreter multiplies the bits of bf16 numbers, so there they become fp32, as exact.
    """
    import triton.language as tl

    if dtype == torch.bfloat16 and is_interpreted():
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))
