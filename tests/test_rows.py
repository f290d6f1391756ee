"""Row arithmetic: cuts and halos, for any height, any number of ranks, any convolution."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from engine.bands import banded, max_bands, scale_rows, split_rows
from engine.bands.alone import Alone
from engine.bands.layers import BandConv2d
from engine.bands.rows import overlap, stack_rows
from engine.config import UserError


@given(st.integers(1, 3000), st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 32]))
def test_bands_cover_every_row_once_and_begin_on_multiples(height, parts, multiple):
    if parts > max_bands(height, multiple):
        with pytest.raises(UserError, match="fewer ranks or ask for a taller picture"):
            split_rows(height, parts, multiple)
        return
    bands = split_rows(height, parts, multiple)
    assert [row for band in bands for row in band] == list(range(height))
    assert all(band.start % multiple == 0 and len(band) > 0 for band in bands)
    blocks = [max_bands(len(band), multiple) for band in bands]
    assert max(blocks) - min(blocks) <= 1


def test_a_ragged_height_ends_in_a_short_band():
    assert split_rows(41, 3, 4) == [range(0, 16), range(16, 32), range(32, 41)]
    assert split_rows(41, 11, 4)[-1] == range(40, 41)
    assert scale_rows(range(32, 41), 8) == range(256, 328)


class SlicingExchange(Alone):
    """Stands in for the neighbours: takes the halo rows from the whole picture."""

    def __init__(self, whole, band):
        self.whole, self.band = whole, band

    def halo_later(self, layer, x, above, below, shared=False):
        height = self.whole.shape[2]
        start, stop = self.band.start, self.band.stop
        over = None if start == 0 else self.whole[:, :, start - above : start]
        under = None if stop == height else self.whole[:, :, stop : stop + below]
        for rows, wanted in ((over, above), (under, below)):
            assert rows is None or rows.shape[2] == wanted, "a halo beyond the neighbour"
        return lambda: (over, under)


@st.composite
def convolutions(draw):
    kernel, stride = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 2]))
    dilation = draw(st.integers(1, 3))
    padding = dilation * (kernel - 1) // 2
    return {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding}


@given(convolutions(), st.integers(1, 4), st.integers(1, 40), st.integers(0, 99))
def test_a_banded_convolution_is_the_whole_one(options, parts, extra_rows, seed):
    torch.manual_seed(seed)
    height = 8 * parts + extra_rows
    bands = split_rows(height, parts, multiple=2)
    conv = nn.Conv2d(2, 3, **options, dtype=torch.float64)
    whole = torch.randn(1, 2, height, 5, dtype=torch.float64)
    expected = conv(whole)
    conv.__class__ = BandConv2d
    assume(all(len(band) >= max(conv.halo_rows()) for band in bands))
    pieces = []
    for band in bands:
        with banded(SlicingExchange(whole, band)):
            pieces.append(conv(whole[:, :, band.start : band.stop]))
    torch.testing.assert_close(torch.cat(pieces, 2), expected, rtol=0, atol=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 40), st.integers(0, 40))
def test_overlaps_with_stacked_bands_are_the_rows_themselves(lengths, start, length):
    rows = range(start, start + length)
    bands = stack_rows(lengths)
    assert [len(band) for band in bands] == lengths
    shared = [row for band in bands for row in overlap(band, rows)]
    assert shared == [row for row in rows if row < sum(lengths)]
