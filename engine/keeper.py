"""One picture on its way, followed step by step: progress, checkpoints, and when to stop.

    keeper = Keeper(settings, mesh, scheduler, rungs, facts, control)
    state = keeper.resumed()        None, or where an interrupted job has stopped
    keeper.step(state)              after each step: says how far it is, keeps it, or raises
    keeper.finish()                 the picture is whole

An engine is told from outside when to stop (`Control`), by a signal for instance. Ranks may learn
of it at different times, so after each step they agree; all stop behind the same one.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import ladder
from engine.bands import Mesh
from engine.checkpoint import Checkpoint, checkpoint_path
from engine.config import Settings, UserError
from engine.ladder import Rung
from engine.progress import Listener, Meter, silent

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The job was told to stop, and has: `resume` goes on from its checkpoint, if there is one."""


@dataclass(frozen=True)
class Control:
    """What an engine tells and asks while it paints.

    Attributes:
        tell: is called on every rank whenever there is progress.
        should_stop: is asked on every rank after each step; one that says so stops all.
        look: is called on every rank after each step with what makes a small picture of where it
            stands, [h, w, 3] of 8 bits; no other rank is needed for that.
    """

    tell: Listener = silent
    should_stop: Callable[[], bool] = lambda: False
    look: Callable[[Callable[[], np.ndarray]], object] = lambda glimpse: None


class Keeper:
    """Follows the picture of `settings`. Every rank has one, and makes the same calls.

    Args:
        scheduler: of the model.
        facts: tells the settings that paint the picture again, for its checkpoint.
        glimpse: makes a small picture of a state.
    """

    def __init__(
        self,
        settings: Settings,
        mesh: Mesh,
        scheduler: Any,
        rungs: list[Rung],
        facts: Callable[[], Mapping[str, Any]],
        glimpse: Callable[[ladder.State], np.ndarray],
        control: Control,
    ) -> None:
        self._settings, self._mesh, self._scheduler = settings, mesh, scheduler
        self._rungs, self._control, self._glimpse = rungs, control, glimpse
        self._checkpoint = Checkpoint(checkpoint_path(settings), facts)
        self._totals = [ladder.calls(scheduler, rung) if rung.steps_run else 0 for rung in rungs]
        sizes = [
            (str(rung), rung.height * rung.width, total)
            for rung, total in zip(rungs, self._totals, strict=True)
        ]
        self._meter = Meter(settings.output.name, sizes, control.tell)

    def resumed(self) -> ladder.State | None:
        """The state to go on with, the same on every rank; None for a picture to be begun.

        Raises:
            UserError: the checkpoint is of other settings, or some ranks do not find it.
        """
        if not self._settings.resume:
            return None
        mesh, path = self._mesh, self._checkpoint.path
        state = mesh.agree(lambda: self._checkpoint.load(self._scheduler, self._rungs, mesh.device))
        places = mesh.gather_objects(None if state is None else (state.rung, state.step))
        if len(set(places)) > 1:
            raise UserError(
                f"checkpoint.folder: not every rank finds {path}: name one that all hosts share"
            )
        if state is not None:
            self._meter.step(state.rung, state.step)
            if mesh.rank == 0:
                logger.info("going on from %s", path)
        return state

    def step(self, state: ladder.State) -> None:
        """After each step.

        Raises:
            Interrupted: some rank was told to stop.
        """
        self._meter.step(state.rung, state.step)
        self._control.look(lambda: self._glimpse(state))
        told = self._mesh.any(self._control.should_stop())
        if self._is_due(state, told):
            self._mesh.agree(lambda: self._save(state) if self._mesh.rank == 0 else None)
        if told:
            kept = self._mesh.agree(self._checkpoint.path.exists)
            path = self._checkpoint.path
            where = f"resume goes on from {path}" if kept else "there is no checkpoint yet"
            raise Interrupted(f"{self._settings.output}: stopped as told; {where}")

    def phase(self, name: str) -> None:
        """What comes after the last step: decoding, then writing."""
        self._meter.phase(name)

    def finish(self) -> None:
        """The picture is whole, and its checkpoint is of no use any more."""
        if self._mesh.rank == 0:
            self._checkpoint.remove()
        self._meter.phase("done")

    def _is_due(self, state: ladder.State, told: bool) -> bool:
        if state.step == self._totals[state.rung]:
            return True
        if self._settings.mesh.synchronisation != "exact":
            return False  # what is on its way between ranks is not kept
        every = self._settings.checkpoint.every
        return told or bool(every and state.step % every == 0)

    def _save(self, state: ladder.State) -> None:
        """A full disk is no reason to give up the picture."""
        try:
            self._checkpoint.save(state)
        except OSError as error:
            reason = error.strerror or error
            logger.warning("%s: no checkpoint (%s)", self._checkpoint.path, reason)
