"""What all file formats have in common: the target, a rank's part of it, and how it gets its name.

A rank's part is a few files beside the target, hidden by a dot and marked with the token of this
one writing:

    .lake.tif.5f3a09c1.part-0003-1      rank 3's rows of level 1
    .lake.tif.5f3a09c1.tmp              what `assemble` makes of all parts
    lake.tif                            the name that it gets last, once it is safely on disk

So a reader sees the old file or the whole new one, and a job that writes the same target does not
take parts of a job that was killed, or that has not noticed yet that it was, for its own.
"""

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np

from engine.config import FileSettings

Metadata = Mapping[str, Any]
"""what a file keeps about its picture, JSON-able: texts by keyword, or objects made of such"""

Size = tuple[int, int]
"""height, width in pixels"""


@dataclass(frozen=True)
class Target:
    """The file to be written, as all ranks know it.

    Attributes:
        sample: numpy's name for the type of one number in [h, W, 3]: uint8, uint16 or float16.
        token: of this one writing, the same on every rank.
    """

    path: Path
    height: int
    width: int
    sample: str = "uint8"
    file: FileSettings = field(default_factory=FileSettings)
    token: str = "00000000"

    @property
    def raw_bytes(self) -> int:
        """Of all its numbers."""
        return 3 * self.height * self.width * self.bits // 8

    @property
    def bits(self) -> int:
        """Of a number."""
        return 8 * np.dtype(self.sample).itemsize

    def level_size(self, level: int) -> Size:
        """Of a picture halved `level` times, each time rounded up."""
        return -(-self.height >> level), -(-self.width >> level)

    def beside(self, name: str) -> Path:
        """A hidden name in the target's folder that belongs to this writing alone."""
        return self.path.with_name(f".{self.path.name}.{self.token}.{name}")


def leftovers(path: Path) -> list[Path]:
    """What writings of `path` have left that did not come to their end."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.(part-.+|tmp|tiles|old.*|new.*)")
    return sorted(file for file in path.parent.glob(".*") if ours.fullmatch(file.name))


def text_of(value: Any) -> str:
    """Metadata for formats that keep texts: what is none becomes JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def object_of(text: str | bytes) -> dict[str, Any]:
    """Metadata of formats that keep one text. Raises ValueError where it is no JSON object."""
    found = json.loads(text or "{}")
    if not isinstance(found, dict):
        raise ValueError(f"{found!r:.40} is no JSON object")
    return found


def remove(path: Path) -> None:
    """A file or a folder; harmless where there is none, or where another process is quicker."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Part:
    """What `assemble` must know of a rank's finished part. Small and picklable.

    Attributes:
        rows: that the rank has written of each level; levels of which it has none are left out.
        files: that hold them, by level.
        facts: what else the format needs, by level.
    """

    rows: dict[int, range]
    files: dict[int, Path]
    facts: dict[int, Any]


class BandWriter(ABC):
    """One rank's rows on their way into a file; `engine.output` shows the life cycle.

    A format says what it is in class variables, and encodes in `_encode` and `assemble`.

    Class variables:
        suffixes: of the names that choose it.
        samples: the type of a number for each number of bits that it can write.
        heeds: the names in `FileSettings` that change what it does, besides `bits`.
        row_multiple: rows are written in blocks that begin on a multiple of that many rows.
        longest_side: in pixels, where the format has a limit.
        usual_share: of its raw numbers that a picture takes, by number of bits.
        held_share: of its raw numbers that `assemble` holds in memory.
        needs: a package that is not always installed, and the extra that installs it.
    """

    suffixes: ClassVar[tuple[str, ...]]
    samples: ClassVar[Mapping[int, str]] = {8: "uint8"}
    heeds: ClassVar[frozenset[str]] = frozenset()
    row_multiple: ClassVar[int] = 1
    longest_side: ClassVar[int | None] = None
    usual_share: ClassVar[Mapping[int, float]]
    held_share: ClassVar[float] = 0.0
    needs: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def levels(cls, target: Target) -> int:
        """How many times the picture is written, each time halved once more."""
        return 1

    @classmethod
    def disk_bytes(cls, target: Target, ranks: int) -> float:
        """That writing usually takes at its worst: the file, and the part that is being copied."""
        return cls.usual_share[target.bits] * target.raw_bytes * (1 + 1 / ranks)

    def __init__(self, target: Target, index: int) -> None:
        """Begins the part of rank `index`."""
        self.target = target
        self.index = index
        self._rows: dict[int, range] = {}
        self._files: dict[int, BinaryIO] = {}
        self._facts: dict[int, Any] = {}
        self._closed = False

    def write(self, rows: range, pixels: np.ndarray, level: int = 0) -> None:
        """Encodes the next rows of a level, from top to bottom, any number of times.

        Args:
            rows: of the picture halved `level` times, beginning on a multiple of `row_multiple`,
                and ending on one or with the picture.
            pixels: [len(rows), its width, 3] in the target's type of numbers.

        Raises:
            ValueError: they are not what comes next, or of another shape or type.
            OSError: of the file system.
        """
        self._check(rows, pixels, level)
        if rows:
            before = self._rows.get(level, range(rows.start, rows.start))
            self._encode(rows, pixels, level)
            self._rows[level] = range(before.start, rows.stop)

    def _check(self, rows: range, pixels: np.ndarray, level: int) -> None:
        height, width = self.target.level_size(level)
        if pixels.dtype != self.target.sample or pixels.shape != (len(rows), width, 3):
            raise ValueError(
                f"{rows} must be {self.target.sample} [{len(rows)}, {width}, 3], not "
                f"{pixels.dtype} {list(pixels.shape)}"
            )
        if not 0 <= rows.start <= rows.stop <= height or level >= self.levels(self.target):
            raise ValueError(f"{rows} are no rows of level {level}, which has {height}")
        multiple = self.row_multiple
        if rows and (rows.start % multiple or (rows.stop % multiple and rows.stop != height)):
            raise ValueError(f"{rows} do not begin and end on multiples of {multiple} rows")
        before = self._rows.get(level)
        if rows and before is not None and before.stop != rows.start:
            raise ValueError(f"{rows} do not follow {before}")

    @abstractmethod
    def _encode(self, rows: range, pixels: np.ndarray, level: int) -> None:
        """As `write`, whose arguments are in order."""

    def _file(self, level: int) -> BinaryIO:
        """This rank's file for a level, opened when first asked for."""
        if level not in self._files:
            # Never one that is there: it would be another process's.
            self._files[level] = self._path(level).open("xb")
        return self._files[level]

    def _path(self, level: int | str) -> Path:
        return self.target.beside(f"part-{self.index:04d}-{level}")

    def close(self) -> Part:
        """Ends the part, and tells what `assemble` has to know of it."""
        for file in self._files.values():
            file.close()
        self._closed = True
        files = {level: self._path(level) for level in self._files}
        return Part(dict(self._rows), files, dict(self._facts))

    def abort(self) -> None:
        """Removes the part; harmless after `close`, after `assemble`, and when called again."""
        for level, file in self._files.items():
            with suppress(OSError):  # on a full disk closing fails too
                file.close()
            remove(self._path(level))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Without `close`, or where something failed after it, nothing stays."""
        if kind is not None or not self._closed:
            self.abort()

    @classmethod
    @abstractmethod
    def assemble(cls, target: Target, parts: Sequence[Part], metadata: Metadata) -> None:
        """Makes the file of all parts, in any order, and removes them, also upon failure.

        Raises:
            ValueError: some level has gaps, or rows that two parts have.
            OSError: of the file system.
        """

    @classmethod
    def restore(cls, path: Path) -> bool:
        """Puts an old picture back that a job moved away, and then was killed; tells if it did."""
        return False

    @classmethod
    def in_the_way(cls, path: Path) -> Path | None:
        """What of the names that the picture takes besides its own belongs to somebody else."""
        return None

    @classmethod
    @abstractmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        """What `assemble` was given, or as much of it as is there; texts may stand for objects.

        Raises:
            ValueError: it is no file of this format.
            OSError: of the file system.
        """


def in_order(target: Target, parts: Sequence[Part], level: int = 0) -> list[Part]:
    """The parts that have rows of a level, from top to bottom.

    Raises:
        ValueError: they have not all of its rows, or some twice.
    """
    found = sorted(
        (part for part in parts if level in part.rows), key=lambda p: p.rows[level].start
    )
    rows = [part.rows[level] for part in found]
    height, _ = target.level_size(level)
    ends = [0, *(run.stop for run in rows)]
    if [run.start for run in rows] != ends[:-1] or ends[-1] != height:
        raise ValueError(f"the parts leave gaps or overlap: {rows} are not {range(height)}")
    return found


@contextmanager
def removing(parts: Sequence[Part]) -> Iterator[None]:
    """Whatever happens inside, no file of the parts stays."""
    try:
        yield
    finally:
        for part in parts:
            for file in part.files.values():
                remove(file)


@contextmanager
def published(target: Target) -> Iterator[BinaryIO]:
    """A new file that gets the target's name once it is whole and on disk.

    Upon failure it is removed, and what had the name before still has it.
    """
    temporary = target.beside("tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target.path)
        sync_folder(target.path.parent)
    finally:
        remove(temporary)


def sync_folder(folder: Path) -> None:
    """The names in a folder, on disk: without it a rename may be lost with the power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_part(part: Part, level: int, to: BinaryIO) -> None:
    """Append a part's file and remove it, so that the disk need not hold the picture twice."""
    with part.files[level].open("rb") as source:
        shutil.copyfileobj(source, to, 1 << 20)
    remove(part.files[level])


def blocks(rows: range, most: int) -> Iterator[range]:
    """`rows`, at most that many at a time."""
    edges = [*range(rows.start, rows.stop, most), rows.stop]
    yield from (range(start, stop) for start, stop in pairwise(edges))
