"""WebP, which can only be encoded whole: the one format for which a process holds the picture.

The others send it their rows through part files. Its longest side is 16383 px, and at that size
the encoder takes 2.7 GB on top of the picture's 0.8 GB.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import ExifTags, Image

from engine.output.writer import (
    BandWriter,
    Metadata,
    Part,
    Target,
    in_order,
    object_of,
    published,
    remove,
    removing,
)


class WebpWriter(BandWriter):
    """A rank's rows as they are."""

    suffixes: ClassVar[tuple[str, ...]] = (".webp",)
    heeds: ClassVar[frozenset[str]] = frozenset({"quality"})
    longest_side = 16383
    usual_share: ClassVar[Mapping[int, float]] = {8: 0.1}
    held_share = 4.3  # measured at 4096 and 8192 px

    @classmethod
    def disk_bytes(cls, target: Target, ranks: int) -> float:
        return (1 + cls.usual_share[8]) * target.raw_bytes

    def _encode(self, rows: range, pixels: np.ndarray, level: int) -> None:
        self._file(level).write(np.ascontiguousarray(pixels).data)

    @classmethod
    def assemble(cls, target: Target, parts: Sequence[Part], metadata: Metadata) -> None:
        """Metadata become the Exif image description, in JSON."""
        with removing(parts):
            pixels = np.empty((target.height, target.width, 3), np.uint8)
            for part in in_order(target, parts):
                rows = part.rows[0]
                with part.files[0].open("rb") as source:
                    read = source.readinto(pixels[rows.start : rows.stop].data)
                if read != len(rows) * target.width * 3:
                    raise OSError(None, f"{part.files[0]} has lost some of its rows")
                remove(part.files[0])
            exif = Image.Exif()
            exif[ExifTags.Base.ImageDescription] = json.dumps(metadata)
            with published(target) as file:
                Image.fromarray(pixels).save(file, "webp", quality=target.file.quality, exif=exif)

    @classmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        exif = Image.Exif()
        exif.load(_chunk(path, b"EXIF"))
        return object_of(exif.get(ExifTags.Base.ImageDescription, ""))


def _chunk(path: Path, wanted: bytes) -> bytes:
    """The data of a chunk of a RIFF file; empty where there is none."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WEBP":
            raise ValueError("not a WebP file")
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == wanted:
                return file.read(size)
            file.seek(size + size % 2, io.SEEK_CUR)
    return b""
