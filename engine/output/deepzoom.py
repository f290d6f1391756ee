"""Deep Zoom: a pyramid of tiles that a browser loads as it needs them, and a page that shows them.

    lake.dzi            the descriptor: size, tile size, format; where the picture came from
    lake.html           a viewer that needs nothing else: open it by a double click
    lake_files/14/      the whole picture in tiles of 512 px, named column_row
    lake_files/13/ ...  its halves, rounded up, down to a single pixel in 0/

Ranks write the tiles of their rows into a hidden folder. The folder gets its name when it is whole,
then the page, then the descriptor. Any viewer of Deep Zoom reads it, such as OpenSeadragon; from
`file://` browsers let it load tiles but no descriptor, so ours has the descriptor inside.
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
from engine.output.writer import (
    BandWriter,
    Metadata,
    Part,
    Target,
    in_order,
    published,
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
        share = cls.usual_share[8] if target.file.tiles == "jpg" else 0.6
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
        """Metadata become an element of the descriptor, in JSON, which other viewers pass over."""
        for level in range(cls.levels(target)):
            in_order(target, parts, level)
        tiles, old, final = target.beside("tiles"), target.beside("old"), _tiles_folder(target.path)
        page = target.path.with_suffix(".html")
        for folder in (*tiles.glob("*"), tiles):
            sync_folder(folder)
        # An old picture of this name goes before its tiles do, and comes last when the new one is
        # whole: whatever is killed in between leaves no descriptor.
        for outdated in (target.path, page):
            remove(outdated)
        if final.exists():
            final.rename(old)
        tiles.rename(final)
        with published(target, page) as file:
            file.write(_page(target, metadata).encode())
        with published(target) as file:
            file.write(_descriptor(target, metadata))
        remove(old)

    @classmethod
    def read_metadata(cls, path: Path) -> dict[str, Any]:
        try:
            found = ET.parse(path).getroot().findtext(f"{{{_OURS}}}metadata")
        except ET.ParseError as error:
            raise ValueError(f"not a Deep Zoom descriptor: {error}") from error
        return dict(json.loads(found or "{}"))


def _tiles_folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}_files")


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
        "tiles": _tiles_folder(target.path).name,
        "metadata": metadata,
    }
    template = files("engine.output").joinpath("viewer.html").read_text(encoding="utf-8")
    # "<" could end the script element in the middle of a prompt.
    return template.replace("/* PICTURE */ null", json.dumps(picture).replace("<", "\\u003c"))
