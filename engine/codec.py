"""From latent to pixels over bands: each rank decodes its own rows and keeps them.

    latent [B, 4, H, W] on every rank -> rows [a, b) -> decoder over bands -> pixels [B, 3, 8h, 8W]

The decoder only enlarges, so its bands may begin on any latent row. Group norms, convolutions and
the mid-block's attention see the whole picture through `engine.bands.layers`: there are no tiles to
blend, and no seams.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from engine.bands import banded, scale_rows
from engine.bands.boundary import Layout, downsampling_factor


def decode(vae: AutoencoderKL, latent: Tensor) -> tuple[range, Tensor]:
    """Decode this rank's rows of `latent` [B, 4, H, W], which is the same on every rank.

    Args:
        vae: distributed (`engine.parallel.distribute`), or plain on a single rank.

    Returns:
        (pixel rows, pixels [B, 3, h, W] in -1 ... 1)

    Raises:
        UserError: more ranks than latent rows.
    """
    if vae.config.force_upcast and vae.dtype == torch.float16:
        vae.to(torch.float32)  # SDXL's activations overflow fp16, as its configuration says
    latent = _unscale(vae, latent.to(vae.dtype))
    factor = downsampling_factor(vae.config.block_out_channels)
    layout: Layout | None = getattr(vae, "layout", None)
    if layout is None:
        return range(latent.shape[-2] * factor), vae.decode(latent).sample
    vae.refuse_tiling()
    rows = layout.own(layout.bands(latent.shape[-2]))
    with banded(layout.exchange):
        pixels = vae.decode(latent[:, :, rows.start : rows.stop]).sample
    return scale_rows(rows, factor), pixels


def _unscale(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    """Undo the scaling (and, for some VAEs, the shift) that the UNet's latents carry."""
    scaled = latent / vae.config.scaling_factor
    if vae.config.latents_mean is None or vae.config.latents_std is None:
        return scaled
    mean, std = (
        torch.tensor(numbers, device=latent.device, dtype=latent.dtype).view(1, -1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return scaled * std + mean


def to_uint8(pixels: Tensor) -> Tensor:
    """[B, 3, h, W] in -1 ... 1 -> [B, h, W, 3] in 0 ... 255, rounded to nearest."""
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1)
