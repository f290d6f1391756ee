"""The Python API: load a model over all ranks, paint pictures with it, write them.

    with open_mesh() as mesh:
        engine = Engine.load(settings, mesh)
        picture = engine.generate(settings)

A latent's way through the house: `latent` runs the diffusers pipeline, whose UNet works on bands
(`engine.distribute`); `engine.codec` decodes each rank's rows; `engine.output` has each rank
compress its own rows, and one of them joins the parts. No rank ever holds the whole picture.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

import engine
from engine import codec, output
from engine.bands import DisplacedExchange, ExactExchange, Exchange, Mesh, Traffic, max_bands
from engine.bands.axes import Axes, choose_axes
from engine.bands.boundary import downsampling_factor
from engine.config import Settings, UserError
from engine.demo import WEIGHTS
from engine.linfusion import find_checkpoint, linearize, read_config
from engine.parallel import distribute, require_same_versions
from engine.progress import progress_bar

T = TypeVar("T")

logger = logging.getLogger(__name__)

_PAINTERS = (StableDiffusionPipeline.__name__, StableDiffusionXLPipeline.__name__)


@dataclass(frozen=True)
class Picture:
    """What was painted, and what it took.

    Attributes:
        seconds: from the first step to the file under its final name.
        megabytes_sent: by this rank to others, in MB of 10^6 bytes.
    """

    path: Path
    height: int
    width: int
    seconds: float
    ranks: int
    megabytes_sent: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.width}x{self.height} px in {self.seconds:.1f} s on {self.ranks} "
            f"rank{'s' if self.ranks > 1 else ''}, {self.megabytes_sent:.1f} MB sent per rank"
        )


class Engine:
    """A diffusers pipeline over all ranks of `mesh`. Every rank makes the same calls."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        mesh: Mesh,
        groups: int = 1,
        exchange: Callable[[Mesh, Traffic], Exchange] = ExactExchange,
        settings: Settings | None = None,
    ) -> None:
        """Distribute `pipe` over `mesh`; `groups` and `exchange` as in `engine.distribute`.

        `settings` are those that `pipe` was loaded with, where it was loaded by settings.
        """
        self.pipe = pipe
        self.mesh = mesh
        self._settings = settings
        self.traffic = distribute(pipe, mesh, groups=groups, exchange=exchange).traffic
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, settings: Settings, mesh: Mesh) -> Self:
        """Load the model that `settings` name and share it out over the ranks.

        Raises:
            UserError: before any weights are read where that can be known: a model that is not
                there or of another kind, more ranks than the height can serve, a destination that
                cannot be written, LinFusion modules that do not fit.
        """
        mesh = mesh.on_device(settings.device)
        require_same_versions(mesh)
        axes = _choose_axes(settings, mesh.size)
        mesh.agree(lambda: output.check_destination(settings.output))
        mesh.agree(lambda: _check_model(settings, mesh.size))
        if mesh.rank == 0 and mesh.size > 1:
            logger.info("%d ranks on %s as %s", mesh.size, mesh.device.type, axes)
        pipe = mesh.agree(
            lambda: load(settings.model, settings.linfusion, dtype=_dtype(settings, mesh))
        )
        _check_bands(settings, mesh.size, downsampling_factor(pipe.unet.config.block_out_channels))
        return cls(pipe, mesh, axes.groups, _exchange(settings), settings)

    def generate(self, settings: Settings) -> Picture:
        """Paint the picture of `settings` and write it to `settings.output`.

        Raises:
            UserError: the picture cannot be split over this many ranks or not be written.
        """
        self._require_loaded(settings)
        start, sent_before = time.perf_counter(), self.traffic.megabytes
        latent = self.latent(settings)
        with torch.no_grad():
            rows, pixels = codec.decode(self.pipe.vae, latent)
        self._write(settings, rows, codec.to_uint8(pixels)[0])
        return Picture(
            path=settings.output,
            height=settings.height,
            width=settings.width,
            seconds=time.perf_counter() - start,
            ranks=self.mesh.size,
            megabytes_sent=self.traffic.megabytes - sent_before,
        )

    def _require_loaded(self, settings: Settings) -> None:
        """Settings that only loading heeds must be those that the model was loaded with."""
        if self._settings is None:
            return
        for name in ("model", "linfusion", "dtype", "device", "mesh"):
            if getattr(settings, name) != getattr(self._settings, name):
                raise UserError(f"{name} differs from what was loaded: load another Engine for it")

    def latent(self, settings: Settings) -> Tensor:
        """The denoised latent [1, 4, H / 8, W / 8], the same on every rank."""
        # Every rank draws the whole noise from the same CPU generator: no rank count, no device
        # changes it.
        noise_source = torch.Generator("cpu").manual_seed(settings.seed)
        with progress_bar("painting", settings.steps, enabled=self.mesh.rank == 0) as advance:
            latent: Tensor = self.pipe(
                settings.prompt,
                # None is not "": SDXL then guides by zeros, as its configuration asks.
                negative_prompt=settings.negative_prompt or None,
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                generator=noise_source,
                output_type="latent",
                callback_on_step_end=_on_step_end(advance),
            ).images
        return latent

    def _write(self, settings: Settings, rows: range, band: Tensor) -> None:
        """Each rank compresses its own `band` [h, W, 3]; rank 0 joins the parts and renames."""
        path, mesh = settings.output, self.mesh
        writer = output.writer_for(path)
        size = {"height": settings.height, "width": settings.width}
        metadata = self._metadata(settings)

        def agree(action: Callable[[], T]) -> T:
            return mesh.agree(lambda: _report_disk_errors(path, action))

        # Whatever fails, on whichever rank: leaving the stack removes this rank's part.
        with contextlib.ExitStack() as parts:
            part = agree(
                lambda: parts.enter_context(writer(path, **size, rows=rows, index=mesh.rank))
            )
            agree(lambda: part.write(band.cpu().numpy()))
            summaries = mesh.gather_objects(agree(part.close))
            agree(lambda: writer.assemble(path, summaries, metadata) if mesh.rank == 0 else None)

    def _metadata(self, settings: Settings) -> dict[str, str]:
        """Where the picture came from, to be kept in the file."""
        facts = {
            **settings.provenance(),
            **({} if self._settings else {"model": self.pipe.config.get("_name_or_path")}),
            "dtype": str(self.pipe.unet.dtype).removeprefix("torch."),
            "engine": engine.__version__,
        }
        return {"prompt": settings.prompt, "linfusion-engine": json.dumps(facts, sort_keys=True)}


def _report_disk_errors(path: Path, action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{path}: writing failed ({reason}); free some space or name another folder"
        ) from error


def _on_step_end(advance: Callable[[], object]) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        return tensors

    return callback


def load(model: str, linfusion: str = "auto", **options: Any) -> DiffusionPipeline:
    """A Stable Diffusion pipeline with LinFusion's linear attention, on the CPU.

    Args:
        model: "demo", a diffusers folder, a hub id, or a single `.safetensors` file.
        linfusion: LinFusion modules as in `engine.linearize`; "none" leaves softmax attention.
        options: for diffusers' `from_pretrained` or `from_single_file`, such as `dtype`. A folder's
            safety checker is left out unless it is passed.

    Raises:
        UserError: there is no such model, it is of another kind, or the modules do not fit.
    """
    try:
        if Path(model).suffix == ".safetensors":
            pipe = _single_file_class(Path(model)).from_single_file(model, **options)
        else:
            pipe = _from_folder(_model_source(model), options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(model, error) from error
    if linfusion != "none":
        linearize(pipe, linfusion)
    return pipe


def _from_folder(source: str, options: dict[str, Any]) -> DiffusionPipeline:
    index = DiffusionPipeline.load_config(source)
    # The safety checker looks at whole pictures on one device; no rank need have one.
    extras = {"safety_checker": None} if "safety_checker" in index else {}
    return DiffusionPipeline.from_pretrained(source, **{**extras, **options})


def _single_file_class(file: Path) -> type[DiffusionPipeline]:
    """SDXL keeps its text encoders under a name of its own; only the file's header is read."""
    with safe_open(file, "pt") as tensors:
        is_xl = any(key.startswith("conditioner.embedders.") for key in tensors.keys())  # noqa: SIM118
    return StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline


def _unreadable(model: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"model {model!r} is not readable: give 'demo', a diffusers folder, a .safetensors file or "
        f"a hub id ({reason})"
    )


def _model_source(model: str) -> str:
    return str(WEIGHTS) if model == "demo" else model


def _choose_axes(settings: Settings, ranks: int) -> Axes:
    asked = settings.mesh.guidance
    return choose_axes(
        ranks,
        guided=settings.guidance_scale > 1,
        guidance=None if asked == "auto" else int(asked),
    )


def _exchange(settings: Settings) -> Callable[[Mesh, Traffic], Exchange]:
    if settings.mesh.synchronisation == "exact":
        return ExactExchange
    return partial(DisplacedExchange, warmup_steps=settings.mesh.warmup_steps)


def _check_model(settings: Settings, ranks: int) -> None:
    """Everything that the model's configuration files tell, without its weights."""
    if Path(settings.model).suffix == ".safetensors":
        if not Path(settings.model).is_file():
            raise _unreadable(settings.model, FileNotFoundError("no such file"))
        return  # all else is known when it is loaded
    source = _model_source(settings.model)
    try:
        index = DiffusionPipeline.load_config(source)
        unet = UNet2DConditionModel.load_config(source, subfolder="unet")
    except (OSError, ValueError) as error:
        raise _unreadable(settings.model, error) from error
    if index.get("_class_name") not in _PAINTERS:
        raise UserError(
            f"model {settings.model!r} is a {index.get('_class_name')}: the command line paints "
            f"with {' and '.join(_PAINTERS)}"
        )
    if index["vae"][1] != AutoencoderKL.__name__:
        raise UserError(
            f"model {settings.model!r} decodes by a {index['vae'][1]}: the command line needs an "
            "AutoencoderKL, whose decoder it shares out"
        )
    _check_bands(settings, ranks, downsampling_factor(unet["block_out_channels"]))
    if settings.linfusion != "none":
        read_config(find_checkpoint(settings.linfusion, source, unet["cross_attention_dim"]))


def _check_bands(settings: Settings, ranks: int, row_multiple: int) -> None:
    """Refuse more ranks than there are rows, for the UNet or for the VAE's decoder."""
    rows = settings.height // 8

    def fits(ranks: int) -> bool:
        with contextlib.suppress(UserError):
            return _choose_axes(settings, ranks).band <= max_bands(rows, row_multiple)
        return False

    working = [fewer for fewer in range(1, min(ranks, rows) + 1) if fits(fewer)]
    if ranks not in working:
        band = _choose_axes(settings, ranks).band
        start = f"start {working[-1]}, or " if working else ""
        raise UserError(
            f"a picture of {settings.height} px height cannot be shared by {ranks} ranks: {start}"
            f"ask for {8 * max(ranks, row_multiple * (band - 1) + 1)} px or more"
        )


def _dtype(settings: Settings, mesh: Mesh) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.float16 if mesh.device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype
