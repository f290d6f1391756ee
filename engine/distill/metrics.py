"""How alike pictures are: PSNR and SSIM of pairs, FID of sets, CLIP score of pictures and captions.

Pictures are [H, W, 3] of 8 bits, or up to another `peak`. FID and CLIP score need networks that
only the user can supply.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from engine.config import UserError

Picture = NDArray[np.uint8]


def psnr(a: NDArray[Any], b: NDArray[Any], peak: float = 255) -> float:
    """Peak signal-to-noise ratio in dB; infinite where they are the same."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(a: NDArray[Any], b: NDArray[Any], peak: float = 255) -> float:
    """Structural similarity of the three channels, 1 where they are the same.

    With the Gaussian window and the constants of Wang et al. 2004.
    """
    from skimage.metrics import structural_similarity

    found = structural_similarity(
        a.astype(np.float64), b.astype(np.float64), data_range=peak, channel_axis=2,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    return float(found)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID of two sets of features [n, d] (Heusel et al. 2017); biased upwards for small sets.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), A and B their covariances.
    """
    a, b = a.double(), b.double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * cross)


Features = Callable[[Sequence[Picture]], Tensor]


def load_inception(file: Path) -> Features:
    """The features [n, d] of pictures, by a TorchScript network of the user's.

    Raises:
        UserError: the file is none.
    """
    try:
        network = torch.jit.load(str(file), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"evaluation.inception: {file} is not readable as TorchScript; give a file from "
            "[B, 3, H, W] in 0..255 to features [B, n]"
        ) from error

    @torch.no_grad()
    def features(pictures: Sequence[Picture]) -> Tensor:
        return torch.cat([
            network(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]).float().flatten(1)
            for picture in pictures
        ])  # fmt: skip

    return features


Score = Callable[[Sequence[Picture], Sequence[str]], float]


def load_clip(folder: Path) -> Score:
    """The mean CLIP score (Hessel et al. 2021, times 100) of pictures and their captions.

    Raises:
        UserError: the folder is no CLIP model.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, found = CLIPModel.from_pretrained(folder, output_loading_info=True)
        if found["missing_keys"]:  # transformers would draw them at random
            raise ValueError(f"{min(found['missing_keys'])} is missing")
        processor = CLIPProcessor.from_pretrained(folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"evaluation.clip: {folder} is no CLIP model; give a folder that transformers' "
            "CLIPModel and CLIPProcessor load"
        ) from error

    model.eval()

    @torch.no_grad()
    def score(pictures: Sequence[Picture], captions: Sequence[str]) -> float:
        inputs = processor(
            text=list(captions), images=list(pictures), padding=True, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        found = model(**inputs)
        cosines = F.cosine_similarity(found.image_embeds, found.text_embeds)
        return float(100 * cosines.clamp(min=0).mean())

    return score
