"""The layers over bands against the plain layers, and the mesh's agreement on failures."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from torch import nn

from engine.bands import ExactExchange, Traffic, banded, fetch_rows, split_rows
from engine.config import UserError
from engine.parallel import band_layers
from tests.ranks import run_ranks

LAYERS = {
    "convolution": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "strided convolution": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "dilated convolution": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    # These reach over several bands, and over the picture's edge.
    "widely dilated convolution": lambda: nn.Conv2d(8, 8, 3, padding=9, dilation=9),
    "strided and dilated": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=8, dilation=8),
    "encoder down-sampling": lambda: Downsample2D(8, use_conv=True, padding=0),
    "group norm": lambda: nn.GroupNorm(4, 8),
    "softmax attention": lambda: Attention(
        8, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True, bias=True
    ),
}


def make_layer(name, dtype=torch.float64):
    torch.manual_seed(0)
    network = nn.Sequential(LAYERS[name]()).to(dtype)
    for parameter in network.parameters():
        parameter.data.normal_()
    return network.eval()


def picture(height, dtype=torch.float64, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 8, height, 6, generator=generator, dtype=torch.float64)
    return (noise + mean).to(dtype)


def run_on_bands(mesh, network, whole, bands):
    own = bands[mesh.rank]
    exchange = ExactExchange(mesh, Traffic())
    band_layers(network)
    with banded(exchange):
        piece = network(whole[:, :, own.start : own.stop].contiguous())
    return exchange.gather(network, piece, dim=2), exchange.traffic


def layer_errors(mesh, height):
    """Largest deviation of every layer in `LAYERS`, over bands of `height` rows in all."""
    whole, errors = picture(height), {}
    bands = split_rows(height, mesh.size, 2)
    for name in LAYERS:
        expected = make_layer(name)(whole)
        result, _ = run_on_bands(mesh, make_layer(name), whole, bands)
        errors[name] = (result - expected).abs().max().item()
    return errors


@pytest.mark.parametrize(("ranks", "height"), [(2, 16), (2, 18), (3, 19), (5, 23)])
def test_layers_over_bands_are_the_plain_layers(ranks, height):
    for errors in run_ranks(ranks, layer_errors, height):
        assert set(errors) == set(LAYERS)
        assert max(errors.values()) < 1e-12, errors


def fetched_rows_are_right(mesh, have, want):
    whole = picture(want[-1].stop)
    own = have[mesh.rank]
    x = whole[:, :, own.start : own.stop]
    wanted = want[mesh.rank]
    rows = fetch_rows(mesh, Traffic(), "a test", x, have, want)
    return torch.equal(rows, whole[:, :, wanted.start : wanted.stop])


@pytest.mark.parametrize("want", [[(0, 9), (3, 6), (5, 20)], [(12, 20), (4, 4), (0, 20)]])
def test_rows_are_fetched_from_whoever_has_them(want):
    have = [range(0, 4), range(4, 5), range(5, 20)]
    want = [range(*piece) for piece in want]
    assert run_ranks(3, fetched_rows_are_right, have, want) == [True] * 3


def norm_of_shifted_half(mesh, dtype, mean):
    whole = picture(24, dtype, mean)
    expected = make_layer("group norm")(whole.double())
    bands = split_rows(24, mesh.size)
    result, _ = run_on_bands(mesh, make_layer("group norm", dtype), whole, bands)
    return (result.double() - expected).abs().max().item() / expected.abs().max().item()


@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"),
    [(torch.float16, 300.0, 2e-3), (torch.bfloat16, 30.0, 2e-2), (torch.float32, 1000.0, 1e-4)],
)
def test_group_norm_survives_a_mean_far_larger_than_the_spread(dtype, mean, tolerance):
    # 300^2 is beyond fp16, and E[x^2] - E[x]^2 in fp32 would lose the spread at a mean of 1000.
    assert max(run_ranks(2, norm_of_shifted_half, dtype, mean)) < tolerance


def traffic_of_one_convolution(mesh):
    _, traffic = run_on_bands(mesh, make_layer("convolution"), picture(24), split_rows(24, 3))
    return traffic.bytes_sent["convolution"], traffic.rounds["convolution"]


def test_a_convolution_sends_one_row_to_each_neighbour():
    row = 2 * 8 * 6 * 8  # batch, channels, width, bytes of a float64
    assert run_ranks(3, traffic_of_one_convolution) == [(row, 1), (2 * row, 1), (row, 1)]


def agree_on(mesh, error_type):
    def fail_on_rank_1():
        if mesh.rank == 1:
            raise error_type("the disk is full")
        return mesh.rank

    try:
        mesh.agree(fail_on_rank_1)
    except Exception as error:
        return type(error), str(error)


def test_a_users_mistake_on_one_rank_is_raised_on_all():
    assert run_ranks(3, agree_on, UserError) == [(UserError, "the disk is full")] * 3


def test_any_other_failure_names_the_rank_elsewhere():
    elsewhere = (RuntimeError, "rank 1 failed: OSError: the disk is full")
    own = (OSError, "the disk is full")
    assert run_ranks(3, agree_on, OSError) == [elsewhere, own, elsewhere]


def die_on_rank_1(mesh):
    if mesh.rank == 1:
        raise SystemExit("gone")
    mesh.barrier()


def test_the_harness_reports_a_rank_that_dies_while_another_waits_for_it():
    with pytest.raises(AssertionError, match=r"rank [01] (failed|died)"):
        run_ranks(2, die_on_rank_1)
