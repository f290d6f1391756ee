"""How far a distillation is, in the dialects of `engine.progress`."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from engine.progress import DIALECTS, Listener, Progress


@dataclass(frozen=True)
class Distilling(Progress):
    """Where a distillation stands; `loss` is smoothed."""

    loss: float = 0.0

    def __str__(self) -> str:
        return f"{self.picture}  step {self.step} of {self.steps}, loss {self.loss:.4f}"


class Meter:
    """Tells a listener of each step."""

    def __init__(self, name: str, step: int, steps: int, listener: Listener) -> None:
        self._name, self._first, self._steps, self._listener = name, step, steps, listener
        self._begun = time.monotonic()
        self._smooth = self._weight = 0.0

    def step(self, step: int, loss: float) -> str:
        """As many steps are done; what was told."""
        self._smooth, self._weight = 0.95 * self._smooth + loss, 0.95 * self._weight + 1
        pace = (time.monotonic() - self._begun) / (step - self._first)
        told = Distilling(
            picture=self._name, phase="distilling", step=step, steps=self._steps,
            share=step / self._steps, eta_s=pace * (self._steps - step), seconds_per_step=pace,
            memory_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            loss=self._smooth / self._weight,
        )  # fmt: skip
        self._listener(told)
        return str(told)


def listener_of(dialect: str) -> Listener:
    """The listener that a user names."""
    return _bar() if dialect == "bars" else DIALECTS[dialect]()


def _bar() -> Callable[[Progress], None]:
    """One bar, if stderr is a terminal."""
    shown: list[tqdm] = []  # type: ignore[type-arg]

    def listen(progress: Progress) -> None:
        if not shown:
            first = progress.step - 1
            shown.append(
                tqdm(total=progress.steps, initial=first, desc="distilling", disable=None,
                     file=sys.stderr)
            )  # fmt: skip
        shown[0].set_postfix_str(f"loss {getattr(progress, 'loss', 0.0):.4f}", refresh=False)
        shown[0].update(progress.step - shown[0].n)
        if progress.step == progress.steps:
            shown[0].close()

    return listen
