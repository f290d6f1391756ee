"""Many pictures in one job: which rows a file and flags come to, and what is wrong with them."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.config import UserError
from engine.jobs import read_job
from engine.tables import parse_ranges


def job(folder, *flags, **values):
    """The job of a file with these values."""
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return read_job(["--config", str(file), *flags])


def pictures(folder, *flags, **values):
    return [row.settings for row in job(folder, *flags, **values).rows]


def mistake(folder, *flags, **values):
    with pytest.raises(UserError) as caught:
        job(folder, *flags, **values)
    return str(caught.value)


BY_INDEX = "outputs/{index:02d}.png"


def test_without_pictures_a_job_is_one(tmp_path):
    only = job(tmp_path, prompt="a {lake}")
    assert not only.many
    assert only.settings.prompt == "a {lake}"  # braces are the prompt's own
    assert not only.settings.resume


def test_lists_and_ranges_make_every_combination(tmp_path):
    rows = pictures(
        tmp_path,
        output=BY_INDEX,
        pictures=[{"prompt": ["a lake", "a hill"], "seed": "1-5:2,9"}],
    )
    assert [(row.prompt, row.seed) for row in rows] == [
        (prompt, seed) for prompt in ("a lake", "a hill") for seed in (1, 3, 5, 9)
    ]
    assert [row.output for row in rows] == [Path(f"outputs/{i:02d}.png") for i in range(1, 9)]


def test_rows_are_over_the_file_and_flags_over_rows(tmp_path):
    values = {"output": BY_INDEX, "steps": 5, "guidance_scale": 2.0}
    rows = pictures(
        tmp_path,
        "--guidance-scale",
        "3",
        **values,
        pictures=[{"steps": 7, "guidance_scale": 1}, {}],
    )
    assert [(row.steps, row.guidance_scale) for row in rows] == [(7, 3.0), (5, 3.0)]


def test_sizes_are_pairs(tmp_path):
    rows = pictures(tmp_path, output=BY_INDEX, pictures={"size": ["64x32", "128 x 64"]})
    assert [(row.width, row.height) for row in rows] == [(64, 32), (128, 64)]


def test_settings_that_are_lists_vary_by_lists_of_lists(tmp_path):
    ladder = {"strategy": "sdedit", "steps": [20, 15]}
    both = {"strategy": "sdedit", "steps": [[20, 15], [9]]}
    rows = pictures(tmp_path, output=BY_INDEX, pictures=[{"ladder": ladder}, {"ladder": both}])
    assert [row.ladder.steps for row in rows] == [(20, 15), (20, 15), (9,)]


def test_names_of_ones_own_are_for_texts(tmp_path):
    rows = pictures(
        tmp_path,
        output="{shot}/{frame:04d}_{width}_{prompt}.png",
        ladder={"strategy": "sdedit", "upscale": "plates/{frame:03d}.png"},
        prompt="{scene} at dawn!",
        pictures=[{"frame": "8-9", "shot": "sc01", "scene": "a lake"}],
    )
    assert [str(row.ladder.upscale) for row in rows] == ["plates/008.png", "plates/009.png"]
    assert [row.prompt for row in rows] == ["a lake at dawn!"] * 2
    assert str(rows[0].output) == "sc01/0008_384_a_lake_at_dawn.png"


def test_a_table_of_cells(tmp_path):
    table = tmp_path / "shots.csv"
    text = '\ufeffprompt,seed,ladder.strategy,shot\n"a lake, a boat",7,sdedit,a\na hill,,,b\n'
    table.write_text(text, encoding="utf-8")
    rows = pictures(tmp_path, output="{shot}_{seed:03d}.png", pictures=str(table))
    assert [(row.prompt, row.seed, row.ladder.strategy) for row in rows] == [
        ("a lake, a boat", 7, "sdedit"),
        ("a hill", 0, "none"),
    ]
    assert [str(row.output) for row in rows] == ["a_007.png", "b_000.png"]


def test_a_table_of_objects_times_a_list(tmp_path):
    table = tmp_path / "shots.jsonl"
    said = [{"prompt": "a"}, {"prompt": "b", "ladder": {"strategy": "sdedit", "steps": [3, 2]}}]
    table.write_text("\n\n".join(map(json.dumps, said)))
    rows = pictures(tmp_path, output=BY_INDEX, pictures={"rows": str(table), "seed": [1, 2]})
    assert [(row.seed, row.prompt) for row in rows] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert rows[1].ladder.steps == (3, 2)


def test_a_table_by_flag(tmp_path):
    table = tmp_path / "shots.tsv"
    table.write_text("prompt\tseed\na\t1\nb\t2\n")
    rows = read_job(["--pictures", str(table), "--output", BY_INDEX]).rows
    assert [row.settings.seed for row in rows] == [1, 2]


def test_pictures_spelt_out_by_flag():
    rows = read_job(["--pictures", '{seed: "1-3:2,9"}', "--output", BY_INDEX]).rows
    assert [row.settings.seed for row in rows] == [1, 3, 9]
    with pytest.raises(UserError, match="pictures: line 1: "):
        read_job(["--pictures", "{seed: 1", "--output", BY_INDEX])


def test_rows_are_resumed_unless_told_otherwise(tmp_path):
    values = {"output": BY_INDEX, "pictures": [{"seed": [1, 2]}]}
    assert all(row.resume for row in pictures(tmp_path, **values))
    assert not any(row.resume for row in pictures(tmp_path, "--resume", "false", **values))


def test_some_rows_by_their_numbers(tmp_path):
    rows = job(tmp_path, "--only", "2,4-5", output=BY_INDEX, pictures={"seed": "10-19"}).rows
    assert [(row.index, row.settings.seed) for row in rows] == [(2, 11), (4, 13), (5, 14)]


def test_a_row_that_is_wrong_keeps_its_mistake_to_itself(tmp_path):
    table = tmp_path / "shots.csv"
    table.write_text("prompt,steps\na,5\nb,0\nc,5,9\nd,6\n")
    rows = job(tmp_path, output=BY_INDEX, pictures=str(table)).rows
    assert [isinstance(row.settings, UserError) for row in rows] == [False, True, True, False]
    assert str(rows[1]) == f"picture 2 ({table}, line 3)"
    assert "0 is too small; 1 or more would work" in str(rows[1].settings)
    assert "has not the 2 cells of the first line" in str(rows[2].settings)


MISTAKES = [
    ({"pictures": [{"promt": "a", "seed": 1}]}, "promt: unknown key; did you mean 'prompt'?"),
    ({"pictures": [{"seed": [1, 2]}]}, "output: pictures 1 and 2 would both be picture.png"),
    (
        {"pictures": [{"o": ["a.png", "a.tif"], "file": {"view": True}}], "output": "{o}"},
        "output: pictures 1 and 2 would both be a.dzi",
    ),
    (
        {
            "pictures": [{"o": ["a/1.png", "b/1.png"]}],
            "output": "{o}",
            "checkpoint": {"folder": "kept"},
        },
        "output: pictures 1 and 2 would both be the checkpoint of 1.png",
    ),
    ({"pictures": 7}, "pictures: not a list of settings"),
    ({"pictures": []}, "pictures: there are none"),
    ({"pictures": [{"seed": []}]}, "seed: an empty list makes no pictures"),
    ({"pictures": [{"seed": "9-1"}]}, "'9-1' has no numbers"),
    ({"pictures": [{"size": "64"}]}, "size: '64' is no size"),
    ({"pictures": [{"stall_s": 3}]}, "stall_s: is of the whole job"),
    ({"pictures": "shots.txt"}, "shots.txt: no table that can be read"),
    ({"pictures": "nowhere.csv"}, "nowhere.csv: no such file or directory"),
    ({"pictures": [{"seed": 1}], "output": "{sed}.png"}, "{sed}: unknown name; did you mean"),
    ({"pictures": [{"f": "a"}], "output": "{f:04d}.png"}, "{f:04d}: 'a' cannot be written so"),
    ({"pictures": [{"seed": "1-3"}], "output": BY_INDEX, "steps": 0}, "steps: 0 is too small"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_mistakes(tmp_path, monkeypatch, values, said):
    monkeypatch.chdir(tmp_path)
    assert said in mistake(tmp_path, **values)


def test_only_goes_with_many_and_within_them(tmp_path):
    assert "goes with many pictures" in mistake(tmp_path, "--only", "3", seed=1)
    many = {"output": BY_INDEX, "pictures": {"seed": "1-3"}}
    assert "there is no picture 4; they are 1 to 3" in mistake(tmp_path, "--only", "2-4", **many)
    assert "is no range" in mistake(tmp_path, "--only", "two", **many)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), st.integers(1, 4)), min_size=1))
def test_ranges_are_pythons(parts):
    text = ",".join(f"{first}-{first + more}:{stride}" for first, more, stride in parts)
    numbers = [n for first, more, stride in parts for n in range(first, first + more + 1, stride)]
    assert parse_ranges(text) == numbers
