"""The loop: steps, checkpoints, an average of the weights, and what is left in the output folder.

    linfusion/         the modules, as `engine.linearize` and LinFusion's own code load them
    losses.csv, .png   the curve
    evaluation.jsonl   what the student came to, a line an evaluation
    samples/           sheets: each row a held-out caption, painted by teacher and student
    checkpoint/        to go on from, exactly: what a step sees depends on its number alone

What is exported and evaluated is the moving average of the weights. It lies in a second student, in
the teacher's precision, which shares all but the self-attentions with the teacher.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine import linfusion
from engine.bands import Mesh
from engine.config import UserError
from engine.distill.backends import Backend, kept_state, open_backend, require_backend
from engine.distill.buckets import Shape, shapes_of
from engine.distill.draws import Share, draw, draw_shape, shares
from engine.distill.evaluation import Evaluator, Report, compare, save_sheet
from engine.distill.latents import PictureSet, encode_all, read_set, say_broken
from engine.distill.lessons import build_lesson
from engine.distill.progress import Meter
from engine.distill.records import Curve, Record
from engine.distill.settings import LANDSCAPES, DataSettings, DistillSettings
from engine.distill.sources import Source, open_source
from engine.distill.student import PARTS, Distiller, attentions, build_student, learning
from engine.distill.teacher import Teacher, describe_teacher, load_teacher
from engine.exits import DONE, STOPPED
from engine.parsing import flat
from engine.progress import Listener

MODULES = "linfusion"


@dataclass(frozen=True)
class Control:
    """What a run listens and talks to.

    Attributes:
        tell: progress, for people and farms.
        doing: in words, for the watch.
        told_to_stop: whether a signal has come.
        say: a line, on rank 0.
    """

    tell: Listener
    doing: Callable[[str], object]
    told_to_stop: Callable[[], bool]
    say: Callable[[str], object]


def distil(settings: DistillSettings, mesh: Mesh, control: Control) -> tuple[int, str]:
    """The whole run, on every rank alike; (exit code, what to say at the end).

    Raises:
        UserError: a mistake; most are found before any weights are loaded.
    """
    found = mesh.agree(lambda: _check(settings))
    # Rank 0's list of files is everybody's, whatever is added to the folder meanwhile.
    source, side = mesh.gather_objects(found if mesh.rank == 0 else (None, 0))[0]
    assert source is not None
    mesh = mesh.on_device(settings.device)
    control.doing("loading the teacher")
    dtype = getattr(torch, settings.dtype)
    teacher = mesh.agree(lambda: load_teacher(settings.model, mesh.device, dtype))
    pictures = _pictures(settings, source, side, teacher, mesh, control)
    if pictures is None:
        return STOPPED, "stopped while pictures were encoded; the same command goes on"
    return _Run(settings, mesh, control, teacher, pictures).run()


def _check(settings: DistillSettings) -> tuple[Source, int]:
    """What can be told before weights are loaded: (the source, the model's side in px)."""
    require_backend(settings.backend)
    if settings.evaluation.pictures and find_spec("skimage") is None:
        raise UserError(
            "evaluation.pictures: scikit-image, which compares them, is not installed; "
            "pip install 'linfusion-engine[distill]', or choose 0"
        )
    kept = kept_state(settings.output)
    if kept is not None and not settings.resume:
        raise UserError(
            f"{settings.output} holds a run of {kept['step']} steps: --resume goes on with it, or "
            "choose another output"
        )
    if kept is not None:
        _require_same(settings.output, kept["facts"], settings.facts())
    if settings.begin is not None:
        linfusion.read_config(settings.begin)
    if settings.evaluation.beside is not None:
        linfusion.read_config(settings.evaluation.beside)
    source, side = open_source(settings.data), describe_teacher(settings.model)
    if side:
        _shapes(settings.data, side)
    return source, side


def _shapes(data: DataSettings, native: int) -> list[Shape]:
    """What pictures are cut to; none where the source has shapes of its own.

    Args:
        native: the side that the model is made for, px.
    """
    if data.source == LANDSCAPES:
        return []
    side = data.side or native
    shapes = shapes_of(side, data.multiple, data.aspect)
    if not shapes:
        raise UserError(
            f"data.multiple: no shape of {side} px has sides that are multiples of "
            f"{data.multiple} px; {side} or less would work"
        )
    return shapes


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: {folder} cannot be made ({error.strerror or error}); choose another folder"
        ) from error


def _require_same(folder: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    was, now = flat(kept), flat(asked)
    for name in now:
        if was.get(name) != now[name]:
            raise UserError(
                f"{folder}: this run was begun with {name} {was.get(name)!r}, not {now[name]!r}; "
                "ask for the same, or choose another output"
            )


def _pictures(
    settings: DistillSettings, source: Source, side: int, teacher: Teacher, mesh: Mesh,
    control: Control,
) -> PictureSet | None:  # fmt: skip
    """The pictures as latents; None where a signal came before they were all encoded."""
    data = settings.data
    shapes = _shapes(data, side or 8 * int(teacher.pipe.unet.config.sample_size))
    folder = data.cache or settings.output / "cache"
    encoded = encode_all(source, shapes, teacher, folder, mesh, control.doing, control.told_to_stop)
    if encoded is None:
        return None
    files, digest = encoded
    pictures = mesh.agree(lambda: read_set(files, digest, data.held_out))
    if pictures.broken:
        control.say(say_broken(pictures.broken))
    return pictures


class _Run:
    """One run, from its first step or from its checkpoint."""

    def __init__(
        self, settings: DistillSettings, mesh: Mesh, control: Control, teacher: Teacher,
        pictures: PictureSet,
    ) -> None:  # fmt: skip
        self._settings, self._mesh, self._control = settings, mesh, control
        self._teacher, self._pictures = teacher, pictures
        own = settings.backend.name == "deepspeed" and settings.backend.stage == "3"
        student = mesh.agree(
            lambda: build_student(teacher.unet, settings.begin, own, settings.seed)
        )
        self._averaged = build_student(teacher.unet).requires_grad_(False)
        for attention in attentions(self._averaged):
            attention.to(teacher.dtype)
        self._average = [weight.detach().clone() for weight in learning(student)]
        distiller = Distiller(student, teacher, settings.loss)
        self._backend: Backend = open_backend(settings.backend, settings.optimizer, distiller, mesh)
        self._evaluator = mesh.agree(self._open_evaluator)
        self._facts = {**settings.facts(), "pictures": pictures.digest}
        self._first = self._resume()

    def run(self) -> tuple[int, str]:
        settings, curve = self._settings, Curve(self._settings.output, self._first)
        self._write(curve.begin)
        meter = Meter(settings.output.name, self._first, settings.steps, self._control.tell)
        for step in range(self._first, settings.steps):
            record = self._step(step)
            self._write(partial(curve.add, record))
            self._control.doing(meter.step(step + 1, record.loss))
            if self._mesh.any(self._control.told_to_stop()) and step + 1 < settings.steps:
                self._keep(step + 1)
                return STOPPED, f"stopped after step {step + 1}; --resume goes on"
            self._between(step + 1, curve)
        self._write(curve.draw)
        return DONE, self._finish()

    def _write(self, action: Callable[[], object], everywhere: bool = False) -> None:
        """Let rank 0 write something, or all ranks; where one cannot, no rank goes on."""

        def write() -> None:
            try:
                if everywhere or self._mesh.rank == 0:
                    action()
            except (OSError, SafetensorError) as error:  # the latter where the disk is full
                raise UserError(
                    f"{self._settings.output} cannot be written "
                    f"({getattr(error, 'strerror', None) or error}): make room, then --resume"
                ) from error

        self._mesh.agree(write)

    # --- a step -----------------------------------------------------------------------------------

    def _step(self, step: int) -> Record:
        settings, weights = self._settings, self._settings.loss
        shape = draw_shape(settings.seed, step, self._pictures.counts(), settings.count_of)
        count = settings.count_of(*shape)
        parts = shares(count, self._mesh.rank, self._mesh.size, settings.micro_batch)
        factors = torch.tensor([getattr(weights, part) for part in PARTS], device=self._mesh.device)
        sums = torch.zeros(len(PARTS), device=self._mesh.device)
        for number, share in enumerate(parts):
            lesson = self._lesson(step, self._pictures.shapes[shape], share)
            losses = self._backend.losses(lesson, last=number == len(parts) - 1)
            counted = torch.tensor(share.weights, device=losses.device) / count
            means = (losses * counted).sum(1)
            self._backend.backward((means * factors).sum())
            sums += means.detach()
        sums = self._over_ranks(sums)
        loss = float((sums * factors).sum())
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not finite at step {step + 1}: choose a lower optimizer.rate, or "
                "dtype float32"
            )
        rate = settings.optimizer.rate_at(step, settings.steps)
        gradient = self._backend.update(rate)
        self._follow(step)
        noise, output, features = sums.tolist()
        return Record(step, loss, noise, output, features, rate, gradient)

    def _lesson(self, step: int, entries: list[Any], share: Share) -> Any:
        settings = self._settings
        draws = [draw(settings.seed, step, index, settings.dropout) for index in share.indices]
        picked = [entries[int(drawn.pick * len(entries))] for drawn in draws]
        return build_lesson(self._teacher, picked, draws)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        if self._mesh.size > 1:
            for work in self._mesh.all_reduce(sums):
                work.wait()
        return sums

    def _follow(self, step: int) -> None:
        """The moving average; the first steps weigh less than they would for ever."""
        weight = min(self._settings.optimizer.average, (step + 1) / (step + 10))
        with self._backend.whole() as weights, torch.no_grad():
            torch._foreach_lerp_(self._average, [w.detach() for w in weights], 1 - weight)

    # --- between steps ----------------------------------------------------------------------------

    def _between(self, done: int, curve: Curve) -> None:
        settings = self._settings
        is_last = done == settings.steps
        if is_last or done % settings.checkpoint_every == 0:
            self._keep(done)
        if settings.samples_every and (is_last or done % settings.samples_every == 0):
            self._sheet(done)
            self._write(curve.draw)
        every = settings.evaluation.every
        if every and not is_last and done % every == 0:
            self._control.say(str(self._report(f"step {done}")))

    def _keep(self, done: int) -> None:
        self._control.doing(f"keeping a checkpoint of {done} steps")
        about = {"step": done, "facts": self._facts}
        state = {"about": about, "average": self._average}
        self._write(partial(self._backend.save, self._settings.output, state), everywhere=True)

    def _resume(self) -> int:
        folder = self._settings.output
        self._mesh.agree(lambda: _make(folder))
        # Rank 0's answer is everybody's: a folder that is not shared fails at `load`, on all.
        about = self._mesh.gather_objects(self._mesh.agree(lambda: kept_state(folder)))[0]
        if about is None:
            return 0
        _require_same(folder, about["facts"], self._facts)
        kept = self._mesh.agree(lambda: self._backend.load(folder))
        for mine, saved in zip(self._average, kept["average"], strict=True):
            mine.copy_(saved)
        return int(about["step"])

    # --- what it comes to -------------------------------------------------------------------------

    def _open_evaluator(self) -> Evaluator:
        settings = self._settings
        return Evaluator(
            self._teacher, self._pictures.held_out, settings.evaluation, settings.seed, self._mesh
        )

    def _student(self) -> nn.Module:
        """The averaged student as it is now."""
        for parameter, mean in zip(learning(self._averaged), self._average, strict=True):
            parameter.data.copy_(mean)
        return self._averaged

    def _sheet(self, done: int) -> None:
        self._control.doing(f"painting samples after {done} steps")
        columns = [self._evaluator.paint_teacher(), self._evaluator.paint(self._student())]
        path = self._settings.output / "samples" / f"step_{done:08d}.png"
        if columns[0]:  # there is none where all held-out pictures are close-ups
            self._write(partial(save_sheet, columns, path))

    def _report(self, name: str, student: nn.Module | None = None) -> Report:
        self._control.doing(f"evaluating {name}")
        report = self._evaluator.report(name, student or self._student())
        self._write(partial(self._append, report))
        return report

    def _append(self, report: Report) -> None:
        with (self._settings.output / "evaluation.jsonl").open("a") as file:
            file.write(json.dumps(asdict(report)) + "\n")

    def _finish(self) -> str:
        settings, folder = self._settings, self._settings.output / MODULES
        self._write(partial(self._export, folder))
        reports = [self._report("the student")]
        if (beside := settings.evaluation.beside) is not None:
            other = self._mesh.agree(lambda: build_student(self._teacher.unet, beside))
            for attention in attentions(other):
                attention.to(self._teacher.dtype)
            reports.append(self._report(str(beside), other))
        return f"{compare(reports)}\n{folder}"

    def _export(self, folder: Path) -> None:
        """In the published layout."""
        exported = build_student(self._teacher.unet)
        for parameter, mean in zip(learning(exported), self._average, strict=True):
            parameter.data.copy_(mean)
        for attention in attentions(exported):
            attention.to(getattr(torch, self._settings.export))
        linfusion.save(exported, folder)
