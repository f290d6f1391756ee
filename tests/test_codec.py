"""The codecs: exact over bands, streaming in any chunks, each against one process in float64."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from engine import codec
from engine.bands import current_exchange
from engine.bands.boundary import VAEBoundary
from engine.bands.stream import Stream
from engine.codec import Exact, Streaming, largest_activation
from engine.config import UserError
from engine.demo import WEIGHTS
from engine.demo.landscapes import draw_scene, render
from tests.models import latent, tiny_vae
from tests.ranks import run_ranks
from tests.test_parallel import band

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 41, 12  # of the latent, 328 x 96 px
WHOLE = Streaming(statistics_px=8 * HEIGHT)  # statistics of all pixels, nothing thinned out


def picture(batch=1):
    """[B, 3, 328, 96], smoother than noise, as pictures are."""
    noise = latent(HEIGHT, WIDTH, channels=3, batch=batch)
    return F.interpolate(noise, scale_factor=8, mode="bilinear").tanh()


@pytest.mark.parametrize("chunk_rows", [1, 4, 50])
def test_a_stream_with_all_statistics_is_the_exact_codec(chunk_rows):
    stream = Streaming(statistics_px=8 * HEIGHT, chunk_rows=chunk_rows)
    vae, sample = tiny_vae(), latent(HEIGHT, WIDTH)
    expected = tiny_vae().decode(sample / vae.config.scaling_factor).sample
    rows, pixels = codec.decode(vae, sample, stream)
    assert rows == range(8 * HEIGHT)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-10)
    expected = tiny_vae().encode(picture()).latent_dist.mode() * vae.config.scaling_factor
    encoded = codec.encode(vae, picture(), 8 * HEIGHT, stream)
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-10)


def one_rank(stream):
    vae = tiny_vae()
    sample = latent(HEIGHT, WIDTH, batch=1)
    return codec.decode(vae, sample, stream)[1], codec.encode(vae, picture(), 8 * HEIGHT, stream)


def deviations(mesh, stream, expected):
    vae, (expected_pixels, expected_latent) = tiny_vae(), expected
    band(mesh, vae, VAEBoundary)
    rows, pixels = codec.decode(vae, latent(HEIGHT, WIDTH, batch=1), stream)
    own = picture()[:, :, rows.start : rows.stop]
    encoded = codec.encode(vae, own, 8 * HEIGHT, stream)
    own_pixels = expected_pixels[:, :, rows.start : rows.stop]
    return (pixels - own_pixels).abs().max().item(), (encoded - expected_latent).abs().max().item()


@pytest.mark.parametrize(("ranks", "chunk_rows"), [(2, 1), (3, 4), (5, 7)])
def test_any_number_of_ranks_and_any_chunk_give_the_same_picture(ranks, chunk_rows):
    expected = one_rank(Streaming(statistics_px=110, chunk_rows=5))
    stream = Streaming(statistics_px=110, chunk_rows=chunk_rows)
    for errors in run_ranks(ranks, deviations, stream, expected):
        assert max(errors) < 1e-10, errors


def exact_deviations(mesh):
    return deviations(mesh, Exact(), one_rank(Exact()))


def test_the_exact_codec_gives_it_too():
    for errors in run_ranks(3, exact_deviations):
        assert max(errors) < 1e-10, errors


def test_measuring_passes_come_nearer_to_the_exact_picture():
    exact, _ = one_rank(Exact())
    errors = [
        (one_rank(Streaming(statistics_px=110, passes=passes))[0] - exact).square().mean().item()
        for passes in (0, 1, 2)
    ]
    assert errors[1] < errors[0] / 4
    assert errors[2] < errors[0] / 4


def bytes_sent(mesh, passes):
    vae = tiny_vae()
    traffic = band(mesh, vae, VAEBoundary).traffic
    codec.decode(vae, latent(HEIGHT, WIDTH, batch=1), Streaming(110, passes=passes))
    return sum(traffic.bytes_sent.values())


def test_a_decoding_stream_sends_nothing_but_what_it_measured():
    assert run_ranks(2, bytes_sent, 0) == [0, 0]
    first, _ = run_ranks(2, bytes_sent, 1)
    norms = [m for m in tiny_vae().decoder.modules() if isinstance(m, torch.nn.GroupNorm)]
    moments = 3 * 8 * sum(norm.num_groups for norm in norms)  # an all-reduce of two ranks sends all
    sampled = -(-HEIGHT // 3) // 2 * (WIDTH // 3)  # every third row and column, of half the rows
    assert first == moments + sampled * 2 * 16 * 8  # keys and values of 16 channels


# --- the demo's autoencoder -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """(the demo's VAE, a landscape [1, 3, 512, 512], its latent, the exactly decoded picture)"""
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae")
    drawn = torch.from_numpy(render(draw_scene(3), 512, 512))
    landscape = drawn.permute(2, 0, 1)[None] / 127.5 - 1
    sample = codec.encode(vae, landscape, 512)
    with torch.no_grad():
        return vae, landscape, sample.detach(), codec.decode(vae, sample)[1]


def decibels(pixels, exact):
    return -10 * ((pixels.clamp(-1, 1) - exact.clamp(-1, 1)) / 2).square().mean().log10().item()


def test_a_streamed_landscape_looks_like_the_exact_one(demo):
    vae, landscape, sample, exact = demo
    stream = Streaming(statistics_px=256)
    _, pixels = codec.decode(vae, sample, stream)
    assert decibels(pixels, exact) > 40
    encoded = codec.encode(vae, landscape, 512, stream)
    assert decibels(codec.decode(vae, encoded)[1].detach(), exact) > 40


def test_a_picture_of_one_colour_stays_one(demo):
    """Next to nothing varies there but what the edges do to it, and they are thinned out badly."""
    vae, *_ = demo
    blue = torch.tensor([-0.6, -0.2, 0.7]).view(1, 3, 1, 1).expand(1, 3, 256, 256)
    sample = codec.encode(vae, blue, 256).detach()
    exact = codec.decode(vae, sample)[1].detach()
    assert decibels(codec.decode(vae, sample, Streaming(statistics_px=128))[1], exact) > 38


def test_the_borders_of_chunks_are_rows_like_any_others(demo):
    """The change that streaming makes steps no further there than elsewhere."""
    vae, _, sample, exact = demo
    _, pixels = codec.decode(vae, sample, Streaming(statistics_px=256, passes=0, chunk_rows=2))
    steps = (pixels - exact).diff(dim=2).abs().mean((0, 1, 3))
    is_border = torch.arange(1, 512) % 16 == 0
    assert steps[is_border].max() <= steps[~is_border].max()
    assert steps[is_border].median() <= steps[~is_border].quantile(0.6)


# --- limits ---------------------------------------------------------------------------------------


_KERNELS = {F.conv2d, torch.conv2d, F.batch_norm, F.silu, F.interpolate, F.pad, torch.var_mean}


class Largest(TorchFunctionMode):
    """Notes how many elements the largest input or output of a kernel has, inside of a stream."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(current_exchange(), Stream) and func in _KERNELS:
            tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
            self.elements = max(self.elements, *(t.numel() for t in tensors))
        return result


@pytest.mark.parametrize("chunk_rows", [1, 3])
def test_no_tensor_of_a_stream_is_larger_than_foretold(chunk_rows, monkeypatch):
    monkeypatch.setattr("engine.kernels.convolution._LEAST_PIXELS", 0)  # as large ones double
    foretold = largest_activation(tiny_vae().config, chunk_rows, WIDTH)
    with Largest() as largest:
        one_rank(Streaming(statistics_px=64, chunk_rows=chunk_rows))
    assert 0.8 * foretold < largest.elements <= foretold


def test_a_stream_takes_chunks_that_the_kernels_can_count(monkeypatch):
    limit = largest_activation(tiny_vae().config, 6, WIDTH)
    monkeypatch.setattr(codec, "MAX_ELEMENTS", limit)
    monkeypatch.setattr("engine.kernels.convolution._LEAST_PIXELS", 0)
    with Largest() as largest:
        one_rank(Streaming(statistics_px=64, chunk_rows=20))
    assert 0.8 * limit < largest.elements <= limit


def test_what_the_kernels_cannot_count_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "MAX_ELEMENTS", largest_activation(tiny_vae().config, 14, WIDTH))
    with pytest.raises(UserError, match=r"41 latent rows on a rank: start 3 times as many ranks"):
        one_rank(Exact())
    with pytest.raises(UserError, match=r"statistics of 512 px .* such as 512 px|smaller size"):
        one_rank(Streaming(statistics_px=8 * HEIGHT))
    for errors in run_ranks(3, exact_under_a_limit):
        assert max(errors) < 1e-10
    monkeypatch.setattr(codec, "MAX_ELEMENTS", 1000)
    with pytest.raises(UserError, match="narrower"):
        one_rank(Streaming())


def exact_under_a_limit(mesh):
    expected = one_rank(Exact())
    codec.MAX_ELEMENTS = largest_activation(tiny_vae().config, 14, WIDTH)
    return deviations(mesh, Exact(), expected)


def test_the_sizes_at_16384_px():
    config = {"block_out_channels": (128, 256, 512, 512)}
    assert largest_activation(config, 2048, 2048) == 256 * (16384 + 2) * 16384
    assert largest_activation(config, 8, 2048) < codec.MAX_ELEMENTS


@pytest.mark.parametrize("options", [{"statistics_px": 8}, {"passes": -1}, {"chunk_rows": 0}])
def test_settings_that_cannot_work_are_refused(options):
    with pytest.raises(UserError, match="are the least"):
        Streaming(**options)


def test_sides_that_are_no_multiples_of_eight_are_refused():
    with pytest.raises(UserError, match="multiples of 8"):
        codec.encode(tiny_vae(), torch.zeros(1, 3, 60, 64).double(), 60)


def test_tiling_is_refused():
    vae = tiny_vae()
    vae.enable_tiling()
    with pytest.raises(UserError, match="disable_tiling"):
        codec.decode(vae, latent(8, 8), WHOLE)


# --- the VAE stays what it was --------------------------------------------------------------------


def test_every_layer_is_of_its_own_class_again():
    vae = tiny_vae()
    before = [type(module) for module in vae.modules()]
    codec.decode(vae, latent(8, 8, batch=1), WHOLE)
    assert [type(module) for module in vae.modules()] == before
    vae.decoder.conv_out.register_forward_hook(interrupt)
    with pytest.raises(InterruptedError):
        codec.decode(vae, latent(8, 8, batch=1), WHOLE)
    assert [type(module) for module in vae.modules()] == before


def interrupt(module, args, output):
    raise InterruptedError


def test_a_hook_that_would_bypass_the_stream_is_refused():
    vae = tiny_vae()
    add_hook_to_module(vae.decoder.mid_block.resnets[0].norm1, ModelHook())
    with pytest.raises(UserError, match=r"decoder.mid_block.resnets.0.norm1 has an offload hook"):
        codec.decode(vae, latent(8, 8, batch=1), WHOLE)


def test_slices_are_no_obstacle():
    vae, sample = tiny_vae(), latent(8, 8, batch=3)
    expected = codec.decode(vae, sample, WHOLE)[1]
    vae.enable_slicing()
    torch.testing.assert_close(codec.decode(vae, sample, WHOLE)[1], expected)


@pytest.mark.parametrize("stream", [Exact(), WHOLE], ids=["exact", "streaming"])
def test_latents_are_scaled_as_the_unet_wants_them(stream):
    vae = tiny_vae()
    posterior = tiny_vae().encode(picture()).latent_dist.mode()
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0])
    encoded = codec.encode(vae, picture(), 8 * HEIGHT, stream)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1).double() for v in ([1, 2, 3, 4], [0.5, 1, 2, 4]))
    torch.testing.assert_close(encoded, (posterior - mean) / std * vae.config.scaling_factor)
    decoded = codec.decode(vae, encoded, stream)[1]
    torch.testing.assert_close(decoded, tiny_vae().decode(posterior).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    vae = tiny_vae(dtype)  # an fp16 VAE is raised to fp32, as its configuration asks
    _, pixels = codec.decode(vae, latent(HEIGHT, WIDTH, batch=1).to(dtype), Streaming(110))
    expected = one_rank(Streaming(110))[0]
    error = (pixels.double() - expected).square().mean().sqrt() / expected.std()
    assert vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert error < (0.01 if dtype == torch.float16 else 0.1)
