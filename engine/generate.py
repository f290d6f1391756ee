"""Paint a picture from a sentence, or many of them, on as many ranks as the launcher started.

    torchrun --nproc_per_node 8 -m engine.generate --prompt "a lake at dawn" --output lake.png
    python -m engine.generate --config configs/demo.yaml --seed 7
    python -m engine.generate --config outputs/demo.png
    torchrun --nproc_per_node 8 -m engine.generate --config configs/sdxl_16k.yaml --plan
    torchrun --nproc_per_node 8 -m engine.generate --pictures shots.csv --mesh.image 8

Every setting is a flag and a key of the YAML file (`--help` lists them; `engine.config` has them),
and `engine.jobs` says how a file asks for many pictures.

What happens is said on rank 0, in one sentence, and by the exit code of every rank:

    0     done
    2     a user's mistake
    3     a failure, such as a rank that is gone
    75    told to stop (SIGTERM, SIGINT), and stopped: `--resume` goes on

`torchrun` itself turns every code but 0 into 1; `python -m launch` keeps them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from engine.bands import Mesh
from engine.config import Settings, UserError
from engine.exits import DONE, STOPPED
from engine.jobs import Job, Row, read_job
from engine.progress import DIALECTS, Progress, ending, silent
from engine.provenance import read_config
from engine.session import leave, quiet, run, said_once
from engine.signals import note_signals
from engine.watch import Watch

if TYPE_CHECKING:
    from engine.keeper import Control
    from engine.painter import Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    job, mistake = _read_job(argv)
    told = note_signals()

    def work(mesh: Mesh, watch: Watch) -> tuple[int, str]:
        # As rank 0 has read it: a table that somebody is at may not be the same for all.
        asked = mesh.gather_objects(job if mesh.rank == 0 else None)[0]
        assert asked is not None
        if asked.settings.mesh.image > 1 and not asked.many:
            raise UserError(
                "mesh.image: goes with many pictures, and this job is one; leave it out"
            )
        # diffusers and transformers take seconds to import: a mistyped flag should not wait.
        quiet(mesh)
        if asked.settings.plan:
            return DONE, _plan(asked, mesh)
        return (_paint_all if asked.many else _paint)(asked, mesh, watch, told)

    return run(job.settings.timeout_s, job.settings.stall_s, work, mistake)


def _plan(job: Job, mesh: Mesh) -> str:
    """What the pictures would take, those of one kind once."""
    from engine.preflight import plan_job, planned

    team = mesh.side_by_side(job.settings.mesh.image)
    kinds: dict[Settings, list[Settings]] = {}
    for row in job.rows:
        if isinstance(settings := row.settings, Settings):
            kinds.setdefault(mesh.agree(partial(planned, settings)), []).append(settings)
    texts = []
    for alike in kinds.values():
        # Groups may be on hosts of which some have less: what one refuses, all do.
        plan = mesh.agree(partial(plan_job, alike[0], team))
        if plan.refusal and mesh.rank == 0:
            print(plan, flush=True)
        mesh.agree(plan.check)
        texts.append(f"{len(alike)} x\n{plan}" if job.many else str(plan))
    return "\n\n".join(texts)


def _paint(job: Job, mesh: Mesh, watch: Watch, told: Callable[[], bool]) -> tuple[int, str]:
    from engine.painter import Painter

    settings = job.settings
    painter = Painter(mesh, _control(settings, mesh.rank == 0, watch, told))
    outcome = painter.paint_or_raise(settings)
    return (STOPPED if outcome.word == "stopped" else DONE), outcome.said


def _paint_all(job: Job, mesh: Mesh, watch: Watch, told: Callable[[], bool]) -> tuple[int, str]:
    from engine.batch import paint_all

    settings = job.settings
    team = mesh.side_by_side(settings.mesh.image)
    # Lines of several groups can be told apart, bars and per cents of a whole job cannot.
    speaks = team.rank == 0 and (mesh.rank == 0 or settings.progress in ("plain", "json"))
    report = paint_all(
        job.rows,
        mesh,
        team,
        _control(settings, speaks, watch, told),
        hear=partial(_say_ending, settings.progress),
        wait=lambda: watch.doing("waiting for other groups of ranks"),
    )
    return report.code, str(report)


def _say_ending(dialect: str, row: Row, outcome: "Outcome") -> None:
    print(ending(dialect, row.index, outcome.word, outcome.said), flush=True)


def _control(settings: Settings, speaks: bool, watch: Watch, told: Callable[[], bool]) -> "Control":
    """A rank that speaks tells of progress; each rank's watch knows what it is doing."""
    from engine.keeper import Control

    dialect = "bars" if settings.progress == "auto" else settings.progress
    listener = DIALECTS[dialect]() if speaks else silent

    def tell(progress: Progress) -> None:
        watch.doing(str(progress))
        listener(progress)

    return Control(tell, told)


def _read_job(argv: Sequence[str] | None) -> tuple[Job, UserError | None]:
    """The job, or a default and what is wrong with it: all ranks meet before any says."""
    with said_once():
        try:
            return read_job(argv, read_config), None
        except UserError as error:
            return Job((Row(0, "", Settings()),), many=False), error


if __name__ == "__main__":
    leave(main())
