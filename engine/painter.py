"""Picture after picture with one loaded model, and what becomes of each.

    painter = Painter(mesh, control)
    outcome = painter.paint(settings)       done, finished, mistake, failed or stopped

The model stays loaded from one picture to the next, and is loaded anew where settings differ that
only loading heeds. A picture that fails must not take the others with it, so the ranks meet after
each one, in collectives of their own: some may still be inside a layer, waiting for one that has
failed, and the two kinds of waiting must not be mistaken for each other. Where all have come, all
go on.
"""

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from engine.bands import Mesh
from engine.checkpoint import is_finished, pinned, tidy
from engine.config import Settings, UserError
from engine.keeper import Control, Interrupted
from engine.pipeline import Engine

T = TypeVar("T")

MEETING_S = 60.0
"""for how long a rank that has failed waits for the others to fail too"""


@dataclass(frozen=True)
class Outcome:
    """What became of a picture.

    Attributes:
        word: done; finished, by an earlier job; mistake, the user's; failed, the engine; or
            stopped, as the job was told to.
        said: the same in a sentence.
    """

    word: Literal["done", "finished", "mistake", "failed", "stopped"]
    said: str


class Painter:
    """Every rank of `mesh` has one, and makes the same calls."""

    def __init__(self, mesh: Mesh, control: Control | None = None) -> None:
        self._mesh, self._control = mesh, control or Control()
        self._meeting = mesh.again(MEETING_S)
        self._engine: Engine | None = None

    def paint(self, settings: Settings) -> Outcome:
        """Paint one picture and write it; the same outcome on every rank.

        Raises:
            Exception: what failed on this rank, where the others have not failed as well.
        """
        outcome, failure = self._attempt(settings)
        try:
            outcomes = self._meeting.gather_objects(outcome)
        except RuntimeError as nobody_came:
            raise failure or nobody_came from nobody_came
        failed = [other for other in outcomes if other.word == "failed"]
        if failure is not None:
            traceback.print_exception(failure)
        if failed:
            self._unload()  # whatever state the failure has left it in
        return failed[0] if failed else outcome

    def paint_or_raise(self, settings: Settings) -> Outcome:
        """The same for a job of one picture: what goes wrong ends it.

        Raises:
            UserError: a mistake, on every rank.
            Exception: whatever else has failed, on this rank.
        """
        if settings.resume:
            # As rank 0 sees it: the others' disks may show what is new a little later.
            if self._as_first(lambda: is_finished(settings)):
                self._mesh.agree(lambda: tidy(settings) if self._mesh.rank == 0 else None)
                return Outcome("finished", f"{settings.output}: is finished already, nothing to do")
            settings = self._as_first(lambda: pinned(settings))
        try:
            return Outcome("done", str(self._engine_for(settings).generate(settings)))
        except Interrupted as stopped:
            return Outcome("stopped", str(stopped))

    def _attempt(self, settings: Settings) -> tuple[Outcome, Exception | None]:
        try:
            return self.paint_or_raise(settings), None
        except UserError as mistake:
            return Outcome("mistake", str(mistake)), None
        except Exception as failure:
            said = f"{settings.output}: {type(failure).__name__}: {failure}"
            return Outcome("failed", said), failure

    def _as_first(self, look: Callable[[], T]) -> T:
        return self._mesh.gather_objects(self._mesh.agree(look))[0]

    def _engine_for(self, settings: Settings) -> Engine:
        if self._engine is None or self._engine.differs(settings) is not None:
            self._unload()  # first: there may be no room for both
            self._engine = Engine.load(settings, self._mesh, self._control)
        return self._engine

    def _unload(self) -> None:
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
