"""The teacher: a Stable Diffusion model as it is, seen as what distillation asks of it.

    describe_teacher(model)             judged by its configuration files, before weights are loaded
    teacher = load_teacher(model, ...)
    teacher.conditions(prompts, sizes)  what the UNet is told beside the noisy latent
    teacher.encode(pictures)            latents; `decode` is the way back
    teacher.diffuse(latents, ...)       a noisy latent and what is to be told from it

SD-1.5 and 2.1 have one text encoder; SDXL has two, a pooled embedding and six numbers of sizes. A
prompt left out is what guidance takes for none: for SDXL zeros, if its configuration says so.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import UserError
from engine.loading import describe, load

Sizes = tuple[int, int, int, int, int, int]
"""SDXL's numbers: height and width before the cut, its top and left, height and width after it"""


@dataclass(frozen=True)
class Conditions:
    """What a UNet is told beside the noisy latent and the time.

    Attributes:
        text: [B, tokens, width]
        added: for SDXL, `text_embeds` [B, width] and `time_ids` [B, 6]; else empty.
    """

    text: Tensor
    added: dict[str, Tensor]


@dataclass(frozen=True)
class Teacher:
    """A frozen pipeline.

    Attributes:
        pipe: on the device; its UNet and text encoders in `dtype`, its VAE in fp32.
        schedule: its noise schedule, whatever scheduler it paints by.
    """

    pipe: DiffusionPipeline
    schedule: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def unet(self) -> nn.Module:
        return self.pipe.unet

    @property
    def is_xl(self) -> bool:
        return hasattr(self.pipe, "text_encoder_2")

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to `dtype`, where it is not fp32: what learns is kept in fp32 among it."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    @torch.no_grad()
    def conditions(self, prompts: list[str], sizes: list[Sizes]) -> Conditions:
        """An empty prompt is one that was left out."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        found = self.pipe.encode_prompt(prompt=prompts, device=self.device, **options)
        if not self.is_xl:
            return Conditions(found[0], {})
        text, pooled = found[0].clone(), found[2].clone()
        if self.pipe.config.force_zeros_for_empty_prompt:
            nothing = [index for index, prompt in enumerate(prompts) if not prompt]
            text[nothing], pooled[nothing] = 0, 0
        numbers = torch.tensor(sizes, dtype=text.dtype, device=self.device)
        return Conditions(text, {"text_embeds": pooled, "time_ids": numbers})

    @torch.no_grad()
    def encode(self, pictures: NDArray[np.uint8]) -> Tensor:
        """[B, H, W, 3] -> the means of their latents, scaled, [B, 4, H/8, W/8] on the CPU."""
        pixels = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        vae = self.pipe.vae
        latents: Tensor = vae.encode(pixels).latent_dist.mean - (vae.config.shift_factor or 0.0)
        return (latents * vae.config.scaling_factor).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """[B, 4, h, w] -> [B, H, W, 3], one after the other to save memory."""
        vae = self.pipe.vae
        unscaled = latents.to(self.device).float() / vae.config.scaling_factor
        unscaled = unscaled + (vae.config.shift_factor or 0.0)
        pixels = torch.cat([vae.decode(latent[None]).sample for latent in unscaled])
        bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
        return bytes_.permute(0, 2, 3, 1).cpu().numpy()

    def diffuse(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy latents, what the UNet is to tell of them), all [B, 4, h, w], times [B]."""
        noisy = self.schedule.add_noise(latents, noise, times)
        if self.schedule.config.prediction_type == "epsilon":
            return noisy, noise
        return noisy, self.schedule.get_velocity(latents, noise, times)

    @property
    def times(self) -> int:
        """How many steps the noise schedule has."""
        return int(self.schedule.config.num_train_timesteps)


def describe_teacher(model: str) -> int:
    """The side in pixels that the model is made for; 0 where only its weights would tell.

    Raises:
        UserError: there is no such model, or it is not one that can be taught from.
    """
    found = describe(model, "none")
    if found is None:
        return 0
    require_teachable(model, found.unet, found.vae)
    return found.native_side


def require_teachable(model: str, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Refuse a UNet that is told more than a prompt.

    Raises:
        UserError: the first thing that it would want.
    """
    wants = {
        "channels beside the latent": unet["in_channels"] != vae["latent_channels"],
        "a guidance embedding": unet.get("time_cond_proj_dim") is not None,
        "class labels": unet.get("class_embed_type") is not None
        or unet.get("num_class_embeds") is not None,
        "image embeddings": unet.get("addition_embed_type") not in (None, "text_time"),
        "latents of a given mean": vae.get("latents_mean") is not None,
    }
    for what, is_wanted in wants.items():
        if is_wanted:
            raise UserError(
                f"model {model!r} wants {what}, which this distillation does not give: choose a "
                "text-to-image model such as SD-1.5, SD-2.1 or SDXL"
            )


def load_teacher(model: str, device: torch.device, dtype: torch.dtype) -> Teacher:
    """The pipeline, frozen.

    Raises:
        UserError: as `describe_teacher`, and where it predicts neither noise nor velocity.
    """
    pipe = load(model, "none", dtype=torch.float32)
    require_teachable(model, pipe.unet.config, pipe.vae.config)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"model {model!r} predicts {kind!r}; one that predicts epsilon or v_prediction would "
            "work"
        )
    pipe.set_progress_bar_config(disable=True)
    for name, network in pipe.components.items():
        if isinstance(network, nn.Module):
            network.requires_grad_(False).eval()
            # diffusers' own `to` warns of casts, also of those that cast nothing.
            nn.Module.to(network, device, torch.float32 if name == "vae" else dtype)
    if device.type == "cpu":  # there, gradients come sooner without SDPA
        pipe.unet.set_attn_processor(AttnProcessor())
    return Teacher(pipe, schedule, device, dtype)


def sizes_of(scaled: Sequence[int], corner: Sequence[int], shape: Sequence[int]) -> Sizes:
    """SDXL's six numbers of a picture that was cut to `shape`."""
    return (*scaled, *corner, *shape)  # type: ignore[return-value]
