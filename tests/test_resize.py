"""Resizing over bands against torch's own resizing, and the arithmetic of its rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from engine.bands import ExactExchange, Mesh, Traffic
from engine.bands.boundary import Layout
from engine.bands.resize import input_rows, resize, taps
from tests.models import latent
from tests.ranks import run_ranks

ENLARGED = [((24, 10), (48, 20)), ((24, 10), (40, 31)), ((24, 10), (24, 10)), ((40, 9), (136, 11))]
REDUCED = [((48, 30), (24, 15)), ((200, 31), (48, 7)), ((136, 12), (40, 12))]


def alone():
    mesh = Mesh(0, 1, torch.device("cpu"), None)
    return Layout(mesh, mesh)


def picture(size):
    return latent(*size, channels=3, batch=2)


def whole(size, new_size):
    return resize(alone(), picture(size), size, new_size)[1]


@pytest.mark.parametrize(("size", "new_size"), ENLARGED)
def test_enlarging_is_torchs_bicubic(size, new_size):
    expected = F.interpolate(picture(size), size=new_size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(whole(size, new_size), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "new_size"), REDUCED)
def test_reducing_is_torchs_antialiased_bicubic(size, new_size):
    expected = F.interpolate(picture(size), size=new_size, mode="bicubic", antialias=True)
    torch.testing.assert_close(whole(size, new_size), expected, rtol=0, atol=1e-12)


def test_chunks_of_rows_make_no_difference(monkeypatch):
    expected = whole((24, 10), (48, 20))
    monkeypatch.setattr("engine.bands.resize._CHUNK_ROWS", 5)
    assert torch.equal(whole((24, 10), (48, 20)), expected)


def test_half_precision_is_weighed_in_single():
    x = picture((24, 10)).to(torch.bfloat16)
    _, small = resize(alone(), x, (24, 10), (48, 20))
    expected = F.interpolate(x.double(), size=(48, 20), mode="bicubic")
    assert small.dtype == torch.bfloat16
    assert (small.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_outputs_are_weighed_from_pixels_that_are_there(size, new_size, data):
    start = data.draw(st.integers(0, new_size - 1))
    outputs = range(start, data.draw(st.integers(start + 1, new_size)))
    indices, weights = taps(size, new_size, outputs)
    all_indices, all_weights = taps(size, new_size, range(new_size))
    assert torch.equal(indices, all_indices[outputs.start : outputs.stop])
    assert torch.equal(weights, all_weights[outputs.start : outputs.stop])
    torch.testing.assert_close(weights.sum(1), torch.ones(len(outputs), dtype=torch.float64))
    assert set(indices.flatten().tolist()) <= set(input_rows(size, new_size, outputs))
    assert set(input_rows(size, new_size, outputs)) <= set(range(size))


def resized_errors(mesh):
    exchange = ExactExchange(mesh, Traffic())
    layout = Layout(mesh, Mesh(0, 1, mesh.device, None), exchange)
    errors = []
    for size, new_size in ENLARGED + REDUCED:
        bands, new_bands = layout.bands(size[0], 8), layout.bands(new_size[0], 8)
        own = layout.own(bands)
        rows, piece = resize(
            layout, picture(size)[:, :, own.start : own.stop], size, new_size, multiple=8
        )
        assert rows == layout.own(new_bands)
        expected = whole(size, new_size)[:, :, rows.start : rows.stop]
        errors.append((piece - expected).abs().max().item())
    return errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_resizing_over_bands_is_resizing(ranks):
    for errors in run_ranks(ranks, resized_errors):
        assert len(errors) == len(ENLARGED + REDUCED)
        assert max(errors) < 1e-12, errors
