"""The text-to-image UNet: a v-prediction diffusion model of the latents, trained with its text
encoder.

The top level has convolutions only, as in SDXL, so a 512 px picture costs what its pixels cost, and
the picture's layout is settled by attention at a half and a quarter of the latent's size. The noise
schedule ends in pure noise (Lin et al. 2023, "Common diffusion noise schedules and sample steps are
flawed"): a night can be dark. Larger pictures get more of the high noise levels, because the same
noise hides less of their layout.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from engine.demo.data import Bucket, buckets, load_bucket
from engine.demo.fit import Run, Stage, fit
from engine.demo.text import WIDTH, build_text_encoder, learn_tokenizer
from engine.demo.vae import to_model

STEPS = 3600
LARGE_FROM = 0.45
"""share of the steps after which three of four batches are of large pictures"""
BATCH_CELLS = 24 * 16 * 16
"""latent positions in a batch of one rank: 24 pictures of 128 px, one of 512 px"""
CLOSE_UP_NOISE = 450
"""close-ups are seen below this time step of 1000"""
UNPROMPTED = 0.1
"""share of the captions left out, for classifier-free guidance"""


def build() -> UNet2DConditionModel:
    """A fresh UNet, the same every time."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=48,  # 384 px: the largest that it paints well
        block_out_channels=(64, 96, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 3, 4),  # the number of heads, in truth
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )
    nn.init.zeros_(unet.conv_out.weight)
    unet.set_attn_processor(AttnProcessor())  # on a CPU, its gradients come sooner than SDPA's
    return unet


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # what diffusers asks of Stable Diffusion; trailing spacing ignores it
    )


class PromptedUNet(nn.Module):
    """Text encoder and UNet as one module, since they learn together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build()

    def encode(self, prompts: list[str]) -> Tensor:
        """[B, tokens, WIDTH]"""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        hidden: Tensor = self.text_encoder(tokens.to(self.unet.device)).last_hidden_state
        return hidden

    def forward(self, noisy: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        velocity: Tensor = self.unet(noisy, times, self.encode(prompts)).sample
        return velocity


@dataclass
class Batch:
    """Noisy latents and what is to be told from them."""

    noisy: Tensor
    times: Tensor
    prompts: list[str]
    velocity: Tensor


class Latents:
    """All buckets as scaled latents, in memory, with their captions."""

    def __init__(self, run: Run) -> None:
        self.device = run.device
        self.alphas = build_scheduler().alphas_cumprod
        self.scale = scaling_factor(run.work)
        self.buckets = {
            bucket: (np.load(_latents_path(bucket, run)), load_bucket(bucket, run.work)[1])
            for bucket in buckets(run)
        }

    def draw(self, step: int, large: float, generator: torch.Generator) -> Batch:
        """A batch of one bucket, the same bucket on every rank so that they take equally long."""
        shared = np.random.default_rng([step, 7])
        is_large = bool(shared.random() < large)
        group = [bucket for bucket in self.buckets if bucket.large == is_large]
        weights = np.array([b.count * b.height * b.width for b in group], np.float64)
        bucket = group[int(shared.choice(len(group), p=weights / weights.sum()))]
        count = max(1, BATCH_CELLS * 64 // (bucket.height * bucket.width))
        latents, captions = self.buckets[bucket]
        picks = torch.randint(len(latents), (count,), generator=generator).tolist()
        clean = torch.from_numpy(latents[picks]).float() * self.scale
        prompts = [self._wording(captions[n], generator) for n in picks]
        return self._noised(clean, prompts, bucket, generator)

    def _noised(
        self, clean: Tensor, prompts: list[str], bucket: Bucket, generator: torch.Generator
    ) -> Batch:
        share = torch.rand(len(clean), generator=generator)
        if bucket.close_up:
            times = (share * CLOSE_UP_NOISE).long()
        else:
            shift = max(1.0, (bucket.height * bucket.width) ** 0.25 / 128**0.5)
            times = (shift * share / (1 + (shift - 1) * share) * 1000).long().clamp(max=999)
        noise = torch.randn(clean.shape, generator=generator)
        signal = self.alphas[times].sqrt()[:, None, None, None]
        spread = (1 - self.alphas[times]).sqrt()[:, None, None, None]
        noisy, velocity = signal * clean + spread * noise, signal * noise - spread * clean
        return Batch(noisy.to(self.device), times.to(self.device), prompts,
                     velocity.to(self.device))  # fmt: skip

    def _wording(self, wordings: list[str], generator: torch.Generator) -> str:
        drop, which = torch.rand(2, generator=generator).tolist()
        return "" if drop < UNPROMPTED else wordings[int(which * len(wordings))]


def encode_latents(run: Run, vae: AutoencoderKL) -> None:
    """Write the latents [n, 4, H/8, W/8] of every bucket, each rank its share of the pictures."""
    for bucket in buckets(run):
        path = _latents_path(bucket, run)
        if path.exists():
            continue
        pictures, _ = load_bucket(bucket, run.work)
        mine, count = pictures[run.rank :: run.ranks], BATCH_CELLS * 64 // pictures[0, ..., 0].size
        starts = tqdm(range(0, len(mine), count), path.stem, disable=run.rank > 0, mininterval=5)
        part = [_encode(vae, mine[start : start + count], run) for start in starts]
        np.save(path.with_suffix(f".{run.rank}.npy"), np.concatenate(part))
        run.barrier()
        if run.rank == 0:
            parts = [np.load(path.with_suffix(f".{rank}.npy")) for rank in range(run.ranks)]
            whole = np.empty((len(pictures), *parts[0].shape[1:]), np.float16)
            for rank, encoded in enumerate(parts):
                whole[rank :: run.ranks] = encoded
            np.save(path, whole)
        run.barrier()


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: NDArray[np.uint8], run: Run) -> NDArray[np.float16]:
    with run.bfloat16():
        pixels = to_model(torch.from_numpy(pictures.copy()).to(run.device))
        mean: Tensor = vae.encode(pixels).latent_dist.mean
    return mean.half().cpu().numpy()


def _latents_path(bucket: Bucket, run: Run) -> Path:
    return run.work / f"latents_{bucket.name}.npy"


def scaling_factor(work: Path) -> float:
    """One over the standard deviation of the latents of the first whole bucket."""
    latents = np.load(work / "latents_whole_128x128.npy")
    return float(1 / latents[:500].astype(np.float32).std())


def train(run: Run) -> PromptedUNet:
    """Train UNet and text encoder together."""
    latents = Latents(run)
    words = [text for _, texts in latents.buckets.values() for group in texts for text in group]
    if run.rank == 0:
        learn_tokenizer(words, run.work / "tokenizer")
    run.barrier()
    model = load_untrained(run)
    stage = Stage("unet", 3 if run.fast else STEPS, lr=1.5e-3, averaging=0.9985)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        large = 0.75 if step > LARGE_FROM * stage.steps else 0.0
        batch = latents.draw(step, large, generator)
        with run.bfloat16():
            velocity = model(batch.noisy, batch.times, batch.prompts)
        return F.mse_loss(velocity.float(), batch.velocity)

    fit(stage, model, loss, run)
    return model


def load_untrained(run: Run) -> PromptedUNet:
    tokenizer = CLIPTokenizer.from_pretrained(run.work / "tokenizer")
    return PromptedUNet(tokenizer).to(run.device)
