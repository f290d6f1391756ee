"""Every format against independent readers, which must see the very pixels that went in."""

import os
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.config import FileSettings, UserError
from engine.output import (
    WRITERS,
    Target,
    check,
    check_destination,
    deflate,
    png,
    read_metadata,
    writer,
    writer_for,
)
from engine.output.deflate import adler32_combine
from engine.output.pixels import halve
from engine.output.png import PngWriter, sub_filter, text_chunk
from tests.pictures import (
    METADATA,
    READERS,
    by_joining_tiles,
    by_oiio,
    by_pillow,
    by_pyvips,
    expected,
    join_tiles,
    pixels_of,
    tiles_folder,
    write_picture,
)

FEW = settings(max_examples=25, deadline=None)
LOSSLESS = {".dzi": {"tiles": "png"}}
FORMATS = list(READERS)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a test may leave nothing but finished pictures."""
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- what all formats have in common --------------------------------------------------------------


@FEW
@pytest.mark.parametrize(("suffix", "sample"), FORMATS)
@given(data=st.data())
def test_readers_see_the_very_pixels(suffix: str, sample: str, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 90))
    # The same cut twice makes a band without rows.
    cuts = data.draw(st.lists(st.integers(0, height), max_size=4))
    pixels = pixels_of(height, width, sample, data.draw(st.integers(0, 99)))
    with TemporaryDirectory() as name:
        path = Path(name) / f"picture{suffix}"
        write_picture(path, pixels, cuts, data.draw(st.integers(1, 3)), **LOSSLESS.get(suffix, {}))
        assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]
        for read in READERS[suffix, sample]:
            np.testing.assert_array_equal(read(path), expected(path, pixels), read.__name__)


@pytest.mark.parametrize(("suffix", "sample"), FORMATS)
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (8, 1009), (1337, 8)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks(
    folder: Path, suffix: str, sample: str, size: tuple[int, int], ranks: int
) -> None:
    path, pixels = folder / f"picture{suffix}", pixels_of(*size, sample)
    cuts = [size[0] * rank // ranks for rank in range(1, ranks)]
    write_picture(path, pixels, cuts, **LOSSLESS.get(suffix, {}))
    for read in READERS[suffix, sample]:
        np.testing.assert_array_equal(read(path), expected(path, pixels))


@pytest.mark.parametrize(
    ("suffix", "sample"), [key for key in FORMATS if key[0] not in (".jpg", ".webp")]
)
@pytest.mark.parametrize("size", [(8, 2**16 + 8), (2**16 + 8, 8)])
def test_sides_beyond_16_bits(
    folder: Path, suffix: str, sample: str, size: tuple[int, int]
) -> None:
    path, pixels = folder / f"picture{suffix}", pixels_of(*size, sample)
    write_picture(path, pixels, [size[0] // 3], **LOSSLESS.get(suffix, {}))
    for read in READERS[suffix, sample]:
        np.testing.assert_array_equal(read(path), pixels)


@pytest.mark.parametrize("suffix", WRITERS)
def test_metadata_in_any_script(folder: Path, suffix: str) -> None:
    path = folder / f"picture{suffix}"
    sample = writer_for(path).samples[min(writer_for(path).samples)]
    write_picture(path, pixels_of(4, 4, sample), [2], metadata=METADATA)
    found = read_metadata(path)
    assert found["prompt"] == METADATA["prompt"]
    as_text = '{"settings": {"seed": 3}, "run": {"ranks": null}}'
    assert found["linfusion-engine"] in (METADATA["linfusion-engine"], as_text)


@pytest.mark.parametrize("suffix", WRITERS)
def test_texts_that_do_not_fit_never_cost_a_painted_picture(folder: Path, suffix: str) -> None:
    path = folder / f"picture{suffix}"
    sample = writer_for(path).samples[min(writer_for(path).samples)]
    text = "zero \0, surrogate \udcff, " + 70_000 * "long "
    write_picture(path, pixels_of(4, 4, sample), metadata={"prompt": text})
    found = read_metadata(path)["prompt"]
    assert (len(found), found[-5:]) == (len(text), "long ")


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_is_no_picture_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    with pytest.raises(UserError, match=r"cannot be read \(no such file or directory\)"):
        read_metadata(path)
    for content in (b"", b"no picture at all, but a text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read \(.*\); give a picture of this"):
            read_metadata(path)


def begin(path: Path, sample: str = "uint8", height: int = 1024, width: int = 4):
    return writer_for(path)(Target(path, height, width, sample), 0)


def fail_after_close(part, pixels: np.ndarray) -> None:
    with part:
        part.write(range(1024), pixels)
        part.close()
        raise InterruptedError


@pytest.mark.parametrize(("suffix", "sample"), FORMATS)
def test_what_is_not_finished_leaves_nothing(folder: Path, suffix: str, sample: str) -> None:
    path, pixels = folder / f"picture{suffix}", pixels_of(1024, 4, sample)
    with begin(path, sample) as part:
        part.write(range(1024), pixels)
    part = begin(path, sample)
    with pytest.raises(InterruptedError):
        fail_after_close(part, pixels)
    part = begin(path, sample)
    part.write(range(512), pixels[:512])
    part.abort()
    part.abort()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("suffix", "sample"), FORMATS)
def test_gaps_and_overlaps_are_refused_and_leave_nothing(
    folder: Path, suffix: str, sample: str
) -> None:
    path, pixels = folder / f"picture{suffix}", pixels_of(1024, 4, sample)
    target = Target(path, 1024, 4, sample)
    kind = writer_for(path)
    for bands in ([range(512)], [range(512), range(512)], [range(512, 1024)]):
        parts = [kind(target, index) for index in range(len(bands))]
        for part, rows in zip(parts, bands, strict=True):
            part.write(rows, pixels[rows.start : rows.stop])
        summaries = [part.close() for part in parts]
        with pytest.raises(ValueError, match="the parts leave gaps or overlap"):
            kind.assemble(target, summaries, {})
        for part in parts:
            part.abort()
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "band", "message"),
    [
        (range(1), np.zeros((1, 4, 3), "float32"), r"must be uint8 \[1, 4, 3\], not float32"),
        (range(1), np.zeros((1, 5, 3), "uint8"), r"must be uint8 \[1, 4, 3\], not uint8 \[1, 5"),
        (range(1), np.zeros((4, 3), "uint8"), r"must be uint8 \[1, 4, 3\], not uint8 \[4, 3\]"),
        (range(1020, 1030), np.zeros((10, 4, 3), "uint8"), "are no rows of level 0"),
        (range(512, 768), np.zeros((256, 4, 3), "uint8"), r"do not follow range\(0, 256\)"),
        (range(256, 300), np.zeros((44, 4, 3), "uint8"), "do not begin and end on multiples"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    folder: Path, rows: range, band: np.ndarray, message: str
) -> None:
    with begin(folder / "picture.tif") as part:
        part.write(range(256), np.zeros((256, 4, 3), "uint8"))
        with pytest.raises(ValueError, match=message):
            part.write(rows, band)


@pytest.mark.parametrize(("suffix", "sample"), FORMATS)
def test_the_name_comes_last_and_only_once_all_is_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, sample: str
) -> None:
    path = folder / f"picture{suffix}"
    there: list[bool] = []
    really = os.fsync

    def fsync(file: int) -> None:
        there.append(path.exists())
        really(file)

    monkeypatch.setattr(writer.os, "fsync", fsync)
    write_picture(path, pixels_of(600, 40, sample), [300])
    # Before the last rename, and after it the folder's.
    assert there[-1]
    assert not any(there[:-1])


@pytest.mark.parametrize(("suffix", "sample"), [key for key in FORMATS if key[0] != ".dzi"])
@pytest.mark.parametrize("fails", ["a part is gone", "fsync"])
def test_a_failing_assemble_keeps_the_old_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str, suffix: str, sample: str
) -> None:
    path, pixels = folder / f"picture{suffix}", pixels_of(1024, 4, sample)
    path.write_bytes(b"the old picture")
    target, kind = Target(path, 1024, 4, sample), writer_for(path)
    parts = []
    for index, rows in enumerate([range(512), range(512, 1024)]):
        part = kind(target, index)
        part.write(rows, pixels[rows.start : rows.stop])
        parts.append(part.close())
    if fails == "fsync":

        def full_disk(_: int) -> None:
            raise OSError("no space")

        monkeypatch.setattr(writer.os, "fsync", full_disk)
    else:
        parts[1].files[0].unlink()
    with pytest.raises(OSError, match=r"."):
        kind.assemble(target, parts, {})
    assert path.read_bytes() == b"the old picture"
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("suffix", "sample"), [key for key in FORMATS if key[0] not in (".webp", ".dzi")]
)
def test_parts_are_removed_as_they_are_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, sample: str
) -> None:
    """So the disk need not hold the picture twice."""
    at_fsync: list[list[str]] = []
    monkeypatch.setattr(
        writer.os, "fsync", lambda _: at_fsync.append(sorted(f.name for f in folder.iterdir()))
    )
    write_picture(folder / f"picture{suffix}", pixels_of(1024, 4, sample), [256, 512])
    assert at_fsync[0] == [f".picture{suffix}.00000000.tmp"]


def test_writing_needs_memory_for_blocks_not_for_bands(folder: Path) -> None:
    pixels = pixels_of(4096, 1024, "uint16")  # 25 MB
    for suffix in (".png", ".tif"):
        with begin(folder / f"picture{suffix}", "uint16", *pixels.shape[:2]) as part:
            tracemalloc.start()
            part.write(range(4096), pixels)
            _, peak_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak_bytes < 6 << 20, suffix


def test_either_deflate_makes_files_that_all_can_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pixels_of(300, 70, "uint16")
    assert deflate.library() is not zlib, "the tests need the extra `fast`"
    monkeypatch.setattr(deflate, "library", lambda: zlib)
    for name in ("picture.png", "picture.tif"):
        write_picture(folder / name, pixels, [100, 200])
        np.testing.assert_array_equal(by_pyvips(folder / name), pixels)


# --- PNG ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["uint8", "uint16"])
def test_parts_of_many_blocks_and_chunks(
    folder: Path, sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "_BLOCK_BYTES", 30_000)
    pixels = pixels_of(900, 1001, sample)
    write_picture(folder / "picture.png", pixels, [1, 433, 899], step=500)
    np.testing.assert_array_equal(by_pyvips(folder / "picture.png"), pixels)


def test_the_file_is_valid_to_the_byte(folder: Path) -> None:
    """Walks the chunks as the specification has them, with zlib's own checks for the rest."""
    path, pixels = folder / "picture.png", pixels_of(9, 5)
    write_picture(path, pixels, [2, 2, 9], metadata={"Title": "x"})
    data, kinds, stream, at = path.read_bytes(), [], b"", 8
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size]) == zlib.crc32(kind + body)
        kinds.append(kind)
        stream += body if kind == b"IDAT" else b""
        at += 12 + size
    assert kinds[:2] == [b"IHDR", b"iTXt"]
    assert set(kinds[2:-1]) == {b"IDAT"}
    assert kinds[-1] == b"IEND"
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


def test_pillow_reads_a_pngs_texts(folder: Path) -> None:
    write_picture(folder / "picture.png", pixels_of(4, 4))
    with Image.open(folder / "picture.png") as image:
        image.load()
        assert image.text["prompt"] == METADATA["prompt"]


@pytest.mark.parametrize("keyword", ["", "k" * 80, "a\0b", "雪"])
def test_keywords_that_png_does_not_have(keyword: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        text_chunk(keyword, "text")


# --- TIFF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["uint8", "uint16"])
def test_a_tiffs_pyramid(folder: Path, sample: str) -> None:
    path, pixels = folder / "picture.tif", pixels_of(1100, 777, sample)
    write_picture(path, pixels, [300, 800], pyramid=True)
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        (series,) = file.series
        sizes = [level.shape[:2] for level in series.levels]
        assert sizes == [(1100, 777), (550, 389), (275, 195), (138, 98)]
        for level in series.levels:
            np.testing.assert_array_equal(level.asarray(), pixels)
            pixels = halve(pixels)
    assert by_pyvips(path).shape == (1100, 777, 3)


# --- OpenEXR --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["piz", "zip"])
@pytest.mark.parametrize("cuts", [[], [32, 64], [32, 32, 96]])
def test_openexrs_own_library_reads_it(folder: Path, compression: str, cuts: list[int]) -> None:
    import OpenEXR

    path, pixels = folder / "picture.exr", pixels_of(117, 61, "float16")
    write_picture(path, pixels, cuts, compression=compression)
    file = OpenEXR.File(str(path))
    np.testing.assert_array_equal(file.channels()["RGB"].pixels, pixels)
    header = file.header()
    assert header["prompt"] == METADATA["prompt"]
    assert [tuple(map(int, end)) for end in header["displayWindow"]] == [(0, 0), (60, 116)]
    np.testing.assert_array_equal(by_oiio(path), pixels)


def test_slabs_of_an_exr_are_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.output.exr._SLAB_BYTES", 64 * 6 * 10)
    pixels = pixels_of(300, 10, "float16")
    write_picture(folder / "picture.exr", pixels, [96])
    np.testing.assert_array_equal(by_oiio(folder / "picture.exr"), pixels)


# --- Deep Zoom ------------------------------------------------------------------------------------


def test_each_level_is_half_of_the_one_above(folder: Path) -> None:
    path, pixels = folder / "picture.dzi", pixels_of(1337, 1100)
    write_picture(path, pixels, [500, 1000], tiles="png")
    for level in range(11, -1, -1):
        np.testing.assert_array_equal(join_tiles(path, level), pixels)
        pixels = halve(pixels)
    assert {f.name for f in tiles_folder(path).iterdir()} == {str(level) for level in range(12)}
    assert sorted(f.name for f in folder.iterdir()) == [
        "picture.dzi", "picture.html", "picture_files",
    ]  # fmt: skip


def test_tiles_are_jpegs_by_default(folder: Path) -> None:
    path = folder / "picture.dzi"
    smooth = np.broadcast_to(np.linspace(0, 255, 700).astype("uint8")[None, :, None], (600, 700, 3))
    write_picture(path, np.ascontiguousarray(smooth), [100])
    assert {f.suffix for f in tiles_folder(path).rglob("*_*")} == {".jpg"}
    assert np.abs(by_joining_tiles(path).astype(int) - smooth).max() < 4


def test_a_new_picture_of_the_same_name_takes_all_places(folder: Path) -> None:
    path = folder / "picture.dzi"
    write_picture(path, pixels_of(1100, 1100), tiles="png")
    small = pixels_of(40, 30, seed=1)
    write_picture(path, small, tiles="png")
    np.testing.assert_array_equal(by_joining_tiles(path), small)
    assert len(list(tiles_folder(path).iterdir())) == 7


def test_the_page_holds_all_that_it_needs(folder: Path) -> None:
    write_picture(folder / "picture.dzi", pixels_of(40, 30))
    page = (folder / "picture.html").read_text()
    assert page.count("</script>") == page.count("<script")
    assert '"width": 30, "height": 40' in page
    assert "http" not in page.replace("http-equiv", "")


# --- JPEG and WebP --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_quality_is_heeded(folder: Path, suffix: str) -> None:
    pixels, sizes = pixels_of(130, 64), []
    for quality in (30, 90):
        write_picture(folder / f"picture{suffix}", pixels, [64], quality=quality)
        sizes.append((folder / f"picture{suffix}").stat().st_size)
    assert sizes[0] < sizes[1] / 2
    assert by_pillow(folder / f"picture{suffix}").shape == (130, 64, 3)


# --- halves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["uint8", "uint16", "float16"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 7), (513, 6), (600, 3)])
def test_halves_are_means_rounded_to_nearest(sample: str, size: tuple[int, int]) -> None:
    pixels = pixels_of(*size, sample)
    grown = np.pad(pixels, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
    total = grown.astype(float).reshape(grown.shape[0] // 2, 2, grown.shape[1] // 2, 2, 3)
    mean = total.mean((1, 3))
    half = halve(pixels).astype(float)
    assert half.shape == mean.shape
    assert np.abs(half - mean).max() <= (0.5 if sample != "float16" else 5e-4)


# --- what cannot work -----------------------------------------------------------------------------


def test_check_destination_creates_the_folder_and_leaves_no_trace(tmp_path: Path) -> None:
    check_destination(tmp_path / "a" / "b" / "picture.PNG")
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b"]
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_every_suffix_has_its_writer() -> None:
    assert all(suffix in writer.suffixes for suffix, writer in WRITERS.items())
    assert writer_for(Path("x.PNG")) is PngWriter


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_destination(path)
    return str(caught.value)


def test_destinations_that_cannot_work(tmp_path: Path) -> None:
    known = ".png, .tif, .tiff, .exr, .dzi, .jpg, .jpeg or .webp"
    no_suffix = tmp_path / "picture"
    assert refusal(no_suffix) == (
        f"{no_suffix}: the file name has no suffix to choose a format by; add {known}"
    )
    unknown = tmp_path / "picture.bmp"
    assert refusal(unknown) == f"{unknown}: no writer for .bmp files; {known} would work"
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


@pytest.mark.parametrize(
    ("name", "side", "file", "sentence"),
    [
        ("a.jpg", 8, {"bits": "16"}, "file.bits: a .jpg file has 8 bits, not 16; leave it out, or "
         "name a .png or .tif or .tiff or .exr file"),
        ("a.exr", 8, {"bits": "8"}, "file.bits: a .exr file has 16 bits, not 8; leave it out"),
        ("a.png", 8, {"quality": 80}, "file.quality has no effect on .png files; leave it out, or "
         "name a .dzi or .jpg or .jpeg or .webp file"),
        ("a.dzi", 8, {"tiles": "png", "bits": "16"}, "file.bits: a .dzi file has 8 bits, not 16"),
        ("a.png", 8, {"pyramid": True}, "file.pyramid has no effect on .png files"),
        ("a.jpg", 65504, {}, "a.jpg: a .jpg file has at most 65500 px a side, and the picture is "
         "8x65504 px; .png, .tif or .dzi would work"),
        ("a.webp", 16384, {}, "a.webp: a .webp file has at most 16383 px a side"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_do_is_refused(
    name: str, side: int, file: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(Path(name), side, 8, FileSettings.model_validate(file))
    assert str(caught.value).startswith(sentence)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.output.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'linfusion-engine\[exr\]'"):
        check(Path("a.exr"), 8, 8, FileSettings())
