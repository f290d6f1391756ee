"""Signals while a process is on its way out."""

import signal
import subprocess
import sys

import pytest

ENDING = """
import os, sys
{listening}

class Late:
    def __del__(self):
        os.kill(os.getpid(), {number})

late = Late()  # until Python takes this module apart, and its handlers have been taken away
sys.exit(75)
"""
LISTENING = {
    "a rank": "from engine.signals import note_signals; note_signals()",
    "a launcher": "from launch.__main__ import _pass_signals_on; _pass_signals_on([])",
}


def exit_code(listening, number):
    program = ENDING.format(listening=listening, number=int(number))
    return subprocess.run([sys.executable, "-c", program], timeout=60).returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("who", LISTENING)
def test_a_second_signal_does_not_replace_the_exit_code(who, number):
    assert exit_code(LISTENING[who], number) == 75


def test_without_them_it_would():
    assert exit_code("", signal.SIGTERM) == -signal.SIGTERM
