"""The service as a process of its own, on a free port, and what tests ask of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240


class Service:
    """`python -m engine.serve`, with ranks that only pretend unless another worker is named."""

    def __init__(self, folder: Path, *flags: object, worker: str = "tests.double") -> None:
        command = [sys.executable, "-m", "engine.serve", "--port", 0, "--folder", folder]
        command += ["--worker", worker, "--ranks", 1, "--restart-pause-s", 0.05, *flags]
        self.folder, self.log = folder, ""
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def begin(self, key: str | None = None) -> "Service":
        """Until it listens."""
        self.until(lambda: "listening on" in self.log or self.process.poll() is not None)
        found = re.search(r"listening on (http://\S+),", self.log)
        assert found, self.log
        self.url = found[1]
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S)
        return self

    def ready(self) -> "Service":
        """Until jobs are taken."""
        self.until(lambda: self.http.get("/healthz").status_code == 200)
        return self

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return value

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def close(self) -> None:
        """Whatever is left is killed."""
        family: list[psutil.Process] = []
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
        for process in family:
            if process.is_running():
                process.kill()

    # --- jobs -------------------------------------------------------------------------------------

    def ask(self, prompt: str, **wishes: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "size": "96x64", "steps": 4, **wishes}
        answer = self.http.post("/v1/images", json=body)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, name: str) -> dict[str, Any]:
        job: dict[str, Any] = self.http.get(f"/v1/images/{name}").json()
        return job

    def wait_for(self, name: str, *states: str) -> dict[str, Any]:
        states = states or ("completed", "failed", "cancelled")
        self.until(lambda: self.job(name)["status"] in states)
        return self.job(name)

    def record(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / name / "job.json").read_text())
        return record

    def ranks(self) -> list[psutil.Process]:
        """The launcher's children."""
        (launcher,) = psutil.Process(self.process.pid).children()
        return launcher.children()

    def events(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with self.http.stream("GET", f"/v1/images/{name}/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            kind = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield kind, json.loads(line.removeprefix("data: "))

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.M)
        assert found, name
        return float(found[1])


@contextmanager
def serving(folder: Path, *flags: object, worker: str = "tests.double") -> Iterator[Service]:
    """One that is ready, and gone afterwards."""
    service = Service(folder, *flags, worker=worker)
    try:
        yield service.begin().ready()
    finally:
        service.close()
