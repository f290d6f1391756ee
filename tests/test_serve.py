"""The service: real processes, real clients, and ranks that only pretend."""

import asyncio
import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from engine.config import UserError
from engine.serve.asked import GenerationRequest, LongRequest
from engine.serve.book import Book, lock
from engine.serve.doors import is_key, session
from engine.serve.errors import ApiError
from engine.serve.jobs import Files, Job, Picture
from engine.serve.metrics import Metrics
from engine.serve.settings import Base, ServeSettings
from tests.double import picture
from tests.service import PATIENCE_S, ROOT, Service, serving

KEY = "a-key-of-some-length-0123456789"
NOBODY = "0" * 24


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all tests that leave it as it is."""
    with serving(tmp_path_factory.mktemp("served")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def finished(service: Service) -> dict[str, Any]:
    """A job that is complete, of a picture of more than one tile."""
    return service.wait_for(service.ask("a lake", size="1200x800", seed=3)["id"])


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- OpenAI's client ------------------------------------------------------------------------------


def test_openais_client_gets_links(service: Service, client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a lake", size="128x96", n=2, user="u1", extra_body={"steps": 3, "seed": 5}
    )
    assert [image.seed for image in answer.data] == [5, 6]
    assert answer.size == "128x96"
    for image in answer.data:
        got = service.http.get(image.url)
        assert got.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(got.content)).size == (128, 96)
        job = service.job(image.id)
        assert (job["status"], job["steps"], job["user"]) == ("completed", 3, "u1")


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_openais_client_gets_base64(client: openai.OpenAI, name: Any, kind: str) -> None:
    answer = client.images.generate(
        prompt="a lake", size="64x96", response_format="b64_json", output_format=name,
        quality="auto", extra_body={"steps": 1, "negative_prompt": "fog", "guidance_scale": 3},
    )  # fmt: skip
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert (picture.size, picture.format) == ((64, 96), kind)


def test_openais_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_without_a_seed_there_is_one(service: Service, client: openai.OpenAI) -> None:
    seeds = {
        client.images.generate(prompt="a", size="64x64", extra_body={"steps": 1}).data[0].seed
        for _ in range(3)
    }
    assert len(seeds) == 3


def test_openais_client_raises_what_it_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="multiple of 8") as caught:
        client.images.generate(prompt="a lake", size="100x96")
    assert (caught.value.param, caught.value.code) == ("size", "invalid_value")
    with pytest.raises(openai.BadRequestError, match="this size is a mistake"):
        client.images.generate(prompt="mistake", size="64x64")
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        client.images.generate(prompt="fail", size="64x64")
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.images.generate(prompt="a lake", model="dall-e-3")


REFUSED = [
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({}, "prompt", "required"),
    ({"prompt": "a", "promt": "b"}, "promt", "did you mean 'prompt'"),
    ({"prompt": "a", "size": "wide"}, "size", "1024x768, or auto"),
    ({"prompt": "a", "size": "96x100"}, "size", "96 or 104"),
    ({"prompt": "a", "size": "32768x64"}, "size", "over 16384 px a side"),
    ({"prompt": "a", "size": "16384x16392"}, "size", "over 16384 px"),
    ({"prompt": "a", "size": "64x64\n"}, "size", "is no size"),
    ({"prompt": "a", "quality": "hd"}, "quality", "choose steps"),
    ({"prompt": "a", "background": "transparent"}, "background", "opaque"),
    ({"prompt": "a", "stream": True}, "stream", "events"),
    ({"prompt": "a", "style": "vivid"}, "style", "unknown key"),
    ({"prompt": "a", "output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
    ({"prompt": "a", "output_format": "webp", "size": "16384x64"}, "output_format", "16383"),
    ({"prompt": "a", "n": 11}, "n", "10 or less"),
    ({"prompt": "a", "n": 0}, "n", "1 or more"),
    ({"prompt": "a", "n": 2, "seed": 2**63 - 1}, "seed", "go beyond"),
    ({"prompt": "a", "seed": -1}, "seed", "0 or more"),
    ({"prompt": "a", "seed": True}, "seed", "whole number"),
    ({"prompt": "a", "steps": 201}, "steps", "up to 200"),
    ({"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale", "finite"),
    ({"prompt": "a", "negative_prompt": "b", "guidance_scale": 1}, "negative_prompt", "guidance"),
    ({"prompt": "a", "response_format": "b64_json", "size": "4104x64"}, "response_format", "url"),
]


@pytest.mark.parametrize(("body", "param", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_nothing_is_ignored_in_silence(
    service: Service, body: dict[str, Any], param: str, said: str
) -> None:
    answer = service.http.post(
        "/v1/images/generations",
        content=json.dumps(body).replace("Infinity", "1e999"),
        headers={"content-type": "application/json"},
    )
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert said in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"a"', "\x00"])
def test_a_body_that_is_none(service: Service, content: str) -> None:
    answer = service.http.post(
        "/v1/images", content=content, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


def test_a_form_of_another_site_is_no_request(service: Service) -> None:
    """A browser sends text/plain to anywhere without asking first."""
    plain = {"content-type": "text/plain"}
    answer = service.http.post("/v1/images", content='{"prompt": "a"}', headers=plain)
    assert answer.status_code == 400


def test_a_large_body_is_not_read(service: Service) -> None:
    answer = service.http.post("/v1/images", json={"prompt": "x" * 2_000_000})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")


def test_it_describes_itself(service: Service) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/v1/images", "/v1/images/{job_id}/events"} <= set(paths)


def test_nulls_are_what_is_left_out(service: Service) -> None:
    body = {"prompt": "a", "size": "64x64", "steps": 1, "seed": None, "n": None, "user": None}
    assert service.http.post("/v1/images/generations", json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("PUT", "/v1/images", 405), ("GET", f"/v1/images/{NOBODY}", 404)],
)
def test_what_is_not_there(service: Service, method: str, path: str, status: int) -> None:
    answer = service.http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"


# --- long jobs ------------------------------------------------------------------------------------


def test_a_long_job_from_its_start_to_its_removal(service: Service) -> None:
    job = service.ask("a lake", seed=7, user="me")
    assert job["object"] == "image.job"
    assert job["status"] in ("queued", "in_progress")
    done = service.wait_for(job["id"])
    assert (done["status"], done["progress"], done["seed"]) == ("completed", 100, 7)
    assert done["created_at"] <= done["completed_at"]
    assert done["seconds"] > 0
    assert service.record(job["id"])["picture"]["user"] == "me"
    gone = service.http.delete(f"/v1/images/{job['id']}").json()
    assert gone == {"id": job["id"], "object": "image.job.deleted", "deleted": True}
    assert service.http.get(f"/v1/images/{job['id']}").status_code == 404
    assert not list(service.folder.glob(f"*{job['id']}*"))


def test_the_list_has_pages(service: Service) -> None:
    mine = [service.wait_for(service.ask("a", steps=1)["id"])["id"] for _ in range(3)]
    first = service.http.get("/v1/images?limit=2").json()
    assert [job["id"] for job in first["data"]] == mine[:0:-1]
    assert first["has_more"]
    rest = service.http.get(f"/v1/images?limit=100&after={first['last_id']}").json()
    assert rest["data"][0]["id"] == mine[0]
    assert not rest["has_more"]
    assert service.http.get(f"/v1/images?after={NOBODY}").status_code == 404
    assert service.http.get("/v1/images?limit=0").status_code == 400


def test_events_from_the_present_to_the_end(service: Service) -> None:
    job = service.ask("a lake pause_s=0.05", steps=8)
    heard = list(service.events(job["id"]))
    kinds = [kind for kind, _ in heard]
    assert kinds[0] == "status"
    assert kinds[-1] == "end"
    steps = [told["step"] for kind, told in heard if kind == "progress"]
    assert steps == list(range(9))
    assert heard[-1][1]["status"] == "completed"
    assert [kind for kind, _ in service.events(job["id"])] == ["end"], "a late listener"


def test_a_listener_in_the_middle_hears_the_present_at_once(service: Service) -> None:
    job = service.ask("a lake pause_s=0.1", steps=30)
    service.until(lambda: service.job(job["id"])["progress"] > 10)
    events = service.events(job["id"])
    (kind, first), (kind_2, told) = next(events), next(events)
    assert (kind, kind_2) == ("status", "progress")
    assert first["progress"] > 10
    assert told["step"] >= 3
    assert first["eta_s"] is not None
    service.http.delete(f"/v1/images/{job['id']}")
    assert list(events)[-1][1]["status"] == "cancelled"


def test_chatter_of_the_ranks_is_passed_over(service: Service) -> None:
    job = service.wait_for(service.ask("a lake chatter", steps=2)["id"])
    assert job["status"] == "completed"


def test_ranges_and_what_has_not_changed(service: Service, finished: dict[str, Any]) -> None:
    path = f"/v1/images/{finished['id']}/content"
    whole = service.http.get(path)
    assert whole.headers["accept-ranges"] == "bytes"
    part = service.http.get(path, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole.content)}"
    last = service.http.get(path, headers={"Range": "bytes=-10"})
    assert last.content == whole.content[-10:]
    beyond = service.http.get(path, headers={"Range": f"bytes={len(whole.content)}-"})
    assert beyond.status_code == 416
    etag = whole.headers["etag"]
    assert service.http.get(path, headers={"If-None-Match": etag}).status_code == 304
    stale = service.http.get(path, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert stale.content == whole.content
    head = service.http.head(path)
    assert head.headers["content-length"] == str(len(whole.content))


def test_a_preview_while_it_is_painted_and_after(service: Service) -> None:
    job = service.ask("a lake pause_s=0.1", steps=50)
    path = f"/v1/images/{job['id']}/preview"
    service.until(lambda: service.http.get(path).status_code == 200)
    live = service.http.get(path)
    assert live.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(live.content)).size == (120, 90)
    assert service.http.get(f"/v1/images/{job['id']}/content").status_code == 409
    waits = service.ask("b")
    assert service.http.get(f"/v1/images/{waits['id']}/preview").status_code == 204
    service.http.delete(f"/v1/images/{job['id']}")
    service.wait_for(job["id"])
    service.wait_for(waits["id"])


def test_the_deep_zoom_view(service: Service, finished: dict[str, Any]) -> None:
    name, base = finished["id"], f"/v1/images/{finished['id']}/view"
    page = service.http.get(base, follow_redirects=True)
    assert (page.status_code, page.url.path) == (200, f"{base}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert f'"{name}_files"' in page.text
    assert service.http.get(f"{base}/{name}.dzi").headers["content-type"] == "application/xml"
    tile = service.http.get(f"{base}/{name}_files/11/2_1.jpg")
    assert Image.open(io.BytesIO(tile.content)).size == (1200 - 1024, 800 - 512)
    assert service.http.get(f"{base}/{name}_files/11/3_1.jpg").status_code == 404
    small = service.http.get(f"/v1/images/{name}/preview")
    assert max(Image.open(io.BytesIO(small.content)).size) == 300


def test_cancel_while_it_waits_and_while_it_is_painted(service: Service) -> None:
    painted, waits = service.ask("a pause_s=0.1", steps=100), service.ask("b")
    service.wait_for(painted["id"], "in_progress")
    answer = service.http.delete(f"/v1/images/{waits['id']}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    answer = service.http.delete(f"/v1/images/{painted['id']}")
    assert (answer.status_code, answer.json()["cancelling"]) == (202, True)
    assert service.wait_for(painted["id"])["status"] == "cancelled"
    folder = service.folder / painted["id"]
    service.until(lambda: {path.name for path in folder.iterdir()} == {"job.json"})
    assert service.record(painted["id"])["status"] == "cancelled"


def test_who_hangs_up_is_painted_for_no_longer(service: Service, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).images.generate(
            prompt="a pause_s=0.1", size="64x64", n=2, extra_body={"steps": 100}
        )
    jobs = service.http.get("/v1/images?limit=2").json()["data"]
    for job in jobs:
        assert service.wait_for(job["id"])["status"] == "cancelled"


# --- the queue ------------------------------------------------------------------------------------


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    with serving(tmp_path, "--queue-limit", 2) as service:
        painted = service.ask("a pause_s=0.2", steps=100)
        service.wait_for(painted["id"], "in_progress")
        service.until(lambda: service.job(painted["id"])["eta_s"])
        waiting = [service.ask("b")["id"] for _ in range(2)]
        answer = service.http.post("/v1/images", json={"prompt": "c"})
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
        assert error_of(answer)["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
        service.http.delete(f"/v1/images/{waiting[0]}")
        with pytest.raises(openai.RateLimitError, match="wait already"):
            client.images.generate(prompt="two do not fit", n=2)
        assert service.metric("linfusion_queue_length") == 1
        assert service.metric("linfusion_jobs_refused_total") == 2
        service.http.delete(f"/v1/images/{painted['id']}")
        assert service.wait_for(waiting[1])["status"] == "completed"
        assert service.metric('linfusion_jobs_total{outcome="completed"}') == 1
        assert service.metric('linfusion_jobs_total{outcome="cancelled"}') == 2
        assert service.metric("linfusion_pixels_total") == 96 * 64
        assert service.metric("linfusion_picture_seconds_count") == 1


# --- ranks that die -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_whose_ranks_die_goes_on_with_others(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        job = service.ask("a lake die=2")
        done = service.wait_for(job["id"])
        assert (done["status"], done["attempts"]) == ("completed", 1)
        assert service.metric("linfusion_worker_restarts_total") == 1
        assert "rank 1 on host x has stopped while: painting" in service.log
        assert service.http.get("/healthz").status_code == 200


@pytest.mark.slow
def test_a_job_that_kills_its_ranks_fails_and_the_next_is_painted(tmp_path: Path) -> None:
    with serving(tmp_path, "--retries", 1) as service:
        bad, good = service.ask("a lake die_always=2"), service.ask("a lake")
        failed = service.wait_for(bad["id"])
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "ranks_lost"
        assert failed["error"]["message"].endswith("rank 1 on host x has stopped while: painting")
        assert failed["attempts"] == 2
        assert service.wait_for(good["id"])["status"] == "completed"
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the ranks have died"):
            client.images.generate(prompt="die_always=0", size="64x64")


@pytest.mark.slow
def test_ranks_that_are_killed_from_outside(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        job = service.ask("a lake pause_s=0.05", steps=20)
        service.wait_for(job["id"], "in_progress")
        service.ranks()[0].kill()
        done = service.wait_for(job["id"])
        assert (done["status"], done["attempts"]) == ("completed", 1)
        (launcher,) = psutil.Process(service.process.pid).children()
        launcher.kill()
        service.until(lambda: service.metric("linfusion_worker_restarts_total") == 2)
        service.ready()
        assert service.wait_for(service.ask("b")["id"])["status"] == "completed"


@pytest.mark.slow
def test_who_holds_the_pipes_of_dead_ranks_holds_nothing_up(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        job = service.ask("a lake die=2 straggler")
        assert service.wait_for(job["id"])["status"] == "completed"
        straggler = psutil.Process(int((tmp_path / job["id"] / "straggler").read_text()))
        assert straggler.is_running()
        straggler.kill()


@pytest.mark.slow
def test_ranks_that_fall_silent_are_killed(tmp_path: Path) -> None:
    with serving(tmp_path, "--silence-s", 1.5, "--retries", 0) as service:
        failed = service.wait_for(service.ask("a lake stall=1")["id"])
        assert "not a word from the ranks" in failed["error"]["message"]
        assert service.wait_for(service.ask("b")["id"])["status"] == "completed"


@pytest.mark.slow
def test_ranks_that_cannot_start_leave_the_server_alive(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("model: dies\n")
    service = Service(tmp_path / "served", "--engine-config", config).begin()
    try:
        service.until(lambda: service.metric("linfusion_worker_restarts_total") >= 2)
        assert service.http.get("/healthz").status_code == 503
        assert service.http.get("/healthz/live").json() == {"live": True, "ready": False}
        assert service.ask("waits")["status"] == "queued"
        assert service.end() == 0
    finally:
        service.close()


@pytest.mark.slow
def test_what_no_restart_mends_ends_the_server(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("model: refused\n")
    service = Service(tmp_path / "served", "--engine-config", config)
    try:
        assert service.process.wait(PATIENCE_S) == 2
        service._reader.join(PATIENCE_S)
        assert service.log.splitlines()[-1] == "error: model: 'refused' is refused"
    finally:
        service.close()


# --- stopping and starting ------------------------------------------------------------------------


@pytest.mark.slow
def test_told_to_stop_it_keeps_what_it_owes_and_pays_it_later(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        done = service.wait_for(service.ask("done")["id"])
        job, waits = service.ask("a pause_s=0.1", steps=30), service.ask("b")
        service.until(lambda: service.job(job["id"])["progress"] > 10)
        heard: list[Any] = []
        listener = threading.Thread(target=lambda: heard.extend(service.events(job["id"])))
        listener.start()
        service.until(lambda: heard)
        assert service.end() == 0, service.log
        listener.join(PATIENCE_S)
        assert heard[-1][1]["status"] == "queued"
        assert service.record(job["id"])["status"] == "queued"
        assert service.record(job["id"])["attempts"] == 0
    with serving(tmp_path) as service:
        steps = [told["step"] for kind, told in service.events(job["id"]) if kind == "progress"]
        assert steps[0] >= 3, "it goes on from the checkpoint"
        assert service.wait_for(waits["id"])["status"] == "completed"
        listed = [one["id"] for one in service.http.get("/v1/images").json()["data"]]
        assert listed == [waits["id"], job["id"], done["id"]]


@pytest.mark.slow
def test_while_it_stops_it_takes_nothing_and_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, "--stop-s", 2) as service:
        job = service.ask("a stall=1")
        service.until(lambda: service.job(job["id"])["progress"] > 0)
        answers: list[httpx2.Response] = []
        body = {"prompt": "waits", "size": "64x64"}
        waiting = threading.Thread(
            target=lambda: answers.append(service.http.post("/v1/images/generations", json=body))
        )
        waiting.start()
        service.until(lambda: service.metric("linfusion_queue_length") == 1)
        service.process.terminate()
        service.until(lambda: service.http.get("/healthz").status_code == 503)
        late = service.http.post("/v1/images", json={"prompt": "c"})
        assert (late.status_code, error_of(late)["code"]) == (503, "stopping")
        waiting.join(PATIENCE_S)
        assert answers[0].status_code == 503
        assert "when it is back" in error_of(answers[0])["message"]
        assert service.process.wait(PATIENCE_S) == 0
        assert service.record(job["id"])["status"] == "queued"


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        job = service.ask("a stall=1")
        service.until(lambda: service.job(job["id"])["progress"] > 0)
        service.process.send_signal(signal.SIGINT)
        service.until(lambda: service.http.get("/healthz").status_code == 503)
        assert service.end(signal.SIGINT) == 0


@pytest.mark.slow
def test_a_killed_server_takes_its_ranks_along_and_a_new_one_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        job = service.ask("a pause_s=0.1", steps=20)
        service.until(lambda: service.job(job["id"])["progress"] > 10)
        family = psutil.Process(service.process.pid).children(recursive=True)
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
        assert not psutil.wait_procs(family, timeout=PATIENCE_S)[1]
    with serving(tmp_path) as service:
        done = service.wait_for(job["id"])
        assert (done["status"], done["attempts"]) == ("completed", 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_whatever_is_killed_at_whatever_moment_every_job_is_painted(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    flags = ["--retries", 99]
    with serving(tmp_path, *flags) as service:
        names = [service.ask(f"{i} pause_s=0.05", steps=12, seed=i)["id"] for i in range(5)]
    for _ in range(6):
        with serving(tmp_path, *flags) as service:
            time.sleep(chance.uniform(0, 1.2))
            victim = chance.choice(["server", "launcher", "rank"])
            if victim == "server":
                service.end(signal.SIGKILL)
                continue
            (launcher,) = psutil.Process(service.process.pid).children()
            for process in [launcher] if victim == "launcher" else launcher.children():
                process.kill()
            time.sleep(chance.uniform(0, 0.5))
            assert service.end() == 0, service.log
    with serving(tmp_path, *flags) as service:
        for seed, name in enumerate(names):
            job = service.wait_for(name)
            assert (job["status"], job["seed"]) == ("completed", seed), service.log
            content = service.http.get(f"/v1/images/{name}/content").content
            assert np.array_equal(Image.open(io.BytesIO(content)), picture(64, 96, seed))


def test_one_server_a_folder(tmp_path: Path) -> None:
    held = lock(tmp_path, 0)
    with pytest.raises(UserError, match="another server"):
        lock(tmp_path, 0.2)
    os.close(held)
    os.close(lock(tmp_path, 0))


# --- keys -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "key").write_text(f"{KEY}\n")
    service = Service(folder / "served", "--api-key-file", folder / "key", "--host", "0.0.0.0")
    try:
        yield service.begin(KEY).ready()
    finally:
        service.close()


def test_the_key_opens(locked: Service) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY)
    answer = client.images.generate(prompt="a", size="64x64", extra_body={"steps": 1})
    assert locked.http.get(answer.data[0].url).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer"},
     {"Cookie": "linfusion_session=9999999999.00"}, {"Cookie": "linfusion_session=a.b.c"},
     {"Cookie": f"linfusion_session={KEY}"}, {"Authorization": "Bearer \xe9"}],
)  # fmt: skip
def test_nothing_else_does(locked: Service, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    for path in ("/v1/images", "/metrics", "/openapi.json", "/nothing", f"/v1/images/{NOBODY}"):
        answer = httpx2.get(locked.url + path, headers=raw)
        assert answer.status_code == 401, path
        assert error_of(answer)["code"] == "invalid_api_key"
    page = httpx2.get(locked.url, headers=raw)
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    assert httpx2.get(f"{locked.url}/healthz").status_code == 200


def test_the_login_form_gives_a_cookie(locked: Service) -> None:
    with httpx2.Client(base_url=locked.url) as browser:
        wrong = browser.post("/login", data={"key": "wrong"})
        assert (wrong.headers["location"], dict(browser.cookies)) == ("/login#wrong", {})
        answer = browser.post("/login", data={"key": KEY})
        said = answer.headers["set-cookie"].lower()
        assert "httponly" in said
        assert "samesite=strict" in said
        assert KEY not in said
        assert browser.get("/v1/images").status_code == 200
        assert 'data-key="asked"' in browser.get("/").text
        browser.post("/logout")
        assert browser.get("/v1/images").status_code == 401


def test_an_old_session_is_none(locked: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.serve.doors.SESSION_S", -1)
    cookie = {"Cookie": f"linfusion_session={session(KEY)}"}
    assert httpx2.get(f"{locked.url}/v1/images", headers=cookie).status_code == 401


def test_other_names_for_this_machine_are_refused(service: Service) -> None:
    answer = service.http.get("/v1/images", headers={"Host": "evil.example:8000"})
    assert (answer.status_code, error_of(answer)["code"]) == (421, "wrong_host")
    assert service.http.get("/v1/images", headers={"Host": "localhost:1"}).status_code == 200
    assert service.http.get("/v1/images", headers={"Host": "[::1"}).status_code in (400, 421)


# --- paths ----------------------------------------------------------------------------------------


def raw(service: Service, target: str, method: str = "GET") -> tuple[int, bytes]:
    """A request whose path no client has tidied up: (status, all of the answer)."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as door:
        door.sendall(
            f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: door.recv(65536), b""))
    return int(answer.split()[1]), answer


def test_no_path_leads_out_of_the_folder(service: Service, finished: dict[str, Any]) -> None:
    name = finished["id"]
    (service.folder.parent / "secret.jpg").write_bytes(b"SECRET")
    (service.folder / "secret.jpg").write_bytes(b"SECRET")
    up = ["..", "%2e%2e", ".%2e", "%2e%2e%2f", "..%2f", "%252e%252e", "....//", "%c0%ae%c0%ae"]
    tails = ["secret.jpg", "%2fetc%2fpasswd", "/etc/passwd", "job.json", ".lock", "secret.jpg%00"]
    for dots in up:
        for tail in tails:
            for start in ("", "/v1/images", f"/v1/images/{name}", f"/v1/images/{name}/view",
                          f"/v1/images/{name}/view/{name}_files",
                          f"/v1/images/{name}/view/{name}_files/11"):  # fmt: skip
                for target in (f"{start}/{dots}/{tail}", f"{start}/{dots}/{dots}/{tail}"):
                    for method in ("GET", "DELETE"):
                        status, answer = raw(service, target, method)
                        assert status in (400, 404, 405), target
                        assert b"SECRET" not in answer
                        assert b"root:" not in answer
                        assert b"created_ns" not in answer
    for target in (f"/v1/images/{name}/view/job.json", f"/v1/images/{name}/view/{name}.html%00",
                   f"/v1/images/{name}/view/{name}.png", f"/v1/images/{name.upper()}",
                   f"/v1/images/{name}%0a", f"/v1/images/{name}/view/{name}_files/11/0_0.jpg%0a",
                   f"/v1/images/{name}/view/{name}_files/11/0_0.jpeg",
                   f"/v1/images/{name}/view/{name}_files/1١/0_0.jpg"):  # fmt: skip
        assert raw(service, target.replace("١", "%D9%A1"))[0] == 404, target
    assert (service.folder / "secret.jpg").exists()


def test_no_link_leads_out_of_the_folder(service: Service) -> None:
    name = service.wait_for(service.ask("a lake")["id"])["id"]
    outside = service.folder.parent / "outside.png"
    outside.write_bytes(b"SECRET")
    picture = service.folder / name / f"{name}.png"
    picture.unlink()
    picture.symlink_to(outside)
    assert service.http.get(f"/v1/images/{name}/content").status_code == 404
    tiles = service.folder / name / f"{name}_files"
    tiles.rename(tiles.with_name("moved"))
    tiles.symlink_to(service.folder.parent)
    (service.folder.parent / "7").mkdir(exist_ok=True)
    (service.folder.parent / "7" / "0_0.jpg").write_bytes(b"SECRET")
    tile = f"/v1/images/{name}/view/{name}_files/7/0_0.jpg"
    assert service.http.get(tile).status_code == 404
    service.http.delete(f"/v1/images/{name}")
    assert outside.exists()


# --- the command line -----------------------------------------------------------------------------

MISTAKES = [
    (["--hots", "x"], "--hots: unknown flag; did you mean '--host'?"),
    (["--port", "99999"], "--port: 99999 is too large"),
    (["--host", "0.0.0.0"], "there is no API key"),
    (["--host", "::"], "there is no API key"),
    (["--without-key"], "without_key goes with a host that others can reach"),
    (["--engine-config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    (["--engine-config", "{bad}"], "heigth: unknown key; did you mean 'height'?"),
    (["--engine-config", "{plan}"], "plan: the service paints"),
    (["--api-key-file", "{short}"], "16 plain characters"),
    (["--api-key-file", "nowhere"], "no such file"),
    (["--folder", "{bad}"], "folder: "),
    (["--host", "203.0.113.1", "--without-key"], "cannot listen on"),
]


@pytest.mark.parametrize(("flags", "said"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_sentence(tmp_path: Path, flags: list[str], said: str) -> None:
    files = {"bad": "heigth: 8\n", "plan": "plan: true\n", "short": "key\n"}
    for name, content in files.items():
        (tmp_path / name).with_suffix(".yaml").write_text(content)
    names = {name: str((tmp_path / name).with_suffix(".yaml")) for name in files}
    command = [sys.executable, "-m", "engine.serve", "--port", "0", "--worker", "tests.double"]
    command += ["--folder", str(tmp_path / "served"), *(flag.format(**names) for flag in flags)]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        service = Service(tmp_path, "--port", port)
        assert service.process.wait(PATIENCE_S) == 2
        service._reader.join(PATIENCE_S)
        assert f"127.0.0.1:{port}" in service.log


# --- the parts ------------------------------------------------------------------------------------


PICTURE = Picture(
    prompt="a", negative_prompt="", height=8, width=8, seed=0, steps=1, guidance_scale=1.0,
    output_format="png",
)  # fmt: skip


def base_of(**values: Any) -> Base:
    return Base(None, values, Base.read(None).with_job(values))


def test_what_is_left_open_is_the_operators() -> None:
    base = base_of(steps=12, guidance_scale=3.0, negative_prompt="fog", height=512, width=768)
    (picture,) = LongRequest(prompt="a").pictures(base, ServeSettings())
    assert (picture.steps, picture.guidance_scale, picture.negative_prompt) == (12, 3.0, "fog")
    assert (picture.width, picture.height) == (768, 512)
    many = GenerationRequest(prompt="a", n=3, seed=9).pictures(base, ServeSettings())
    assert [one.seed for one in many] == [9, 10, 11]


def test_the_operators_limits() -> None:
    limits = ServeSettings(largest_pixels=64 * 64)
    with pytest.raises(ApiError, match="over 4096 pixels in all"):
        LongRequest(prompt="a", size="64x72").pictures(base_of(), limits)


def test_records_that_are_none_are_passed_over(tmp_path: Path) -> None:

    async def fill() -> list[Job]:
        return await Book(tmp_path, 9, 2, Metrics()).add([PICTURE, PICTURE], "demo")

    first, second = asyncio.run(fill())
    (tmp_path / first.id / "job.json").write_text('{"id": ')
    (tmp_path / NOBODY).mkdir()
    (tmp_path / NOBODY / "job.json").write_text((tmp_path / second.id / "job.json").read_text())
    (tmp_path / f".removed-{NOBODY}").mkdir()
    book = Book(tmp_path, 9, 2, Metrics())
    book.read()
    jobs, has_more = book.page(10, None)
    assert ([job.id for job in jobs], has_more, book.waiting) == ([second.id], False, 1)
    assert not (tmp_path / f".removed-{NOBODY}").exists()


def test_a_record_that_cannot_be_kept_is_no_job(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    book = Book(tmp_path / "file", 9, 2, Metrics())

    async def ask() -> None:
        with pytest.raises(ApiError) as caught:
            await book.add([PICTURE], "demo")
        assert caught.value.status == 507
        await book.flush()

    asyncio.run(ask())
    assert book.waiting == 0


def test_tiles_have_names_of_numbers(tmp_path: Path) -> None:
    files = Files(tmp_path, Job.of(PICTURE, "demo", 0))
    assert files.tile("11", "0_3.jpg") == files.tiles / "11" / "0_3.jpg"
    for level, name in [("..", "0_0.jpg"), ("1", "../0_0.jpg"), ("1", "0_0.jpg\n"), ("", "0_0.jpg"),
                        ("1", "0_0.html"), ("1", "٠_0.jpg"), ("1/2", "0_0.jpg")]:  # fmt: skip
        assert files.tile(level, name) is None


def test_keys_are_compared_whole() -> None:
    assert is_key(KEY, KEY)
    assert not is_key(KEY[:-1], KEY)
    assert not is_key("", KEY)
    assert not is_key("é", KEY)


def test_a_checkpoint_of_another_configuration_is_given_up_once(tmp_path: Path) -> None:
    """The engine refuses to go on from it, which is no mistake of the user's."""

    async def two_mistakes() -> list[str]:
        book = Book(tmp_path, 9, 2, Metrics())
        (job,) = await book.add([PICTURE], "demo")
        checkpoint = tmp_path / job.id / f".{job.file_name}.checkpoint"
        checkpoint.touch()
        found = []
        for _ in range(2):
            assert book.begin() is job
            book.ended(job, "mistake", "the checkpoint is of other settings")
            found.append(job.status)
            assert not checkpoint.exists()
        await book.flush()
        return found

    assert asyncio.run(two_mistakes()) == ["queued", "failed"]


def test_a_server_that_dies_of_a_job_gives_it_up(tmp_path: Path) -> None:
    async def begun() -> Job:
        book = Book(tmp_path, 9, 0, Metrics())
        (job,) = await book.add([PICTURE], "demo")
        book.begin()
        await book.flush()
        return job

    name = asyncio.run(begun()).id
    book = Book(tmp_path, 9, 0, Metrics())
    book.read()
    job = book.get(name)
    assert (job.status, book.waiting) == ("failed", 0)
    assert job.error is not None
    assert "the service has died" in job.error.message
