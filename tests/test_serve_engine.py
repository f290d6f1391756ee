"""The service with the engine itself: the demo model on two ranks, killed, stopped, resumed."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from tests.service import PATIENCE_S, ROOT, Service, serving

pytest.importorskip("engine.worker")
pytestmark = pytest.mark.slow

CONFIG = """
model: demo
device: cpu
height: 64
width: 96
steps: 3
mesh: {guidance: 1}
checkpoint: {every: 1}
stall_s: 60
"""
MANY_STEPS = 60  # so many that something can happen in between


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "engine.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def service(tmp_path: Path, config: Path) -> Iterator[Service]:
    """For tests that end some of its processes."""
    flags = ["--engine-config", config, "--ranks", 2]
    with serving(tmp_path / "served", *flags, worker="engine.worker") as service:
        yield service


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Iterator[Service]:
    """For tests that leave it as they find it."""
    flags = ["--engine-config", config, "--ranks", 2]
    folder = tmp_path_factory.mktemp("lasting") / "served"
    with serving(folder, *flags, worker="engine.worker") as service:
        yield service


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def until_step(service: Service, name: str, step: int) -> None:
    for kind, told in service.events(name):
        if kind == "progress" and told["step"] >= step:
            return
    raise AssertionError(service.log)


def test_openais_client_gets_what_the_command_line_paints(
    lasting: Service, config: Path, tmp_path: Path
) -> None:
    client = openai.OpenAI(base_url=f"{lasting.url}/v1", api_key="none", max_retries=0)
    wishes = {"seed": 5, "steps": 4, "guidance_scale": 3.0, "negative_prompt": "fog"}
    answer = client.images.generate(prompt="a lake", size="128x96", extra_body=wishes)
    served = pixels_of(lasting.http.get(answer.data[0].url).content)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in wishes.items()]
    output = tmp_path / "same.png"
    subprocess.run(
        [sys.executable, "-m", "launch", "--nproc-per-node", "2", "--config", config,
         "--prompt", "a lake", "--width", "128", "--height", "96", "--output", output,
         *flags],
        cwd=ROOT, check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert np.array_equal(served, pixels_of(output.read_bytes()))
    name = answer.data[0].id
    page = lasting.http.get(f"/v1/images/{name}/view/")
    assert f'"{name}_files"' in page.text
    tile = pixels_of(lasting.http.get(f"/v1/images/{name}/view/{name}_files/7/0_0.jpg").content)
    assert tile.shape == served.shape
    assert np.abs(tile.astype(int) - served).mean() < 8


def test_what_the_engine_refuses_and_other_formats(lasting: Service) -> None:
    for name, kind in [("jpeg", "JPEG"), ("webp", "WEBP")]:
        job = lasting.wait_for(lasting.ask("a lake", steps=1, output_format=name)["id"])
        assert job["status"] == "completed", job
        content = lasting.http.get(f"/v1/images/{job['id']}/content").content
        assert Image.open(io.BytesIO(content)).format == kind
    refused = lasting.wait_for(lasting.ask("a lake", size="8x8")["id"])
    assert refused["status"] == "failed"
    assert refused["error"]["code"] == "mistake"
    assert lasting.wait_for(lasting.ask("a lake", steps=1)["id"])["status"] == "completed"


def test_a_rank_that_is_killed_in_the_middle_of_a_picture(service: Service) -> None:
    job = service.ask("a lake", steps=MANY_STEPS, seed=1)
    until_step(service, job["id"], 5)
    service.ranks()[1].kill()
    done = service.wait_for(job["id"])
    assert (done["status"], done["attempts"]) == ("completed", 1), service.log
    assert service.metric("linfusion_worker_restarts_total") == 1
    assert service.http.get(f"/v1/images/{job['id']}/content").status_code == 200


def test_a_cancelled_picture_leaves_nothing_and_the_next_is_painted(lasting: Service) -> None:
    job, after = lasting.ask("a lake", steps=MANY_STEPS), lasting.ask("a hill", steps=1)
    until_step(lasting, job["id"], 5)
    path = f"/v1/images/{job['id']}/preview"
    lasting.until(lambda: lasting.http.get(path).status_code == 200)
    lasting.http.delete(f"/v1/images/{job['id']}")
    assert lasting.wait_for(job["id"])["status"] == "cancelled"
    folder = lasting.folder / job["id"]
    lasting.until(lambda: {path.name for path in folder.iterdir()} == {"job.json"})
    assert lasting.wait_for(after["id"])["status"] == "completed"


def test_stopped_in_the_middle_it_goes_on_from_the_checkpoint(
    service: Service, config: Path
) -> None:
    job = service.ask("a lake", steps=MANY_STEPS)
    until_step(service, job["id"], 5)
    family = psutil.Process(service.process.pid).children(recursive=True)
    assert service.end() == 0, service.log
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert service.record(job["id"])["status"] == "queued"
    flags = ["--engine-config", config, "--ranks", 2]
    with serving(service.folder, *flags, worker="engine.worker") as again:
        steps = [told["step"] for kind, told in again.events(job["id"]) if kind == "progress"]
        assert steps[0] >= 5
        assert again.job(job["id"])["status"] == "completed"


def test_a_base_that_the_engine_refuses_ends_the_server(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("mesh: {image: 2}\n")
    flags = ["--engine-config", config, "--ranks", 2]
    service = Service(tmp_path / "served", *flags, worker="engine.worker")
    try:
        assert service.process.wait(PATIENCE_S) == 2
        service._reader.join(PATIENCE_S)
        assert service.log.splitlines()[-1].startswith("error: mesh.image")
    finally:
        service.close()
