"""Settings: what wins, and the sentence for every mistake, in full."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field, ValidationError

from engine.config import Settings, UserError

GROUPS = ("mesh", "ladder", "codec", "memory", "file", "checkpoint")


class Format(BaseModel, extra="forbid"):
    name: str = Field(default="png", description="Which format.")
    bits: int = Field(default=8, description="Bits a sample.")


class Grouped(Settings):
    """Settings with one more group."""

    encode: Format = Field(default=Format(), description="How to encode.")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def from_yaml(text: str, *flags: str, settings: type[Settings] = Settings) -> Settings:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return settings.load(["--config", "x.yaml", *flags])


def refusal(*argv: str, settings: type[Settings] = Settings) -> str:
    with pytest.raises(UserError) as caught:
        settings.load(argv)
    return str(caught.value)


def yaml_refusal(text: str, *flags: str, settings: type[Settings] = Settings) -> str:
    with pytest.raises(UserError) as caught:
        from_yaml(text, *flags, settings=settings)
    return str(caught.value)


# --- what works -----------------------------------------------------------------------------------


def test_defaults() -> None:
    assert Settings.load([]) == Settings()
    assert Settings().output == Path("outputs/picture.png")


def test_argv_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", "--seed", "7"])
    assert Settings.load().seed == 7


def test_flags_win_over_the_file_and_the_file_over_defaults() -> None:
    settings = from_yaml("height: 512\nseed: 3\n", "--seed=4", "--guidance-scale", "2")
    assert (settings.height, settings.seed, settings.guidance_scale) == (512, 4, 2.0)
    assert settings.width == Settings().width


def test_a_flag_mends_a_bad_value_of_the_file() -> None:
    assert from_yaml("height: 250\n", "--height", "256").height == 256


@pytest.mark.parametrize("argv", [["--config", "y.yaml"], ["--config=y.yaml"]])
def test_both_spellings_of_config(argv: list[str]) -> None:
    Path("y.yaml").write_text("steps: 5")
    assert Settings.load(argv).steps == 5


@pytest.mark.parametrize("text", ["", "# steps: 5\n", "---\n"])
def test_a_file_without_settings(text: str) -> None:
    assert from_yaml(text) == Settings()


def test_every_setting_from_the_file_and_from_flags() -> None:
    values = {
        **Settings(prompt="a", height=8, width=16, seed=2**63 - 1, steps=1).provenance(),
        **{"output": "a/b.png", "device": "cpu", "dtype": "float64", "timeout_s": 1.5},
    }
    expected = Settings.model_validate(values)
    assert from_yaml(json.dumps(values)) == expected
    flags = [
        f"--{key.replace('_', '-')}{f'.{name}' if name else ''}={setting}"
        for key, value in values.items()
        for name, setting in (value if isinstance(value, dict) else {"": value}).items()
    ]
    assert Settings.load(flags) == expected


@pytest.mark.parametrize(
    "prompt", ["no", "on", "null", "123", "-foo", "--help", "", "two words", "a=b", "夕暮れ", "'"]
)
def test_prompts_are_taken_as_they_are(prompt: str) -> None:
    assert Settings.load([f"--prompt={prompt}"]).prompt == prompt


@pytest.mark.parametrize("prompt", ["no", "on", "null", "123", "", "two words", "a=b", "夕暮れ"])
def test_prompts_as_a_word_of_their_own(prompt: str) -> None:
    assert Settings.load(["--prompt", prompt, "--seed", "1"]).prompt == prompt


@pytest.mark.parametrize(
    "argv", [["--local_rank=1"], ["--local-rank", "1"], ["--seed", "0", "--local_rank", "1"]]
)
def test_what_launchers_append_is_ignored(argv: list[str]) -> None:
    assert Settings.load(argv) == Settings()


def test_underscores_in_flags() -> None:
    assert Settings.load(["--negative_prompt", "people"]).negative_prompt == "people"


def test_groups() -> None:
    settings = from_yaml("encode: {bits: 16}", "--encode.name", "exr", settings=Grouped)
    assert isinstance(settings, Grouped)
    assert settings.encode == Format(name="exr", bits=16)


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1  # type: ignore[misc]


def test_provenance_is_what_determines_the_picture() -> None:
    elsewhere = Settings(output=Path("b.png"), device="cpu", timeout_s=1)
    assert elsewhere.provenance() == Settings().provenance()
    assert json.loads(json.dumps(elsewhere.provenance())) == {
        "prompt": "snowy mountains above a lake at sunset",
        "negative_prompt": "",
        "height": 256,
        "width": 384,
        "seed": 0,
        "steps": 30,
        "guidance_scale": 4.0,
        "model": "demo",
        "linfusion": "auto",
        "dtype": "auto",
        "codec": {"mode": "auto", "statistics_px": 512, "passes": 2, "chunk_rows": 8},
        "ladder": {"strategy": "none"},
    }


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        Grouped.load(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, info in Settings.model_fields.items():
        group = info.annotation if name in GROUPS else None
        for key, setting in (group.model_fields if group else {"": info}).items():
            flag = f"{name}.{key}" if key else name
            assert f"--{flag.replace('_', '-')} " in text
            assert setting.description in text
    for flag in ("guidance {auto,1,2}", "synchronisation {exact,displaced}", "warmup-steps"):
        assert f"--mesh.{flag}" in text
    assert "--config FILE.yaml" in text
    assert "--encode.bits INT" in text
    assert "--device {auto,cpu,cuda}" in text
    assert "(default: 256)" in text


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, engine.config; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    )


# --- what does not --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--height 250", "250 px is not a positive multiple of 8; 248 or 256 would work"),
        ("--height 3", "3 px is not a positive multiple of 8; 8 would work"),
        ("--width 0", "0 px is not a positive multiple of 8; 8 would work"),
        ("--width=-8", "-8 px is not a positive multiple of 8; 8 would work"),
        ("--height abc", "'abc' is not a whole number; write one such as 8"),
        ("--height 256.5", "'256.5' is not a whole number; write one such as 8"),
        ("--seed -1", "-1 is too small; 0 or more would work"),
        (f"--seed {2**63}", f"{2**63} is too large; {2**63 - 1} or less would work"),
        ("--steps 0", "0 is too small; 1 or more would work"),
        ("--guidance-scale x", "'x' is not a finite number; write one such as 4.5"),
        ("--guidance-scale inf", "'inf' is not a finite number; write one such as 4.5"),
        ("--guidance-scale=-1", "-1 is too small; 0 or more would work"),
        ("--guidance-scale nan", "nan is too small; 0 or more would work"),
        ("--timeout-s 0", "0 is too small; more than 0 would work"),
        ("--device gpu", "'gpu' is not known; 'auto', 'cpu' or 'cuda' would work"),
        ("--prompt", "the value is missing; write --prompt=VALUE"),
        ("--prompt --seed 1", "the value is missing; write --prompt=VALUE"),
        ("--prompt -foo", "the value is missing; write --prompt=VALUE"),
        ("--config", "the value is missing; write --config=VALUE"),
        ("--prompt a lake", "takes one value but got 2; put it in quotes: --prompt 'a lake'"),
        ("--heigth 256", "unknown flag; did you mean '--height'?"),
        ("--heigth=256", "unknown flag; did you mean '--height'?"),
        ("--guidance_scael 3", "unknown flag; did you mean '--guidance-scale'?"),
        ("--xyzzy", "unknown flag; --help lists them"),
        ("-x", "unknown flag; --help lists them"),
    ],
)
def test_flags_that_do_not_work(argv: str, sentence: str) -> None:
    flag = argv.split()[0].partition("=")[0]
    assert refusal(*argv.split()) == f"{flag}: {sentence}"


def test_a_word_without_a_flag() -> None:
    sentence = "'mountains': not a flag; settings are given as --name value, --help lists them"
    assert refusal("mountains") == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("heigth: 256", "heigth: unknown key; did you mean 'height'?"),
        ("negative-prompt: a", "negative-prompt: unknown key; did you mean 'negative_prompt'?"),
        (
            "1: 2",
            "1: unknown key; the keys are prompt, negative_prompt, height, width, seed, steps, "
            "guidance_scale, model, linfusion, model_sha256, linfusion_sha256, output, "
            "device, dtype, kernels, graphs, mesh, ladder, codec, memory, file, checkpoint, "
            "resume, progress, plan, timeout_s, stall_s",
        ),
        ("height: 250", "height: 250 px is not a positive multiple of 8; 248 or 256 would work"),
        ("height: tall", "height: 'tall' is not a whole number; write one such as 8"),
        ("height: 0.5", "height: 0.5 is not a whole number; write one such as 8"),
        ("height: [8]", "height: [8] is not a whole number; write one such as 8"),
        ("height:", "height: an empty value is not a whole number; write one such as 8"),
        ("seed: true", "seed: 'true' is not a whole number; write one such as 8"),
        ("timeout_s: true", "timeout_s: 'true' is not a finite number; write one such as 4.5"),
        (
            "guidance_scale: .inf",
            "guidance_scale: inf is not a finite number; write one such as 4.5",
        ),
        ("prompt: 123", "prompt: 123 is not text; put it in quotes"),
        ("prompt: no", "prompt: False is not text; put it in quotes"),
        ("prompt:", "prompt: an empty value is not text; put it in quotes"),
        ("output: 3", "output: 3 is not text; put it in quotes"),
        ("device: gpu", "device: 'gpu' is not known; 'auto', 'cpu' or 'cuda' would work"),
        ("seed: 1\nseed: 2", "line 2: seed is set a second time; keep one of the two"),
        ("seed: 1\nprompt: 'a", "line 2: found unexpected end of stream"),
        ("seed: 1\nprompt: a: b", "line 2: mapping values are not allowed here"),
        ("prompt: \x01", "not YAML; remove control characters"),
        ("prompt: 2026-13-01", "month must be in 1..12; put text that looks like a date in quotes"),
        ("- seed", "not a list of settings; write lines such as 'height: 256'"),
        ("seed", "not a list of settings; write lines such as 'height: 256'"),
    ],
)
def test_files_that_do_not_work(text: str, sentence: str) -> None:
    assert yaml_refusal(text) == f"x.yaml: {sentence}"


def test_a_flag_is_blamed_for_its_own_value_only() -> None:
    assert yaml_refusal("height: 250", "--seed", "1").startswith("x.yaml: height: 250 px")
    assert yaml_refusal("height: 256", "--height", "250").startswith("--height: 250 px")


def test_groups_that_do_not_work() -> None:
    def group(text: str, *flags: str) -> str:
        return yaml_refusal(text, *flags, settings=Grouped)

    assert group("encode: {nmae: a}") == "x.yaml: encode.nmae: unknown key; did you mean 'name'?"
    assert group("encode: png", "--encode.bits", "16") == (
        "x.yaml: encode: 'png' is not a group of settings; write them below it, indented"
    )
    assert group("", "--encode.bits", "many") == (
        "--encode.bits: 'many' is not a whole number; write one such as 8"
    )
    assert group("", "--encode.bist", "8") == (
        "--encode.bist: unknown flag; did you mean '--encode.bits'?"
    )


def test_files_that_cannot_be_read() -> None:
    hint = "give the path of a YAML file"
    assert refusal("--config", "no.yaml") == f"--config: no.yaml does not exist; {hint}"
    Path("night.yaml").touch()
    sentence = "--config: nihgt.yml does not exist; did you mean 'night.yaml'?"
    assert refusal("--config", "nihgt.yml") == sentence
    Path("folder").mkdir()
    sentence = "--config: folder: is a directory; give a readable YAML file"
    assert refusal("--config", "folder") == sentence
    Path("latin.yaml").write_bytes(b"prompt: B\xe4ume")
    assert refusal("--config", "latin.yaml") == "latin.yaml: not UTF-8 text; save it as UTF-8"


def test_an_option_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        Settings.load(["--mesh.warmup-steps=2"])
    assert str(caught.value) == (
        "mesh: warmup_steps goes with mesh.synchronisation displaced: choose it, or leave "
        "warmup_steps out"
    )


@pytest.mark.parametrize("spelling", ["[20, 15]", "'20,15'", "'20, 15'"])
def test_several_numbers(spelling: str) -> None:
    assert from_yaml(f"ladder: {{strategy: sdedit, steps: {spelling}}}").ladder.steps == (20, 15)
    flags = ["--ladder.strategy", "sdedit", "--ladder.steps", "20,15", "--ladder.strengths=0.5"]
    assert Settings.load(flags).ladder.steps == (20, 15)
    assert Settings.load(flags).ladder.strengths == (0.5,)


@pytest.mark.parametrize(
    ("ladder", "sentence"),
    [
        ("{base: 512}", "ladder: base goes with a ladder.strategy such as sdedit: choose it, or "),
        ("{strategy: sdedit, wavelet_steps: 3}", "ladder: wavelet_steps goes with ladder.strategy"),
        ("{strategy: wavelet, preset: fast}", "ladder: preset goes with ladder.strategy demofus"),
        ("{strategy: sdedit, sides: [9, 8]}", "ladder: sides must grow from rung to rung: list"),
        ("{strategy: sdedit, sides: [9], growth: 2}", "ladder: growth goes with rungs that grow"),
        ("{strategy: sdedit, upscale: a.png, base: 8}", "ladder: base goes with a base that is"),
        ("{strategy: sdedit, steps: [a]}", "ladder.steps.0: 'a' is not a whole number; write one"),
        ("{strategy: sdedit, strengths: 2}", "ladder.strengths.0: 2 is too large; 1 or less"),
    ],
)
def test_ladders_that_do_not_work(ladder: str, sentence: str) -> None:
    assert yaml_refusal(f"ladder: {ladder}").startswith(f"x.yaml: {sentence}")


def test_branches_that_would_take_each_others_messages_are_refused() -> None:
    flags = ["--ladder.strategy=demofusion", "--mesh.synchronisation=displaced"]
    assert "mesh.synchronisation displaced would hand one branch" in refusal(*flags)
    assert Settings.load(["--ladder.strategy=sdedit", flags[1]]).ladder.strategy == "sdedit"


def test_a_flag_that_says_yes() -> None:
    assert Settings.load(["--plan"]).plan
    assert Settings.load(["--plan", "--seed", "2"]).plan
    assert not Settings.load(["--plan", "no"]).plan
    assert refusal("--plan", "perhaps").startswith("--plan: ")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "sdedit"},
        {"strategy": "demofusion"},
        {"strategy": "wavelet", "sides": (9,)},
    ],
)
@pytest.mark.parametrize("codec", [{"mode": "exact"}, {"rungs": ("exact", "streaming")}])
def test_a_provenance_can_be_read_again(
    options: dict[str, object], codec: dict[str, object]
) -> None:
    mesh = {} if options.get("strategy") == "demofusion" else {"synchronisation": "displaced"}
    settings = Settings.model_validate({"ladder": options, "codec": codec, "mesh": mesh})
    assert Settings.model_validate(settings.provenance()) == settings


def test_what_changes_the_picture_is_in_the_provenance() -> None:
    displaced = Settings.load(["--mesh.synchronisation=displaced", "--mesh.warmup-steps=2"])
    assert displaced.provenance()["mesh"] == {"synchronisation": "displaced", "warmup_steps": 2}
    assert "mesh" not in Settings.load(["--mesh.guidance=1"]).provenance()


def test_the_codec_of_each_rung() -> None:
    codec = from_yaml("codec: {rungs: [exact, streaming]}").codec
    assert [codec.asked(rung) for rung in range(4)] == ["exact"] + 3 * ["streaming"]
    assert Settings().codec.asked(2) == "auto"
    assert Settings.load(["--codec.rungs", "exact,streaming"]).codec == codec
    assert yaml_refusal("codec: {mode: exact, rungs: [exact]}") == (
        "x.yaml: codec: rungs goes with codec.mode auto: choose it, or leave rungs out"
    )


@pytest.mark.parametrize("value", ["abc", "A" * 64, "0" * 63, "None"])
def test_a_hash_that_is_none(value: str) -> None:
    assert refusal("--model-sha256", value) == (
        f"--model-sha256: {value!r} is no SHA-256; write its 64 digits in lower case, or any"
    )


def test_another_way_to_read_the_file() -> None:
    read = {"seed": 5, "width": 64}.copy
    settings = Settings.load(["--config=a.png", "--width=72"], lambda path: {**read(), "steps": 2})
    assert (settings.seed, settings.width, settings.steps) == (5, 72, 2)
