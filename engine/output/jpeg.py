"""JPEG, encoded by all ranks at once.

A restart marker behind each row of 8 x 8 blocks makes what follows independent of what was before
(ITU T.81, section E.1.4), and the markers count from 0 to 7 over and over. So pictures of 64 rows
each, encoded by themselves with the same tables, have the markers 0 to 6 in them; put one behind
the other with a marker 7 in between, they are one picture. Colour is not sub-sampled: a block is 8
rows high, and edges of saturated colour stay sharp.
"""

import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from PIL import Image

from engine.output.writer import (
    BandWriter,
    Metadata,
    Part,
    Target,
    blocks,
    copy_part,
    in_order,
    object_of,
    published,
    removing,
)

_ROWS = 64
_START, _END, _RESTART_7 = b"\xff\xd8", b"\xff\xd9", b"\xff\xd7"
_FRAME, _SCAN, _COMMENT = b"\xff\xc0", b"\xff\xda", b"\xff\xfe"
_MOST_COMMENT_BYTES = 65533  # of one segment; a longer text goes on in the next


class JpegWriter(BandWriter):
    """A rank's rows as entropy-coded data; its facts are the headers that go before."""

    suffixes: ClassVar[tuple[str, ...]] = (".jpg", ".jpeg")
    heeds: ClassVar[frozenset[str]] = frozenset({"quality"})
    row_multiple = _ROWS
    longest_side = 65500  # libjpeg's limit, a little below that of the format's 16 bits
    usual_share: ClassVar[Mapping[int, float]] = {8: 0.2}

    def _encode(self, rows: range, pixels: np.ndarray, level: int) -> None:
        file, quality = self._file(level), self.target.file.quality
        for block in blocks(rows, _ROWS):
            strip = pixels[block.start - rows.start : block.stop - rows.start]
            data = encode(strip, quality, restart_marker_rows=1)
            headers = io.BytesIO(data[2:])
            for _ in _segments(headers):
                pass
            begin = 2 + headers.tell()
            self._facts.setdefault(level, data[:begin])
            file.write(data[begin:-2])
            file.write(_END if block.stop == self.target.height else _RESTART_7)

    @classmethod
    def assemble(cls, target: Target, parts: Sequence[Part], metadata: Metadata) -> None:
        """Metadata become a comment, in JSON."""
        with removing(parts):
            stacked = in_order(target, parts)
            with published(target) as file:
                file.write(_head(stacked[0].facts[0], target.height, json.dumps(metadata)))
                for part in stacked:
                    copy_part(part, 0, file)

    @classmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            if file.read(2) != _START:
                raise ValueError("not a JPEG file")
            texts = [data for kind, data in _segments(file) if kind == _COMMENT]
        return object_of(b"".join(texts))


def encode(pixels: np.ndarray, quality: int, **options: Any) -> bytes:
    """A JPEG file of [h, W, 3] in uint8, its colours not sub-sampled, with the standard tables."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality, subsampling=0, **options)
    return file.getvalue()


def _head(headers: bytes, height: int, text: str) -> bytes:
    """A strip's headers with the height of the whole picture, and a comment."""
    head = _START
    for kind, data in _segments(io.BytesIO(headers[2:])):
        if kind == _FRAME:  # begins with the precision, the height, the width
            head += b"".join(_comments(text.encode()))
            data = data[:1] + struct.pack(">H", height) + data[3:]
        head += _segment(kind, data)
    return head


def _comments(text: bytes) -> Iterator[bytes]:
    for start in range(0, len(text), _MOST_COMMENT_BYTES):
        yield _segment(_COMMENT, text[start : start + _MOST_COMMENT_BYTES])


def _segment(kind: bytes, data: bytes) -> bytes:
    """Marker, length including itself, data (ITU T.81, section B.1.1.4)."""
    return kind + struct.pack(">H", 2 + len(data)) + data


def _segments(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Markers and data of all headers behind the start of the image."""
    kind = b""
    while kind != _SCAN and len(kind := file.read(2)) == 2:
        yield kind, file.read(int.from_bytes(file.read(2)) - 2)
