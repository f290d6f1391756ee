"""How far a picture is, in every dialect."""

import io
import json
import re

import pytest

from engine import progress
from engine.progress import DIALECTS, Meter, Progress, alf, bars, json_lines, openjd, plain

RUNGS = [("8x8", 64, 4), ("16x16", 256, 2)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def paint(listener, first=(0, 0)):
    """A picture of two rungs, from `first` = (rung, steps done) on."""
    meter = Meter("lake.png", RUNGS, listener)
    for rung, (_, _, steps) in enumerate(RUNGS):
        for step in range(1, steps + 1):
            if (rung, step) >= first:
                meter.step(rung, step)
    for phase in ("decoding", "writing", "done"):
        meter.phase(phase)


def said_by(dialect, **options):
    out = io.StringIO()
    paint(dialect(out), **options)
    return out.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch):
    """A second passes whenever somebody looks."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


@pytest.mark.parametrize("first", [(0, 0), (0, 3), (1, 1)])
def test_shares_grow_to_one(first):
    events: list[Progress] = []
    paint(events.append, first=first)
    shares = [event.share for event in events]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 1
    assert shares[-1] == 1
    assert events[-1].phase == "done"
    # As much of the work is in a step as it has pixels.
    steps = [event.share for event in events if event.phase == "painting" and event.rung == 1]
    assert steps[-1] - steps[0] == pytest.approx(256 / (64 * 6 + 256 * 4))


def test_the_time_that_is_left(clock):
    events: list[Progress] = []
    paint(events.append)
    assert events[0].eta_s is None
    assert all(event.eta_s > 0 for event in events[1:-1])
    assert events[-1].eta_s is None
    assert events[2].seconds_per_step > 0
    assert events[0].memory_bytes > 1e6


def test_a_bar_for_each_rung_on_a_terminal():
    out = Terminal()
    paint(bars(out))
    assert "8x8 px: 100%" in out.getvalue()
    assert "16x16 px: 100%" in out.getvalue()
    assert "4/4" in out.getvalue()
    assert "2/2" in out.getvalue()


def test_bars_are_silent_in_a_log_file():
    assert said_by(bars) == []


def test_plain_lines():
    lines = said_by(plain)
    assert lines[0].startswith("  4% done  lake.png  rung 0 of 1, 8x8 px, step 1 of 4")
    assert lines[-1] == "100% done  lake.png  done"
    assert len(lines) == len(set(lines))


def test_open_job_description():
    lines = said_by(openjd)
    shares = [float(line.split()[1]) for line in lines if line.startswith("openjd_progress: ")]
    assert shares == sorted(shares)
    assert shares[-1] == 100.0
    assert "openjd_status: lake.png  rung 1 of 1, 16x16 px, step 2 of 2" in lines
    assert all(re.match(r"openjd_(progress|status): ", line) for line in lines)


def test_alfred():
    lines = said_by(alf)
    assert all(re.fullmatch(r"ALF_PROGRESS \d+%", line) for line in lines)
    assert lines[-1] == "ALF_PROGRESS 100%"
    assert len(lines) == len(set(lines))


def test_json_lines():
    events = [json.loads(line) for line in said_by(json_lines)]
    assert {event["event"] for event in events} == {"progress"}
    assert [event["step"] for event in events if event["phase"] == "painting"] == [1, 2, 3, 4, 1, 2]
    assert set(events[0]) >= {"picture", "rung", "share", "eta_s", "memory_bytes"}


def test_every_dialect_listens(capsys):
    for dialect in DIALECTS.values():
        paint(dialect())
    assert "ALF_PROGRESS 100%" in capsys.readouterr().out
