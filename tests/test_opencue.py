"""launch/opencue's script: its command line, and its frames under a real RQD."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from engine.config import UserError
from tests import rqd as harness
from tests.command_lines import accepted, words_of
from tests.pictures import by_pillow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "opencue" / "frame.sh"
STEPS = 60  # enough to be in the midst of them when the first ones are seen


def words_for(folder, seed, *flags):
    return words_of(folder, ["bash", str(SCRIPT), seed, *flags])


def test_a_frame_is_a_seed(tmp_path):
    flags = ["--prompt", 'a "hill" at $HOME', "--output", "out/%a.png"]
    options, settings = accepted(words_for(tmp_path, "7", *flags))
    assert (settings.seed, settings.output) == (7, Path("out/7.png"))
    assert settings.prompt == 'a "hill" at $HOME'
    assert (settings.resume, settings.progress, settings.checkpoint.every) == (True, "plain", 5)
    assert options["nproc_per_node"] is None  # one rank a GPU


def test_flags_of_ones_own_win(tmp_path):
    flags = ["--nproc-per-node", "2", "--checkpoint.every", "9"]
    options, settings = accepted(words_for(tmp_path, "7", *flags))
    assert (options["nproc_per_node"], settings.checkpoint.every) == (2, 9)


def test_a_frame_without_a_number_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="seed"):
        accepted(words_for(tmp_path, "#IFRAME#"))


@pytest.mark.parametrize(
    ("reserved", "seen"), [({"CUE_GPU_CORES": "2,0"}, "2,0"), ({}, "all of them")]
)
def test_a_frame_sees_the_gpus_that_rqd_has_reserved_for_it(tmp_path, reserved, seen):
    """RQD only names them: a frame that sees all takes its neighbours'."""
    spy = tmp_path / "python"
    spy.write_text('#!/bin/sh\necho "sees ${CUDA_VISIBLE_DEVICES-all of them}"\n')
    spy.chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, "7"], env={"PATH": os.environ["PATH"], "PYTHON": str(spy), **reserved},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert f"sees {seen}\n" in done.stdout


@pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))
def test_the_outline_of_the_readme_is_a_job_of_such_frames(tmp_path):
    """As OpenCue's own library makes it, which a Cuebot only splits into frames."""
    text = (SCRIPT.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    launching = "outline.cuerun.launch(job, use_pycuerun=False)"
    assert launching in code
    told = "print(outline.cuerun.OutlineLauncher(job).serialize(use_pycuerun=False))"
    done = subprocess.run(
        [harness.PYTHON, "-c", code.replace(launching, told)], env={"HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=harness.BOUND_S,
    )  # fmt: skip
    layer = ElementTree.fromstring(done.stdout).find(".//layer")
    assert layer.findtext("range") == "1-100"
    assert layer.find("env/key").get("name") == "PYTHON"
    command = layer.findtext("cmd").replace("#IFRAME#", "7")
    command = command.replace("/path/to/launch/opencue/frame.sh", shlex.quote(str(SCRIPT)))
    words = words_of(tmp_path, ["sh", "-c", command])
    config = words.index("--config")
    del words[config : config + 2]  # there is no such file here
    _, settings = accepted(words)
    assert (settings.seed, settings.output) == (7, Path("/mnt/pictures/7.png"))
    assert settings.prompt == "a hill at dawn"


@pytest.fixture(scope="module", params=["RQD's own user", "the job's user"])
def rqd(request):
    """A render host, which starts frames as either user."""
    another = request.param == "the job's user"
    why_not = harness.missing() or (harness.missing_for_another_user() if another else None)
    if why_not:
        pytest.skip(why_not)
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(harness.render_host(another))
        except harness.NotUp as error:
            pytest.skip(f"RQD cannot be brought up here: {error}")
        yield running


@pytest.fixture(scope="module")
def launch(rqd):
    """Launches the frame that paints a picture of this name; returns (its id, its file)."""

    def start(name, *flags):
        picture = rqd.folder / f"{name}-7.png"
        command = [
            *[SCRIPT, 7, "--nproc-per-node", 2, "--device", "cpu", "--model", "demo"],
            *["--height", 64, "--width", 64, "--steps", STEPS, "--prompt", "a hill, it's dawn"],
            *["--output", picture.with_name(f"{name}-%a.png"), *flags],
        ]
        frame = rqd.launch(
            shlex.join(map(str, command)), PYTHON=sys.executable, PYTHONPATH=str(ROOT),
            HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
        )  # fmt: skip
        return frame, picture

    return start


@pytest.fixture(scope="module")
def whole(rqd, launch):
    """(frame, picture) of one that nobody interrupted."""
    frame, picture = launch("whole")
    assert rqd.ended(frame) == (0, 0), rqd.log(frame)
    return frame, picture


def wait_until(condition, otherwise):
    deadline = time.monotonic() + harness.BOUND_S
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)


def wait_for_a_checkpoint(rqd, frame, picture):
    """Until it is on its way, and has something to go on from."""
    checkpoint = picture.with_name(f".{picture.name}.checkpoint")
    wait_until(
        lambda: checkpoint.exists() and "step 7 of" in rqd.log(frame), lambda: rqd.log(frame)
    )
    return checkpoint


@pytest.mark.slow
def test_no_line_of_a_failure_is_lost(rqd):
    """Of lines that come together and are the last ones, RQD by itself notes the first."""
    program = rqd.folder / "program"
    program.write_text("#!/bin/sh\necho 'a warning' >&2\nseq -f 'line %g of 50' 50\nexit 3\n")
    program.chmod(0o755)
    frame = rqd.launch(shlex.join([str(SCRIPT), "7"]), PYTHON=str(program))
    assert rqd.ended(frame) == (3, 0)
    said = rqd.log(frame).splitlines()
    expected = ["a warning", *[f"line {i} of 50" for i in range(1, 51)], "exit code 3"]
    assert [line for line in said if line in expected] == expected


@pytest.mark.long
def test_a_frame_paints_and_its_log_follows_it_to_the_end(rqd, whole):
    frame, picture = whole
    log = rqd.log(frame)
    assert by_pillow(picture).shape[:2] == (64, 64)
    assert [log.count(f"step {step} of {STEPS}") for step in (1, 7, STEPS)] == [1, 1, 1]
    assert f"{picture}: 64x64 px in " in log
    assert "\nexit code 0\n" in log


@pytest.mark.long
def test_a_mistake_fails_the_frame_with_the_sentence(rqd, launch):
    frame, picture = launch("mistake", "--heigth", 64)
    assert rqd.ended(frame) == (2, 0)
    assert "error: --heigth: unknown flag; did you mean '--height'?" in rqd.log(frame)
    assert not picture.exists()


@pytest.mark.long
def test_a_lost_rank_fails_the_frame_with_the_line_that_names_it(rqd, launch):
    frame, picture = launch("lost")
    wait_for_a_checkpoint(rqd, frame, picture)
    (victim,) = (p for p in rqd.processes(frame) if p.environ().get("RANK") == "1")
    victim.kill()
    assert rqd.ended(frame) == (3, 0)
    assert "error: rank 1 on host " in rqd.log(frame)
    assert f"error: rank 1 on {os.uname().nodename} was ended by SIGKILL" in rqd.log(frame)


@pytest.mark.long
def test_a_frame_that_was_killed_goes_on_when_it_is_retried(rqd, launch, whole):
    frame, picture = launch("killed")
    checkpoint = wait_for_a_checkpoint(rqd, frame, picture)
    assert len([p for p in rqd.processes(frame) if "RANK" in p.environ()]) == 2
    rqd.kill(frame)
    assert rqd.ended(frame) == (1, signal.SIGKILL)
    wait_until(lambda: not rqd.processes(frame), lambda: rqd.processes(frame))
    assert checkpoint.exists()
    assert not picture.exists()

    frame, _ = launch("killed")
    assert rqd.ended(frame) == (0, 0), rqd.log(frame)
    assert f"going on from {checkpoint}" in rqd.log(frame)
    assert "step 4 of" not in rqd.log(frame)
    assert not checkpoint.exists()
    np.testing.assert_array_equal(by_pillow(picture), by_pillow(whole[1]))


@pytest.mark.long
def test_a_frame_belongs_to_the_user_that_it_was_started_as(rqd, whole):
    assert whole[1].stat().st_uid == (rqd.uid if rqd.becomes else os.geteuid())
