"""What it costs in quality when ranks wait for less: pictures exact, displaced, in naive patches.

    python benchmarks/quality.py --ranks 2 --steps 20
    python benchmarks/quality.py --ranks 3 --model FOLDER --output-folder outputs/quality

Starts its own ranks, each with one thread where they share a CPU. Every mode paints the same
prompt from the same noise; what differs is only when a layer waits for the other bands. Printed:

    PSNR       of the decoded picture against the exact one, in dB; mean and worst of the pictures.
               As a yardstick, the exact mode with one step fewer is held against it too, and naive
               patches, whose bands are pictures of their own and exchange nothing. The displaced
               mode takes others' sums as they were a step before, or (its default) continues their
               trend over the last two steps.
    SSIM       structural similarity to the exact one (Wang et al. 2004), mean of the pictures
    MB sent    per rank and step of the UNet, in all and by kind of layer (`engine.bands.Traffic`)
    buffers    MB that the largest rank keeps from one step for the next
    s a step   median (min - max) of the steps after the warm-up

The table is followed by one line of JSON. With `--output-folder` the pictures are kept side by
side: a row for each seed, a column for each mode, and under each the difference to exact, enlarged
eight times.
"""

import argparse
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import engine
from engine.bands import DisplacedExchange, ExactExchange, Exchange, Mesh, Traffic, open_mesh
from engine.bands.alone import Alone
from engine.bands.boundary import Layout
from engine.distill.metrics import psnr, ssim

MB = 1e6


class NaivePatches(Alone):
    """Every band is painted as if it were the whole picture; only the decoder is exact."""

    def __init__(self, mesh: Mesh, traffic: Traffic) -> None:
        self.mesh = mesh
        self.traffic = traffic


@dataclass(frozen=True)
class Mode:
    """One column of the comparison."""

    name: str
    exchange: Callable[[Mesh, Traffic], Exchange]
    steps: int
    warmup_steps: int = 0


@dataclass
class Measured:
    """What painting all pictures in one mode took and gave, on one rank.

    Attributes:
        pictures: [H, W, 3] in 0 ... 1, one for each seed.
        step_s: seconds of each step after the warm-up.
        sent: bytes by kind of layer, of all pictures together.
        buffer_bytes: held between two steps.
    """

    pictures: list[np.ndarray] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    buffer_bytes: int = 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, nargs="+", default=[1, 2, 4, 8], metavar="STEPS")
    parser.add_argument("--pictures", type=int, default=2, help="seeds 0, 1, ... of the one prompt")
    parser.add_argument("--model", default="demo", help="'demo', a diffusers folder, or a hub id")
    parser.add_argument("--linfusion", default="auto", help="as in engine.load; 'none' is softmax")
    parser.add_argument("--prompt", default="snowy mountains above a lake at sunset")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--output-folder", type=Path)
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error("--ranks must be 2 or more: a single rank exchanges nothing")
    if not all(0 < warmup < options.steps for warmup in options.warmup):
        parser.error(f"--warmup must lie between 1 and {options.steps - 1}, the steps less one")
    return options


def modes(options: argparse.Namespace) -> list[Mode]:
    """Exact first: all others are held against it."""
    return [
        Mode("exact", ExactExchange, options.steps),
        Mode("exact, a step fewer", ExactExchange, options.steps - 1),
        Mode("naive patches", NaivePatches, options.steps),
        *(
            displaced(options.steps, warmup, extrapolate)
            for extrapolate in (False, True)
            for warmup in sorted(options.warmup)
        ),
    ]


def displaced(steps: int, warmup: int, extrapolate: bool) -> Mode:
    exchange = partial(DisplacedExchange, warmup_steps=warmup, extrapolate=extrapolate)
    name = "with trend" if extrapolate else "as it was"
    return Mode(f"displaced {name}, warm-up {warmup}", exchange, steps, warmup)


# --- on every rank --------------------------------------------------------------------------------


def paint_all(options: argparse.Namespace) -> list[dict[str, object]]:
    """Paint every mode's pictures; its rows of the table."""
    with open_mesh() as mesh:
        mesh = mesh.on_device("auto")
        if mesh.device.type == "cpu":
            torch.set_num_threads(1)
        pipe = engine.load(options.model, options.linfusion)
        pipe.set_progress_bar_config(disable=True)
        paint(pipe, mesh, Mode("first use", ExactExchange, 2), options, seeds=1)
        measured = [
            paint(pipe, mesh, mode, options, seeds=options.pictures) for mode in modes(options)
        ]
        rows = [
            row(mesh, mode, result, measured[0])
            for mode, result in zip(modes(options), measured, strict=True)
        ]
    if options.output_folder and mesh.rank == 0:
        save_pictures(options.output_folder / "quality.png", measured)
    return rows


def paint(
    pipe: DiffusionPipeline, mesh: Mesh, mode: Mode, options: argparse.Namespace, seeds: int
) -> Measured:
    """The pictures of the first `seeds` seeds, and what they took."""
    layout = engine.distribute(pipe, mesh, exchange=mode.exchange)
    measured = Measured()
    for seed in range(seeds):
        watch = Watch(layout)
        pictures = pipe(
            options.prompt,
            height=options.height,
            width=options.width,
            num_inference_steps=mode.steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            callback_on_step_end=watch,
        ).images
        measured.pictures.append(pictures[0])
        measured.step_s += watch.step_s(first=max(1, mode.warmup_steps))
        measured.sent += watch.sent
        measured.buffer_bytes = watch.buffer_bytes
    return measured


class Watch:
    """A diffusers callback that notes, after each step, the time, the traffic and the buffers."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.sent_before = Counter(layout.traffic.bytes_sent)
        self.ends: list[float] = []

    def __call__(self, pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.sent = self.layout.traffic.bytes_sent - self.sent_before
        self.buffer_bytes = getattr(self.layout.exchange, "buffer_bytes", 0)
        return tensors

    def step_s(self, first: int) -> list[float]:
        """Seconds of each step from number `first` on, counted from 0."""
        return [b - a for a, b in zip(self.ends[first - 1 :], self.ends[first:], strict=False)]


# --- what it comes to -----------------------------------------------------------------------------


def row(mesh: Mesh, mode: Mode, result: Measured, exact: Measured) -> dict[str, object]:
    """One mode's figures, from all ranks."""
    steps = mode.steps * len(result.pictures)
    sent = mesh.gather_objects(result.sent)
    kinds = {
        kind: sum(own[kind] for own in sent) / mesh.size / steps / MB for kind in sorted(sent[0])
    }
    decibels = [psnr(a, b, peak=1) for a, b in zip(result.pictures, exact.pictures, strict=True)]
    return {
        "mode": mode.name,
        "steps": mode.steps,
        "psnr_db": fmean(decibels),
        "worst_psnr_db": min(decibels),
        "ssim": fmean(
            ssim(a, b, peak=1) for a, b in zip(result.pictures, exact.pictures, strict=True)
        ),
        "mb_sent_per_step": sum(kinds.values()),
        "mb_sent_per_step_by_kind": kinds,
        "buffer_mb": max(mesh.gather_objects(result.buffer_bytes)) / MB,
        "step_s": {f.__name__: f(result.step_s) for f in (median, min, max)},
    }


def save_pictures(path: Path, measured: list[Measured]) -> None:
    """A row of pictures for each seed, a row of differences to exact (the first) under each."""
    rows = []
    for seed, exact in enumerate(measured[0].pictures):
        pictures = [result.pictures[seed] for result in measured]
        rows += [pictures, [np.clip(0.5 + 8 * (picture - exact), 0, 1) for picture in pictures]]
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().astype(np.uint8)).save(path)


def print_table(rows: list[dict], options: argparse.Namespace) -> None:
    print(
        f"{options.pictures} x {options.width}x{options.height} px of {options.model!r}, "
        f"{options.steps} steps, {options.ranks} ranks\n"
    )
    print(
        f"{'mode':<34}{'PSNR dB':>8}{'worst':>8}{'SSIM':>8}{'MB sent':>9}{'buffers':>9}  s a step"
    )
    for row in rows:
        step_s = row["step_s"]
        print(
            f"{row['mode']:<34}{row['psnr_db']:>8.1f}{row['worst_psnr_db']:>8.1f}"
            f"{row['ssim']:>8.4f}{row['mb_sent_per_step']:>9.3f}{row['buffer_mb']:>9.3f}  "
            f"{step_s['median']:.3f} ({step_s['min']:.3f} - {step_s['max']:.3f})"
        )
    print("\nMB sent per rank and step, by kind of layer (exact, displaced)")
    for kind, exact in rows[0]["mb_sent_per_step_by_kind"].items():
        print(f"{kind:<34}{exact:>8.4f}{rows[-1]['mb_sent_per_step_by_kind'].get(kind, 0):>8.4f}")
    if not torch.cuda.is_available():
        print(
            "\nTimes are noisy: CPU ranks share cores and memory with each other and with whatever "
            "else runs.\nTake a difference smaller than the min - max range for none."
        )


def main() -> None:
    options = parse_arguments()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    rows = elastic_launch(config, paint_all)(options)[0]
    print_table(rows, options)
    print(json_line(rows, options))


def json_line(rows: list[dict], options: argparse.Namespace) -> str:
    """Everything measured. An equal picture's PSNR is infinite, for which JSON has only null."""
    settings = {key: value for key, value in vars(options).items() if key != "output_folder"}
    rows = [
        {key: None if value == math.inf else value for key, value in row.items()} for row in rows
    ]
    return json.dumps({"benchmark": "quality", **settings, "rows": rows}, allow_nan=False)


if __name__ == "__main__":
    main()
