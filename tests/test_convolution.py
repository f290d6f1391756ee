"""Convolutions of doubled pictures by phases, and blocks that share rounds, against plain ones."""

from functools import partial

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from engine import memory
from engine.bands import ExactExchange, Traffic, banded, split_rows
from engine.bands.alone import Alone
from engine.bands.layers import BandUpsample2D, can_double
from engine.bands.resnet import is_usual
from engine.kernels import convolution
from engine.kernels.convolution import convolve_doubled
from engine.linfusion import LinearAttention
from engine.parallel import band_layers
from tests.models import latent, randomise, tiny_unet
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def phases_of_small_pictures(monkeypatch):
    monkeypatch.setattr("engine.kernels.convolution._LEAST_PIXELS", 0)


def doubled(x, conv, size=None):
    """As diffusers does it."""
    x = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)
    return conv(x)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.tuples(*[st.integers(0, 1)] * 2))
def test_a_doubled_convolution_is_the_plain_one(height, width, has_bias, less):
    conv = randomise(nn.Conv2d(3, 5, 3, padding=1, bias=has_bias)).double()
    x = latent(height, width, channels=3)
    size = (2 * height - less[0], 2 * width - less[1])
    with torch.no_grad():
        expected = doubled(x, conv, size)
        result = convolve_doubled(F.pad(x, (0, 0, 1, 1)), conv.weight, conv.bias, size)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


def test_phases_take_four_ninths_of_the_products():
    """But for a row and a column more."""
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 8, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        doubled(x, conv)
    with torch.no_grad(), FlopCounterMode(display=False) as ours:
        convolve_doubled(F.pad(x, (0, 0, 1, 1)), conv.weight, conv.bias)
    assert ours.get_total_flops() * 9 * 8 * 8 == plain.get_total_flops() * 4 * 9 * 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_phases_in_half_precision_are_as_near_to_the_truth(dtype):
    conv, x = nn.Conv2d(32, 32, 3, padding=1).double(), latent(16, 16, channels=32)
    with torch.no_grad():
        truth = doubled(x, conv)
        conv, x = conv.to(dtype), x.to(dtype)
        plain = doubled(x, conv)
        ours = convolve_doubled(F.pad(x, (0, 0, 1, 1)), conv.weight, conv.bias)
    # Weights that are added up are rounded once more, as numbers twice as large.
    assert rms(ours.double() - truth) < 1.5 * rms(plain.double() - truth)


def rms(x):
    return x.square().mean().sqrt().item()


def wrapped(attribute):
    """An up-sampling whose convolution is not the plain one any more."""
    layer = Upsample2D(4, use_conv=True)
    match attribute:
        case "hook":
            layer.conv.register_forward_pre_hook(lambda module, args: None)
        case "dilation":
            layer.conv.dilation = layer.conv.padding = (2, 2)
        case "circular":
            layer.conv.padding_mode = "circular"
        case "LoRA":
            layer.conv = nn.Sequential(layer.conv)
    return layer


@pytest.mark.parametrize("attribute", ["hook", "dilation", "circular", "LoRA"])
def test_what_is_not_the_plain_convolution_is_left_as_it_is(attribute):
    layer, x = wrapped(attribute), torch.randn(1, 4, 5, 6)
    assert can_double(Upsample2D(4, use_conv=True))
    assert not can_double(layer)
    with torch.no_grad():
        expected = layer(x)
        layer.__class__ = BandUpsample2D
        assert torch.equal(layer(x), expected)


# --- over bands -----------------------------------------------------------------------------------


class Call(nn.Module):
    """A residual block, called with a time or without."""

    def __init__(self, time, **options):
        super().__init__()
        self.time = latent(1, 16, channels=1)[:, 0, 0] if time else None
        channels = 16 if time else None
        self.block = ResnetBlock2D(in_channels=8, temb_channels=channels, groups=4, **options)

    def forward(self, x):
        return self.block(x, self.time)


def with_lora():
    """A LoRA of its own 3x3 convolution around each of the block's."""
    peft = pytest.importorskip("peft")
    network = Call(True, out_channels=8)
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, network)


BLOCKS = {
    "with a time": (partial(Call, True, out_channels=8), 2, 0),
    "wider": (partial(Call, True, out_channels=12), 2, 0),
    "of a VAE": (partial(Call, False, out_channels=8, output_scale_factor=2.0), 2, 0),
    "scaled by time": (partial(Call, True, time_embedding_norm="scale_shift"), 2, 2),
    "with a LoRA": (with_lora, 2, 0),
    "up-sampling": (lambda: Upsample2D(8, use_conv=True), 0, 1),
}


def block_errors(mesh, height):
    """(largest deviation, rounds of norms and of convolutions) of each block."""
    convolution._LEAST_PIXELS = 0  # each rank is a process of its own
    whole, bands = latent(height, 6, channels=8), split_rows(height, mesh.size)
    own, found = bands[mesh.rank], {}
    for name, (make, _, _) in BLOCKS.items():
        torch.manual_seed(0)
        network = randomise(nn.Sequential(make())).double().eval()
        exchange = ExactExchange(mesh, Traffic())
        with torch.no_grad():
            expected = network(whole)
            band_layers(network)
            with banded(exchange):
                piece = network(whole[:, :, own.start : own.stop].contiguous())
        rounds = exchange.traffic.rounds
        counted = rounds["group norm"], rounds["convolution"]
        result = exchange.gather(network, piece, dim=2)
        found[name] = (result - expected).abs().max().item(), counted
    return found


@pytest.mark.parametrize(("ranks", "height"), [(2, 7), (3, 10)])
def test_blocks_over_bands_are_the_plain_ones_in_fewer_rounds(ranks, height):
    for found in run_ranks(ranks, block_errors, height):
        for name, (_, norms, convolutions) in BLOCKS.items():
            error, rounds = found[name]
            assert error < 1e-12, name
            assert rounds == (norms, convolutions), name


def test_only_usual_blocks_change():
    usual = [is_usual(make().block) for name, (make, _, _) in BLOCKS.items() if "samp" not in name]
    assert usual == [True, True, True, False, True]


class Logged(Alone):
    """Notes when rows and sums are set off, and when they are waited for."""

    def __init__(self):
        self.log = []

    def halo_later(self, layer, x, above, below, shared=False):
        self.log.append("rows set off")
        return lambda: self.log.append("rows here") or (None, None)

    def sum_later(self, layer, x):
        self.log.append("sum set off")
        return lambda: self.log.append("sum here") or x


def test_rows_travel_beside_the_sums():
    network = Call(False, out_channels=8).eval()
    band_layers(network)
    exchange = Logged()
    with torch.no_grad(), banded(exchange):
        network(torch.randn(1, 8, 4, 4))
    assert exchange.log == 2 * ["rows set off", "sum set off", "sum here", "rows here"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_travels_while_queries_are_computed(dtype, monkeypatch):
    attention = LinearAttention(query_dim=8, heads=2, dim_head=4).to(dtype)
    exchange = Logged()
    linear = F.linear

    def logged(x, weight, *args):
        if weight is attention.to_q.weight:
            exchange.log.append("queries")
        return linear(x, weight, *args)

    monkeypatch.setattr(F, "linear", logged)
    with torch.no_grad(), banded(exchange):
        attention(torch.randn(1, 12, 8, dtype=dtype))
    assert exchange.log.index("sum set off") < exchange.log.index("queries")
    assert exchange.log.index("queries") < exchange.log.index("sum here")


def test_up_sampling_in_chunks_of_rows_is_the_plain_one():
    x, text = latent(20, 12), latent(7, 24, channels=1)[:, 0]
    unet = tiny_unet()
    with torch.no_grad():
        expected = unet(x, 500, text).sample
        for chunks in (1, 2, 3, 50):
            memory.apply(unet, memory.MemoryOptions(row_chunks=chunks))
            error = (unet(x, 500, text).sample - expected).abs().max()
            assert error < 1e-12
    memory.remove(unet)
    assert any(type(module) is Upsample2D for module in unet.modules())
