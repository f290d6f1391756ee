"""Tiny random networks with the real block types, the same in every process."""

import json
import zlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
    return randomise(unet).to(dtype)


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
    return randomise(vae).to(dtype)


def randomise(network: nn.Module) -> nn.Module:
    """Random weights of a sensible size, also where training starts from ones or zeros."""
    for name, parameter in network.named_parameters():
        # By name, so that networks that differ in some layers agree in all others.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise * (0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
        if parameter.ndim == 1 and name.endswith("weight"):  # a norm's scale
            parameter.data.add_(1)
    return network.eval().requires_grad_(False)


def latent(height: int, width: int, channels: int = 4, batch: int = 2) -> torch.Tensor:
    """The same noise [batch, channels, height, width] in every process, in float64."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)


def save_tiny_pipeline(folder: Path) -> None:
    """A whole Stable Diffusion pipeline of random weights, with LinFusion modules beside it."""
    unet = tiny_unet(dtype=torch.float32)
    linfusion.save(unet, folder / "linfusion")
    StableDiffusionPipeline(
        vae=tiny_vae(torch.float32),
        text_encoder=tiny_text_encoder(),
        tokenizer=byte_tokenizer(folder),
        unet=tiny_unet(linear=False, dtype=torch.float32),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def byte_tokenizer(folder: Path) -> CLIPTokenizer:
    """Every byte is a token of its own, so that any prompt in any script tokenises."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # it comes in any order
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|start|>", "<|end|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|end|>",
        model_max_length=16,
    )


def tiny_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return CLIPTextModel(config).eval()
