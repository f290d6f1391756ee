"""Distil LinFusion's linear attention from a Stable Diffusion model, on as many ranks as there are.

    python -m engine.distill --config configs/distill_demo.yaml
    torchrun --nproc_per_node 8 -m engine.distill --config configs/distill_sdxl.yaml
    deepspeed --module engine.distill --backend.name deepspeed ...

Exit codes and what is said are as of `engine.generate`: 0 done, 2 a mistake, 3 a failure, 75 told
to stop and stopped, so that `--resume` goes on.
"""

from collections.abc import Callable, Sequence

from engine.bands import Mesh
from engine.config import UserError
from engine.distill.settings import DistillSettings
from engine.session import leave, quiet, run, said_once
from engine.signals import note_signals
from engine.watch import Watch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    settings, mistake = _read(argv)
    told = note_signals()

    def work(mesh: Mesh, watch: Watch) -> tuple[int, str]:
        quiet(mesh)
        return _distil(settings, mesh, watch, told)

    return run(settings.timeout_s, settings.stall_s, work, mistake)


def _distil(
    settings: DistillSettings, mesh: Mesh, watch: Watch, told: Callable[[], bool]
) -> tuple[int, str]:
    # diffusers and transformers take seconds to import: a mistyped flag should not wait.
    from engine.distill.progress import listener_of
    from engine.distill.trainer import Control, distil
    from engine.progress import silent

    speaks = mesh.rank == 0
    control = Control(
        tell=listener_of(settings.progress) if speaks else silent,
        doing=watch.doing,
        told_to_stop=told,
        say=(lambda line: print(line, flush=True)) if speaks else (lambda line: None),
    )
    return distil(settings, mesh, control)


def _read(argv: Sequence[str] | None) -> tuple[DistillSettings, UserError | None]:
    """The settings, or defaults and what is wrong: all ranks meet before any says."""
    with said_once():
        try:
            return DistillSettings.load(argv), None
        except UserError as error:
            return DistillSettings(), error


if __name__ == "__main__":
    leave(main())
