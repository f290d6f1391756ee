"""A render host of OpenCue's: a real RQD, and a stand-in for the Cuebot that it works for.

    with render_host() as rqd:
        frame = rqd.launch("launch/opencue/frame.sh 7 --output ...")
        rqd.kill(frame)
        status, signal = rqd.ended(frame)

RQD runs in `.rqd`, an environment of its own (`make schedulers`), beside `tests/cuebot.py`, on
ports of its own on loopback and in a temporary folder of its own, where it and the frames' users
may write. At the end both are killed, with all that RQD has started: that leads sessions of its
own, but finds the folder's name in its environment.

RQD starts frames as the user that it runs as itself, or, as root and told so, by `su` as the user
of the job: here one that only the RQD knows, from a list of users that nobody else sees.
"""

import contextlib
import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.slurm import free_ports

ROOT = Path(__file__).parents[1]
BOUND_S = 120.0  # of whatever is waited for, on a busy machine
PYTHON = ROOT / ".rqd" / "bin" / "python"
_MARK = "RQD_TEST_FOLDER"
_UID = 54321

_CONFIG = """\
[Override]
OVERRIDE_CUEBOT = 127.0.0.1
CUEBOT_GRPC_PORT = {cuebot}
RQD_GRPC_PORT = {rqd}
RQD_NETWORK_INTERFACE = lo
OVERRIDE_HOSTNAME = 127.0.0.1
OVERRIDE_CORES = 2
OVERRIDE_NIMBY = false
RQD_BECOME_JOB_USER = {become}
LAUNCH_FRAME_USER_GID = {gid}
"""


class NotUp(RuntimeError):
    """RQD is installed, but does not run here."""


def missing() -> str | None:
    """Why there can be no render host here, or None."""
    if not (PYTHON.parents[1] / ".ready").exists():
        return "needs RQD in .rqd: `make schedulers` puts it there"
    return None if shutil.which("time") else "RQD starts frames by Debian's package time"


def missing_for_another_user() -> str | None:
    """Why RQD cannot start frames as somebody else here, or None."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "only root may start a frame as another user"
    trial = [sys.executable, "-c", "import launch, torch"]
    environment = {"PYTHONPATH": str(ROOT)}
    try:
        subprocess.run(
            trial, user=_UID, group=_UID, extra_groups=[], cwd="/", env=environment,
            check=True, capture_output=True, timeout=BOUND_S,
        )  # fmt: skip
    except (PermissionError, subprocess.CalledProcessError):
        return f"other users may not read {ROOT}, or may not run {Path(sys.executable).resolve()}"
    return None


@dataclass
class Rqd:
    """A render host that runs.

    Attributes:
        folder: where frames may write.
        user, uid: whose job it is.
        becomes: whether frames are started as that user, or as the one that RQD is.
    """

    folder: Path
    user: str
    uid: int
    becomes: bool
    cuebot: "subprocess.Popen[str]"
    heard: "queue.Queue[dict[str, object]]" = field(default_factory=queue.Queue)
    _reports: list[dict[str, object]] = field(default_factory=list)

    def launch(self, command: str, **environment: str) -> str:
        """The id of a frame that runs `command`, a line of shell as Cuebot sends it."""
        frame = secrets.token_hex(8)
        self._order(
            launch={
                "frame_id": frame,
                "frame_name": f"0007-{frame}",
                "job_id": "job",
                "job_name": "testing-test-pictures",
                "show": "testing",
                "shot": "test",
                "user_name": self.user,
                "uid": self.uid,
                "gid": self.uid,
                "num_cores": 100,
                "log_dir": str(self.folder / "logs"),
                "command": command,
                "environment": {_MARK: str(self.folder), **environment},
            }
        )
        return frame

    def kill(self, frame: str) -> None:
        """As when somebody presses Kill, or a host is wanted for something else."""
        self._order(kill=frame)

    def ended(self, frame: str) -> tuple[int, int]:
        """(exit status, signal) that RQD reports of a frame, once it does."""
        report = self.report("completed", frame)
        return report["status"], report["signal"]

    def log(self, frame: str) -> str:
        """What RQD has written of a frame."""
        found = list((self.folder / "logs").glob(f"*{frame}.rqlog"))
        return found[0].read_text() if found else ""

    def processes(self, frame: str) -> list[psutil.Process]:
        """Those of a frame: RQD puts its name into their environment."""
        return processes(self.folder, frame=f"0007-{frame}")

    def report(self, name: str, value: str | None = None) -> dict[str, object]:
        """The first report that has this name (and value), once it has come."""
        deadline = time.monotonic() + BOUND_S
        while True:
            for report in self._reports:
                if name in report and value in (None, report[name]):
                    self._reports.remove(report)
                    return report
            try:
                left = max(0.0, deadline - time.monotonic())
                self._reports.append(self.heard.get(timeout=left))
            except queue.Empty:
                raise NotUp(f"no {name} {value or ''} of RQD's, only {self._reports}") from None

    def _order(self, **order: object) -> None:
        (word,) = order
        self.cuebot.stdin.write(json.dumps(order) + "\n")
        self.cuebot.stdin.flush()
        refusal = self.report({"launch": "launched", "kill": "killed"}[word])
        assert not any(refusal.values()), refusal


@contextlib.contextmanager
def render_host(as_another_user: bool = False) -> Iterator[Rqd]:
    """An RQD that has told its Cuebot of itself. Raises NotUp if it does not come up."""
    with tempfile.TemporaryDirectory(prefix="rqd-") as name:
        folder = Path(name)
        folder.chmod(0o777)  # the job's user writes here; pytest's folders are for one user
        uid, user = _UID if as_another_user else os.geteuid() or _UID, "painter"
        ports = _configure(folder, as_another_user, uid)
        try:
            cuebot = _started([PYTHON, ROOT / "tests" / "cuebot.py", *ports], folder, "cuebot")
            rqd = Rqd(folder, user, uid, as_another_user, cuebot)
            threading.Thread(target=_listen, args=(cuebot, rqd.heard), daemon=True).start()
            _started(_command(folder, as_another_user), folder, "rqd")
            rqd.report("started")
            yield rqd
        finally:
            _kill(folder)


def _configure(folder: Path, become: bool, uid: int) -> list[int]:
    """Write RQD's settings and users; returns the ports (Cuebot's, RQD's)."""
    cuebot, rqd = free_ports(2)
    text = _CONFIG.format(cuebot=cuebot, rqd=rqd, become=str(become).lower(), gid=uid)
    (folder / "rqd.conf").write_text(text)
    users = Path("/etc/passwd").read_text()
    home = folder / "home"
    home.mkdir()
    home.chmod(0o777)
    (folder / "passwd").write_text(f"{users.rstrip()}\npainter:*:{uid}:{uid}::{home}:/bin/sh\n")
    return [cuebot, rqd]


def _command(folder: Path, as_another_user: bool) -> list[object]:
    rqd = [PYTHON, "-m", "rqd", "--nimbyoff", "-c", folder / "rqd.conf"]
    if not as_another_user:
        return rqd
    # A file system of its own, where the list of users is another one. RQD would find that the
    # user of the job is missing, and add one to this machine.
    see = 'mount --bind "$0" /etc/passwd && exec "$@"'
    apart = ["unshare", "--mount", "--propagation", "private"]
    return [*apart, "sh", "-c", see, folder / "passwd", *rqd]


def _started(command: list[object], folder: Path, name: str) -> "subprocess.Popen[str]":
    with (folder / f"{name}.err").open("w") as errors:
        return subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, "TMPDIR": str(folder), _MARK: str(folder)},
            cwd=folder, text=True, start_new_session=True,
        )  # fmt: skip


def _listen(cuebot: "subprocess.Popen[str]", heard: "queue.Queue[dict[str, object]]") -> None:
    for line in cuebot.stdout:
        heard.put(json.loads(line))


def _kill(folder: Path) -> None:
    """All that has the folder's name in its environment."""
    for process in processes(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(BOUND_S)


def processes(folder: Path, frame: str | None = None) -> list[psutil.Process]:
    """Those that have the folder's name, and a frame's, in their environment, and are not dead."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            ours = environment.get(_MARK) == str(folder)
            wanted = frame is None or environment.get("frame") == frame
            if ours and wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
