"""Paint one picture from a sentence, on as many ranks as the launcher started.

    torchrun --nproc_per_node 8 -m engine.generate --prompt "a lake at dawn" --output lake.png
    python -m engine.generate --config configs/demo.yaml --seed 7
    python -m engine.generate --config outputs/demo.png
    torchrun --nproc_per_node 8 -m engine.generate --config configs/sdxl_16k.yaml --plan

Every setting is a flag and a key of the YAML file (`--help` lists them; `engine.config` has them).
What happens is said on rank 0, in one sentence, and by the exit code of every rank:

    0     done
    2     a user's mistake
    3     a failure, such as a rank that is gone
    75    told to stop (SIGTERM, SIGINT), and stopped: `--resume` goes on

`torchrun` itself turns every code but 0 into 1; `python -m launch` keeps them.
"""

import contextlib
import io
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.bands import Mesh, is_first_process, open_mesh
from engine.config import Settings, UserError
from engine.exits import DONE, FAILED, MISTAKEN, STOPPED
from engine.progress import DIALECTS, Progress, silent
from engine.provenance import read_config
from engine.signals import note_signals
from engine.watch import LostRank, Watch, watching

if TYPE_CHECKING:
    from engine.keeper import Control


class _Failed(Exception):
    """Said already. It leaves the mesh as it is: with a rank gone, taking leave could wait."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return _main(argv)
    except _Failed:
        return FAILED


def _main(argv: Sequence[str] | None) -> int:
    settings, mistake = _read_settings(argv)
    told = note_signals()
    with open_mesh(settings.timeout_s) as mesh:
        try:
            with watching(mesh, settings.stall_s) as watch:
                code, said = _run(settings, mistake, mesh, watch, told)
                mesh.barrier()
        except Exception as error:  # of whichever layer: every rank must come to its end
            _say_failure(mesh, error)
            raise _Failed from error
        if mesh.rank == 0:
            out = sys.stderr if code else sys.stdout
            print(f"error: {said}" if code == MISTAKEN else said, file=out, flush=True)
        # torchrun ends all ranks as soon as one has exited: first let rank 0 have its say. What
        # happens to a rank from here on changes nothing any more.
        with contextlib.suppress(RuntimeError):
            mesh.barrier()
    return code


def _say_failure(mesh: Mesh, error: Exception) -> None:
    """One line by one rank where the watch knows the culprit; else every rank says its own."""
    if isinstance(error, LostRank):
        if error.speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return
    traceback.print_exception(error)
    said = f"rank {mesh.rank} on host {socket.gethostname()}: {error}"
    print(f"error: {said}", file=sys.stderr, flush=True)


def _run(
    settings: Settings,
    mistake: UserError | None,
    mesh: Mesh,
    watch: Watch,
    told: Callable[[], bool],
) -> tuple[int, str]:
    """(exit code, what to say), the same on every rank."""
    try:
        mesh.agree(lambda: _raise(mistake))
        return _paint(settings, mesh, watch, told)
    except UserError as error:
        return MISTAKEN, str(error)


def _paint(
    settings: Settings, mesh: Mesh, watch: Watch, told: Callable[[], bool]
) -> tuple[int, str]:
    """The picture, or with `--plan` what it would take."""
    # diffusers and transformers take seconds to import; a mistyped flag should not wait for them.
    _quiet(mesh)
    from engine.checkpoint import is_finished, pinned
    from engine.keeper import Interrupted
    from engine.pipeline import Engine, plan_job

    if settings.plan:
        plan = plan_job(settings, mesh)
        if plan.refusal and mesh.rank == 0:
            print(plan, flush=True)
        plan.check()
        return DONE, str(plan)
    if settings.resume:
        # As rank 0 sees it: the others' disks may show what is new a little later.
        if mesh.gather_objects(mesh.agree(lambda: is_finished(settings)))[0]:
            return DONE, f"{settings.output}: is finished already, nothing to do"
        settings = mesh.gather_objects(mesh.agree(lambda: pinned(settings)))[0]
    try:
        engine = Engine.load(settings, mesh, _control(settings, mesh, watch, told))
        return DONE, str(engine.generate(settings))
    except Interrupted as stopped:
        return STOPPED, str(stopped)


def _quiet(mesh: Mesh) -> None:
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


def _control(settings: Settings, mesh: Mesh, watch: Watch, told: Callable[[], bool]) -> "Control":
    """Rank 0 tells of progress; each rank's watch knows what it is doing."""
    from engine.keeper import Control

    dialect = "bars" if settings.progress == "auto" else settings.progress
    listener = DIALECTS[dialect]() if mesh.rank == 0 else silent

    def tell(progress: Progress) -> None:
        watch.doing(str(progress))
        listener(progress)

    return Control(tell, told)


def _raise(mistake: UserError | None) -> None:
    if mistake is not None:
        raise mistake


def _read_settings(argv: Sequence[str] | None) -> tuple[Settings, UserError | None]:
    """The settings, or the defaults and what is wrong with them: all ranks meet before any says."""
    quiet = (
        contextlib.nullcontext()
        if is_first_process()
        else contextlib.redirect_stdout(io.StringIO())
    )
    with quiet:  # --help is printed once
        try:
            return Settings.load(argv, read_config), None
        except UserError as error:
            return Settings(), error


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: threads that still wait for a store or a socket must not be in the interpreter's way.
    os._exit(code)
