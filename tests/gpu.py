"""What only a GPU can tell: the compiled kernels, recorded forwards, NCCL, whole pictures.

`tests/test_gpu.py` runs this file in a process of its own where there is a GPU, and by hand it is
`CUDA_VISIBLE_DEVICES=0 python -m pytest tests/gpu.py`.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F

from engine import fuse, graphs, memory
from engine.bands import ExactExchange, Mesh, Traffic, open_mesh
from engine.bands.boundary import Layout, UNetBoundary, with_boundary
from engine.codec import Exact, Streaming, decode, encode
from engine.config import Settings
from engine.kernels import norms, pointwise
from engine.kernels.formula import apply_state, attention_state
from engine.kernels.fused import fused_apply, fused_state
from engine.parallel import band_layers
from engine.pipeline import Engine
from tests.models import latent, tiny_unet, tiny_vae
from tests.ranks import run_ranks
from tests.test_linfusion import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def noise(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(CUDA, dtype)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


# --- kernels --------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("width", "tokens"), [(40, 4777), (64, 9000), (80, 2570), (160, 1310)])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-12.0, 1.0), (0.0, 16.0)])
def test_linear_attention(width, tokens, mean, scale, dtype):
    query, key, value = (noise(2, tokens + i, 3, width, dtype=dtype) for i in range(3))
    query, key, value = (x[:, :tokens].transpose(1, 2) for x in (query, key, value))
    query, key, value = scale * query + mean, scale * key + mean, 50 * value
    exact = attention_state(key.double(), value.double())
    state = fused_state(key, value)
    # In fp16 little is left of phi(k), and of a result that eps is larger than the normaliser of.
    tolerance = (3 if dtype == torch.float16 and mean < 0 else 1) * TOLERANCES[dtype]
    assert relative_error(state, exact) < tolerance
    expected = apply_state(query.double(), state.double() / tokens)
    assert relative_error(fused_apply(query, state / tokens), expected) < tolerance


@DTYPES
@pytest.mark.parametrize("channels", [96, 320, 1920])
@pytest.mark.parametrize(("height", "width"), [(37, 53), (1, 300), (130, 128)])
def test_group_norms(channels, height, width, dtype):
    x = last(noise(2, channels, height, width, dtype=dtype) + 3)[:, :, : max(1, height - 1)]
    norm = nn.GroupNorm(32, channels).to(CUDA, dtype)
    norm.weight.copy_(noise(channels, dtype=dtype))
    norm.bias.copy_(noise(channels + 1, dtype=dtype)[1:])
    for ours, exact in zip(norms.channel_moments(x), norms.plain_channel_moments(x), strict=True):
        assert relative_error(ours, exact) < 1e-6
    mean, variance = noise(2, 32) + 3, noise(2, 32).abs() + 0.5
    shift, wide = noise(2, channels, dtype=dtype), (mean.double(), variance.double())
    for silu, by in ((True, shift), (False, shift[:1]), (True, None)):
        ours = norms.group_norm(norm, x, mean, variance, silu, by)
        exact = norms.plain_group_norm(
            norm, x.double(), *wide, silu, None if by is None else by.double()
        )
        assert relative_error(ours, exact) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize("channels", [96, 320, 640, 1280])
@pytest.mark.parametrize("slope", [None, 0.01])
def test_layer_norms(channels, slope, dtype):
    x, norm = noise(3, 1001, channels, dtype=dtype) + 2, nn.LayerNorm(channels).to(CUDA, dtype)
    norm.weight.copy_(noise(channels, dtype=dtype))
    norm.bias.copy_(noise(channels + 1, dtype=dtype)[1:])
    weights = norm.weight.double(), norm.bias.double()
    exact = F.layer_norm(x.double(), (channels,), *weights, norm.eps)
    exact = exact if slope is None else F.leaky_relu(exact, slope)
    assert relative_error(norms.layer_norm(norm, x, slope), exact) < TOLERANCES[dtype]


@DTYPES
def test_pointwise(dtype):
    x, y = (last(noise(2, 70, 33, 17 + i, dtype=dtype)[..., :17]) for i in range(2))
    bias, exact = noise(70, dtype=dtype), x.double() + y.double()
    exact += bias.double()[:, None, None]
    assert relative_error(pointwise.add(x, y, bias), exact) < TOLERANCES[dtype]
    wide = last(noise(2, 320, 40, 31, dtype=dtype))
    y, bias = wide[:, :, 1:, :-1], noise(320, dtype=dtype)
    out = torch.zeros_like(last(noise(2, 320, 78, 60, dtype=dtype)))
    pointwise.put(out[:, :, ::2, 1::2], y, bias)
    exact = y.double() + bias.double()[:, None, None]
    assert relative_error(out[:, :, ::2, 1::2], exact) < TOLERANCES[dtype]
    assert (out[:, :, 1::2] == 0).all()
    assert (out[:, :, :, ::2] == 0).all()
    projected = noise(2, 1000, 2560, dtype=dtype)
    exact = pointwise.plain_geglu(projected.double())
    assert relative_error(pointwise.geglu(projected), exact) < TOLERANCES[dtype]


# --- networks -------------------------------------------------------------------------------------


def calls(dtype):
    """Samples and a text for the tiny UNet."""
    text = latent(7, 24, channels=1)[:, 0].to(CUDA, dtype)
    return [latent(32, 24).to(CUDA, dtype) + 0.1 * i for i in range(4)], text


def run(unet, samples, text):
    times = torch.tensor([981, 741, 481, 221], device=CUDA)
    return [unet(x, t, text, return_dict=False)[0] for x, t in zip(samples, times, strict=True)]


OPTIONS = {
    "none": memory.MemoryOptions(),
    "in place": memory.MemoryOptions(inplace_activations=True),
    "chunks": memory.MemoryOptions(row_chunks=3, token_chunks=2),
    "host": memory.MemoryOptions(row_chunks=2, skips_on_host=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_fused_unet_is_the_plain_one(options):
    samples, text = calls(torch.float32)
    exact = run(tiny_unet().to(CUDA), [x.double() for x in samples], text.double())
    unet = tiny_unet(dtype=torch.float32).to(CUDA)
    fuse.choose_kernels(unet, "fused")
    memory.apply(unet, options, Mesh(0, 1, CUDA, None))
    for ours, expected in zip(run(unet, samples, text), exact, strict=True):
        assert relative_error(ours, expected) < 2e-3  # convolutions are of TF32


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_a_unet_in_half_precision(kernels, dtype, tolerance):
    samples, text = calls(dtype)
    exact = run(tiny_unet().to(CUDA), [x.double() for x in samples], text.double())
    unet = tiny_unet(dtype=dtype).to(CUDA)
    fuse.choose_kernels(unet, kernels)
    for ours, expected in zip(run(unet, samples, text), exact, strict=True):
        assert relative_error(ours, expected) < tolerance


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recorded_forwards_are_the_same_to_the_bit(kernels, dtype):
    samples, text = calls(dtype)
    unet = tiny_unet(dtype=dtype).to(CUDA)
    fuse.choose_kernels(unet, kernels)
    expected, small = run(unet, samples, text), run(unet, [x[:1] for x in samples], text[:1])
    with graphs.replayed(unet):
        first = run(unet, samples, text)
        other = run(unet, [x[:1] for x in samples], text[:1])
        again = run(unet, samples, text)
        kinds = [type(recording) for recording in unet._recordings._recorded.values()]
        assert kinds == [graphs.Recording] * 2
    for results in (first, again):
        assert all(map(torch.equal, results, expected))
    assert all(map(torch.equal, other, small))
    assert not hasattr(unet, "_recordings")


@pytest.mark.parametrize("codec", [Exact(), Streaming(statistics_px=64, passes=1)], ids=str)
def test_a_fused_vae_is_the_plain_one(codec):
    vae, fused = tiny_vae().to(CUDA), tiny_vae(torch.float32).to(CUDA)
    fuse.choose_kernels(fused, "fused")
    z = latent(40, 24, batch=1).to(CUDA)
    _, pixels = decode(vae, z, codec)
    assert relative_error(decode(fused, z.float(), codec)[1], pixels) < 2e-3
    pixels = pixels.clamp(-1, 1)
    exact = encode(vae, pixels, 320, codec)
    assert relative_error(encode(fused, pixels.float(), 320, codec), exact) < 2e-3


# --- ranks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedGpu(Mesh):
    """Ranks on one GPU, over gloo: what it does not send from there goes by way of the host."""

    def swap(self, outgoing, incoming):
        homes = [(peer, x, torch.empty(x.shape, dtype=x.dtype)) for peer, x in incoming]
        works = super().swap(
            [(peer, x.cpu()) for peer, x in outgoing], [(peer, host) for peer, _, host in homes]
        )
        for work in works:
            work.wait()
        for _, x, host in homes:
            x.copy_(host)
        return []


def banded(unet, mesh):
    exchange = ExactExchange(mesh, Traffic())
    band_layers(unet)
    alone = Mesh(0, 1, mesh.device, None)
    with_boundary(unet, UNetBoundary, Layout(mesh, alone, exchange, exchange.traffic))
    return unet


def over_gloo(mesh, kernels):
    torch.backends.cudnn.allow_tf32 = False
    mesh = SharedGpu(mesh.rank, mesh.size, CUDA, mesh.group)
    samples, text = calls(torch.float32)
    with torch.no_grad():
        unet = banded(tiny_unet(dtype=torch.float32).to(CUDA), mesh)
        fuse.choose_kernels(unet, kernels)
        with graphs.replayed(unet):  # which leaves gloo alone
            return [x.cpu().numpy() for x in run(unet, samples, text)]


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_bands_over_gloo(kernels):
    samples, text = calls(torch.float32)
    exact = run(tiny_unet().to(CUDA), [x.double() for x in samples], text.double())
    for results in run_ranks(2, over_gloo, kernels, start="spawn"):
        for ours, expected in zip(results, exact, strict=True):
            assert relative_error(torch.from_numpy(ours), expected.cpu()) < 1e-5


def exchange_of_one(mesh):
    """For a band that is the whole picture, and NCCL all the same, which a constructor refuses."""
    exchange = ExactExchange.__new__(ExactExchange)
    exchange.mesh, exchange.traffic = mesh, Traffic()
    return exchange


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield Mesh(0, 1, CUDA, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_collectives_by_nccl_are_recorded_too(world_of_one, kernels):
    samples, text = calls(torch.float32)
    plain = tiny_unet(dtype=torch.float32).to(CUDA)
    expected = run(plain, samples, text)
    unet, exchange = tiny_unet(dtype=torch.float32).to(CUDA), exchange_of_one(world_of_one)
    band_layers(unet)
    alone = Mesh(0, 1, CUDA, None)
    with_boundary(unet, UNetBoundary, Layout(world_of_one, alone, exchange, exchange.traffic))
    fuse.choose_kernels(unet, kernels)
    eager = run(unet, samples, text)
    assert sum(exchange.traffic.rounds.values()) > 0
    with graphs.replayed(unet):
        recorded = run(unet, samples, text)
        (recording,) = unet._recordings._recorded.values()
        assert isinstance(recording, graphs.Recording), recording
    assert all(map(torch.equal, recorded, eager))
    for ours, exact in zip(eager, expected, strict=True):
        assert relative_error(ours, exact.double()) < 2e-3


# --- pictures -------------------------------------------------------------------------------------


def test_the_picture_of_a_gpu_is_that_of_a_cpu(tiny_model, tmp_path):
    pixels = []
    ladder = {"strategy": "demofusion", "base": 64, "strengths": [0.5], "steps": [8]}
    for name, changes in {
        "cpu": {"device": "cpu"},
        "plain": {"kernels": "plain", "graphs": "off", "dtype": "float32"},
        "recorded": {"kernels": "plain", "dtype": "float32"},
        "auto": {},
        "bfloat16": {"dtype": "bfloat16"},
    }.items():
        asked = Settings.model_validate(
            {
                "model": str(tiny_model), "output": tmp_path / f"{name}.png", "height": 128,
                "width": 96, "steps": 6, "seed": 5, "ladder": ladder, **changes,
            }
        )  # fmt: skip
        with open_mesh() as mesh:
            Engine.load(asked, mesh).generate(asked)
        pixels.append(np.asarray(Image.open(asked.output)).astype(float))
    cpu, plain, recorded, auto, bfloat16 = pixels
    assert (plain == recorded).all()
    assert abs(plain - cpu).mean() < 0.5
    assert abs(auto - cpu).mean() < 2
    assert abs(bfloat16 - cpu).mean() < 8
