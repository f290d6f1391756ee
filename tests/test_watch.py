"""A rank that dies, halts or hangs is named by the others, in bounded time."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from engine import watch
from engine.bands import open_mesh
from engine.watch import Beat, LostRank, Watch, watching
from tests.ranks import run_ranks, started_ranks


def quick():
    """Beats and bounds of a watch that has little patience."""
    watch.BEAT_S, watch.DEAD_S = 0.1, 5.0


def end_well(mesh):
    quick()
    with watching(mesh, 60) as over:
        over.doing("painting")
        mesh.barrier()
    return True


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_end_well_are_left_alone(ranks):
    assert run_ranks(ranks, end_well) == [True] * ranks


def live_through(mesh, folder):
    quick()
    said = []
    over = Watch(mesh, 60, end=said.append)
    (folder / f"{mesh.rank}.runs").touch()
    while not (folder / "goes on").exists():
        time.sleep(0.01)
    time.sleep(10 * watch.BEAT_S)
    over.close()
    return said


def test_a_job_that_is_halted_as_a_whole_and_goes_on_is_left_alone(tmp_path):
    """As by Ctrl-Z, or by a scheduler that suspends it for a more urgent one."""
    with started_ranks(2, live_through, tmp_path) as (ranks, receivers):
        while len(list(tmp_path.glob("*.runs"))) < 2:
            time.sleep(0.01)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in ranks:
                os.kill(process.pid, number)
            time.sleep(7)  # longer than `quick` has patience
        (tmp_path / "goes on").touch()
        assert [receiver.recv() for receiver in receivers] == [(True, []), (True, [])]


def tell_and_end(folder, mesh, said):
    """With a rank gone, nobody can take leave of all others in good order."""
    part = folder / f"{mesh.rank}.part"
    part.write_text(said)
    part.rename(folder / str(mesh.rank))
    os._exit(0)


def told(folder, ranks):
    """What each of `ranks` has said, once they have."""
    deadline = time.monotonic() + 240  # far more than it takes, on a busy machine too
    while not all((folder / str(rank)).exists() for rank in ranks):
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.05)
    return [(folder / str(rank)).read_text() for rank in ranks]


def wait_and_tell(mesh, folder, victim, how):
    """What the others say when one rank stops being there."""
    quick()
    said = []
    over = Watch(mesh, 60, end=said.append)
    over.doing("counting sheep")
    mesh.barrier()
    time.sleep(3 * watch.BEAT_S)  # until all have said so
    if mesh.rank == victim:
        how()
    while not said:
        time.sleep(0.05)
    tell_and_end(folder, mesh, said[0])


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def test_a_first_rank_that_has_spoken_and_ended_is_not_taken_for_the_culprit(monkeypatch):
    """This rank, which comes second, was about to notice the third one's silence too."""
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    over = Watch.__new__(Watch)
    over._mesh, over._host, over._stall_s = SimpleNamespace(rank=1), "here", 1e9
    over._last = {rank: Beat(rank, "here", "painting", 9, 0, False) for rank in range(3)}
    over._answered = clock.now
    over._heard = {0: clock.now, 1: clock.now, 2: clock.now - watch.DEAD_S + 1}
    clock.now += watch.DEAD_S - 1
    assert over._verdict(watch.DEAD_S) is None
    clock.now += 2
    assert over._verdict(watch.DEAD_S).startswith("rank 2 on host here has stopped")
    assert not over._speaks(watch.DEAD_S)
    over._heard[2] = over._answered
    assert over._verdict(watch.DEAD_S).startswith("rank 0 on host here has stopped")
    assert over._speaks(watch.DEAD_S)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def halt():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (0, die),
        pytest.param(1, die, marks=pytest.mark.long),
        (2, die),
        pytest.param(0, halt, marks=pytest.mark.long),
        (1, halt),
        pytest.param(2, halt, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_is_gone_is_named_by_the_first_of_the_others(tmp_path, victim, how):
    with started_ranks(3, wait_and_tell, tmp_path, victim, how):
        first, other = told(tmp_path, sorted({0, 1, 2} - {victim}))
    assert first.startswith(f"rank {victim} on host ")
    assert first.endswith("has stopped (killed, halted, cut off) while: counting sheep")
    assert other == ""


def lose_the_first(mesh, folder):
    """Two ranks on each of two hosts, by their names, and the one that serves the store dies."""
    quick()
    watch.socket.gethostname = lambda: f"host{mesh.rank // 2}"
    said = []
    Watch(mesh, 60, end=said.append)
    mesh.barrier()
    time.sleep(3 * watch.BEAT_S)
    if mesh.rank == 0:
        die()
    while not said:
        time.sleep(0.05)
    tell_and_end(folder, mesh, said[0])


def test_every_host_says_that_the_first_rank_is_gone(tmp_path):
    """They do not hear each other any more either: for all that they know, the network is gone."""
    with started_ranks(4, lose_the_first, tmp_path):
        neighbour, first, second = told(tmp_path, [1, 2, 3])
    assert neighbour.startswith("rank 0 on host host0 has stopped")
    assert (first, second) == (neighbour, "")


class CutOff:
    """A store that does not answer. As torch's do, it takes one call at a time."""

    def __init__(self):
        self.called, self._turn = threading.Event(), threading.Lock()

    def set(self, *_):
        with self._turn:
            self.called.set()
            threading.Event().wait()


def close_without_a_store(mesh):
    quick()
    over = Watch(mesh, 60)
    over._store = CutOff()
    over._store.called.wait()
    over.close()
    return True


def test_taking_leave_does_not_wait_for_a_store_that_is_cut_off():
    assert run_ranks(1, close_without_a_store) == [True]


def hang_or_wait(mesh, victim):
    """One rank sleeps in a call that does not return; the others wait for it in a collective."""
    quick()
    said = []
    over = Watch(mesh, 3.0, end=lambda text: (said.append(text), os._exit(3)))
    over.doing("painting")
    if mesh.rank == victim:
        over.doing("reading a disk that does not answer")
        time.sleep(600)
    with suppress(RuntimeError):  # the other one may have ended already
        mesh.barrier()
    time.sleep(600)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_job(victim):
    with started_ranks(2, hang_or_wait, victim) as (ranks, _):
        for process in ranks:
            process.join(90)
        assert [process.exitcode for process in ranks] == [3, 3]


def hang_and_tell(mesh):
    quick()
    said = []
    over = Watch(mesh, 3.0, end=said.append)
    over.doing("waiting" if mesh.rank else "reading a disk that does not answer")
    if mesh.rank == 0:
        time.sleep(9)
    mesh.barrier()
    return said


def test_who_hangs_is_told_from_who_waits():
    first, _ = run_ranks(2, hang_and_tell)
    assert first[0].startswith("rank 0 on host ")
    assert " has not moved for " in first[0]
    assert first[0].endswith("while: reading a disk that does not answer")


def work_for_long(mesh):
    """Far longer than the watch has patience, but never in one call."""
    quick()
    said = []
    over = Watch(mesh, 0.5, end=said.append)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if mesh.rank == 0:
            sum(range(1000))
        else:
            time.sleep(0.01)
    mesh.barrier()
    over.close()
    return said


def test_work_is_no_stall():
    assert run_ranks(2, work_for_long) == [[], []]


def explain_a_loss(mesh, folder, victim):
    try:
        with watching(mesh, 60) as over:
            over.doing("painting")
            mesh.barrier()
            time.sleep(4 * watch.BEAT_S)
            if mesh.rank == victim:
                die()
            mesh.barrier()
    except LostRank as lost:
        tell_and_end(folder, mesh, f"{lost.speaks} {lost}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_failed_collective_is_explained_by_one_rank(tmp_path, victim):
    with started_ranks(3, explain_a_loss, tmp_path, victim):
        first, other = told(tmp_path, sorted({0, 1, 2} - {victim}))
    assert first.startswith(f"True rank {victim} on host ")
    assert first.endswith("has stopped (killed, halted, cut off) while: painting")
    assert other == first.replace("True", "False")


def fail_alone(mesh, stall_s=60):
    with watching(mesh, stall_s):
        raise ArithmeticError("of one's own")


def test_a_failure_of_ones_own_stays_what_it_is():
    with open_mesh() as mesh, pytest.raises(ArithmeticError, match="of one's own"):
        fail_alone(mesh)


def fail_and_rest(mesh):
    quick()
    with suppress(ArithmeticError):
        fail_alone(mesh, stall_s=7)
    time.sleep(10)  # were the watch still there, this process would be gone
    return True


def test_who_catches_a_failure_is_not_watched_any_more():
    assert run_ranks(1, fail_and_rest) == [True]


def test_a_rank_that_is_alone_is_watched_for_not_moving():
    said = []
    with open_mesh() as mesh:
        quick_watch = Watch(mesh, 2.0, end=said.append)
        quick_watch.doing("reading a disk that does not answer")
        time.sleep(6)
        quick_watch.close()
    assert said[0].startswith("rank 0 on host ")
    assert said[0].endswith("while: reading a disk that does not answer")
