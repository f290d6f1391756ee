"""The sentinel sees what it is there for, and nothing else."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from engine.bands import ExactExchange, Mesh, Traffic, banded
from engine.bands.layers import BandConv2d, BandGroupNorm, BandSelfAttention
from tests.models import tiny_unet
from tests.ranks import run_ranks
from tests.sentinel import Sentinel

X = torch.ones(1, 4, 6, 5)
TOKENS = torch.ones(1, 30, 8)

MIXING = {
    "convolution": lambda: nn.Conv2d(4, 4, 3, padding=1)(X),
    "group norm": lambda: nn.GroupNorm(2, 4)(X),
    "pooling": lambda: nn.AvgPool2d(2)(X),
    "global pooling": lambda: F.adaptive_avg_pool2d(X, 1),
    "fft": lambda: torch.fft.fftn(X, dim=(-2, -1)),
    "padding": lambda: F.pad(X, (0, 1, 0, 1)),
    "bilinear": lambda: F.interpolate(X, scale_factor=2.0, mode="bilinear"),
    "resizing": lambda: F.interpolate(X, size=(7, 5)),
    "mean": lambda: torch.mean(X, dim=(2, 3)),
    "mean of all": lambda: X.mean(),
    "sum over tokens": lambda: TOKENS.sum(1),
    "roll": lambda: torch.roll(X, 1, 2),
    "flip": lambda: X.flip(-2),
    "softmax attention": lambda: Attention(8, heads=2, dim_head=4)(TOKENS),
    "softmax by hand": lambda: (TOKENS @ TOKENS.mT).softmax(-1),
}

HARMLESS = {
    "pointwise convolution": lambda: nn.Conv2d(4, 4, 1)(X),
    "layer norm": lambda: nn.LayerNorm(8)(TOKENS),
    "doubling": lambda: F.interpolate(X, scale_factor=2.0, mode="nearest"),
    "doubling to an odd height": lambda: F.interpolate(X, size=(11, 9), mode="nearest"),
    "columns": lambda: F.pad(X, (1, 1)),
    "over channels": lambda: X.mean(1),
    "over a row": lambda: X.amax(dim=-1),
    "cross-attention": lambda: Attention(8, 6, heads=2, dim_head=4)(TOKENS, torch.ones(1, 16, 6)),
    "text as long": lambda: Attention(8, 6, heads=2, dim_head=4)(TOKENS, torch.ones(1, 30, 6)),
    "linear": lambda: nn.Linear(8, 8)(TOKENS),
}


def complaint(function):
    """What the sentinel says about `function` on a band, or None."""
    mesh = Mesh(0, 2, torch.device("cpu"), object())  # nothing is exchanged here
    with banded(ExactExchange(mesh, Traffic())), Sentinel() as sentinel:
        try:
            function()
        except AssertionError as error:
            return str(error)
    assert sentinel.seen > 0
    return None


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_rows_is_seen(name):
    assert "on a band, called from" in complaint(MIXING[name])


@pytest.mark.parametrize("name", HARMLESS)
def test_what_stays_in_its_row_is_not(name):
    assert complaint(HARMLESS[name]) is None


def test_outside_of_bands_anything_goes():
    with Sentinel():
        for function in MIXING.values():
            function()


def layers_under_the_sentinel(mesh):
    with banded(ExactExchange(mesh, Traffic())), Sentinel() as sentinel:
        BandConv2d(4, 4, 3, padding=1)(X)
        BandGroupNorm(2, 4)(X)
        BandSelfAttention(8, heads=2, dim_head=4)(TOKENS)
    return sentinel.seen


def test_layers_over_bands_are_silent():
    assert min(run_ranks(2, layers_under_the_sentinel)) > 0


def test_a_layer_that_was_forgotten_is_named():
    unet = tiny_unet()
    assert "conv2d on a band, called from" in complaint(
        lambda: unet(X.double().expand(2, -1, -1, -1), 1, torch.ones(2, 7, 24).double())
    )
