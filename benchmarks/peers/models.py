"""Whole pipelines of random weights, as diffusers folders that every peer can load.

    write("SDXL", folder, torch.float16)        the UNet of `benchmarks.networks`, and all around it
    folder = readable_by_old("demo", folder)    for libraries of 2023

The pictures mean nothing, and have contrast: the last layers of UNet and VAE are scaled, so that
a difference in the network is a difference in the picture.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from benchmarks.networks import MODELS
from engine import linfusion
from engine.demo import WEIGHTS

TIME_WIDTH = 256  # of each of SDXL's six numbers about the picture's size


def write(model: str, folder: Path, dtype: torch.dtype) -> None:
    """The pipeline with softmax attention, and LinFusion modules beside it."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    pipe = build(model)
    _give_contrast(pipe)
    pipe.to(dtype).save_pretrained(folder)
    linfusion.convert(pipe.unet)
    linfusion.save(pipe.unet, folder / "linfusion")


def build(model: str) -> DiffusionPipeline:
    """The pipeline with softmax attention, on the current device and in the current dtype."""
    return _sdxl(model) if "SDXL" in model else _sd(model)


def _sd(model: str) -> DiffusionPipeline:
    unet = UNet2DConditionModel(**MODELS[model], sample_size=64)
    return StableDiffusionPipeline(
        vae=_vae(model),
        text_encoder=_text_encoder(CLIPTextModel, unet.config.cross_attention_dim, 12),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(model: str) -> DiffusionPipeline:
    both = MODELS[model]["cross_attention_dim"]
    first, second = both * 3 // 8, both * 5 // 8  # 768 and 1280
    unet = UNet2DConditionModel(
        **MODELS[model],
        sample_size=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + second,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(model),
        text_encoder=_text_encoder(CLIPTextModel, first, 12),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, second, 32),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )


def _vae(model: str) -> AutoencoderKL:
    quarters = 1 if model.startswith("quarter") else 4
    return AutoencoderKL(
        block_out_channels=tuple(quarters * width for width in (32, 64, 128, 128)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8 * quarters,
        latent_channels=4,
        force_upcast=False,
    )


def _text_encoder(kind: type[nn.Module], width: int, layers: int) -> Any:
    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=77)


def _scheduler() -> DDIMScheduler:
    """v-prediction keeps latents bounded, whatever the network says."""
    return DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
    )


@torch.no_grad()
def _give_contrast(pipe: DiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 16, 16, generator=generator)
    unet = pipe.unet.eval()
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    added = {}
    if unet.config.addition_embed_type is not None:
        width = unet.config.projection_class_embeddings_input_dim - 6 * TIME_WIDTH
        added = {"text_embeds": torch.zeros(1, width), "time_ids": torch.zeros(1, 6)}
    step = torch.tensor(500)
    _scale(unet.conv_out, unet(latent, step, text, added_cond_kwargs=added).sample, 1.0)
    _scale(pipe.vae.decoder.conv_out, pipe.vae.decode(latent / 0.2).sample, 0.4)


def _scale(last: nn.Conv2d, output: Tensor, wanted: float) -> None:
    """Weights such that this output would have had no mean and the wanted deviation."""
    factor = wanted / output.std()
    last.weight.mul_(factor)
    last.bias.sub_(output.mean((0, 2, 3))).mul_(factor)


# --- for libraries of 2023 ------------------------------------------------------------------------


def readable_by_old(model: str, folder: Path) -> str:
    """A model folder, by links, as transformers 4 reads it where transformers 5 writes otherwise.

    That is the tokenizers' files, and the names of text encoders' weights, which transformers 4
    would replace by random ones with no more than a warning. A hub id is left as it is: what is
    published there is of that time.
    """
    source = WEIGHTS if model == "demo" else Path(model)
    if not source.is_dir():
        return model
    shutil.copytree(source, folder, copy_function=_link, dirs_exist_ok=True)
    for tokenizer in folder.glob("tokenizer*"):
        if not (tokenizer / "vocab.json").exists():
            _write_vocabulary(tokenizer)
    for weights in folder.glob("text_encoder*/model.safetensors"):
        _name_as_before(weights)
    return str(folder)


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(Path(source).resolve())


def _write_vocabulary(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def _name_as_before(file: Path) -> None:
    weights = load_file(file)
    if all(name.startswith("text_") for name in weights):  # text_model, text_projection
        return
    file.unlink()  # a link
    save_file({f"text_model.{name}": w for name, w in weights.items()}, file, {"format": "pt"})
