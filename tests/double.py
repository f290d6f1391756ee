"""Ranks that only pretend: `engine.worker`'s protocol without a model, and mishaps at will.

    python -m launch --nproc-per-node 1 --module tests.double

What is to happen is in the prompt: `a lake pause_s=0.1 die=3`.

    pause_s=S    a step takes so long
    die=N        the ranks are lost at step N, the first time that this job is painted
    die_always=N ... every time
    straggler    ... and leave a process behind that holds the pipes
    stall=N      nothing happens any more at step N, whatever is asked
    mistake, fail    how the job ends
    chatter      lines that are no events
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from engine.output import Target, writer_for
from engine.output.pixels import halve
from engine.output.writer import leftovers, remove
from engine.progress import Progress


class Told:
    """What came by stdin and by signal."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.cancelled: set[str] = set()
        self.stop = False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        threading.Thread(target=self._listen, daemon=True).start()

    def _note(self, number: int, frame: Any) -> None:
        self.stop = True

    def _listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "cancel" in message:
                self.cancelled.add(message["cancel"])
            else:
                self.jobs.put(message)
        self.jobs.put(None)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    config = parser.parse_args().config
    base = yaml.safe_load(config.read_text()) if config else {}
    if base.get("model") == "refused":
        print("error: model: 'refused' is refused", file=sys.stderr)
        return 2
    if base.get("model") == "dies":
        print("error: rank 0 on host x has stopped while: loading", file=sys.stderr)
        return 3
    told = Told()
    say({"event": "ready"})
    while not told.stop:
        try:
            job = told.jobs.get(timeout=0.05)
        except queue.Empty:
            continue
        if job is None:
            return 0
        say({"event": "begin", "id": job["id"]})
        outcome, said = paint(job, told)
        say({"event": "end", "id": job["id"], "outcome": outcome, "said": said})
    return 75


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def wishes_of(prompt: str) -> dict[str, float]:
    pairs = [word.partition("=") for word in prompt.split()]
    return {name: float(value or 1) for name, _, value in pairs if (value or 1) != "" and ok(value)}


def ok(value: str) -> bool:
    return value.replace(".", "").isdigit() or value == ""


def paint(job: dict[str, Any], told: Told) -> tuple[str, str]:
    settings, wishes = job["settings"], wishes_of(job["settings"]["prompt"])
    path = Path(settings["output"])
    checkpoint = path.with_name(f".{path.name}.checkpoint")
    if "mistake" in wishes:
        return "mistake", "height: this size is a mistake"
    if "fail" in wishes:
        return "failed", "out of memory"
    first = int(checkpoint.read_text()) if settings["resume"] and checkpoint.exists() else 0
    for step in range(first, settings["steps"] + 1):
        tell(job, step, settings)
        if "chatter" in wishes:
            print('not an event\n[1]\n{"event": "progress", "id": 3}\n' + "x" * 3_000_000)
        if "preview" in job:
            preview(Path(job["preview"]), step)
        died = path.with_name("died")
        if wishes.get("die_always") == step or (wishes.get("die") == step and not died.exists()):
            died.touch()
            if "straggler" in wishes:
                command = [sys.executable, "-c", "import time; time.sleep(600)", "straggler"]
                path.with_name("straggler").write_text(
                    str(subprocess.Popen(command, start_new_session=True).pid)
                )
            print("error: rank 1 on host x has stopped while: painting", file=sys.stderr)
            sys.stderr.flush()
            os._exit(3)
        while wishes.get("stall") == step:
            time.sleep(1)
        if told.stop or job["id"] in told.cancelled:
            checkpoint.write_text(str(step))
            return "stopped", "stopped as told"
        time.sleep(wishes.get("pause_s", 0.01))
    write(path, settings)
    checkpoint.unlink(missing_ok=True)
    return "done", f"{path}: done"


def tell(job: dict[str, Any], step: int, settings: dict[str, Any]) -> None:
    size, steps = f"{settings['width']}x{settings['height']}", settings["steps"]
    left_s = (steps - step) * 0.1 if step else None
    progress = Progress(
        Path(settings["output"]).name, "painting", 0, 1, size, step, steps, step / steps, left_s
    )
    say({"event": "progress", "id": job["id"], **asdict(progress)})


def preview(path: Path, step: int) -> None:
    fresh = path.with_suffix(".new")
    y, x = np.mgrid[:90, :120]
    pixels = np.stack([x * 2, y * 2, np.full_like(x, 20 * step % 256)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(fresh, "jpeg")
    fresh.replace(path)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A landscape of sorts: sky, a hill, water; the seed is its hue."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    hue = seed % 7 / 7
    sky = np.stack([90 + 120 * y, 120 + 60 * hue + 40 * y, 200 - 60 * y], -1)
    hill = y > 0.55 + 0.15 * np.sin(5 * x + seed)
    sky[hill] = np.stack([30 + 40 * x, 60 + 50 * (1 - y), 50 + 30 * hue * x], -1)[hill]
    return sky.clip(0, 255).astype(np.uint8)


def write(path: Path, settings: dict[str, Any]) -> None:
    pixels = picture(settings["height"], settings["width"], settings["seed"])
    write_by_engine(path, pixels, settings["prompt"])
    if settings["file"]["view"]:
        write_by_engine(path.with_suffix(".dzi"), pixels, settings["prompt"])


def write_by_engine(path: Path, pixels: np.ndarray, prompt: str) -> None:
    """After a kill it clears up first, as `engine.saving` does."""
    target = Target(path, *pixels.shape[:2])
    writer = writer_for(path)
    writer.restore(path)
    for left in leftovers(path):
        remove(left)
    part = writer(target, 0)
    for level in range(writer.levels(target)):
        part.write(range(len(pixels)), pixels, level)
        pixels = halve(pixels)
    writer.assemble(target, [part.close()], {"prompt": prompt})


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
