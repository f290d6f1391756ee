"""Layers in a stream against the plain layers on whole pictures, chunk by chunk, in float64."""

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.bands import banded, split_rows
from engine.bands.layers import BandConv2d, BandDownsample2D, BandGroupNorm, BandUpsample2D
from engine.bands.measure import Correction, Rehearsal
from engine.bands.resnet import BandResnetBlock2D
from engine.bands.stream import Course, Frozen, Starved, Stream, run_stream, thin, thin_rows
from tests.models import latent, randomise

pytestmark = pytest.mark.usefixtures("one_thread")

BANDED = {
    nn.Conv2d: BandConv2d,
    nn.GroupNorm: BandGroupNorm,
    Downsample2D: BandDownsample2D,
    ResnetBlock2D: BandResnetBlock2D,
    Upsample2D: BandUpsample2D,
}
# Networks, and how many rows go in and come out for each row of the latent.
NETWORKS = {
    "convolutions": (lambda: [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)], 1, 1),
    "a tall convolution": (lambda: [nn.Conv2d(8, 4, (5, 1), padding=(2, 0))], 1, 1),
    "a residual block": (lambda: [Residual(8, 8), Residual(8, 4)], 1, 1),
    "up-sampling": (lambda: [Upsample2D(8, use_conv=True), nn.Conv2d(8, 4, 3, padding=1)], 1, 2),
    "down-sampling": (lambda: [nn.Conv2d(8, 8, 3, padding=1), halving()], 2, 1),
    "down-sampling twice": (lambda: [halving(), halving()], 4, 1),
}
MARGIN = 4  # latent rows, as many as any of them reaches


class Residual(nn.Module):
    """A residual block, called as the VAE calls it."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.block = ResnetBlock2D(
            in_channels=channels, out_channels=out_channels, temb_channels=None, groups=4
        )

    def forward(self, x):
        return self.block(x, temb=None)


def halving():
    return Downsample2D(8, use_conv=True, padding=0)


def make_network(name):
    layers, rows_in, rows_out = NETWORKS[name]
    torch.manual_seed(0)
    return randomise(nn.Sequential(*layers()).double()), rows_in, rows_out


def streamable(network):
    for module in network.modules():
        module.__class__ = BANDED.get(type(module), type(module))
    return network


def streamed(name, source, course, frozen=None):
    """Rows of the picture from `course.start` on, as they come out of the network."""
    network, rows_in, _ = make_network(name)
    network = streamable(network)
    if frozen is None:
        rehearsal = Rehearsal({})
        with banded(rehearsal):
            network(source)
        frozen = rehearsal.used
    fed = source[:, :, rows_in * course.fed.start : rows_in * course.fed.stop]
    return list(run_stream(network, fed, rows_in, Stream(course, frozen)))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 40])
def test_a_stream_is_the_network(name, chunk_rows, monkeypatch):
    monkeypatch.setattr("engine.kernels.convolution._LEAST_PIXELS", 0)
    network, rows_in, rows_out = make_network(name)
    source, height = latent(rows_in * 23, rows_in * 4, channels=8, batch=1), 23
    expected = network(source)
    for own in split_rows(height, 3):
        course = Course(own, height, 4, MARGIN, chunk_rows)
        out = torch.cat(streamed(name, source, course), 2)
        skip = rows_out * (own.start - course.start)
        own_rows = out[:, :, skip : skip + rows_out * len(own)]
        wanted = expected[:, :, rows_out * own.start : rows_out * own.stop]
        torch.testing.assert_close(own_rows, wanted, rtol=0, atol=1e-12)


def test_rows_come_out_late_but_evenly():
    course = Course(range(23), 23, 4, MARGIN, 3)
    pieces = streamed("convolutions", latent(23, 4, channels=8, batch=1), course)
    # Two convolutions are two rows late; the rest comes in chunks of what was fed.
    assert [piece.shape[2] for piece in pieces] == [1] + [3] * 8


def test_a_convolution_without_enough_rows_starves_and_remembers_them():
    conv = streamable(nn.Conv2d(1, 1, 3).double())
    stream = Stream(Course(range(9), 9, 6, 0, 1), Frozen())
    rows = latent(3, 6, channels=1, batch=1)
    with banded(stream):
        for row in range(2):
            with pytest.raises(Starved):
                conv(rows[:, :, row : row + 1])
        out = conv(rows[:, :, 2:])
    plain = nn.functional.conv2d(rows, conv.weight, conv.bias)
    torch.testing.assert_close(out, plain)


@given(
    st.integers(1, 50), st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.integers(1, 8)
)
def test_the_chunks_of_a_course_are_its_rows(height, parts, chunk_rows, margin, stride):
    bands = split_rows(height, min(parts, height))
    kept = []
    for own in bands:
        course = Course(own, height, 8, margin, chunk_rows, stride)
        rows = [row for chunk in course.chunks() for row in chunk]
        assert rows == list(range(max(0, own.start - margin), own.stop + margin))
        assert set(own) <= set(course.fed) <= set(range(height)) & set(rows)
        assert all(len(chunk) <= chunk_rows for chunk in course.chunks())
        kept += thin_rows(own, stride)
        assert set(thin_rows(own, stride)) <= set(own)
    # Whatever the bands, the same rows are kept, those that `thin` keeps of the whole.
    assert kept == list(range(stride // 2, height, stride))
    picture = torch.arange(height)[None, None, :, None].expand(1, 1, height, 2 * stride)
    assert thin(picture, range(height), stride)[0, 0, :, 0].tolist() == kept


@pytest.mark.parametrize("chunk_rows", [1, 5, 40])
def test_a_measuring_stream_sees_what_a_whole_picture_has(chunk_rows):
    source = latent(23, 4, channels=8, batch=1)
    network = streamable(make_network("a residual block")[0])
    rehearsal = Rehearsal({})
    with banded(rehearsal):
        network(source)
    total = {}
    for own in split_rows(23, 3):
        course = Course(own, 23, 4, MARGIN, chunk_rows)
        stream = Stream(course, rehearsal.used, measures=True)
        fed = source[:, :, course.fed.start : course.fed.stop]
        list(run_stream(network, fed, 1, stream))
        for layer, moments in stream.moments.items():
            total[layer] = total.get(layer, 0) + moments
    assert set(total) == set(rehearsal.seen)
    for layer, (count, sums, squares) in total.items():
        mean, variance = rehearsal.seen[layer]
        torch.testing.assert_close(sums / count, mean)
        torch.testing.assert_close(squares / count - (sums / count) ** 2, variance)


def test_a_correction_turns_one_pictures_statistics_into_anothers():
    here = torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, 0.25]])
    there = torch.tensor([[1.5, 0.0]]), torch.tensor([[1.0, 1.0]])
    for found, wanted in zip(Correction.between(here, there).apply(here), there, strict=True):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(Correction().apply(here), here, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_correction_of_something_flat_is_finite():
    flat, other = (torch.ones(1, 2), torch.zeros(1, 2)), (torch.ones(1, 2), torch.ones(1, 2))
    for found, wanted in zip(Correction.between(flat, other).apply(flat), other, strict=True):
        torch.testing.assert_close(found, wanted)
    for found in Correction.between(other, flat).apply(flat):
        assert found.isfinite().all()
