"""How alike pictures are: PSNR and SSIM of pairs, FID of sets, CLIP score of pictures and captions.

Pictures are [H, W, 3] of 8 bits. FID and CLIP score need networks that only the user can supply.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from engine.config import UserError

Picture = NDArray[np.uint8]


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB; infinite where they are the same."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity (Wang et al. 2004) of the three channels, 1 where they are the same.

    Its usual constants: a Gaussian window of 11 pixels and 1.5 pixels wide, K of 0.01 and 0.03.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1)[:, None] for p in (a, b))

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, window[None, None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


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
        model = CLIPModel.from_pretrained(folder).eval()
        processor = CLIPProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"evaluation.clip: {folder} is no CLIP model; give a folder that transformers' "
            "CLIPModel and CLIPProcessor load"
        ) from error

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
