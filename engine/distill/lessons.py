"""From pictures of the set to what both networks see: latents, noise, times and prompts."""

from collections.abc import Sequence

import torch

from engine.distill.draws import Draw
from engine.distill.latents import Entry
from engine.distill.student import Lesson
from engine.distill.teacher import Teacher


def build_lesson(teacher: Teacher, entries: Sequence[Entry], draws: Sequence[Draw]) -> Lesson:
    """The lesson of these pictures, which are of one shape, each seen as its draw says."""
    device = teacher.device
    latents = torch.stack([entry.latent() for entry in entries])
    noise = torch.stack([draw.noise(latents.shape[1:]) for draw in draws])
    times = torch.tensor([
        min(int(draw.time * entry.below * teacher.times), teacher.times - 1)
        for entry, draw in zip(entries, draws, strict=True)
    ])  # fmt: skip
    prompts = [
        "" if draw.left_out else entry.captions[int(draw.wording * len(entry.captions))]
        for entry, draw in zip(entries, draws, strict=True)
    ]
    noisy, target = teacher.diffuse(latents, noise, times)
    conditions = teacher.conditions(prompts, [entry.sizes for entry in entries])
    return Lesson(noisy.to(device, teacher.dtype), times.to(device), conditions, target.to(device))
