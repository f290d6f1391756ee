"""No rank waits for ever for another one: who has stopped, where, and what it was doing.

    with watching(mesh, stall_s) as watch:
        watch.doing("lake.png, rung 2, step 7 of 20")     # whenever there is progress

Each rank has a thread that writes into a store of the job, twice a second, what the rank is doing,
and for how long its program has not moved: that is, its stack is the same, down to the instruction,
as it is while a call does not return, and it neither computes nor reads nor writes meanwhile (a
wait for other ranks may compute, in circles). A rank that is killed or halted stops writing into
the store. Where no rank moves, all but one wait for another, and that one is the culprit. Whichever
live rank comes first in the order of ranks then says so in one line, and all end with exit code 3:

    error: rank 3 on host node07 has stopped (killed, halted, cut off) while: lake.png, rung 2

A collective that fails because a peer is gone raises in the middle of some layer. Then the watch
looks up which rank has fallen silent, and `LostRank` is raised instead, so that the line is the
same however the others learn of it. The store is served by the first rank. If it is that one which
has gone, or a cable, nobody can ask it, and that tells who it was; then one rank of every host says
so, since it cannot know what is left of the others. A rank that is alone keeps a store to itself,
and is watched for not moving.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch.distributed

from engine import bands
from engine.bands import Mesh
from engine.bands.store import open_store
from engine.exits import FAILED

BEAT_S = 0.5
DEAD_S = 30.0
"""without a beat for so long a rank is not running; some calls let no other thread run meanwhile"""
GONE_S = 3.0
"""the same, where a collective has failed, so that some rank must be gone"""
_ANSWER_S = 4.0  # in which the store must answer
_BUSY = 0.2  # of a core: the watch itself takes a little
_EXCHANGES = (Path(bands.__file__).parent, Path(torch.distributed.__file__).parent)


class LostRank(RuntimeError):
    """Some rank is gone. `speaks` is whether this rank is the one to say so."""

    def __init__(self, said: str, speaks: bool) -> None:
        super().__init__(said)
        self.speaks = speaks


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself.

    Attributes:
        count: of its beats: whoever reads it twice knows whether the rank is alive.
        quiet_s: for how long its program has not moved.
        waits: whether that is in an exchange with other ranks.
    """

    rank: int
    host: str
    doing: str
    count: int
    quiet_s: float
    waits: bool
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host}"


class Watch:
    """One rank's part in the watch; see the module docstring.

    Args:
        stall_s: without progress for that long, a rank counts as hanging.
        end: what to do when some rank has; by default the process ends at once.
    """

    def __init__(
        self, mesh: Mesh, stall_s: float, end: Callable[[str], object] | None = None
    ) -> None:
        self._mesh, self._stall_s, self._end = mesh, stall_s, end or _end
        self._host = socket.gethostname()
        self._doing, self._watched = "starting", threading.get_ident()
        self._stack: tuple[object, ...] = ()
        self._since = self._looked = time.monotonic()
        self._work: tuple[float, int] = (0.0, 0)
        self._count, self._over = 0, threading.Event()
        self._last: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}  # when each rank's last beat came
        self._store, self._answered = open_store(mesh, _ANSWER_S), time.monotonic()
        self._tell()
        mesh.barrier()
        self._ask()
        self._threads = [
            threading.Thread(target=target, name="watch", daemon=True)
            for target in (self._talk, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def doing(self, what: str) -> None:
        """This is what the rank does from now on, in words. To say so is to move."""
        self._doing, self._since = what, time.monotonic()

    def close(self) -> None:
        """This rank has come to its end in good order, and none has to wait for its beats."""
        self.fall_silent()
        if any(thread.is_alive() for thread in self._threads):
            return  # within a call to a store that is cut off, where another one would wait for it
        with suppress(RuntimeError):  # the first rank may be gone already
            self._tell(ended=True)

    def fall_silent(self) -> None:
        """This rank has failed: from its silence the others learn it. It no longer judges either:
        whoever catches the failure may take all the time in the world."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=_ANSWER_S)

    def explain(self) -> LostRank | None:
        """Which rank has fallen silent, after a failure; None if all are there."""
        deadline = time.monotonic() + GONE_S + 2
        while time.monotonic() < deadline:
            if (said := self._verdict(GONE_S)) is not None:
                return LostRank(said, self._speaks(GONE_S))
            time.sleep(BEAT_S)
        return None

    # --- two threads ------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Tell, and ask what the others tell. A call to a store that is gone may never return."""
        while not self._over.wait(BEAT_S):
            with suppress(RuntimeError):  # torch's errors of a store are all of this kind
                self._tell()
                self._ask()

    def _judge(self) -> None:
        """Ends the process when something is wrong with the job."""
        looked = time.monotonic()
        while not self._over.wait(BEAT_S):
            if time.monotonic() - looked > DEAD_S / 2:
                self._forgive()
            looked = time.monotonic()
            if (said := self._verdict(DEAD_S)) is not None and not self._over.is_set():
                self._end(said if self._speaks(DEAD_S) else "")
                return

    def _forgive(self) -> None:
        """Count every silence from now on: this process has itself been halted (Ctrl-Z, a scheduler
        that suspends a job), so it has heard nobody, and the others have perhaps been so too."""
        self._answered = time.monotonic()
        self._heard.update(dict.fromkeys(self._heard, self._answered))

    def _tell(self, ended: bool = False) -> None:
        quiet, waits = self._look()
        self._count += 1
        beat = Beat(self._mesh.rank, self._host, self._doing, self._count, quiet, waits, ended)
        self._store.set(f"beat/{self._mesh.rank}", json.dumps(asdict(beat)))

    def _ask(self) -> None:
        for rank in range(self._mesh.size):
            beat = Beat(**json.loads(self._store.get(f"beat/{rank}")))
            if rank not in self._last or self._last[rank].count != beat.count:
                self._heard[rank] = time.monotonic()
            self._last[rank] = beat
        self._answered = time.monotonic()

    def _look(self) -> tuple[float, bool]:
        """For how long the watched program has not moved, and whether it waits for other ranks."""
        frame = top = sys._current_frames().get(self._watched)
        stack: list[object] = []
        while frame is not None:
            stack.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        file = Path(top.f_code.co_filename) if top else Path()
        waits = any(file.is_relative_to(folder) for folder in _EXCHANGES)
        halted = time.monotonic() - self._looked > DEAD_S / 2  # and could not move
        works = self._works()
        if tuple(stack) != self._stack or (works and not waits) or halted:
            self._stack, self._since = tuple(stack), time.monotonic()
        return time.monotonic() - self._since, waits

    def _works(self) -> bool:
        """Whether this process has computed, or read or written a disk, since the last look."""
        now, disk = time.monotonic(), psutil.Process().io_counters()
        work = time.process_time(), disk.read_bytes + disk.write_bytes
        computed, moved = work[0] - self._work[0], work[1] - self._work[1]
        passed, self._looked, self._work = now - self._looked, now, work
        return computed > _BUSY * passed or moved > 0

    def _verdict(self, silent_s: float) -> str | None:
        """What is wrong with the job, if anything is, taking silence of that long for the end."""
        now = time.monotonic()
        if now - self._answered > silent_s:
            gone = self._late(silent_s) or self._last[0]  # whose store it is
            return None if gone.ended else _stopped(gone)
        running = [beat for beat in self._last.values() if not beat.ended]
        for beat in running:
            # As the store last told: when it does not answer, nobody's beats come, but that is it.
            if self._answered - self._heard[beat.rank] > silent_s:
                return _stopped(beat)
        if running and all(beat.quiet_s > self._stall_s for beat in running):
            # The others wait for it.
            last = min(running, key=lambda beat: (beat.waits, -beat.quiet_s))
            return f"{last} has not moved for {last.quiet_s:.0f} s while: {last.doing}"
        return None

    def _late(self, silent_s: float) -> Beat | None:
        """Who had been silent for nearly that time when the store last answered: the first rank
        has seen so too, said so, and ended, and with it the store. Not for times of a few beats.
        """
        if silent_s < DEAD_S:
            return None
        running = (beat for beat in self._last.values() if not beat.ended)
        late = (b for b in running if self._answered - self._heard[b.rank] > silent_s - GONE_S)
        return next(late, None)

    def _speaks(self, silent_s: float) -> bool:
        """Whether this is the first rank that is alive, of all or of those that it can hear."""
        now = time.monotonic()
        if now - self._answered > silent_s:
            if self._late(silent_s) is not None:
                return False
            # Nothing is heard of others, and those on other hosts may be as good as gone: each host
            # has a word in its own log.
            here = [rank for rank, beat in self._last.items() if beat.host == self._host]
            return self._mesh.rank == min((rank for rank in here if rank != 0), default=None)
        alive = [rank for rank, at in self._heard.items() if self._answered - at <= silent_s]
        return self._mesh.rank == min([*alive, self._mesh.rank])


def _stopped(beat: Beat) -> str:
    return f"{beat} has stopped (killed, halted, cut off) while: {beat.doing}"


def _end(said: str) -> None:
    if said:
        print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(FAILED)


@contextmanager
def watching(mesh: Mesh, stall_s: float) -> Iterator[Watch]:
    """A watch over the ranks of `mesh` while the block runs. Every rank makes the call.

    Raises:
        LostRank: instead of what the block raises where another rank is gone.
    """
    watch = Watch(mesh, stall_s)
    try:
        yield watch
    except Exception as error:
        lost = watch.explain()
        watch.fall_silent()
        if lost is not None:
            raise lost from error
        raise
    watch.close()
