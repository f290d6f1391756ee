"""Test-wide settings: never a hub, quiet libraries, the quick tests first."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks of the tests meet over gloo

import pytest
from diffusers.utils import logging as diffusers_logging
from hypothesis import settings
from transformers.utils import logging as transformers_logging

diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()

settings.register_profile("engine", deadline=None)  # no test depends on the clock
settings.load_profile("engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mistake shows early: what is marked slow runs last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
