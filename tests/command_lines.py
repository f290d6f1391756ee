"""What the scripts in launch/ ask of the launcher and the engine, without running either."""

import os
import subprocess
from pathlib import Path

import launch.__main__ as launcher
from engine.config import Settings


def words_of(folder: Path, command: list[str], **environment: str) -> list[str]:
    """The words with which `command`, a line of some shell, would call the interpreter `python`."""
    spy, heard = folder / "python", folder / "words"
    spy.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{heard}"\n')
    spy.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(command, env={"PATH": path, **environment}, check=True, timeout=60)
    return heard.read_text().splitlines()


def accepted(words: list[str]) -> tuple[dict[str, object], Settings]:
    """(the launcher's options, the engine's settings) that such words come to.

    Raises:
        SystemExit, UserError: they are refused.
    """
    assert words[:2] == ["-m", "launch"]
    options, rest = launcher._parse(words[2:])
    return vars(options), Settings.load(rest, lambda file: {})
