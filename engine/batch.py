"""All pictures of a job, by one group of ranks or several side by side, and a report at the end.

    team = mesh.side_by_side(3)
    report = paint_all(rows, mesh, team, control)
    report.code, str(report)

Each group takes the next row that nobody has taken, so a group that has drawn large pictures does
not hold up the others. Groups come to their ends at different times, and a collective would only
wait so long: what has become of each picture goes to a board that all can see.

    group 0    row 1   row 4       row 5      |  wait until all have left
    group 1    row 2           row 6          |
    group 2    row 3                 row 7    |
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from engine.bands import Mesh
from engine.bands.store import open_store
from engine.config import UserError
from engine.exits import DONE, FAILED, MISTAKEN, STOPPED
from engine.jobs import Row
from engine.keeper import Control
from engine.painter import Outcome, Painter
from engine.pipeline import LOADING
from engine.progress import Progress

_POLL_S = 0.2
_ANSWER_S = 60.0

Hear = Callable[[Row, Outcome], object]


@dataclass(frozen=True)
class Report:
    """What became of the rows of a job; those that it did not come to have no outcome."""

    rows: Sequence[Row]
    outcomes: Sequence[Outcome | None]

    @property
    def code(self) -> int:
        """The job's exit code: what is worth another try is said before what is not."""
        words = {"stopped" if outcome is None else outcome.word for outcome in self.outcomes}
        codes = {"stopped": STOPPED, "failed": FAILED, "mistake": MISTAKEN}
        return next((code for word, code in codes.items() if word in words), DONE)

    def __str__(self) -> str:
        words: list[str] = [outcome.word for outcome in self.outcomes if outcome]
        bad = ("mistake", "failed")
        done, failed = (sum(map(words.count, some)) for some in (("done", "finished"), bad))
        line = f"{done} of {len(self.rows)} pictures are done"
        if before := words.count("finished"):
            line += f", {before} of them before"
        if left := len(self.rows) - done - failed:
            line += f"; stopped as told, {left} are left"
        lines = [
            f"{row}: {outcome.said}"
            for row, outcome in zip(self.rows, self.outcomes, strict=True)
            if outcome and outcome.word in bad
        ]
        return "\n  ".join([line, *lines])


def paint_all(
    rows: Sequence[Row],
    mesh: Mesh,
    team: Mesh,
    control: Control,
    hear: Hear = lambda row, outcome: None,
    wait: Callable[[], object] = lambda: None,
) -> Report:
    """Paint every row; the same report on every rank. Every rank makes the call.

    Args:
        rows: of which some may be mistakes.
        team: the group of ranks that this one is in, and that paints pictures of its own.
        hear: is called by the first rank of a group after each of its pictures.
        wait: is called now and then while this rank waits for other groups.
    """
    board = _Board(mesh, len(rows))
    painter = Painter(team, replace(control, tell=board.counted(control.tell)))
    order = _by_model(rows)
    while not team.any(control.should_stop()):
        turn = team.gather_objects(board.take() if team.rank == 0 else None)[0]
        if turn is None:
            break
        row = rows[order[turn]]
        outcome = _paint(painter, row)
        if team.rank == 0:
            board.post(order[turn], outcome)
            hear(row, outcome)
        if outcome.word == "stopped":
            break
    board.leave()
    while not board.is_deserted:
        wait()
        time.sleep(_POLL_S)
    return Report(rows, mesh.gather_objects(board.read() if mesh.rank == 0 else [])[0])


def _paint(painter: Painter, row: Row) -> Outcome:
    if isinstance(row.settings, UserError):
        return Outcome("mistake", str(row.settings))
    return painter.paint(row.settings)


def _by_model(rows: Sequence[Row]) -> list[int]:
    """Positions of the rows, those of one model together, so that it is loaded once.

    Mistakes come first, so that they are heard of first.
    """
    seen: dict[str, int] = {}

    def place(position: int) -> int:
        settings = rows[position].settings
        if isinstance(settings, UserError):
            return -1
        key = str([getattr(settings, name) for name in (*LOADING, "dtype")])
        return seen.setdefault(key, len(seen))

    return sorted(range(len(rows)), key=place)


class _Board:
    """What the groups let each other know: who takes which row, what became of it, who has left."""

    def __init__(self, mesh: Mesh, count: int) -> None:
        self._store, self._size, self._count = open_store(mesh, _ANSWER_S), mesh.size, count

    def take(self) -> int | None:
        """The next turn that nobody has taken, from 0; None once all are."""
        turn: int = self._store.add("taken", 1) - 1
        return turn if turn < self._count else None

    def post(self, position: int, outcome: Outcome) -> None:
        self._store.set(f"outcome/{position}", json.dumps(asdict(outcome)))
        self._store.add("posted", 1)

    def counted(self, tell: Callable[[Progress], object]) -> Callable[[Progress], object]:
        """`tell`, which is told as well how many pictures of the job are behind."""

        def listen(progress: Progress) -> None:
            behind = self._store.add("posted", 0)
            tell(replace(progress, finished=behind, pictures=self._count))

        return listen

    def leave(self) -> None:
        self._store.add("left", 1)

    @property
    def is_deserted(self) -> bool:
        """Whether all ranks have left."""
        left: int = self._store.add("left", 0)
        return left == self._size

    def read(self) -> list[Outcome | None]:
        """What became of each row."""
        keys = [f"outcome/{position}" for position in range(self._count)]
        return [
            Outcome(**json.loads(self._store.get(key))) if self._store.check([key]) else None
            for key in keys
        ]
