"""What benchmarks share: a machine's statement, noise, pairs, tables, and a record of it all.

A figure without its noise says nothing, so whatever is timed is timed several times and given as
`Noise`: the median, and from where to where. Two things are compared in pairs, A B A B ..., so that
a machine that slows down meanwhile slows both; the ratio is the median of the pairs' ratios.

Each benchmark prints a table, then one line of JSON, and with `--output FOLDER` leaves NAME.json
and NAME.png there. The picture needs matplotlib, which is the extra `bench`.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

MB, GB = 1e6, 1e9

_ROOT = Path(__file__).parents[1]


# --- where it was measured ------------------------------------------------------------------------


@cache
def machine() -> dict[str, Any]:
    """What a reader has to know of the machine to make something of its figures."""
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "revision": _revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """The GPU, or else the CPU."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    with suppress(OSError):
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if named:
            return named[1].strip()
    return platform.machine()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _revision() -> str | None:
    """Of the working copy, with a + where files differ from it; None outside of one."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def machine_line() -> str:
    m = machine()
    return (
        f"{m['device']}, {m['cores']} cores, {m['threads']} threads, load {m['load_average']} "
        f"before; torch {m['torch']}, diffusers {m['diffusers']}, Python {m['python']}, "
        f"revision {m['revision'] or 'unknown'}, {m['date']}"
    )


# --- time, and its noise --------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Repeated measurements of one thing."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.min:.3g} - {self.max:.3g})"


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of this process, which hardly depend on what else runs; on a GPU its own time."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.process_time()
    function()
    return time.process_time() - begun


def in_turn(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    measure: Callable[[Callable[[], object]], float],
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Each function's measurements: A B C, A B C, ... `repeats` times, once before for nothing."""
    for function in functions.values() if warm_up else ():
        function()
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            measured[name].append(measure(function))
    return measured


def ratio(a: Sequence[float], b: Sequence[float]) -> Noise:
    """a / b, pair by pair."""
    return Noise.of([x / y for x, y in zip(a, b, strict=True)])


# --- processes ------------------------------------------------------------------------------------

# Freed tensors go back to the system at once, whatever their size, so that memory shows them.
_HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0"}


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process that has imported torch and done nothing else."""
    os.environ |= _HONEST_MALLOC  # the server of forks reads it when it starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers"])
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def peak_growth_mb(function: Callable[[], object], device: torch.device) -> float:
    """MB by which this process (its part of the GPU, on a GPU) grows at its peak in `function`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MB
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before_mb = resident_mb("VmRSS")
    function()
    return resident_mb("VmHWM") - before_mb


def resident_mb(field: str) -> float:
    """This process's memory now (VmRSS) or at its peak (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / MB


def start_peak_mb() -> float:
    """MB that this process has, resident or of the GPU; its peak starts anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MB
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def peak_mb() -> float:
    """At the peak since `start_peak_mb`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MB
    return resident_mb("VmHWM")


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on that many ranks of this machine; what each returned."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    results = elastic_launch(config, function)(*args)
    return [results[rank] for rank in range(ranks)]


# --- what is printed and kept ---------------------------------------------------------------------


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="of everything that is timed")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for NAME.json and NAME.png")
    return parser


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The first column to the left, all others to the right, as wide as they need."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        first, *others = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        print("  ".join([first, *(c.strip().rjust(len(c)) for c in others)]).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Aim:
    """What a figure should be: at most, or at least, so much. None was not measured."""

    name: str
    value: float | None
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        bound = f"at {'most' if self.at_most else 'least'} {self.limit:g}"
        return f"{self.name}: {_cell(self.value)} ({bound}: {verdict})"


def finish(
    name: str,
    options: argparse.Namespace,
    record: dict[str, Any],
    aims: Sequence[Aim] = (),
    draw: Callable[[Any], object] | None = None,
) -> None:
    """Print the aims and the last line, and keep both it and the picture that `draw` makes.

    Args:
        draw: is given matplotlib's pyplot and returns a figure.
    """
    for aim in aims:
        print(aim)
    print(f"\n{machine_line()}")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    judged = [{**asdict(aim), "met": aim.met} for aim in aims]
    whole = {"benchmark": name, "machine": machine(), "settings": settings, **record}
    line = json.dumps(_plain({**whole, "aims": judged}), allow_nan=False)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.json").write_text(line + "\n")
        if draw is not None:
            _draw(draw, options.output / f"{name}.png")
    print(line)


def _plain(value: Any) -> Any:
    """For JSON, which knows neither infinity nor noise."""
    if isinstance(value, Noise):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)


COLOURS = {"ours": "#0b6e99", "plain": "#7fb8cf", "naive": "#d9822b", "softmax": "#8a8a8a"}


def _draw(draw: Callable[[Any], Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "font.size": 9,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure = draw(plt)
        figure.savefig(path, dpi=140, bbox_inches="tight")
        plt.close(figure)
