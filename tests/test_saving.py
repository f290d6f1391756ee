"""Files written by several ranks: the same whoever has which rows, whole or not there at all."""

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.bands import Mesh, Traffic, open_mesh, split_rows
from engine.config import FileSettings, UserError
from engine.output import Target, check_destination, deepzoom, read_metadata, writer_for
from engine.output.deepzoom import DeepZoomWriter
from engine.output.lock import Lock
from engine.output.pixels import halve
from engine.output.seams import find_seams, row_steps
from engine.output.writer import leftovers
from engine.saving import halved, moved_down, preview_path, recut, save
from tests.pictures import (
    READERS,
    by_joining_tiles,
    by_pillow,
    expected,
    pixels_of,
    write_picture,
)
from tests.ranks import run_ranks, started_ranks

EACH = [
    ("picture.png", "uint8", {}),
    ("picture.png", "uint16", {}),
    ("picture.tif", "uint8", {"pyramid": True}),
    ("picture.tif", "uint16", {}),
    ("picture.exr", "float16", {}),
    ("picture.dzi", "uint8", {"tiles": "png"}),
    ("picture.jpg", "uint8", {}),
    ("picture.webp", "uint8", {}),
]


def own_rows(height, mesh, seed=0):
    """Bands that begin anywhere, as uneven as chance has it; every rank has a row."""
    cuts = sorted(random.Random(seed).sample(range(1, height), mesh.size - 1))
    return range([0, *cuts][mesh.rank], [*cuts, height][mesh.rank])


def save_one(mesh, path, pixels, file, rows=None, traffic=None):
    """Each rank saves its own rows of `pixels`."""
    rows = rows or own_rows(len(pixels), mesh)
    target = Target(path, *pixels.shape[:2], str(pixels.dtype), FileSettings(**file))
    own = pixels[rows.start : rows.stop].copy()
    return save(target, mesh, traffic or Traffic(), rows, own, lambda seams: {"prompt": "x"})


def alone() -> Mesh:
    with open_mesh() as mesh:
        return mesh


# --- the same on any number of ranks --------------------------------------------------------------


def save_all(mesh, folder, sizes):
    for height, width in sizes:
        for name, sample, file in EACH:
            place = folder / f"{height}x{width}-{sample}"
            place.mkdir(exist_ok=True)
            save_one(mesh, place / name, pixels_of(height, width, sample), file)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_readers_see_what_the_ranks_had(tmp_path, ranks):
    sizes = [(8, 8), (1000, 24), (1531, 300)]
    run_ranks(ranks, save_all, tmp_path, sizes)
    for height, width in sizes:
        for name, sample, _ in EACH:
            path = tmp_path / f"{height}x{width}-{sample}" / name
            pixels = pixels_of(height, width, sample)
            assert read_metadata(path)["prompt"] == "x"
            for read in READERS[path.suffix, sample]:
                np.testing.assert_array_equal(read(path), expected(path, pixels))
    assert not list(tmp_path.rglob(".*"))


def recut_often(mesh, seed):
    """Each rank's share of random cuts, which must be the picture's rows in blocks."""
    for number in range(40):
        chance = random.Random(seed + number)
        height, multiple = chance.randint(mesh.size, 90), chance.choice([1, 2, 6, 32, 64])
        pixels = pixels_of(height, 3, "uint16", number)
        bands = mesh.gather_objects(own_rows(height, mesh, seed + number))
        rows = bands[mesh.rank]
        cut, chunks = recut(mesh, Traffic(), bands, pixels[rows.start : rows.stop], multiple)
        own = cut[mesh.rank]
        np.testing.assert_array_equal(np.concatenate(chunks), pixels[own.start : own.stop])
        assert [run.start for run in cut] == [0, *(run.stop for run in cut[:-1])]
        assert cut[-1].stop == height
        starts = own.start + np.cumsum([0, *map(len, chunks[:-1])])
        assert all(start % multiple == 0 or start == height for start in starts)
        assert cut == moved_down(bands, multiple)
        assert max(map(len, chunks), default=0) <= max(len(rows), multiple)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_borders_move_down_to_the_next_block(ranks):
    run_ranks(ranks, recut_often, 100 * ranks)


@pytest.mark.parametrize("multiple", [2, 4, 6, 8])
def test_whoever_is_asked_for_rows_has_them(multiple):
    """Through all levels of a pyramid, whatever the height: what is not there never arrives."""
    for ranks in range(1, 9):
        for height in range(ranks, 300):
            bands = split_rows(height, ranks)
            while height > 1:
                cut = moved_down(bands, multiple)
                assert all(new.start >= old.start for old, new in zip(bands, cut, strict=True))
                assert [rows.start for rows in cut] == [0, *(rows.stop for rows in cut[:-1])]
                bands, height = halved(cut), -(-height // 2)
                assert [rows.start for rows in bands] == [0, *(rows.stop for rows in bands[:-1])]
                assert bands[-1].stop == height
                # As many as `halve` makes of a rank's own rows.
                assert [len(rows) for rows in bands] == [-(-len(rows) // 2) for rows in cut]


def save_pyramids(mesh, folder, heights):
    for height in heights:
        rows = split_rows(height // 8, mesh.size)[mesh.rank]
        pixels = pixels_of(height, 8)
        for name, _, file in (EACH[2], EACH[5]):
            path = folder / f"{height}{Path(name).suffix}"
            save_one(mesh, path, pixels, file, range(8 * rows.start, 8 * rows.stop))


@pytest.mark.parametrize("ranks", [3, 5])
def test_pyramids_of_awkward_heights(tmp_path, ranks):
    heights = [3080, 5400, 6000, 6152]
    run_ranks(ranks, save_pyramids, tmp_path, heights)
    for height in heights:
        for suffix in (".tif", ".dzi"):
            path = tmp_path / f"{height}{suffix}"
            for read in READERS[suffix, "uint8"]:
                np.testing.assert_array_equal(read(path), pixels_of(height, 8))


def kept_without_a_copy(mesh):
    pixels = pixels_of(600, 4)
    rows = range(0, 300) if mesh.rank == 0 else range(300, 600)
    own = pixels[rows.start : rows.stop].copy()
    bands, chunks = recut(mesh, Traffic(), mesh.gather_objects(rows), own, 256)
    return np.shares_memory(own, chunks[0]), [len(chunk) for chunk in chunks], bands


def test_a_rank_keeps_its_rows_where_they_are():
    (shared, lengths, bands), (last_shared, last_lengths, _) = run_ranks(2, kept_without_a_copy)
    assert bands == [range(512), range(512, 600)]
    assert shared
    assert last_shared
    assert (lengths, last_lengths) == ([256, 256], [88])


# --- memory ---------------------------------------------------------------------------------------


def resident(field):
    """Bytes of this process's memory now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def grown(mesh, path, sample, file, height, width=6000):
    """By how many times its band each rank grew while it wrote, band included.

    Where a block of the format is larger than a band, that is what counts.
    """
    save_one(mesh, path, pixels_of(600, 512, sample), file)  # what is loaded once
    border = height // 2 + 8
    rows = range(border) if mesh.rank == 0 else range(border, height)
    before = resident("VmRSS")
    own = pixels_of(1, width, sample).repeat(len(rows), 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    target = Target(path, height, width, sample, FileSettings(**file))
    save(target, mesh, Traffic(), rows, own, lambda seams: {})
    block = own.nbytes / len(rows) * writer_for(path).row_multiple
    return (resident("VmHWM") - before) / max(own.nbytes, block)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample", "file"), EACH[:-1])  # a WebP is encoded whole
def test_a_rank_needs_less_than_three_times_its_band(tmp_path, name, sample, file):
    for ratio in run_ranks(2, grown, tmp_path / name, sample, file, 3000):
        assert 0.9 < ratio < 3


@pytest.mark.slow
@pytest.mark.parametrize("which", [2, 5])
def test_a_rank_needs_less_than_three_blocks_where_its_band_is_shorter(tmp_path, which):
    name, sample, file = EACH[which]
    for ratio in run_ranks(2, grown, tmp_path / name, sample, file, 320, 24000):
        assert ratio < 3


# --- whole, or not there --------------------------------------------------------------------------


def is_whole_or_missing(path, pixels):
    """Nothing has the final name that a reader would take for a picture and is not this one."""
    if not path.exists() and not path.with_suffix(".html").exists():
        return "missing"
    for read in READERS[path.suffix, str(pixels.dtype)]:
        np.testing.assert_array_equal(read(path), expected(path, pixels))
    return "whole"


def kill_while_writing(path, pixels, file, delay_s):
    """Start two ranks, wait until they write, and kill both `delay_s` later."""
    with started_ranks(2, save_one, path, pixels, file) as (ranks, _):
        deadline = time.monotonic() + 60
        while not leftovers(path) and not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay_s)
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_whole_file_or_none(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it where the test fails
    chance, outcomes = random.Random(seed), []
    for moment in range(21):
        name, sample, file = EACH[:-1][moment % 7]
        path, pixels = tmp_path / str(moment) / name, pixels_of(1500, 1100, sample, seed=moment)
        path.parent.mkdir()
        kill_while_writing(path, pixels, file, chance.random() * 0.4)
        outcomes.append(is_whole_or_missing(path, pixels))
        # The next run takes away what the killed one has left.
        small = pixels_of(100, 100, sample)
        save_one(alone(), path, small, file)
        assert is_whole_or_missing(path, small) == "whole"
        assert not [left for left in path.parent.iterdir() if left.name.startswith(".")]
    assert "missing" in outcomes, "every kill came too late"


class Killed(BaseException):
    """As a kill, nothing that runs afterwards knows of it."""


def die_at(number, monkeypatch):
    """From the `number`-th rename on, the process that wrote is no more."""
    calls = []
    rename, remove_one = Path.rename, deepzoom.remove

    def counted(path, target):
        calls.append(path)
        if len(calls) >= number:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    monkeypatch.setattr(DeepZoomWriter, "restore", classmethod(lambda cls, path: False))
    monkeypatch.setattr(deepzoom, "remove", lambda path: remove_one(path) if not calls else None)


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("number", range(1, 8))
def test_a_deep_zoom_killed_between_two_names(tmp_path, number, with_old):
    path, old, new = tmp_path / "picture.dzi", pixels_of(600, 40), pixels_of(700, 50, seed=1)
    if with_old:
        write_picture(path, old, tiles="png")
    with pytest.MonkeyPatch.context() as patch:
        die_at(number, patch)
        try:
            write_picture(path, new, tiles="png")
        except Killed:
            whole = False
        else:
            whole = True
    assert whole == (number > (7 if with_old else 4))
    if path.exists() and not whole:
        np.testing.assert_array_equal(by_joining_tiles(path), old)
    DeepZoomWriter.restore(path)
    assert path.exists() == (whole or with_old)
    if path.exists():
        np.testing.assert_array_equal(by_joining_tiles(path), new if whole else old)
    else:
        assert not [name for name in tmp_path.iterdir() if not name.name.startswith(".")]


def test_a_deep_zoom_that_fails_keeps_the_old_picture(tmp_path, monkeypatch):
    path, old = tmp_path / "picture.dzi", pixels_of(600, 40)
    write_picture(path, old, tiles="png")

    def full_disk(target, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deepzoom, "_page", full_disk)
    with pytest.raises(UserError, match="no space left on device"):
        save_one(alone(), path, pixels_of(90, 90, seed=1), {"tiles": "png"})
    np.testing.assert_array_equal(by_joining_tiles(path), old)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_belongs_to_somebody_else_is_not_overwritten(tmp_path):
    path = tmp_path / "mine.dzi"
    (tmp_path / "mine_files").mkdir()
    with pytest.raises(UserError, match=r"mine_files is in the way, and belongs to no .dzi file"):
        check_destination(path)
    (tmp_path / "mine_files").rmdir()
    write_picture(path, pixels_of(8, 8))
    check_destination(path)


def test_two_jobs_write_one_after_the_other(tmp_path):
    """The second waits, and finds nothing to clear up that is not dead."""
    path, first, second = tmp_path / "picture.dzi", pixels_of(600, 600), pixels_of(600, 700, seed=1)
    with ThreadPoolExecutor(2) as jobs:
        done = [
            jobs.submit(save_one, alone(), path, pixels, {"tiles": "png"})
            for pixels in (first, second)
        ]
        assert [job.result() for job in done] == [None, None]
    assert by_joining_tiles(path).shape in ((600, 600, 3), (600, 700, 3))
    assert len(list(tmp_path.iterdir())) == 3


def test_who_waits_too_long_is_told(tmp_path):
    with Lock(tmp_path / "a.png") as held, Lock(tmp_path / "a.png") as other:
        held.acquire(0)
        with pytest.raises(UserError, match="another job has been writing it for 0 s; wait for"):
            other.acquire(0.3)
    with Lock(tmp_path / "a.png") as again:
        again.acquire(0)
    assert list(tmp_path.iterdir()) == []


def test_what_an_interrupted_run_has_left_is_named_and_removed(tmp_path, caplog):
    path = tmp_path / "picture.png"
    part = writer_for(path)(Target(path, 8, 8, token="0badc0de"), 3)
    part.write(range(8), pixels_of(8, 8))
    part.close()
    bystander = tmp_path / ".picture.png.notes"
    bystander.touch()
    save_one(alone(), path, pixels_of(8, 8), {})
    (message,) = [said for said in caplog.messages if "removed" in said]
    assert message.endswith(f"left: {tmp_path / '.picture.png.0badc0de.part-0003-0'}")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".picture.png.notes", "picture.png"]


def save_where_there_is_no_room(mesh, folder):
    """What each format's failure says, and what is left."""
    said = []
    for name, sample, file in EACH:
        pixels = np.random.default_rng(0).random((1024, 1000, 3))
        pixels = (pixels * 255).astype(sample)
        try:
            save_one(mesh, folder / name, pixels, file)
        except UserError as error:
            mesh.barrier()  # until every rank has cleared up
            said.append((str(error), [f.name for f in folder.iterdir()]))
        mesh.barrier()
    return said


def test_a_full_disk_is_one_sentence_on_every_rank_and_leaves_nothing(small_disk):
    said = run_ranks(2, save_where_there_is_no_room, small_disk)
    assert said[0] == said[1]
    assert len(said[0]) == len(EACH)
    for (name, _, _), (sentence, left) in zip(EACH, said[0], strict=True):
        assert sentence.startswith(f"{small_disk / name}: writing failed (")
        assert sentence.endswith("); free some space or name another folder")
        assert left == []


# --- previews -------------------------------------------------------------------------------------


def save_with_previews(mesh, folder):
    for sample, name in (("uint8", "a.png"), ("uint16", "b.png"), ("float16", "c.exr")):
        pixels = np.zeros((64, 4104, 3), sample)
        top = 1 if sample == "float16" else np.iinfo(sample).max
        pixels[:, 2052:] = np.array([0.25, 0.5, 1.0]) * top
        save_one(mesh, folder / name, pixels, {})
    save_one(mesh, folder / "small.png", pixels_of(8, 4096), {})


def test_a_large_picture_has_a_preview_beside_it(tmp_path):
    run_ranks(3, save_with_previews, tmp_path)
    as_srgb = {"a.png": (64, 128, 255), "b.png": (64, 128, 255), "c.exr": (137, 188, 255)}
    for name, colour in as_srgb.items():
        preview = by_pillow(preview_path(tmp_path / name))
        assert preview.shape == (16, 1024, 3)
        assert np.abs(preview[:, 600:].astype(int) - colour).max() <= 3
        assert preview[:, :400].max() <= 3
        assert read_metadata(preview_path(tmp_path / name))["prompt"] == "x"
    assert not preview_path(tmp_path / "small.png").exists()


def test_a_preview_that_cannot_be_written_costs_no_picture(tmp_path, caplog):
    path, pixels = tmp_path / "picture.png", pixels_of(8, 4104)
    preview_path(path).mkdir()
    save_one(alone(), path, pixels, {})
    np.testing.assert_array_equal(by_pillow(path), pixels)
    assert f"{preview_path(path)}: no preview" in caplog.text


# --- seams ----------------------------------------------------------------------------------------


def landscape(height=512, width=384):
    """A shipped landscape, enlarged, with some grain."""
    picture = Image.open(Path(__file__).parents[1] / "docs" / "demo.png").convert("RGB")
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    grain = np.random.default_rng(0).normal(0, 1, pixels.shape)
    return np.clip(pixels + grain, 0, 255).round().astype(np.uint8)


def test_a_seam_is_seen_and_a_picture_without_one_is_not_suspected():
    pixels = landscape()
    borders = [128, 256, 384]
    assert not find_seams(row_steps(pixels), borders).visible
    shifted = pixels.astype(int)
    shifted[256:] += 12
    seamed = np.clip(shifted, 0, 255).astype(np.uint8)
    found = find_seams(row_steps(seamed), borders)
    assert found.visible
    assert not find_seams(row_steps(seamed), [128, 384]).visible
    assert "at 3 band borders rows differ at most" in str(found)


@pytest.mark.parametrize("count", [1, 7, 15])
def test_false_alarms_are_as_rare_as_said(count):
    """Borders where there are none, in a picture with edges of its own: one alarm in twenty."""
    steps, chance = row_steps(landscape(1024, 768)), random.Random(0)
    alarms = [
        find_seams(steps, sorted(chance.sample(range(1, 1024), count))).visible for _ in range(200)
    ]
    assert sum(alarms) <= 10


def test_the_same_seams_in_any_type_of_numbers():
    pixels = landscape()
    steps = row_steps(pixels)
    np.testing.assert_allclose(row_steps(pixels.astype("uint16") * 257), steps, rtol=1e-4)
    np.testing.assert_allclose(row_steps((pixels / 255).astype("float16")), steps, atol=0.1)


def test_flat_and_tiny_pictures_have_no_seams():
    assert not find_seams(row_steps(np.zeros((64, 8, 3), "uint8")), [32]).visible
    assert find_seams(row_steps(np.zeros((64, 8, 3), "uint8")), []) is None
    assert find_seams(row_steps(np.zeros((2, 8, 3), "uint8")), [1]) is None
    assert find_seams(row_steps(np.zeros((3, 8, 3), "uint8")), [1]).largest == 1


def seams_on_ranks(mesh, folder):
    pixels = landscape()
    return save_one(mesh, folder / "picture.png", pixels, {}), own_rows(len(pixels), mesh).start


def test_ranks_find_the_seams_of_the_whole_picture(tmp_path):
    results = run_ranks(3, seams_on_ranks, tmp_path)
    borders = [start for _, start in results[1:]]
    assert all(seams == find_seams(row_steps(landscape()), borders) for seams, _ in results)


def test_halves_of_no_rows():
    assert halve(np.zeros((0, 6, 3), "uint8")).shape == (0, 3, 3)
