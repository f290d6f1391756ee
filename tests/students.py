"""What tests of `engine.distill` have in common: tiny teachers, pictures to learn from, runs."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.bands import Mesh
from engine.distill.latents import encode_all
from engine.distill.settings import DataSettings, DistillSettings
from engine.distill.sources import open_source
from engine.distill.teacher import load_teacher
from engine.distill.trainer import Control, distil
from tests import families

SIDE = 64  # px; eight times what the tiny UNets are made for
SIZES = [(SIDE, SIDE), (96, 80), (150, 64), (64, 110)]


def save_teacher(family: str, folder: Path) -> Path:
    """A tiny teacher of "sd15", "sd21" or "sdxl" in `folder`, in fp32."""
    bare = {"image_encoder": None, "feature_extractor": None}
    pipe = getattr(families, family)(**bare)
    pipe.to(torch.float32).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, count: int = 24) -> Path:
    """Soft colours of several sizes in `folder`, each with two wordings."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        height, width = SIZES[number % len(SIZES)]
        corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        corners.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number}\nno {number}\n")
    return folder


def settings_of(model: Path, pictures: Path | str, output: Path, *more: str) -> DistillSettings:
    """A run of 50 small steps on the CPU; `more` are flags."""
    return DistillSettings.load([*flags_of(model, pictures, output), *more])


def flags_of(model: Path, pictures: Path | str, output: Path) -> list[str]:
    """The same, for a process of its own."""
    usual = {
        "model": model, "output": output, "device": "cpu", "steps": 50, "batch": 4,
        "checkpoint-every": 20, "data.source": pictures, "data.side": SIDE, "data.multiple": 64,
        "data.held-out": 4, "optimizer.rate": 1e-3, "optimizer.warmup": 5, "evaluation.pictures": 0,
    }  # fmt: skip
    return [word for name, value in usual.items() for word in (f"--{name}", str(value))]


def control(stop_at: int | None = None, said: list[str] | None = None) -> Control:
    """Nobody listens; a signal comes after `stop_at` steps, what is said goes to `said`."""
    steps = [0]

    def count(_progress: object) -> None:
        steps[0] += 1

    def told() -> bool:
        return stop_at is not None and steps[0] >= stop_at

    return Control(count, lambda what: None, told, (said if said is not None else []).append)


def distil_alone(settings: DistillSettings, stop_at: int | None = None) -> tuple[int, str]:
    """The run in this process."""
    return distil(settings, Mesh(0, 1, torch.device("cpu"), None), control(stop_at))


@torch.inference_mode(False)
def distil_on(mesh: Mesh, settings: DistillSettings, stop_at: int | None = None) -> tuple[int, str]:
    """The run on this rank of several."""
    return distil(settings, mesh, control(stop_at))


@torch.inference_mode(False)
def encode_on(mesh: Mesh, model: Path, source: str, folder: Path) -> tuple[list[Path], str]:
    """The pictures' latents, square, on this rank of several; (the files, the digest)."""
    teacher = load_teacher(str(model), torch.device("cpu"), torch.float32)
    opened = open_source(DataSettings(source=source))
    shapes = [(SIDE, SIDE)]
    return encode_all(opened, shapes, teacher, folder, mesh, lambda what: None, lambda: False)


def curve(output: Path, column: str = "loss") -> list[float]:
    """One column of the run's table, a number a step."""
    with (output / "losses.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(len(lines)))
    return [float(line[column]) for line in lines]
