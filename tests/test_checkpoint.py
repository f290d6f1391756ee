"""A picture that was interrupted anywhere goes on to the very same picture."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from engine import checkpoint
from engine.bands import open_mesh
from engine.checkpoint import Checkpoint, checkpoint_path, is_finished, pinned, tidy
from engine.config import Settings, UserError
from engine.keeper import Control, Interrupted
from engine.ladder import Rung, begin_base
from engine.painter import Painter
from engine.pipeline import Engine
from tests.pictures import by_pillow, pixels_of
from tests.ranks import run_ranks

LADDER = {"strategy": "demofusion", "base": 64, "strengths": [0.5], "steps": [6]}
SCHEDULERS = [
    DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler,
    UniPCMultistepScheduler,
]  # fmt: skip


def settings(model, output, **values):
    return Settings.model_validate(
        {
            "model": str(model), "output": output, "height": 128, "width": 96, "steps": 4,
            "seed": 5, "device": "cpu", "ladder": LADDER, "resume": True, **values,
        }
    )  # fmt: skip


class StopAfter:
    """Tells an engine to stop behind the `count`-th step."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left <= 0


def paint(mesh, asked, stop_after=10**6):
    """Whether the picture is finished, after as many steps at the most."""
    engine = Engine.load(pinned(asked), mesh, Control(should_stop=StopAfter(stop_after)))
    try:
        engine.generate(pinned(asked))
    except Interrupted as stopped:
        return str(stopped)
    return None


def paint_in_pieces(mesh, asked, counts):
    """Stopped behind each of `counts` steps, and begun again."""
    said = [paint(mesh, asked, count) for count in counts]
    return [*said, paint(mesh, asked)]


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """whole(ranks) -> the picture that nothing happened to."""

    @functools.cache
    def paint_it(ranks):
        asked = settings(tiny_model, tmp_path_factory.mktemp("whole") / "a.png")
        assert run_ranks(ranks, paint, asked) == [None] * ranks
        return by_pillow(asked.output)

    return paint_it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "counts"),
    [
        pytest.param(1, [1], marks=pytest.mark.long),
        (1, [3, 1]),
        (1, [4]),
        (2, [2]),
        pytest.param(2, [4], marks=pytest.mark.long),
        (2, [5, 1]),
        (2, [7]),
    ],
)
def test_interrupted_and_resumed_to_the_bit(whole, tiny_model, tmp_path, ranks, counts):
    """Within the base, at its end, within the rung above, at the end."""
    pieces = settings(tiny_model, tmp_path / "a.png")
    for said in run_ranks(ranks, paint_in_pieces, pieces, counts):
        stopped = f"{pieces.output}: stopped as told; resume goes on from {checkpoint_path(pieces)}"
        assert said == [stopped] * len(counts) + [None]
    np.testing.assert_array_equal(whole(ranks), by_pillow(pieces.output))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.long), 5])
def test_another_number_of_ranks_goes_on(whole, tiny_model, tmp_path, count):
    asked = settings(tiny_model, tmp_path / "a.png")
    said = run_ranks(3, paint, asked, count)
    assert all("stopped as told" in one for one in said)
    run_ranks(2, paint, asked, 1)
    run_ranks(1, paint, asked)
    assert abs(by_pillow(asked.output) - whole(1).astype(int)).max() <= 1


def test_a_job_goes_on_with_less_memory_and_other_groups(tiny_model, tmp_path):
    asked = settings(tiny_model, tmp_path / "a.png", mesh={"guidance": "1"})
    run_ranks(2, paint, asked)
    whole = by_pillow(asked.output).astype(int)
    asked.output.unlink()
    run_ranks(2, paint, asked, 6)
    saving = {"memory": {"token_chunks": 2, "guidance_in_turn": True}, "file": {"bits": "8"}}
    assert run_ranks(2, paint, settings(tiny_model, asked.output, **saving)) == [None, None]
    assert abs(by_pillow(asked.output) - whole).max() <= 1


class Lost(Exception):
    pass


def lose(mesh, asked, at, every):
    """The job dies at a step, without a word; what was kept before is there."""
    steps = []

    def die(progress):
        steps.append(progress)
        if len(steps) > at:
            raise Lost

    asked = asked.model_copy(update={"checkpoint": checkpoint_settings(every)})
    with pytest.raises(Lost):
        Engine.load(pinned(asked), mesh, Control(tell=die)).generate(pinned(asked))
    kept = torch.load(checkpoint_path(asked), weights_only=True)
    return kept["rung"], kept["step"]


def checkpoint_settings(every):
    return Settings.model_validate({"checkpoint": {"every": every}}).checkpoint


@pytest.mark.parametrize(
    ("at", "every", "kept"), [(3, 2, (0, 2)), (3, 1, (0, 3)), (5, 0, (0, 4)), (6, 1, (1, 2))]
)
def test_what_is_kept_on_the_way(whole, tiny_model, tmp_path, at, every, kept, one_thread):
    asked = settings(tiny_model, tmp_path / "a.png")
    with open_mesh() as mesh:
        assert lose(mesh, asked, at, every) == kept
        assert paint(mesh, asked) is None
    np.testing.assert_array_equal(by_pillow(asked.output), whole(1))
    assert not checkpoint_path(asked).exists()


@pytest.fixture(scope="module")
def loaded(tiny_model, tmp_path_factory):
    """An engine, for one scheduler after the other."""
    asked = small(tiny_model, tmp_path_factory.mktemp("loaded") / "a.png")
    with open_mesh() as mesh:
        yield Engine.load(asked, mesh)


def small(model, output):
    ladder = {**LADDER, "strategy": "sdedit", "base": 32}
    return settings(model, output, height=64, width=48, ladder=ladder)


def paint_by(engine, scheduler, asked, count):
    """With a new scheduler and a new control, which know nothing of what was painted before."""
    engine.pipe.scheduler = scheduler.from_config(DDIMScheduler(clip_sample=False).config)
    engine.control = Control(should_stop=StopAfter(count))
    try:
        engine.generate(asked)
    except Interrupted:
        paint_by(engine, scheduler, asked, 10**6)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_schedulers_remember(loaded, tiny_model, tmp_path, scheduler, one_thread):
    for name, count in (("a.png", 10**6), ("b.png", 3), ("c.png", 6)):
        paint_by(loaded, scheduler, small(tiny_model, tmp_path / name), count)
    for name in ("b.png", "c.png"):
        np.testing.assert_array_equal(by_pillow(tmp_path / "a.png"), by_pillow(tmp_path / name))


# --- refused, and left alone ----------------------------------------------------------------------


def test_a_checkpoint_of_other_settings_is_refused(tiny_model, tmp_path):
    asked = settings(tiny_model, tmp_path / "a.png")
    with open_mesh() as mesh:
        paint(mesh, asked, 2)
        for name, value, sentence in (
            ("seed", 6, "seed 5, not 6"),
            ("prompt", "a desert", "not 'a desert'"),
            ("dtype", "float64", "dtype 'float32', not 'float64'"),
            ("ladder", {**LADDER, "steps": [8]}, "ladder.steps [6], not [8]"),
        ):
            other = settings(tiny_model, tmp_path / "a.png", **{name: value})
            with pytest.raises(UserError) as caught:
                pinned(other)
            assert str(caught.value).startswith(f"{checkpoint_path(asked)}: this checkpoint was ")
            assert sentence in str(caught.value)
        assert pinned(asked).dtype == "float32"
        assert pinned(asked).codec.rungs == ("exact", "exact")
        anew = asked.model_copy(update={"seed": 6, "resume": False})
        assert paint_anew(mesh, anew) is None  # without --resume nobody asks


def paint_anew(mesh, asked):
    Engine.load(asked, mesh).generate(asked)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint_is_named(tiny_model, tmp_path, content):
    asked = settings(tiny_model, tmp_path / "a.png")
    checkpoint_path(asked).write_bytes(content)
    with pytest.raises(UserError, match=r"this checkpoint is not readable .* begin anew"):
        pinned(asked)


def test_another_programs_file_is_no_checkpoint(tiny_model, tmp_path):
    asked = settings(tiny_model, tmp_path / "a.png")
    torch.save({"weights": torch.zeros(2)}, checkpoint_path(asked))
    with pytest.raises(UserError, match="this is no checkpoint; remove it"):
        pinned(asked)


def test_a_finished_picture_is_known(tiny_model, tmp_path):
    asked = settings(tiny_model, tmp_path / "a.png")
    assert not is_finished(asked)
    with open_mesh() as mesh:
        paint(mesh, asked)
    assert is_finished(asked)
    for change in ({"seed": 6}, {"file": {"bits": "16"}}):
        assert not is_finished(settings(tiny_model, tmp_path / "a.png", **change))


def test_a_finished_pictures_checkpoint_goes_when_it_is_asked_for_again(tiny_model, tmp_path):
    """Its job was killed between the picture's rename and the checkpoint's end."""
    asked, kept = settings(tiny_model, tmp_path / "a.png"), tmp_path / "kept"
    with open_mesh() as mesh:
        assert "stopped as told" in paint(mesh, asked, 2)
        shutil.copy(checkpoint_path(asked), kept)
        paint(mesh, asked)
        shutil.copy(kept, checkpoint_path(asked))
        tidy(settings(tiny_model, tmp_path / "a.png", seed=6))
        assert checkpoint_path(asked).exists(), "it is of another picture"
        assert Painter(mesh).paint(asked).word == "finished"
    assert not checkpoint_path(asked).exists()


def test_a_checkpoint_in_another_folder(tiny_model, tmp_path):
    asked = settings(tiny_model, tmp_path / "a.png", checkpoint={"folder": tmp_path / "b" / "c"})
    with open_mesh() as mesh:
        assert paint(mesh, asked, 2) is not None
        assert [file.name for file in (tmp_path / "b" / "c").iterdir()] == [".a.png.checkpoint"]
        assert paint(mesh, asked) is None
    assert list((tmp_path / "b" / "c").iterdir()) == []


def test_a_full_disk_costs_a_checkpoint_but_no_picture(tiny_model, tmp_path, small_disk):
    """A real one, of which what other files leave is too little for any checkpoint."""
    (small_disk / "others").write_bytes(bytes(1_030_000))
    folder = {"folder": small_disk, "every": 1}
    asked = settings(tiny_model, tmp_path / "a.png", checkpoint=folder)
    assert run_ranks(2, paint, asked) == [None, None]
    asked.output.unlink()
    for said in run_ranks(2, paint, asked, 2):
        assert said.endswith("there is no checkpoint yet")
    assert [file.name for file in small_disk.iterdir()] == ["others"]
    assert list(tmp_path.glob("a*")) == []


def test_an_upscaled_picture_goes_on_from_another_folder(
    tiny_model, tmp_path, monkeypatch, one_thread
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels_of(64, 48)).save("own.png")
    ladder = {"strategy": "sdedit", "upscale": "own.png", "strengths": [0.5], "steps": [6]}
    asked = settings(tiny_model, tmp_path / "a.png", ladder=ladder)
    with open_mesh() as mesh:
        assert paint(mesh, asked) is None
        whole = by_pillow(asked.output)
        assert is_finished(asked)
        asked.output.unlink()
        assert "stopped as told" in paint(mesh, asked, 2)
        monkeypatch.chdir("/")
        moved = {**ladder, "upscale": tmp_path / "own.png"}
        assert paint(mesh, settings(tiny_model, asked.output, ladder=moved)) is None
    np.testing.assert_array_equal(by_pillow(asked.output), whole)


def test_a_torn_checkpoint_never_replaces_a_whole_one(tmp_path, monkeypatch):
    scheduler, rung = DDIMScheduler(), Rung(0, 64, 64, 4, 1.0, 4.0)
    state = begin_base(rung, scheduler, torch.Generator().manual_seed(0), torch.empty(0), 4)
    kept = Checkpoint(tmp_path / "c", lambda: {"seed": 1})
    kept.save(state)

    def tear(content, file):
        file.write(b"half of it")
        raise InterruptedError

    monkeypatch.setattr(checkpoint.torch, "save", tear)
    with pytest.raises(InterruptedError):
        kept.save(dataclasses.replace(state, step=2))
    again = kept.load(scheduler, [rung], torch.device("cpu"))
    assert again.step == 0
    assert torch.equal(again.latent, state.latent)
    assert torch.equal(again.generator.get_state(), state.generator.get_state())
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_displaced_mode_is_kept_at_the_end_of_a_rung_only(tiny_model, tmp_path):
    mesh = {"synchronisation": "displaced", "warmup_steps": 1, "guidance": "1"}
    ladder = {**LADDER, "strategy": "sdedit"}
    asked = settings(tiny_model, tmp_path / "a.png", mesh=mesh, ladder=ladder)
    run_ranks(2, paint, asked)
    whole = by_pillow(asked.output)
    asked.output.unlink()
    assert run_ranks(2, paint, asked, 2)[0].endswith("there is no checkpoint yet")
    said = run_ranks(2, paint_in_pieces, asked, [4, 2])
    assert said[0][-1] is None
    np.testing.assert_array_equal(by_pillow(asked.output), whole)
    with pytest.raises(ValueError, match=r"checkpoint.every would lose what is on its way"):
        settings(tiny_model, tmp_path / "a.png", mesh=mesh, ladder=ladder, checkpoint={"every": 2})
