"""One job at a time writes a file.

Two jobs with the same output are a mistake, or a farm that starts a job anew before it has noticed
that the old one still runs. Each writes under its own token, but whoever clears up what killed jobs
have left must know that they are dead. The kernel knows: it takes a lock from a process that ends,
however it ends. Where the file system has no locks, the tokens alone must do.
"""

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.config import UserError

_AGAIN_S = 0.2


class Lock:
    """The right to write `path`: `with Lock(path) as lock: lock.acquire(patience_s)`."""

    def __init__(self, path: Path) -> None:
        self._target = path
        self._path = path.with_name(f".{path.name}.lock")
        self._handle: int | None = None

    def acquire(self, patience_s: float) -> None:
        """Wait for other jobs to have written it, but no longer than that.

        Raises:
            UserError: one still does.
        """
        deadline = time.monotonic() + patience_s
        while not self._try():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self._target}: another job has been writing it for {patience_s:.0f} s; wait "
                    "for that one, or name another file"
                )
            time.sleep(_AGAIN_S)

    def _try(self) -> bool:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:  # a file system without locks
            self._handle = handle
            return True
        # The one before may have removed the file between our opening and our locking it.
        try:
            is_ours = os.fstat(handle).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            is_ours = False
        if is_ours:
            self._handle = handle
        else:
            os.close(handle)
        return is_ours

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
