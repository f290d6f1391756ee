"""Pictures for the tests of files: made up, written in bands, and read back by others."""

import io
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import OpenImageIO as oiio
import pyvips
import tifffile
from PIL import Image

from engine.config import FileSettings
from engine.output import Target, writer_for
from engine.output.pixels import halve

METADATA: Mapping[str, Any] = {
    "prompt": "夕暮れの湖, Bäume, снег, 🏔 <b>&\"'</script>",
    "linfusion-engine": {"settings": {"seed": 3}, "run": {"ranks": None}},
}


def pixels_of(height: int, width: int, sample: str = "uint8", seed: int = 0) -> np.ndarray:
    """Half noise, half smooth: neither stored blocks only nor long matches only."""
    top = 1.0 if sample == "float16" else float(np.iinfo(sample).max)
    noise = np.random.default_rng(seed).random((height, width, 3)) * top
    noise[: height // 2] = np.linspace(0, top, width)[None, :, None]
    return noise.astype(sample)


def write_picture(
    path: Path,
    pixels: np.ndarray,
    cuts: Sequence[int] = (),
    step: int = 1 << 20,
    metadata: Mapping[str, Any] = METADATA,
    **file: Any,
) -> None:
    """As the ranks write it whose bands begin at `cuts`, each fed `step` blocks at a time."""
    writer = writer_for(path)
    height, width, _ = pixels.shape
    target = Target(path, height, width, str(pixels.dtype), FileSettings(**file))
    parts = [writer(target, index) for index in range(len(cuts) + 1)]
    for level in range(writer.levels(target)):
        borders = [-(-(cut >> level) // writer.row_multiple) for cut in sorted(cuts)]
        edges = [min(border * writer.row_multiple, len(pixels)) for border in borders]
        for part, start, stop in zip(parts, [0, *edges], [*edges, len(pixels)], strict=True):
            for rows in split(range(start, stop), step * writer.row_multiple):
                part.write(rows, pixels[rows.start : rows.stop], level)
        pixels = halve(pixels)
    # The summaries travel between processes, and may arrive in any order.
    summaries = [pickle.loads(pickle.dumps(part.close())) for part in reversed(parts)]
    writer.assemble(target, summaries, metadata)


def split(rows: range, step: int) -> list[range]:
    edges = [*range(rows.start, rows.stop, step), rows.stop]
    return [range(a, b) for a, b in pairwise(edges)] or [rows]


# --- independent readers --------------------------------------------------------------------------


def by_pyvips(path: Path) -> np.ndarray:
    pyvips.cache_set_max(0)  # or a file of the same name would be the one from before
    picture = pyvips.Image.new_from_file(str(path), access="sequential", fail_on="warning")
    return picture.numpy()


def by_oiio(path: Path, kind: str = "") -> np.ndarray:
    file = oiio.ImageInput.open(str(path))
    assert file, oiio.geterror()
    pixels = file.read_image(format=kind or str(file.spec().format))
    assert not file.has_error, file.geterror()
    return pixels


def by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        picture.load()
        return np.asarray(picture)


def by_tifffile(path: Path) -> np.ndarray:
    return tifffile.imread(path)


def by_joining_tiles(path: Path) -> np.ndarray:
    """The finest level of a Deep Zoom picture."""
    return join_tiles(path, max(int(f.name) for f in tiles_folder(path).iterdir()))


def tiles_folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}_files")


def join_tiles(path: Path, level: int) -> np.ndarray:
    tiles = {}
    for file in (tiles_folder(path) / str(level)).iterdir():
        column, row = map(int, re.fullmatch(r"(\d+)_(\d+)", file.stem).groups())
        tiles[row, column] = by_pillow(file)
    rows, columns = (max(place) + 1 for place in zip(*tiles, strict=True))
    return np.vstack([np.hstack([tiles[r, c] for c in range(columns)]) for r in range(rows)])


READERS = {
    (".png", "uint8"): [by_pyvips, by_pillow, by_oiio],
    (".png", "uint16"): [by_pyvips, by_oiio],
    (".tif", "uint8"): [by_pyvips, by_pillow, by_oiio, by_tifffile],
    (".tif", "uint16"): [by_pyvips, by_oiio, by_tifffile],
    (".exr", "float16"): [by_oiio],
    (".dzi", "uint8"): [by_joining_tiles],
    (".jpg", "uint8"): [by_pillow, by_pyvips],
    (".webp", "uint8"): [by_pillow],
}
"""for each suffix and type of numbers"""


def expected(path: Path, pixels: np.ndarray) -> np.ndarray:
    """What readers should see: the very pixels, or what the codec of one process makes of them."""
    file = io.BytesIO()
    if path.suffix == ".jpg":
        Image.fromarray(pixels).save(file, "jpeg", quality=90, subsampling=0)
    elif path.suffix == ".webp":
        Image.fromarray(pixels).save(file, "webp", quality=90)
    else:
        return pixels
    return np.asarray(Image.open(file))


def facts(path: Path) -> dict[str, Any]:
    """What a PNG by the engine says of itself."""
    with Image.open(path) as picture:
        return json.loads(picture.text["linfusion-engine"])
