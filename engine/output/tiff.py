"""Tiled BigTIFF, whose tiles are deflated by the ranks that have their rows.

A tile is compressed by itself (TIFF 6.0, section 15), so ranks need nothing of each other. Before,
each sample becomes its difference to the one on its left (section 14), which a photograph's deflate
shrinks by a third. tifffile then writes the tags and, one after the other, the finished tiles.

With `file.pyramid` the picture's halves, quarters and so on follow as its SubIFDs, as libtiff,
libvips, OpenSlide and QuPath look for them. Bits are 8 or 16, the metadata is the description.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.output import deflate
from engine.output.pixels import tile_rows
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

_SIDE = 256
_HORIZONTAL_DIFFERENCE = 2
_REDUCED = 1  # NewSubfileType of a smaller copy


class TiffWriter(BandWriter):
    """A rank's tiles, compressed, one behind the other; the facts are their sizes in bytes."""

    suffixes: ClassVar[tuple[str, ...]] = (".tif", ".tiff")
    samples: ClassVar[Mapping[int, str]] = {8: "uint8", 16: "uint16"}
    heeds: ClassVar[frozenset[str]] = frozenset({"pyramid"})
    row_multiple = _SIDE
    longest_side = 2**31 - 1
    usual_share: ClassVar[Mapping[int, float]] = {8: 0.6, 16: 0.9}

    @classmethod
    def levels(cls, target: Target) -> int:
        """One, or down to where the picture is a single tile."""
        longest = max(target.height, target.width)
        smaller = (max(0, longest - 1) // _SIDE).bit_length() if target.file.pyramid else 0
        return 1 + smaller

    @classmethod
    def disk_bytes(cls, target: Target, ranks: int) -> float:
        return super().disk_bytes(target, ranks) * (4 / 3 if target.file.pyramid else 1)

    def _encode(self, rows: range, pixels: np.ndarray, level: int) -> None:
        sizes = self._facts.setdefault(level, [])
        for _, strip in tile_rows(rows, pixels, _SIDE):
            for tile in _differences(strip):
                encoded = deflate.compress(tile.data)
                sizes.append(len(encoded))
                self._file(level).write(encoded)

    @classmethod
    def assemble(cls, target: Target, parts: Sequence[Part], metadata: Metadata) -> None:
        import tifffile

        levels = cls.levels(target)
        with removing(parts):
            stacks = [in_order(target, parts, level) for level in range(levels)]
            with published(target) as file, tifffile.TiffWriter(file, bigtiff=True) as tiff:
                for level, stack in enumerate(stacks):
                    first = {"description": json.dumps(metadata), "subifds": levels - 1}
                    tiff.write(
                        _tiles(stack, level),
                        shape=(*target.level_size(level), 3),
                        dtype=target.sample,
                        tile=(_SIDE, _SIDE),
                        photometric="rgb",
                        compression="adobe_deflate",
                        predictor=_HORIZONTAL_DIFFERENCE,
                        metadata=None,
                        software=False,
                        **({"subfiletype": _REDUCED} if level else first),
                    )

    @classmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        import tifffile

        try:
            with tifffile.TiffFile(path) as tiff:
                text = tiff.pages.first.description
        except (tifffile.TiffFileError, IndexError) as error:
            raise ValueError(f"not a TIFF file: {error}") from error
        return object_of(text)


def _differences(strip: np.ndarray) -> Iterator[np.ndarray]:
    """Tiles [256, 256, 3] of a row of them, each sample less the one on its left.

    Where a tile reaches beyond the picture, the picture's edge goes on: its differences are zero.
    """
    height, width, _ = strip.shape
    for left in range(0, width, _SIDE):
        columns = strip[:, left : left + _SIDE]
        tile = np.zeros((_SIDE, _SIDE, 3), strip.dtype)
        tile[:height, 0] = columns[:, 0]
        np.subtract(columns[:, 1:], columns[:, :-1], out=tile[:height, 1 : columns.shape[1]])
        tile[height:] = tile[height - 1]
        yield tile


def _tiles(parts: Sequence[Part], level: int) -> Iterator[bytes]:
    """All tiles of a level; a part's file is removed once it has been read."""
    for part in parts:
        with part.files[level].open("rb") as source:
            *sizes, last_size = part.facts[level]
            for size in sizes:
                yield source.read(size)
            last = source.read(last_size)
        remove(part.files[level])  # now: nobody comes back for what is behind the last tile
        yield last
