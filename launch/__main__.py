"""Start the ranks of one host, pass signals on to them, and end with the exit code that they had.

    python -m launch --nproc-per-node 8 --config configs/sdxl_16k.yaml --resume
    python -m launch --nnodes 2 --node-rank $SLURM_NODEID --master-addr $HEAD --config ...

What is no option of the launcher's goes to `engine.generate` (or another `--module`). Plain
`torchrun` starts the same ranks, but turns every exit code, and a signal, into 1, whereas a farm
wants to know whether to try again (75), to fix the settings (2), or to look at the log (3).

A rank takes seconds to import what it needs, and a signal in that time must not end it: it begins
with SIGTERM and SIGINT ignored, and the launcher repeats them until the rank has noted them. So
another `--module` must handle them too, or is not ended by them.

Ranks of several hosts must find each other. Left to itself, gloo listens where the host's own name
resolves to, which on many a machine is nowhere or 127.0.1.1, and no other host gets through. So the
launcher names the network interface that leads to rank 0, unless GLOO_SOCKET_IFNAME is set already.

A rank that has ended badly gives the others `--grace-s` to say why and to end by themselves; then
they are killed. If the launcher itself is killed, the kernel ends its ranks with it.
"""

import argparse
import atexit
import ctypes
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from engine.exits import DONE, FAILED, MISTAKEN, STOPPED
from engine.signals import STOPPING, ignore_signals

_POLL_S = 0.05
_REPEAT_S = 1.0
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, engine_argv = _parse(argv)
    count = options.nproc_per_node or _count_gpus() or 1
    ranks: list[subprocess.Popen[bytes]] = []
    told = _pass_signals_on(ranks)
    ranks.extend(
        subprocess.Popen(
            [sys.executable, "-u", "-m", options.module, *engine_argv],
            env={**os.environ, **_environment(options, local_rank, count)},
            preexec_fn=_prepare,
        )
        for local_rank in range(count)
    )
    first = options.node_rank * count
    codes = _wait(ranks, options.grace_s, told)
    return worst([_described(code, first + i) for i, code in enumerate(codes)])


def worst(codes: Sequence[int]) -> int:
    """The exit code of a job whose ranks ended with `codes`."""
    for code in (MISTAKEN, STOPPED, DONE):
        if all(other in (code, DONE) for other in codes) and code in codes:
            return code
    return FAILED


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nproc-per-node", "--nproc_per_node", type=int, help="ranks here; by default one a GPU")
    add("--nnodes", type=int, default=1, help="hosts of the job")
    add("--node-rank", "--node_rank", type=int, default=0, help="which of them this is, from 0")
    add("--master-addr", "--master_addr", default="127.0.0.1", help="host of rank 0")
    add("--master-port", "--master_port", type=int, help="a free port there; by default found")
    add("--grace-s", "--grace_s", type=float, default=30.0, help="for the others, when a rank ends")
    add("--module", default="engine.generate", help="what the ranks run")
    options, rest = parser.parse_known_args(argv)
    if options.nnodes > 1 and options.master_port is None:
        parser.error("several hosts must agree on a --master-port, such as 29500")
    options.master_port = options.master_port or _free_port()
    return options, [word for word in rest if word != "--"]


def _environment(options: argparse.Namespace, local_rank: int, count: int) -> dict[str, str]:
    """What torch.distributed wants to know of a rank."""
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    environment = {
        "RANK": str(options.node_rank * count + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(options.nnodes * count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": options.master_addr,
        "MASTER_PORT": str(options.master_port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    if options.nnodes > 1 and (interface := _interface_to(options.master_addr)) is not None:
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
    return environment


def _interface_to(host: str) -> str | None:
    """The network interface by which this host reaches another one, or is reached by it.

    None if that cannot be told, or if it is loopback: rank 0's own host may think so of its name.
    """
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as trial:
            trial.connect(there)  # of a datagram socket: nothing is sent, only a route chosen
            here = trial.getsockname()[0].split("%")[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if here in [own.address.split("%")[0] for own in addresses]:
            return None if ipaddress.ip_address(here).is_loopback else name
    return None


def _count_gpus() -> int:
    """Those that this process may use, as far as can be told without a driver's library."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
    return port


def _prepare() -> None:
    """In a rank, before it runs: deaf until it listens, killed when the launcher is no more."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _pass_signals_on(ranks: Sequence["subprocess.Popen[bytes]"]) -> list[int]:
    """From now on. The stopping signals that have come, in the list that is returned."""
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number in STOPPING:
            told.append(number)
        _send(ranks, number)

    for number in (*STOPPING, signal.SIGUSR1):
        signal.signal(number, pass_on)
    # Python takes its handlers away as it ends; a second signal then would replace the exit code.
    atexit.register(ignore_signals)
    return told


def _send(ranks: Sequence["subprocess.Popen[bytes]"], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _wait(
    ranks: Sequence["subprocess.Popen[bytes]"], grace_s: float, told: Sequence[int]
) -> list[int]:
    """Every rank's exit code, once all have ended."""
    deadline: float | None = None
    repeated = time.monotonic()
    while any(rank.poll() is None for rank in ranks):
        now = time.monotonic()
        if deadline is None and any(rank.poll() for rank in ranks):
            deadline = now + grace_s
        if deadline is not None and now > deadline:
            _send(ranks, signal.SIGKILL)
        if told and now > repeated + _REPEAT_S:
            repeated = now
            _send(ranks, told[-1])
        time.sleep(_POLL_S)
    return [rank.wait() for rank in ranks]


def _described(code: int, rank: int) -> int:
    """`code`, after a word about a rank that could not say anything itself."""
    if code < 0:
        name = signal.Signals(-code).name
        print(f"error: rank {rank} on {socket.gethostname()} was ended by {name}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
