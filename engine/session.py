"""What every command on several ranks has around its work: a mesh, a watch, one voice, one code.

    with said_once(): ...                      reading the command line, which may print help
    code = run(timeout_s, stall_s, work)       work(mesh, watch) -> (exit code, what to say)
    leave(code)

What the work says is said on rank 0, a mistake (`UserError`) in one sentence. Whatever fails ends
every rank with the code of a failure; where a rank is gone, one of the others says which.
"""

import contextlib
import io
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from engine.bands import Mesh, is_first_process, open_mesh
from engine.config import UserError
from engine.exits import FAILED, MISTAKEN
from engine.watch import LostRank, Watch, watching

Work = Callable[[Mesh, Watch], tuple[int, str]]


class _Failed(Exception):
    """Said already. It leaves the mesh as it is: with a rank gone, taking leave could wait."""


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """What is printed inside, before the ranks know of each other, is printed by the first one."""
    with contextlib.ExitStack() as stack:
        if not is_first_process():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def run(timeout_s: float, stall_s: float, work: Work, mistake: UserError | None = None) -> int:
    """Do `work` on this rank, unless some rank has a mistake; returns the exit code.

    Args:
        mistake: what is wrong with this rank's command line. All ranks meet before any says so.
    """

    def checked(mesh: Mesh, watch: Watch) -> tuple[int, str]:
        mesh.agree(lambda: _raise(mistake))
        return work(mesh, watch)

    try:
        return _run(timeout_s, stall_s, checked)
    except _Failed:
        return FAILED


def leave(code: int) -> NoReturn:
    """End this process at once: threads that still wait for a store or a socket do not hold it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def quiet(mesh: Mesh) -> None:
    """Libraries' warnings and loading bars, once: rank 0 speaks for all."""
    import diffusers.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    if mesh.rank == 0:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("engine").setLevel(logging.INFO)
    else:
        diffusers.utils.logging.set_verbosity_error()


def _run(timeout_s: float, stall_s: float, work: Work) -> int:
    with open_mesh(timeout_s) as mesh:
        try:
            with watching(mesh, stall_s) as watch:
                code, said = _attempt(work, mesh, watch)
                mesh.barrier()
        except Exception as error:  # of whichever layer: every rank must come to its end
            _say_failure(mesh, error)
            raise _Failed from error
        if mesh.rank == 0 and said:
            out = sys.stderr if code else sys.stdout
            print(f"error: {said}" if code == MISTAKEN else said, file=out, flush=True)
        # torchrun ends all ranks as soon as one has exited: first let rank 0 have its say. What
        # happens to a rank from here on changes nothing any more.
        with contextlib.suppress(RuntimeError):
            mesh.barrier()
    return code


def _attempt(work: Work, mesh: Mesh, watch: Watch) -> tuple[int, str]:
    try:
        return work(mesh, watch)
    except UserError as mistake:  # the same on every rank
        return MISTAKEN, str(mistake)


def _raise(mistake: UserError | None) -> None:
    if mistake is not None:
        raise mistake


def _say_failure(mesh: Mesh, error: Exception) -> None:
    """One line by one rank where the watch knows the culprit; else every rank says its own."""
    if isinstance(error, LostRank):
        if error.speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return
    traceback.print_exception(error)
    said = f"rank {mesh.rank} on host {socket.gethostname()}: {error}"
    print(f"error: {said}", file=sys.stderr, flush=True)
