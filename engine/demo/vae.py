"""The autoencoder: pictures to latents an eighth of the size, and back.

It has all that the real ones have, the attention of the mid-block too, in 1.7 million parameters.
No perceptual or adversarial loss is at hand without weights from elsewhere, so edges are asked for
directly: besides the L1 distance of the pixels, that of their differences at three scales.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from engine.demo.data import buckets, load_bucket
from engine.demo.fit import Run, Stage, fit

STEPS = 2000
DECODER_STEPS = 400
CROPS = ((0.2, 32, 64), (0.7, 64, 16), (1.0, 128, 4))
"""until this share of the steps: crops of this size, this many on each rank"""


def build() -> AutoencoderKL:
    """A fresh autoencoder, the same every time."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=256,
    )


def to_model(pictures: Tensor) -> Tensor:
    """[B, H, W, 3] of 8 bits -> [B, 3, H, W] in -1..1"""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def distance(painted: Tensor, target: Tensor) -> Tensor:
    """L1 of the pixels and, by half, of their differences at three scales."""
    total = F.l1_loss(painted, target)
    for _ in range(3):
        for dim in (2, 3):
            total = total + F.l1_loss(painted.diff(dim=dim), target.diff(dim=dim)) / 6
        painted, target = F.avg_pool2d(painted, 2), F.avg_pool2d(target, 2)
    return total


class Crops:
    """Random crops of the close-ups and of whole pictures of 256 and 128 px."""

    def __init__(self, run: Run) -> None:
        self.sets = [load_bucket(bucket, run.work)[0] for bucket in buckets(run)[:3]]
        self.device = run.device

    def draw(self, size: int, count: int, generator: torch.Generator) -> Tensor:
        """[count, 3, size, size]"""
        crops = np.empty((count, size, size, 3), np.uint8)
        for i in range(count):
            pictures = self.sets[i % len(self.sets)]
            limits = (len(pictures), pictures.shape[1] - size + 1, pictures.shape[2] - size + 1)
            n, y, x = (int(torch.randint(limit, (), generator=generator)) for limit in limits)
            crops[i] = pictures[n, y : y + size, x : x + size]
        return to_model(torch.from_numpy(crops).to(self.device))


def train(run: Run) -> AutoencoderKL:
    """Train encoder and decoder."""
    vae, crops = build().to(run.device), Crops(run)
    vae.set_attn_processor(AttnProcessor())  # on a CPU, its gradients come sooner than SDPA's
    stage = Stage("vae", 3 if run.fast else STEPS, lr=2e-3)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        size, count = next((s, n) for until, s, n in CROPS if step < until * stage.steps)
        pictures = crops.draw(size, count, generator)
        with run.bfloat16():
            posterior = vae.encode(pictures).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(run.device)
            painted = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return (
            distance(painted, pictures) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        )

    fit(stage, vae, loss, run)
    return vae


def train_decoder(run: Run, vae: AutoencoderKL) -> None:
    """Sharpen the decoder beside the frozen encoder, at the crop size that a decoder is used at."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    crops = Crops(run)
    stage = Stage("decoder", 3 if run.fast else DECODER_STEPS, lr=1e-3, decay=0.5)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pictures = crops.draw(128, 4, generator)
        with run.bfloat16():
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mean
            painted = vae.decode(latents).sample.float()
        return distance(painted, pictures)

    fit(stage, vae, loss, run)
