"""Distillation: one curve on any number of ranks and after any interruption, for every family."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine import linfusion
from engine.config import UserError
from engine.distill.records import Curve
from engine.distill.settings import DistillSettings
from engine.exits import DONE, MISTAKEN, STOPPED
from engine.loading import load
from tests.ranks import run_ranks, torchrun
from tests.students import (
    curve,
    distil_alone,
    distil_on,
    flags_of,
    save_pictures,
    save_teacher,
    settings_of,
)

STEPS = 50
pytestmark = pytest.mark.usefixtures("one_thread")


def long(*more: str) -> object:
    return pytest.param(more, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    """A teacher of SD-1.5's kind, pictures, and the run of one process that others are held to."""
    folder = tmp_path_factory.mktemp("distill")
    save_teacher("sd15", folder / "model")
    save_pictures(folder / "pictures")
    assert distil_alone(run_in(folder, "alone"))[0] == DONE
    return folder


def run_in(folder: Path, name: str, *more: str) -> DistillSettings:
    return settings_of(folder / "model", folder / "pictures", folder / name, *more)


def modules(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "linfusion" / "diffusion_pytorch_model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """The same losses at every step; weights may differ by a fraction of what was learnt.

    Adam divides by the size of the gradient, so where that is all rounding, so is the update.
    """
    mine, other = np.array(curve(a)), np.array(curve(b))
    assert len(mine) == len(other) == STEPS
    np.testing.assert_allclose(mine, other, rtol=1e-3)
    ours, theirs = modules(a), modules(b)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.02, atol=2e-3)


# --- one curve ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ("--backend.name", "ddp"),
        ("--backend.name", "deepspeed"),
        long("--backend.name", "ddp", "--micro-batch", "1"),
        long("--backend.name", "deepspeed", "--micro-batch", "1"),
        long("--backend.name", "deepspeed", "--backend.stage", "3"),
        long("--backend.name", "deepspeed", "--backend.offload", "true"),
    ],
    ids=lambda more: "-".join(more[1::2]),
)
def test_two_ranks_follow_the_curve_of_one(folder, more):
    settings = run_in(folder, "-".join(("two", *more[1::2])), *more)
    results = run_ranks(2, distil_on, settings)
    assert [code for code, _ in results] == [DONE, DONE]
    assert_same_run(folder / "alone", settings.output)


@pytest.mark.long
def test_three_ranks_share_a_batch_that_does_not_divide(folder):
    settings = run_in(folder, "three")
    run_ranks(3, distil_on, settings)
    assert_same_run(folder / "alone", settings.output)


def test_one_process_in_micro_batches(folder):
    settings = run_in(folder, "micro", "--micro-batch", "3")
    distil_alone(settings)
    assert_same_run(folder / "alone", settings.output)


def test_the_loss_falls(folder):
    losses = curve(folder / "alone")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


# --- interruptions --------------------------------------------------------------------------------


def test_stopped_and_resumed_it_is_the_same_run(folder):
    settings = run_in(folder, "stopped")
    code, said = distil_alone(settings, stop_at=13)
    assert (code, "step 13" in said) == (STOPPED, True)
    assert len(curve(settings.output)) == 13
    assert distil_alone(run_in(folder, "stopped", "--resume"))[0] == DONE
    assert curve(settings.output) == curve(folder / "alone")
    theirs = modules(folder / "alone")
    assert all(
        torch.equal(tensor, theirs[name]) for name, tensor in modules(settings.output).items()
    )


def test_a_signal_before_the_first_step_stops_too(folder):
    settings = run_in(folder, "early")
    assert distil_alone(settings, stop_at=0)[0] == STOPPED
    assert not list(settings.output.rglob("*.safetensors"))


def test_ranks_may_be_more_or_fewer_after_a_stop(folder):
    settings = run_in(folder, "fewer")
    assert run_ranks(2, distil_on, settings, 17)[0][0] == STOPPED
    distil_alone(run_in(folder, "fewer", "--resume"))
    assert_same_run(folder / "alone", settings.output)


@pytest.mark.parametrize("stage", ["2", pytest.param("3", marks=pytest.mark.long)])
def test_deepspeed_resumes(folder, stage):
    backend = ("--backend.name", "deepspeed", "--backend.stage", stage)
    settings = run_in(folder, f"zero{stage}", *backend)
    assert run_ranks(2, distil_on, settings, 17)[0][0] == STOPPED
    with pytest.raises(AssertionError, match="begun on 2 ranks"):
        run_ranks(1, distil_on, run_in(folder, f"zero{stage}", *backend, "--resume"))
    run_ranks(2, distil_on, run_in(folder, f"zero{stage}", *backend, "--resume"))
    assert_same_run(folder / "alone", settings.output)


def test_a_process_is_told_to_stop_and_killed_and_is_the_same_run(folder):
    """A signal after a step, then a kill in the middle of one, after the checkpoint of 20."""
    output = folder / "killed"
    assert end_at(output, "step 13 ", signal.SIGTERM, folder) == STOPPED
    assert 13 <= len(curve(output)) < 20
    assert end_at(output, "step 27 ", signal.SIGKILL, folder, "--resume") == -signal.SIGKILL
    code, out, err = torchrun(1, *command(folder, output), "--resume")
    assert code == DONE, err
    assert str(output / "linfusion") in out
    assert_same_run(folder / "alone", output)


def end_at(output: Path, word: str, how: signal.Signals, folder: Path, *more: str) -> int:
    """The exit code of a run that a signal is sent to once it has said `word`."""
    with subprocess.Popen(
        [sys.executable, *command(folder, output), "--progress", "plain", *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if word in line:
                process.send_signal(how)
    return process.returncode


def command(folder: Path, output: Path) -> list[str]:
    return ["-m", "engine.distill", *flags_of(folder / "model", folder / "pictures", output)]


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_every_family_learns_and_paints(family, tmp_path):
    save_teacher(family, tmp_path / "model")
    save_pictures(tmp_path / "pictures")
    more = ["--evaluation.pictures", "2", "--evaluation.steps", "2", "--samples-every", "20"]
    # The true noise is left out: a teacher of random weights tells nothing of it, so that students
    # do better by going away from theirs.
    learn = ["--steps", "40", "--optimizer.rate", "2e-3", "--loss.noise", "0"]
    settings = run_in(tmp_path, "run", *learn, *more)
    code, said = distil_alone(settings)
    assert code == DONE
    assert "PSNR" in said
    losses = curve(settings.output)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    with Image.open(settings.output / "samples" / "step_00000020.png") as sheet:
        assert sheet.width == 2 * 64  # the teacher's and the student's
    pipe = load(str(tmp_path / "model"), str(settings.output / "linfusion"))
    assert any(isinstance(m, linfusion.LinearAttention) for m in pipe.unet.modules())
    painted = pipe("a word", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert np.isfinite(painted).all()


def test_bfloat16_learns(folder):
    settings = run_in(folder, "bfloat16", "--dtype", "bfloat16")
    distil_alone(settings)
    np.testing.assert_allclose(curve(settings.output), curve(folder / "alone"), rtol=0.1)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "holds a run of 50 steps: --resume"),
        (("--resume", "--optimizer.rate", "0.1"), "optimizer.rate 0.001, not 0.1"),
        (("--resume", "--backend.name", "deepspeed"), "backend.name"),
        (("--data.held-out", "24", "--output", "NEW"), "data.held_out: 24 of 24 pictures"),
        (("--data.multiple", "128", "--output", "NEW"), "data.multiple: no shape of 64 px"),
        (("--data.source", "nowhere", "--output", "NEW"), "nowhere is no folder"),
        (("--begin", "nowhere", "--output", "NEW"), "nowhere"),
        (("--optimizer.rate", "1e30", "--output", "NEW"), "the loss is not finite"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, more, said):
    more = [str(tmp_path) if word == "NEW" else word for word in more]
    with pytest.raises(UserError, match=said) as raised:
        distil_alone(run_in(folder, "alone", *more))
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_a_mistake_on_all_ranks(folder):
    """Where rank 0 cannot write a step's line, no rank waits for it."""
    with pytest.raises(AssertionError, match=r"(?s)UserError.*cannot be written \(No space left"):
        run_ranks(2, distil_on_a_full_disk, run_in(folder, "full"))


def distil_on_a_full_disk(mesh, settings):
    def full(curve, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    Curve.add = full
    distil_on(mesh, settings)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backend.stage", "3"], "backend: stage goes with backend.name deepspeed"),
        (["--loss.noise", "0", "--loss.output", "0", "--loss.features", "0"], "all parts"),
        (["--data.source", "photos", "--data.pictures", "30"], "data: pictures goes with"),
        (["--evaluation.pictures", "0", "--evaluation.steps", "3"], "evaluation: steps goes with"),
        (["--steps", "0"], "--steps"),
        (["--samples-every", "5", "--evaluation.pictures", "0"], "samples_every: sheets show"),
        (["--optimizer.average", "1"], "--optimizer.average"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError) as raised:
        DistillSettings.load(flags)
    assert said in str(raised.value)


def test_the_command_line_refuses_before_weights(tmp_path):
    code, _, err = torchrun(2, "-m", "engine.distill", "--model", tmp_path / "none")
    assert code == 1  # torchrun's own; that of each rank is in what it says
    assert f"exitcode  : {MISTAKEN}" in err
    assert err.count("error: ") == 1
