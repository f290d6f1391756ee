"""Paint one picture from a sentence, on as many ranks as the launcher started.

    torchrun --nproc_per_node 8 -m engine.generate --prompt "a lake at dawn" --output lake.png
    python -m engine.generate --config configs/demo.yaml --seed 7
    python -m engine.generate --config outputs/demo.png
    torchrun --nproc_per_node 8 -m engine.generate --config configs/sdxl_16k.yaml --plan

Every setting is a flag and a key of the YAML file (`--help` lists them; `engine.config` has them).
A user's mistake is one sentence on rank 0 and exit code 2 on every rank.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.bands import Mesh, is_first_process, open_mesh
from engine.config import Settings, UserError
from engine.provenance import read_config

if TYPE_CHECKING:
    from engine.pipeline import Picture
    from engine.plan import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    settings, mistake = _read_settings(argv)
    with open_mesh(settings.timeout_s) as mesh:
        try:
            mesh.agree(lambda: _raise(mistake))
            done = _paint(settings, mesh)
        except UserError as error:
            if mesh.rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            # torchrun ends all ranks as soon as one has exited: first let rank 0 have its say.
            mesh.barrier()
            return 2
        if mesh.rank == 0:
            print(done, flush=True)
    return 0


def _paint(settings: Settings, mesh: Mesh) -> "Picture | Plan":
    """The picture, or with `--plan` what it would take."""
    # diffusers and transformers take seconds to import; a mistyped flag should not wait for them.
    import diffusers.utils.logging
    import transformers.utils.logging

    # Their warnings and loading bars, once: rank 0 speaks for all.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    if mesh.rank == 0:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("engine").setLevel(logging.INFO)
    else:
        diffusers.utils.logging.set_verbosity_error()

    from engine.pipeline import Engine, plan_job

    if settings.plan:
        plan = plan_job(settings, mesh)
        if plan.refusal and mesh.rank == 0:
            print(plan, flush=True)
        plan.check()
        return plan
    return Engine.load(settings, mesh).generate(settings)


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
    sys.exit(main())
