"""Many pictures in one job, on real ranks: the same as one by one, and each fails for itself."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

import engine.pipeline
from engine import batch, painter
from engine.bands import open_mesh
from engine.config import Settings, UserError
from engine.exits import DONE, FAILED, MISTAKEN, STOPPED
from engine.jobs import Row
from engine.keeper import Control
from tests.ranks import run_ranks
from tests.test_generate import run

SMALL = {"height": 64, "width": 64, "steps": 2, "device": "cpu"}


def write_job(folder, model, **values):
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "model": str(model), **values}))
    return file


def samples(path):
    return np.asarray(Image.open(path)).astype(int)


def rows_of(folder, model, count, **values):
    return [
        Row(i, f"row {i}", Settings(**{**SMALL, **values}, model=str(model), seed=i, resume=True,
                                    output=folder / f"{i}.png"))
        for i in range(1, count + 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "groups"), [(1, 1), pytest.param(2, 1, marks=pytest.mark.long), (2, 2), (4, 2)]
)
def test_they_are_the_pictures_that_they_are_alone(tiny_model, tmp_path, ranks, groups):
    pictures = [{"seed": "1-3", "prompt": ["a lake", "a hill"]}, {"seed": 9, "size": "96x72"}]
    output = str(tmp_path / "{index}.png")
    mesh = {"image": groups, "guidance": "1"}
    file = write_job(tmp_path, tiny_model, output=output, pictures=pictures, mesh=mesh)
    results = run(ranks, "--config", file)
    assert [code for code, _, _ in results] == [DONE] * ranks
    assert results[0][1].splitlines()[-1] == "7 of 7 pictures are done"
    alone = ["--model", tiny_model, "--steps=2", "--seed=9", "--width=96", "--height=72"]
    run(ranks // groups, *alone, "--mesh.guidance=1", "--output", tmp_path / "alone.png")
    assert (samples(tmp_path / "7.png") == samples(tmp_path / "alone.png")).all()
    assert (samples(tmp_path / "1.png") != samples(tmp_path / "2.png")).any()


def paint_and_count_loads(mesh, rows):
    loads = []
    load = engine.pipeline.load
    engine.pipeline.load = lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs)
    report = batch.paint_all(rows, mesh, mesh, Control())
    return report.code, len(loads)


def test_weights_are_loaded_once_for_each_model(tiny_model, tmp_path):
    rows = rows_of(tmp_path, tiny_model, 6)
    in_halves = rows[1].settings.model_copy(update={"dtype": "float64"})
    for position in (1, 4):
        changed = in_halves.model_copy(update={"output": tmp_path / f"other{position}.png"})
        rows[position] = replace(rows[position], settings=changed)
    assert run_ranks(2, paint_and_count_loads, rows) == [(DONE, 2)] * 2


def test_what_is_finished_is_left_alone(tiny_model, tmp_path):
    values = {"output": str(tmp_path / "{index}.png"), "pictures": {"seed": "1-3"}}
    file = write_job(tmp_path, tiny_model, **values)
    run(2, "--config", file)
    (tmp_path / "2.png").unlink()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in ("1.png", "3.png")}
    [(code, out, _), _] = run(2, "--config", file)
    assert code == DONE
    assert out.splitlines()[-1] == "3 of 3 pictures are done, 2 of them before"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert (tmp_path / "2.png").exists()


@pytest.mark.parametrize("progress", ["plain", "json"])
def test_wrong_rows_fail_alone_and_are_reported(tiny_model, tmp_path, progress):
    table = tmp_path / "shots.csv"
    missing = tmp_path / "missing.png"
    lines = ["seed,steps,ladder.strategy,ladder.upscale", "1,2,,", "2,0,,", f"3,2,sdedit,{missing}"]
    table.write_text("\n".join([*lines, "4,2,,\n"]))
    output = str(tmp_path / "{index}.png")
    file = write_job(tmp_path, tiny_model, output=output, pictures=str(table))
    results = run(2, "--config", file, "--progress", progress)
    assert [code for code, _, _ in results] == [MISTAKEN] * 2
    said, second, third = results[0][2].splitlines()[-3:]
    assert said == "error: 2 of 4 pictures are done"
    assert second.startswith(f"  picture 2 ({table}, line 3): ")
    assert second.endswith("steps: 0 is too small; 1 or more would work")
    assert third.startswith(f"  picture 3 ({table}, line 4): ")
    assert str(missing) in third
    assert [(tmp_path / f"{i}.png").exists() for i in (1, 2, 3, 4)] == [True, False, False, True]
    if progress == "json":
        events = [json.loads(line) for line in results[0][1].splitlines() if line[0] == "{"]
        ends = [(e["index"], e["outcome"]) for e in events if e["event"] == "end"]
        assert ends == [(2, "mistake"), (1, "done"), (3, "mistake"), (4, "done")]
        shares = [(e["finished"] + e["share"]) / e["pictures"] for e in events if "share" in e]
        assert shares == sorted(shares)


def fail_where(mesh, rows, prompt, ranks):
    """What becomes of the rows if painting `prompt` fails on `ranks`."""
    painter.MEETING_S = 5.0
    latent = engine.pipeline.Engine._climb_all

    def climb(self, settings, keeper=None):
        if settings.prompt == prompt and mesh.rank in ranks:
            raise ArithmeticError("of this picture")
        return latent(self, settings, keeper)

    engine.pipeline.Engine._climb_all = climb
    try:
        report = batch.paint_all(rows, mesh, mesh, Control())
    except (ArithmeticError, RuntimeError) as error:
        return type(error).__name__, []
    return report.code, [outcome.word for outcome in report.outcomes]


def rows_with_a_bad_one(folder, model):
    rows = rows_of(folder, model, 3)
    bad = rows[1].settings.model_copy(update={"prompt": "bad"})
    return [rows[0], replace(rows[1], settings=bad), rows[2]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failure_on_all_ranks_is_one_pictures_own(tiny_model, tmp_path, ranks):
    rows = rows_with_a_bad_one(tmp_path, tiny_model)
    results = run_ranks(ranks, fail_where, rows, "bad", range(ranks))
    assert results == [(FAILED, ["done", "failed", "done"])] * ranks


def fail_and_leave(mesh, rows, folder):
    """As `fail_where` on rank 1 alone, told by a file: there is no leaving in good order."""
    word, _ = fail_where(mesh, rows, "bad", [1])
    (folder / f"{mesh.rank}.word").write_text(str(word))
    if mesh.rank == 1:
        raise SystemExit  # as the command line ends
    time.sleep(600)


def test_a_failure_on_one_rank_ends_the_job(tiny_model, tmp_path):
    """The other one is inside a layer, and must not take the meeting for the layer's exchange."""
    with pytest.raises(AssertionError, match="rank 1 failed"):
        run_ranks(2, fail_and_leave, rows_with_a_bad_one(tmp_path, tiny_model), tmp_path)
    assert (tmp_path / "1.word").read_text() == "ArithmeticError"
    assert (tmp_path / "1.png").exists()
    assert not (tmp_path / "3.png").exists()


def stop_in_the_second(mesh, rows):
    steps = []

    def tell(progress):
        steps.append(progress)

    def should_stop():
        return len([p for p in steps if p.phase == "painting" and p.step]) >= 3

    report = batch.paint_all(rows, mesh, mesh, Control(tell, should_stop))
    return report.code, [outcome and outcome.word for outcome in report.outcomes], str(report)


def paint_rows(mesh, rows):
    return batch.paint_all(rows, mesh, mesh, Control()).code


def test_a_job_that_is_told_to_stop_goes_on_later(tiny_model, tmp_path):
    (tmp_path / "other").mkdir()
    rows, others = (rows_of(f, tiny_model, 3) for f in (tmp_path, tmp_path / "other"))
    code, words, said = run_ranks(2, stop_in_the_second, rows)[0]
    assert (code, words) == (STOPPED, ["done", "stopped", None])
    assert said == "1 of 3 pictures are done; stopped as told, 2 are left"
    assert run_ranks(2, paint_rows, rows) == run_ranks(2, paint_rows, others) == [DONE, DONE]
    for i in (1, 2, 3):
        same = samples(tmp_path / f"{i}.png") == samples(tmp_path / "other" / f"{i}.png")
        assert same.all()


def be_late(mesh, rows):
    """The second group takes longer than any collective may."""
    paint = painter.Painter.paint

    def paint_slowly(self, settings):
        if mesh.rank == 1:
            time.sleep(7)
        return paint(self, settings)

    painter.Painter.paint = paint_slowly
    mesh = mesh.again(3.0)
    waited = []
    report = batch.paint_all(
        rows, mesh, mesh.side_by_side(2), Control(), wait=lambda: waited.append(mesh.rank)
    )
    return report.code, bool(waited)


def test_groups_that_come_to_their_ends_late_are_waited_for(tiny_model, tmp_path):
    (first, waited), (second, _) = run_ranks(2, be_late, rows_of(tmp_path, tiny_model, 3))
    assert (first, second, waited) == (DONE, DONE, True)
    assert all((tmp_path / f"{i}.png").exists() for i in (1, 2, 3))


def test_the_plan_of_many_names_each_kind_once(tiny_model, tmp_path):
    pictures = [{"seed": "1-3"}, {"size": "96x72", "seed": [1, 2]}]
    output = str(tmp_path / "{index}.png")
    file = write_job(tmp_path, tiny_model, output=output, pictures=pictures)
    [(code, out, _), _] = run(2, "--config", file, "--plan")
    assert code == DONE
    assert [line for line in out.splitlines() if line.endswith(" x")] == ["3 x", "2 x"]
    assert not list(tmp_path.glob("*.png"))


def test_the_image_axis_wants_many_pictures_and_equal_groups(tiny_model, tmp_path):
    one = ["--model", tiny_model, "--mesh.image=2", "--output", tmp_path / "a.png"]
    [(code, _, err), _] = run(2, *one)
    assert code == MISTAKEN
    assert "mesh.image: goes with many pictures" in err
    output = str(tmp_path / "{index}.png")
    file = write_job(tmp_path, tiny_model, output=output, pictures={"seed": "1-3"})
    [(code, _, err), _] = run(2, "--config", file, "--mesh.image=3")
    assert code == MISTAKEN
    assert "2 ranks do not fall into 3 equal groups" in err


def test_a_report_says_first_what_is_worth_another_try():
    rows = [Row(i, f"row {i}", UserError("wrong")) for i in (1, 2, 3)]
    done, failed = painter.Outcome("done", "a"), painter.Outcome("failed", "b")
    mistake = painter.Outcome("mistake", "c")
    codes = [
        batch.Report(rows, outcomes).code
        for outcomes in (
            [done, failed, None], [done, failed, mistake], [done, mistake, done], [done] * 3
        )
    ]  # fmt: skip
    assert codes == [STOPPED, FAILED, MISTAKEN, DONE]


def test_one_rank_alone_needs_no_store(tiny_model, tmp_path):
    with open_mesh() as mesh:
        report = batch.paint_all(rows_of(tmp_path, tiny_model, 2), mesh, mesh, Control())
    assert str(report) == "2 of 2 pictures are done"
