"""Real jobs by `python -m launch`: exit codes, signals, lost ranks, at random moments."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import launch.__main__ as launcher
from launch.__main__ import worst
from tests.pictures import by_pillow

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120


class Job:
    """A job of two ranks, its log, and the processes that belong to it."""

    def __init__(self, model, output, *flags):
        self.log = output.with_suffix(".log")
        command = [
            *[sys.executable, "-m", "launch", "--nproc-per-node", "2", "--grace-s", "15"],
            *["--model", model, "--output", output, "--device", "cpu", "--steps", "12"],
            *["--height", "96", "--width", "64", "--progress", "plain", "--stall-s", "60", *flags],
        ]
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip

    def until(self, words):
        """Wait for a line of the log, or for the end of the job."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.said() and self.launcher.poll() is None:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def ranks(self):
        return psutil.Process(self.launcher.pid).children()

    def end(self):
        """The exit code; no process of the job is left."""
        children = self.ranks() if self.launcher.poll() is None else []
        try:
            return self.launcher.wait(PATIENCE_S)
        finally:
            _, left = psutil.wait_procs(children, timeout=5)
            for process in left:
                process.kill()
            if self.launcher.poll() is None:
                os.killpg(self.launcher.pid, signal.SIGKILL)
            assert not left, f"still running: {left}"

    def said(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """The picture of a job that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "a.png"
    job = Job(tiny_model, output)
    assert job.end() == 0, job.said()
    return by_pillow(output)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0), ([2, 2], 2), ([75, 75], 75), ([75, 0], 75), ([3, 3], 3), ([-9, 3], 3),
        ([1], 3), ([2, 75], 3), ([75, -9], 3), ([0, -15], 3),
    ],
)  # fmt: skip
def test_the_exit_code_of_all(codes, code):
    assert worst(codes) == code


def variables(*words):
    """What a rank finds in its environment."""
    options, _ = launcher._parse(words)
    return launcher._environment(options, 0, 1)


SEVERAL = ["--nnodes", "2", "--master-port", "29500", "--master-addr"]


def test_ranks_of_one_host_meet_where_they_like():
    assert "GLOO_SOCKET_IFNAME" not in variables()


def test_hosts_that_are_this_one_are_not_told_an_interface():
    """tests/test_namespaces.py has the others."""
    assert "GLOO_SOCKET_IFNAME" not in variables(*SEVERAL, "127.0.0.1")


def test_an_interface_of_ones_own_choice_stays(monkeypatch):
    monkeypatch.setattr(launcher, "_interface_to", lambda host: "eth0")
    assert variables(*SEVERAL, "10.0.0.1")["GLOO_SOCKET_IFNAME"] == "eth0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert variables(*SEVERAL, "10.0.0.1")["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.slow
def test_a_mistake_is_code_2_and_one_sentence(tiny_model, tmp_path):
    job = Job(tiny_model, tmp_path / "a.png", "--heigth", "64")
    assert job.end() == 2
    assert job.said() == "error: --heigth: unknown flag; did you mean '--height'?\n"


@pytest.mark.slow
def test_a_failure_is_code_3(tiny_model, tmp_path):
    """A bug, as seen from outside: an attribute of the settings that nothing expects."""
    (tmp_path / "sitecustomize.py").write_text(
        "import engine.ladder, os\n"
        "def broken(*_): raise RuntimeError('broken on purpose')\n"
        "if os.environ.get('RANK'): engine.ladder.climb = broken\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "launch", "--nproc-per-node", "2", "--model", str(tiny_model),
         "--output", str(tmp_path / "a.png"), "--steps", "1", "--height", "64", "--width", "64"],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "broken on purpose" in done.stderr


def disturb(job, chance):
    """Something happens to a running job; the exit codes that it may have, and what it must say."""
    what = chance.choice(["term", "int", "term twice", "kill", "stop"])
    victim = chance.randrange(2)
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "int": signal.SIGINT}
    if what in ("kill", "stop"):
        job.ranks()[victim].send_signal(number[what])
        return what, {3}, f"rank {victim} on "
    job.launcher.send_signal(number.get(what, signal.SIGTERM))
    if what == "term twice":
        time.sleep(chance.random() * 0.2)
        job.launcher.send_signal(signal.SIGTERM)
    return what, {75}, "stopped as told"


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(5))
def test_whatever_happens_the_job_ends_and_is_resumed_to_the_same_picture(
    tiny_model, tmp_path, whole, attempt
):
    """Four disturbances each, at random steps; what can be resumed comes out to the bit."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it where the test fails
    chance, output = random.Random(seed), tmp_path / "a.png"
    for _ in range(4):
        job = Job(tiny_model, output, "--resume", "--checkpoint.every", "1")
        job.until(f"step {chance.randint(1, 12)} of 12")
        time.sleep(chance.random() * 0.1)
        if job.launcher.poll() is not None or not job.ranks():
            break  # it was quicker
        what, codes, said = disturb(job, chance)
        code = job.end()
        assert code in {0, *codes}, (what, code, job.said())
        assert code == 0 or said in job.said(), (what, job.said())
        if output.exists():  # what happens behind the last rename changes nothing
            np.testing.assert_array_equal(by_pillow(output), whole)
        assert output.exists() or code != 0
    job = Job(tiny_model, output, "--resume")
    assert job.end() == 0, job.said()
    np.testing.assert_array_equal(by_pillow(output), whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.log", "a.png"]


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_is_killed(tiny_model, tmp_path):
    job = Job(tiny_model, tmp_path / "a.png")
    job.until("step 1 of 12")
    ranks = job.ranks()
    job.launcher.kill()
    job.launcher.wait()
    _, left = psutil.wait_procs(ranks, timeout=30)
    for process in left:
        process.kill()
    assert not left


@pytest.mark.slow
def test_a_finished_job_has_nothing_to_do(tiny_model, tmp_path):
    for words in ("64x96 px in", "is finished already, nothing to do"):
        job = Job(tiny_model, tmp_path / "a.png", "--resume")
        assert job.end() == 0
        assert words in job.said()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_told_to_stop_while_the_ranks_are_starting(tiny_model, tmp_path, number):
    """As a terminal and Slurm tell it: the launcher and the ranks, all at once."""
    job = Job(tiny_model, tmp_path / "a.png")
    while len(job.ranks()) < 2:
        time.sleep(0.01)
    os.killpg(job.launcher.pid, number)
    assert job.end() == 75, job.said()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".a.png.checkpoint", "a.log"]
