"""Bars for people, silence for log files and for every rank but one."""

import io
import sys

import pytest

from engine.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("painting", 3, enabled=enabled) as advance:
        for _ in range(3):
            advance()
    return stream.getvalue()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), True, monkeypatch)
    assert "painting: 100%" in text
    assert "3/3" in text


def test_silence_in_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), True, monkeypatch) == ""


def test_silence_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(Terminal(), False, monkeypatch) == ""
