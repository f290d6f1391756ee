"""The pointwise Triton kernels in Triton's interpreter, and where networks call them.

Run by `tests/test_fused.py` as `tests/interpreted.py` is, or by hand: `TRITON_INTERPRET=1 python -m
pytest tests/interpreted_pointwise.py`.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

from engine import linfusion, memory
from engine.bands import DisplacedExchange, ExactExchange
from engine.bands.layers import normalise_and_activate
from engine.config import UserError
from engine.kernels import pointwise
from engine.kernels.fused import is_interpreted
from engine.kernels.pointwise import FusedGEGLU, FusedSiLU
from engine.memory import MemoryOptions
from tests.models import latent, tiny_unet
from tests.ranks import run_ranks
from tests.test_displaced import banded_unet
from tests.test_linfusion import relative_error

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="needs Triton and TRITON_INTERPRET=1")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
RESNETS, GATES = 11, 7  # of the tiny UNet


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def noise(*shape, dtype=torch.float32):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def norm_of(channels, groups, dtype=torch.float32):
    norm = nn.GroupNorm(groups, channels, eps=1e-3).requires_grad_(False).to(dtype)
    norm.weight.copy_(noise(channels))
    norm.bias.copy_(noise(channels + 1)[1:])
    return norm


def statistics(norm, x):
    grouped = x.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    return mean, variance


def assert_rounded(result, expected):
    """`result` is fp32's to 1e-6, or a neighbour of it: the interpreter cuts bf16 numbers off."""
    assert result.shape == expected.shape
    if result.dtype == torch.float32:
        assert relative_error(result, expected.double()) <= 1e-6
    else:
        precision = torch.finfo(result.dtype)
        subnormal, fp32 = precision.smallest_normal * precision.eps, 1e-6 * expected.abs().max()
        bound = precision.eps * expected.abs() + max(subnormal, fp32)
        assert ((result.float() - expected).abs() <= bound).all()


class Calls(Counter):
    """How often each kernel is launched, from when this is made."""

    def __init__(self):
        super().__init__()
        from engine.kernels import pointwise_triton

        for name in ("norm_silu", "geglu"):
            kernel = getattr(pointwise_triton, name)
            original = getattr(kernel, "kernel", kernel)
            setattr(pointwise_triton, name, Counted(original, self, name))

    def taken(self):
        counts = self["norm_silu"], self["geglu"]
        self.clear()
        return counts


class Counted:
    def __init__(self, kernel, calls, name):
        self.kernel, self.calls, self.name = kernel, calls, name

    def __getitem__(self, grid):
        self.calls[self.name] += 1
        return self.kernel[grid]


# --- the kernels ----------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width"),
    [(2, 12, 4, 7, 33), (1, 35, 7, 37, 31), (2, 9, 3, 1, 1), (3, 10, 1, 5, 1), (1, 6, 6, 1, 2050)],
)
def test_norm_silu_computes_the_formula(batch, channels, groups, height, width, dtype):
    norm, x = norm_of(channels, groups, dtype), noise(batch, channels, height, width, dtype=dtype)
    moments = statistics(norm, x)
    result = pointwise.norm_silu(norm, x, *moments)
    assert result.dtype == dtype
    expected = pointwise.plain_norm_silu(norm.float(), x.float(), *moments)
    assert_rounded(result, expected)
    weights = norm.weight.double(), norm.bias.double()
    by_torch = F.silu(F.group_norm(x.double(), groups, *weights, norm.eps))
    assert relative_error(expected, by_torch) < 1e-6


@DTYPES
def test_norm_silu_without_weights_and_far_from_zero(dtype):
    norm, x = nn.GroupNorm(5, 15, affine=False), noise(2, 15, 6, 11, dtype=dtype) + 100
    moments = statistics(norm, x)
    result = pointwise.norm_silu(norm, x, *moments)
    assert_rounded(result, pointwise.plain_norm_silu(norm, x.float(), *moments))


@DTYPES
def test_only_the_rows_of_the_band_are_written(dtype):
    norm, tall = norm_of(12, 4, dtype), noise(2, 12, 9, 13, dtype=dtype)
    x = tall[:, :, 2:7]  # in one piece by channels only
    mean, variance = statistics(norm, x)
    room = torch.full((2, 12, 7, 13), 7.0, dtype=dtype)
    assert pointwise.can_norm_silu(norm, x, room[:, :, 1:-1])
    pointwise.norm_silu(norm, x, mean, variance, room[:, :, 1:-1])
    assert torch.equal(room[:, :, 1:-1], pointwise.norm_silu(norm, x.clone(), mean, variance))
    assert (room[:, :, 0] == 7).all()
    assert (room[:, :, -1] == 7).all()
    row = room[:, :, -1:]
    assert pointwise.can_norm_silu(norm, x[:, :, :1], row)
    before = room[:, :, :-1].clone()
    normalise_and_activate(norm, FusedSiLU(), x[:, :, :1], mean, variance, out=row)
    assert torch.equal(row, room[:, :, 1:2])
    assert torch.equal(room[:, :, :-1], before)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 600), (5, 10), (1, 9, 2 * 256), (1, 2, 2, 2 * 257)])
@pytest.mark.parametrize("in_place", [False, True])
def test_geglu_computes_the_formula(shape, in_place, dtype):
    projected = noise(*shape, dtype=dtype)
    assert pointwise.can_geglu(projected)
    expected = pointwise.plain_geglu(projected.float())
    hidden, gate = projected.clone().chunk(2, dim=-1)
    result = pointwise.geglu(projected, in_place)
    assert_rounded(result, expected)
    assert result.is_contiguous() != in_place or result.numel() == hidden.shape[-1]
    assert torch.equal(projected[..., hidden.shape[-1] :], gate)
    assert torch.equal(projected[..., : hidden.shape[-1]], result if in_place else hidden)


def test_what_is_no_number_is_not_hidden():
    norm, x = norm_of(4, 2), noise(1, 4, 3, 5)
    moments = statistics(norm, x)
    x[0, 1, 2, 3] = float("nan")
    result = pointwise.norm_silu(norm, x, *moments).isnan()
    assert result.nonzero().tolist() == [[0, 1, 2, 3]]
    projected = noise(2, 12)
    projected[0, 1] = projected[1, 8] = float("nan")
    assert pointwise.geglu(projected).isnan().nonzero().tolist() == [[0, 1], [1, 2]]


# --- the plain way --------------------------------------------------------------------------------


def refusals():
    x = noise(1, 6, 4, 5)
    yield "fp64", x.double(), FusedSiLU()
    yield "channels last", x.to(memory_format=torch.channels_last), FusedSiLU()
    yield "columns", x[:, :, :, 1:], FusedSiLU()
    yield "not chosen", x, nn.SiLU()
    yield "another activation", x, F.gelu
    hooked = FusedSiLU()
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    yield "a hook", x, hooked


@pytest.mark.parametrize(("x", "activate"), [pytest.param(*r[1:], id=r[0]) for r in refusals()])
def test_what_the_kernel_cannot_do_is_done_plainly(x, activate):
    calls, norm = Calls(), norm_of(6, 3, x.dtype)
    moments = [m.to(x.dtype) for m in statistics(norm, x)]
    result = normalise_and_activate(norm, activate, x, *moments)
    assert relative_error(result, activate(norm(x)).double()) < 1e-6
    room = x.new_zeros(1, 6, 6, x.shape[3])
    assert torch.equal(
        normalise_and_activate(norm, activate, x, *moments, out=room[:, :, 1:-1]), result
    )
    assert calls.taken() == (0, 0)


def test_gradients_take_the_plain_way():
    calls, gate = Calls(), FusedGEGLU(6, 10)
    x = noise(1, 6, 4, 5)
    norm = norm_of(6, 3)
    with torch.enable_grad():
        normalise_and_activate(norm.requires_grad_(), FusedSiLU(), x, *statistics(norm, x))
        gate(noise(2, 6)).sum().backward()
    assert gate.proj.weight.grad is not None
    assert calls.taken() == (0, 0)
    gate.double()(noise(2, 6).double())
    assert calls.taken() == (0, 0)


# --- in networks ----------------------------------------------------------------------------------


def forwards(unet, count):
    text = latent(7, 24, channels=1, batch=1)[:, 0].float()
    samples = [latent(16, 6, batch=1).float() + 0.1 * i for i in range(count)]
    return torch.cat([unet(x, 500, text).sample for x in samples])


def fused_and_plain(mesh, mode):
    """(relative error, kernels launched, whether as much travels) on two ranks."""
    found = {}
    for kernels in ("plain", "fused"):
        unet, exchange = banded_unet(mesh, mode, dtype=torch.float32)
        linfusion.choose_kernels(unet, kernels)
        calls = Calls()
        with torch.no_grad():
            outputs = forwards(unet, 2)  # the second is displaced, in that mode
        exchange.reset()
        found[kernels] = outputs, calls.taken(), exchange.traffic
    (expected, none, traffic), (result, launched, same) = found["plain"], found["fused"]
    assert none == (0, 0)
    return relative_error(result, expected.double()), launched, traffic == same


@pytest.mark.parametrize("mode", [ExactExchange, partial(DisplacedExchange, warmup_steps=1)])
def test_a_banded_unet_calls_the_kernels_and_is_the_plain_one(mode):
    # Of each residual block two norms, each of a band and of one row of the other's.
    for error, launched, is_same_traffic in run_ranks(2, fused_and_plain, mode):
        assert error < 1e-5
        assert launched == (2 * RESNETS * 2 * 2, 2 * GATES)
        assert is_same_traffic


LEAN = {
    "no settings": (None, (0, GATES)),  # torch's norm takes a picture's sums besides
    "in place": (MemoryOptions(inplace_activations=True), (0, GATES)),
    "chunks": (MemoryOptions(row_chunks=2, token_chunks=3), (2 * RESNETS * 2, 3 * GATES)),
}


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize(("options", "expected"), LEAN.values(), ids=LEAN)
def test_one_rank_with_settings_that_save_memory(options, expected, lora):
    unet, calls = tiny_unet(dtype=torch.float32), Calls()
    if lora:
        torch.manual_seed(0)
        layers = ["net.0.proj", "conv1", "conv2"]
        unet.add_adapter(LoraConfig(r=3, target_modules=layers, init_lora_weights=False))
        unet.requires_grad_(False)
    plain = forwards(unet, 1)
    linfusion.choose_kernels(unet, "fused")
    if options:
        memory.apply(unet, options)
    assert calls.taken() == (0, 0)
    result = forwards(unet, 1)
    assert relative_error(result, plain.double()) < 1e-5
    assert calls.taken() == expected


def test_kernels_are_chosen_before_settings_that_save_memory():
    unet = tiny_unet(dtype=torch.float32)
    kinds = [type(m) for m in unet.modules()]
    linfusion.choose_kernels(unet, "fused")
    fused_kinds = [type(m) for m in unet.modules()]
    assert fused_kinds.count(FusedGEGLU) == GATES
    memory.apply(unet, MemoryOptions(token_chunks=2))
    with pytest.raises(UserError, match=r"choose its kernels before them, or call engine\.memory"):
        linfusion.choose_kernels(unet, "plain")
    memory.remove(unet)
    assert [type(m) for m in unet.modules()] == fused_kinds
    linfusion.choose_kernels(unet, "plain")
    assert [type(m) for m in unet.modules()] == kinds
