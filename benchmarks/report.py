"""All benchmarks in a few minutes, as one page with tables, plots and the machine's statement.

    python -m benchmarks.report                            # or: make bench
    python -m benchmarks.report --only communication projection --results FOLDER

Each runs by itself, in small: enough to see whether a figure still holds on this machine, not to
publish it. What each is told is on the page, with what it printed; the settings of a benchmark's
own are larger. One that fails is reported, with its last words, and does not stop the others.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import common

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Run:
    """A benchmark as the page has it.

    Attributes:
        arguments: on a CPU.
        on_gpu: the same on a GPU, if others.
        is_recorded: whether it keeps a record and a plot by `--output`.
    """

    title: str
    arguments: str
    on_gpu: str | None = None
    is_recorded: bool = True

    def chosen(self) -> list[str]:
        large = self.on_gpu is not None and torch.cuda.is_available()
        return (self.on_gpu or "" if large else self.arguments).split()


RUNS = {
    "attention": Run(
        "Linear attention", "--tokens 1024 4096 16384 --limit-s 4", "--repeats 10 --dtype bfloat16"
    ),
    "communication": Run("Communication", "--px 1024 4096 16384"),
    "projection": Run(
        "Projection to many GPUs, not measured", "--px 4096 16384 --timed-px 4096 --repeats 2", ""
    ),
    "scaling": Run(
        "Scaling",
        "--px 1024 --steps 4 --repeats 3 --modes guidance exact --no-weak",
        "--ranks 8 --px 4096 --steps 8 --repeats 5",
    ),
    "end_to_end": Run("A whole job", "--height 128 --width 192 --steps 8 --repeats 3", ""),
    "headline": Run(
        "A recipe, from the prompt to the last pixel",
        "--model demo --width 512 --height 256 --steps 8 --warm-up 128",
        "--model SDXL --height 8192 --set dtype=bfloat16",
    ),
    "mixers": Run(
        "Mixers: from a state space model to linear attention",
        "--steps 40 --pictures 64 --held-out 2 --batch 4",
        "",
    ),
    "peers": Run(
        "Beside its peers",
        "--height 256 --width 256 --steps 8 --repeats 3",
        "--ranks 8 --model SDXL --height 2048 --width 2048 --steps 20 --repeats 3",
    ),
    "quality": Run(
        "Quality: displaced mode, naive patches",
        "--ranks 2 --steps 8 --warmup 2 --pictures 1 --height 128 --width 128",
        is_recorded=False,
    ),
    "memory": Run("Memory", "--px 512 --repeats 1 --threads 1", is_recorded=False),
    "codec": Run(
        "Codec", "--px 512 --pictures 1 --statistics-px 256 --passes 0 2", is_recorded=False
    ),
    "output": Run("Files", "--px 2048 --ranks 1,2 --only png tif", is_recorded=False),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a run. `failure` is None where all went well."""

    name: str
    run: Run
    seconds: float
    printed: str
    failure: str | None

    @property
    def command(self) -> str:
        return " ".join(["python -m", f"benchmarks.{self.name}", *self.run.chosen()])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--timeout-s", type=float, default=900, help="of each benchmark")
    return parser.parse_args()


def run_one(name: str, run: Run, options: argparse.Namespace) -> Outcome:
    """In a process of its own, from the repository's root."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *run.chosen()]
    if run.is_recorded:
        command += ["--output", str(options.results.resolve())]
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=options.timeout_s
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return Outcome(name, run, options.timeout_s, said, f"took over {options.timeout_s:g} s")
    failure = None if done.returncode == 0 else _last_words(done.stderr, done.returncode)
    return Outcome(name, run, time.perf_counter() - begun, done.stdout, failure)


def _last_words(stderr: str, code: int) -> str:
    return "\n".join([f"ended with code {code}", *stderr.strip().splitlines()[-8:]])


# --- the page -------------------------------------------------------------------------------------


def page(outcomes: Sequence[Outcome], folder: Path) -> str:
    seconds = sum(outcome.seconds for outcome in outcomes)
    return "\n\n".join([
        "# Benchmarks",
        f"Made by `python -m benchmarks.report` in {seconds / 60:.1f} minutes, in small: each with "
        "the settings above its table. Times on a machine that does other things too are noisy; "
        "most tables say how much. Aims are for the sizes of a benchmark's own settings, and some "
        "of them are missed in small.",
        _machine_table(),
        *_warnings(),
        *(_section(outcome, folder) for outcome in outcomes),
    ]) + "\n"  # fmt: skip


def _machine_table() -> str:
    lines = [f"| {key.replace('_', ' ')} | {value} |" for key, value in common.machine().items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _warnings() -> list[str]:
    load, cores = common.machine()["load_average"], common.machine()["cores"]
    if load <= 0.5 * cores:
        return []
    return [
        f"**The machine was busy before any of this ran: load {load} on {cores} cores.** Seconds "
        "and speed-ups are of what was left of it, and ranks of several threads wait for each "
        "other in CPU seconds too. Bytes, memory, errors and CPU seconds of one thread hold."
    ]


def _section(outcome: Outcome, folder: Path) -> str:
    parts = [f"## {outcome.run.title}", f"`{outcome.command}`, {outcome.seconds:.0f} s"]
    if outcome.failure:
        parts.append(f"**Failed:**\n\n```text\n{outcome.failure}\n```")
    if table := table_of(outcome.printed):
        parts.append(f"```text\n{table}\n```")
    picture = folder / f"{outcome.name}.png"
    if picture.exists() and outcome.run.is_recorded and not outcome.failure:
        parts.append(f"![{outcome.run.title}]({picture.name})")
    return "\n\n".join(parts)


def table_of(printed: str) -> str:
    """What was printed, less the line of JSON."""
    lines = [line.rstrip() for line in printed.splitlines() if not line.startswith("{")]
    return "\n".join(lines).strip("\n")


def write_page(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Anew after each run, so that what is there is there."""
    path = folder / "REPORT.md"
    path.write_text(page(outcomes, folder))
    return path


def main() -> None:
    options = parse_arguments()
    options.results.mkdir(parents=True, exist_ok=True)
    common.machine()
    outcomes: list[Outcome] = []
    for name in options.only:
        print(f"{name}: {' '.join(RUNS[name].chosen())} ...", flush=True)
        outcomes.append(run_one(name, RUNS[name], options))
        path = write_page(outcomes, options.results)
        print(f"  {outcomes[-1].failure or 'done'}, {outcomes[-1].seconds:.0f} s", flush=True)
    print(path)
    if any(outcome.failure for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
