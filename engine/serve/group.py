"""One life of the group of ranks: the launcher's process, its pipes, its last words.

    python -m launch --nproc-per-node 8 --module engine.worker --config base.yaml
        stdin    {"id": "0a1b...", "settings": {...}, "preview": "/x.jpg"}   a job
                 {"cancel": "0a1b..."}
        stdout   {"event": "ready" | "begin" | "progress" | "end", ...}      an object a line
        stderr   for people; passed on, and its end kept: it says why a rank was lost

The launcher leads a process group of its own: Ctrl-C reaches the server alone, and whatever is left
of a group can be killed as a whole. If the server dies, the kernel tells the launcher to stop.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_LONGEST_LINE = 1 << 20
_WORDS_KEPT = 50
_LAST_LINES_S = 2.0  # for what is in the pipes when the launcher has ended
_POLL_S = 0.05


class Group:
    """A launcher that runs; made by `start`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._words: deque[str] = deque(maxlen=_WORDS_KEPT)
        self._given_up = asyncio.Event()
        assert process.stderr is not None
        self._log = asyncio.create_task(self._pass_on(process.stderr))

    @classmethod
    async def start(cls, command: Sequence[str], keep_open: Sequence[int] = ()) -> "Group":
        """`keep_open` are descriptors that it inherits."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            pass_fds=tuple(keep_open),
            start_new_session=True,
            preexec_fn=_end_with_the_server(),
        )
        return cls(process)

    @property
    def is_over(self) -> bool:
        """The launcher has ended; others may still hold its pipes."""
        return self._process.returncode is not None

    def send(self, message: dict[str, Any]) -> None:
        """A line on its stdin; if it is gone, its end will be noticed elsewhere."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, until all ranks have closed their stdout."""
        assert self._process.stdout is not None
        async for line in self._lines(self._process.stdout):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                yield event

    async def ended(self, patience_s: float) -> tuple[int, str]:
        """(exit code, why) once it has ended, by itself or not."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._until_over(), patience_s)
        self.kill()  # the launcher, or stragglers
        await self._until_over()
        await asyncio.wait({self._log}, timeout=_LAST_LINES_S)
        self.give_up()
        code = self._process.returncode or 0
        said = [line for line in self._words if line.startswith("error: ")]
        reason = said[-1].removeprefix("error: ") if said else f"the ranks ended with code {code}"
        return code, reason

    def give_up(self) -> None:
        """Read no more: a process that nobody can find any more may hold the pipes for ever."""
        self._given_up.set()

    def tell_to_stop(self) -> None:
        """Behind the step that is computed."""
        if not self.is_over:
            self._process.terminate()

    def kill(self, why: str | None = None) -> None:
        """All of it, at once; `why` is the reason that is given then."""
        if why is not None:
            self._words.append(f"error: {why}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _until_over(self) -> None:
        """`Process.wait` would, in some Pythons, also wait for who has inherited the pipes."""
        while not self.is_over:
            await asyncio.sleep(_POLL_S)

    async def _lines(self, pipe: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """Up to the end; a line that is too long to be one of ours is passed over."""
        given_up = asyncio.create_task(self._given_up.wait())
        try:
            while True:
                reading = asyncio.create_task(pipe.readline())
                await asyncio.wait({reading, given_up}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    return
                try:
                    line = reading.result()
                except ValueError:
                    continue
                if not line:
                    return
                yield line
        finally:
            given_up.cancel()

    async def _pass_on(self, log: asyncio.StreamReader) -> None:
        async for line in self._lines(log):
            words = line.decode(errors="replace").rstrip()
            self._words.append(words)
            with contextlib.suppress(OSError):  # nobody reads our log any more; the ranks go on
                print(words, file=sys.stderr, flush=True)


def _end_with_the_server() -> Callable[[], object]:
    """For the launcher, before it runs. The library is looked up here: after a fork is too late."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
