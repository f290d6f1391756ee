"""A student beside its teacher, on pictures and captions that it has not learnt from.

    output      mean square distance of what the two UNets put out, and
    noise       the error of each against the truth, all at four times of every held-out picture
    PSNR, SSIM  of pictures that both paint from the same noise and the same held-out captions
    FID         of each one's pictures against the held-out ones; CLIP score of each one's: where
                the user supplies the networks

Other modules, such as those that are to be replaced, can be evaluated beside them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import nn

from engine.bands import Mesh
from engine.config import UserError
from engine.distill.draws import Draw, draw, generator
from engine.distill.latents import Entry
from engine.distill.lessons import build_lesson
from engine.distill.metrics import (
    Features,
    Picture,
    Score,
    frechet_distance,
    load_clip,
    load_inception,
    psnr,
    ssim,
)
from engine.distill.settings import EvaluationSettings
from engine.distill.student import answer, losses
from engine.distill.teacher import Teacher

TIMES = 4
"""at which each held-out picture is looked at"""


@dataclass(frozen=True)
class Report:
    """What one student comes to; None was not asked for.

    Attributes:
        output_mse: from the teacher; noise_mse, teacher_noise_mse: from the truth.
        psnr, ssim: means over the painted pictures, in dB and 0 to 1.
        fid, clip, teacher_fid, teacher_clip: of what each has painted.
    """

    name: str
    output_mse: float
    noise_mse: float
    teacher_noise_mse: float
    psnr: float | None = None
    ssim: float | None = None
    fid: float | None = None
    clip: float | None = None
    teacher_fid: float | None = None
    teacher_clip: float | None = None

    def __str__(self) -> str:
        said = [
            f"output MSE to the teacher {self.output_mse:.3e}",
            f"noise MSE {self.noise_mse:.5f} (the teacher's {self.teacher_noise_mse:.5f})",
        ]
        if self.psnr is not None:
            said.append(f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f} to the teacher's pictures")
        if self.fid is not None:
            said.append(f"FID {self.fid:.2f} (the teacher's {self.teacher_fid:.2f})")
        if self.clip is not None:
            said.append(f"CLIP score {self.clip:.2f} (the teacher's {self.teacher_clip:.2f})")
        return f"{self.name}: {', '.join(said)}"


class Evaluator:
    """Evaluates students of one teacher; every rank makes the same calls.

    Raises:
        UserError: a network that the user names is none, or there are too few pictures for it.
    """

    def __init__(
        self,
        teacher: Teacher,
        held_out: Sequence[Entry],
        settings: EvaluationSettings,
        seed: int,
        mesh: Mesh,
    ) -> None:
        self._teacher, self._held_out, self._mesh = teacher, held_out, mesh
        self._settings, self._seed = settings, seed
        self._inception: Features | None = None
        self._clip: Score | None = None
        if settings.inception is not None:
            self._inception = load_inception(settings.inception)
        if settings.clip is not None:
            self._clip = load_clip(settings.clip)
        # Close-ups are seen at low noise only: their captions are none to paint from.
        whole = [entry for entry in held_out if entry.below == 1.0]
        self._painted = whole[: settings.pictures]
        self._theirs: list[Picture] | None = None
        self._require_enough()

    def _require_enough(self) -> None:
        painted, real = len(self._painted), len(self._held_out)
        if self._inception is not None and min(painted, real) < 2:
            raise UserError(
                f"evaluation.inception: FID compares sets, and {painted} painted pictures beside "
                f"{real} held-out ones are none; raise evaluation.pictures and data.held_out"
            )
        if self._clip is not None and not painted:
            raise UserError("evaluation.clip: no held-out picture is a whole one; hold out more")

    def report(self, name: str, student: nn.Module) -> Report:
        """All that is asked for, of a student in the teacher's precision."""
        output, noise, theirs = self._errors(student)
        own, teachers = self.paint(student), self.paint_teacher()
        found = Report(name, output, noise, theirs)
        facts = dict(vars(found))
        if own:
            pairs = list(zip(own, teachers, strict=True))
            facts["psnr"] = mean(min(psnr(a, b), 99.0) for a, b in pairs)
            facts["ssim"] = mean(ssim(a, b) for a, b in pairs)
        if self._inception is not None:
            real = self._inception([self._decoded(entry) for entry in self._held_out])
            facts["fid"] = frechet_distance(self._inception(own), real)
            facts["teacher_fid"] = frechet_distance(self._inception(teachers), real)
        if self._clip is not None:
            captions = [entry.captions[0] for entry in self._painted]
            facts["clip"] = self._clip(own, captions)
            facts["teacher_clip"] = self._clip(teachers, captions)
        return Report(**facts)

    def paint(self, unet: nn.Module) -> list[Picture]:
        """The held-out captions, painted by `unet`, each from noise of its own; on every rank."""
        mine = range(self._mesh.rank, len(self._painted), self._mesh.size)
        with self._painting_by(unet):
            own = {index: self._paint(index) for index in mine}
        everyone: dict[int, Picture] = {}
        for part in self._mesh.gather_objects(own):
            everyone |= part
        return [everyone[index] for index in sorted(everyone)]

    def paint_teacher(self) -> list[Picture]:
        """What the teacher makes of the same, painted once."""
        if self._theirs is None:
            self._theirs = self.paint(self._teacher.unet)
        return self._theirs

    @torch.no_grad()
    def _errors(self, student: nn.Module) -> tuple[float, float, float]:
        """Means over all ranks: student to teacher, student to truth, teacher to truth."""
        teacher, sums = self._teacher, torch.zeros(3, dtype=torch.float64)
        for index in range(self._mesh.rank, len(self._held_out), self._mesh.size):
            draws = [self._draw(index, time) for time in range(TIMES)]
            lesson = build_lesson(teacher, [self._held_out[index]] * TIMES, draws)
            with teacher.computing():
                mine, theirs = answer(student, lesson), answer(teacher.unet, lesson)
            noise, output, _ = losses(mine, theirs, lesson.target, relative=False).mean(1)
            truth = (theirs.output - lesson.target).square().mean()
            sums += torch.stack([output, noise, truth]).double().cpu()
        total = sum(torch.tensor(part) for part in self._mesh.gather_objects(sums.tolist()))
        output_mse, noise_mse, teacher_mse = (total / len(self._held_out)).tolist()  # type: ignore[union-attr]
        return output_mse, noise_mse, teacher_mse

    def _draw(self, index: int, time: int) -> Draw:
        """As in training, but at times spread evenly and with every caption."""
        drawn = draw(self._seed, -1 - time, index, dropout=0.0)
        share = (time + drawn.time) / TIMES
        return Draw(drawn.pick, share, drawn.wording, False, drawn.generator)

    @contextmanager
    def _painting_by(self, unet: nn.Module) -> Iterator[None]:
        pipe = self._teacher.pipe
        own, pipe.unet = pipe.unet, unet
        try:
            yield
        finally:
            pipe.unet = own

    @torch.no_grad()
    def _paint(self, index: int) -> Picture:
        entry, settings = self._painted[index], self._settings
        with self._teacher.computing():
            latents = self._teacher.pipe(
                entry.captions[0],
                height=entry.shape[0],
                width=entry.shape[1],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                generator=generator(self._seed, -9, index),
                output_type="latent",
            ).images
        return self._teacher.decode(latents)[0]

    def _decoded(self, entry: Entry) -> Picture:
        return self._teacher.decode(entry.latent()[None])[0]


def save_sheet(columns: Sequence[Sequence[Picture]], path: Path) -> None:
    """A sheet with one row for each picture: the teacher's, then each student's."""
    rows = list(zip(*columns, strict=True))
    width = max(sum(picture.shape[1] for picture in row) for row in rows)
    height = sum(row[0].shape[0] for row in rows)
    sheet, top = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        sheet.paste(Image.fromarray(np.concatenate(row, axis=1)), (0, top))
        top += row[0].shape[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)


def compare(reports: Sequence[Report]) -> str:
    """A line for each student, and one that says which is nearer to the teacher."""
    lines = [str(report) for report in reports]
    if len(reports) == 2:
        mine, other = reports
        ratio = mine.output_mse / other.output_mse if other.output_mse else math.inf
        verdict = "as good or better" if ratio <= 1 else "worse"
        lines.append(f"{mine.name} beside {other.name}: {ratio:.3f} of its MSE, {verdict}")
    return "\n".join(lines)
