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

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from engine.output import deflate
from engine.output.writer import (
    BandWriter,
    Metadata,
    Part,
    Target,
    blocks,
    copy_part,
    in_order,
    published,
    removing,
    text_of,
)

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ZLIB_HEADER = b"\x78\x01"  # deflate with a 32 KiB window, fastest level (RFC 1950, section 2.2)
_RGB = 2  # colour type
_SUB = 1  # filter type
_BLOCK_BYTES = 1 << 20  # of raw rows, filtered and deflated at a time: bounds the memory


class PngWriter(BandWriter):
    """A rank's rows as IDAT chunks; its facts are their Adler-32 and how many bytes that covers."""

    suffixes: ClassVar[tuple[str, ...]] = (".png",)
    samples: ClassVar[Mapping[int, str]] = {8: "uint8", 16: "uint16"}
    usual_share: ClassVar[Mapping[int, float]] = {8: 0.6, 16: 0.9}
    longest_side = 2**31 - 1

    def __init__(self, target: Target, index: int) -> None:
        super().__init__(target, index)
        self._deflate = deflate.raw_stream()
        self._facts = {0: (1, 0)}  # 1 is the Adler-32 of nothing

    def _encode(self, rows: range, pixels: np.ndarray, level: int) -> None:
        adler32, raw_bytes = self._facts[level]
        for block in blocks(range(len(rows)), max(1, _BLOCK_BYTES // max(1, pixels[0].nbytes))):
            filtered = sub_filter(pixels[block.start : block.stop]).data
            adler32 = zlib.adler32(filtered, adler32)
            raw_bytes += filtered.nbytes
            self._write_idat(self._deflate.compress(filtered))
        self._facts[level] = adler32, raw_bytes

    def _write_idat(self, deflated: bytes) -> None:
        if deflated:
            self._file(0).write(chunk(b"IDAT", deflated))

    def close(self) -> Part:
        if rows := self._rows.get(0):  # a part without rows stays without bytes
            # Only the picture's last block is marked final. The other parts end in an empty stored
            # block, which fills up the last byte: the next part starts on a byte of its own.
            is_last = rows.stop == self.target.height
            self._write_idat(self._deflate.flush(zlib.Z_FINISH if is_last else zlib.Z_FULL_FLUSH))
        return super().close()

    @classmethod
    def assemble(cls, target: Target, parts: Sequence[Part], metadata: Metadata) -> None:
        """Metadata become iTXt chunks; PNG has customary keywords such as Title and Comment."""
        with removing(parts):
            stacked = in_order(target, parts)
            with published(target) as file:
                file.write(_head(target, metadata))
                for part in stacked:
                    copy_part(part, 0, file)
                file.write(_tail(stacked))

    @classmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            return dict(_texts(file))


def _head(target: Target, metadata: Metadata) -> bytes:
    size = target.width, target.height
    header = struct.pack(">IIBBBBB", *size, target.bits, _RGB, 0, 0, 0)
    texts = b"".join(text_chunk(keyword, value) for keyword, value in metadata.items())
    return _SIGNATURE + chunk(b"IHDR", header) + texts + chunk(b"IDAT", _ZLIB_HEADER)


def _tail(parts: Sequence[Part]) -> bytes:
    sums: Iterator[tuple[int, int]] = (part.facts[0] for part in parts)
    adler32, _ = reduce(lambda a, b: (deflate.adler32_combine(a[0], *b), a[1] + b[1]), sums)
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


def text_chunk(keyword: str, value: Any) -> bytes:
    """An uncompressed iTXt chunk: text in any script, as UTF-8 (PNG, section 11.3.3.4).

    What is no text becomes JSON.

    The text may not contain zero bytes; they and lone surrogates are replaced rather than refused,
    since this runs when the picture has already been painted.
    """
    key = keyword.encode("latin-1")
    if not 1 <= len(key) <= 79 or b"\0" in key:
        raise ValueError(f"{keyword!r} is no PNG keyword of 1 to 79 Latin-1 characters")
    body = text_of(value).replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")
    # After the keyword: not compressed (0, method 0), no language tag, no translated keyword.
    return chunk(b"iTXt", key + b"\0\0\0\0\0" + body)


def _texts(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Keywords and texts of the iTXt chunks before the pixels."""
    if file.read(8) != _SIGNATURE:
        raise ValueError("not a PNG file")
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        data = file.read(int.from_bytes(head[:4]))
        file.read(4)  # the CRC
        if head[4:] == b"iTXt":
            key, _, rest = data.partition(b"\0")
            yield key.decode("latin-1"), rest[4:].decode(errors="replace")
