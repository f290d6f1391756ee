"""Bytes and rounds of the real SDXL, counted on its true shapes without weights or other ranks."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from engine import linfusion
from engine.bands import ExactExchange, Traffic, banded
from engine.parallel import band_layers
from engine.simulation import META, PretendedMesh, pretended

RANKS = 8


@pytest.fixture(scope="module")
def sdxl():
    with pretended(torch.float16):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        linfusion.convert(unet)
    band_layers(unet)
    return unet


def forward_traffic(unet, pixels):
    """Of a band in the middle of eight."""
    side = pixels // 8
    mesh = PretendedMesh.of(RANKS, side, multiple=4)
    traffic = Traffic()
    with META, torch.no_grad(), banded(ExactExchange(mesh, traffic)):
        unet(
            torch.empty(1, 4, side // RANKS, side, dtype=torch.float16),
            torch.empty((), dtype=torch.int64),
            torch.empty(1, 77, 2048, dtype=torch.float16),
            added_cond_kwargs={
                "text_embeds": torch.empty(1, 1280, dtype=torch.float16),
                "time_ids": torch.empty(1, 6, dtype=torch.float16),
            },
        )
    return traffic


def test_rounds_of_sdxl(sdxl):
    rounds = forward_traffic(sdxl, 1024).rounds
    # 34 convolutions of residual blocks share the round of the norm before them.
    assert rounds == {"linear attention": 70, "convolution": 6, "group norm": 46}


@pytest.mark.parametrize("pixels", [1024, 4096, 16384])
def test_bytes_of_sdxl_are_what_the_formulas_say(sdxl, pixels):
    sent = forward_traffic(sdxl, pixels).bytes_sent
    state = 5_408_000 + 70  # all layers' d x (d + 1) numbers a head, and their token counts
    assert sent["linear attention"] == round(2 * (RANKS - 1) / RANKS * 4 * state)
    # Rows to both neighbours, growing with the width alone: at 1024 px the 8.19 MB that a row each
    # way makes for every 3x3 convolution, less those that one of stride 2 has no use for, and half
    # of those before doubling.
    assert sent["convolution"] == 7_702_528 * pixels // 1024
    assert sent["group norm"] < 1e6
