"""How several processes train one student: an interface, and two backends behind it.

    ddp          every rank keeps everything; gradients are averaged. One process is a case of it.
    deepspeed    ZeRO (arXiv:1910.02054): optimizer, gradients and, in stage 3, weights in shares

Each rank passes the loss of its own pictures, in shares of the whole step's mean; both backends
average over ranks, so the loss is multiplied by their number first. The optimizer is torch's AdamW
in both, and both clip by the norm of the whole gradient: so both follow one curve.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from engine.bands import Mesh, tell_deepspeed
from engine.config import UserError
from engine.distill.settings import BackendSettings, OptimizerSettings
from engine.distill.student import Distiller, Lesson, learning

CHECKPOINT = "checkpoint"


class Backend(Protocol):
    """One student, on all ranks. Every rank makes the same calls."""

    def losses(self, lesson: Lesson, last: bool) -> Tensor:
        """`Distiller.forward`; `last` is whether it is this rank's last before the update."""

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients; `loss` is this rank's share of the step's mean."""

    def update(self, rate: float) -> float:
        """Change the weights by the gradients, and clear those; their norm before clipping."""

    def whole(self) -> Any:
        """A context that yields the weights that learn, whole, on every rank."""

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Keep weights, optimizer and `state` (the same on all ranks), in place of what is there.

        Raises OSError.
        """

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from what `save` kept; its `state`.

        Raises:
            UserError: it is of another backend, or of another number of ranks where that matters.
        """


def open_backend(
    settings: BackendSettings, optimizer: OptimizerSettings, distiller: Distiller, mesh: Mesh
) -> Backend:
    """The backend that the settings name."""
    kind = DeepSpeed if settings.name == "deepspeed" else Replicas
    return kind(settings, optimizer, distiller, mesh)


def require_backend(settings: BackendSettings) -> None:
    """Refuse a backend that is not installed.

    Raises:
        UserError: and how to install it.
    """
    if settings.name == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError(
            "backend.name deepspeed: DeepSpeed is not installed; "
            "pip install 'linfusion-engine[distill]', or choose ddp"
        )


def kept_state(folder: Path) -> dict[str, Any] | None:
    """What tells a checkpoint in `folder`: step, facts, backend, ranks; None where there is none.

    Raises:
        UserError: it is not readable.
    """
    file = folder / CHECKPOINT / "about.json"
    try:
        about: dict[str, Any] = json.loads(file.read_text())
        if missing := {"step", "facts", "backend", "ranks", "tag"} - set(about):
            raise ValueError(f"{min(missing)} is missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(folder, file, error) from error
    return about


def _unreadable(folder: Path, file: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"{file}: this checkpoint is not readable ({reason}); remove {folder} to begin anew"
    )


def _keep_about(folder: Path, about: dict[str, Any]) -> None:
    """From here on the checkpoint is this one; those before it go."""
    place = folder / CHECKPOINT
    temporary = place / "about.tmp"
    with temporary.open("w") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(place / "about.json")
    for old in place.iterdir():
        if old.is_dir() and old.name != about["tag"]:
            shutil.rmtree(old)


def _adamw(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=settings.weight_decay)


# --- ddp ------------------------------------------------------------------------------------------


class Replicas:
    """Every rank keeps everything: torch's DistributedDataParallel, or nothing around one process.

    A checkpoint goes on with any number of ranks.
    """

    def __init__(
        self,
        settings: BackendSettings,
        optimizer: OptimizerSettings,
        distiller: Distiller,
        mesh: Mesh,
    ) -> None:
        self._mesh, self._clip = mesh, optimizer.clip
        self._parameters = learning(distiller.student)
        self._optimizer = _adamw(optimizer, self._parameters)
        self._module: Any = distiller
        if mesh.size > 1:
            self._module = nn.parallel.DistributedDataParallel(distiller, process_group=mesh.group)

    def losses(self, lesson: Lesson, last: bool) -> Tensor:
        silent = not last and self._mesh.size > 1
        # DDP asks in its forward whether backward is to exchange anything.
        with self._module.no_sync() if silent else nullcontext():
            losses: Tensor = self._module(lesson)
        return losses

    def backward(self, loss: Tensor) -> None:
        (loss * self._mesh.size).backward()

    def update(self, rate: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextmanager
    def whole(self) -> Iterator[list[nn.Parameter]]:
        yield self._parameters

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        if self._mesh.rank == 0:
            about = {**state["about"], "backend": "ddp", "ranks": self._mesh.size}
            about["tag"] = f"step_{about['step']:08d}"
            place = folder / CHECKPOINT / about["tag"]
            place.mkdir(parents=True, exist_ok=True)
            weights = [parameter.detach() for parameter in self._parameters]
            kept = {"weights": weights, "optimizer": self._optimizer.state_dict(), **state}
            with (place / "replica.pt").open("wb") as file:
                torch.save(kept, file)
                file.flush()
                os.fsync(file.fileno())
            _keep_about(folder, about)

    def load(self, folder: Path) -> dict[str, Any]:
        about = _require_own(folder, "ddp", None)
        file = folder / CHECKPOINT / about["tag"] / "replica.pt"
        try:
            kept: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise _unreadable(folder, file, error) from error
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, kept["weights"], strict=True):
                parameter.copy_(weight)
        self._optimizer.load_state_dict(kept["optimizer"])
        return kept


def _require_own(folder: Path, name: str, ranks: int | None) -> dict[str, Any]:
    about = kept_state(folder)
    if about is None:
        raise UserError(
            f"output: rank 0 has a checkpoint in {folder}, and another host has none; name a "
            "folder that all of them share"
        )
    if about["backend"] != name:
        raise UserError(
            f"{folder}: this run was begun with backend.name {about['backend']}; go on with it, or "
            "choose another output"
        )
    if ranks is not None and about["ranks"] != ranks:
        raise UserError(
            f"{folder}: this run was begun on {about['ranks']} ranks, among which DeepSpeed has "
            f"shared out its checkpoint; go on with as many (there are {ranks})"
        )
    return about


# --- deepspeed ------------------------------------------------------------------------------------


class DeepSpeed:
    """ZeRO. A checkpoint goes on with as many ranks as it was made by."""

    def __init__(
        self,
        settings: BackendSettings,
        optimizer: OptimizerSettings,
        distiller: Distiller,
        mesh: Mesh,
    ) -> None:
        deepspeed = _imported(mesh)
        self._deepspeed, self._mesh, self._stage = deepspeed, mesh, int(settings.stage)
        self._parameters = learning(distiller.student)
        zero: dict[str, Any] = {"stage": self._stage}
        if settings.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        self._engine, *_ = deepspeed.initialize(
            model=distiller,
            optimizer=_adamw(optimizer, self._parameters),
            model_parameters=self._parameters,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # never used: losses come weighted
                "gradient_accumulation_steps": 1,  # the boundary is told instead
                "gradient_clipping": optimizer.clip,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # which a compiler would be needed for
                "steps_per_print": 10**9,
            },
        )

    def losses(self, lesson: Lesson, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        losses: Tensor = self._engine(lesson)
        return losses

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._mesh.size)

    def update(self, rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @contextmanager
    def whole(self) -> Iterator[list[nn.Parameter]]:
        if self._stage < 3:
            yield self._parameters
            return
        with self._deepspeed.zero.GatheredParameters(self._parameters):
            yield self._parameters

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        about = {**state["about"], "backend": "deepspeed", "ranks": self._mesh.size}
        about["tag"] = f"step_{about['step']:08d}"
        self._engine.save_checkpoint(
            str(folder / CHECKPOINT), tag=about["tag"], client_state={"kept": state},
            save_latest=False, exclude_frozen_parameters=True,
        )  # fmt: skip
        self._mesh.barrier()
        if self._mesh.rank == 0:
            _keep_about(folder, about)

    def load(self, folder: Path) -> dict[str, Any]:
        about = _require_own(folder, "deepspeed", self._mesh.size)
        _, told = self._engine.load_checkpoint(
            str(folder / CHECKPOINT), tag=about["tag"], load_module_strict=False
        )
        kept: dict[str, Any] = told["kept"]
        return kept


def _imported(mesh: Mesh) -> Any:
    """DeepSpeed, quiet, and told of the ranks that have met already."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    tell_deepspeed(mesh.device)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    deepspeed.utils.logger.setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    if not dist.is_initialized():  # a process by itself is a group too, for DeepSpeed
        kind = "nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(kind, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed
