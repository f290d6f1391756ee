"""What can be known of a job before it is painted, and is asked before weights are loaded.

Where the ranks compute and how they share the work, whether a picture can be split over them, what
it would take, whether its files can be written, and whether the weights are those that were asked
for. Whatever may be true on one rank alone is agreed upon by all.
"""

import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine import ladder, memory, output, provenance
from engine.bands import Mesh, max_bands
from engine.bands.axes import Axes, choose_axes
from engine.bands.boundary import downsampling_factor
from engine.config import Settings, UserError
from engine.fuse import require_kernels
from engine.ladder import Rung
from engine.loading import Description, describe, name_linfusion, picture_size, weight_files
from engine.parallel import require_same_versions
from engine.plan import Plan, make_plan

LOADING = (
    "model", "linfusion", "model_sha256", "linfusion_sha256", "device", "mesh", "memory", "kernels",
)  # fmt: skip
"""settings that only loading heeds, besides `dtype`, whose "auto" is another name for one"""


def axes_of(settings: Settings, ranks: int) -> Axes:
    """How so many ranks share out a picture. Raises UserError where they cannot as asked."""
    asked = settings.mesh.guidance
    return choose_axes(
        ranks,
        guided=settings.guidance_scale > 1,
        guidance=None if asked == "auto" else int(asked),
    )


def on_device(settings: Settings, mesh: Mesh) -> Mesh:
    """`mesh` on its device, where what the settings need is known to be there.

    Raises:
        UserError: it is not, on some rank.
    """
    mesh = mesh.on_device(settings.device)
    require_same_versions(mesh)
    memory.require(memory_options(settings), mesh)
    mesh.agree(lambda: require_kernels(settings.kernels, mesh.device))
    return mesh


def check_output(settings: Settings) -> None:
    """Refuses files that cannot be written, by trying, and settings that they would not heed."""
    output.check(settings.output, settings.height, settings.width, settings.file)
    for file in output.files_of(settings):
        output.check_destination(file.output)


def named_weights(settings: Settings, model: Description) -> dict[str, str]:
    """The names of the model, and of its LinFusion modules if there are any."""
    modules = name_linfusion(settings.model, settings.linfusion, model)
    return {"model": settings.model} | ({} if modules == "none" else {"linfusion": modules})


def _files(settings: Settings, model: Description) -> dict[str, dict[str, Path]]:
    """All files that the picture comes from, by what they are, as far as they are here."""
    source = settings.ladder.upscale
    return weights_of(settings, model) | (
        {"ladder.upscale": {source.name: source}} if source is not None else {}
    )


def weights_of(settings: Settings, model: Description) -> dict[str, dict[str, Path]]:
    """The files of the model's weights and of its LinFusion modules', as far as they are here."""
    named = named_weights(settings, model)
    files = {kind: weight_files(name) for kind, name in named.items()}
    return {kind: found for kind, found in files.items() if found}


def require_hashes(
    settings: Settings, mesh: Mesh, model: Description | None, kinds: list[str]
) -> list[str]:
    """Refuse other files than those asked for; the kinds that are not here yet are returned.

    Rank 0 looks for all.

    Raises:
        UserError: the files have another hash.
    """
    hashes = {
        "model": settings.model_sha256,
        "linfusion": settings.linfusion_sha256,
        "ladder.upscale": settings.ladder.upscale_sha256,
    }
    wanted = {kind: hashes[kind] for kind in kinds if hashes[kind] != "any"}

    def look() -> list[str]:
        files = _files(settings, model) if model and wanted and mesh.rank == 0 else {}
        for kind, sha256 in wanted.items():
            if kind in files:
                provenance.require_hash(kind, sha256, files[kind])
        return [kind for kind in wanted if kind not in files]

    return mesh.gather_objects(mesh.agree(look))[0]


def plan_job(settings: Settings, mesh: Mesh) -> Plan:
    """What painting `settings` on these ranks would take; loads no weights.

    Raises:
        UserError: as `Engine.load`, but for a lack of memory or disk, which the plan tells.
    """
    mesh = on_device(settings, mesh)
    axes_of(settings, mesh.size)
    mesh.agree(
        lambda: output.check(settings.output, settings.height, settings.width, settings.file)
    )
    model = mesh.agree(lambda: describe(settings.model, settings.linfusion))
    if model is None:
        raise UserError(
            f"model: {settings.model} is a single file, whose shapes are not known before it is "
            "loaded: plan with the diffusers folder that it was made of"
        )
    return checked_plan(settings, mesh, model, timed=True)


def checked_plan(
    settings: Settings, mesh: Mesh, model: Description, loaded: bool = False, timed: bool = False
) -> Plan:
    """The plan of a job that so many ranks can share; `engine.plan.make_plan` has the rest.

    Raises:
        UserError: they cannot.
    """
    mesh.agree(lambda: check_ranks(settings, mesh.size, model))
    return make_plan(settings, mesh, model, loaded=loaded, timed=timed)


def planned(settings: Settings) -> Settings:
    """`settings` but for what changes no plan: pictures of one size and ladder share theirs.

    Raises:
        UserError: the picture to be upscaled is not there.
    """
    same: dict[str, Any] = {"prompt": "", "negative_prompt": "", "seed": 0, "plan": False}
    if (start := settings.ladder.upscale) is not None:
        height, width = picture_size(start)
        alike = {"upscale": Path(f"{width}x{height}"), "upscale_sha256": "any"}
        same["ladder"] = settings.ladder.model_copy(update=alike)
    return settings.model_copy(update={**same, "output": Path(f"any{settings.output.suffix}")})


def memory_options(settings: Settings) -> memory.MemoryOptions:
    """The settings of memory that `engine.memory` knows."""
    names = [field.name for field in fields(memory.MemoryOptions)]
    return memory.MemoryOptions(**{name: getattr(settings.memory, name) for name in names})


def check_ranks(settings: Settings, ranks: int, model: Description) -> None:
    """Refuses more ranks than can share a picture, as far as the model's configuration tells."""
    if settings.ladder.strategy == "none":
        _check_bands(settings, ranks, downsampling_factor(model.unet["block_out_channels"]))
        return
    smallest = rungs_of(settings, model)[0]
    if ranks > smallest.height // 8:
        raise UserError(
            f"the smallest rung of {smallest} px cannot be shared by {ranks} ranks: start "
            f"{smallest.height // 8}, or set ladder.base to a larger side"
        )


def rungs_of(settings: Settings, model: Description) -> list[Rung]:
    """The ladder of `settings` for this model, or from the picture that they begin with."""
    start = settings.ladder.upscale
    return ladder.rungs(settings, model.native_side, picture_size(start) if start else None)


def _check_bands(settings: Settings, ranks: int, row_multiple: int) -> None:
    """Refuse more ranks than there are rows, for the UNet or for the VAE's decoder."""
    rows = settings.height // 8

    def fits(ranks: int) -> bool:
        with contextlib.suppress(UserError):
            return axes_of(settings, ranks).band <= max_bands(rows, row_multiple)
        return False

    working = [fewer for fewer in range(1, min(ranks, rows) + 1) if fits(fewer)]
    if ranks not in working:
        band = axes_of(settings, ranks).band
        start = f"start {working[-1]}, or " if working else ""
        raise UserError(
            f"a picture of {settings.height} px height cannot be shared by {ranks} ranks: {start}"
            f"ask for {8 * max(ranks, row_multiple * (band - 1) + 1)} px or more"
        )
