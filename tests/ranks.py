"""The one harness of all distributed tests: real processes on gloo over loopback.

    results = run_ranks(3, paint_band, height)      # paint_band(mesh, height) in three processes

A fork server that has torch and diffusers loaded makes a rank start in a fraction of a second. Each
rank runs one thread. A rank that fails ends the others, and a group that is late is killed whole.
"""

import contextlib
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_S = 480.0  # of one group of ranks; the longest takes a quarter of it on two busy cores

mp.set_forkserver_preload(["torch", "diffusers", "tests.families"])


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, start: str = "forkserver"
) -> list[Any]:
    """`function(mesh, *args)` on `size` ranks; their results in rank order.

    Args:
        start: how multiprocessing starts them; "spawn" where ranks take a GPU, since no fork may.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or all were too late.
    """
    with started_ranks(size, function, *args, start=start) as (_, receivers):
        return _collect(receivers)


@contextlib.contextmanager
def started_ranks(
    size: int, function: Callable[..., Any], *args: Any, start: str = "forkserver"
) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """The processes and what they send, for tests that do something to them; killed at the end."""
    context: Any = mp.get_context(start)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, size, Path(folder) / "store", sender, function, args),
                daemon=True,
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            yield ranks, [receiver for receiver, _ in pipes]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def torchrun(ranks: int, *command: object) -> tuple[int, str, str]:
    """A real `torchrun` of `command`; its exit code, standard output and standard error.

    Its whole group of processes is killed when it is late.
    """
    process = subprocess.Popen(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)],
            *["--master_port", str(_free_port())],  # other tests run beside this one
            *map(str, command),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def _collect(receivers: list[Connection]) -> list[Any]:
    deadline = time.monotonic() + TIMEOUT_S
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        pending = [r for i, r in enumerate(receivers) if i not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(set(range(len(receivers))) - set(results))} are too late"
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                ok, value = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(
    rank: int,
    size: int,
    store: Path,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from engine.bands import open_mesh

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        with open_mesh() as mesh, torch.inference_mode():
            result = function(mesh, *args)
        dist.barrier()  # nobody leaves while another still needs it
        sender.send((True, result))
    except BaseException:
        sender.send((False, traceback.format_exc()))
