"""OpenEXR in half precision, compressed by all ranks at once: linear light, for compositing.

A scan line file is a header, a table of the positions of its chunks, and the chunks, each of which
says what rows it holds (OpenEXR file layout, "Scan Line Images"). So each rank has the library
write files of some rows of the picture, the chunks are put one behind the other, and the header
gets the whole picture's window and a new table.

Numbers are linear light, 0 to 1, as EXR's readers take them to be (`engine.codec.to_samples`).
"""

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from engine.output.writer import (
    BandWriter,
    Metadata,
    Part,
    Size,
    Target,
    blocks,
    copy_part,
    in_order,
    published,
    remove,
    removing,
    text_of,
)

_MAGIC = b"v/1\x01"
_LINES = {"zip": 16, "piz": 32}
"""rows of a chunk"""
_SLAB_BYTES = 16 << 20  # given to the library at a time

Attributes = dict[bytes, tuple[bytes, bytes]]
"""type and value by name"""


class ExrWriter(BandWriter):
    """A rank's chunks; the facts are their sizes in bytes, and the header of a file of them."""

    suffixes: ClassVar[tuple[str, ...]] = (".exr",)
    samples: ClassVar[Mapping[int, str]] = {16: "float16"}
    heeds: ClassVar[frozenset[str]] = frozenset({"compression"})
    row_multiple = max(_LINES.values())
    longest_side = 2**31 - 1
    usual_share: ClassVar[Mapping[int, float]] = {16: 0.7}
    needs = ("OpenEXR", "exr")

    def _encode(self, rows: range, pixels: np.ndarray, level: int) -> None:
        slab_rows = max(1, _SLAB_BYTES // pixels[0].nbytes // self.row_multiple) * self.row_multiple
        _, sizes = self._facts.setdefault(level, ({}, []))
        for block in blocks(rows, slab_rows):
            slab = pixels[block.start - rows.start : block.stop - rows.start]
            data = self._slab(block, slab)
            attributes, start = _read_header(data)
            self._facts[level] = attributes, sizes
            count = -(-len(block) // _LINES[self.target.file.compression])
            chunks = memoryview(data)[start + 8 * count :]
            sizes += _chunk_sizes(chunks)
            self._file(level).write(chunks)

    def _slab(self, rows: range, pixels: np.ndarray) -> bytes:
        """A file of some rows of the picture, by way of the disk: the library knows no other."""
        import OpenEXR

        piz = self.target.file.compression == "piz"
        header = {
            "compression": OpenEXR.PIZ_COMPRESSION if piz else OpenEXR.ZIP_COMPRESSION,
            "type": OpenEXR.scanlineimage,
            "dataWindow": ((0, rows.start), (self.target.width - 1, rows.stop - 1)),
        }
        path = self._path("slab")
        try:
            OpenEXR.File(header, {"RGB": np.ascontiguousarray(pixels)}).write(str(path))
            return path.read_bytes()
        except RuntimeError as error:  # the library's word for a full disk
            raise OSError(None, str(error).splitlines()[0]) from error
        finally:
            remove(path)

    @classmethod
    def assemble(cls, target: Target, parts: Sequence[Part], metadata: Metadata) -> None:
        """Metadata become attributes of the type string."""
        with removing(parts):
            stacked = in_order(target, parts)
            attributes, _ = stacked[0].facts[0]
            header = _header(attributes, (target.height, target.width), metadata)
            sizes = [size for part in stacked for size in part.facts[0][1]]
            first = len(header) + 8 * len(sizes)
            offsets = first + np.cumsum([0, *sizes[:-1]], dtype=np.uint64)
            with published(target) as file:
                file.write(header + offsets.astype("<u8").tobytes())
                for part in stacked:
                    copy_part(part, 0, file)

    @classmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ValueError("not an OpenEXR file")
            file.seek(8)
            return {
                name.decode("latin-1"): value.decode(errors="replace")
                for name, (kind, value) in _attributes(file)
                if kind == b"string"
            }


def _header(attributes: Attributes, size: Size, metadata: Metadata) -> bytes:
    """Magic number, version 2, and the attributes of the whole picture's file."""
    height, width = size
    window = b"box2i", struct.pack("<4i", 0, 0, width - 1, height - 1)
    own = {b"dataWindow": window, b"displayWindow": window}
    for name, value in metadata.items():
        own[name.encode()] = b"string", text_of(value).encode(errors="replace")
    lines = [
        name + b"\0" + kind + b"\0" + struct.pack("<i", len(value)) + value
        for name, (kind, value) in (attributes | own).items()
    ]
    return _MAGIC + struct.pack("<i", 2) + b"".join(lines) + b"\0"


def _read_header(data: bytes) -> tuple[Attributes, int]:
    """The attributes, and where the table of chunks begins."""
    file = io.BytesIO(data)
    file.seek(8)  # magic number and version
    return dict(_attributes(file)), file.tell()


def _attributes(file: BinaryIO) -> Iterator[tuple[bytes, tuple[bytes, bytes]]]:
    while name := _word(file):
        kind = _word(file)
        yield name, (kind, file.read(int.from_bytes(file.read(4), "little")))


def _word(file: BinaryIO) -> bytes:
    """Up to a zero byte."""
    word = bytearray()
    while (byte := file.read(1)) not in (b"\0", b""):
        word += byte
    return bytes(word)


def _chunk_sizes(chunks: memoryview) -> list[int]:
    """Bytes of each chunk: its first row, the size of what follows, and that."""
    sizes, at = [], 0
    while at < len(chunks):
        sizes.append(8 + int.from_bytes(chunks[at + 4 : at + 8], "little"))
        at += sizes[-1]
    return sizes
