"""Tiny random pipelines of the three families, and what their users attach, in float64.

    sd15(), sd21(), sdxl()      with the real block types, widths of 16 and 32, 16 text tokens
    convert(pipe)               LinFusion's linear attention, with random MLPs of its own
    controlnet(pipe.unet), t2i_adapter(), lora(pipe.unet), ip_adapter(pipe.unet), ...

All weights come from their names, so that every process builds the same pipeline.
"""

import copy
import tempfile
import zlib
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from engine import linfusion
from tests.models import byte_tokenizer, randomise, tiny_vae

TEXT_WIDTH = 24  # SDXL concatenates two encoders of it
IP_TOKENS = 4  # of an IP-Adapter with one projection


# --- the families ---------------------------------------------------------------------------------


def sd15(pipeline=StableDiffusionPipeline, in_channels=4, **parts):
    """SD-1.5: four levels, head counts alike at all of them, projections by convolution."""
    unet = UNet2DConditionModel(
        **_four_levels(), in_channels=in_channels, cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )  # fmt: skip
    return _one_encoder(pipeline, unet, scheduler(), **parts)


def sd21(pipeline=StableDiffusionPipeline, **parts):
    """SD-2.1: a list of head counts, linear projections, v-prediction."""
    unet = UNet2DConditionModel(
        **_four_levels(), cross_attention_dim=TEXT_WIDTH, attention_head_dim=[2, 4, 4, 8],
        use_linear_projection=True, upcast_attention=True,
    )  # fmt: skip
    v_prediction = scheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return _one_encoder(pipeline, unet, v_prediction, **parts)


def _four_levels():
    return {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "norm_num_groups": 8,
    }


def _one_encoder(pipeline, unet, schedule, **parts):
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "adapter" not in parts:  # the pipelines for T2I-Adapters know no image encoder
        extras["image_encoder"] = image_encoder()
        extras["feature_extractor"] = image_processor()
    return _quiet(
        pipeline(
            vae=tiny_vae(), text_encoder=_text_encoder(CLIPTextModel), tokenizer=_tokenizer(),
            unet=finished(unet), scheduler=schedule, **{**extras, **parts},
        )
    )  # fmt: skip


def sdxl(pipeline=StableDiffusionXLPipeline, in_channels=4, **parts):
    """SDXL: three levels, several transformer layers, two text encoders, sizes as conditions."""
    unet = _xl_unet(2 * TEXT_WIDTH, in_channels, size_numbers=6)
    if "adapter" not in parts:
        parts = {"image_encoder": image_encoder(), "feature_extractor": image_processor(), **parts}
    return _quiet(
        pipeline(
            vae=_xl_vae(), text_encoder=_text_encoder(CLIPTextModel),
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection), tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(), unet=finished(unet), scheduler=scheduler(), **parts,
        )
    )  # fmt: skip


def sdxl_refiner(pipeline):
    """SDXL's refiner: the second text encoder alone, and an aesthetic score as a condition."""
    unet = _xl_unet(TEXT_WIDTH, 4, size_numbers=5)
    return _quiet(
        pipeline(
            vae=_xl_vae(), text_encoder=None, tokenizer=None, tokenizer_2=_tokenizer(),
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection), unet=finished(unet),
            scheduler=scheduler(), requires_aesthetics_score=True,
        )
    )  # fmt: skip


def _xl_vae():
    vae = tiny_vae()
    vae.register_to_config(force_upcast=False)  # to fp32, from float64 too
    return vae


def _xl_unet(text_width, in_channels, size_numbers):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        cross_attention_dim=text_width,
        attention_head_dim=[2, 4, 4],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * size_numbers + TEXT_WIDTH,
        norm_num_groups=8,
    )


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler(**options):
    """DDIM with Stable Diffusion's noise schedule, deterministic unless eta is given."""
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**{**usual, "clip_sample": False, "steps_offset": 1, **options})


def finished(network):
    """Random weights everywhere, in float64."""
    return randomise(network).to(torch.float64)


def convert(pipe):
    """LinFusion's modules on `pipe`, the MLPs in which they end at zero made random too."""
    linfusion.convert(pipe.unet)
    finished(pipe.unet)
    return pipe


# --- text and image encoders ----------------------------------------------------------------------


@cache
def _tokenizer_of_process():
    with tempfile.TemporaryDirectory() as folder:
        return byte_tokenizer(Path(folder))


def _tokenizer():
    """A fresh one: textual inversion adds words."""
    return copy.deepcopy(_tokenizer_of_process())


def _text_encoder(kind):
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=TEXT_WIDTH,
        bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return finished(kind(config))


def image_encoder():
    """What an IP-Adapter sees its picture by."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=1,
        num_attention_heads=2, image_size=32, patch_size=8,
    )  # fmt: skip
    return finished(CLIPVisionModelWithProjection(config))


def image_processor():
    """To the image encoder's size."""
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)


# --- attachments ----------------------------------------------------------------------------------


def controlnet(unet, other=False, **options):
    """A ControlNet for a softmax `unet`, its zero convolutions made random; or another one."""
    net = finished(ControlNetModel.from_config({**_controlnet_config(unet), **options}))
    for parameter in net.parameters() if other else ():
        parameter.data = parameter.data.flip(0)
    return net


def controlnet_union(unet):
    """A ControlNetUnion, which mixes features of several conditions before its blocks."""
    transformer = {"num_trans_channel": 16, "num_proj_channel": 16, "num_trans_head": 2}
    config = _controlnet_config(unet)
    del config["mid_block_type"]  # it has but one
    return finished(ControlNetUnionModel.from_config({**config, **transformer}))


def _controlnet_config(unet):
    config = ControlNetModel.from_unet(unet, load_weights_from_unet=False).config
    shared = {name: value for name, value in config.items() if not name.startswith("_")}
    return {**shared, "conditioning_embedding_out_channels": (8, 8, 16, 16)}


def t2i_adapter(kind="full_adapter"):
    """A T2I-Adapter for the SD family, or ("full_adapter_xl") for SDXL."""
    return finished(
        T2IAdapter(
            channels=[16, 32, 32, 32], num_res_blocks=1, adapter_type=kind,
            downscale_factor=16 if kind == "full_adapter_xl" else 8,
        )
    )  # fmt: skip


def ip_adapter(unet, seed=0):
    """The state dict of an IP-Adapter for `unet`."""
    width = unet.config.cross_attention_dim
    state = {
        "image_proj": {
            "proj.weight": _noise(seed, "proj", IP_TOKENS * width, 12),
            "proj.bias": _noise(seed, "bias", IP_TOKENS * width),
            "norm.weight": 1 + _noise(seed, "norm", width),
            "norm.bias": _noise(seed, "norm bias", width),
        },
        "ip_adapter": {},
    }
    cross = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    assert len(cross) == len(names)
    for index, name in enumerate(names):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for letter in "kv":
            key = f"{2 * index + 1}.to_{letter}_ip.weight"
            state["ip_adapter"][key] = _noise(seed, key, channels, width)
    return state


def lora(unet, kinds=("to_q", "to_v", "to_out.0"), seed=0, rank=3, dora=False):
    """A LoRA's state dict for every layer of `unet` whose name ends in one of `kinds`."""
    state = {}
    for name, layer in unet.named_modules():
        if not name.endswith(tuple(kinds)):
            continue
        down, up = layer.weight.shape[1:], layer.weight.shape[:1]
        ones = (1,) * (len(down) - 1)
        state[f"unet.{name}.lora_A.weight"] = _noise(seed, name + "A", rank, *down)
        state[f"unet.{name}.lora_B.weight"] = _noise(seed, name + "B", *up, rank, *ones)
        if dora:
            magnitude = 1 + _noise(seed, name + "M", *(up if len(down) == 1 else (1, *up, *ones)))
            state[f"unet.{name}.lora_magnitude_vector.weight"] = magnitude
    assert state, kinds
    return state


CONV_LAYERS = ("conv1", "conv2", "conv_in", "downsamplers.0.conv", "upsamplers.0.conv")


def _noise(seed, name, *shape):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)


# --- pictures -------------------------------------------------------------------------------------


def picture(height, width, seed=0):
    """A random picture with large shapes, as users would pass it in."""
    noise = (_noise(seed, "picture", 1, 3, 8, 6) * 2 + 0.5).clamp(0, 1)
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return Image.fromarray((smooth[0].permute(1, 2, 0) * 255).round().byte().numpy())


def mask(height, width):
    """White where to paint: a disc that lies across the bands."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = (y - 0.45 * height) ** 2 + (x - 0.4 * width) ** 2 < (0.33 * height) ** 2
    return Image.fromarray((inside * 255).byte().numpy())
