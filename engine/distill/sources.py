"""Pictures with captions, in units that ranks can share out and that are read from front to end.

    landscapes          drawn by `engine.demo`, in its own shapes; close-ups at low noise only
    a folder            any depth of folders; `a.jpg` and its caption in `a.txt`, a wording a line
    tar files           webdataset's layout: the members `a.jpg` and `a.txt` next to each other

A picture that cannot be read, or has no caption, is a `Broken` with its name and the reason: the
others go on. A unit is what is encoded and kept in one file (`engine.distill.latents`).
"""

import glob
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engine.config import UserError
from engine.distill.settings import LANDSCAPES, DataSettings

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
UNIT = 256
"""pictures of a unit, where the source does not say"""


@dataclass(frozen=True)
class Sample:
    """A picture, its wordings, and below which share of the noise schedule it is seen."""

    name: str
    picture: Image.Image
    captions: list[str]
    below: float = 1.0


@dataclass(frozen=True)
class Broken:
    """A picture that is left out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """Pictures that are read together.

    Attributes:
        facts: tells what is in it without reading it: JSON-able.
    """

    name: str
    facts: Any


class Source(Protocol):
    """Where pictures come from. All ranks see the same units."""

    def units(self) -> list[Unit]:
        """All of them, in a settled order."""

    def read(self, unit: Unit) -> Iterator[Sample | Broken]:
        """What is in one of them."""


def open_source(settings: DataSettings) -> Source:
    """The source that the settings name; nothing is read yet.

    Raises:
        UserError: there is no such folder, there are no such files, or no pictures in it.
    """
    if settings.source == LANDSCAPES:
        from engine.distill.landscapes import Landscapes

        return Landscapes(settings.pictures)
    if settings.source.endswith(".tar"):
        return Tars.found(settings.source)
    return Folder.found(Path(settings.source))


def read_picture(name: str, content: bytes, captions: list[str]) -> Sample | Broken:
    """A sample of an encoded picture."""
    if not captions:
        return Broken(name, "no caption")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:  # whose own words hold an address in memory
        return Broken(name, "no picture")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Broken(name, (str(error).strip().splitlines() or [type(error).__name__])[0])
    return Sample(name, picture, captions)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """8 bits a channel, on white where it is transparent."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        deep = np.asarray(picture).clip(0, 65535) / 257
        picture = Image.fromarray(deep.round().astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("32 bits a channel: 8 or 16 would work")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def wordings(text: bytes) -> list[str]:
    """The lines of a caption file that say something."""
    lines = text.decode("utf-8-sig", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class Folder:
    """Picture files below a folder, in the order of their names."""

    root: Path
    files: list[Path] = field(repr=False)

    @classmethod
    def found(cls, root: Path) -> "Folder":
        if not root.is_dir():
            raise UserError(
                f"data.source: {root} is no folder; give 'landscapes', a folder of pictures with a "
                ".txt beside each, or a pattern of .tar files"
            )
        files = sorted(
            p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()
        )
        if not files:
            raise UserError(f"data.source: {root} has no pictures ({', '.join(sorted(SUFFIXES))})")
        return cls(root, files)

    def units(self) -> list[Unit]:
        return [
            Unit(f"{start // UNIT:06d}", [self._facts(file) for file in self._files(start)])
            for start in range(0, len(self.files), UNIT)
        ]

    def read(self, unit: Unit) -> Iterator[Sample | Broken]:
        for file in self._files(int(unit.name) * UNIT):
            name, text = file.relative_to(self.root).as_posix(), _text_of(file)
            try:
                captions = wordings(text.read_bytes()) if text.exists() else []
                content = file.read_bytes()
            except OSError as error:
                yield Broken(name, error.strerror or str(error))
                continue
            yield read_picture(name, content, captions)

    def _files(self, start: int) -> list[Path]:
        return self.files[start : start + UNIT]

    def _facts(self, file: Path) -> list[Any]:
        """The caption too: another wording is another lesson."""
        both = [path.stat() for path in (file, _text_of(file)) if path.exists()]
        name = file.relative_to(self.root).as_posix()
        return [name, *((status.st_size, status.st_mtime_ns) for status in both)]


def _text_of(file: Path) -> Path:
    """Where its caption is, or would be."""
    loud = file.with_suffix(".TXT")
    return loud if loud.exists() else file.with_suffix(".txt")


@dataclass(frozen=True)
class Tars:
    """Tar files, each a unit."""

    files: list[Path]

    @classmethod
    def found(cls, pattern: str) -> "Tars":
        files = sorted(map(Path, glob.glob(pattern)))
        if not files:
            raise UserError(
                f"data.source: no file is called {pattern}; give the path of a .tar file, or a "
                "pattern such as 'data/*.tar' in quotes"
            )
        return cls(files)

    def units(self) -> list[Unit]:
        return [Unit(f"{n:06d}", self._facts(file)) for n, file in enumerate(self.files)]

    def read(self, unit: Unit) -> Iterator[Sample | Broken]:
        """Members of one name up to the last dot are next to each other, in any order."""
        file = self.files[int(unit.name)]
        try:
            with tarfile.open(file, "r|*") as archive:
                yield from _pairs(file.name, archive)
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Broken(file.name, f"not whole: {error}")

    def _facts(self, file: Path) -> list[Any]:
        status = file.stat()
        return [file.name, status.st_size, status.st_mtime_ns]


def _pairs(name: str, archive: tarfile.TarFile) -> Iterator[Sample | Broken]:
    key, group = "", dict[str, bytes]()
    for member in archive:
        if not member.isfile():
            continue
        path = PurePosixPath(member.name)
        if (stem := str(path.with_suffix(""))) != key:
            yield from _pair(f"{name}/{key}", group)
            key, group = stem, {}
        content = archive.extractfile(member)
        assert content is not None  # it is a file
        group[path.suffix.lower()] = content.read()
    yield from _pair(f"{name}/{key}", group)


def _pair(name: str, group: dict[str, bytes]) -> Iterator[Sample | Broken]:
    for suffix in sorted(SUFFIXES & group.keys()):
        yield read_picture(name + suffix, group[suffix], wordings(group.get(".txt", b"")))
