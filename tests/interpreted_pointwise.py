"""The Triton kernels of norms and sums in Triton's interpreter, and where networks call them.

Run by `tests/test_fused.py` as `tests/interpreted.py` is, or by hand: `TRITON_INTERPRET=1 python -m
pytest tests/interpreted_pointwise.py`.
"""

import importlib
from collections import Counter
from functools import partial

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

from engine import codec, fuse, memory
from engine.bands import DisplacedExchange, ExactExchange
from engine.bands.chunks import ChunkedUpsample2D
from engine.bands.layers import BandUpsample2D, FusedGroupNorm, normalise_and_activate
from engine.codec import Streaming
from engine.config import UserError
from engine.kernels import norms, pointwise
from engine.kernels.fused import is_interpreted
from engine.kernels.norms import FusedLayerNorm
from engine.kernels.pointwise import FusedGEGLU
from engine.memory import MemoryOptions
from tests.models import latent, tiny_unet, tiny_vae
from tests.ranks import run_ranks
from tests.test_displaced import banded_unet
from tests.test_linfusion import relative_error

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="needs Triton and TRITON_INTERPRET=1")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
RESNETS, GATES = 11, 7  # of the tiny UNet
NORMS = 2 * RESNETS + GATES + 1


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


KERNELS = {
    norms: ("channel_moments", "group_norm", "layer_norm"),
    pointwise: ("geglu", "add", "put"),
}


class Calls(Counter):
    """How often each kernel is launched, from when this is made."""

    def __init__(self):
        super().__init__()
        for module, names in KERNELS.items():
            kernels = importlib.import_module(f"{module.__name__}_triton")
            for name in names:
                kernel = getattr(kernels, name)
                original = getattr(kernel, "kernel", kernel)
                setattr(kernels, name, Counted(original, self, name))

    def taken(self):
        counts = dict(self)
        self.clear()
        return counts


class Counted:
    def __init__(self, kernel, calls, name):
        self.kernel, self.calls, self.name = kernel, calls, name

    def __getitem__(self, grid):
        self.calls[self.name] += 1
        return self.kernel[grid]


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


# --- the kernels ----------------------------------------------------------------------------------

SHAPES = pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width"),
    [(2, 12, 4, 7, 33), (1, 70, 7, 9, 31), (2, 9, 3, 1, 1), (3, 10, 1, 5, 1), (1, 6, 6, 1, 257)],
)


@DTYPES
@SHAPES
def test_channel_moments(batch, channels, groups, height, width, dtype):
    x = last(noise(batch, channels, height, width, dtype=dtype) + 5)
    for ours, exact in zip(norms.channel_moments(x), norms.plain_channel_moments(x), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-6)


def test_moments_of_many_tokens_do_not_cancel():
    x = last(noise(1, 3, 130, 128) + 300)  # 260 parts of them
    (mean, variance), exact = norms.channel_moments(x), norms.plain_channel_moments(x)
    assert relative_error(mean, exact[0]) < 1e-7
    assert relative_error(variance, exact[1]) < 1e-5


@DTYPES
@SHAPES
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_computes_the_formula(batch, channels, groups, height, width, silu, dtype):
    norm, x = norm_of(channels, groups, dtype), noise(batch, channels, height, width, dtype=dtype)
    shift = noise(batch, channels, dtype=dtype)
    for by in (None, shift, shift[:1]):
        moved = x.float() + (0 if by is None else by.float()[:, :, None, None])
        moments = statistics(norm, moved)
        result = norms.group_norm(norm, last(x), *moments, silu, by)
        assert result.dtype == dtype
        expected = norms.plain_group_norm(norm.float(), moved, *moments, silu)
        norm.to(dtype)
        assert_rounded(result, expected)
        weights = norm.weight.double(), norm.bias.double()
        by_torch = F.group_norm(moved.double(), groups, *weights, norm.eps)
        assert relative_error(expected, F.silu(by_torch) if silu else by_torch) < 1e-6


@DTYPES
def test_group_norm_without_weights_and_far_from_zero(dtype):
    norm, x = nn.GroupNorm(5, 15, affine=False), noise(2, 15, 6, 11, dtype=dtype) + 100
    moments = statistics(norm, x)
    result = norms.group_norm(norm, last(x), *moments)
    assert_rounded(result, norms.plain_group_norm(norm, x.float(), *moments))


@DTYPES
def test_only_the_rows_of_the_band_are_written(dtype):
    norm, tall = fused_norm(12, 4, dtype), last(noise(2, 12, 9, 13, dtype=dtype))
    x = tall[:, :, 2:7]  # not in one piece
    mean, variance = statistics(norm, x)
    room = last(torch.full((2, 12, 7, 13), 7.0, dtype=dtype))
    assert norms.can_compute(x, room[:, :, 1:-1])
    norms.group_norm(norm, x, mean, variance, True, None, room[:, :, 1:-1])
    assert torch.equal(room[:, :, 1:-1], norms.group_norm(norm, last(x), mean, variance, True))
    assert (room[:, :, 0] == 7).all()
    assert (room[:, :, -1] == 7).all()
    before = room[:, :, :-1].clone()
    row = x[:, :, :1].contiguous()  # as it comes from another rank
    normalise_and_activate(norm, nn.SiLU(), row, mean, variance, out=room[:, :, -1:])
    assert torch.equal(room[:, :, -1:], room[:, :, 1:2])
    assert torch.equal(room[:, :, :-1], before)


@DTYPES
@pytest.mark.parametrize("channels", [5, 32, 48, 320])
@pytest.mark.parametrize("slope", [None, 0.01])
def test_layer_norm_computes_the_formula(channels, slope, dtype):
    norm, x = nn.LayerNorm(channels).to(dtype), noise(2, 7, channels, dtype=dtype) + 4
    norm.weight.copy_(noise(channels))
    norm.bias.copy_(noise(channels))
    assert norms.can_layer_norm(norm, x)
    weights = norm.weight.float(), norm.bias.float()
    expected = F.layer_norm(x.float(), (channels,), *weights, norm.eps)
    expected = expected if slope is None else F.leaky_relu(expected, slope)
    assert_rounded(norms.layer_norm(norm, x, slope), expected)
    assert norms.layer_norm(norm, x, slope, out=x) is x
    assert_rounded(x, expected)


@DTYPES
@pytest.mark.parametrize("biased", [False, True])
def test_add_computes_the_formula(biased, dtype):
    x, y = last(noise(2, 12, 9, 13, dtype=dtype)), last(noise(2, 12, 9, 13, dtype=dtype) + 1)
    bias = noise(12, dtype=dtype) if biased else None
    expected = pointwise.plain_add(x.float(), y.float(), bias if bias is None else bias.float())
    assert pointwise.add(x, y, bias) is x
    assert_rounded(x, expected)
    assert torch.equal(pointwise.add(x[:, :, 1:], y[:, :, 1:]), x[:, :, 1:] + y[:, :, 1:])


@DTYPES
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("channels", [3, 48, 1100])
def test_put_writes_between_the_pixels_of_others(channels, biased, dtype):
    y = last(noise(2, channels, 6, 8, dtype=dtype))[:, :, 1:, :-1]
    bias = noise(channels, dtype=dtype) if biased else None
    out = last(torch.full((2, channels, 10, 14), 7.0, dtype=dtype))
    assert pointwise.can_put(out[:, :, 1::2, ::2], y)
    pointwise.put(out[:, :, 1::2, ::2], y, bias)
    expected = y.float() if bias is None else y.float() + bias.float()[:, None, None]
    assert_rounded(out[:, :, 1::2, ::2], expected)
    for row, column in ((0, 0), (0, 1), (1, 1)):
        assert (out[:, :, row::2, column::2] == 7).all()


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
    norm, x = norm_of(4, 2), last(noise(1, 4, 3, 5))
    moments = statistics(norm, x)
    x[0, 1, 2, 3] = float("nan")
    result = norms.group_norm(norm, x, *moments, True).isnan()
    assert result.nonzero().tolist() == [[0, 1, 2, 3]]
    assert norms.channel_moments(x)[0].isnan().nonzero().tolist() == [[0, 1]]
    projected = noise(2, 12)
    projected[0, 1] = projected[1, 8] = float("nan")
    assert pointwise.geglu(projected).isnan().nonzero().tolist() == [[0, 1], [1, 2]]


# --- the plain way --------------------------------------------------------------------------------


def fused_norm(channels, groups, dtype=torch.float32):
    norm = norm_of(channels, groups, dtype)
    norm.__class__ = FusedGroupNorm
    return norm


def refusals():
    x, silu = noise(1, 6, 4, 5), nn.SiLU()
    yield "fp64", fused_norm(6, 3, torch.float64), x.double(), silu, {}
    yield "not chosen", norm_of(6, 3), x, silu, {}
    yield "another activation", fused_norm(6, 3), x, F.gelu, {"group_norm": 2}
    yield "by planes", fused_norm(6, 3), x, silu, {"group_norm": 2}
    hooked = nn.SiLU()
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    yield "a hook", fused_norm(6, 3), x, hooked, {"group_norm": 2}


@pytest.mark.parametrize(
    ("norm", "x", "activate", "launched"), [pytest.param(*r[1:], id=r[0]) for r in refusals()]
)
def test_what_the_kernel_cannot_do_is_done_plainly(norm, x, activate, launched):
    calls, moments = Calls(), [m.to(x.dtype) for m in statistics(norm, x)]
    result = normalise_and_activate(norm, activate, x, *moments)
    by_torch = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    assert relative_error(result, activate(by_torch).double()) < 1e-6
    room = x.new_zeros(1, 6, 6, x.shape[3])
    out = room[:, :, 1:-1]
    written = normalise_and_activate(norm, activate, x, *moments, out=out)
    assert relative_error(written, result.double()) < 1e-6
    assert calls.taken() == launched


def test_gradients_take_the_plain_way():
    calls, gate, x, norm = Calls(), FusedGEGLU(6, 10), noise(1, 6, 4, 5), fused_norm(6, 3)
    layer = FusedLayerNorm(5)
    with torch.enable_grad():
        norm.requires_grad_()(x).sum().backward()
        gate(noise(2, 6)).sum().backward()
        layer(x).sum().backward()
    assert gate.proj.weight.grad is not None
    assert layer.weight.grad is not None
    assert calls.taken() == {}
    gate.double()(noise(2, 6).double())
    layer.double()(x.double())
    assert calls.taken() == {}


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
        fuse.choose_kernels(unet, kernels)
        calls = Calls()
        with torch.no_grad():
            outputs = forwards(unet, 2)  # the second is displaced, in that mode
        exchange.reset()
        found[kernels] = outputs, calls.taken(), exchange.traffic
    (expected, none, traffic), (result, launched, same) = found["plain"], found["fused"]
    assert none == {}
    return relative_error(result, expected.double()), launched, traffic == same


MLPS = 2 * GATES
ONE_RANK = {
    "channel_moments": NORMS, "group_norm": NORMS, "layer_norm": 3 * GATES + MLPS, "geglu": GATES,
    "add": RESNETS,
}  # fmt: skip


@pytest.mark.parametrize("mode", [ExactExchange, partial(DisplacedExchange, warmup_steps=1)])
def test_a_banded_unet_calls_the_kernels_and_is_the_plain_one(mode):
    # Each norm of a residual block is of a band and of one row of the other's.
    twice = {name: 2 * count for name, count in ONE_RANK.items()}
    twice["group_norm"] += 2 * 2 * RESNETS
    for error, launched, is_same_traffic in run_ranks(2, fused_and_plain, mode):
        assert error < 1e-5
        assert launched == twice
        assert is_same_traffic


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_doubled_picture_is_put_together_by_the_kernel(chunks):
    layer, x, calls = Upsample2D(12, use_conv=True), last(noise(1, 12, 18, 50)), Calls()
    expected, network = layer(x), nn.ModuleList([layer])
    layer.__class__ = BandUpsample2D if chunks == 1 else ChunkedUpsample2D
    layer.row_chunks = chunks
    for kernels, launched in (("fused", {"put": 4 * chunks}), ("plain", {})):
        fuse.choose_kernels(network, kernels)
        assert relative_error(layer(x), expected.double()) < 1e-6
        assert calls.taken() == launched


def test_a_stream_calls_the_kernels_and_is_the_plain_one():
    """Its norms write below rows that are carried, its shortcuts are added piece by piece."""
    stream = Streaming(statistics_px=64, passes=1, chunk_rows=3)
    vae, calls, z = tiny_vae(torch.float32), Calls(), latent(14, 8, batch=1).float()
    pixels = codec.decode(vae, z, stream)[1].clamp(-1, 1)
    encoded = codec.encode(vae, pixels, pixels.shape[2], stream)
    assert calls.taken() == {}
    fuse.choose_kernels(vae, "fused")
    result = codec.decode(vae, z, stream)[1].clamp(-1, 1)
    assert relative_error(result, pixels.double()) < 1e-5
    assert calls.taken().keys() >= {"channel_moments", "group_norm", "add"}
    result = codec.encode(vae, pixels, pixels.shape[2], stream)
    assert relative_error(result, encoded.double()) < 1e-5
    assert calls.taken().keys() >= {"channel_moments", "group_norm", "add"}


LEAN = {
    "no settings": (None, ONE_RANK),
    "in place": (  # the first layer norm once for the state, once for the queries
        MemoryOptions(inplace_activations=True),
        {"group_norm": NORMS, "layer_norm": 4 * GATES + MLPS, "geglu": GATES},
    ),
    "chunks": (MemoryOptions(row_chunks=2, token_chunks=3), {"geglu": 3 * GATES}),
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize(("options", "expected"), LEAN.values(), ids=LEAN)
def test_one_rank_with_settings_that_save_memory(options, expected, lora):
    unet, calls = tiny_unet(dtype=torch.float32), Calls()
    if lora:
        torch.manual_seed(0)
        layers = ["net.0.proj", "conv1", "conv2", "proj_in", "proj_out", "to_q"]
        unet.add_adapter(LoraConfig(r=3, target_modules=layers, init_lora_weights=False))
        unet.requires_grad_(False)
    plain = forwards(unet, 1)
    fuse.choose_kernels(unet, "fused")
    if options:
        memory.apply(unet, options)
    assert calls.taken() == {}
    result = forwards(unet, 1)
    assert relative_error(result, plain.double()) < 1e-5
    launched = calls.taken()
    if lora:  # a block whose convolutions have one adds its biases itself
        expected = {name: count for name, count in expected.items() if name != "add"}
    assert expected.items() <= launched.items()


def test_kernels_are_chosen_before_settings_that_save_memory():
    unet = tiny_unet(dtype=torch.float32)
    kinds = [type(m) for m in unet.modules()]
    fuse.choose_kernels(unet, "fused")
    fused_kinds = [type(m) for m in unet.modules()]
    assert fused_kinds.count(FusedGEGLU) == GATES
    memory.apply(unet, MemoryOptions(token_chunks=2))
    with pytest.raises(UserError, match=r"choose its kernels before them, or call engine\.memory"):
        fuse.choose_kernels(unet, "plain")
    memory.remove(unet)
    assert [type(m) for m in unet.modules()] == fused_kinds
    fuse.choose_kernels(unet, "plain")
    assert [type(m) for m in unet.modules()] == kinds
