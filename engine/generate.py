"""Paint one picture from a sentence, on as many ranks as the launcher started.

    torchrun --nproc_per_node 8 -m engine.generate --prompt "a lake at dawn" --output lake.png
    python -m engine.generate --config configs/demo.yaml --seed 7

Every setting is a flag and a key of the YAML file (`--help` lists them; `engine.config` has them).
A user's mistake is one sentence on rank 0 and exit code 2 on every rank.
"""

import contextlib
import io
import sys
from collections.abc import Sequence

from engine.bands import is_first_process, open_mesh
from engine.config import Settings, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    settings, mistake = _read_settings(argv)
    with open_mesh(settings.timeout_s) as mesh:
        try:
            if mistake:
                raise mistake
            mesh = mesh.on_device(settings.device)
            # Only now: torch is needed for the mesh, but diffusers takes seconds to import.
            from engine.pipeline import Engine

            picture = Engine.load(settings, mesh).generate(settings)
        except UserError as error:
            if mesh.rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            # torchrun ends all ranks as soon as one has exited: first let rank 0 have its say.
            mesh.barrier()
            return 2
        if mesh.rank == 0:
            print(picture, flush=True)
    return 0


def _read_settings(argv: Sequence[str] | None) -> tuple[Settings, UserError | None]:
    """The settings, or the defaults and what is wrong with them: all ranks meet before any says."""
    quiet = (
        contextlib.nullcontext()
        if is_first_process()
        else contextlib.redirect_stdout(io.StringIO())
    )
    with quiet:  # --help is printed once
        try:
            return Settings.load(argv), None
        except UserError as error:
            return Settings(), error


if __name__ == "__main__":
    sys.exit(main())
