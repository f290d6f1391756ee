"""Runs tests/gpu.py where there is a GPU: all other tests see none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_on_a_gpu():
    """In a process of its own, which is shown the first one."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-m", "pytest", "tests/gpu.py", "--numprocesses", "0"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    if "passed" not in done.stdout:
        pytest.skip("needs a GPU")
