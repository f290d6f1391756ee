"""The engine beside its peers: the same picture by each, in turn.

    python -m benchmarks.peers --ranks 2 --height 512 --width 512
    python -m benchmarks.peers --ranks 4 --model SDXL --height 2048 --width 2048 \\
        --distrifuser-python ENVIRONMENT/bin/python

Every peer is given the same prompt, seed, steps, size, precision and weights, loads them in
processes of its own, paints once for nothing and once for the clock; then it is the next one's
turn, round after round (`--repeats`), so that a machine that slows down slows all.

    engine             this engine, exact, on `--ranks` ranks, with its settings as they come: an
                       even number of ranks first shares out the two sides of guidance
    engine-alone       the same on one rank
    diffusers          the pipeline of diffusers, on one rank, with the same linear attention
    diffusers-softmax  the same with the model's own attention: another network
    distrifuser        DistriFusion (arXiv:2402.19481) on `--ranks` ranks, as its defaults are, with
                       softmax attention, since it knows no other; it needs CUDA GPUs and an
                       environment of its own, see benchmarks/peers/distrifuser.txt

Printed for each:

    s          from the prompt to the PNG file; a rank is a GPU or, without GPUs, one thread
    CPU s      of the rank that took most; it hardly depends on what else the machine does
    / engine   how many times as long as the engine on all ranks, round by round
    MB         of the rank that has most, once the model is loaded and at the peak of painting: of
               the GPU's memory, or resident
    PSNR       of the 8-bit picture to the engine's, in dB, and the largest difference of a sample
               (of 255); only `engine-alone` and `diffusers` paint by the same network

A model may be 'demo', a diffusers folder, a hub id, or a shape of random weights. A peer that
cannot run is listed with the reason; if `--only` asked for it, the benchmark ends with code 1.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from benchmarks.common import COLOURS, Aim, Noise
from benchmarks.networks import MODELS
from benchmarks.peers import models
from benchmarks.peers.jobs import Distrifuser, Job, Measured, NotRun, Peer, peers_of
from engine.distill.metrics import psnr

NAMES = ("engine", "engine-alone", "diffusers", "diffusers-softmax", "distrifuser")
SHADES = {"engine": "ours", "engine-alone": "ours", "diffusers": "plain", "distrifuser": "naive"}


def parse_arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--prompt", default="snowy mountains above a lake at sunset")
    parser.add_argument(
        "--model", default="demo", help=f"'demo', a folder, a hub id, or of {', '.join(MODELS)}"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", nargs="+", choices=NAMES, help="and fail if one cannot run")
    parser.add_argument("--distrifuser-python", type=Path, metavar="PATH")
    parser.add_argument("--warmup-steps", type=int, default=4, help="of DistriFusion")
    parser.add_argument("--no-cuda-graph", action="store_true", help="for DistriFusion")
    parser.add_argument("--timeout-s", type=float, default=600, help="of DistriFusion's turn")
    return parser.parse_args()


def job_of(options: argparse.Namespace, folder: Path) -> Job:
    dtype = options.dtype or ("float16" if torch.cuda.is_available() else "float32")
    model = options.model
    if model in MODELS:
        models.write(model, folder / "model", getattr(torch, dtype))
        model = str(folder / "model")
    return Job(
        model=model,
        prompt=options.prompt,
        height=options.height,
        width=options.width,
        steps=options.steps,
        seed=options.seed,
        guidance_scale=options.guidance_scale,
        dtype=dtype,
    )


def chosen(options: argparse.Namespace) -> dict[str, Peer]:
    how = Distrifuser(
        python=options.distrifuser_python,
        cuda_graph=not options.no_cuda_graph,
        warmup_steps=options.warmup_steps,
        timeout_s=options.timeout_s,
    )
    names = options.only or [n for n in NAMES if n != "engine-alone" or options.ranks > 1]
    return {name: peer for name, peer in peers_of(options.ranks, how).items() if name in names}


# --- the rounds -----------------------------------------------------------------------------------


def measure(
    peers: dict[str, Peer], job: Job, repeats: int, folder: Path
) -> tuple[dict[str, list[list[Measured]]], dict[str, str]]:
    """([peer][round][rank], why others were not run); the pictures are left in `folder`."""
    measured: dict[str, list[list[Measured]]] = {name: [] for name in peers}
    reasons: dict[str, str] = {}
    for _ in range(repeats):
        for name, peer in peers.items():
            if name in reasons:
                continue
            try:
                measured[name].append(peer.paint(job, folder / f"{name}.png"))
            except NotRun as refusal:
                reasons[name] = str(refusal)
    return {name: of for name, of in measured.items() if name not in reasons}, reasons


def table_of(
    peers: dict[str, Peer],
    measured: dict[str, list[list[Measured]]],
    reasons: dict[str, str],
    pictures: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """A row for each peer."""
    ours = seconds(measured["engine"]) if "engine" in measured else None
    rows = []
    for name, peer in peers.items():
        row: dict[str, Any] = {"peer": name, "title": peer.title, "ranks": peer.ranks}
        if name in reasons:
            rows.append(row | {"not_run": reasons[name]})
            continue
        s = seconds(measured[name])
        row |= {
            "s": Noise.of(s),
            "cpu_s": Noise.of(seconds(measured[name], "cpu_s")),
            "to_engine": common.ratio(s, ours) if ours else None,
            "loaded_mb": [max(mb) for mb in over_rounds(measured[name], "loaded_mb")],
            "peak_mb": [max(mb) for mb in over_rounds(measured[name], "peak_mb")],
        }
        if "engine" in pictures and name != "engine":
            row |= agreement(pictures[name], pictures["engine"])
        rows.append(row)
    return rows


def seconds(rounds: Sequence[Sequence[Measured]], clock: str = "s") -> list[float]:
    """Of each round, the rank that took longest."""
    return [max(rank[clock] for rank in ranks) for ranks in rounds]


def over_rounds(rounds: Sequence[Sequence[Measured]], field: str) -> list[list[float]]:
    """[rank][round]"""
    return [[rank[field] for rank in own] for own in zip(*rounds, strict=True)]


def agreement(picture: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of two 8-bit pictures [H, W, 3]."""
    difference = np.abs(picture.astype(int) - other)
    return {"psnr_db": psnr(picture, other), "largest_difference": int(difference.max())}


# --- what it comes to -----------------------------------------------------------------------------


def print_rows(rows: list[dict[str, Any]], options: argparse.Namespace, job: Job) -> None:
    print(
        f"{options.model}, {options.width} x {options.height} px, {options.steps} steps, "
        f"{job.dtype}, {options.repeats} rounds\n"
    )
    columns = [
        "", "s", "(min - max)", "CPU s", "/ engine", "(min - max)", "MB loaded", "MB peak",
        "PSNR", "largest",
    ]  # fmt: skip
    cells: list[list[object]] = []
    for row in rows:
        if "not_run" in row:
            cells.append([row["title"], "not run", *[None] * 8])
            continue
        s, ratio = row["s"], row["to_engine"]
        cells.append([
            row["title"], s.median, f"({s.min:.3g} - {s.max:.3g})", row["cpu_s"].median,
            ratio and ratio.median, ratio and f"({ratio.min:.3g} - {ratio.max:.3g})",
            f"{max(row['loaded_mb']):.0f}", f"{max(row['peak_mb']):.0f}",
            row.get("psnr_db"), row.get("largest_difference"),
        ])  # fmt: skip
    common.print_table(columns, cells)
    print()
    for row in rows:
        if "not_run" in row:
            print(f"{row['title']}: not run: {row['not_run']}")
    print()


def draw(rows: list[dict[str, Any]], pictures: dict[str, np.ndarray], plt: Any) -> Any:
    """Seconds and memory as bars; below, what each has painted."""
    run = [row for row in rows if "not_run" not in row]
    figure = plt.figure(figsize=(11, 2.2 + 0.4 * len(rows) + 2.3), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.4 + 0.4 * len(rows), 2.5))
    left, right = above.subplots(1, 2)
    _draw_bars(left, rows, [row.get("s") for row in rows])
    left.set_title("seconds of a picture; the line is from min to max")
    peaks = [Noise.of([max(row["peak_mb"])]) if "s" in row else None for row in rows]
    _draw_bars(right, rows, peaks)
    right.set_title("MB at the peak, of the rank that has most")
    right.set_yticklabels([])
    for axes, row in zip(below.subplots(1, max(1, len(run)), squeeze=False)[0], run, strict=False):
        axes.imshow(pictures[row["peer"]])
        psnr = f"\n{row['psnr_db']:.1f} dB to the engine's" if "psnr_db" in row else "\n"
        axes.set_title(row["title"] + psnr, fontsize=8)
        axes.set_axis_off()
    return figure


def _draw_bars(axes: Any, rows: list[dict[str, Any]], values: list[Noise | None]) -> None:
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            axes.text(0, place, " not run", va="center", color="#8a8a8a")
            continue
        axes.barh(place, value.median, 0.6, color=COLOURS[SHADES.get(row["peer"], "softmax")])
        axes.hlines(place, value.min, value.max, color="black", lw=1.2)
        text = f" {value.median:.0f}" if value.median >= 100 else f" {value.median:.3g}"
        axes.annotate(text, (value.max, place), va="center")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)


def aims(rows: list[dict[str, Any]]) -> list[Aim]:
    found = {row["peer"]: row for row in rows}
    psnr = found.get("diffusers", {}).get("psnr_db")
    return [Aim("PSNR of diffusers' picture to the engine's, dB", psnr, 40, at_most=False)]


def main() -> None:
    options = parse_arguments()
    common.machine()
    with tempfile.TemporaryDirectory(prefix="linfusion-engine-") as name:
        folder = Path(name)
        job, peers = job_of(options, folder), chosen(options)
        measured, reasons = measure(peers, job, options.repeats, folder)
        pictures = {n: np.asarray(Image.open(folder / f"{n}.png").convert("RGB")) for n in measured}
    rows = table_of(peers, measured, reasons, pictures)
    print_rows(rows, options, job)
    common.finish("peers", options, {"rows": rows}, aims(rows), partial(draw, rows, pictures))
    if options.only and reasons:
        sys.exit("\n".join(f"{name}: not run: {reason}" for name, reason in reasons.items()))


if __name__ == "__main__":
    main()
