"""A worker of two ranks, spoken to by lines: one loaded model, picture after picture."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.pictures import by_pillow

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120
SMALL = {"height": 96, "width": 64, "steps": 4}


class Worker:
    """The launcher's process, what it says, and the processes that belong to it."""

    def __init__(self, *flags):
        command = [
            *[sys.executable, "-m", "launch", "--nproc-per-node", "2", "--grace-s", "15"],
            *["--module", "engine.worker", "--device", "cpu", "--stall-s", "60", *flags],
        ]
        self.launcher = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, start_new_session=True, text=True, bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._events, self._log = queue.Queue(), []
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=lambda: self._log.extend(self.launcher.stderr), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self):
        for line in self.launcher.stdout:
            self._events.put(json.loads(line))

    def say(self, **line):
        self.launcher.stdin.write(json.dumps(line) + "\n")

    def ask(self, name, output, **settings):
        self.say(id=name, settings={**SMALL, "output": str(output), **settings})

    def until(self, event, **facts):
        """Events up to one of this kind, which is the last."""
        seen = []
        while not seen or {**seen[-1], **facts, "event": event} != seen[-1]:
            seen.append(self._events.get(timeout=PATIENCE_S))
        return seen

    def end(self):
        """(exit code, what was said on stderr); no process is left."""
        code = self.launcher.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return code, "".join(self._log)


@contextmanager
def worker(*flags):
    over = Worker(*flags)
    try:
        yield over
    finally:
        over.launcher.stdin.close()
        children = (
            psutil.Process(over.launcher.pid).children() if over.launcher.poll() is None else []
        )
        over.launcher.kill()
        over.launcher.wait()
        _, left = psutil.wait_procs(children, timeout=10)  # they go with the launcher
        for process in left:
            process.kill()
        assert not left, f"still running: {left}"


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """The folder of a picture of 12 steps that nothing happened to, and of its preview."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {**SMALL, "output": str(folder / "a.png"), "steps": 12}
    with worker("--model", tiny_model) as over:
        over.say(id="a", preview=str(folder / "a.jpg"), settings=settings)
        assert over.until("end")[-1]["outcome"] == "done"
    return folder


def test_jobs_are_painted_in_order_and_mistakes_are_theirs(tiny_model, tmp_path):
    with worker("--model", tiny_model, "--steps", "9") as over:
        over.ask("a", tmp_path / "a.png", seed=1)
        over.ask("b", tmp_path / "b.png", steps=0)
        over.ask("c", tmp_path / "c.txt")
        over.ask("d", tmp_path / "d.png", stall_s=3)
        over.say(id="e", settings="none")
        over.launcher.stdin.write("no job\n")
        over.ask("f", tmp_path / "f.png", seed=1)
        over.launcher.stdin.close()
        events = over.until("end", id="f")
        assert over.end()[0] == 0
    assert events[0] == {"event": "ready"}
    ends = [(e["id"], e["outcome"], e["said"]) for e in events if e["event"] == "end" and e["id"]]
    assert [end[:2] for end in ends] == [
        ("a", "done"), ("b", "mistake"), ("c", "mistake"), ("d", "mistake"), ("e", "mistake"),
        ("f", "done"),
    ]  # fmt: skip
    assert ends[1][2] == "steps: 0 is too small; 1 or more would work"
    assert "no writer for .txt files" in ends[2][2]
    assert "is of the whole worker" in ends[3][2]
    strays = [e["said"] for e in events if e["event"] == "end" and e["id"] is None]
    assert strays == ["'no job' is no job"]
    steps = [(e["step"], e["steps"]) for e in events if e["event"] == "progress" and e["id"] == "a"]
    assert (4, 4) in steps
    assert (by_pillow(tmp_path / "a.png") == by_pillow(tmp_path / "f.png")).all()


def test_a_cancelled_job_ends_after_its_step_and_the_next_begins(tiny_model, tmp_path):
    with worker("--model", tiny_model) as over:
        over.ask("a", tmp_path / "a.png", steps=500)
        over.ask("b", tmp_path / "b.png")
        over.ask("c", tmp_path / "c.png")
        over.until("progress", id="a", phase="painting", step=2)
        over.say(cancel="b")
        over.say(cancel="a")
        assert over.until("end")[-1]["outcome"] == "stopped"
        assert over.until("end")[-1] == {
            "event": "end", "id": "b", "outcome": "stopped", "said": "cancelled before it began",
        }  # fmt: skip
        assert over.until("end", id="c")[-1]["outcome"] == "done"
    assert not (tmp_path / "a.png").exists()
    assert not (tmp_path / "b.png").exists()


def test_told_to_stop_it_keeps_a_checkpoint_for_another_worker(tiny_model, tmp_path, whole):
    output = tmp_path / "a.png"
    with worker("--model", tiny_model) as over:
        over.ask("a", output, steps=12)
        over.until("progress", phase="painting", step=3)
        over.launcher.send_signal(signal.SIGTERM)
        assert over.until("end")[-1]["outcome"] == "stopped"
        assert over.end()[0] == 75
    with worker("--model", tiny_model) as over:
        over.ask("a", output, steps=12, resume=True)
        events = over.until("end")
        assert events[-1]["outcome"] == "done"
    first = next(event for event in events if event["event"] == "progress")
    assert first["step"] >= 3
    assert (by_pillow(output) == by_pillow(whole / "a.png")).all()


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_lost_rank_ends_it(tiny_model, tmp_path, victim):
    with worker("--model", tiny_model) as over:
        over.ask("a", tmp_path / "a.png", steps=500)
        over.until("progress", phase="painting", step=2)
        ranks = psutil.Process(over.launcher.pid).children()
        ranks[victim].kill()
        code, log = over.end()
    assert code == 3
    assert f"error: rank {victim} on host " in log
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps: 0 is too small"),
        (["--mesh.image", "2"], "mesh.image: a worker paints one picture at a time"),
        (["--frobnicate"], "--frobnicate: unknown flag"),
    ],
)
def test_a_mistake_in_the_base_ends_it_at_once(flags, said):
    with worker(*flags) as over:
        code, log = over.end()
    assert code == 2
    assert f"error: {said}" in log


def test_the_picture_in_the_making_can_be_looked_at(whole):
    with Image.open(whole / "a.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (64, 96))
        assert np.asarray(picture).std() > 1
