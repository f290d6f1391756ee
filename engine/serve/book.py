"""All jobs: the bounded queue, and the records on disk that a restarted server reads.

    folder/0a1b.../job.json     the record, replaced as a whole
    folder/0a1b.../0a1b....png  the picture; beside it its Deep Zoom view, preview, checkpoint

In memory a change takes effect at once; its record follows, in a thread, in the same order. What a
server owes when it dies is what its records say: a restarted one reads them and goes on.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config import UserError
from engine.progress import Progress
from engine.serve.errors import ApiError
from engine.serve.jobs import FRESH_RECORD, RECORD, Files, Job, Mishap, Picture, Status, now_s
from engine.serve.metrics import Metrics

logger = logging.getLogger(__name__)
_DOOMED = ".removed-"
_LEAST_WAIT_S, _MOST_WAIT_S = 1, 600


class Book:
    """The jobs of one folder.

    Args:
        queue_limit: how many may wait.
        retries: how often a job is begun again that ended through no fault of its own.

    Attributes:
        on_work: is called whenever a job has come to wait.
        on_cancel: is called with a job in progress that is to stop.
    """

    def __init__(self, folder: Path, queue_limit: int, retries: int, metrics: Metrics) -> None:
        self.folder = folder.absolute()
        self.on_work: Callable[[], None] = lambda: None
        self.on_cancel: Callable[[Job], None] = lambda job: None
        self._limit, self._retries, self._metrics = queue_limit, retries, metrics
        self._jobs: dict[str, Job] = {}  # the oldest first
        self._waiting: deque[Job] = deque()
        self._begun: dict[str, float] = {}  # when, by the monotonic clock
        self._last_ns = 0
        self._in_order = asyncio.Lock()  # records are written one after the other
        self._saves: set[asyncio.Task[None]] = set()

    def files(self, job: Job) -> Files:
        """Where its files are."""
        return Files(self.folder, job)

    # --- asking -----------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job:
        """Raises ApiError: there is no such job."""
        if job_id not in self._jobs:
            raise ApiError(404, "there is no such job", "not_found", "id")
        return self._jobs[job_id]

    def page(self, limit: int, after: str | None) -> tuple[list[Job], bool]:
        """(the newest jobs, or those that are older than `after`; whether there are more)."""
        oldest = (1 << 64) if after is None else self.get(after).created_ns
        jobs = [job for job in reversed(self._jobs.values()) if job.created_ns < oldest]
        return jobs[:limit], limit < len(jobs)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    # --- users ------------------------------------------------------------------------------------

    async def add(self, pictures: Sequence[Picture], model: str) -> list[Job]:
        """New jobs, all or none; they wait, and their records are on disk.

        Raises:
            ApiError: the queue is full, or the disk.
        """
        if len(self._waiting) + len(pictures) > self._limit:
            self._metrics.refused.inc()
            raise ApiError(
                429,
                f"{len(self._waiting)} jobs wait already, and {self._limit} may; come back later",
                "queue_full",
                headers={"Retry-After": str(self._wait_s())},
            )
        jobs = [Job.of(picture, model, self._next_ns()) for picture in pictures]
        self._jobs |= {job.id: job for job in jobs}
        self._waiting.extend(jobs)  # their places are taken; they may begin before they are saved
        self._count()
        try:
            for job in jobs:
                await self._save(job)
        except OSError as error:
            for job in jobs:
                self.cancel(job)
            raise ApiError(507, f"the record cannot be kept: {error.strerror}", "disk") from error
        self.on_work()
        return jobs

    def cancel(self, job: Job) -> None:
        """At once where it waits; one in progress ends behind its step."""
        if job.status == "queued":
            self._waiting = deque(other for other in self._waiting if other is not job)
            self._end(job, "cancelled")
        elif job.status == "in_progress" and not job.cancelling:
            job.cancelling = True
            job.told()
            self.on_cancel(job)

    async def remove(self, job: Job) -> None:
        """A job that has ended, with all its files."""
        self._jobs.pop(job.id, None)
        async with self._in_order:
            await asyncio.to_thread(_remove, self.folder, job.id)

    # --- the ranks --------------------------------------------------------------------------------

    def begin(self) -> Job | None:
        """The next job, which is in progress now."""
        if not self._waiting:
            return None
        job = self._waiting.popleft()
        job.status, job.live, job.started_at = "in_progress", {}, job.started_at or now_s()
        self._begun[job.id] = time.monotonic()
        self._changed(job)
        return job

    def progressed(self, job: Job, progress: Progress) -> None:
        """What the ranks tell while they paint."""
        job.live = asdict(progress)
        self._metrics.progress.set(progress.share)
        job.tell(("progress", job.live))

    def ended(self, job: Job, outcome: str, said: str) -> None:
        """What the ranks say at the end of a job."""
        self._stop_clock(job)
        if outcome == "done":
            self._end(job, "completed")
        elif job.cancelling:
            self._end(job, "cancelled")
        elif outcome == "stopped" or (outcome == "mistake" and self._is_stale(job)):
            self._wait_again(job)  # stopped, but not by a user: by a signal
        else:
            code = "mistake" if outcome == "mistake" else "engine_failed"
            self._fail(job, Mishap(code=code, message=said))

    def lost(self, job: Job, reason: str) -> None:
        """The ranks have died in the middle of it."""
        self._stop_clock(job)
        job.attempts += 1
        if job.cancelling:
            self._end(job, "cancelled")
        elif job.attempts > self._retries:
            times = "" if job.attempts == 1 else f", {job.attempts} times; the last time"
            said = f"the ranks have died while painting it{times}: {reason}"
            self._fail(job, Mishap(code="ranks_lost", message=said))
        else:
            logger.warning("%s waits again: %s", job.id, reason)
            self._wait_again(job)

    def put_back(self, job: Job) -> None:
        """The service stops: the job is what it does first when it is back."""
        self._stop_clock(job)
        if job.cancelling:
            self._end(job, "cancelled")
        else:
            self._wait_again(job)

    def hang_up(self) -> None:
        """Nobody will hear anything any more."""
        for job in self._jobs.values():
            job.tell(None)

    # --- what happens to a job --------------------------------------------------------------------

    def _fail(self, job: Job, mishap: Mishap) -> None:
        job.error = mishap
        self._end(job, "failed")

    def _end(self, job: Job, status: Status) -> None:
        job.status, job.cancelling, job.completed_at = status, False, now_s()
        self._metrics.count(job)
        if job.status != "completed":
            self._later(asyncio.to_thread(self.files(job).remove_traces))
        self._changed(job)

    def _wait_again(self, job: Job) -> None:
        """Before all others: it was here first."""
        job.status, job.live = "queued", {}
        self._waiting.appendleft(job)
        self._changed(job)
        self.on_work()

    def _is_stale(self, job: Job) -> bool:
        """Whether it may be its checkpoint that does not fit, as of another configuration."""
        found = list(self.files(job).folder.glob(".*.checkpoint"))
        job.attempts += bool(found)
        for path in found:
            logger.warning("%s begins anew, without %s", job.id, path.name)
            path.unlink(missing_ok=True)
        return bool(found) and job.attempts <= self._retries

    def _stop_clock(self, job: Job) -> None:
        job.seconds += time.monotonic() - self._begun.pop(job.id)

    def _changed(self, job: Job) -> None:
        self._count()
        job.told()
        self._later(self._save(job))

    def _count(self) -> None:
        self._metrics.queue_length.set(len(self._waiting))
        if not self._begun:
            self._metrics.progress.set(0)

    def _next_ns(self) -> int:
        self._last_ns = max(self._last_ns + 1, time.time_ns())
        return self._last_ns

    def _wait_s(self) -> int:
        """Until there may be a place: when the job that is painted will be done, as it seems."""
        left = [self._jobs[name].live.get("eta_s") for name in self._begun if name in self._jobs]
        seconds = max((eta for eta in left if eta is not None), default=10.0)
        return int(min(max(seconds, _LEAST_WAIT_S), _MOST_WAIT_S))

    # --- the disk ---------------------------------------------------------------------------------

    def read(self) -> None:
        """All records, before anything else; what was begun or waited waits."""
        for path in self.folder.glob(f"{_DOOMED}*"):
            shutil.rmtree(path, ignore_errors=True)
        found = (_read_record(path) for path in self.folder.glob(f"*/{RECORD}"))
        jobs = sorted((job for job in found if job is not None), key=lambda job: job.created_ns)
        self._jobs = {job.id: job for job in jobs}
        self._last_ns = max((job.created_ns for job in jobs), default=0)
        for job in jobs:
            if job.status == "in_progress":  # the server was killed in the middle of it
                job.attempts += 1
                job.status = "queued"
            if job.status == "queued" and job.attempts > self._retries:
                said = f"the service has died while painting it, {job.attempts} times"
                job.status, job.completed_at = "failed", now_s()
                job.error = Mishap(code="ranks_lost", message=said)
            self._waiting.extend([job] if job.status == "queued" else [])
        self._count()

    async def flush(self) -> None:
        """Until every record is on disk, or could not be written."""
        while self._saves:
            await asyncio.gather(*self._saves)

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(_log_failure(work))
        self._saves.add(task)
        task.add_done_callback(self._saves.discard)

    async def _save(self, job: Job) -> None:
        async with self._in_order:
            if job.id in self._jobs:
                record = job.model_dump_json(indent=2)
                await asyncio.to_thread(_write, self.folder / job.id, record)


async def _log_failure(work: Any) -> None:
    """A full disk does not stop the service; what it has not kept it may do again."""
    try:
        await work
    except OSError as error:
        logger.error("a record is not kept: %s", error)


def _read_record(path: Path) -> Job | None:
    try:
        job = Job.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        logger.warning("%s: is no record of a job, and passed over: %s", path, error)
        return None
    return job if job.id == path.parent.name else None


def _write(folder: Path, record: str) -> None:
    """So that the old record or the new one is there, whenever the power goes."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / FRESH_RECORD
    with fresh.open("w", encoding="utf-8") as file:
        file.write(record)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / RECORD)


def _remove(root: Path, name: str) -> None:
    """Under another name first: half a job is never found under its own."""
    doomed = root / f"{_DOOMED}{name}"
    with contextlib.suppress(FileNotFoundError):
        (root / name).rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def lock(folder: Path, patience_s: float) -> int:
    """The folder for this server and its ranks alone; a descriptor that they inherit.

    The lock is held until the last of them is gone. So a restarted server does not paint beside
    ranks that its killed predecessor has left to finish their step.

    Raises:
        UserError: others hold it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"folder: {folder}: {reason}; name one that you may write to") from None
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"folder: {folder} is used by another server, or by ranks that one has left "
                    "behind; stop them, or name another folder"
                ) from None
            time.sleep(0.1)
