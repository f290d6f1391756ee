"""SD-1.5 and SDXL in their true shapes and without numbers, described as `engine.loading` does."""

from functools import cache

from diffusers import AutoencoderKL, UNet2DConditionModel

from engine import linfusion
from engine.loading import Description
from engine.simulation import META


@cache
def sd15():
    with META:
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        )  # fmt: skip
        return _described(unet, published_vae(force_upcast=False))


@cache
def sdxl():
    with META:
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        return _described(unet, published_vae(force_upcast=True))


def published_vae(**options):
    """The VAE of both, on whichever device is current."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        **options,
    )


def _described(unet, vae):
    linfusion.convert(unet)
    return Description(dict(unet.config), dict(vae.config), linfusion.list_modules(unet))
