"""Twelve prompts painted by the demo model with linear attention, on one sheet.

    python -m engine.demo.contact_sheet docs/contact_sheet.png

One seed for all and no choosing, so that the sheet shows what a prompt can be expected to give.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from engine import linfusion
from engine.demo import WEIGHTS

PROMPTS = (
    "snowy mountains at day with a calm lake and the sun",
    "a desert at sunset with the sun",
    "rocky mountains at night with a full moon and stars",
    "an autumn forest at sunrise with a lake",
    "a pine forest at day with clouds",
    "green hills at dusk with a crescent moon",
    "a pine forest at night with a lake and a full moon",
    "green hills at day with a cabin and clouds",
    "rocky mountains at sunset with a lake and the sun",
    "snowy mountains at dusk with a full moon",
    "an autumn forest at day with fog",
    "a desert at night with stars",
)
COLUMNS, HEIGHT, WIDTH = 3, 256, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    asked = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(
        asked.weights, safety_checker=None, requires_safety_checker=False, feature_extractor=None
    )
    linfusion.load(pipeline.unet, asked.weights / "linfusion")
    pictures = [_paint(pipeline, prompt) for prompt in PROMPTS]
    rows = [np.concatenate(pictures[i : i + COLUMNS], 1) for i in range(0, len(PROMPTS), COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(asked.file, optimize=True)


def _paint(pipeline: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    """[HEIGHT, WIDTH, 3] of 8 bits"""
    picture = pipeline(
        prompt,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=25,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    return np.asarray(picture)


if __name__ == "__main__":
    main()
