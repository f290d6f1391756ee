"""One job on two hosts that share nothing but a cable: painted, killed, cut off, resumed.

The hosts are network namespaces (`tests/namespaces.py`). Nothing resolves their names, as on many a
real machine, so ranks meet only where the launcher tells them by which interface.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine import watch
from tests import namespaces as harness
from tests.pictures import by_pillow

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing())),
]

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120  # far more than the watch has, on a busy machine
STEPS = 60  # enough to be in the midst of them when the fifth is seen
FLAGS = [
    *["--model", "demo", "--device", "cpu", "--height", 64, "--width", 64, "--steps", STEPS],
    *["--seed", 3, "--mesh.guidance", 1],  # one band each, so that rows travel in every layer
    *["--progress", "plain", "--resume", "--checkpoint.every", 1],
]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
_ports = itertools.count(29500)  # none is free again at once


@pytest.fixture(scope="module")
def hosts():
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(harness.two_hosts())
        except harness.Refused as error:
            pytest.skip(f"no network namespaces to be had here: {error}")


class Job:
    """A launcher on each of two hosts, one rank each, and what they say."""

    def __init__(self, hosts, output):
        self.hosts, self.logs = hosts, [output.with_suffix(f".{node}.log") for node in (0, 1)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        where = ["--nnodes", 2, "--master-addr", hosts[0].address, "--master-port", next(_ports)]
        self.launchers = [
            host.start(
                [
                    *[sys.executable, "-m", "launch", *where, "--node-rank", node],
                    *["--nproc-per-node", 1, "--output", output, *FLAGS],
                ],
                log,
                ENVIRONMENT,
            )
            for node, (host, log) in enumerate(zip(hosts, self.logs, strict=True))
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for node in (0, 1):
            self.kill(node)

    def kill(self, node):
        """The launcher and its ranks at once, as when a host loses power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launchers[node].pid, signal.SIGKILL)

    def said(self, node):
        return self.logs[node].read_text()

    def until_midst(self):
        """Wait for the fifth step."""
        deadline = time.monotonic() + PATIENCE_S
        while "step 5 of" not in self.said(0):
            running = all(launcher.poll() is None for launcher in self.launchers)
            assert running, (self.said(0), self.said(1))
            assert time.monotonic() < deadline, (self.said(0), self.said(1))
            time.sleep(0.02)

    def code(self, node):
        """The exit code of a launcher, once it has ended."""
        try:
            return self.launchers[node].wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"host {node} does not end: {self.said(0)}\n\n{self.said(1)}")

    def require_named(self, node, by):
        """The last word of one host is that the other one's rank is gone, and where it was."""
        last = self.said(by).splitlines()[-1]
        assert last.startswith(f"error: rank {node} on host {self.hosts[node].name} has stopped")


def require_painted(hosts, output, whole):
    """Started (again) on both hosts, the job ends well, with the picture of an undisturbed one."""
    with Job(hosts, output) as job:
        assert [job.code(0), job.code(1)] == [0, 0], (job.said(0), job.said(1))
    np.testing.assert_array_equal(by_pillow(output), whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The picture by two ranks on one host."""
    output = tmp_path_factory.mktemp("whole") / "a.png"
    command = [sys.executable, "-m", "launch", "--nproc-per-node", 2, "--output", output, *FLAGS]
    launcher = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **ENVIRONMENT}, start_new_session=True
    )
    try:
        assert launcher.wait(PATIENCE_S) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    return by_pillow(output)


def test_two_hosts_paint_what_one_paints(hosts, tmp_path, whole):
    require_painted(hosts, tmp_path / "a.png", whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_is_named_by_the_other_one(hosts, tmp_path, whole, victim):
    output, other = tmp_path / "a.png", 1 - victim
    with Job(hosts, output) as job:
        job.until_midst()
        job.kill(victim)
        assert job.code(other) == 3
        job.require_named(victim, by=other)
    assert not output.exists()
    require_painted(hosts, output, whole)


@pytest.mark.parametrize("end", [0, 1])
def test_hosts_that_are_cut_off_from_each_other_both_end(hosts, tmp_path, whole, end):
    """No connection is closed or refused: packets are lost, and that is all that happens."""
    output = tmp_path / "a.png"
    with Job(hosts, output) as job:
        job.until_midst()
        hosts[end].cut()
        try:
            assert [job.code(0), job.code(1)] == [3, 3]
        finally:
            hosts[end].mend()
        job.require_named(1, by=0)
        job.require_named(0, by=1)
    assert not output.exists()
    require_painted(hosts, output, whole)


def test_a_short_interruption_is_sat_out(hosts, tmp_path, whole):
    """Longer than the watch's store has to answer, shorter than the silence of the dead."""
    output = tmp_path / "a.png"
    with Job(hosts, output) as job:
        job.until_midst()
        hosts[0].cut()
        time.sleep(2 * watch._ANSWER_S)
        hosts[0].mend()
        assert [job.code(0), job.code(1)] == [0, 0], (job.said(0), job.said(1))
    np.testing.assert_array_equal(by_pillow(output), whole)
