"""A whole job by the engine's own API: seconds of each part, and memory of each rank.

    python -m benchmarks.end_to_end --ranks 1 2
    python -m benchmarks.end_to_end --config configs/demo_2048.yaml --ranks 2 --repeats 1

Starts its own ranks, which share this machine's cores or have a GPU each, and paints the picture of
a file of settings once for nothing (a base of one step, say, would measure the first use of
everything) and then `--repeats` times. A listener on each rank notes when each part ends:

    rung n       from the end of what was before to its last step: its steps, and for those above
                 the base the enlarging of the picture below (decoder, resize, encoder)
    decode, write        of the finished picture
    s            by the clock, of the rank that took longest; median, min and max of the repeats
    CPU s        of the rank that took most; unlike seconds, they hardly depend on what else runs
                 where a rank has one thread. Several count their waiting for each other as work,
                 which on a busy machine may be most of it
    MB           resident in each rank once the model is loaded, and at the peak of painting (of the
                 GPU's memory, on GPUs)

`--height`, `--width` and `--steps` replace those of the file.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks import common
from benchmarks.common import Noise
from engine.bands import Mesh, open_mesh
from engine.config import Settings
from engine.keeper import Control
from engine.pipeline import Engine
from engine.progress import Progress

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def parse_arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int)
    return parser.parse_args()


def settings_of(options: argparse.Namespace, folder: Path) -> Settings:
    """The file's, with what the flags replace; the picture goes to `folder`."""
    import yaml

    asked = yaml.safe_load(options.config.read_text())
    flags = {name: getattr(options, name) for name in ("height", "width", "steps")}
    asked |= {name: value for name, value in flags.items() if value is not None}
    output = folder / Path(asked.get("output", "picture.png")).name
    return Settings.model_validate({**asked, "output": output})


# --- on every rank --------------------------------------------------------------------------------


class Stopwatch:
    """Listens to an engine, and notes when each part ends: by the clock, and in CPU seconds."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float]] = {}
        self._last = self._now()
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        """The phases are told as they begin, steps as they end."""
        if progress.phase == "painting":
            if progress.step == progress.steps:
                self._end(f"rung {progress.rung}, {progress.size} px")
            return
        if self._phase:
            self._end(self._phase)
        self._phase = {"decoding": "decode", "writing": "write"}.get(progress.phase, "")

    def _end(self, part: str) -> None:
        now = self._now()
        self.parts[part] = (now[0] - self._last[0], now[1] - self._last[1])
        self._last = now

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def paint(options: argparse.Namespace, ranks: int, folder: Path) -> dict[str, Any]:
    """The job on this rank: memory, and (clock, CPU) seconds of each part and repeat."""
    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    torch.set_num_threads(max(1, common.machine()["cores"] // ranks))
    settings, current = settings_of(options, folder), [Stopwatch()]
    with open_mesh() as mesh:
        engine = Engine.load(settings, mesh, Control(tell=lambda told: current[0](told)))
        engine.generate(settings)
        loaded_mb = common.start_peak_mb()
        parts = [_once(engine, settings, mesh, current) for _ in range(options.repeats)]
        return {"loaded_mb": loaded_mb, "peak_mb": common.peak_mb(), "parts": parts}


def _once(
    engine: Engine, settings: Settings, mesh: Mesh, current: list[Stopwatch]
) -> dict[str, tuple[float, float]]:
    mesh.barrier()
    current[0] = Stopwatch()
    engine.generate(settings)
    return current[0].parts


# --- what it comes to -----------------------------------------------------------------------------


def measure(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="linfusion-engine-") as folder:
        results = common.on_ranks(ranks, paint, options, ranks, Path(folder))
    return {
        "ranks": ranks,
        "parts": slowest([result["parts"] for result in results]),
        "loaded_mb": [result["loaded_mb"] for result in results],
        "peak_mb": [result["peak_mb"] for result in results],
    }


def slowest(results: list[list[dict[str, tuple[float, float]]]]) -> dict[str, dict[str, Noise]]:
    """Of [rank][repeat][part] = (clock, CPU) seconds: the rank that took most, over the repeats."""
    names = list(results[0][0])
    table = {
        name: [
            [
                max(rank[repeat][name][clock] for rank in results)
                for repeat in range(len(results[0]))
            ]
            for clock in (0, 1)
        ]
        for name in names
    }
    table["all"] = [
        [sum(values) for values in zip(*(table[name][clock] for name in names), strict=True)]
        for clock in (0, 1)
    ]
    return {
        name: {"s": Noise.of(wall), "cpu_s": Noise.of(cpu)} for name, (wall, cpu) in table.items()
    }


def print_rows(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{options.config.name}, {options.repeats} repeats after a first\n")
    cells = []
    for row in rows:
        for name, part in row["parts"].items():
            s = part["s"]
            cells.append([
                f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}: {name}", s.median,
                f"({s.min:.3g} - {s.max:.3g})", part["cpu_s"].median,
            ])  # fmt: skip
    common.print_table(["", "s", "(min - max)", "CPU s"], cells)
    print()
    cells = [
        [f"{row['ranks']} ranks: rank {rank}", f"{loaded:.0f}", f"{peak:.0f}"]
        for row in rows
        for rank, (loaded, peak) in enumerate(zip(row["loaded_mb"], row["peak_mb"], strict=True))
    ]
    common.print_table(["memory of each rank, MB", "loaded", "peak"], cells)


def draw(rows: list[dict[str, Any]], plt: Any) -> Any:
    """Stacked seconds of the parts, with the noise of the whole, and each rank's memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = [name for name in rows[0]["parts"] if name != "all"]
    shades = plt.get_cmap("viridis")(
        [0.1 + 0.75 * i / max(1, len(names) - 1) for i in range(len(names))]
    )
    ticks = [f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}" for row in rows]
    bottoms = [0.0] * len(rows)
    for name, shade in zip(names, shades, strict=True):
        heights = [row["parts"][name]["s"].median for row in rows]
        left.bar(ticks, heights, 0.6, bottom=bottoms, color=shade, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for tick, bottom, row in zip(ticks, bottoms, rows, strict=True):
        whole = row["parts"]["all"]["s"]
        left.vlines(tick, whole.min, whole.max, color="black", lw=1.2)
        left.annotate(f" {whole.median:.1f}", (tick, max(whole.max, bottom)), va="bottom")
    left.set_title("seconds of a whole job, by parts; the line is from min to max")
    left.margins(y=0.12)
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for place, row in enumerate(rows):
        wide = 0.7 / row["ranks"]
        for rank, (loaded, peak) in enumerate(zip(row["loaded_mb"], row["peak_mb"], strict=True)):
            x = place + (rank - (row["ranks"] - 1) / 2) * wide
            right.bar(x, peak, 0.9 * wide, color=common.COLOURS["plain"])
            right.bar(x, loaded, 0.9 * wide, color="#d5d5d5")
    right.set_xticks(range(len(rows)), ticks)
    right.set_title("MB of each rank: loaded (grey), and at the peak")
    for axes in (left, right):
        axes.grid(axis="x", visible=False)
    return figure


def main() -> None:
    options = parse_arguments()
    common.machine()
    rows = [measure(ranks, options) for ranks in options.ranks]
    print_rows(rows, options)
    common.finish("end_to_end", options, {"rows": rows}, draw=partial(draw, rows))


if __name__ == "__main__":
    main()
