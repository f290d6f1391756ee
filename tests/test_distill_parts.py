"""The parts of a distillation, each by itself: what whole runs (`test_distill`) do not pin down."""

import io
import json
import math
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from engine import linfusion
from engine.bands import Mesh
from engine.config import UserError
from engine.demo.data import BUCKETS
from engine.demo.unet import CLOSE_UP_NOISE
from engine.distill import landscapes, latents, progress
from engine.distill.backends import Replicas, kept_state
from engine.distill.buckets import cut, nearest, shapes_of
from engine.distill.draws import draw, draw_shape, shares
from engine.distill.evaluation import Evaluator
from engine.distill.latents import Entry, encode_all, read_set, say_broken
from engine.distill.lessons import build_lesson
from engine.distill.metrics import frechet_distance, load_clip, load_inception, psnr, ssim
from engine.distill.progress import Distilling, Meter, listener_of
from engine.distill.records import Curve, Record
from engine.distill.settings import DataSettings, EvaluationSettings, LossSettings
from engine.distill.sources import Broken, Sample, open_source, read_picture
from engine.distill.student import (
    Answer,
    Distiller,
    Lesson,
    answer,
    attentions,
    build_student,
    learning,
    losses,
)
from engine.distill.teacher import (
    Conditions,
    Teacher,
    describe_teacher,
    load_teacher,
    require_teachable,
    sizes_of,
)
from engine.progress import DIALECTS
from tests import families
from tests.families import image_processor
from tests.models import byte_tokenizer
from tests.ranks import run_ranks
from tests.students import encode_on, save_pictures, save_teacher

ALONE = Mesh(0, 1, torch.device("cpu"), None)
pytestmark = pytest.mark.usefixtures("one_thread")
quick = hypothesis_settings(max_examples=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a teacher of SD-1.5's kind."""
    return save_teacher("sd15", tmp_path_factory.mktemp("teacher") / "sd15")


@pytest.fixture(scope="module")
def teacher(model):
    return load_teacher(str(model), torch.device("cpu"), torch.float32)


def teacher_of(pipe) -> Teacher:
    """A pipeline of `tests.families` as a teacher, in fp32."""
    pipe.to(torch.float32)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    return Teacher(pipe, schedule, torch.device("cpu"), torch.float32)


def one_sentence(raised: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- buckets --------------------------------------------------------------------------------------


@quick
@given(st.integers(8, 200), st.integers(8, 200), st.floats(1, 8))
def test_shapes_are_multiples_of_about_the_same_area(side, multiple, aspect):
    shapes = shapes_of(side, multiple, aspect)
    assert bool(shapes) == (multiple <= side)
    assert shapes == sorted(set(shapes))
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert height * width <= side**2
        assert max(height, width) <= aspect * min(height, width)
        assert (width, height) in shapes


def test_shapes_are_the_widest_of_their_height():
    assert shapes_of(512, 64, 2.0) == [
        *[(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    ]
    assert shapes_of(512, 64, 1.0) == [(512, 512)]
    assert shapes_of(100, 64, 1.0) == [(64, 64)]  # 64 x 128 would be too long


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([64, 96, 256, 1000]))
def test_the_nearest_shape_has_the_nearest_aspect(height, width, side):
    shapes = shapes_of(side, 32, 3.0)

    def stretch(shape):
        return abs(math.log(shape[0] / shape[1] / (height / width)))

    found = nearest(shapes, height, width)
    assert found in shapes
    assert stretch(found) <= min(map(stretch, shapes)) + 1e-5


def test_of_shapes_of_one_aspect_the_largest_is_taken():
    assert nearest([(64, 128), (128, 256), (32, 64)], 10, 20) == (128, 256)


@quick
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(8, 64), (64, 64), (96, 40)]))
def test_a_cut_has_its_shape_and_lies_in_the_scaled_picture(height, width, shape):
    made = cut(Image.new("RGB", (width, height)), shape)
    assert (made.picture.height, made.picture.width) == shape
    for corner, side, scaled in zip(made.corner, shape, made.scaled, strict=True):
        assert corner >= 0
        assert corner + side <= scaled
        assert abs(scaled - side - 2 * corner) <= 1  # the middle
    assert shape[0] == made.scaled[0] or shape[1] == made.scaled[1]  # no more than covers it
    assert abs(made.scaled[0] * width - made.scaled[1] * height) <= 0.5 * max(width, height)


@pytest.mark.parametrize("size", [(200, 64), (400, 128), (64, 200), (33, 97)])
def test_a_cut_is_the_middle_of_the_scaled_picture(size):
    width, height = size
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size)
    made = cut(picture, (64, 64))
    scaled = picture.resize(made.scaled[::-1], Image.Resampling.LANCZOS)
    top, left = made.corner
    expected = np.asarray(scaled.crop((left, top, left + 64, top + 64))).astype(int)
    found = np.asarray(made.picture).astype(int)
    assert np.abs(found - expected).max() <= 2
    # A mark in the middle stays there.
    picture.paste("red", (width // 2 - 4, height // 2 - 4, width // 2 + 4, height // 2 + 4))
    found = np.asarray(cut(picture, (64, 64)).picture).astype(int)
    rows, columns = np.nonzero((found[..., 0] > 240) & (found[..., 1:] < 16).all(-1))
    assert rows.mean() == pytest.approx(31.5, abs=1.5)
    assert columns.mean() == pytest.approx(31.5, abs=1.5)


def test_a_line_of_a_picture_does_not_fill_the_memory():
    """Scaled as a whole it would have 64 x 2,560,000 px."""
    made_of, picture = [], Image.new("RGB", (1, 40_000), "red")
    own = picture.resize
    picture.resize = lambda size, *more: made_of.append(size) or own(size, *more)
    made = cut(picture, (64, 64))
    assert made.picture.getpixel((9, 9)) == (255, 0, 0)
    assert made.scaled == (2_560_000, 64)
    assert made_of == [(64, 64)]


# --- draws ----------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 70), st.integers(1, 9), st.none() | st.integers(1, 9))
def test_every_picture_of_a_step_counts_once(count, ranks, micro):
    given_out = [shares(count, rank, ranks, micro) for rank in range(ranks)]
    counted = [
        index
        for parts in given_out
        for share in parts
        for index, weight in zip(share.indices, share.weights, strict=True)
        if weight
    ]
    assert sorted(counted) == list(range(count))
    everyone = [share for parts in given_out for share in parts]
    assert {weight for share in everyone for weight in share.weights} <= {0.0, 1.0}
    assert len({len(parts) for parts in given_out}) == 1  # as many exchanges on every rank
    assert all(1 <= len(share.indices) <= (micro or count) for share in everyone)
    assert all(index < count for share in everyone for index in share.indices)
    if micro is None:
        assert len(given_out[0]) == 1


def facts(drawn) -> tuple[float, ...]:
    return drawn.pick, drawn.time, drawn.wording, *drawn.noise(torch.Size([3])).tolist()


@quick
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 100))
def test_a_draw_depends_on_its_numbers_alone(seed, step, index):
    expected = facts(draw(seed, step, index, 0.1))
    others = [(seed, step + 1, index), (seed, step, index + 1), (seed + 1, step, index)]
    others += [(seed, index, step)] if step != index else []
    assert all(set(facts(draw(*other, 0.1))).isdisjoint(expected) for other in others)
    torch.rand(7)
    assert facts(draw(seed, step, index, 0.1)) == expected
    assert all(0 <= share < 1 for share in expected[:3])


def test_captions_are_left_out_as_often_as_asked_for():
    left_out = [draw(0, step, 0, 0.1).left_out for step in range(4000)]
    assert np.mean(left_out) == pytest.approx(0.1, abs=0.015)
    assert not any(draw(0, step, 0, 0.0).left_out for step in range(100))


def test_noise_is_standard_normal_and_the_same_again():
    noise = draw(3, 5, 7, 0.0).noise(torch.Size([4, 64, 64]))
    assert torch.equal(noise, draw(3, 5, 7, 0.0).noise(noise.shape))
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def test_every_picture_is_drawn_as_often_as_any_other():
    """A shape of which a step takes a quarter as many is drawn four times as often."""
    counts = {(64, 64): 30, (128, 128): 60, (64, 96): 10}
    taken = {(64, 64): 8, (128, 128): 2, (64, 96): 8}
    drawn = [draw_shape(0, step, counts, lambda h, w: taken[h, w]) for step in range(4000)]
    seen = {shape: drawn.count(shape) * taken[shape] for shape in counts}
    for shape, count in counts.items():
        assert seen[shape] / sum(seen.values()) == pytest.approx(count / 100, abs=0.03)
    assert drawn[17] == draw_shape(0, 17, counts, lambda h, w: taken[h, w])


# --- sources --------------------------------------------------------------------------------------

SOFT = Image.fromarray(np.arange(40 * 24 * 3).reshape(40, 24, 3).astype(np.uint8))


def encoded(picture=SOFT, kind="PNG", **options) -> bytes:
    with io.BytesIO() as out:
        picture.save(out, kind, **options)
        return out.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be looked at turned by 90 degrees
    return encoded(kind="JPEG", exif=exif, quality=95)


# name -> bytes, of pictures with captions unless they say otherwise
FILES = {
    "a.png": encoded(),
    "a.txt": b"one\n\n  two  \r\nthree\n",
    "deep/er.v1/b.JPG": turned(),
    "deep/er.v1/b.TXT": "\ufeffcaf\xe9".encode(),
    "deep/c.jpg": encoded(kind="JPEG")[:-300],
    "deep/c.txt": b"cut",
    "d.png": b"no picture but text",
    "d.txt": b"text",
    "e.webp": encoded(kind="WEBP"),
    "f.png": encoded(),
    "f.txt": b" \n\r\n",
    "g.b.png": encoded(),
    "g.b.txt": b"dots",
    "g.b.json": b'{"caption": "not this"}',
    "h.tif": encoded(SOFT.convert("CMYK"), "TIFF"),
    "h.txt": b"ink",
}


def check_read(found: dict[str, Sample | Broken], prefix: str = "") -> None:
    """That `FILES` came to what they should."""
    found = {name.removeprefix(prefix): sample for name, sample in found.items()}
    broken = {name: one.reason for name, one in found.items() if isinstance(one, Broken)}
    truncated = broken.pop("deep/c.jpg")
    assert "truncated" in truncated or "broken" in truncated
    assert broken == {"d.png": "no picture", "e.webp": "no caption", "f.png": "no caption"}
    whole = {name.lower(): one for name, one in found.items() if isinstance(one, Sample)}
    assert {name: one.captions for name, one in whole.items()} == {
        "a.png": ["one", "two", "three"],
        "deep/er.v1/b.jpg": ["caf\xe9"],
        "g.b.png": ["dots"],
        "h.tif": ["ink"],
    }
    assert {one.picture.mode for one in whole.values()} == {"RGB"}
    assert whole["a.png"].picture.size == (24, 40)
    assert whole["deep/er.v1/b.jpg"].picture.size == (40, 24)
    assert all(one.below == 1.0 for one in whole.values())


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(file: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def read_all(source: str) -> dict[str, Sample | Broken]:
    opened = open_source(DataSettings(source=source))
    found = [sample for unit in opened.units() for sample in opened.read(unit)]
    named = {sample.name: sample for sample in found}
    assert len(named) == len(found)
    return named


def test_a_folder_is_read_with_all_that_is_odd_in_it(tmp_path):
    write_files(tmp_path, FILES)
    (tmp_path / "a folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    found = read_all(str(tmp_path))
    assert found.pop("gone.png") == Broken("gone.png", "No such file or directory")
    check_read(found)


@pytest.mark.parametrize("order", [list, reversed])
def test_tar_files_are_read_alike(tmp_path, order):
    """Members of one name are next to each other, in either order."""
    write_tar(tmp_path / "x.tar", {name: FILES[name] for name in order(list(FILES))})
    check_read(read_all(str(tmp_path / "*.tar")), "x.tar/")


def test_units_of_a_folder_are_its_pictures_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.distill.sources.UNIT", 3)
    save_pictures(tmp_path, 7)
    source = open_source(DataSettings(source=str(tmp_path)))
    units = source.units()
    assert [unit.name for unit in units] == ["000000", "000001", "000002"]
    names = [[sample.name for sample in source.read(unit)] for unit in units]
    assert names == [[f"{n:03d}.png" for n in part] for part in ([0, 1, 2], [3, 4, 5], [6])]
    json.dumps([unit.facts for unit in units])


def test_a_tar_file_that_is_cut_gives_what_is_whole(tmp_path):
    pairs = {f"{n}.{suffix}": content for n in range(3)
             for suffix, content in (("png", encoded()), ("txt", b"words"))}  # fmt: skip
    whole = write_tar(tmp_path / "whole.tar", pairs).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmember("2.png").offset_data
    (tmp_path / "cut.tar").write_bytes(whole[: last + 100])
    (tmp_path / "noise.tar").write_bytes(b"\x07" * 2000)
    (tmp_path / "empty.tar").write_bytes(b"")
    found = read_all(str(tmp_path / "*.tar"))
    broken = {name for name, one in found.items() if isinstance(one, Broken)}
    assert broken == {"cut.tar", "noise.tar", "empty.tar"}
    assert all(found[name].reason.startswith("not whole: ") for name in broken)
    assert set(found) - broken == {
        *(f"whole.tar/{n}.png" for n in range(3)), "cut.tar/0.png", "cut.tar/1.png",
    }  # fmt: skip


def test_deep_and_transparent_pictures_look_as_they_are_looked_at():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        sample = read_picture("deep", encoded(Image.fromarray(ramp), kind), ["x"])
        np.testing.assert_array_equal(
            np.asarray(sample.picture)[..., 0].ravel(), np.arange(256), err_msg=kind
        )
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 4, 8))
    for picture in (clear, clear.quantize()):
        seen = read_picture("clear", encoded(picture), ["x"]).picture
        assert seen.getpixel((1, 1)) == (255, 0, 0)
        assert seen.getpixel((6, 6)) == (255, 255, 255)
    for mode in ("L", "LA", "1", "P", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        seen = read_picture(mode, encoded(Image.new(mode, (8, 8)), kind), ["x"]).picture
        assert seen.mode == "RGB", mode
    real = Image.fromarray(np.ones((4, 4), np.float32))
    assert read_picture("real", encoded(real, "TIFF"), ["x"]) == Broken(
        "real", "32 bits a channel: 8 or 16 would work"
    )


@quick
@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))
def test_whatever_bytes_there_are_they_are_a_picture_or_broken(data, kind):
    content = bytearray(encoded(kind=kind))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    found = read_picture("x", bytes(content), ["x"])
    if isinstance(found, Broken):
        assert found.reason
        assert "\n" not in found.reason
        assert "0x" not in found.reason  # addresses would differ between ranks


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere/*.tar", "no file is called"),
        ("nowhere.tar", "no file is called"),
        ("nowhere", "nowhere is no folder"),
        (".", "has no pictures"),
    ],
)
def test_a_source_of_nothing_is_a_mistake(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme.txt").touch()
    with pytest.raises(UserError, match=said) as raised:
        open_source(DataSettings(source=source))
    assert one_sentence(raised).startswith("data.source: ")


# --- landscapes -----------------------------------------------------------------------------------


def test_landscapes_are_none_that_the_teacher_has_seen():
    source = landscapes.Landscapes(20)
    seen = {bucket.name: bucket.count for bucket in BUCKETS}
    close = {bucket.name for bucket in BUCKETS if bucket.close_up}
    small = [unit for unit in source.units() if "512" not in unit.name]
    found = [sample for unit in small for sample in source.read(unit)]
    names = [sample.name for sample in found]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == set(seen) - {"whole_512x512"}
    for sample in found:
        bucket, number = sample.name.split("/")
        assert int(number) >= seen[bucket]
        assert f"{sample.picture.height}x{sample.picture.width}" in bucket
        assert sample.captions
        assert all(sample.captions)
        assert sample.below == (CLOSE_UP_NOISE / 1000 if bucket in close else 1.0)


def test_there_are_about_as_many_landscapes_as_asked_for(monkeypatch):
    """Each once, in units of a few, in the proportions of the demo's own."""
    drawn = []
    blank = np.zeros((8, 8, 3), np.uint8), ["words"]
    monkeypatch.setattr(landscapes, "draw_picture", lambda b, n: drawn.append((b.name, n)) or blank)
    source = landscapes.Landscapes(3000)
    count = sum(len(list(source.read(unit))) for unit in source.units())
    assert abs(count - 3000) <= len(BUCKETS)
    assert len(set(drawn)) == count
    whole = sum(bucket.count for bucket in BUCKETS)
    for bucket in BUCKETS:
        mine = sum(name == bucket.name for name, _ in drawn)
        assert mine == pytest.approx(3000 * bucket.count / whole, abs=1)


def entry_of(file: Path, **more) -> Entry:
    usual = {
        "name": "x", "file": file, "key": "0", "shape": (64, 64), "sizes": (64, 64, 0, 0, 64, 64),
        "captions": ["one", "two"], "below": 1.0,
    }  # fmt: skip
    return Entry(**{**usual, **more})


def test_close_ups_are_seen_below_their_noise_only(teacher, tmp_path):
    save_file({"0": torch.ones(4, 8, 8).half()}, tmp_path / "x.safetensors")
    entry = entry_of(tmp_path / "x.safetensors", below=0.3)
    draws = [draw(0, step, 0, 0.0) for step in range(64)]
    times = build_lesson(teacher, [entry] * 64, draws).times
    assert int(times.max()) < 300
    assert int(times.max()) > 250
    whole = build_lesson(teacher, [replace(entry, below=1.0)], [replace(draws[0], time=1 - 1e-12)])
    assert whole.times.tolist() == [999]


def test_a_lesson_is_what_its_draws_say(teacher, tmp_path):
    save_file({"0": torch.ones(4, 8, 8).half()}, tmp_path / "x.safetensors")
    entry = entry_of(tmp_path / "x.safetensors")
    draws = [replace(draw(0, n, 0, 0.0), wording=w, left_out=out)
             for n, (w, out) in enumerate([(0.1, False), (0.9, False), (0.1, True)])]  # fmt: skip
    lesson = build_lesson(teacher, [entry] * 3, draws)
    said = teacher.conditions(["one", "two", ""], [entry.sizes] * 3).text
    torch.testing.assert_close(lesson.conditions.text, said)
    assert not torch.equal(said[0], said[1])
    noise = torch.stack([draw(0, n, 0, 0.0).noise(torch.Size([4, 8, 8])) for n in range(3)])
    torch.testing.assert_close(lesson.target, noise)


# --- latents --------------------------------------------------------------------------------------


def encode_alone(teacher: Teacher, source: Path | str, folder: Path, shapes=((64, 64),)):
    """The files of the pictures' latents, and the digest."""
    opened = open_source(DataSettings(source=str(source)))
    return encode_all(
        opened, list(shapes), teacher, folder, ALONE, lambda what: None, lambda: False
    )


@pytest.fixture
def uncalled(monkeypatch):
    """Nothing is to be encoded from here on."""

    def refuse():
        def fail(self, pictures):
            raise AssertionError("encoded again")

        monkeypatch.setattr(Teacher, "encode", fail)

    return refuse


def test_pictures_are_encoded_once(teacher, tmp_path, uncalled):
    save_pictures(tmp_path / "pictures", 3)
    files, digest = encode_alone(teacher, tmp_path / "pictures", tmp_path / "cache")
    assert [file.parent for file in files] == [tmp_path / "cache" / digest]
    made = [file.stat().st_mtime_ns for file in files]
    uncalled()
    assert encode_alone(teacher, tmp_path / "pictures", tmp_path / "cache") == (files, digest)
    assert [file.stat().st_mtime_ns for file in files] == made


def test_a_latent_is_what_the_vae_makes_of_the_picture(teacher, tmp_path):
    save_pictures(tmp_path / "pictures", 4)
    files, digest = encode_alone(
        teacher, tmp_path / "pictures", tmp_path / "cache", [(32, 96), (64, 64), (96, 32)]
    )
    pictures = read_set(files, digest, 1)
    entries = {entry.name: entry for entry in sum(pictures.shapes.values(), pictures.held_out)}
    assert len(entries) == 4
    assert sum(pictures.counts().values()) == 3
    for name, entry in entries.items():
        with Image.open(tmp_path / "pictures" / name) as picture:
            made = cut(picture, nearest([(32, 96), (64, 64), (96, 32)], *picture.size[::-1]))
        height, width = entry.shape
        assert (height, width) == made.picture.size[::-1]
        assert entry.sizes == (*made.scaled, *made.corner, height, width)
        vae = teacher.pipe.vae
        pixels = torch.from_numpy(np.asarray(made.picture) / 127.5 - 1).float().permute(2, 0, 1)
        with torch.no_grad():
            mean = vae.encode(pixels[None]).latent_dist.mean[0] * vae.config.scaling_factor
        torch.testing.assert_close(entry.latent(), mean, rtol=2e-3, atol=2e-3)


def test_what_a_killed_run_had_begun_is_not_taken(teacher, tmp_path):
    save_pictures(tmp_path / "pictures", 3)
    (file,), _ = encode_alone(teacher, tmp_path / "pictures", tmp_path / "cache")
    whole = file.read_bytes()
    file.unlink()
    draft = file.with_suffix(".tmp")
    draft.write_bytes(whole[:50])  # it may be of a run that goes on
    encode_alone(teacher, tmp_path / "pictures", tmp_path / "cache")
    assert file.read_bytes() == whole
    assert set(file.parent.iterdir()) == {file, draft}


def test_the_digest_names_all_that_latents_depend_on(teacher, tmp_path):
    folder = save_pictures(tmp_path / "pictures", 3)

    def digest(**more):
        return encode_alone(teacher, folder, tmp_path / "cache", **more)[1]

    digests = [digest(), digest(shapes=[(32, 64)])]
    assert digest() == digests[0]
    (folder / "001.txt").write_text("another wording\n")
    digests.append(digest())
    Image.new("RGB", (64, 64)).save(folder / "001.png")
    digests.append(digest())
    (folder / "new.png").write_bytes((folder / "002.png").read_bytes())
    digests.append(digest())
    vae = teacher.pipe.vae
    for weight in (vae.encoder.conv_in.bias, vae.quant_conv.bias):
        own = weight.detach().clone()
        weight.data += 1.0
        digests.append(digest())
        weight.data.copy_(own)
    assert digest() == digests[4]
    assert len(set(digests)) == len(digests) == 7


def test_several_ranks_make_the_files_of_one(model, teacher, tmp_path):
    for number in range(2):
        folder = save_pictures(tmp_path / f"pictures{number}", 3)
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        write_tar(tmp_path / f"{number}.tar", {**files, "x.png": b"none", "x.txt": b"words"})
    source = str(tmp_path / "*.tar")
    alone, digest = encode_alone(teacher, source, tmp_path / "alone")
    (first, second) = run_ranks(2, encode_on, model, source, tmp_path / "two")
    assert first == second
    assert first[1] == digest
    assert len(first[0]) == 2
    for mine, theirs in zip(alone, first[0], strict=True):
        assert mine.name == theirs.name
        a, b = load_file(mine), load_file(theirs)
        assert a.keys() == b.keys() == {"0", "1", "2"}
        for key, tensor in a.items():
            torch.testing.assert_close(tensor, b[key])
        assert latents._facts_in(mine) == latents._facts_in(theirs)


def test_broken_pictures_are_told_of_by_later_runs_too(teacher, tmp_path, uncalled):
    write_files(tmp_path / "pictures", FILES)
    encode_alone(teacher, tmp_path / "pictures", tmp_path / "cache")
    uncalled()
    files, digest = encode_alone(teacher, tmp_path / "pictures", tmp_path / "cache")
    pictures = read_set(files, digest, 1)
    assert {one.name for one in pictures.broken} == {"d.png", "deep/c.jpg", "e.webp", "f.png"}
    said = say_broken(pictures.broken)
    assert said.startswith("4 pictures were left out: d.png (no picture), deep/c.jpg (")
    assert "e.webp (no caption)" in said
    many = [Broken(str(n), "why") for n in range(9)]
    assert say_broken(many).endswith("4 (why), ...")
    assert say_broken(many[:1]) == "1 picture was left out: 0 (why)"


def test_names_need_not_be_utf8(teacher, tmp_path):
    folder = os.fsencode(save_pictures(tmp_path / "pictures", 2))
    for name, other in ((b"000", b"caf\xe9"), (b"001", b"gar\xe7on")):
        for suffix in (b".png", b".txt"):
            os.rename(folder + b"/" + name + suffix, folder + b"/" + other + suffix)
    Path(os.fsdecode(folder + b"/gar\xe7on.png")).write_bytes(b"none")
    files, digest = encode_alone(teacher, tmp_path / "pictures", tmp_path / "cache")
    with pytest.raises(UserError, match="leave none to learn from, 1 more could not") as raised:
        read_set(files, digest, 1)
    one_sentence(raised).encode()  # what a terminal does
    assert say_broken([Broken("gar\udce7on", "why")]).encode()


def header_of(file: Path, names: list[str]) -> Path:
    """A file of latents that names these pictures, and has none."""
    usual = entry_of(file)
    entries = [
        {"name": name, "key": "0", "shape": usual.shape, "sizes": usual.sizes,
         "captions": ["x"], "below": 1.0} for name in names
    ]  # fmt: skip
    save_file({}, file, {"facts": json.dumps({"entries": entries, "broken": []})})
    return file


@quick
@given(st.sets(st.text("abc/", min_size=1), min_size=8, max_size=30), st.data())
def test_added_pictures_push_out_as_many_held_out_ones_as_come_to_be(tmp_path_factory, names, data):
    """None that was trained on is held out afterwards, so a longer run is judged fairly still."""
    folder = tmp_path_factory.mktemp("headers")
    count = data.draw(st.integers(1, 3))
    old = set(data.draw(st.permutations(sorted(names)))[: data.draw(st.integers(4, len(names)))])

    def held_out(chosen, file):
        pictures = read_set([header_of(folder / file, sorted(chosen))], "digest", count)
        trained = {entry.name for entries in pictures.shapes.values() for entry in entries}
        held = {entry.name for entry in pictures.held_out}
        assert len(held) == count
        assert held | trained == chosen
        assert not held & trained
        return held

    before, after = held_out(old, "a"), held_out(names, "b")
    assert not after & (old - before)
    assert len(before - after) == len(after - old)


def test_held_out_pictures_are_chosen_by_their_names_alone(tmp_path):
    """Whatever files they lie in, and in which order."""
    names = [f"{n:03d}.png" for n in range(20)]
    one = read_set([header_of(tmp_path / "a", names)], "digest", 5)
    halves = [header_of(tmp_path / "b", names[:7][::-1]), header_of(tmp_path / "c", names[7:])]
    two = read_set(halves, "digest", 5)
    assert [entry.name for entry in one.held_out] == [entry.name for entry in two.held_out]
    assert {entry.name for entry in one.held_out} != set(names[:5])  # no mere order of files


def test_a_cache_that_cannot_be_written_is_a_mistake(teacher, tmp_path, monkeypatch):
    save_pictures(tmp_path / "pictures", 2)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"choose another data\.cache") as raised:
        encode_alone(teacher, tmp_path / "pictures", tmp_path / "file" / "cache")
    assert "Not a directory" in one_sentence(raised)


def test_a_full_disk_is_a_mistake(teacher, tmp_path, small_disk):
    save_pictures(tmp_path / "pictures", 2)
    (small_disk / "filler").write_bytes(b"0" * ((1 << 20) - 8192))
    with pytest.raises(UserError, match=r"choose another data\.cache") as raised:
        encode_alone(teacher, tmp_path / "pictures", small_disk / "cache", [(512, 512)])
    assert "No space left" in one_sentence(raised)


@pytest.mark.parametrize("content", [None, b"", b"cut off", b"{}"])
def test_latents_that_are_not_readable_are_a_mistake(tmp_path, content):
    file = tmp_path / "000000.safetensors"
    if content == b"{}":
        save_file({"0": torch.zeros(2)}, file)  # of something else
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="these latents are not readable") as raised:
        read_set([file], "digest", 1)
    assert str(file) in one_sentence(raised)


# --- teacher --------------------------------------------------------------------------------------


def test_sdxl_is_told_sizes_and_nothing_is_zeros():
    teacher = teacher_of(families.sdxl(image_encoder=None, feature_extractor=None))
    assert teacher.is_xl
    sizes = sizes_of((100, 80), (18, 8), (64, 65))
    assert sizes == (100, 80, 18, 8, 64, 65)
    options = {"dtype": torch.float32, "text_encoder_projection_dim": families.TEXT_WIDTH}
    theirs = teacher.pipe._get_add_time_ids((100, 80), (18, 8), (64, 65), **options)
    prompts = ["a lake", "", "a hut"]
    found = teacher.conditions(prompts, [sizes] * 3)
    torch.testing.assert_close(found.added["time_ids"], theirs.expand(3, 6))
    text, pooled = found.text, found.added["text_embeds"]
    assert not text[1].any()
    assert not pooled[1].any()
    mine, none, own, nothing = teacher.pipe.encode_prompt(
        "a lake", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    torch.testing.assert_close(text[:1], mine)
    torch.testing.assert_close(pooled[:1], own)
    torch.testing.assert_close(text[1:2], none)  # what guidance takes for none
    torch.testing.assert_close(pooled[1:2], nothing)
    teacher.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    found = teacher.conditions(prompts, [sizes] * 3)
    assert found.text[1].any()
    assert found.added["text_embeds"][1].any()


def test_sd15_is_told_the_prompt_alone(teacher):
    assert not teacher.is_xl
    found = teacher.conditions(["a lake", ""], [(8, 8, 0, 0, 8, 8)] * 2)
    assert found.added == {}
    text, none = teacher.pipe.encode_prompt("a lake", "cpu", 1, True, negative_prompt="")
    torch.testing.assert_close(found.text, torch.cat([text, none]))


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_noise_is_added_as_the_schedule_says(family):
    """Against diffusers' DDIM of the pipeline itself: it takes the teacher's own answer back."""
    pipe = getattr(families, family)()
    teacher, own = teacher_of(pipe), pipe.scheduler
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    times = torch.tensor([0, 500, 998])
    noisy, target = teacher.diffuse(latents, noise, times)
    torch.testing.assert_close(noisy, own.add_noise(latents, noise, times))
    own.set_timesteps(1000)
    for index, time in enumerate(times):
        step = own.step(target[index], time, noisy[index], eta=0.0)
        torch.testing.assert_close(step.pred_original_sample, latents[index], rtol=1e-3, atol=1e-3)
    alpha = own.alphas_cumprod[times].reshape(3, 1, 1, 1)
    expected = noise if family == "sd15" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(target, expected)
    assert teacher.times == 1000


UNET = {"in_channels": 4}
VAE = {"latent_channels": 4}


@pytest.mark.parametrize(
    ("unet", "vae", "said"),
    [
        ({"in_channels": 9}, {}, "channels beside the latent"),
        ({"time_cond_proj_dim": 256}, {}, "a guidance embedding"),
        ({"class_embed_type": "projection"}, {}, "class labels"),
        ({"num_class_embeds": 10}, {}, "class labels"),
        ({"addition_embed_type": "image"}, {}, "image embeddings"),
        ({}, {"latents_mean": [0.0] * 4}, "latents of a given mean"),
    ],
)
def test_models_that_want_more_than_a_prompt_are_refused(unet, vae, said):
    with pytest.raises(UserError, match=said) as raised:
        require_teachable("it", {**UNET, **unet}, {**VAE, **vae})
    assert "'it'" in one_sentence(raised)
    for kind in (None, "text_time"):
        require_teachable("it", {**UNET, "addition_embed_type": kind}, VAE)


def copy_configs(model: Path, folder: Path, part: str, **changes) -> Path:
    """The configuration files of a model, with changes in one of them; no weights."""
    for file in model.rglob("*.json"):
        values = json.loads(file.read_text())
        name = file.relative_to(model)
        if name.parts[0] == part:
            values |= changes
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder


def test_a_model_is_judged_before_its_weights_are_loaded(model, tmp_path):
    """There are none here."""
    assert describe_teacher(str(copy_configs(model, tmp_path / "good", "unet"))) == 64
    bad = copy_configs(model, tmp_path / "bad", "unet", in_channels=9)
    with pytest.raises(UserError, match="channels beside the latent"):
        describe_teacher(str(bad))
    (tmp_path / "model.safetensors").touch()
    assert describe_teacher(str(tmp_path / "model.safetensors")) == 0


def test_a_teacher_that_predicts_pictures_is_refused(tmp_path):
    pipe = families.sd15(image_encoder=None, feature_extractor=None)
    pipe.scheduler.register_to_config(prediction_type="sample")
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="predicts 'sample'; one that predicts epsilon") as raised:
        load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)
    one_sentence(raised)


def test_a_loaded_teacher_is_frozen(teacher):
    networks = [part for part in teacher.pipe.components.values() if isinstance(part, nn.Module)]
    assert len(networks) == 3
    for network in networks:
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_pictures_come_back_from_their_latents(teacher, monkeypatch):
    """Scaled by the factor on the way there, and by its inverse on the way back."""
    vae = teacher.pipe.vae
    seen = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda latent: seen.append(latent) or decode(latent))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    latents = teacher.encode(pictures)
    assert latents.shape == (2, 4, 4, 5)
    again = teacher.decode(latents)
    assert (again.shape, again.dtype) == (pictures.shape, np.uint8)
    with torch.no_grad():
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        means = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(torch.cat(seen), means)


# --- student --------------------------------------------------------------------------------------


def lesson_of(teacher: Teacher, count: int = 3) -> Lesson:
    generator = torch.Generator().manual_seed(1)
    noisy, target = torch.randn(2, count, 4, 8, 8, generator=generator)
    prompts = [f"number {n}" for n in range(count)]
    conditions = teacher.conditions(prompts, [(64, 64, 0, 0, 64, 64)] * count)
    return Lesson(noisy, torch.arange(count) * 300 + 50, conditions, target)


@pytest.mark.parametrize("own", [False, True])
def test_a_student_begins_as_its_teacher(teacher, own):
    student = build_student(teacher.unet, own=own, seed=3)
    theirs = dict(teacher.unet.named_parameters())
    pointers = {parameter.data_ptr() for parameter in theirs.values()}
    for name, parameter in student.named_parameters():
        is_attention = ".attn1." in name
        assert parameter.requires_grad == is_attention, name
        assert (parameter.data_ptr() in pointers) == (not own and not is_attention), name
        if name in theirs:
            assert torch.equal(parameter, theirs[name]), name
    extra = {name.split(".attn1.")[1] for name, _ in student.named_parameters()
             if name not in theirs}  # fmt: skip
    assert {name.split(".")[0] for name in extra} == {"to_q_", "to_k_"}
    assert not any(parameter.requires_grad for parameter in theirs.values())
    assert all(isinstance(part, linfusion.LinearAttention) for part in attentions(student))
    assert len(attentions(student)) == len(attentions(teacher.unet)) > 5
    assert len(learning(student)) == sum(".attn1." in n for n, _ in student.named_parameters())


def test_what_is_random_in_a_student_depends_on_the_seed_alone(teacher):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_student(teacher.unet, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, other = build_student(teacher.unet, seed=1), build_student(teacher.unet, seed=2)
    same = [torch.equal(a, b) for a, b in zip(learning(first), learning(again), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(learning(first), learning(other), strict=True))


def test_a_student_goes_on_from_modules(teacher, tmp_path):
    trained = build_student(teacher.unet, seed=1)
    for parameter in learning(trained):
        parameter.data += 0.25
    linfusion.save(trained, tmp_path)
    student = build_student(teacher.unet, tmp_path)
    for mine, theirs in zip(learning(student), learning(trained), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad
    save_teacher("sdxl", tmp_path / "sdxl")
    with pytest.raises(UserError) as raised:
        build_student(UNet2DConditionModel.from_pretrained(tmp_path / "sdxl/unet"), tmp_path)
    one_sentence(raised)


@pytest.mark.parametrize("relative", [False, True])
def test_the_loss_of_a_picture_is_its_own(teacher, relative):
    distiller = Distiller(build_student(teacher.unet), teacher, LossSettings(relative=relative))
    lesson = lesson_of(teacher)
    with torch.no_grad():
        together = distiller(lesson)
        assert together.shape == (3, 3)
        for index in range(3):
            one = slice(index, index + 1)
            text = Conditions(lesson.conditions.text[one], {})
            alone = Lesson(lesson.noisy[one], lesson.times[one], text, lesson.target[one])
            torch.testing.assert_close(distiller(alone)[:, 0], together[:, index])
    assert len(set(together.flatten().tolist())) == 9


def test_gradients_reach_all_that_learns_and_nothing_else(teacher):
    distiller = Distiller(build_student(teacher.unet), teacher, LossSettings())
    assert {id(p) for p in distiller.parameters() if p.requires_grad} == {
        id(p) for p in learning(distiller.student)
    }
    # The teacher is none of its modules: no backend may wrap, move or save it.
    assert [name for name, _ in distiller.named_children()] == ["student"]
    distiller(lesson_of(teacher)).sum().backward()
    reached = [p.grad is not None for p in learning(distiller.student)]
    assert all(reached)
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())


def hooks(unet: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in unet.modules())


def test_hooks_are_gone_also_after_an_error(teacher):
    lesson = lesson_of(teacher)
    found = answer(teacher.unet, lesson)
    assert len(found.features) == len(attentions(teacher.unet))
    assert hooks(teacher.unet) == 0
    bad = replace(lesson, conditions=Conditions(lesson.conditions.text[..., :5], {}))
    with pytest.raises(RuntimeError):
        answer(teacher.unet, bad)
    assert hooks(teacher.unet) == 0


def test_losses_computed_by_hand():
    """Of two pictures; the features are of two layers."""

    def answer_of(output, *features):
        return Answer(torch.tensor(output).reshape(2, 1, 1, 2),
                      [torch.tensor(layer).reshape(2, -1, 1) for layer in features])  # fmt: skip

    mine = answer_of([1.0, 2, 3, 4], [1.0, 1, 0, 0], [0.0, 2, 4, 0, 0, 3])
    theirs = answer_of([1.0, 0, 3, 5], [3.0, 1, 0, 2], [0.0, 2, 1, 0, 0, 0])
    target = torch.tensor([0.0, 2, 0, 0]).reshape(2, 1, 1, 2)
    found = losses(mine, theirs, target, relative=False)
    noise, output = [1 / 2, 25 / 2], [4 / 2, 1 / 2]
    features = [(4 / 2 + 9 / 3) / 2, (4 / 2 + 9 / 3) / 2]
    torch.testing.assert_close(found, torch.tensor([noise, output, features]))
    found = losses(mine, theirs, target, relative=True)
    # Of the second picture's second layer the teacher put out nothing.
    features = [(4 / 10 + 9 / 5) / 2, (4 / 4 + 3 / 1e-6) / 2]
    torch.testing.assert_close(found, torch.tensor([noise, output, features]))


# --- metrics --------------------------------------------------------------------------------------


def noise_picture(seed: int, height: int = 24, width: int = 32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_psnr_and_ssim():
    picture = noise_picture(0)
    assert psnr(picture, picture) == math.inf
    assert ssim(picture, picture) == pytest.approx(1)
    black, grey = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5))
    c1 = (0.01 * 255) ** 2  # flat pictures differ in luminance alone
    assert ssim(black, grey) == pytest.approx(c1 / (51**2 + c1))
    assert abs(ssim(picture, noise_picture(1))) < 0.1
    assert psnr(picture, 255 - picture) == psnr(255 - picture, picture)


def gaussian(mean: torch.Tensor, cov: torch.Tensor, seed: int) -> torch.Tensor:
    """A sample whose mean and covariance are exactly these."""
    x = torch.randn(
        200, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return white.T @ torch.linalg.cholesky(cov).T + mean


def test_the_frechet_distance_of_known_gaussians():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    b = torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64))
    turn, _ = torch.linalg.qr(gaussian(mean, a, 5)[:3])
    x, y = gaussian(mean, a, 0), gaussian(mean + 2, b, 1)
    # Diagonal covariances: squares of the differences of their roots.
    assert frechet_distance(x, y) == pytest.approx(3 * 4 + 1 + 0 + 4)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(17)
    assert frechet_distance(x, gaussian(mean, a, 7)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))
    # Fewer features than dimensions: covariances without full rank.
    few = torch.eye(6, dtype=torch.float64)[:3]
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-7)


class Means(nn.Module):
    """Three features: the means of the channels, as [B, 3, 1, 1]."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((2, 3), keepdim=True)


def test_inception_is_a_torchscript_file_of_the_users(tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    pictures = [noise_picture(0), noise_picture(1, 40, 20)]
    found = load_inception(tmp_path / "means.pt")(pictures)
    expected = np.stack([picture.mean((0, 1)) for picture in pictures])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("content", [None, b"no network", b""])
def test_an_inception_that_is_none_is_a_mistake(tmp_path, content):
    if content is not None:
        (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.inception: .*TorchScript") as raised:
        load_inception(tmp_path / "net.pt")
    one_sentence(raised)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP model of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    text = {
        "vocab_size": 514, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 512,
        "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).save_pretrained(folder)
    CLIPProcessor(image_processor(), byte_tokenizer(folder)).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_mean_of_pictures_and_captions(clip):
    score = load_clip(clip)
    pictures = [noise_picture(0), np.full((50, 40, 3), 200, np.uint8), noise_picture(2)]
    captions = ["a lake", "a caption of far more than sixteen tokens", "hut"]
    each = [score([picture], [caption])
            for picture, caption in zip(pictures, captions, strict=True)]  # fmt: skip
    assert score(pictures, captions) == pytest.approx(np.mean(each), rel=1e-4)
    assert all(0 <= one <= 100 for one in each)
    assert len(set(each)) > 1
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        inputs = processor(text=captions[:1], images=pictures[:1], return_tensors="pt")
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert each[0] == pytest.approx(100 * max(0.0, float(logits)), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("lacks", ["everything", "the processor", "a weight", "the weights"])
def test_a_clip_that_is_none_is_a_mistake(clip, tmp_path, lacks):
    folder = tmp_path / "clip"
    if lacks != "everything":
        folder.mkdir()
        for file in clip.iterdir():
            if lacks != "the processor" or file.name in ("config.json", "model.safetensors"):
                (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    if lacks == "a weight":  # transformers would draw it at random
        tensors = load_file(weights)
        del tensors["visual_projection.weight"]
        save_file(tensors, weights, {"format": "pt"})
    if lacks == "the weights":
        weights.write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"evaluation\.clip: .* is no CLIP model") as raised:
        load_clip(folder)
    one_sentence(raised)


@pytest.mark.parametrize(("pictures", "held_out", "below"), [(1, 4, 1.0), (4, 1, 1.0), (4, 4, 0.3)])
def test_fid_of_too_few_pictures_is_refused_before_training(tmp_path, pictures, held_out, below):
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    entries = [entry_of(tmp_path / "x", below=below)] * held_out
    settings = EvaluationSettings(pictures=pictures, inception=tmp_path / "means.pt")
    with pytest.raises(UserError, match=r"evaluation\.inception: FID compares sets") as raised:
        Evaluator(None, entries, settings, 0, ALONE)
    one_sentence(raised)
    enough = [entry_of(tmp_path / "x")] * 2
    Evaluator(None, enough, settings.model_copy(update={"pictures": 2}), 0, ALONE)


def test_a_clip_score_of_close_ups_alone_is_refused(tmp_path, clip):
    settings = EvaluationSettings(clip=clip)
    with pytest.raises(UserError, match=r"evaluation\.clip: no held-out picture is a whole one"):
        Evaluator(None, [entry_of(tmp_path / "x", below=0.3)], settings, 0, ALONE)
    Evaluator(None, [entry_of(tmp_path / "x")], settings, 0, ALONE)


# --- records --------------------------------------------------------------------------------------


def record(step: int) -> Record:
    return Record(step, 1 / (step + 3), 0.1 + step, 0.2, 0.3, 1e-4, 2.5e-7)


def begun(folder: Path, step: int) -> Curve:
    curve = Curve(folder, step)
    curve.begin()
    return curve


def test_a_table_is_read_back_and_lines_that_are_done_again_are_cut_off(tmp_path):
    curve = begun(tmp_path, 0)
    for step in range(10):
        curve.add(record(step))
    assert Curve(tmp_path, 10).records == [record(step) for step in range(10)]
    again = begun(tmp_path, 7)
    assert again.records == [record(step) for step in range(7)]
    again.add(record(7))
    assert Curve(tmp_path, 99).records == [record(step) for step in range(8)]
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,loss,noise,output,features,rate,gradient"
    assert len(lines) == 9
    assert begun(tmp_path, 0).records == []
    assert [file.name for file in tmp_path.iterdir()] == ["losses.csv"]


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path):
    """Wherever it is cut. Its step is not in the checkpoint: that comes after the line."""
    curve = begun(tmp_path, 0)
    for step in range(12):
        curve.add(record(step))
    file = tmp_path / "losses.csv"
    whole = file.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(whole)):
        file.write_bytes(whole[:end])
        resumed = begun(tmp_path, 11)
        assert resumed.records == [record(step) for step in range(11)]
        resumed.add(record(11))
        assert file.read_bytes() == whole


@pytest.mark.parametrize("content", ["", "when,what\n1,2\n", "step,loss\n0,1\n", "step\n\n"])
def test_a_table_of_something_else_is_written_over(tmp_path, content):
    (tmp_path / "losses.csv").write_text(content)
    curve = begun(tmp_path, 5)
    assert curve.records == []
    curve.add(record(5))
    assert Curve(tmp_path, 6).records == [record(5)]


def test_the_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    curve = begun(tmp_path, 0)
    curve.draw()
    assert not (tmp_path / "losses.png").exists()  # of nothing
    for step in range(3):
        curve.add(record(step))
    monkeypatch.setattr("engine.distill.records.find_spec", lambda name: None)
    curve.draw()
    assert not (tmp_path / "losses.png").exists()  # without matplotlib
    monkeypatch.undo()
    curve.draw()
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.size == (960, 540)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["losses.csv", "losses.png"]


# --- progress -------------------------------------------------------------------------------------


def test_the_meter_tells_the_time_that_is_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    told: list[Distilling] = []
    meter = Meter("run", 20, 50, told.append)  # resumed at 20
    for step in (21, 22, 23):
        clock[0] += 2.0
        assert meter.step(step, loss=float(step)) == str(told[-1])
    assert [event.step for event in told] == [21, 22, 23]
    assert [event.eta_s for event in told] == [58.0, 56.0, 54.0]
    assert {event.seconds_per_step for event in told} == {2.0}
    assert told[-1].share == 23 / 50
    assert told[0].loss == 21.0
    assert told[1].loss == pytest.approx((0.95 * 21 + 22) / 1.95)
    assert str(told[0]) == "run  step 21 of 50, loss 21.0000"


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_dialect_listens_to_a_distillation(dialect, capsys):
    meter = Meter("run", 0, 4, listener_of(dialect))
    for step in range(1, 5):
        meter.step(step, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    if dialect == "json":
        events = [json.loads(line) for line in lines]
        assert [event["step"] for event in events] == [1, 2, 3, 4]
        assert events[-1]["loss"] == 0.5
        assert events[-1]["share"] == 1
    elif dialect == "plain":
        assert lines[0].startswith(" 25% done  run  step 1 of 4, loss 0.5000")
        assert lines[-1].startswith("100% done  run  step 4 of 4")
    elif dialect == "openjd":
        assert lines[:2] == [
            "openjd_progress: 25.0",
            "openjd_status: run  step 1 of 4, loss 0.5000",
        ]
        assert lines[-2] == "openjd_progress: 100.0"
    elif dialect == "alf":
        assert lines == [f"ALF_PROGRESS {n}%" for n in (25, 50, 75, 100)]
    else:  # none, or bars where there is no terminal
        assert lines == []


def test_a_bar_on_a_terminal_shows_the_loss(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr("sys.stderr", out)
    meter = Meter("run", 2, 4, listener_of("bars"))  # resumed at 2
    meter.step(3, loss=0.5)
    meter.step(4, loss=0.5)
    assert "4/4" in out.getvalue()
    assert "loss 0.5000" in out.getvalue()


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{}", b'{"step": 3, "facts": {}}', b"\xff\xfe"]
)
def test_a_checkpoint_that_is_not_readable_is_one_sentence(tmp_path, content):
    assert kept_state(tmp_path) is None
    (tmp_path / "checkpoint").mkdir()
    assert kept_state(tmp_path) is None  # killed before its first one was whole
    (tmp_path / "checkpoint" / "about.json").write_bytes(content)
    with pytest.raises(UserError, match="this checkpoint is not readable") as raised:
        kept_state(tmp_path)
    assert f"remove {tmp_path} to begin anew" in one_sentence(raised)


def replicas() -> Replicas:
    """Of a student that is nothing but one self-attention."""
    torch.manual_seed(0)
    attention = nn.Module()
    attention.attn1 = linfusion.LinearAttention(query_dim=4, heads=1, dim_head=4)
    optimizer = SimpleNamespace(rate=0.1, weight_decay=0.0, clip=1.0)
    return Replicas(SimpleNamespace(), optimizer, SimpleNamespace(student=attention), ALONE)


def keep(backend: Replicas, folder: Path, step: int) -> None:
    backend.save(folder, {"about": {"step": step, "facts": {}}, "average": []})


def test_a_checkpoint_takes_the_place_of_the_last_one(tmp_path):
    backend = replicas()
    keep(backend, tmp_path, 3)
    with backend.whole() as weights, torch.no_grad():
        for weight in weights:
            weight += 1
        expected = [weight.clone() for weight in weights]
    keep(backend, tmp_path, 5)
    names = sorted(file.name for file in (tmp_path / "checkpoint").iterdir())
    assert names == ["about.json", "step_00000005"]
    assert kept_state(tmp_path)["step"] == 5
    other = replicas()
    other.load(tmp_path)
    with other.whole() as weights:
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("content", [None, b"", b"no weights", "cut"])
def test_weights_of_a_checkpoint_that_are_not_readable_are_one_sentence(tmp_path, content):
    backend = replicas()
    keep(backend, tmp_path, 3)
    file = tmp_path / "checkpoint" / "step_00000003" / "replica.pt"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-700] if content == "cut" else content)
    with pytest.raises(UserError, match="this checkpoint is not readable") as raised:
        backend.load(tmp_path)
    assert str(file) in one_sentence(raised)
