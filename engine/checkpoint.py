"""A picture in the making, kept on disk: interrupted here, it goes on there.

    checkpoint = Checkpoint(path, facts)
    checkpoint.save(state)                 one process; all ranks have the same state
    settings = pinned(settings)            every process, before anything is loaded
    state = checkpoint.load(...)           every process

The state of the ladder (`engine.ladder.State`) is whole and the same on every rank, so a checkpoint
knows nothing of ranks, and another number of them goes on with it: to the very picture that the
same number would have made, and to that picture up to rounding otherwise.

It is one file beside the picture, `.lake.png.checkpoint`, replaced by a rename at each step that
saves, and removed once the picture is whole. It names all that determines the picture. Settings
that say otherwise are refused, with the first difference. What "auto" came to is taken from it: on
another machine it could mean something else.
"""

import contextlib
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from engine import output, provenance
from engine.config import Settings, UserError
from engine.ladder import Rung, State, fresh_scheduler
from engine.parsing import flat

_TENSORS = ("latent", "reference", "noise", "anchor", "colours")


def checkpoint_path(settings: Settings) -> Path:
    """Where the checkpoint of a picture is."""
    folder = settings.checkpoint.folder or settings.output.parent
    return folder / f".{settings.output.name}.checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of one picture.

    Attributes:
        facts: tells the settings that paint it again, whatever "auto" would mean elsewhere, once
            they are wanted: hashes of weights take their time.
    """

    path: Path
    facts: Callable[[], Mapping[str, Any]]

    def save(self, state: State) -> None:
        """Replace what is there, once this is on disk. Raises OSError."""
        kept = {name: _on_host(getattr(state, name)) for name in _TENSORS}
        kept |= {"rung": state.rung, "step": state.step, "facts": dict(self.facts())}
        kept |= {"generator": state.generator.get_state(), "scheduler": _memory(state.scheduler)}
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                _write(kept, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, scheduler: Any, rungs: list[Rung], device: torch.device) -> State | None:
        """The state to go on with, or None where there is none.

        Args:
            scheduler: of the model; the state gets one of the same configuration.
        """
        if (kept := _read(self.path)) is None:
            return None
        _require_same(self.path, kept["facts"], self.facts())
        rung = rungs[kept["rung"]]
        fresh = fresh_scheduler(scheduler, rung, device)
        _remember(fresh, kept["scheduler"], device)
        generator = torch.Generator("cpu")
        generator.set_state(kept["generator"])
        tensors = {name: _on_device(kept[name], device) for name in _TENSORS}
        return State(rung.index, kept["step"], scheduler=fresh, generator=generator, **tensors)

    def remove(self) -> None:
        """The picture is whole."""
        self.path.unlink(missing_ok=True)


def pinned(settings: Settings) -> Settings:
    """`settings` with "auto" replaced by what it came to in the checkpoint, if there is one.

    Raises:
        UserError: the checkpoint is of other settings, or not readable.
    """
    path = checkpoint_path(settings)
    if (kept := _read(path)) is None:
        return settings
    facts = kept["facts"]
    _require_same(path, facts, settings.provenance())
    changes: dict[str, Any] = {"dtype": facts["dtype"]}
    if settings.codec.mode == "auto" and not settings.codec.rungs:
        rungs = tuple(facts["codec"].get("rungs", ()))
        changes["codec"] = settings.codec.model_copy(update={"rungs": rungs})
    return settings.model_copy(update=changes)


def is_finished(settings: Settings) -> bool:
    """Whether the picture is there, painted by these very settings."""
    if not all(file.output.exists() for file in output.files_of(settings)):
        return False
    try:
        facts = provenance.read(settings.output)["settings"]
    except UserError:
        return False
    bits = facts.get("file", {}).get("bits", "auto")
    painted = settings.file.model_copy(update={"bits": bits})
    samples = {output.sample_of(settings.output, file) for file in (settings.file, painted)}
    return len(samples) == 1 and _difference(facts, settings.provenance()) is None


def tidy(settings: Settings) -> None:
    """Remove the checkpoint of a finished picture: its job was killed just before it did so."""
    path = checkpoint_path(settings)
    with contextlib.suppress(UserError):  # not readable, so not known to be of this picture
        kept = _read(path)
        if kept is not None and _difference(kept["facts"], settings.provenance()) is None:
            path.unlink(missing_ok=True)


# --- the same settings ----------------------------------------------------------------------------


def _require_same(path: Path, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if (name := _difference(kept, asked)) is not None:
        was, now = flat(kept).get(name), flat(asked).get(name)
        raise UserError(
            f"{path}: this checkpoint was painted with {name} {was!r}, not {now!r}; ask for the "
            "same, or remove it to begin anew"
        )


_OPEN = {
    "dtype": "auto",
    "linfusion": "auto",
    "codec.mode": "auto",
    "ladder.upscale_sha256": "any",
}
"""settings that mean whatever they came to"""


def _difference(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """The first setting that differs."""
    was, now = flat(kept), flat(asked)
    for name, value in now.items():
        if _OPEN.get(name) != value and name != "codec.rungs" and was.get(name) != value:
            return name
    return None


# --- what is in the file --------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any] | None:
    """What `save` kept; nothing in it is run as code."""
    try:
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: this checkpoint is not readable ({reason}); remove it to begin anew"
        ) from error
    if not isinstance(kept, dict) or "facts" not in kept:
        raise UserError(f"{path}: this is no checkpoint; remove it to begin anew")
    return kept


def _write(kept: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(kept, file)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(None, str(error).splitlines()[0]) from error


def _memory(scheduler: Any) -> dict[str, Any]:
    """All that a scheduler remembers; its configuration is the model's."""
    kept = {name: v for name, v in vars(scheduler).items() if name != "_internal_dict"}
    return {name: _on_host(value) for name, value in kept.items()}


def _remember(scheduler: Any, kept: Mapping[str, Any], device: torch.device) -> None:
    for name, value in kept.items():
        now = getattr(scheduler, name, None)
        place = now.device if isinstance(now, Tensor) else device
        setattr(scheduler, name, _on_device(value, place))


_ARRAY = "numpy array"  # such as some schedulers keep, and which are not read as they are


def _on_host(value: Any) -> Any:
    """Tensors, numbers, words and lists of them, as they can be kept."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return type(value)(_on_host(item) for item in value)
    if isinstance(value, dict):
        return {name: _on_host(item) for name, item in value.items()}
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def _on_device(value: Any, device: torch.device) -> Any:
    """The same, back on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict) and _ARRAY in value:
        return value[_ARRAY].numpy().copy()
    if isinstance(value, list | tuple):
        return type(value)(_on_device(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _on_device(item, device) for name, item in value.items()}
    return value
