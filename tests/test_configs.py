"""The files in configs/: each loads, and the ones for real models plan at their true size."""

from pathlib import Path

import pytest
import torch

from engine.config import Settings
from engine.distill.settings import DistillSettings
from engine.jobs import read_job
from engine.plan.needs import DryRun
from engine.simulation import CudaKernels
from tests.shapes import sd15, sdxl

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DISTILL = [file for file in FILES if file.stem.startswith("distill_")]
CONFIGS = [file for file in FILES if file not in DISTILL]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_file_works(file):
    job = read_job(["--config", str(file)])
    assert all(isinstance(row.settings, Settings) for row in job.rows)
    if not job.many:
        assert job.settings.output.stem == file.stem


@pytest.mark.parametrize("file", DISTILL, ids=lambda file: file.stem)
def test_every_distillation_works(file):
    settings = DistillSettings.load(["--config", str(file)])
    assert settings.output.stem == file.stem
    assert settings.facts()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "model", "ranks", "sizes"),
    [
        ("sd15_16k", sd15, 8, ["1024x512", "2048x1024", "4096x2048", "8192x4096", "16384x8192"]),
        ("sdxl_16k", sdxl, 8, ["1024x512", "2048x1024", "4096x2048", "8192x4096", "16384x8192"]),
        ("sdxl_4k", sdxl, 4, ["1024x1024", "2048x2048", "4096x4096"]),
    ],
)
def test_a_real_job_plans_without_weights(name, model, ranks, sizes):
    file = next(file for file in CONFIGS if file.stem == name)
    settings = Settings.load(["--config", str(file)])
    job = DryRun(model(), torch.float16, CudaKernels())
    job.limit_bytes = 80e9
    needs = job.needs(settings, ranks)
    assert [str(rung.rung) for rung in needs.rungs] == sizes
    for rung in needs.rungs:
        assert rung.groups * len(rung.rows) == ranks
        assert sum(rung.rows) == rung.rung.height
    steps = [
        part.once.peak_bytes for rung in needs.rungs for part in rung.parts if part.name == "UNet"
    ]
    assert len(steps) == len(sizes)
    assert steps == sorted(steps)
    assert needs.peak_bytes < job.limit_bytes
