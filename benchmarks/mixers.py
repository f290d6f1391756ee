"""From a state space model to linear attention: which token mixer holds at sizes it has not seen.

    python -m benchmarks.mixers --steps 300 --output FOLDER
    python -m benchmarks.mixers --only "linear attention" "linear attention, unnormalised"

The ablation of the LinFusion paper (arXiv:2409.02097, figure 4 and section 3.2) on the demo model.
Each mixer of `benchmarks.mixing` takes the place of the teacher's self-attentions and is distilled
for `--steps`, all with the same landscapes, noise, times and captions, at 128 px only. Held-out
scenes, each painted at 128, 256 and 512 px, then tell, against the teacher at that size:

    loss        of the last tenth of the steps: noise + 0.5 output + 0.5 features (relative)
    MSE         from what the teacher's UNet puts out, at 1, 2 and 4 times the size, and the ratios
    % of power  that MSE, in percent of the mean square of what the teacher puts out
    features    MSE of what the self-attentions put out, in units of the teacher's mean square

all as means over the scenes and `NOISE` levels of noise. "none" has zeros for self-attentions and
is not trained: a mixer that is worse does harm.

Numbers of a demo model after few steps are no numbers of Stable Diffusion; what is to be seen is
which curves rise with the size.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import common
from benchmarks.mixing import MIXERS, NoMixer
from engine.bands import Mesh
from engine.demo.captions import caption
from engine.demo.data import WORDINGS
from engine.demo.landscapes import draw_scene, render
from engine.distill.backends import open_backend
from engine.distill.draws import Draw, draw, generator
from engine.distill.latents import Entry, encode_all, read_set
from engine.distill.lessons import build_lesson
from engine.distill.settings import BackendSettings, LossSettings, OptimizerSettings
from engine.distill.sources import Sample, Unit
from engine.distill.student import (
    PARTS,
    Answer,
    Distiller,
    Lesson,
    answer,
    build_student,
    learning,
    losses,
)
from engine.distill.teacher import Teacher, load_teacher

TRAINED_PX = 128
SIZES = (128, 256, 512)
NOISE = (0.15, 0.4, 0.65, 0.9)
"""shares of the noise schedule at which held-out scenes are seen"""
DROPOUT = 0.1
NOTHING = "none"
COLOURS = ("#d9822b", "#b5403a", "#c9a227", "#5c9e6f", "#0b6e99", "#8a6fb0")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of each mixer")
    parser.add_argument("--pictures", type=int, default=512, help="scenes to learn from")
    parser.add_argument("--held-out", type=int, default=6, help="scenes to evaluate on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="at its highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for mixers.json and .png")
    options = parser.parse_args()
    if min(options.steps, options.pictures, options.held_out, options.batch) < 1:
        parser.error("--steps, --pictures, --held-out and --batch must be 1 or more")
    return options


# --- what is learnt from, and what is asked -------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """A source of `engine.distill`: scenes of these numbers, painted at one size."""

    side: int
    numbers: range

    def units(self) -> list[Unit]:
        return [Unit(f"{self.side}_{self.numbers.start}", list(self.numbers))]

    def read(self, unit: Unit) -> Iterator[Sample]:
        for number in unit.facts:
            # The demo's own training draws from four numbers a picture, so none of these.
            rng = np.random.default_rng([number])
            scene = draw_scene(int(rng.integers(2**31)))
            pixels = render(scene, self.side, self.side)
            words = [caption(scene, rng, (self.side, self.side)) for _ in range(WORDINGS)]
            yield Sample(f"scene {number}", Image.fromarray(pixels), words)

    def entries(self, teacher: Teacher, folder: Path) -> list[Entry]:
        """Them as latents in `folder`."""
        alone = Mesh(0, 1, teacher.device, None)
        files, digest = encode_all(
            self, [], teacher, folder, alone, lambda what: None, lambda: False
        )
        return read_set(files, digest, held_out=0).shapes[self.side, self.side]


@dataclass(frozen=True)
class Question:
    """A held-out scene at all levels of noise, and what the teacher says of it."""

    lesson: Lesson
    theirs: Answer


@torch.no_grad()
def ask(teacher: Teacher, entries: Sequence[Entry], seed: int) -> list[Question]:
    questions = []
    for index, entry in enumerate(entries):
        draws = [
            Draw(0.0, share, 0.0, False, generator(seed, -1, index, level))
            for level, share in enumerate(NOISE)
        ]
        lesson = build_lesson(teacher, [entry] * len(draws), draws)
        questions.append(Question(lesson, answer(teacher.unet, lesson)))
    return questions


# --- training, evaluating -------------------------------------------------------------------------


def train(
    student: nn.Module, teacher: Teacher, entries: Sequence[Entry], options: argparse.Namespace
) -> list[float]:
    """The loss of every step."""
    weights = LossSettings(relative=True)
    factors = torch.tensor([getattr(weights, part) for part in PARTS], device=teacher.device)
    optimizer = OptimizerSettings(rate=options.rate, warmup=options.steps // 10)
    backend = open_backend(
        BackendSettings(),
        optimizer,
        Distiller(student, teacher, weights),
        Mesh(0, 1, teacher.device, None),
    )
    curve = []
    for step in range(options.steps):
        draws = [draw(options.seed, step, index, DROPOUT) for index in range(options.batch)]
        picked = [entries[int(drawn.pick * len(entries))] for drawn in draws]
        parts = backend.losses(build_lesson(teacher, picked, draws), last=True).mean(1)
        loss = (parts * factors).sum()
        backend.backward(loss)
        backend.update(optimizer.rate_at(step, options.steps))
        curve.append(float(loss.detach()))
    return curve


@torch.no_grad()
def evaluate(student: nn.Module, questions: Sequence[Question]) -> dict[str, Any]:
    """Mean distances from the teacher, of one size."""
    outputs, powers, features = [], [], []
    for question in questions:
        mine, theirs = answer(student, question.lesson), question.theirs
        parts = losses(mine, theirs, question.lesson.target, relative=True)
        outputs.append(parts[PARTS.index("output")])
        features.append(parts[PARTS.index("features")])
        powers.append(theirs.output.square().flatten(1).mean(1))
    by_noise, power = torch.stack(outputs).mean(0), torch.stack(powers).mean(0)
    return {
        "mse": float(by_noise.mean()),
        "relative": float(by_noise.mean() / power.mean()),
        "relative_by_noise": (by_noise / power).tolist(),
        "features": float(torch.stack(features).mean()),
    }


def measure(
    name: str,
    teacher: Teacher,
    entries: Sequence[Entry],
    questions: dict[int, list[Question]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One mixer's row."""
    kind = MIXERS.get(name, NoMixer)
    student = build_student(teacher.unet, seed=options.seed, mixer=kind.from_attention)
    begun, curve = time.perf_counter(), list[float]()
    if name != NOTHING:
        curve = train(student, teacher, entries, options)
    tail = max(1, options.steps // 10)
    row = {
        "mixer": name,
        "parameters": sum(p.numel() for p in learning(student)) if curve else 0,
        "loss": fmean(curve[-tail:]) if curve else None,
        "sizes": {side: evaluate(student, asked) for side, asked in questions.items()},
        "curve": curve,
        "s": time.perf_counter() - begun,
    }
    print(f"{name}: {row['s']:.0f} s", flush=True)
    return row


# --- what it comes to -----------------------------------------------------------------------------


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["mixer", "parameters", "loss", "MSE 1x", "2x", "4x", "2x/1x", "4x/1x"]
    columns += ["% of power 1x", "2x", "4x", "features 1x", "2x", "4x"]
    cells = []
    for row in rows:
        sizes = [row["sizes"][side] for side in SIZES]
        errors = [size["mse"] for size in sizes]
        cells.append([
            row["mixer"], row["parameters"], row["loss"], *errors,
            errors[1] / errors[0], errors[2] / errors[0],
            *(100 * size["relative"] for size in sizes), *(size["features"] for size in sizes),
        ])  # fmt: skip
    print()
    common.print_table(columns, cells)


def draw_plot(rows: Sequence[dict[str, Any]], plt: Any) -> Any:
    """Distances over sizes, of outputs and of features, and the curves of training."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    colours = dict(zip(MIXERS, COLOURS, strict=True)) | {NOTHING: "#8a8a8a"}
    for row in rows:
        name = row["mixer"]
        style = {"color": colours[name], "label": name, "ls": ":" if name == NOTHING else "-"}
        for place, key in zip(axes, ("relative", "features"), strict=False):
            place.plot(SIZES, [row["sizes"][side][key] for side in SIZES], "o", ms=4, **style)
        if row["curve"]:
            axes[2].plot(smooth(row["curve"]), **style)
    axes[0].set(title="UNet's output: MSE / the teacher's mean square")
    axes[1].set(title="Self-attentions' outputs: the same")
    for place in axes[:2]:
        place.set_xscale("log", base=2)
        place.set(yscale="log", xlabel="px (128 trained)", xticks=SIZES, xticklabels=SIZES)
    axes[2].set(title="Loss at 128 px, mean of 10 steps", xlabel="step", yscale="log")
    axes[2].yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
    axes[2].yaxis.set_minor_formatter(lambda loss, _: f"{loss:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def smooth(curve: Sequence[float], width: int = 10) -> list[float]:
    return [fmean(curve[max(0, end - width) : end]) for end in range(1, len(curve) + 1)]


def main() -> None:
    options = parse_arguments()
    common.machine()
    teacher = load_teacher("demo", common.default_device(), torch.float32)
    held_out = range(options.held_out)
    learnt = range(options.held_out, options.held_out + options.pictures)
    with TemporaryDirectory() as folder:
        entries = Scenes(TRAINED_PX, learnt).entries(teacher, Path(folder))
        questions = {
            side: ask(teacher, Scenes(side, held_out).entries(teacher, Path(folder)), options.seed)
            for side in SIZES
        }
        rows = [
            measure(name, teacher, entries, questions, options) for name in (NOTHING, *options.only)
        ]
    print_rows(rows)
    common.finish("mixers", options, {"rows": rows}, draw=partial(draw_plot, rows))


if __name__ == "__main__":
    main()
