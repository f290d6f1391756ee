"""A Slurm of one's own: munged, slurmctld and two slurmd on this host, in a temporary folder.

    with cluster(folder) as slurm:
        job = slurm.submit("--nodes", "2", script, "--config", ...)
        slurm.wait_for(job, "COMPLETED")

Both nodes are this host under two names and two ports. There is a partition for the work and one
that preempts it. The daemons listen on loopback, know nothing of systemd or of another Slurm on
this host, and are killed with all that they started at the end.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("n0", "n1")
BOUND_S = 100.0  # of whatever is waited for, on a busy machine
_NOT_OVER = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "PREEMPTED", "REQUEUED")
DAEMONS = ("munged", "slurmctld", "slurmd")

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=1,sched_min_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores}
PartitionName=work Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n0,n1 PriorityTier=2 PreemptMode=OFF
"""


class NotUp(RuntimeError):
    """Slurm is installed, but does not run here, such as in a container that forbids it."""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if absent := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"needs Debian's packages slurm-wlm and munge, without {', '.join(absent)} here"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs.

    Attributes:
        environment: in which Slurm's commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def __call__(self, *command: object) -> str:
        """What one of Slurm's commands prints."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=BOUND_S
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: object) -> str:
        """The number of a new job."""
        return self("sbatch", "--parsable", *words).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol` says of a job, such as JobState and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "--oneliner", "show", "job", job)))

    def wait_for(self, job: str, state: str) -> dict[str, str]:
        """The facts of a job that has come to a state in which it stays."""
        deadline = time.monotonic() + BOUND_S
        while (facts := self.facts(job))["JobState"] != state:
            assert facts["JobState"] in _NOT_OVER, f"job {job} has ended otherwise: {facts}"
            assert time.monotonic() < deadline, f"job {job} is late: {facts}"
            time.sleep(0.2)
        return facts


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Two idle nodes. Raises NotUp if they do not come up."""
    _configure(folder)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    slurm = Slurm(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in _commands(folder).items():
            daemons.append(_started(command, folder / f"{name}.out", environment))
            if name == "munged":
                _wait_until((folder / "munge.socket").exists, "munged makes no socket")
        _wait_until(lambda: _idle(slurm) == len(NODES), "the nodes do not become idle")
        yield slurm
    finally:
        _kill(daemons, folder)


def _configure(folder: Path) -> None:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    text = _CONFIG.format(
        host=socket.gethostname().split(".")[0],
        ports=free_ports(1 + len(NODES)),
        folder=folder,
        cores=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(text)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(socket.socket()) for _ in range(count)]
        for trial in trials:
            trial.bind(("127.0.0.1", 0))
        return [trial.getsockname()[1] for trial in trials]


def _commands(folder: Path) -> dict[str, list[str]]:
    munge = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "log-file": "munged.log",
        "pid-file": "munged.pid",
        "seed-file": "munged.seed",
    }
    paths = [f"--{option}={folder / name}" for option, name in munge.items()]
    config = str(folder / "slurm.conf")
    return {
        "munged": ["munged", "--foreground", "--force", *paths],
        "slurmctld": ["slurmctld", "-D", "-f", config],
        **{f"slurmd-{node}": ["slurmd", "-D", "-f", config, "-N", node] for node in NODES},
    }


def _started(
    command: list[str], out: Path, environment: dict[str, str]
) -> "subprocess.Popen[bytes]":
    with out.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def _idle(slurm: Slurm) -> int:
    with contextlib.suppress(AssertionError):
        return slurm("sinfo", "-hN", "-p", "work", "-o", "%t").split().count("idle")
    return 0


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + BOUND_S / 3
    while not condition():
        if time.monotonic() > deadline:
            raise NotUp(otherwise)
        time.sleep(0.2)


def _kill(daemons: "list[subprocess.Popen[bytes]]", folder: Path) -> None:
    """The daemons, and what they started: that has left their sessions, but not this cluster."""
    for daemon in daemons:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
    mark = str(folder / "slurm.conf")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == mark:
                process.kill()
