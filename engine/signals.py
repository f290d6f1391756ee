"""Told to stop: SIGTERM and SIGINT are noted, and the job stops where that costs least.

    told = note_signals()
    ... told() ...        True once a signal has come

Schedulers send SIGTERM before they kill, some of them twice, and torchrun passes it on to every
rank. A rank must not die of it: the others would wait for it. So it is noted, and asked for after
each step (`engine.keeper`). A second one, while the process is on its way out, is noted too, and
once Python has begun to end it is ignored.
"""

import atexit
import signal
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


def note_signals() -> Callable[[], bool]:
    """From now on SIGTERM and SIGINT only make what is returned say True. For the main thread."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in STOPPING:
        signal.signal(number, note)
    # Python takes its handlers away as it ends; a second signal then would replace the exit code.
    atexit.register(ignore_signals)
    return lambda: bool(received)


def ignore_signals() -> None:
    """From now on SIGTERM and SIGINT do nothing. For the main thread."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
