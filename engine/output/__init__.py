"""Finished bands go straight to the file: each rank encodes its own rows, nobody holds the picture.

A format is one class in one file of this folder, and one line in `WRITERS`. Its life cycle:

    check_destination(path)                        # one process, before hours of painting
    writer = writer_for(path)
    with writer(path, height=H, width=W, rows=range(a, b), index=rank) as part:   # every rank
        part.write(band)                           # uint8 or uint16 [h, W, 3], top to bottom,
        ...                                        # any number of times
        summary = part.close()                     # small and picklable: send it to one process
    writer.assemble(path, summaries, metadata)     # that process, once every part is closed

Nothing here communicates. A rank writes a part file beside the destination, `assemble` splices the
parts and gives the picture its name last: a reader sees the old file or the whole new one. What the
ranks share is therefore a folder, and part files with one writer each are safe on NFS and Lustre,
where several writers in one file are not.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from engine.config import UserError
from engine.output.png import PngBand


class BandWriter(Protocol):
    """One rank's rows on their way to the file; the module docstring shows the life cycle."""

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path, *, height: int, width: int, rows: range, index: int) -> None:
        """Opens the part file for these rows of an [height, width] picture; rows may be empty."""

    def write(self, band: np.ndarray) -> None:
        """Encodes the next rows, [h, width, 3] in uint8 or uint16."""

    def close(self) -> Any:
        """Ends the part and returns its summary; ValueError if rows are missing."""

    def abort(self) -> None:
        """Removes the part file. Leaving `with` without `close` does it too."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @classmethod
    def assemble(cls, path: Path, parts: Sequence[Any], metadata: Mapping[str, str]) -> None:
        """Splices all parts, in any order, into the picture, and removes them."""


WRITERS: dict[str, type[BandWriter]] = {
    **dict.fromkeys(PngBand.suffixes, PngBand),
}


def writer_for(path: Path) -> type[BandWriter]:
    """The writer for a file name, chosen by its suffix."""
    known = " or ".join(sorted(WRITERS))
    suffix = path.suffix.lower()
    if not suffix:
        raise UserError(f"{path}: the file name has no suffix to choose a format by; add {known}")
    if suffix not in WRITERS:
        raise UserError(f"{path}: no writer for {suffix} files; {known} would work")
    return WRITERS[suffix]


def check_destination(path: Path) -> None:
    """Creates the folder and writes into it for real, so that a mistake shows before painting."""
    writer_for(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # As long a name as any part will get: a file system may refuse that alone.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.part-"):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{path}: cannot be written ({reason}); give a name in a folder that you may write to"
        ) from None
