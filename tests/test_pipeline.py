"""The Python API from settings to pixels: ladders in bands, pictures to start from, refusals."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from engine.bands import open_mesh
from engine.config import LadderSettings, MemorySettings, Settings, UserError
from engine.pipeline import Engine
from tests.ranks import run_ranks, torchrun

CONFIGS = Path(__file__).parents[1] / "configs"
LADDER = {"strategy": "demofusion", "strengths": [0.4], "steps": [5], "guidance_scale": 2.0}
DEMO = {"prompt": "mountains above a lake at sunset", "seed": 2, "steps": 8, "device": "cpu"}


def settings(height, width, codec="exact", **ladder):
    return Settings.model_validate(
        {**DEMO, "height": height, "width": width, "ladder": ladder, "codec": {"mode": codec}}
    )


def pixels(mesh, asked):
    """All rows of a picture by the demo model, in 0 ... 255."""
    engine = Engine.load(asked, mesh)
    _, own = engine.paint(asked)
    bands = mesh.gather_objects(own[0].permute(1, 2, 0).numpy())
    return np.concatenate(bands) * 127.5 + 127.5


def in_one_process(asked):
    with open_mesh() as mesh:
        return pixels(mesh, asked)


@pytest.mark.long
@pytest.mark.parametrize(("codec", "rank_counts"), [("exact", (2, 3)), ("streaming", (3,))])
def test_any_number_of_ranks_climbs_to_the_same_picture(codec, rank_counts):
    # Three rungs, the dilated branch on both upper ones, bands that are uneven.
    asked = settings(360, 264, codec, **{**LADDER, "base": 128, "keep_colours": 16})
    one = in_one_process(asked)
    assert one.shape == (360, 264, 3)
    for ranks in rank_counts:
        several = run_ranks(ranks, pixels, asked)
        assert all(np.array_equal(rank, several[0]) for rank in several)
        assert np.abs(several[0].round() - one.round()).max() <= 1


def reduced(picture, height, width):
    """Means over the areas that become one pixel each."""
    rows, columns = picture.shape[0] // height, picture.shape[1] // width
    return picture.reshape(height, rows, width, columns, 3).mean((1, 3))


def fine_detail(picture):
    """Energy in the upper half of all spatial frequencies."""
    spectrum = np.fft.fft2(picture.mean(-1) - picture.mean())
    rows, columns = (np.abs(np.fft.fftfreq(length)) for length in picture.shape[:2])
    return (np.abs(spectrum) ** 2)[
        np.maximum(*np.meshgrid(rows, columns, indexing="ij")) > 0.25
    ].sum()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["sdedit", "demofusion", "wavelet"])
def test_a_rung_keeps_the_picture_and_adds_detail(strategy):
    base = in_one_process(settings(256, 384))
    climbed = in_one_process(
        settings(512, 768, **{**LADDER, "strategy": strategy, "base": 384, "keep_colours": 48})
    )
    assert np.corrcoef(reduced(climbed, 256, 384).ravel(), base.ravel())[0, 1] > 0.95
    enlarged = np.asarray(
        Image.fromarray(base.round().astype(np.uint8)).resize((768, 512), Image.Resampling.BICUBIC)
    )
    assert fine_detail(climbed) > 2 * fine_detail(enlarged)


@pytest.mark.long
def test_the_shipped_2048_px_landscape(tmp_path):
    file, path = CONFIGS / "demo_2048.yaml", tmp_path / "landscape.png"
    asked = Settings.load(["--config", str(file)])
    code, out, err = torchrun(2, "-m", "engine.generate", "--config", file, "--output", path)
    assert code == 0, err
    assert "2048x1368 px" in out
    with Image.open(path) as picture:
        climbed = np.asarray(picture)
        small = np.asarray(picture.resize((384, 256), Image.Resampling.BOX), dtype=float)
    base = in_one_process(
        asked.model_copy(update={"height": 256, "width": 384, "ladder": LadderSettings()})
    )
    assert np.corrcoef(small.ravel(), base.ravel())[0, 1] > 0.9
    enlarged = Image.fromarray(base.round().astype(np.uint8)).resize(
        (2048, 1368), Image.Resampling.BICUBIC
    )
    assert fine_detail(climbed.astype(float)) > 2 * fine_detail(np.asarray(enlarged, dtype=float))


def test_a_picture_of_ones_own_is_upscaled(tmp_path):
    rows, columns = np.mgrid[0:90, 0:130]
    own = np.stack([rows, columns, rows + columns], -1).astype(np.uint8)
    Image.fromarray(own).save(tmp_path / "own.png")
    climbed = in_one_process(
        settings(
            176, 256, strategy="sdedit", upscale=tmp_path / "own.png", strengths=[0.2], steps=[5],
            keep_colours=16,
        )
    )  # fmt: skip
    assert climbed.shape == (176, 256, 3)
    enlarged = np.asarray(Image.fromarray(own).resize((256, 176), Image.Resampling.BICUBIC))
    assert np.corrcoef(climbed.ravel(), enlarged.ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.png", "nowhere.png is not readable"),
        ("text.png", "text.png is not readable"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(name, sentence, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    asked = settings(176, 256, strategy="sdedit", upscale=tmp_path / name)
    with open_mesh() as mesh, pytest.raises(UserError, match=sentence):
        Engine.load(asked, mesh)


def test_a_turned_photograph_is_upscaled_as_it_is_looked_at(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=exif)
    asked = settings(32, 64, strategy="sdedit", upscale=tmp_path / "turned.jpg")
    with open_mesh() as mesh, pytest.raises(UserError, match="the picture is 32x64 px"):
        Engine.load(asked, mesh)


def too_many(mesh):
    try:
        Engine.load(settings(128, 128, strategy="sdedit", base=8, steps=[20]), mesh)
    except UserError as error:
        return str(error)


def test_more_ranks_than_the_smallest_rung_has_rows():
    for sentence in run_ranks(2, too_many):
        assert sentence == (
            "the smallest rung of 8x8 px cannot be shared by 2 ranks: start 1, or set ladder.base "
            "to a larger side"
        )


def test_the_same_engine_paints_other_sizes():
    asked = settings(64, 96)
    with open_mesh() as mesh:
        engine = Engine.load(asked, mesh)
        again = settings(64, 64, "auto")
        assert engine.paint(again)[1].shape == (1, 3, 64, 64)
        other_prompt = again.model_copy(update={"prompt": "a desert", "seed": 9})
        with mock.patch("engine.pipeline.make_plan", side_effect=AssertionError("planned again")):
            assert engine.paint(other_prompt)[1].shape == (1, 3, 64, 64)
        assert torch.equal(engine.paint(asked)[1], engine.paint(asked)[1])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("sharded_weights", "there is one only"), ("skips_on_host", "computes on the CPU")],
)
def test_what_saves_no_memory_here_is_refused_before_anything_is_loaded(option, sentence):
    asked = Settings.model_validate({**DEMO, "model": "no/such", "memory": {option: True}})
    with open_mesh() as mesh, pytest.raises(UserError, match=sentence):
        Engine.load(asked, mesh)


def test_memory_settings_paint_the_same_picture():
    plain = settings(104, 96)
    saving = MemorySettings(token_chunks=3, row_chunks=2, guidance_in_turn=True)
    expected = in_one_process(plain)
    for picture in run_ranks(2, pixels, plain.model_copy(update={"memory": saving})):
        assert np.abs(picture.round() - expected.round()).max() <= 1
