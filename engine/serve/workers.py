"""The ranks, kept at work: started, fed one job at a time, watched, and started again.

A group that dies is followed by another one, after a pause that doubles as long as none of them
finishes a job. What the dead one was painting goes back into the queue (`Book.lost`). Only a
mistake in the base configuration, which no restart mends, ends the service.
"""

import asyncio
import contextlib
import logging
import sys
import time
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engine.exits import FAILED, MISTAKEN
from engine.progress import Progress
from engine.serve.asked import for_ranks
from engine.serve.book import Book
from engine.serve.group import Group
from engine.serve.jobs import Job
from engine.serve.metrics import Metrics
from engine.serve.settings import Base, ServeSettings

logger = logging.getLogger(__name__)
_PROGRESS = TypeAdapter(Progress)
_LONGEST_PAUSE_S = 60.0
_LAST_WORDS_S = 60.0  # between the end of stdout and the end of the launcher
_LOOK_S = 0.5


def command_of(settings: ServeSettings, base: Base) -> list[str]:
    """What starts the ranks."""
    ranks = [] if settings.ranks is None else ["--nproc-per-node", str(settings.ranks)]
    config = [] if base.path is None else ["--config", str(base.path)]
    return [sys.executable, "-m", "launch", *ranks, "--module", settings.worker, *config]


class Workers:
    """Keeps a group at work on the jobs of `book`.

    Args:
        keep_open: descriptors that the group inherits.

    Attributes:
        ready: jobs are taken.
    """

    def __init__(
        self,
        settings: ServeSettings,
        base: Base,
        book: Book,
        metrics: Metrics,
        keep_open: tuple[int, ...] = (),
    ) -> None:
        self.ready = False
        self._settings, self._base, self._book, self._metrics = settings, base, book, metrics
        self._keep_open = keep_open
        self._group: Group | None = None
        self._job: Job | None = None
        self._stopping = asyncio.Event()
        self._heard_s = 0.0  # when something was last heard of the ranks
        self._has_finished = False  # this group, a job
        book.on_work, book.on_cancel = self._feed, self._cancel

    async def run(self) -> str | None:
        """Until told to stop; or a sentence, if no group can ever start."""
        failures = 0
        while not self._stopping.is_set():
            code, reason, was_ready = await self._live()
            if self._stopping.is_set():
                break
            if code == MISTAKEN and not was_ready:
                return reason
            self._metrics.restarts.inc()
            failures = 0 if self._has_finished else failures + 1
            pause_s = min(self._settings.restart_pause_s * 2 ** min(failures, 20), _LONGEST_PAUSE_S)
            logger.warning("the ranks are gone (%s); again in %.1f s", reason, pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
        return None

    def stop(self) -> None:
        """Behind the step that is computed, which may be waited for by `run`."""
        self._stopping.set()
        self._be_ready(False)
        if self._group is not None:
            self._group.tell_to_stop()

    def kill(self) -> None:
        """At once, when stopping takes too long."""
        if self._group is not None:
            self._group.kill()

    # --- one group --------------------------------------------------------------------------------

    async def _live(self) -> tuple[int, str, bool]:
        """(exit code, why, whether it was ready) of a group, from its start to its end."""
        try:
            group = await Group.start(command_of(self._settings, self._base), self._keep_open)
        except OSError as error:  # no memory, no processes: it may pass
            return FAILED, f"cannot be started: {error}", False
        self._group, self._has_finished, self._heard_s = group, False, time.monotonic()
        if self._stopping.is_set():  # meanwhile
            group.tell_to_stop()
        watch = asyncio.create_task(self._watch(group))
        was_ready = False
        try:
            async for event in group.events():
                self._heard_s = time.monotonic()
                was_ready = was_ready or event.get("event") == "ready"
                self._heed(event)
            code, reason = await group.ended(_LAST_WORDS_S)
        finally:
            watch.cancel()
            self._group = None
            self._be_ready(False)
        if (job := self._take()) is not None:
            self._book.put_back(job) if self._stopping.is_set() else self._book.lost(job, reason)
        return code, reason, was_ready

    def _heed(self, event: dict[str, Any]) -> None:
        is_ours = self._job is not None and event.get("id") == self._job.id
        match event.get("event"):
            case "ready":
                self._be_ready(not self._stopping.is_set())
                self._feed()
            case "progress" if is_ours and self._job is not None:
                with contextlib.suppress(ValidationError):  # not what we know as progress
                    self._book.progressed(self._job, _PROGRESS.validate_python(event))
            case "end" if is_ours and (job := self._take()) is not None:
                outcome = str(event.get("outcome"))
                self._has_finished = self._has_finished or outcome == "done"
                self._book.ended(job, outcome, str(event.get("said")))
                self._feed()

    def _feed(self) -> None:
        """The next job, if there is one, to ranks that have none."""
        if self._group is None or not self.ready or self._job is not None:
            return
        self._job = self._book.begin()
        if self._job is None:
            return
        self._heard_s = time.monotonic()
        files = self._book.files(self._job)
        settings = for_ranks(self._job, self._base, str(files.picture))
        self._group.send({"id": self._job.id, "settings": settings, "preview": str(files.preview)})

    def _cancel(self, job: Job) -> None:
        if self._group is not None and job is self._job:
            self._group.send({"cancel": job.id})

    async def _watch(self, group: Group) -> None:
        """Ranks that hang, all of them, and pipes that stragglers hold."""
        while True:
            await asyncio.sleep(_LOOK_S)
            has_to_speak = self._job is not None or not self.ready
            silent_s = time.monotonic() - self._heard_s
            if has_to_speak and silent_s > self._settings.silence_s:
                group.kill(f"not a word from the ranks for {silent_s:.0f} s")
                return
            elif group.is_over:
                group.kill()
                await asyncio.sleep(_LOOK_S)
                group.give_up()
                return

    def _take(self) -> Job | None:
        job, self._job = self._job, None
        return job

    def _be_ready(self, ready: bool) -> None:
        self.ready = ready
        self._metrics.ready.set(ready)
