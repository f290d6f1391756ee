"""Banded files against independent readers: Pillow and libvips must see the very pixels."""

import os
import pickle
import tracemalloc
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.config import UserError
from engine.output import WRITERS, check_destination, png, writer_for
from engine.output.png import PngBand, PngPart, adler32_combine, sub_filter, text_chunk

FEW = settings(max_examples=40, deadline=None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a test may leave nothing but finished pictures."""
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def write_part(path: Path, pixels: np.ndarray, rows: range, index: int, step: int = 7) -> PngPart:
    height, width, _ = pixels.shape
    with PngBand(path, height=height, width=width, rows=rows, index=index) as part:
        for top in range(rows.start, rows.stop, step):
            part.write(pixels[top : min(top + step, rows.stop)])
        return part.close()


def write_picture(
    path: Path,
    pixels: np.ndarray,
    cuts: list[int],
    step: int = 7,
    metadata: Mapping[str, str] | None = None,
) -> None:
    edges = [0, *sorted(cuts), len(pixels)]
    bands = [range(a, b) for a, b in pairwise(edges)]
    parts = [write_part(path, pixels, rows, index, step) for index, rows in enumerate(bands)]
    # The summaries travel between processes, and may arrive in any order.
    PngBand.assemble(path, pickle.loads(pickle.dumps(parts[::-1])), metadata or {})


def pixels_of(height: int, width: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Half noise, half smooth: neither stored blocks only nor long matches only."""
    top = np.iinfo(dtype).max
    noise = np.random.default_rng(seed).integers(0, top, (height, width, 3), dtype, endpoint=True)
    noise[: height // 2] = np.linspace(0, top, width)[None, :, None]
    return noise


@st.composite
def pictures(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int]:
    """Pixels, the rows at which they are cut into bands, and how many rows are fed at a time."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 50))
    dtype = draw(st.sampled_from(["uint8", "uint16"]))
    cuts = draw(st.lists(st.integers(0, height), max_size=5))  # repeats: bands without rows
    return pixels_of(height, width, dtype, draw(st.integers(0, 99))), cuts, draw(st.integers(1, 45))


@FEW
@given(pictures(), st.integers(1, 600))
def test_readers_see_the_very_pixels(
    picture: tuple[np.ndarray, list[int], int], block_bytes: int
) -> None:
    pixels, cuts, step = picture
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "_BLOCK_BYTES", block_bytes)
        path = Path(name) / "picture.png"
        write_picture(path, pixels, cuts, step)
        assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
        read = pyvips.Image.new_from_file(str(path), access="sequential", fail_on="warning")
        np.testing.assert_array_equal(read.numpy(), pixels)
        with Image.open(path) as image:
            image.load()
            # Pillow has no 16-bit RGB: it keeps the high byte of each sample.
            high = pixels if pixels.dtype == np.uint8 else pixels >> 8
            np.testing.assert_array_equal(np.asarray(image), high)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_parts_of_many_blocks_and_chunks(folder: Path, dtype: str) -> None:
    pixels = pixels_of(900, 1001, dtype)
    write_picture(folder / "picture.png", pixels, [1, 433, 899], step=500)
    read = pyvips.Image.new_from_file(str(folder / "picture.png"), fail_on="warning").numpy()
    np.testing.assert_array_equal(read, pixels)


def test_the_file_is_valid_to_the_byte(folder: Path) -> None:
    """Walks the chunks as the specification has them, with zlib's own checks for the rest."""
    path, pixels = folder / "picture.png", pixels_of(9, 5, "uint8")
    write_picture(path, pixels, [2, 2, 9], metadata={"Title": "x"})
    data, kinds, stream, at = path.read_bytes(), [], b"", 8
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size]) == zlib.crc32(kind + body)
        kinds.append(kind)
        stream += body if kind == b"IDAT" else b""
        at += 12 + size
    assert kinds == [b"IHDR", b"iTXt", *[b"IDAT"] * 4, b"IEND"]
    inflate = zlib.decompressobj()
    assert inflate.decompress(stream) == sub_filter(pixels).tobytes()
    assert inflate.eof
    assert inflate.unused_data == b""


@FEW
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_adler32_combine(first: bytes, second: bytes) -> None:
    combined = adler32_combine(zlib.adler32(first), zlib.adler32(second), len(second))
    assert combined == zlib.adler32(first + second)


def test_adler32_combine_beyond_the_modulus() -> None:
    first, second = b"\xff" * 100_000, b"\xfe" * 70_000
    combined = adler32_combine(zlib.adler32(first), zlib.adler32(second), len(second))
    assert combined == zlib.adler32(first + second)


def test_metadata_in_any_script(folder: Path) -> None:
    metadata = {
        "Title": "夕暮れの湖",
        "Comment": '{"seed": 0, "prompt": "Bäume, снег, 🏔"}',
        "Empty": "",
    }
    write_picture(folder / "picture.png", pixels_of(4, 4, "uint8"), [2], metadata=metadata)
    with Image.open(folder / "picture.png") as image:
        image.load()
        assert image.text == metadata


def test_unfit_text_never_costs_a_painted_picture(folder: Path) -> None:
    text = "zero \0 and surrogate \udcff"
    write_picture(folder / "picture.png", pixels_of(4, 4, "uint8"), [], metadata={"Comment": text})
    with Image.open(folder / "picture.png") as image:
        image.load()
        assert image.text == {"Comment": "zero \N{REPLACEMENT CHARACTER} and surrogate ?"}


@pytest.mark.parametrize("keyword", ["", "k" * 80, "a\0b", "雪"])
def test_keywords_that_png_does_not_have(keyword: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        text_chunk(keyword, "text")


def feed(path: Path, rows: range, *bands: np.ndarray) -> PngPart:
    with PngBand(path, height=9, width=4, rows=rows, index=0) as part:
        for band in bands:
            part.write(band)
        return part.close()


def test_missing_rows_are_refused_and_leave_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match="rows 2 to 4 were never written"):
        feed(folder / "picture.png", range(4), pixels_of(2, 4, "uint8"))
    assert list(folder.iterdir()) == []


def test_a_band_that_is_never_closed_leaves_nothing(folder: Path) -> None:
    with PngBand(folder / "picture.png", height=4, width=4, rows=range(4), index=0):
        pass
    assert list(folder.iterdir()) == []


def test_a_failure_after_close_leaves_nothing(folder: Path) -> None:
    def lose_another_rank() -> None:
        with PngBand(folder / "picture.png", height=4, width=4, rows=range(4), index=0) as part:
            part.write(pixels_of(4, 4, "uint8"))
            part.close()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        lose_another_rank()
    assert list(folder.iterdir()) == []


def test_abort_after_close(folder: Path) -> None:
    part = PngBand(folder / "picture.png", height=4, width=4, rows=range(4), index=0)
    part.write(pixels_of(4, 4, "uint8"))
    part.close()
    part.abort()
    part.abort()
    assert list(folder.iterdir()) == []


def test_assemble_renames_a_whole_file_and_never_holds_the_picture_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_fsync: list[Path] = []
    inode: list[int] = []

    def fsync(file: int) -> None:
        at_fsync.extend(folder.iterdir())
        inode.append(os.fstat(file).st_ino)

    monkeypatch.setattr(png.os, "fsync", fsync)
    write_picture(folder / "picture.png", pixels_of(8, 4, "uint8"), [2, 4])
    assert [path.name for path in at_fsync] == [".picture.png.tmp"]
    assert (folder / "picture.png").stat().st_ino == inode[0]


@pytest.mark.parametrize("fails", ["a part is gone", "fsync"])
def test_a_failing_assemble_keeps_the_old_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path, pixels = folder / "picture.png", pixels_of(8, 4, "uint8")
    path.write_bytes(b"the old picture")
    parts = [write_part(path, pixels, range(a, a + 4), a) for a in (0, 4)]
    if fails == "fsync":

        def full_disk(_: int) -> None:
            raise OSError("no space")

        monkeypatch.setattr(png.os, "fsync", full_disk)
    else:
        parts[1].path.unlink()
    with pytest.raises(OSError, match=r"."):
        PngBand.assemble(path, parts, {})
    assert path.read_bytes() == b"the old picture"
    assert list(folder.iterdir()) == [path]


def test_parts_that_do_not_make_a_picture(folder: Path) -> None:
    path, pixels = folder / "picture.png", pixels_of(8, 4, "uint8")
    gap = [write_part(path, pixels, rows, i) for i, rows in enumerate([range(3), range(4, 8)])]
    with pytest.raises(ValueError, match=r"start at \[0, 4\], end at \[3, 8\]"):
        PngBand.assemble(path, gap, {})
    top, deep = pixels, pixels.astype("uint16")
    mixed = [write_part(path, top, range(4), 0), write_part(path, deep, range(4, 8), 1)]
    with pytest.raises(ValueError, match="different sizes or bit depths"):
        PngBand.assemble(path, mixed, {})
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("band", "message"),
    [
        (np.zeros((1, 4, 3), "float32"), "a PNG takes uint8 or uint16 pixels, not float32"),
        (np.zeros((1, 4, 3), "uint16"), "uint16 rows after rows of 8 bits"),
        (np.zeros((1, 5, 3), "uint8"), r"rows must be \[h, 4, 3\], not \[1, 5, 3\]"),
        (np.zeros((4, 3), "uint8"), r"rows must be \[h, 4, 3\], not \[4, 3\]"),
        (np.zeros((4, 4, 3), "uint8"), r"rows up to 7 do not fit a part of range\(2, 6\)"),
    ],
)
def test_bands_that_do_not_fit_are_refused_and_leave_nothing(
    folder: Path, band: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        feed(folder / "picture.png", range(2, 6), np.zeros((1, 4, 3), "uint8"), band)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("rows", [range(0, 5), range(3, 2), range(0, 4, 2), range(-1, 2)])
def test_rows_that_the_picture_does_not_have(folder: Path, rows: range) -> None:
    with pytest.raises(ValueError, match="are no rows of a 4 x 4 picture"):
        PngBand(folder / "picture.png", height=4, width=4, rows=rows, index=0)


def test_writing_needs_memory_for_blocks_not_for_bands(folder: Path) -> None:
    pixels = pixels_of(2048, 1024, "uint16")  # 12 MB
    with PngBand(folder / "picture.png", height=2048, width=1024, rows=range(2048), index=0) as out:
        tracemalloc.start()
        out.write(pixels)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        out.abort()
    assert peak_bytes < 6 << 20


def test_check_destination_creates_the_folder_and_leaves_no_trace(tmp_path: Path) -> None:
    check_destination(tmp_path / "a" / "b" / "picture.PNG")
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b"]
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_every_suffix_has_its_writer() -> None:
    assert all(suffix in writer.suffixes for suffix, writer in WRITERS.items())
    assert writer_for(Path("x.PNG")) is PngBand


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_destination(path)
    return str(caught.value)


def test_destinations_that_cannot_work(tmp_path: Path) -> None:
    no_suffix = tmp_path / "picture"
    assert refusal(no_suffix) == (
        f"{no_suffix}: the file name has no suffix to choose a format by; add .png"
    )
    unknown = tmp_path / "picture.jpg"
    assert refusal(unknown) == f"{unknown}: no writer for .jpg files; .png would work"
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert refusal(folder) == f"{folder}: is a folder; give the name of a file"
    (tmp_path / "file").touch()
    below_a_file = tmp_path / "file" / "picture.png"
    hint = "give a name in a folder that you may write to"
    assert refusal(below_a_file) == f"{below_a_file}: cannot be written (file exists); {hint}"
    too_long = tmp_path / f"{'x' * 250}.png"
    assert refusal(too_long) == f"{too_long}: cannot be written (file name too long); {hint}"
    nowhere = Path("/proc/picture.png")
    assert refusal(nowhere).startswith("/proc/picture.png: cannot be written (")
