"""launch/openjd's template, read and run by Open Job Description's own libraries.

They are what AWS Deadline Cloud's workers are made of: `openjd.model` makes the tasks of a job, and
`openjd.sessions` runs one as a process, reads its progress from its output, and cancels it.
"""

import contextlib
import os
import queue
import signal
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from engine import provenance

model = pytest.importorskip("openjd.model", reason="needs the packages openjd-model and -sessions")
sessions = pytest.importorskip("openjd.sessions", reason="needs the package openjd-sessions")

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "launch" / "openjd" / "template.yaml"
BOUND_S = 100.0  # of one task on a busy machine
PROMPT = """a "hill", it's $HOME; `true` # {{}}"""
STEPS = 60  # enough to be in the midst of them when the first progress is heard


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model):
    file = tmp_path_factory.mktemp("openjd") / "job.yaml"
    settings = {"model": str(tiny_model), "height": 64, "width": 64, "steps": STEPS}
    file.write_text(yaml.safe_dump(settings))
    return file


def job_of(config, folder, **values):
    """(job, parameters) of the template, as a farm makes them when a job is submitted."""
    template = model.decode_job_template(
        template=yaml.safe_load(TEMPLATE.read_text()), supported_extensions=["TASK_CHUNKING"]
    )
    given = {"Config": config, "OutputFolder": folder, "Ranks": 2, "Python": sys.executable}
    parameters = model.preprocess_job_parameters(
        job_template=template,
        job_parameter_values={name: str(value) for name, value in (given | values).items()},
        job_template_dir=TEMPLATE.parent,
        current_working_dir=folder,
    )
    return model.create_job(job_template=template, job_parameter_values=parameters), parameters


def tasks_of(job):
    return list(model.StepParameterSpaceIterator(space=job.steps[0].parameterSpace))


def run(job, parameters, task, cancel_at=None):
    """Every status that a session tells of a task, the last one being how it ended.

    Args:
        cancel_at: per cent of progress at which the task is cancelled.
    """
    heard = queue.Queue()
    session = sessions.Session(
        session_id=uuid.uuid4().hex,
        job_parameter_values=parameters,
        callback=lambda _, status: heard.put(status),
        os_env_vars={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    statuses = []
    try:
        session.run_task(step_script=job.steps[0].script, task_parameter_values=task)
        while not statuses or statuses[-1].state == sessions.ActionState.RUNNING:
            statuses.append(heard.get(timeout=BOUND_S))
            if cancel_at is not None and (statuses[-1].progress or 0) > cancel_at:
                session.cancel_action()
                cancel_at = None
    finally:
        end(session)
    return statuses


def end(session):
    """Kill what a session still runs, and forget its folder."""
    process = getattr(session._runner, "_process", None)
    if process is not None and process.is_running and process.pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    session.cleanup()


def pixels(file):
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def whole(config):
    """(what was heard, the picture) of a task that nobody interrupted."""
    job, parameters = job_of(config, config.parent, Seeds="3,7-8", Name="hill", Prompt=PROMPT)
    tasks = tasks_of(job)
    assert [task["Seed"].value for task in tasks] == ["3-3", "7-7", "8-8"]
    return run(job, parameters, tasks[1]), config.parent / "hill_0007.png"


def test_a_seed_is_a_task_and_reports_progress(whole):
    (*before, last), picture = whole
    assert (last.state, last.exit_code) == (sessions.ActionState.SUCCESS, 0)
    shares = [status.progress for status in before if status.progress is not None]
    assert shares == sorted(shares)
    assert len(set(shares)) > STEPS
    assert picture.name in last.status_message
    assert provenance.read(picture)["settings"]["prompt"] == PROMPT


def test_a_chunk_is_a_task_of_several_pictures(config, tmp_path, whole):
    values = {"Seeds": "1-4,7", "Chunk": 2, "Name": "hill", "Prompt": PROMPT}
    job, parameters = job_of(config, tmp_path, **values, Flags="--steps 4")
    tasks = tasks_of(job)
    assert [task["Seed"].value for task in tasks] == ["1-2", "3-4", "7-7"]
    *before, last = run(job, parameters, tasks[1])
    assert (last.state, last.exit_code) == (sessions.ActionState.SUCCESS, 0)
    shares = [status.progress for status in before if status.progress is not None]
    assert shares == sorted(shares)
    assert [file.name for file in sorted(tmp_path.glob("*.png"))] == [
        "hill_0003.png",
        "hill_0004.png",
    ]


def test_a_mistake_fails_the_task_with_the_sentence(config, tmp_path):
    job, parameters = job_of(config, tmp_path, Flags="--heigth 64", Ranks=1)
    last = run(job, parameters, tasks_of(job)[0])[-1]
    assert (last.state, last.exit_code) == (sessions.ActionState.FAILED, 2)
    assert last.fail_message == "--heigth: unknown flag; did you mean '--height'?"


def test_a_cancelled_task_goes_on_when_it_is_run_again(config, tmp_path, whole):
    job, parameters = job_of(config, tmp_path, Seeds="7", Prompt=PROMPT)
    task = tasks_of(job)[0]
    picture, checkpoint = tmp_path / "picture_0007.png", tmp_path / ".picture_0007.png.checkpoint"

    last = run(job, parameters, task, cancel_at=10)[-1]
    assert (last.state, last.exit_code) == (sessions.ActionState.CANCELED, 75)
    assert checkpoint.exists()
    assert not picture.exists()

    *resumed, last = run(job, parameters, task)
    assert last.state == sessions.ActionState.SUCCESS
    assert next(s.progress for s in resumed if s.progress is not None) > 10
    assert not checkpoint.exists()
    assert np.array_equal(pixels(picture), pixels(whole[1]))
