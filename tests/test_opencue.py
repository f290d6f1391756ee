"""launch/opencue's script, up to the interpreter that it calls; there is no OpenCue here."""

from pathlib import Path

import pytest

from engine.config import UserError
from tests.command_lines import accepted, words_of

SCRIPT = Path(__file__).parents[1] / "launch" / "opencue" / "frame.sh"


def words_for(folder, seed, *flags):
    return words_of(folder, ["bash", str(SCRIPT), seed, *flags])


def test_a_frame_is_a_seed(tmp_path):
    flags = ["--prompt", 'a "hill" at $HOME', "--output", "out/%a.png"]
    options, settings = accepted(words_for(tmp_path, "7", *flags))
    assert (settings.seed, settings.output) == (7, Path("out/7.png"))
    assert settings.prompt == 'a "hill" at $HOME'
    assert (settings.resume, settings.progress, settings.checkpoint.every) == (True, "plain", 5)
    assert options["nproc_per_node"] is None  # one rank a GPU


def test_flags_of_ones_own_win(tmp_path):
    flags = ["--nproc-per-node", "2", "--checkpoint.every", "9"]
    options, settings = accepted(words_for(tmp_path, "7", *flags))
    assert (options["nproc_per_node"], settings.checkpoint.every) == (2, 9)


def test_a_frame_without_a_number_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="seed"):
        accepted(words_for(tmp_path, "#IFRAME#"))


def test_it_says_that_it_is_untested():
    assert "UNTESTED" in SCRIPT.read_text()
    assert "untested" in (SCRIPT.parent / "README.md").read_text().splitlines()[0]
