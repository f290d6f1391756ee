"""A thumbnail's colours: means over areas, kept by pictures in bands as by whole ones."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from engine.bands import ExactExchange, Mesh, Traffic, split_rows
from engine.bands.boundary import Layout
from engine.colours import keep_colours, thumbnail, thumbnail_size
from tests.models import latent
from tests.ranks import run_ranks

ALONE = Mesh(0, 1, torch.device("cpu"), None)
WHOLE = Layout(ALONE, ALONE)


def picture(height, width):
    return latent(height, width, channels=3, batch=1).clamp(-1, 1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_a_thumbnail_is_the_means_over_areas(height, width, factor):
    height, width = height * factor, width * factor
    pixels = picture(height, width)
    small = thumbnail(WHOLE, pixels, range(height), height, (height // factor, width // factor))
    torch.testing.assert_close(small, F.avg_pool2d(pixels, factor), rtol=0, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_whatever_the_sizes_an_even_picture_stays_even(height, width, side):
    pixels = torch.full((1, 3, height, width), 0.25, dtype=torch.float64)
    small = thumbnail(WHOLE, pixels, range(height), height, thumbnail_size((height, width), side))
    assert max(small.shape) == max(side, 3)
    torch.testing.assert_close(small, torch.full_like(small, 0.25))


def test_a_drift_of_colour_is_taken_back_and_detail_stays():
    below, detail = picture(32, 48), 0.2 * picture(128, 192)
    wanted = thumbnail(WHOLE, below, range(32), 32, (8, 12))
    above = F.interpolate(below, scale_factor=4, mode="bicubic") + detail
    drifted = 1.4 * above - 0.3
    kept = keep_colours(WHOLE, drifted.clone(), range(128), 128, wanted)
    now = thumbnail(WHOLE, kept, range(128), 128, (8, 12))
    before = thumbnail(WHOLE, drifted, range(128), 128, (8, 12))
    assert (now - wanted).abs().max() < 0.25 * (before - wanted).abs().max()
    fine = kept - F.interpolate(F.avg_pool2d(kept, 16), scale_factor=16, mode="bicubic")
    same = drifted - F.interpolate(F.avg_pool2d(drifted, 16), scale_factor=16, mode="bicubic")
    assert (fine - same).abs().mean() < 0.05 * same.abs().mean()


def test_a_rung_whose_sides_were_rounded_otherwise_keeps_the_colours():
    small = thumbnail_size((344, 512), 32)
    assert small != thumbnail_size((1024, 1536), 32)
    wanted = picture(*small)
    kept = keep_colours(WHOLE, torch.zeros(1, 3, 1024, 1536), range(1024), 1024, wanted)
    now = thumbnail(WHOLE, kept, range(1024), 1024, small)
    assert torch.corrcoef(torch.stack([now.flatten(), wanted.float().flatten()]))[0, 1] > 0.9


def kept_rows(mesh, height):
    layout = Layout(mesh, ALONE, ExactExchange(mesh, Traffic()))
    rows = split_rows(height, mesh.size)[mesh.rank]
    pixels = picture(height, 40)[:, :, rows.start : rows.stop].clone()
    return keep_colours(layout, pixels, rows, height, picture(5, 7)).numpy()


def test_any_number_of_ranks_keeps_the_same_colours():
    whole = keep_colours(WHOLE, picture(29, 40), range(29), 29, picture(5, 7))
    bands = run_ranks(3, kept_rows, 29)
    together = torch.cat([torch.from_numpy(band) for band in bands], 2)
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-12)
