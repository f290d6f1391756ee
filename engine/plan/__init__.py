"""What a job would take, told before anything is loaded: rows, memory, bytes, disk, and time.

    plan = make_plan(settings, mesh)
    print(plan)                   a table, rung by rung of the ladder
    plan.check()                  raises UserError where it does not fit, with the settings that do

Every rung is run on networks without numbers (`needs.py`, `engine.simulation`), by the code that
will paint. It has up to four parts, one after the other:

    UNet            all its steps, the sides of guidance at once or in turn
    dilated UNet    the second branch of the demofusion strategy, with wider halos
    encoder         the enlarged picture below becomes a latent
    decoder         the latent becomes the picture below the next rung, or the bytes of the file

A rank needs at once all weights, the latents that the ladder keeps, and the peak of one part. That
is held against what is free (`engine.hardware`). What does not fit is simulated again with other
settings until it does (`refusal.py`), so that the refusal names settings which were tried.

The time is an estimate: arithmetic, bytes and rounds, each over a speed that was measured for some
hundredths of a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.bands import Mesh
from engine.config import Settings, UserError
from engine.fuse import kernels_for
from engine.hardware import (
    Speeds,
    free_disk_bytes,
    free_host_bytes,
    free_memory_bytes,
    kernels_of,
    measure,
)
from engine.loading import Description, count_text_parameters, describe
from engine.output import Target, files_of, target_of, writer_for
from engine.plan.needs import DryRun, Needs
from engine.plan.parts import CodecMode
from engine.plan.refusal import refusal
from engine.plan.table import duration, gigabytes, ranks_text, rung_table

__all__ = ["Needs", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a job takes, and what there is for it.

    Attributes:
        speeds: measured, or None where nobody asks for times.
        limit_bytes: that a rank may use.
        free_disk_bytes: where the file is to go.
        files: what is to be written, the picture itself last.
        refusal: why the job cannot be done, and what would help; None if it can.
    """

    needs: Needs
    speeds: Speeds | None
    limit_bytes: float
    free_disk_bytes: int
    files: tuple[Target, ...]
    refusal: str | None

    def check(self) -> None:
        """Raises UserError where the job does not fit, naming settings that would."""
        if self.refusal:
            raise UserError(self.refusal)

    @property
    def codecs(self) -> dict[int, CodecMode]:
        """The codec of each rung, by the rung's index: what 'auto' comes to here."""
        return {rung.rung.index: rung.codec for rung in self.needs.rungs}

    @property
    def seconds(self) -> float:
        """An estimate for the whole job, but for loading the model."""
        rungs = sum(self._speeds.seconds(rung.cost) for rung in self.needs.rungs)
        return rungs + self._writing_s

    @property
    def _writing_s(self) -> float:
        """For the files, of which every rank compresses its own rows."""
        return (
            sum(target.raw_bytes for target in self.files)
            / self.needs.ranks
            / self._speeds.deflated_bytes
        )

    @property
    def _speeds(self) -> Speeds:
        assert self.speeds is not None, "a plan that is asked for times is made with timed=True"
        return self.speeds

    def __str__(self) -> str:
        needs = self.needs
        suffixes = " and ".join(target.path.suffix for target in reversed(self.files))
        weights = ", ".join(f"{name} {gigabytes(size)}" for name, size in needs.weights.items())
        lines = [
            rung_table(needs, self._speeds),
            f"weights   {weights} on each of {ranks_text(needs.ranks)}",
            f"memory    {gigabytes(needs.peak_bytes)} of {gigabytes(self.limit_bytes)} on a rank",
            f"disk      about {gigabytes(_disk_bytes(self.files, needs.ranks))} to write "
            f"{gigabytes(self.files[-1].raw_bytes)} of pixels as {suffixes}, of "
            f"{gigabytes(self.free_disk_bytes)} free",
            f"time      about {duration(self.seconds)}, {duration(self._writing_s)} of it for the "
            "file: an estimate from short trials",
        ]
        return "\n".join(lines)


def make_plan(
    settings: Settings,
    mesh: Mesh,
    model: Description | None = None,
    *,
    loaded: bool = False,
    timed: bool = True,
) -> Plan:
    """What the job of `settings` takes on the ranks of `mesh`, and what there is. Loads nothing.

    Every rank makes the call, on the device that it will paint on, and gets the same plan; one of
    them simulates.

    Args:
        model: what describes the model, where that is known already.
        loaded: whether its weights are in memory, and no part of what is free.
        timed: whether to try how fast the ranks are, which takes two seconds.

    Raises:
        UserError: the settings do not fit the model, or the model is a single file, whose
            configuration is not known before it is loaded.
    """
    model = model or mesh.agree(lambda: _describe(settings))
    dtype = dtype_of(settings, mesh.device)
    text_bytes = mesh.agree(lambda: count_text_parameters(settings.model)) * dtype.itemsize
    fused = kernels_for(settings.kernels, mesh.device, dtype) == "fused"
    dry_run = DryRun(model, dtype, kernels_of(mesh.device, fused), text_bytes)
    limit_gb = settings.memory.limit_gb
    dry_run.limit_bytes = int(1e9 * limit_gb) if limit_gb else free_memory_bytes(mesh)
    if loaded and not limit_gb:
        dry_run.limit_bytes += sum(dry_run.weights(settings, mesh.size).values())
    no_room = _no_room(settings, mesh)

    def simulated() -> tuple[Needs, str | None] | None:
        if mesh.rank > 0:
            return None
        needs = dry_run.needs(settings, mesh.size)
        return needs, no_room or refusal(dry_run, settings, needs)

    made = mesh.gather_objects(mesh.agree(simulated))[0]
    assert made is not None, "rank 0 has simulated"
    needs, no_fit = made
    # Not before: ranks that wait for rank 0 would have the cores to themselves.
    width = model.unet["block_out_channels"][1]
    speeds = measure(mesh, dtype, width, fused) if timed else None
    disk_bytes = min(mesh.gather_objects(free_disk_bytes(settings.output)))
    return Plan(needs, speeds, dry_run.limit_bytes, disk_bytes, _targets(settings), no_fit)


def _describe(settings: Settings) -> Description:
    model = describe(settings.model, settings.linfusion)
    if model is None:
        raise UserError(
            f"model: {settings.model} is a single file, whose shapes are not known before it is "
            "loaded: plan with the diffusers folder that it was made of"
        )
    return model


def dtype_of(settings: Settings, device: torch.device) -> torch.dtype:
    """The precision that 'auto' means on a device, or the one asked for."""
    if settings.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def require_room(settings: Settings, mesh: Mesh) -> None:
    """Refuses a file for which there is no room on the disk. Every rank makes the call.

    Raises:
        UserError: or, where the format is encoded whole, in memory.
    """
    if (said := _no_room(settings, mesh)) is not None:
        raise UserError(said)


def _no_room(settings: Settings, mesh: Mesh) -> str | None:
    targets = _targets(settings)
    disk_bytes = min(mesh.gather_objects(free_disk_bytes(settings.output)))
    refusals = _disk_refusal(targets, mesh.size, disk_bytes) or _whole_refusal(targets[-1])
    return mesh.gather_objects(refusals)[0]


def _targets(settings: Settings) -> tuple[Target, ...]:
    return tuple(target_of(file) for file in files_of(settings))


def _disk_bytes(targets: Sequence[Target], ranks: int) -> float:
    """What a photograph takes while it is written; flat pictures take less, noise takes more."""
    return sum(writer_for(target.path).disk_bytes(target, ranks) for target in targets)


def _disk_refusal(targets: Sequence[Target], ranks: int, free_bytes: int) -> str | None:
    if free_bytes >= (wanted := _disk_bytes(targets, ranks)):
        return None
    return (
        f"output: {targets[-1].path} will take about {gigabytes(wanted)} while it is written, and "
        f"{gigabytes(free_bytes)} are free there: free some space or name another folder"
    )


def _whole_refusal(target: Target) -> str | None:
    """Of a format that is encoded whole, by this process."""
    wanted, free_bytes = writer_for(target.path).held_share * target.raw_bytes, free_host_bytes()
    if free_bytes >= wanted:
        return None
    return (
        f"output: a {target.path.suffix} file is encoded whole, in {gigabytes(wanted)} of rank 0's "
        f"host, which has {gigabytes(free_bytes)} free: name a .jpg, .png or .tif file"
    )
