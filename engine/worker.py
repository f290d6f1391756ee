"""Paint pictures as another program asks for them: jobs on stdin, events on stdout, JSON by line.

    python -m launch --nproc-per-node 8 --module engine.worker --config base.yaml

    {"id": "7", "settings": {"prompt": "a lake", "output": "/pictures/7.png"}}       jobs, in order:
    {"id": "8", "settings": {...}, "preview": "/pictures/8.jpg"}     settings over those of the base
    {"cancel": "7"}                                            now, or before it begins

    {"event": "ready"}                                         jobs are taken
    {"event": "begin", "id": "7"}
    {"event": "progress", "id": "7", ...}                      as `--progress json` has it
    {"event": "end", "id": "7", "outcome": "done", "said": "..."}    or as `engine.painter` says

A model stays loaded until a job wants another. `preview` is a small JPEG of the picture in the
making, replaced every few seconds. A mistake in a job is its outcome; one in the base settings ends
the worker with 2. At the end of stdin it paints what it was given and ends with 0; told to stop
(SIGTERM), it keeps a checkpoint and ends with 75; if a rank is lost, all end with 3.
"""

import contextlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.bands import Mesh
from engine.config import Settings, UserError
from engine.exits import DONE, STOPPED
from engine.jobs import JOB_WIDE
from engine.parsing import Given, flat, gather, judge, nested
from engine.progress import Progress
from engine.session import leave, quiet, run, said_once
from engine.signals import note_signals
from engine.watch import Watch

_POLL_S = 0.1
_PREVIEW_S = 2.0


@dataclass(frozen=True)
class Order:
    """What is to be done next, the same on every rank.

    Attributes:
        job: its line, or None for nothing yet.
        over: there will be no more.
    """

    job: Mapping[str, Any] | None = None
    over: bool = False


@dataclass
class Inbox:
    """What has come on stdin; only the first rank reads it, in a thread of its own."""

    jobs: deque[Mapping[str, Any]] = field(default_factory=deque)
    cancelled: set[str] = field(default_factory=set)
    at_end: bool = False

    def read(self, lines: Any) -> None:
        for line in lines:
            self.take(line)
        self.at_end = True

    def take(self, line: str) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if isinstance(said, dict) and isinstance(said.get("cancel"), str):
            self.cancelled.add(said["cancel"])
        elif isinstance(said, dict) and isinstance(said.get("id"), str):
            self.jobs.append(said)
        elif line.strip():
            _tell("end", id=None, outcome="mistake", said=f"{line.strip()[:80]!r} is no job")

    def next(self) -> Order:
        over = self.at_end  # looked at first: what was read before the end is there then
        return Order(self.jobs.popleft()) if self.jobs else Order(over=over)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    base, mistake = _read_base(argv)
    told = note_signals()

    def work(mesh: Mesh, watch: Watch) -> tuple[int, str]:
        quiet(mesh)
        return _serve(base, mesh, watch, told)

    settings = Settings() if mistake else judge(Settings, base.values, base)
    return run(settings.timeout_s, settings.stall_s, work, mistake)


def _serve(base: Given, mesh: Mesh, watch: Watch, told: Callable[[], bool]) -> tuple[int, str]:
    """Take job after job. Ranks meet every tenth of a second, so none waits for stdin."""
    from engine.keeper import Control
    from engine.painter import Painter

    inbox, desk = Inbox(), _Desk(watch, told)
    if mesh.rank == 0:
        desk.inbox = inbox
        _tell("ready")  # before anything is said about what comes
        threading.Thread(target=inbox.read, args=(sys.stdin,), daemon=True).start()
    painter = Painter(mesh, Control(desk.tell, desk.should_stop, desk.look))
    while not mesh.any(told()):
        watch.doing("waiting for a job")
        order = mesh.gather_objects(inbox.next() if mesh.rank == 0 else Order())[0]
        if order.over:
            return DONE, ""
        if order.job is None:
            time.sleep(_POLL_S)
            continue
        desk.begin(order.job)
        if mesh.any(desk.should_stop()):
            desk.end("stopped", "cancelled before it began")
        else:
            desk.end(*_paint(painter, base, order.job))
    return STOPPED, ""


def _paint(painter: Any, base: Given, job: Mapping[str, Any]) -> tuple[str, str]:
    """(outcome, what to say about it) of one job, the same on every rank."""
    try:
        settings = _settings_of(base, job)
    except UserError as mistake:
        return "mistake", str(mistake)
    outcome = painter.paint(settings)
    return outcome.word, outcome.said


def _settings_of(base: Given, job: Mapping[str, Any]) -> Settings:
    values = job.get("settings", {})
    if not isinstance(values, dict):
        raise UserError("settings: not a group of settings; write an object")
    own = flat(values)
    for name in JOB_WIDE:
        if name in own:
            raise UserError(f"{name}: is of the whole worker; start it with that")
    tree = nested({**flat(base.values), **own})
    return judge(Settings, tree, Given({}, {}, None, {}))


class _Desk:
    """The job at hand, as the painter tells of it; the first rank passes it on."""

    def __init__(self, watch: Watch, told: Callable[[], bool]) -> None:
        self._watch, self._told = watch, told
        self._id, self._shown = "", 0.0
        self._preview: Path | None = None
        self.inbox: Inbox | None = None

    def begin(self, job: Mapping[str, Any]) -> None:
        preview = job.get("preview")
        self._id, self._preview = job["id"], Path(preview) if preview else None
        if self.inbox is not None:
            _tell("begin", id=self._id)

    def end(self, word: str, said: str) -> None:
        if self.inbox is not None:
            _tell("end", id=self._id, outcome=word, said=said)

    def tell(self, progress: Progress) -> None:
        self._watch.doing(str(progress))
        if self.inbox is not None:
            _tell("progress", id=self._id, **asdict(progress))

    def should_stop(self) -> bool:
        return self._told() or (self.inbox is not None and self._id in self.inbox.cancelled)

    def look(self, glimpse: Callable[[], np.ndarray]) -> None:
        """Show the picture in the making now and then.

        No room for that, on the disk or on the GPU, is no reason to end it.
        """
        if self.inbox is None or self._preview is None:
            return
        if time.monotonic() < self._shown + _PREVIEW_S:
            return
        self._shown = time.monotonic()
        part = self._preview.with_name(f".{self._preview.name}.part")
        with contextlib.suppress(OSError, torch.OutOfMemoryError):
            Image.fromarray(glimpse()).save(part, "JPEG", quality=85)
            part.replace(self._preview)


def _tell(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def _read_base(argv: Sequence[str] | None) -> tuple[Given, UserError | None]:
    """The base settings, judged once by themselves, and what is wrong with them."""
    with said_once():
        try:
            given = gather(Settings, argv, prog="python -m engine.worker")
            given = Given(given.flags, given.over(given.values), given.file, {})
            settings = judge(Settings, given.values, given)
            if settings.mesh.image > 1:
                raise UserError("mesh.image: a worker paints one picture at a time; leave it out")
            return given, None
        except UserError as error:
            return Given({}, {}, None, {}), error


if __name__ == "__main__":
    leave(main())
