"""Strong and weak scaling of whole pictures, and where each rank's time goes.

    python -m benchmarks.scaling --ranks 2 --px 1024 --steps 4
    python -m benchmarks.scaling --ranks 8 --px 4096 --model FOLDER

Starts its own ranks: one thread each on a CPU, a GPU each where there are GPUs. One rank alone and
all of them together paint in turn, A B A B ..., in one run and in the same processes (those that
have nothing to do wait in a barrier, which takes no core), so that a machine that slows down slows
both. Printed for each mode:

    speed-up    seconds of the whole picture (steps, decoder, file) on one rank over those on N,
                pair by pair: median (min - max); weak scaling: N times as many rows on N ranks as
                on one, where the ideal is 1
    a step      seconds, likewise
    compute     share of a rank's painting that is no exchange, and of the exchanges by kind of
                layer; a rank that waits for a slower one waits in an exchange

    guidance    the two sides of guidance on two groups of ranks, which exchange nothing
    exact       bands over all ranks, each layer waiting for what it needs
    displaced   others' activations as they were a step ago
    softmax     the model without LinFusion's modules, keys and values gathered; against itself
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

import engine
from benchmarks import common
from benchmarks.common import Aim, Noise
from engine.bands import DisplacedExchange, ExactExchange, Exchange, Mesh, Traffic, open_mesh
from engine.bands.exchange import Halo
from engine.config import MeshSettings, Settings
from engine.keeper import Control
from engine.pipeline import Engine
from engine.progress import Progress

MODES = ("guidance", "exact", "displaced", "softmax")


def parse_arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--px", type=int, default=1024, help="side of the picture on one rank")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default="demo", help="'demo', a diffusers folder, or a hub id")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--no-weak", action="store_true", help="strong scaling only")
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error("--ranks must be 2 or more: one rank scales to nothing")
    if options.ranks % 2:
        options.modes = [mode for mode in options.modes if mode != "guidance"]
    return options


# --- time in exchanges ----------------------------------------------------------------------------


class Timed(Exchange):
    """Put before a mode, it notes the seconds that each kind of layer spends in exchanges."""

    seconds: Counter[str]

    def __init__(self, mesh: Mesh, traffic: Traffic, *args: Any, **kwargs: Any) -> None:
        super().__init__(mesh, traffic, *args, **kwargs)
        self.seconds = Counter()

    def halo_later(
        self, layer: object, x: Tensor, above: int, below: int, shared: bool = False
    ) -> Callable[[], Halo]:
        later = self._timed(
            layer, lambda: super(Timed, self).halo_later(layer, x, above, below, shared)
        )
        return lambda: self._timed(layer, later)

    def sum_later(self, layer: object, x: Tensor) -> Callable[[], Tensor]:
        later = self._timed(layer, lambda: super(Timed, self).sum_later(layer, x))
        return lambda: self._timed(layer, later)

    def gather(self, layer: object, x: Tensor, dim: int) -> Tensor:
        return self._timed(layer, lambda: super(Timed, self).gather(layer, x, dim))

    def _timed(self, layer: object, exchange: Callable[[], Any]) -> Any:
        self._synchronise()
        start = time.perf_counter()
        result = exchange()
        self._synchronise()
        kind = getattr(layer, "traffic_kind", type(layer).__name__)
        self.seconds[kind] += time.perf_counter() - start
        return result

    def _synchronise(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()


class TimedExact(Timed, ExactExchange):
    """Exact, with a stopwatch."""


class TimedDisplaced(Timed, DisplacedExchange):
    """Displaced, with a stopwatch."""


# --- on every rank --------------------------------------------------------------------------------


class Painter:
    """One mode on one mesh: paints, and tells the seconds of the whole and of a step."""

    def __init__(self, mode: str, mesh: Mesh, model: str) -> None:
        pipe = engine.load(model, "none" if mode == "softmax" else "auto").to(mesh.device)
        groups = 2 if mode == "guidance" and mesh.size > 1 else 1
        exact = mode != "displaced"
        made = TimedExact if exact else partial(TimedDisplaced, warmup_steps=1)
        self.exchanges: list[Timed] = []
        self._ends: list[float] = []
        control = Control(tell=self._hear)
        self._engine = Engine(pipe, mesh, groups, partial(self._keep, made), control=control)

    def _keep(self, made: Callable[..., Timed], mesh: Mesh, traffic: Traffic) -> Timed:
        self.exchanges.append(made(mesh, traffic))
        return self.exchanges[-1]

    def _hear(self, progress: Progress) -> None:
        if progress.phase == "painting":
            self._ends.append(time.perf_counter())

    def paint(self, settings: Settings) -> dict[str, float]:
        """Seconds of the whole picture and of a step, by the clock of this rank."""
        self._ends.clear()
        for exchange in self.exchanges:
            exchange.seconds.clear()
        start = time.perf_counter()
        self._engine.generate(settings)
        whole = time.perf_counter() - start
        steps = max(1, len(self._ends) - 1)
        return {"whole": whole, "step": (self._ends[-1] - self._ends[0]) / steps}

    def shares(self, whole: float) -> dict[str, float]:
        """Of the seconds of the last picture: computing, and exchanges by kind of layer."""
        exchanged = sum((exchange.seconds for exchange in self.exchanges), Counter())
        shares = {kind: seconds / whole for kind, seconds in sorted(exchanged.items())}
        return {"compute": 1 - sum(shares.values()), **shares}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every mode's measurements on this rank."""
    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    with open_mesh() as mesh:
        mesh = mesh.on_device("auto")
        if mesh.device.type == "cpu":
            torch.set_num_threads(1)
        return [measure_mode(mode, mesh, options, folder) for mode in options.modes]


def measure_mode(
    mode: str, mesh: Mesh, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    alone = Painter(mode, Mesh(0, 1, mesh.device, None), options.model) if mesh.rank == 0 else None
    together = Painter(mode, mesh, options.model)
    row: dict[str, Any] = {"mode": mode}
    kinds = {"strong": options.px} | ({} if options.no_weak else {"weak": options.px * mesh.size})
    for kind, height in kinds.items():
        pairs, shares = [], {}
        for repeat in range(options.repeats + 1):
            one = settings_of("exact", options, options.px, folder / "one.png")
            mesh.barrier()
            first = alone.paint(one) if alone else {}
            mesh.barrier()
            every = together.paint(settings_of(mode, options, height, folder / "all.png"))
            shares = together.shares(every["whole"])
            if repeat:  # the first is for what is done once
                pairs.append((first, every))
        row[kind] = {"pairs": pairs, "shares": shares}
    return row


def settings_of(mode: str, options: argparse.Namespace, height: int, output: Path) -> Settings:
    mesh = MeshSettings(guidance="2" if mode == "guidance" else "1")
    return Settings(height=height, width=options.px, steps=options.steps, output=output, mesh=mesh)


# --- what it comes to -----------------------------------------------------------------------------


def summary(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of [rank][mode]: ratios by rank 0's clock, shares as the mean of the ranks."""
    table = []
    for of_ranks in zip(*rows, strict=True):
        for kind in ("strong", "weak"):
            if kind in of_ranks[0]:
                pairs = of_ranks[0][kind]["pairs"]
                both = {
                    name: ([a[name] for a, _ in pairs], [b[name] for _, b in pairs])
                    for name in ("whole", "step")
                }
                shares = [own[kind]["shares"] for own in of_ranks]
                each = {name: mean(own.get(name, 0) for own in shares) for name in shares[0]}
                table.append({
                    "mode": of_ranks[0]["mode"],
                    "scaling": kind,
                    "speedup": common.ratio(*both["whole"]),
                    "step_speedup": common.ratio(*both["step"]),
                    "alone_s": Noise.of(both["whole"][0]),
                    "together_s": Noise.of(both["whole"][1]),
                    "step_s": Noise.of(both["step"][1]),
                    "shares": each,
                })  # fmt: skip
    return table


def print_rows(table: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{options.ranks} ranks, {options.px} px, {options.steps} steps, {options.model}\n")
    columns = ["mode, scaling", "speed-up", "(min - max)", "of a step", "s alone", "s together"]
    cells = []
    for row in table:
        ratio = row["speedup"]
        cells.append([
            f"{row['mode']}, {row['scaling']}", ratio.median,
            f"({ratio.min:.3g} - {ratio.max:.3g})", row["step_speedup"].median,
            row["alone_s"].median, row["together_s"].median,
        ])  # fmt: skip
    common.print_table(columns, cells)
    print()
    kinds = list(dict.fromkeys(kind for row in table for kind in row["shares"]))
    cells = [
        [f"{row['mode']}, {row['scaling']}", *(percent(row["shares"].get(kind)) for kind in kinds)]
        for row in table
    ]
    common.print_table(["share of the time", *kinds], cells)
    print()


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def draw(table: list[dict[str, Any]], options: argparse.Namespace, plt: Any) -> Any:
    """Speed-ups with their noise, and shares of the time, stacked."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    ticks = [f"{row['mode']}\n{row['scaling']}" for row in table]
    for place, row in enumerate(table):
        ratio, ideal = row["speedup"], options.ranks if row["scaling"] == "strong" else 1
        left.bar(place, ratio.median, 0.6, color=common.COLOURS["ours"])
        left.vlines(place, ratio.min, ratio.max, color="black", lw=1.2)
        left.hlines(ideal, place - 0.4, place + 0.4, color=common.COLOURS["naive"])
        left.annotate(f"{ratio.median:.2f}", (place, ratio.max), ha="center", va="bottom")
    left.set_title(f"speed-up on {options.ranks} ranks; orange: the ideal")
    left.margins(y=0.12)
    kinds = list(dict.fromkeys(kind for row in table for kind in row["shares"]))
    shades = plt.get_cmap("viridis")(
        [0.1 + 0.8 * i / max(1, len(kinds) - 1) for i in range(len(kinds))]
    )
    bottoms = [0.0] * len(table)
    for kind, shade in zip(kinds, shades, strict=True):
        heights = [100 * row["shares"].get(kind, 0) for row in table]
        right.bar(range(len(table)), heights, 0.6, bottom=bottoms, color=shade, label=kind)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    right.set_title("% of the time of a rank")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.set_xticks(range(len(table)), ticks, fontsize=8)
        axes.grid(axis="x", visible=False)
    return figure


def main() -> None:
    options = parse_arguments()
    common.machine()
    with tempfile.TemporaryDirectory(prefix="linfusion-engine-") as folder:
        rows = common.on_ranks(options.ranks, measure, options, Path(folder))
    table = summary(rows)
    print_rows(table, options)
    aim = Aim("speed-up of the best mode, over ranks", best(table, options), 0.925, at_most=False)
    common.finish("scaling", options, {"rows": table}, [aim], partial(draw, table, options))


def best(table: list[dict[str, Any]], options: argparse.Namespace) -> float | None:
    """Efficiency of strong scaling; small pictures are about latency, and another matter."""
    ours = [row for row in table if row["scaling"] == "strong" and row["mode"] != "softmax"]
    if options.px < 1024 or not ours:
        return None
    return max(row["speedup"].median for row in ours) / options.ranks


if __name__ == "__main__":
    main()
