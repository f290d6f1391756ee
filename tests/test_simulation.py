"""What the simulation counts, against real memory, real messages, and sums done by hand."""

import ctypes
import gc
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from engine import codec, linfusion, memory
from engine.bands import DisplacedExchange, ExactExchange, Mesh, split_rows
from engine.bands.boundary import UNetBoundary, VAEBoundary, with_boundary
from engine.demo import WEIGHTS
from engine.parallel import band_layers, share_out
from engine.simulation import (
    META,
    Cost,
    CpuKernels,
    CudaKernels,
    PretendedMesh,
    pretended,
    simulate,
)
from tests import families
from tests.models import latent, tiny_unet, tiny_vae
from tests.ranks import run_ranks

MB = 10**6
KERNELS = CpuKernels(threads=1)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)


# --- by hand --------------------------------------------------------------------------------------


def test_a_storage_counts_until_nobody_holds_it():
    x = empty(1000, 250)  # 1 MB, and not ours: it was there before

    def chain():
        y = x + 1
        z = y + 1  # two at once
        del y
        w = z + 1  # and two again
        return w.view(-1)[:10]

    assert simulate(chain, KERNELS).peak_bytes == 2 * MB


def test_what_a_frame_holds_counts():
    x = empty(1000, 250)

    def chain():
        held = x + 1
        z = held * 2
        z = z + 1
        return z + held

    assert simulate(chain, KERNELS).peak_bytes == 3 * MB


def test_views_and_operations_in_place_allocate_nothing():
    x = empty(1000, 250)
    cost = simulate(lambda: x.view(-1).unflatten(0, (500, 500)).transpose(0, 1).add_(1), KERNELS)
    assert cost.peak_bytes == 0
    assert cost.operations == 1
    assert cost.bytes_moved == 2 * MB  # read and written


def test_results_that_are_known_count_as_the_first_did():
    x = empty(1000, 250)
    once = simulate(lambda: F.silu(x), KERNELS)
    kept = simulate(lambda: [F.silu(x) for _ in range(5)], KERNELS)
    assert kept.peak_bytes == 5 * once.peak_bytes == 5 * MB
    assert kept.bytes_moved == 5 * once.bytes_moved


def test_products_by_their_flops():
    linear, convolution = nn.Linear(8, 16, device=META), nn.Conv2d(4, 6, 3, device=META)
    assert simulate(lambda: linear(empty(10, 8)), KERNELS).flops == {"product": 2 * 10 * 8 * 16}
    cost = simulate(lambda: convolution(empty(2, 4, 12, 10)), KERNELS)
    assert cost.flops == {"convolution": 2 * 2 * 10 * 8 * 6 * 4 * 9}


def test_softmax_attention_keeps_no_scores():
    q = empty(1, 2, 4096, 64)
    cost = simulate(lambda: F.scaled_dot_product_attention(q, q, q), KERNELS)
    assert cost.peak_bytes < 1.1 * q.nbytes
    assert cost.flops == {"product": 2 * 2 * 2 * 4096 * 4096 * 64}


def test_what_waits_on_the_host_is_not_on_the_device():
    x = empty(1000, 250)

    def parked():
        y = (x + 1).to("cpu")  # 1 MB made, and gone
        z = x + 2
        z = z.sum()
        return y + z  # y comes back, beside the sum

    cost = simulate(parked, KERNELS)
    assert cost.host_bytes == MB
    assert cost.peak_bytes == 2 * MB + 4


def test_costs_add_up_and_peaks_do_not():
    one = simulate(lambda: empty(1000, 250) + 1, KERNELS)
    two = simulate(lambda: empty(500, 250) + 1, KERNELS)
    total = one * 3 + two
    assert total.peak_bytes == one.peak_bytes == 2 * MB
    assert total.bytes_moved == 3 * one.bytes_moved + two.bytes_moved
    assert one * 0 == Cost()


def test_meta_networks_have_their_shapes_and_dtype():
    with pretended(torch.float16):
        layer = nn.Linear(3, 4)
    assert (layer.weight.device, layer.weight.dtype) == (META, torch.float16)
    assert torch.get_default_dtype() == torch.float32


def test_an_allowance_for_tensor_cores_in_half_precision_only():
    convolution = nn.Conv2d(64, 32, 3, padding=1, device=META)
    x = empty(1, 64, 100, 100)
    plain = simulate(lambda: convolution(x), CudaKernels()).peak_bytes
    half, x_half = convolution.half(), x.half()
    in_half = simulate(lambda: half(x_half), CudaKernels()).peak_bytes
    assert plain == x.nbytes // 2  # the result alone
    assert in_half == x_half.nbytes + 2 * (x_half.nbytes // 2)
    lasting = simulate(lambda: half(x_half), CudaKernels(channels_last=True)).peak_bytes
    assert lasting == x_half.nbytes // 2


# --- messages -------------------------------------------------------------------------------------


def text(device):
    return torch.zeros(2, 7, 24, dtype=torch.float64, device=device)


def banded_unet(mesh, linear, exchange, groups):
    unet = tiny_unet(linear=linear)
    band_layers(unet)
    layout = share_out(mesh, groups, exchange)
    with_boundary(unet, UNetBoundary, layout)
    return unet.to(mesh.device), layout


def banded_vae(mesh):
    vae = tiny_vae()
    band_layers(vae)
    layout = share_out(mesh, 1)
    with_boundary(vae, VAEBoundary, layout)
    return vae.to(mesh.device), layout


def forward(mesh, linear, exchange, groups, height):
    """What one forward of each network sends, by kind."""
    unet, layout = banded_unet(mesh, linear, exchange, groups)
    time = torch.zeros((), dtype=torch.int64, device=mesh.device)
    unet(latent(height, 24).to(mesh.device), time, text(mesh.device))
    vae, vae_layout = banded_vae(mesh)
    codec.decode(vae, latent(height, 8, batch=1).to(mesh.device))
    return [
        (traffic.bytes_sent, traffic.rounds) for traffic in (layout.traffic, vae_layout.traffic)
    ]


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "softmax"])
@pytest.mark.parametrize(("ranks", "groups", "height"), [(3, 1, 48), (4, 2, 41)])
def test_a_pretended_mesh_sends_what_a_real_one_does(linear, ranks, groups, height):
    exchange = ExactExchange if linear else partial(DisplacedExchange, warmup_steps=1)
    real = run_ranks(ranks, forward, linear, exchange, groups, height)
    mesh = PretendedMesh.of(ranks, height, multiple=4, groups=groups)
    seen = {}
    simulate(lambda: seen.update(sent=forward(mesh, linear, exchange, groups, height)), KERNELS)
    assert seen["sent"] == real[mesh.rank]
    assert sum(sent.total() for sent, _ in seen["sent"]) > 0


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_the_busiest_rank_is_pretended(size):
    mesh = PretendedMesh.of(size, 41, multiple=1)
    bands = split_rows(41, size)
    assert len(bands[mesh.rank]) == max(len(band) for band in bands[1:-1] or bands)
    assert mesh.gather_lengths(len(bands[mesh.rank])) == [len(band) for band in bands]


# --- real memory ----------------------------------------------------------------------------------

# Peak growth of a rank's resident memory, for one call of a network that is made of shapes in the
# one process and of numbers in the other.


def demo_unet():
    config = UNet2DConditionModel.load_config(WEIGHTS, subfolder="unet")
    unet = UNet2DConditionModel.from_config(config)
    linfusion.convert(unet)
    return unet


def unet_call(mesh, unet, side, dtype, added=None):
    band_layers(unet)
    with_boundary(unet, UNetBoundary, share_out(mesh, 1))
    unet.eval().to(dtype)

    def call(side=side):
        zeros = partial(torch.zeros, dtype=dtype, device=mesh.device)
        return unet(
            zeros(2, 4, side, side),
            torch.zeros((), dtype=torch.int64, device=mesh.device),
            zeros(2, 16, unet.config.cross_attention_dim),
            added_cond_kwargs={name: zeros(2, width) for name, width in (added or {}).items()},
        )

    return call


def demo_call(mesh, side, dtype=torch.float32):
    return unet_call(mesh, demo_unet(), side, dtype)


def chunked_call(mesh, side, dtype=torch.float32):
    unet = demo_unet()
    memory.apply(unet, memory.MemoryOptions(token_chunks=4, row_chunks=4))
    return unet_call(mesh, unet, side, dtype)


def xl_call(mesh, side, dtype=torch.float32):
    unet = families._xl_unet(2 * families.TEXT_WIDTH, 4, size_numbers=6)
    linfusion.convert(unet)
    return unet_call(mesh, unet, side, dtype, {"text_embeds": families.TEXT_WIDTH, "time_ids": 6})


def demo_vae(mesh, dtype):
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(WEIGHTS, subfolder="vae"))
    band_layers(vae)
    with_boundary(vae, VAEBoundary, share_out(mesh, 1))
    return vae.to(dtype)


def decoder_call(mesh, side, dtype=torch.float32):
    vae = demo_vae(mesh, dtype)
    return lambda side=side: codec.decode(vae, torch.zeros(1, 4, side, side, device=mesh.device))


def streaming_call(mesh, side, dtype=torch.float32):
    vae = demo_vae(mesh, dtype)
    by = codec.Streaming(statistics_px=128, passes=0)
    wide = 8 * side  # so that a chunk weighs more than the thinned picture
    return lambda side=side: codec.decode(
        vae, torch.zeros(1, 4, side, wide if side > 16 else 16, device=mesh.device), by
    )


def encoder_call(mesh, side, dtype=torch.float32):
    vae = demo_vae(mesh, dtype)

    def call(side=side):
        return vae.encode(torch.zeros(1, 3, 8 * side, 8 * side, dtype=dtype, device=mesh.device))

    return call


def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def peak_growth(mesh, make_call, side, dtype):
    """Bytes by which this process grows at most in one call."""
    # The C library keeps freed blocks below a threshold that it moves, and each thread its own;
    # with a low one and a single arena, what is freed is gone, and memory is what is alive.
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    assert mallopt(-8, 1)  # M_ARENA_MAX
    call = make_call(mesh, side, dtype)
    call(16)  # what libraries make for themselves when first used
    gc.collect()
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize(
    ("make_call", "side", "ranks", "dtype"),
    [
        (demo_call, 192, 1, torch.float32),
        (demo_call, 192, 2, torch.float32),
        (demo_call, 96, 1, torch.float64),  # by other kernels
        pytest.param(xl_call, 320, 1, torch.float32, marks=pytest.mark.long),
        (xl_call, 384, 2, torch.float32),
        (chunked_call, 224, 1, torch.float32),
        (streaming_call, 48, 1, torch.float32),
        pytest.param(decoder_call, 80, 1, torch.float32, marks=pytest.mark.long),
        (decoder_call, 96, 2, torch.float32),
        (encoder_call, 112, 2, torch.float32),
    ],
)
def test_the_peak_is_that_of_a_real_process(make_call, side, ranks, dtype):
    measured = run_ranks(ranks, peak_growth, make_call, side, dtype)
    mesh = PretendedMesh.of(ranks, side, multiple=4) if ranks > 1 else Mesh(0, 1, META, None)
    with pretended():
        call = make_call(mesh, side, dtype)
    expected = simulate(call, KERNELS).peak_bytes
    assert expected > 100 * MB  # so that activations are what is measured
    for grown in measured:
        assert math.isclose(expected, grown, rel_tol=0.15), (expected / MB, grown / MB)
