"""Finished bands go straight to the file: each rank encodes its own rows, nobody holds the picture.

    writer.py    what formats have in common: a rank's part, and how the whole gets its name
    png.py       deflated by all ranks; 8 and 16 bits
    tiff.py      BigTIFF in tiles, with a pyramid if asked for; 8 and 16 bits
    exr.py       half floats in linear light
    deepzoom.py  a pyramid of tiles and a page to look at it
    jpeg.py      up to 65500 px
    webp.py      up to 16383 px, and the one that is encoded whole

A format is one class in one file, and one line in `_WRITERS`. Its life cycle:

    check(path, height, width, settings)           # one process, before hours of painting
    target = Target(path, height, width, sample, settings, token)
    writer = writer_for(path)
    with writer(target, index=rank) as part:       # every rank
        part.write(rows, band)                     # [h, W, 3], top to bottom, any number of times
        part.write(half_the_rows, halves, level=1)     # as many levels as writer.levels(target)
        summary = part.close()                     # small and picklable: send it to one process
    writer.assemble(target, summaries, metadata)   # that process, once every part is closed

Nothing here communicates (`engine.saving` does). What the ranks share is a folder, and part files
with one writer each are safe on NFS and Lustre, where several writers in one file are not.
"""

import secrets
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.config import FileSettings, Settings, UserError
from engine.output.deepzoom import DeepZoomWriter
from engine.output.exr import ExrWriter
from engine.output.jpeg import JpegWriter
from engine.output.png import PngWriter
from engine.output.tiff import TiffWriter
from engine.output.webp import WebpWriter
from engine.output.writer import BandWriter, Metadata, Part, Target

__all__ = [
    "WRITERS",
    "BandWriter",
    "Metadata",
    "Part",
    "Target",
    "check",
    "check_destination",
    "read_metadata",
    "sample_of",
    "target_of",
    "writer_for",
]

_WRITERS: tuple[type[BandWriter], ...] = (
    PngWriter,
    TiffWriter,
    ExrWriter,
    DeepZoomWriter,
    JpegWriter,
    WebpWriter,
)
WRITERS = {suffix: writer for writer in _WRITERS for suffix in writer.suffixes}


def writer_for(path: Path) -> type[BandWriter]:
    """The writer for a file name, chosen by its suffix."""
    known = f"{', '.join(list(WRITERS)[:-1])} or {list(WRITERS)[-1]}"
    suffix = path.suffix.lower()
    if not suffix:
        raise UserError(f"{path}: the file name has no suffix to choose a format by; add {known}")
    if suffix not in WRITERS:
        raise UserError(f"{path}: no writer for {suffix} files; {known} would work")
    return WRITERS[suffix]


def sample_of(path: Path, file: FileSettings) -> str:
    """numpy's name for the type of a number in the file.

    Raises:
        UserError: the format does not have as many bits.
    """
    samples = writer_for(path).samples
    if file.bits == "auto":
        return samples[min(samples)]
    if int(file.bits) not in samples:
        others = [s for s, writer in WRITERS.items() if int(file.bits) in writer.samples]
        raise UserError(
            f"file.bits: a {path.suffix} file has {min(samples)} bits, not {file.bits}; leave it "
            f"out, or name a {' or '.join(others)} file"
        )
    return samples[int(file.bits)]


def check(path: Path, height: int, width: int, file: FileSettings) -> None:
    """Refuses what the format of `path` cannot do, and settings that it would not heed.

    Raises:
        UserError: no such format, a package that it needs is missing, a picture beyond its limit.
    """
    writer = writer_for(path)
    sample_of(path, file)
    if file.view and writer is DeepZoomWriter:
        raise UserError(f"file.view: {path} is there to be looked at as it is; leave it out")
    heeds = {"bits", "view", *writer.heeds, *(DeepZoomWriter.heeds if file.view else ())}
    for name, info in FileSettings.model_fields.items():
        if name not in heeds and getattr(file, name) != info.default:
            heeding = [suffix for suffix, other in WRITERS.items() if name in other.heeds]
            raise UserError(
                f"file.{name} has no effect on {path.suffix} files; leave it out, or name a "
                f"{' or '.join(heeding)} file"
            )
    if writer.needs and find_spec(writer.needs[0]) is None:
        package, extra = writer.needs
        raise UserError(
            f"{path.suffix} files need the package {package}: "
            f"pip install 'linfusion-engine[{extra}]', or name a .tif file"
        )
    limit = writer.longest_side
    if limit is not None and max(height, width) > limit:
        raise UserError(
            f"{path}: a {path.suffix} file has at most {limit} px a side, and the picture is "
            f"{width}x{height} px; .png, .tif or .dzi would work"
        )


def check_destination(path: Path) -> None:
    """Creates the folder and writes into it for real, so that a mistake shows before painting."""
    writer_for(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # As long a name as any part will get: a file system may refuse that alone.
        trial = Target(path, 1, 1, token=secrets.token_hex(4)).beside("part-0000-slab")
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{path}: cannot be written ({reason}); give a name in a folder that you may write to"
        ) from None
    if (other := writer_for(path).in_the_way(path)) is not None:
        raise UserError(
            f"{path}: {other} is in the way, and belongs to no {path.suffix} file; move it, or "
            "give another name"
        )


def target_of(settings: Settings) -> Target:
    """The file that a job writes."""
    path, file = settings.output, settings.file
    return Target(path, settings.height, settings.width, sample_of(path, file), file)


def files_of(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each file that a job writes; where the last one is there, all are."""
    if not settings.file.view:
        return (settings,)
    fields = FileSettings.model_fields
    others = {name: fields[name].default for name in fields.keys() - DeepZoomWriter.heeds}
    view = {"output": settings.output.with_suffix(".dzi")}
    return (
        settings.model_copy(update={**view, "file": settings.file.model_copy(update=others)}),
        settings,
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """What a picture keeps about itself, by whichever writer made it.

    Raises:
        UserError: there is no such file, or it is none that this engine writes.
    """
    writer = writer_for(path)
    try:
        return writer.read_metadata(path)
    # What readers raise on files that are none, or not to their end.
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise UserError(
            f"{path}: cannot be read ({reason}); give a picture of this engine"
        ) from None
