"""Tiny random networks with the real block types, the same in every process."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from engine import linfusion


def tiny_unet(*, linear: bool = True, dtype: torch.dtype = torch.float64) -> UNet2DConditionModel:
    """An SD-1.5-shaped UNet of three levels; two latent down-samplings."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    if linear:
        linfusion.convert(unet)
    return _randomise(unet).to(dtype)


def tiny_vae(dtype: torch.dtype = torch.float64) -> AutoencoderKL:
    """A VAE with the real one's mid-block attention, enlarging eight times."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    return _randomise(vae).to(dtype)


def _randomise(network: nn.Module) -> nn.Module:
    """Move every parameter off its initial value: norms off 1 and 0, zero layers off zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.1 * noise)
    return network.eval().requires_grad_(False)


def latent(height: int, width: int, channels: int = 4, batch: int = 2) -> torch.Tensor:
    """The same noise [batch, channels, height, width] in every process, in float64."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
