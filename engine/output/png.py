"""PNG, deflated by all ranks at once.

Two properties of the format make it possible. The Sub filter predicts a pixel from its left
neighbour only (PNG specification, section 9.2), so a row needs no row of another rank. And a
deflate stream (RFC 1951) is a chain of blocks, which a full flush ends at a byte boundary, so that
streams which were compressed apart can be put one behind the other. What is left to do centrally
is the zlib wrapping (RFC 1950): two bytes in front, and behind everything its checksum, which can
be combined from the checksums of the parts.

    signature IHDR iTXt... IDAT(zlib header)    IDAT... of part 0    IDAT... of part 1    ...
    IDAT(Adler-32) IEND

A part file consists of complete IDAT chunks, with their lengths and CRCs, so the parts are spliced
by copying bytes. Decoders join the IDAT data of all chunks before they look at it (section 11.2.3).
"""

import os
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ClassVar, Self

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ZLIB_HEADER = b"\x78\x01"  # deflate with a 32 KiB window, fastest level (RFC 1950, section 2.2)
_RGB = 2  # colour type
_SUB = 1  # filter type
_BLOCK_BYTES = 1 << 20  # of raw rows, filtered and deflated at a time: bounds the memory
_ADLER_PRIME = 65521


@dataclass(frozen=True)
class PngPart:
    """What `PngBand.assemble` must know of a finished part. Small and picklable."""

    path: Path
    height: int
    width: int
    rows: range
    bit_depth: int | None  # None for a part without rows
    adler32: int
    raw_bytes: int  # filtered rows before deflating, which the Adler-32 covers


class PngBand:
    """A rank's own rows as IDAT chunks in a part file; see `engine.output` for the life cycle."""

    suffixes: ClassVar[tuple[str, ...]] = (".png",)

    def __init__(self, path: Path, *, height: int, width: int, rows: range, index: int) -> None:
        if not (rows.step == 1 and 0 <= rows.start <= rows.stop <= height and width > 0):
            raise ValueError(f"{rows} are no rows of a {height} x {width} picture")
        self._height, self._width, self._rows = height, width, rows
        self._next_row = rows.start
        self._bit_depth: int | None = None
        self._adler32, self._raw_bytes = 1, 0  # 1 is the Adler-32 of nothing
        # Negative window bits: raw deflate, without the wrapping that assemble() adds once.
        self._deflate = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
        self._path = path.with_name(f".{path.name}.part-{index:04d}")
        self._file: BinaryIO = self._path.open("wb")

    def write(self, band: np.ndarray) -> None:
        """Filters and deflates the next rows, [h, W, 3] in uint8 or uint16."""
        self._check(band)
        self._bit_depth = band.dtype.itemsize * 8
        step = max(1, _BLOCK_BYTES // (self._width * 3 * band.dtype.itemsize))
        for top in range(0, len(band), step):
            filtered = sub_filter(band[top : top + step]).data
            self._adler32 = zlib.adler32(filtered, self._adler32)
            self._raw_bytes += filtered.nbytes
            self._write_idat(self._deflate.compress(filtered))
        self._next_row += len(band)

    def _check(self, band: np.ndarray) -> None:
        if band.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"a PNG takes uint8 or uint16 pixels, not {band.dtype}")
        if self._bit_depth not in (None, band.dtype.itemsize * 8):
            raise ValueError(f"{band.dtype} rows after rows of {self._bit_depth} bits")
        if band.ndim != 3 or band.shape[1:] != (self._width, 3):
            raise ValueError(f"rows must be [h, {self._width}, 3], not {list(band.shape)}")
        if self._next_row + len(band) > self._rows.stop:
            end = self._next_row + len(band)
            raise ValueError(f"rows up to {end} do not fit a part of {self._rows}")

    def _write_idat(self, deflated: bytes) -> None:
        if deflated:
            self._file.write(chunk(b"IDAT", deflated))

    def close(self) -> PngPart:
        """Ends the part's deflate blocks; ValueError if rows are missing."""
        if self._next_row != self._rows.stop:
            raise ValueError(f"rows {self._next_row} to {self._rows.stop} were never written")
        if self._rows:  # a part without rows stays without bytes
            # Only the picture's last block is marked final. The other parts end in an empty stored
            # block, which fills up the last byte: the next part starts on a byte of its own.
            is_last = self._rows.stop == self._height
            self._write_idat(self._deflate.flush(zlib.Z_FINISH if is_last else zlib.Z_FULL_FLUSH))
        self._file.close()
        size = self._height, self._width
        return PngPart(
            self._path, *size, self._rows, self._bit_depth, self._adler32, self._raw_bytes
        )

    def abort(self) -> None:
        """Removes the part file; harmless after `close` and when called again."""
        try:
            self._file.close()  # on a full disk this may fail again
        finally:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None or not self._file.closed:
            self.abort()

    @classmethod
    def assemble(cls, path: Path, parts: Sequence[PngPart], metadata: Mapping[str, str]) -> None:
        """Splices the parts, in any order, into the picture and removes them, also upon failure.

        The picture gets its name last, by an atomic rename of a file that is safely on disk.
        Metadata become iTXt chunks; PNG has customary keywords such as Title, Software, Comment.
        """
        parts = sorted(parts, key=lambda part: (part.rows.start, part.rows.stop))
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(_head(parts, metadata))
                for part in parts:
                    with part.path.open("rb") as source:
                        shutil.copyfileobj(source, file, _BLOCK_BYTES)
                    part.path.unlink()  # now, so that the disk need not hold the picture twice
                file.write(_tail(parts))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            for leftover in (temporary, *(part.path for part in parts)):
                leftover.unlink(missing_ok=True)


def _head(parts: Sequence[PngPart], metadata: Mapping[str, str]) -> bytes:
    height, width = parts[0].height, parts[0].width
    starts, stops = [part.rows.start for part in parts], [part.rows.stop for part in parts]
    if starts != [0, *stops[:-1]] or stops[-1] != height:
        raise ValueError(f"the parts leave gaps or overlap: they start at {starts}, end at {stops}")
    depths = {part.bit_depth for part in parts if part.bit_depth is not None}
    if len(depths) != 1 or {(part.height, part.width) for part in parts} != {(height, width)}:
        raise ValueError("the parts belong to pictures of different sizes or bit depths")
    header = struct.pack(">IIBBBBB", width, height, depths.pop(), _RGB, 0, 0, 0)
    texts = b"".join(text_chunk(keyword, text) for keyword, text in metadata.items())
    return _SIGNATURE + chunk(b"IHDR", header) + texts + chunk(b"IDAT", _ZLIB_HEADER)


def _tail(parts: Sequence[PngPart]) -> bytes:
    sums = ((part.adler32, part.raw_bytes) for part in parts)
    adler32, _ = reduce(lambda a, b: (adler32_combine(a[0], *b), a[1] + b[1]), sums)
    return chunk(b"IDAT", struct.pack(">I", adler32)) + chunk(b"IEND", b"")


def sub_filter(rows: np.ndarray) -> np.ndarray:
    """[h, W, 3] pixels as [h, 1 + W * bytes a pixel] filtered bytes (PNG, section 9.2).

    Each byte becomes its difference, modulo 256, to the byte one pixel to the left; 16-bit samples
    are big-endian and filtered byte by byte. The first byte of a row names the filter.
    """
    pixel_bytes = 3 * rows.dtype.itemsize
    raw = np.ascontiguousarray(rows, rows.dtype.newbyteorder(">")).view(np.uint8)
    raw = raw.reshape(len(rows), -1)
    filtered = np.empty((len(raw), 1 + raw.shape[1]), np.uint8)
    filtered[:, 0] = _SUB
    filtered[:, 1 : 1 + pixel_bytes] = raw[:, :pixel_bytes]
    np.subtract(raw[:, pixel_bytes:], raw[:, :-pixel_bytes], out=filtered[:, 1 + pixel_bytes :])
    return filtered


def chunk(kind: bytes, data: bytes) -> bytes:
    """Length, type, data, and the CRC of type and data (PNG, section 5.3)."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_chunk(keyword: str, text: str) -> bytes:
    """An uncompressed iTXt chunk: text in any script, as UTF-8 (PNG, section 11.3.3.4).

    The text may not contain zero bytes; they and lone surrogates are replaced rather than refused,
    since this runs when the picture has already been painted.
    """
    key = keyword.encode("latin-1")
    if not 1 <= len(key) <= 79 or b"\0" in key:
        raise ValueError(f"{keyword!r} is no PNG keyword of 1 to 79 Latin-1 characters")
    body = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")
    # After the keyword: not compressed (0, method 0), no language tag, no translated keyword.
    return chunk(b"iTXt", key + b"\0\0\0\0\0" + body)


def adler32_combine(first: int, second: int, second_bytes: int) -> int:
    """The Adler-32 of two byte strings put together, from their own ones (RFC 1950, section 8.2).

    For bytes d_1 ... d_n the checksum is b * 65536 + a, both modulo 65521, with

        a = 1 + d_1 + ... + d_n            b = a_1 + ... + a_n   (a after each byte)

    Behind a first string, each a of the second is larger by a_first - 1, thus

        a = a_first + a_second - 1         b = b_first + b_second + n_second * (a_first - 1)
    """
    a_first, b_first = first & 0xFFFF, first >> 16
    a_second, b_second = second & 0xFFFF, second >> 16
    a = (a_first + a_second - 1) % _ADLER_PRIME
    b = (b_first + b_second + second_bytes * (a_first - 1)) % _ADLER_PRIME
    return b << 16 | a
