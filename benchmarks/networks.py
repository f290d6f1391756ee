"""The networks of benchmarks: SD-1.5 and SDXL in their true shapes, and small ones of their kind.

    unet = build("SDXL")                                       with random weights
    with pretended(torch.float16): unet = build("SDXL")        shapes, and no numbers
    call(unet, height=128, width=128)                          one forward, of latent rows

A "quarter" is as wide by a quarter: the same blocks in the same places.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor

from benchmarks.memory import MODELS as _MODELS
from engine import linfusion

MODELS = {
    **_MODELS,
    "quarter SD-1.5": {
        "cross_attention_dim": 192,
        "attention_head_dim": 4,
        "block_out_channels": (80, 160, 320, 320),
        "norm_num_groups": 16,
    },
}


def build(model: str, linear: bool = True) -> UNet2DConditionModel:
    """On the current device and in the current dtype; softmax attention unless `linear`."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**MODELS[model])
    if linear:
        linfusion.convert(unet)
    return unet.eval().requires_grad_(False)


def call(unet: UNet2DConditionModel, height: int, width: int, batch: int = 1) -> Tensor:
    """One forward on the device and in the dtype of `unet`: [B, 4, H, W]"""
    weight = unet.conv_in.weight
    sample = weight.new_zeros(batch, 4, height, width)
    text = weight.new_zeros(batch, 77, unet.config.cross_attention_dim)
    time = torch.zeros((), dtype=torch.int64, device=weight.device)
    return unet(sample, time, text).sample
