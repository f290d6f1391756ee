"""The Python API: load a model over all ranks, paint pictures with it, write them.

    with open_mesh() as mesh:
        engine = Engine.load(settings, mesh)
        picture = engine.generate(settings)

A latent's way through the house: `latent` runs the diffusers pipeline, whose UNet works on bands
(`engine.distribute`); `engine.codec` decodes each rank's rows; by `engine.saving` each rank
compresses its own rows, and one of them joins the parts. No rank ever holds the whole picture.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import engine
from engine import codec, graphs, ladder, memory, output, provenance
from engine.bands import DisplacedExchange, ExactExchange, Exchange, Mesh, Traffic
from engine.bands.boundary import downsampling_factor
from engine.colours import keep_colours, thumbnail, thumbnail_size
from engine.config import Group, Settings, UserError
from engine.diffusion import Conditions, Denoiser, encode
from engine.fuse import choose_kernels, kernels_for
from engine.keeper import Control, Keeper
from engine.ladder import Rung
from engine.loading import Description, describe, load, read_picture
from engine.output.seams import Seams
from engine.parallel import PipelineBoundary, distribute, lay_out, share_out
from engine.plan import Plan, dtype_of, make_plan, require_room
from engine.preflight import (
    LOADING,
    axes_of,
    check_output,
    check_ranks,
    checked_plan,
    memory_options,
    named_weights,
    on_device,
    planned,
    require_hashes,
    rungs_of,
    weights_of,
)
from engine.saving import save

logger = logging.getLogger(__name__)

Samples = dict[str, np.ndarray]
"""pixels [h, W, 3] by the type of their numbers"""


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
        plan: Plan | None = None,
        control: Control | None = None,
    ) -> None:
        """Distribute `pipe` over `mesh`; `groups` and `exchange` as in `engine.distribute`.

        `settings` are those that `pipe` was loaded with, where it was loaded by settings, and
        `plan` is what was planned for them. `control` is told of progress.
        """
        self.control = control or Control()
        self.pipe = pipe
        self.mesh = mesh
        self._settings = settings
        self._kernels = "plain"
        # Nobody else writes what is known about the picture.
        model, is_first = Description.of(pipe), mesh.rank == 0
        files = mesh.agree(lambda: weights_of(settings, model) if settings and is_first else {})
        self._hashes = provenance.Hashes(files)
        self._plans: dict[Settings, Plan] = {}
        if settings is not None and plan is not None:
            kind = mesh.agree(lambda: planned(settings))
            self._plans = {settings: plan, kind: plan}
        self._exchange = exchange
        layout = distribute(pipe, mesh, groups=groups, exchange=exchange)
        self._layouts = {groups: layout}
        self.traffic = layout.traffic
        pipe.set_progress_bar_config(disable=True)
        if settings is not None:
            # All alike: what fused blocks send to other ranks is without biases.
            kernels = kernels_for(settings.kernels, mesh.device, pipe.unet.dtype)
            self._kernels = "plain" if mesh.any(kernels == "plain") else kernels
            for network in (pipe.unet, pipe.vae):
                choose_kernels(network, self._kernels)
            memory.apply(pipe.unet, memory_options(settings), mesh)

    @classmethod
    def load(cls, settings: Settings, mesh: Mesh, control: Control | None = None) -> Self:
        """Load the model that `settings` name and share it out over the ranks.

        Raises:
            UserError: before any weights are read where that can be known: a model that is not
                there or of another kind, more ranks than the height can serve, a destination that
                cannot be written, LinFusion modules that do not fit.
        """
        mesh = on_device(settings, mesh)
        axes = axes_of(settings, mesh.size)
        mesh.agree(lambda: check_output(settings))
        model = mesh.agree(lambda: describe(settings.model, settings.linfusion))
        plan = checked_plan(settings, mesh, model) if model else None
        if plan:
            plan.check()
        # Of a model that is not here yet, weights are looked at when the hub has sent them.
        unseen = require_hashes(settings, mesh, model, ["model", "linfusion", "ladder.upscale"])
        if mesh.rank == 0 and mesh.size > 1:
            logger.info("%d ranks on %s as %s", mesh.size, mesh.device.type, axes)
        pipe = mesh.agree(
            lambda: load(settings.model, settings.linfusion, dtype=dtype_of(settings, mesh.device))
        )
        if unseen := require_hashes(settings, mesh, Description.of(pipe), unseen):
            raise UserError(
                f"{unseen[0]}: has no files whose SHA-256 could be looked at; leave "
                f"{unseen[0]}_sha256 out"
            )
        if plan is None:  # of a single file, nothing is known before
            plan = checked_plan(settings, mesh, Description.of(pipe), loaded=True)
            plan.check()
        return cls(pipe, mesh, axes.groups, _exchange(settings), settings, plan, control)

    def generate(self, settings: Settings) -> Picture:
        """Paint the picture of `settings` and write it to `settings.output`.

        With `settings.resume` it goes on from where an interrupted job has stopped.

        Raises:
            UserError: the picture cannot be split over this many ranks or not be written, or the
                checkpoint is of other settings.
            Interrupted: `control.should_stop` said so, on some rank.
        """
        self._require(settings)
        start, sent_before = time.perf_counter(), self.traffic.megabytes
        for_the_file = Traffic()
        codecs = self._codecs_used(settings)
        keeper = self._keeper(settings, codecs)
        rows, samples = self._samples(settings, keeper)
        keeper.phase("writing")
        seams = self._write(settings, codecs, rows, samples, for_the_file)
        self.mesh.agree(keeper.finish)
        if seams is not None and self.mesh.rank == 0:
            logger.log(logging.WARNING if seams.visible else logging.INFO, "%s", seams)
        return Picture(
            path=settings.output,
            height=settings.height,
            width=settings.width,
            seconds=time.perf_counter() - start,
            ranks=self.mesh.size,
            megabytes_sent=self.traffic.megabytes - sent_before + for_the_file.megabytes,
        )

    def differs(self, settings: Settings) -> str | None:
        """The first setting that only loading heeds, and that was another one then."""
        if self._settings is None:
            return None
        for name in LOADING:
            if getattr(settings, name) != getattr(self._settings, name):
                return name
        same = dtype_of(settings, self.mesh.device) == dtype_of(self._settings, self.mesh.device)
        return None if same else "dtype"

    def _require(self, settings: Settings) -> None:
        """What loading has made sure of for its own settings, for these."""
        if (name := self.differs(settings)) is not None:
            raise UserError(f"{name} differs from what was loaded: load another Engine for it")
        self.mesh.agree(lambda: check_output(settings))
        model = Description.of(self.pipe)
        require_hashes(settings, self.mesh, model, ["ladder.upscale"])
        if self._settings is not None:
            self.mesh.agree(lambda: check_ranks(settings, self.mesh.size, model))
            self._planned(settings)
        require_room(settings, self.mesh)

    @torch.no_grad()
    def _samples(self, settings: Settings, keeper: Keeper) -> tuple[range, Samples]:
        """This rank's rows of the finished picture as its files take them, [h, W, 3]."""
        state = self._climb_all(settings, keeper)
        keeper.phase("decoding")
        rows, pixels = self._pixels(settings, state, settings.height)
        wanted = {output.target_of(file).sample for file in output.files_of(settings)}
        return rows, {
            sample: codec.to_samples(pixels, sample)[0].cpu().numpy() for sample in wanted
        }

    @torch.no_grad()
    def paint(self, settings: Settings) -> tuple[range, Tensor]:
        """This rank's rows of the finished picture, and their pixels [1, 3, h, W] in -1 ... 1."""
        state = self._climb_all(settings)
        return self._pixels(settings, state, settings.height)

    @torch.no_grad()
    def latent(self, settings: Settings) -> Tensor:
        """The latent [1, C, H / 8, W / 8] of the finished picture, the same on every rank."""
        return self._climb_all(settings).latent

    def _keeper(self, settings: Settings, codecs: list[str]) -> Keeper:
        rungs = self.mesh.agree(lambda: rungs_of(settings, Description.of(self.pipe)))
        # What saves memory or shares out the work may be another when the job goes on.
        elsewhere = {"mesh", "memory", "kernels", "graphs", "file"} - settings.provenance().keys()

        def facts() -> dict[str, Any]:
            repeatable = self._repeatable(settings, codecs)
            return {name: repeatable[name] for name in repeatable.keys() - elsewhere}

        def glimpse(state: ladder.State) -> np.ndarray:
            return codec.glimpse(self.pipe.vae, state.latent)

        return Keeper(settings, self.mesh, self.pipe.scheduler, rungs, facts, glimpse, self.control)

    def _climb_all(self, settings: Settings, keeper: Keeper | None = None) -> ladder.State:
        """From the base, or from the picture that is to be upscaled, to the last rung's end."""
        rungs = self.mesh.agree(lambda: rungs_of(settings, Description.of(self.pipe)))
        scheduler = self.pipe.scheduler
        with self._painting(settings):
            conditions = self._encode(settings, rungs)
            # Every rank draws the whole noise from the same CPU generator: no rank count, no
            # device changes it.
            generator = torch.Generator("cpu").manual_seed(settings.seed)
            state = keeper.resumed() if keeper else None
            first = state.rung if state else int(settings.ladder.upscale is not None)
            for rung in rungs[first:]:
                if state is not None and state.rung == rung.index:
                    pass  # goes on
                elif rung.index == 0:
                    state = self._begin_base(rung, generator)
                else:
                    below = rungs[rung.index - 1]
                    reference, colours = self._enlarge(settings, state, below, rung)
                    generator = state.generator if state else generator
                    state = ladder.begin_rung(rung, scheduler, reference, generator, state, colours)
                self._climb(settings, conditions, state, rung, keeper)
        assert state is not None, "a ladder has a base or a rung"
        return state

    def _painting(self, settings: Settings) -> contextlib.AbstractContextManager[None]:
        """What surrounds a picture where ranks share it."""
        if isinstance(self.pipe, PipelineBoundary):
            return self.pipe.painting(settings.provenance())
        return contextlib.nullcontext()

    def _encode(self, settings: Settings, rungs: list[Rung]) -> Conditions:
        return encode(
            self.pipe,
            settings.prompt,
            settings.negative_prompt,
            guided=self.pipe.unet.config.time_cond_proj_dim is None
            and any(rung.guidance_scale > 1 for rung in rungs),
            height=rungs[0].height,
            width=rungs[0].width,
        )

    def _begin_base(self, rung: Rung, generator: torch.Generator) -> ladder.State:
        unet = self.pipe.unet
        like = torch.empty(0, device=self.mesh.device, dtype=unet.dtype)
        return ladder.begin_base(
            rung, self.pipe.scheduler, generator, like, unet.config.in_channels
        )

    def _pixels(self, settings: Settings, state: ladder.State, height: int) -> tuple[range, Tensor]:
        """This rank's rows of what `state` looks like, in the base's colours if they are kept."""
        vae = self.pipe.vae
        rows, pixels = codec.decode(vae, state.latent, self._codec(settings, state.rung))
        if state.colours is not None:
            pixels = keep_colours(codec.layout_of(vae), pixels, rows, height, state.colours)
        return rows, pixels.clamp_(-1, 1)

    def _enlarge(
        self, settings: Settings, state: ladder.State | None, below: Rung, rung: Rung
    ) -> tuple[Tensor, Tensor | None]:
        """The picture below (the state's, or the user's) as a latent of this rung's size.

        Rows of pixels all the way: no rank holds the picture but in its latent.

        Returns:
            (latent, the thumbnail whose colours are kept)
        """
        vae = self.pipe.vae
        if state is None:
            rows, pixels = self._own_rows(settings, below.height)
        else:
            rows, pixels = self._pixels(settings, state, below.height)
        sizes = (below.height, below.width), (rung.height, rung.width)
        colours = None if state is None else state.colours
        if settings.ladder.keep_colours and colours is None:
            small = thumbnail_size(sizes[0], settings.ladder.keep_colours)
            colours = thumbnail(codec.layout_of(vae), pixels, rows, below.height, small)
        _, pixels = codec.resize(vae, pixels, *sizes)
        by = self._codec(settings, rung.index)
        latent = codec.encode(vae, pixels.clamp_(-1, 1), rung.height, by)
        return latent.to(self.pipe.unet.dtype), colours

    def _own_rows(self, settings: Settings, height: int) -> tuple[range, Tensor]:
        """This rank's rows of the picture to upscale, [1, 3, h, W] in -1 ... 1."""
        path, vae = settings.ladder.upscale, self.pipe.vae
        assert path is not None
        layout = codec.layout_of(vae)
        rows = layout.own(layout.bands(height, 8))
        picture = self.mesh.agree(lambda: read_picture(path))
        pixels = torch.tensor(picture[rows.start : rows.stop], device=vae.device, dtype=vae.dtype)
        return rows, (pixels / 127.5 - 1).permute(2, 0, 1)[None]

    def _codec(self, settings: Settings, rung: int) -> codec.Codec:
        """What goes from latents of that rung to pixels and back; "auto" is as the plan says."""
        if (asked := settings.codec.asked(rung)) != "auto":
            return codec.choose(settings.codec, asked)
        return codec.choose(settings.codec, self._planned(settings).codecs[rung])

    def _planned(self, settings: Settings) -> Plan:
        """The plan for pictures like this one, made when first asked for. Every rank asks.

        Kept for these very settings too: while it is painted, nothing depends on whether the
        picture that it is made from is still there, which ranks may see differently.
        """
        if settings not in self._plans:
            kind = self.mesh.agree(lambda: planned(settings))
            if kind not in self._plans:
                model = Description.of(self.pipe)
                plan = make_plan(settings, self.mesh, model, loaded=True, timed=False)
                plan.check()
                self._plans[kind] = plan
            self._plans[settings] = self._plans[kind]
        return self._plans[settings]

    def _codecs_used(self, settings: Settings) -> list[str]:
        """What the codec of each rung comes to, if it is "auto". Every rank asks.

        It depends on how much memory there is.
        """
        if settings.codec.mode != "auto" or settings.codec.rungs:
            return []
        codecs = self._planned(settings).codecs
        # A picture to be upscaled is a base without one.
        return [codecs.get(rung, "exact") for rung in range(max(codecs) + 1)]

    def _climb(
        self,
        settings: Settings,
        conditions: Conditions,
        state: ladder.State,
        rung: Rung,
        keeper: Keeper | None,
    ) -> None:
        """Denoise one rung, as many ranks sharing it as it has bands."""
        guided = len(conditions.embeddings) == 2 and rung.guidance_scale > 1
        if not guided and len(conditions.embeddings) == 2:
            conditions = conditions.side(1)
        in_turn = settings.memory.guidance_in_turn
        self._lay_out(settings, rung, guided and not in_turn)
        model = Denoiser(self.pipe, conditions, rung.guidance_scale, in_turn)
        on_step = keeper.step if keeper else lambda state: None
        with self._replayed(settings, state, rung):
            ladder.climb(model, state, rung, settings.ladder, on_step)

    def _replayed(
        self, settings: Settings, state: ladder.State, rung: Rung
    ) -> contextlib.AbstractContextManager[None]:
        """Around the steps of a rung: UNet calls recorded and replayed, where that pays."""
        left = ladder.calls(self.pipe.scheduler, rung) - state.step
        pays = left >= graphs.FEWEST and state.latent[0, 0].numel() <= graphs.LARGEST
        on_gpu = self.mesh.device.type == "cuda"
        if settings.graphs == "off" or not (pays and on_gpu) or memory.moves(self.pipe.unet):
            return contextlib.nullcontext()
        return graphs.replayed(self.pipe.unet, bands=settings.graphs == "all")

    def _lay_out(self, settings: Settings, rung: Rung, guided: bool) -> None:
        """Share the rung out over the ranks; a small one has fewer bands than there are ranks."""
        if self.mesh.size == 1:
            return
        row_multiple = downsampling_factor(self.pipe.unet.config.block_out_channels)
        groups = ladder.groups(settings, rung, self.mesh.size, row_multiple, guided)
        if groups not in self._layouts:
            self._layouts[groups] = share_out(
                self.mesh, groups, self._exchange, traffic=self.traffic
            )
        lay_out(self.pipe, self._layouts[groups])
        self.pipe.forget()

    def _write(
        self,
        settings: Settings,
        codecs: list[str],
        rows: range,
        samples: Samples,
        traffic: Traffic,
    ) -> Seams | None:
        """Each rank compresses its own rows; rank 0 joins the parts and renames."""

        def describe(file: Settings, seams: Seams | None) -> output.Metadata:
            facts = {
                "engine": engine.__version__,
                "settings": self._repeatable(file, codecs),
                "run": self._circumstances(settings, seams),
            }
            return {"prompt": settings.prompt, provenance.KEY: facts}

        seams = None
        for file in output.files_of(settings):
            target, itself = output.target_of(file), file is settings
            pixels, about = samples[target.sample], partial(describe, file)
            seams = save(target, self.mesh, traffic, rows, pixels, about, with_preview=itself)
        return seams

    def _repeatable(self, settings: Settings, codecs: list[str]) -> dict[str, Any]:
        """The settings that paint this picture again, whatever "auto" would mean elsewhere.

        Rank 0 alone knows the hashes of weights.
        """
        facts = settings.provenance()
        if codecs:
            facts["codec"]["rungs"] = codecs
        pinned = {f"{name}_sha256": found for name, found in self._hashes.wait().items()}
        if (source := settings.ladder.upscale) is not None:
            with contextlib.suppress(OSError):  # gone meanwhile, which costs no painted picture
                facts["ladder"]["upscale_sha256"] = provenance.weights_sha256({source.name: source})
        return {
            **facts,
            **self._models(settings),
            **pinned,
            "dtype": str(self.pipe.unet.dtype).removeprefix("torch."),
            "mesh": facts.get("mesh", {}) | _chosen(settings.mesh, {"image"}),
            # What saves memory, or time, computes in another order, which rounds otherwise.
            "memory": _chosen(settings.memory, {"limit_gb"}),
            **({} if settings.kernels == "auto" else {"kernels": settings.kernels}),
            "file": _chosen(settings.file),
        }

    def _models(self, settings: Settings) -> dict[str, Any]:
        """The names of what painted, where the settings do not say them."""
        if self._settings is None:
            return {"model": self.pipe.config.get("_name_or_path")}
        modules = named_weights(settings, Description.of(self.pipe)).get("linfusion", "none")
        # A folder beside the model may be elsewhere next time, and "auto" finds it there.
        return {} if Path(modules).is_dir() else {"linfusion": modules}

    def _circumstances(self, settings: Settings, seams: Seams | None) -> dict[str, Any]:
        """What the picture does not depend on, or not by more than rounding."""
        return {
            "ranks": self.mesh.size,
            "device": self.mesh.device.type,
            "kernels": self._kernels,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
            "seams": None if seams is None else asdict(seams),
        }


def _chosen(group: Group, but: set[str] | None = None) -> dict[str, Any]:
    """The settings of a group that are not as they are by default."""
    return group.model_dump(mode="json", exclude_defaults=True, exclude=but)


def _exchange(settings: Settings) -> Callable[[Mesh, Traffic], Exchange]:
    if settings.mesh.synchronisation == "exact":
        return ExactExchange
    return partial(DisplacedExchange, warmup_steps=settings.mesh.warmup_steps)
