"""Test-wide settings: never a hub, quiet libraries, the quick tests first."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# The ranks of the tests meet over gloo, also where there are GPUs; tests/gpu.py is told of one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for a core would spin, for minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from tests.models import save_tiny_pipeline

diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()

settings.register_profile("engine", deadline=None)  # no test depends on the clock
settings.load_profile("engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mistake shows early: what is marked slow runs last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are faster without sharing them out: on a busy machine, twenty times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Stable Diffusion pipeline of random weights."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
