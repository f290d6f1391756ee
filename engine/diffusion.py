"""The model as the ladder sees it: a sentence becomes conditions, a noised latent a prediction.

    conditions = encode(pipe, prompt, negative_prompt, guided, height, width)
    model = Denoiser(pipe, conditions, guidance_scale)
    prediction = model(model.scaled(state, t), t)     [1, C, H, W] -> [1, C, H, W]
    latent = model.step(state, prediction, t)

It does what the call of a diffusers pipeline does, in the same order and in fp32 to the bit, but
step by step, so that a strategy may look at a prediction, ask twice, or be interrupted in between.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from engine.config import UserError


@dataclass(frozen=True)
class Conditions:
    """What steers the UNet.

    Attributes:
        embeddings: of the text, [2, tokens, d], unconditional first, or [1, ...] where unguided.
        added: SDXL's pooled text and sizes, by the names that its UNet knows, as many rows.
    """

    embeddings: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def side(self, index: int) -> "Conditions":
        """One side of guidance alone."""
        added = {name: rows[index : index + 1] for name, rows in self.added.items()}
        return Conditions(self.embeddings[index : index + 1], added)


def encode(
    pipe: DiffusionPipeline,
    prompt: str,
    negative_prompt: str,
    *,
    guided: bool,
    height: int,
    width: int,
) -> Conditions:
    """The conditions of a sentence; SDXL is told that the picture is `height` x `width` px.

    On a ladder that is the size of the base rung, on every rung: the sizes of the rungs above lie
    far outside of what SDXL has seen.
    """
    texts = pipe.encode_prompt(
        prompt=prompt,
        # None is not "": SDXL then guides by zeros, as its configuration asks.
        negative_prompt=negative_prompt or None,
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
    )
    if len(texts) == 2:
        text, negative_text = texts
        return Conditions(torch.cat([negative_text, text]) if guided else text)
    text, negative_text, pooled, negative_pooled = texts
    sizes = _sizes(pipe, pooled, height, width)
    if not guided:
        return Conditions(text, {"text_embeds": pooled, "time_ids": sizes})
    added = {
        "text_embeds": torch.cat([negative_pooled, pooled]),
        "time_ids": torch.cat([sizes, sizes]),
    }
    return Conditions(torch.cat([negative_text, text]), added)


def _sizes(pipe: DiffusionPipeline, pooled: Tensor, height: int, width: int) -> Tensor:
    """SDXL's original size, crop and target size: [1, 6] (arXiv:2307.01952, section 2.2)."""
    second = pipe.text_encoder_2
    projected = pooled.shape[-1] if second is None else second.config.projection_dim
    sizes: Tensor = pipe._get_add_time_ids(
        (height, width),
        (0, 0),
        (height, width),
        dtype=pooled.dtype,
        text_encoder_projection_dim=int(projected),
    )
    return sizes.to(pooled.device)


class Schedule(Protocol):
    """What the denoiser needs of a picture in the making; see `engine.ladder.State`."""

    latent: Tensor
    scheduler: Any
    generator: torch.Generator


class Denoiser:
    """A UNet with its conditions and its guidance.

    Args:
        in_turn: ask for the two sides of guidance one after the other, in half the memory.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        conditions: Conditions,
        guidance_scale: float,
        in_turn: bool = False,
    ) -> None:
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise UserError(
                f"the UNet takes {pipe.unet.config.in_channels} channels, which is inpainting or "
                "the like: the engine paints with models that take a latent and nothing else"
            )
        self.unet: nn.Module = pipe.unet
        self._pipe = pipe
        self._conditions = conditions
        self._guidance_scale = guidance_scale
        self._in_turn = in_turn

    @property
    def trained_timesteps(self) -> int:
        """T, the timestep of pure noise."""
        return int(self._pipe.scheduler.config.num_train_timesteps)

    def scaled(self, state: Schedule, t: Tensor, latent: Tensor | None = None) -> Tensor:
        """The latent (that of `state` by default) as the network expects it at timestep t."""
        latent = state.latent if latent is None else latent
        scaled: Tensor = state.scheduler.scale_model_input(latent, t)
        return scaled

    def __call__(self, scaled: Tensor, t: Tensor) -> Tensor:
        """The guided prediction [1, C, H, W]: noise, velocity or picture, as the model was taught.

        Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).
        """
        conditions = self._conditions
        if len(conditions.embeddings) == 1:
            return self._predict(scaled, t, conditions)
        if self._in_turn:
            without, with_text = (self._predict(scaled, t, conditions.side(i)) for i in (0, 1))
        else:
            without, with_text = self._predict(torch.cat([scaled] * 2), t, conditions).chunk(2)
        return without + self._guidance_scale * (with_text - without)

    def _predict(self, sample: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        prediction: Tensor = self.unet(
            sample,
            t,
            encoder_hidden_states=conditions.embeddings,
            timestep_cond=self._guidance_embedding(sample),
            added_cond_kwargs=conditions.added or None,
            return_dict=False,
        )[0]
        return prediction

    def _guidance_embedding(self, sample: Tensor) -> Tensor | None:
        """Models that were distilled to be guided are told the scale, not asked twice."""
        width = self._pipe.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.tensor(self._guidance_scale - 1).repeat(len(sample))
        embedding = self._pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
        return embedding.to(device=sample.device, dtype=sample.dtype)

    def step(self, state: Schedule, prediction: Tensor, t: Tensor) -> Tensor:
        """The latent of `state` one step less noisy.

        Never in half precision: samplers with noise of their own draw it as they get the
        prediction, and torch up to 2.11 draws other, coarser noise there (`engine.ladder`).
        """
        known = inspect.signature(state.scheduler.step).parameters
        options = {"generator": state.generator} if "generator" in known else {}
        wide = torch.promote_types(prediction.dtype, torch.float32)
        stepped: Tensor = state.scheduler.step(
            prediction.to(wide), t, state.latent.to(wide), **options, return_dict=False
        )[0]
        return stepped.to(state.latent.dtype)

    def clean(self, scaled: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction for the noised latent `scaled` amounts to."""
        signal, noise = self._levels(t)
        kind = self._pipe.scheduler.config.prediction_type
        if kind == "epsilon":
            return (scaled - noise * prediction) / signal
        return signal * scaled - noise * prediction if kind == "v_prediction" else prediction

    def with_clean_changed(self, prediction: Tensor, change: Tensor, t: Tensor) -> Tensor:
        """The prediction that amounts to `clean` + `change` for the same noised latent."""
        signal, noise = self._levels(t)
        kind = self._pipe.scheduler.config.prediction_type
        if kind == "epsilon":
            return prediction - signal / noise * change
        return prediction - change / noise if kind == "v_prediction" else prediction + change

    def _levels(self, t: Tensor) -> tuple[float, float]:
        """Amplitudes of signal and noise at t, in the variance-preserving form that UNets see."""
        kept = float(self._pipe.scheduler.alphas_cumprod[int(t)])
        return kept**0.5, (1 - kept) ** 0.5


@contextmanager
def dilated(unet: nn.Module, factor: int) -> Iterator[None]:
    """Inside, every convolution of `unet` samples its input `factor` times further apart.

    At `factor` times the size a network then sees as much of the picture as it was taught with
    (re-dilation, ScaleCrafter, arXiv:2310.07702; LinFusion's variant of DemoFusion). Over bands the
    halos grow with the dilation by themselves (`engine.bands.rows.halo_rows`).
    """
    convolutions = [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
    plain = [(conv.dilation, conv.padding) for conv in convolutions]
    try:
        for conv in convolutions:
            assert not isinstance(conv.padding, str), "padding is in pixels throughout diffusers"
            conv.dilation = (conv.dilation[0] * factor, conv.dilation[1] * factor)
            conv.padding = (conv.padding[0] * factor, conv.padding[1] * factor)
        yield
    finally:
        for conv, (dilation, padding) in zip(convolutions, plain, strict=True):
            conv.dilation, conv.padding = dilation, padding
