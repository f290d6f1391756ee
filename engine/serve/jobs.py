"""One job: what to paint, how far it is, and who listens.

A `Job` is a record that is kept on disk as JSON, and a few fields that only live: the last progress
and the listeners. The words of its status are those of OpenAI's long jobs:

    queued -> in_progress -> completed | failed | cancelled
                  |  ^
                  v  |   the ranks have died, or the service was stopped
                 queued

A listener gets what is so at once, and then everything that happens, up to the end.
"""

import asyncio
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED: frozenset[str] = frozenset({"completed", "failed", "cancelled"})
OutputFormat = Literal["png", "jpeg", "webp"]
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
RECORD, FRESH_RECORD = "job.json", ".job.json.new"
ID_PATTERN = r"^[0-9a-f]{24}$"

Event = tuple[Literal["status", "progress", "end"], dict[str, Any]]
"""what a listener hears: its name, and what it says"""


class Picture(BaseModel):
    """What to paint, nothing left open."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str
    height: int
    width: int
    seed: int
    steps: int
    guidance_scale: float
    output_format: OutputFormat
    user: str | None = None


class Mishap(BaseModel):
    """Why there is no picture: `mistake` is the user's, the others are not."""

    code: Literal["mistake", "engine_failed", "ranks_lost"]
    message: str


class Job(BaseModel):
    """A picture that was asked for.

    Attributes:
        created_ns: since 1970, different for each job: their order.
        seconds: how long the ranks have been at it, over all attempts.
        attempts: how often it was begun and not ended, for no fault of its own.
        cancelling: told to stop, and has not yet.
        live: the last progress that the ranks told.
    """

    id: str = Field(pattern=ID_PATTERN)
    created_ns: int
    picture: Picture
    model: str
    status: Status = "queued"
    started_at: int | None = None
    completed_at: int | None = None
    seconds: float = 0.0
    attempts: int = 0
    error: Mishap | None = None
    cancelling: bool = Field(default=False, exclude=True)
    live: dict[str, Any] = Field(default={}, exclude=True)

    _listeners: list["asyncio.Queue[Event | None]"] = PrivateAttr(default_factory=list)

    @classmethod
    def of(cls, picture: Picture, model: str, created_ns: int) -> "Job":
        """A new one."""
        return cls(id=secrets.token_hex(12), created_ns=created_ns, picture=picture, model=model)

    @property
    def ended(self) -> bool:
        """Nothing will happen to it any more."""
        return self.status in ENDED

    @property
    def file_name(self) -> str:
        """Of the picture."""
        return f"{self.id}{SUFFIXES[self.picture.output_format]}"

    @property
    def size(self) -> str:
        """As OpenAI writes it: the width first."""
        return f"{self.picture.width}x{self.picture.height}"

    @property
    def percent(self) -> int:
        """How much is done: 100 only of what is complete."""
        return 100 if self.status == "completed" else min(99, int(100 * self.live.get("share", 0)))

    def shown(self) -> dict[str, Any]:
        """What clients see of it."""
        return {
            "id": self.id,
            "object": "image.job",
            "status": self.status,
            "cancelling": self.cancelling,
            "progress": self.percent,
            "eta_s": self.live.get("eta_s") if self.status == "in_progress" else None,
            "created_at": self.created_ns // 10**9,
            "started_at": self.started_at,
            "completed_at": self.completed_at,
            "seconds": round(self.seconds, 3),
            "attempts": self.attempts,
            "error": self.error and self.error.model_dump(),
            "model": self.model,
            "size": self.size,
            **self.picture.model_dump(exclude={"height", "width"}),
        }

    # --- listeners --------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator["asyncio.Queue[Event | None]"]:
        """What happens from now on, after what is so; None when nobody will tell any more."""
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        events.put_nowait(("end" if self.ended else "status", self.shown()))
        if self.status == "in_progress" and self.live:
            events.put_nowait(("progress", self.live))
        if self.ended:
            events.put_nowait(None)
        self._listeners.append(events)
        try:
            yield events
        finally:
            self._listeners.remove(events)

    def tell(self, event: Event | None) -> None:
        """To all who listen."""
        for events in self._listeners:
            events.put_nowait(event)

    def told(self) -> None:
        """Its status has changed: say so."""
        self.tell(("end" if self.ended else "status", self.shown()))
        if self.ended:
            self.tell(None)


def now_s() -> int:
    """Seconds since 1970."""
    return int(time.time())


# --- files ----------------------------------------------------------------------------------------

_TILE = re.compile(r"[0-9]{1,7}_[0-9]{1,7}\.(jpg|png)")
_LEVEL = re.compile(r"[0-9]{1,2}")


class Files:
    """Where the files of a job are: its name and numbers are all that paths are made of."""

    def __init__(self, root: Path, job: Job) -> None:
        self.folder = root / job.id
        self.picture = self.folder / job.file_name
        self.preview = self.folder / "preview.jpg"
        self.page = self.folder / f"{job.id}.html"
        self.descriptor = self.folder / f"{job.id}.dzi"
        self.tiles = self.folder / f"{job.id}_files"

    def tile(self, level: str, name: str) -> Path | None:
        """A tile of the Deep Zoom view, unless that is no name of one."""
        if _LEVEL.fullmatch(level) and _TILE.fullmatch(name):
            return self.tiles / level / name
        return None

    def remove_traces(self) -> None:
        """What is left of a picture in the making: it will not be gone on with."""
        for path in (*self.folder.glob(".*"), self.preview):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != FRESH_RECORD:
                path.unlink(missing_ok=True)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is there, and no link leads out of the folder."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())
