"""How far a picture is, in the words of whoever listens.

    bars      for people: a bar for each rung on stderr, and only if that is a terminal
    plain     a line now and then:  12% done  lake.png  rung 1 of 3, 768x512 px, step 4 of 20
    openjd    Open Job Description, as AWS Deadline Cloud reads it:  openjd_progress: 12.0
    alf       Pixar's Tractor and Alfred:  ALF_PROGRESS 12%
    json      an object for each event, for programs of one's own

A `Meter` turns steps into shares of the whole picture: a step of a rung is taken to cost as its
pixels, and the codec at the end of each rung as a step or two. A listener is a function of
`Progress`; a new dialect is one function more in `DIALECTS`.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TextIO

from tqdm import tqdm


@dataclass(frozen=True)
class Progress:
    """Where a picture stands.

    Attributes:
        picture: the name of its file.
        phase: painting, decoding, writing or done.
        rung, rungs: the rung that is painted, from 0, and how many there are.
        step, steps: how many of this rung's are done.
        share: of the whole picture's work, 0 to 1.
        eta_s: an estimate of the seconds that are left, once there is one.
        seconds_per_step: of this rung, so far.
        memory_bytes: the most that this process has had at any time.
        finished, pictures: how many pictures of the job are behind, and how many there are.
    """

    picture: str
    phase: str
    rung: int = 0
    rungs: int = 1
    size: str = ""
    step: int = 0
    steps: int = 0
    share: float = 0.0
    eta_s: float | None = None
    seconds_per_step: float | None = None
    memory_bytes: int = 0
    finished: int = 0
    pictures: int = 1

    @property
    def job_share(self) -> float:
        """Of the whole job's work, where each picture counts as much as any other."""
        return min(1.0, (self.finished + self.share) / self.pictures)

    def __str__(self) -> str:
        if self.phase != "painting":
            return f"{self.picture}  {self.phase}"
        rung = f"rung {self.rung} of {self.rungs - 1}, " if self.rungs > 1 else ""
        return f"{self.picture}  {rung}{self.size} px, step {self.step} of {self.steps}"


Listener = Callable[[Progress], object]


# --- from steps to shares -------------------------------------------------------------------------

_CODEC_STEPS = 2.0  # what decoding and encoding take, in steps of the same size


class Meter:
    """Shares of a picture's work, told to `listener`.

    Args:
        rungs: (what to call its size, pixels, steps) of each.
    """

    def __init__(self, picture: str, rungs: list[tuple[str, int, int]], listener: Listener) -> None:
        self._picture, self._rungs, self._listener = picture, rungs, listener
        self._start = self._rung_start = time.monotonic()
        self._first_share: float | None = None
        self._first_step: tuple[int, int] = (0, 0)

    def step(self, rung: int, step: int) -> None:
        """As many steps of a rung are done."""
        if self._first_step[0] != rung or self._first_share is None:
            self._rung_start, self._first_step = time.monotonic(), (rung, step)
        done = step - self._first_step[1]
        pace = (time.monotonic() - self._rung_start) / done if done else None
        self._tell("painting", rung, step, self._share(rung, step), pace)

    def phase(self, name: str) -> None:
        """What comes after the last step: decoding, writing, done."""
        last = len(self._rungs) - 1
        left = {"decoding": _CODEC_STEPS, "writing": _CODEC_STEPS / 2, "done": 0.0}[name]
        _, pixels, steps = self._rungs[last]
        self._tell(name, last, steps, 1 - left * pixels / self._total, None)

    @property
    def _total(self) -> float:
        return sum(pixels * (steps + _CODEC_STEPS) for _, pixels, steps in self._rungs)

    def _share(self, rung: int, step: int) -> float:
        below = sum(pixels * (steps + _CODEC_STEPS) for _, pixels, steps in self._rungs[:rung])
        return (below + self._rungs[rung][1] * step) / self._total

    def _tell(self, phase: str, rung: int, step: int, share: float, pace: float | None) -> None:
        if self._first_share is None:
            self._first_share, self._start = share, time.monotonic()
        gained, passed = share - self._first_share, time.monotonic() - self._start
        size, _, steps = self._rungs[rung]
        self._listener(
            Progress(
                picture=self._picture,
                phase=phase,
                rung=rung,
                rungs=len(self._rungs),
                size=size,
                step=step,
                steps=steps,
                share=share,
                eta_s=passed / gained * (1 - share) if gained > 0 and share < 1 else None,
                seconds_per_step=pace,
                memory_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            )
        )


# --- dialects -------------------------------------------------------------------------------------


def silent(progress: Progress) -> None:
    """Nobody listens."""


def bars(out: TextIO | None = None) -> Listener:
    """A bar for each rung, if `out` (stderr by default) is a terminal.

    In a log file it would be a heap of carriage returns.
    """
    shown: dict[int, tqdm] = {}  # type: ignore[type-arg]  # the bar of the rung that is painted

    def listen(progress: Progress) -> None:
        for rung in [
            rung for rung in shown if (rung, "painting") != (progress.rung, progress.phase)
        ]:
            shown.pop(rung).close()
        if progress.phase != "painting":
            return
        if progress.rung not in shown:
            title = "painting" if progress.rungs == 1 else f"{progress.size} px"
            # disable=None is tqdm's word for "unless it is a terminal".
            bar = tqdm(total=progress.steps, desc=title, disable=None, file=out)
            shown[progress.rung] = bar
        shown[progress.rung].update(progress.step - shown[progress.rung].n)

    return listen


def plain(out: TextIO | None = None) -> Listener:
    """A line for each per cent, picture, rung and phase."""
    said: list[tuple[int, str, int, str]] = []

    def listen(progress: Progress) -> None:
        percent = int(100 * progress.job_share)
        now = percent, progress.picture, progress.rung, progress.phase
        if now in said[-1:]:
            return
        said[:] = [now]
        left = "" if progress.eta_s is None else f"  about {progress.eta_s:.0f} s left"
        _say(f"{percent:3d}% done  {progress}{left}", out)

    return listen


def openjd(out: TextIO | None = None) -> Listener:
    """Open Job Description: progress in per cent, and a status in words."""

    def listen(progress: Progress) -> None:
        _say(f"openjd_progress: {100 * progress.job_share:.1f}", out)
        _say(f"openjd_status: {progress}", out)

    return listen


def alf(out: TextIO | None = None) -> Listener:
    """Tractor and Alfred: whole per cents."""
    said: list[int] = []

    def listen(progress: Progress) -> None:
        if (now := int(100 * progress.job_share)) not in said[-1:]:
            said[:] = [now]
            _say(f"ALF_PROGRESS {now}%", out)

    return listen


def json_lines(out: TextIO | None = None) -> Listener:
    """Every attribute of every event."""

    def listen(progress: Progress) -> None:
        _say(json.dumps({"event": "progress", **asdict(progress)}), out)

    return listen


def ending(dialect: str, index: int, word: str, said: str) -> str:
    """A line about the end of one of many pictures: `index` is its number, `word` its outcome."""
    if dialect == "json":
        return json.dumps({"event": "end", "index": index, "outcome": word, "said": said})
    return said if word in ("done", "finished", "stopped") else f"picture {index}: {said}"


def _say(line: str, out: TextIO | None) -> None:
    print(line, file=out or sys.stdout, flush=True)


DIALECTS: dict[str, Callable[[], Listener]] = {
    "bars": bars,
    "plain": plain,
    "openjd": openjd,
    "alf": alf,
    "json": json_lines,
    "none": lambda: silent,
}
