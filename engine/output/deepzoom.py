"""Deep Zoom: a pyramid of tiles that a browser loads as it needs them, and a page that shows them.

    lake.dzi            the descriptor: size, tile size, format; where the picture came from
    lake.html           a viewer that needs nothing else: open it by a double click
    lake_files/14/      the whole picture in tiles of 512 px, named column_row
    lake_files/13/ ...  its halves, rounded up, down to a single pixel in 0/

Ranks write the tiles of their rows into a hidden folder. When all is whole and on disk, the folder
gets its name, then the page, and the descriptor last. Any viewer of Deep Zoom reads it, such as
OpenSeadragon; from `file://` browsers let it load tiles but no descriptor, so ours has the
descriptor inside.
"""

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from engine.output.jpeg import encode
from engine.output.pixels import tile_rows
from engine.output.png import PngWriter
from engine.output.writer import (
    BandWriter,
    Metadata,
    Part,
    Target,
    in_order,
    leftovers,
    object_of,
    remove,
    sync_folder,
)

_SIDE = 512
_NAMESPACE = "http://schemas.microsoft.com/deepzoom/2008"
_OURS = "urn:linfusion-engine"


class DeepZoomWriter(BandWriter):
    """A rank's tiles, each a file; there are no part files to be put together."""

    suffixes: ClassVar[tuple[str, ...]] = (".dzi",)
    heeds: ClassVar[frozenset[str]] = frozenset({"quality", "tiles"})
    row_multiple = _SIDE
    longest_side = 2**31 - 1
    usual_share: ClassVar[Mapping[int, float]] = {8: 0.2}

    @classmethod
    def levels(cls, target: Target) -> int:
        """Down to a single pixel; Deep Zoom counts them from there."""
        return 1 + (max(target.height, target.width) - 1).bit_length()

    @classmethod
    def disk_bytes(cls, target: Target, ranks: int) -> float:
        kind = cls if target.file.tiles == "jpg" else PngWriter
        share = kind.usual_share[8]
        return share * target.raw_bytes * 4 / 3

    def __init__(self, target: Target, index: int) -> None:
        super().__init__(target, index)
        self._tiles: list[Path] = []

    def _encode(self, rows: range, pixels: np.ndarray, level: int) -> None:
        folder = self.target.beside("tiles") / str(self.levels(self.target) - 1 - level)
        folder.mkdir(parents=True, exist_ok=True)
        for row, strip in tile_rows(rows, pixels, _SIDE):
            for column in range(-(-strip.shape[1] // _SIDE)):
                tile = np.ascontiguousarray(strip[:, column * _SIDE : (column + 1) * _SIDE])
                path = folder / f"{column}_{row}.{self.target.file.tiles}"
                self._tiles.append(path)
                self._save(tile, path)

    def _save(self, tile: np.ndarray, path: Path) -> None:
        with path.open("wb") as file:
            if self.target.file.tiles == "jpg":
                file.write(encode(tile, self.target.file.quality))
            else:
                Image.fromarray(tile).save(file, "png", compress_level=1)
            file.flush()
            os.fsync(file.fileno())

    def abort(self) -> None:
        """Removes this rank's tiles; the last rank to do so removes the folders too."""
        for tile in self._tiles:
            remove(tile)
        root = self.target.beside("tiles")
        for folder in (*root.glob("*"), root):
            try:
                folder.rmdir()
            except OSError:  # another rank's tiles are still there, or it was quicker
                continue

    @classmethod
    def assemble(cls, target: Target, parts: Sequence[Part], metadata: Metadata) -> None:
        """Metadata become an element of the descriptor, in JSON, which other viewers pass over.

        The three names change one after the other, the old descriptor's first and the new one's
        last: whatever is killed in between leaves none, and `restore` undoes it.
        """
        for level in range(cls.levels(target)):
            in_order(target, parts, level)
            _require_tiles(target, level, cls.levels(target) - 1 - level)
        folder, page, descriptor = (
            target.beside(f"new{name.suffix}") for name in _names(target.path)
        )
        try:
            for tiles in (*target.beside("tiles").glob("*"), target.beside("tiles")):
                sync_folder(tiles)
            target.beside("tiles").rename(folder)
            _write(page, _page(target, metadata).encode())
            _write(descriptor, _descriptor(target, metadata))  # from here on `restore` is in charge
            for name in reversed(_names(target.path)):
                if name.exists():
                    name.rename(target.beside(f"old{name.suffix}"))
            for new, name in zip((folder, page, descriptor), _names(target.path), strict=True):
                new.rename(name)
            sync_folder(target.path.parent)
        except BaseException:
            cls.restore(target.path)
            for new in (folder, page, descriptor):
                remove(new)
            raise
        for name in _names(target.path):
            remove(target.beside(f"old{name.suffix}"))

    @classmethod
    def restore(cls, path: Path) -> bool:
        """Where all is ready, and the descriptor has not got its name: back to the old picture."""
        marks = [left for left in leftovers(path) if left.name.endswith(".new.dzi")]
        for mark in marks:
            for name in _names(path):
                new, old = (
                    mark.with_name(mark.name.replace(".new.dzi", f".{age}{name.suffix}"))
                    for age in ("new", "old")
                )
                if not new.exists():
                    remove(name)  # it is the new one, under its name already
                if old.exists():
                    old.rename(name)
                if new != mark:
                    remove(new)
            remove(mark)
        return path.exists() and bool(marks)

    @classmethod
    def in_the_way(cls, path: Path) -> Path | None:
        """Tiles or a page without a descriptor are not ours, unless a job was killed."""
        folder, page, descriptor = _names(path)
        if descriptor.exists() or leftovers(path):
            return page if page.is_dir() else None
        return next((name for name in (folder, page) if name.exists()), None)

    @classmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        try:
            found = ET.parse(path).getroot().findtext(f"{{{_OURS}}}metadata")
        except ET.ParseError as error:
            raise ValueError(f"not a Deep Zoom descriptor: {error}") from error
        return object_of(found or "")


def _names(path: Path) -> tuple[Path, Path, Path]:
    """The folder of tiles, the page, and the descriptor, in the order in which they appear."""
    return path.with_name(f"{path.stem}_files"), path.with_suffix(".html"), path


def _require_tiles(target: Target, level: int, number: int) -> None:
    """Raises OSError where some tiles of a level, which Deep Zoom calls `number`, are not there."""
    height, width = target.level_size(level)
    expected = -(-height // _SIDE) * -(-width // _SIDE)
    found = len(list((target.beside("tiles") / str(number)).iterdir()))
    if found != expected:
        raise OSError(None, f"{found} of {expected} tiles are there")


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _descriptor(target: Target, metadata: Metadata) -> bytes:
    ET.register_namespace("", _NAMESPACE)
    ET.register_namespace("linfusion", _OURS)
    attributes = {"TileSize": str(_SIDE), "Overlap": "0", "Format": target.file.tiles}
    image = ET.Element(f"{{{_NAMESPACE}}}Image", attributes)
    size = {"Width": str(target.width), "Height": str(target.height)}
    ET.SubElement(image, f"{{{_NAMESPACE}}}Size", size)
    ET.SubElement(image, f"{{{_OURS}}}metadata").text = json.dumps(metadata)
    text: bytes = ET.tostring(image, encoding="UTF-8", xml_declaration=True)
    return text


def _page(target: Target, metadata: Metadata) -> str:
    """The viewer, with all that it has to know of the picture."""
    picture = {
        "name": target.path.stem,
        "width": target.width,
        "height": target.height,
        "tileSize": _SIDE,
        "format": target.file.tiles,
        "tiles": _names(target.path)[0].name,
        "metadata": metadata,
    }
    template = files("engine.output").joinpath("viewer.html").read_text(encoding="utf-8")
    # "<" could end the script element in the middle of a prompt.
    return template.replace("/* PICTURE */ null", json.dumps(picture).replace("<", "\\u003c"))
