"""launch/slurm's script under a real Slurm of two nodes: preempted, stopped, cancelled, resumed."""

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import slurm as harness

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing())),
]

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "slurm" / "paint.sbatch"
STEPS = 60
TWO_NODES = ("--nodes", 2, "--cpus-per-task", 1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(harness.cluster(tmp_path_factory.mktemp("slurm")))
        except harness.NotUp as error:
            pytest.skip(f"Slurm cannot be brought up here: {error}")
        yield running


@pytest.fixture(scope="module")
def paint(slurm, tiny_model):
    """Submits a picture of some steps; returns (number of the job, its file)."""
    config = slurm.folder / "job.yaml"
    config.write_text(yaml.safe_dump({"model": str(tiny_model), "height": 64, "width": 64}))
    given = {"PYTHONPATH": ROOT, "PYTHON": sys.executable, "OMP_NUM_THREADS": 1}
    given |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": 1, "PATH": os.environ["PATH"]}
    export = ",".join(f"{name}={value}" for name, value in given.items())

    def submit(name, steps, *options):
        picture, log = slurm.folder / f"{name}.png", slurm.folder / f"{name}.log"
        flags = ["--config", config, "--output", picture, "--steps", steps]
        where = ["--export", export, "--output", log, "--chdir", slurm.folder]
        return slurm.submit(*where, *options, SCRIPT, *flags), picture

    return submit


@pytest.fixture(scope="module")
def whole(slurm, paint):
    """The picture that nobody interrupted, painted by two nodes."""
    job, picture = paint("whole", STEPS, *TWO_NODES)
    slurm.wait_for(job, "COMPLETED")
    return picture


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def log_of(picture):
    file = picture.with_suffix(".log")
    return file.read_text() if file.exists() else ""


def checkpoint_of(picture):
    return picture.with_name(f".{picture.name}.checkpoint")


def wait_for_steps(picture):
    """Until a few of its steps are done."""
    deadline = time.monotonic() + harness.BOUND_S
    while "step 5 of" not in log_of(picture):
        assert time.monotonic() < deadline, log_of(picture)
        time.sleep(0.1)


def require_resumed(slurm, job, picture, whole):
    """A job that was interrupted once ends with the picture of the one that was not."""
    facts = slurm.wait_for(job, "COMPLETED")
    assert (facts["Restarts"], facts["ExitCode"]) == ("1", "0:0")
    assert not checkpoint_of(picture).exists()
    assert log_of(picture).count("step 5 of") == 1  # the second run began after it
    assert np.array_equal(pixels(picture), pixels(whole))


def test_an_array_on_one_node_paints_what_two_nodes_paint(slurm, paint, whole):
    job, named = paint("one-%a", STEPS, "--array", 0)
    facts = slurm.wait_for(job, "COMPLETED")
    assert (facts["NumNodes"], facts["Restarts"]) == ("1", "0")
    assert "s on 2 ranks" in log_of(whole)
    picture = named.with_name("one-0.png")
    assert "step 5 of" in log_of(picture)
    assert abs(pixels(picture) - pixels(whole)).max() <= 1


def test_a_mistake_ends_the_job_with_code_2(slurm, paint):
    job, picture = paint("mistake", 0)
    facts = slurm.wait_for(job, "FAILED")
    assert facts["ExitCode"] == "2:0"
    assert "error: --steps: 0 is too small; 1 or more would work" in log_of(picture)


def test_a_preempted_job_of_two_nodes_is_requeued_and_resumes(slurm, paint, whole):
    job, picture = paint("preempted", STEPS, *TWO_NODES)
    wait_for_steps(picture)
    urgent = slurm.submit(
        *["--partition", "urgent", "--nodes", 2, "--exclusive"],
        *["--output", "/dev/null", "--wrap", "true"],
    )
    slurm.wait_for(urgent, "COMPLETED")
    require_resumed(slurm, job, picture, whole)


def test_a_job_at_its_time_limit_requeues_itself(slurm, paint, whole):
    """What `--signal=B:TERM@90` does, at once: it tells the script alone."""
    job, picture = paint("limited", STEPS, *TWO_NODES)
    wait_for_steps(picture)
    slurm("scancel", "--batch", "--signal", "TERM", job)
    require_resumed(slurm, job, picture, whole)


def test_a_cancelled_job_leaves_a_checkpoint_and_is_not_requeued(slurm, paint):
    job, picture = paint("cancelled", STEPS)
    wait_for_steps(picture)
    slurm("scancel", job)
    assert slurm.wait_for(job, "CANCELLED")["Restarts"] == "0"
    deadline = time.monotonic() + harness.BOUND_S
    while not checkpoint_of(picture).exists():
        assert time.monotonic() < deadline, log_of(picture)
        time.sleep(0.1)
    assert not picture.exists()
