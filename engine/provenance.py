"""Where a picture came from, kept in the picture, so that the picture can be painted again.

    python -m engine.inspect lake.png                       says it
    python -m engine.generate --config lake.png             paints it again: the same pixels

Every file keeps the prompt, and under "linfusion-engine" an object of three parts:

    engine      the version that painted it
    settings    all that determines the picture, as a `--config` file would say it; "auto" is
                replaced by what it came to, and models are pinned by the hashes of their weights
    run         what does not change the picture, or not by more than rounding: how many ranks, on
                what, with which versions, and whether their borders can be seen
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from engine import output
from engine.config import UserError
from engine.parsing import read_yaml

KEY = "linfusion-engine"

logger = logging.getLogger(__name__)


# --- read -----------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The three parts of what a picture says about itself.

    Raises:
        UserError: there is no such file, or it says nothing that this engine has written.
    """
    found = output.read_metadata(path).get(KEY)
    try:
        facts = json.loads(found) if isinstance(found, str) else found
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("settings"), dict):
        raise UserError(
            f"{path}: does not say how it was painted; give a picture that this engine has "
            "written and no other program has saved again"
        )
    return facts


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, or those that a finished picture was painted with.

    A picture is painted again under its own name in the folder `outputs`, but not over itself.

    Raises:
        UserError: there is no such file, or it has no settings.
    """
    if path.suffix.lower() not in output.WRITERS:
        return read_yaml(path)
    settings: dict[str, Any] = read(path)["settings"]
    again = Path("outputs") / path.name
    if again.exists() and again.samefile(path):
        again = again.with_name(f"{path.stem}.again{path.suffix}")
    return {**settings, "output": str(again)}


def as_yaml(path: Path) -> str:
    """What a picture says about itself, as a file of settings with the rest in comments."""
    facts = read(path)
    run = yaml.safe_dump(facts.get("run", {}), sort_keys=False, allow_unicode=True)
    comments = [f"{path}: painted by linfusion-engine {facts.get('engine')}", *run.splitlines()]
    settings = yaml.safe_dump(facts["settings"], sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comments) + settings


# --- hashes of weights ----------------------------------------------------------------------------

Files = Mapping[str, Path]
"""files by their names in a model's folder"""


class Hashes:
    """The hash of each model's weights, computed in the background while a picture is painted."""

    def __init__(self, models: Mapping[str, Files]) -> None:
        self._known: dict[str, str] = {}
        # A daemon: a job that ends early does not wait for it.
        self._thread = Thread(target=self._compute, args=(models,), name="hashes", daemon=True)
        self._thread.start()

    def _compute(self, models: Mapping[str, Files]) -> None:
        for name, files in models.items():
            try:
                if files:
                    self._known[name] = weights_sha256(files)
            except OSError as error:
                logger.warning("no hash of the %s's weights (%s)", name, error)

    def wait(self) -> dict[str, str]:
        """All hashes that could be computed: a file that is gone costs no painted picture."""
        self._thread.join()
        return dict(self._known)


def weights_sha256(files: Files) -> str:
    """The SHA-256 of a file, in hex; of several, that of lines with their hashes and names."""
    if len(files) == 1:
        return _file_sha256(next(iter(files.values())))
    lines = [f"{_file_sha256(file)}  {name}\n" for name, file in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name  # the hub's cache names large files by their SHA-256
    seen = target.stat()
    return _read_sha256(target, seen.st_size, seen.st_mtime_ns)


@lru_cache
def _read_sha256(file: Path, size: int, changed_ns: int) -> str:
    """Of a file as it was at that time: a job that was told what to expect reads it once only."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def require_hash(name: str, wanted: str, files: Files) -> None:
    """Refuses files that are not those asked for.

    Args:
        name: "model", "linfusion" or "ladder.upscale".
        wanted: in hex.

    Raises:
        UserError: they are others.
    """
    if (found := weights_sha256(files)) != wanted:
        raise UserError(
            f"{name}: what is there has the SHA-256 {found}, not {wanted} as {name}_sha256 asks; "
            f"name the same, or --{name}-sha256 any"
        )
