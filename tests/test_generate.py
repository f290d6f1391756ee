"""The command line on real ranks: one picture on any number of them, mistakes in a sentence."""

import contextlib
import functools
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine import generate, provenance
from engine.config import Settings
from engine.loading import weight_files
from engine.provenance import weights_sha256
from tests.pictures import by_joining_tiles, by_oiio, by_pillow, pixels_of
from tests.pictures import facts as facts_of
from tests.ranks import run_ranks, torchrun

SIZES = [(512, 512), (384, 256), (328, 256)]  # width, height; 328 px are 41 latent rows
ENGINE = ["-m", "engine.generate"]


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def command_line(mesh, arguments):
    """(exit code, standard output, standard error) of `engine.generate` on this rank."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = generate.main(arguments)
    return code, out.getvalue(), err.getvalue()


def run(ranks, *arguments):
    return run_ranks(ranks, command_line, [str(argument) for argument in arguments])


def paint_all_sizes(mesh, model, folder, guidance):
    """One process paints several sizes, one after the other."""
    for width, height in SIZES:
        size = ["--width", str(width), "--height", str(height), "--mesh.guidance", guidance]
        target = str(folder / f"{width}x{height}-{mesh.size}.png")
        assert generate.main([*size, "--steps=3", "--model", str(model), "--output", target]) == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(model) -> the folder of what one rank paints, in every size."""

    @functools.cache
    def paint(model):
        folder = tmp_path_factory.mktemp("alone")
        run_ranks(1, paint_all_sizes, model, folder, "1")
        return folder

    return paint


def worst_difference(alone, model, folder, ranks, guidance):
    """Paint every size on `ranks`; the largest difference to one rank's of any 8-bit sample."""
    run_ranks(ranks, paint_all_sizes, model, folder, guidance)
    names = [f"{width}x{height}" for width, height in SIZES]
    return {
        name: abs(read(folder / f"{name}-{ranks}.png") - read(alone(model) / f"{name}-1.png")).max()
        for name in names
    }


@pytest.mark.parametrize(
    ("ranks", "guidance"),
    [
        pytest.param(2, "1", marks=pytest.mark.long),
        (3, "1"),
        pytest.param(5, "1", marks=pytest.mark.long),
        (4, "2"),
    ],
)
def test_any_number_of_ranks_paint_the_same_picture(alone, tiny_model, tmp_path, ranks, guidance):
    differences = worst_difference(alone, tiny_model, tmp_path, ranks, guidance)
    assert max(differences.values()) <= 1, differences


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(5, marks=pytest.mark.long)]
)
def test_any_number_of_ranks_paint_the_same_landscape(alone, tmp_path, ranks):
    differences = worst_difference(alone, "demo", tmp_path, ranks, "1")
    assert max(differences.values()) <= 1, differences


@pytest.mark.parametrize("negative", ["", "fog and rain"])
def test_the_command_line_paints_what_diffusers_paints(tiny_model, tmp_path, negative):
    target = tmp_path / "a.png"
    size = ["--height=72", "--width=64", "--steps=3", "--seed=4", "--mesh.guidance=1"]
    words = ["--prompt=a lake", "--negative-prompt", negative]
    run(2, "--model", tiny_model, "--output", target, *size, *words)
    pipe = engine.load(str(tiny_model))
    image = pipe(
        "a lake", height=72, width=64, num_inference_steps=3, guidance_scale=4.0,
        negative_prompt=negative or None, generator=torch.Generator().manual_seed(4),
    ).images[0]  # fmt: skip
    assert abs(read(target) - np.asarray(image)).max() <= 1


def test_the_seed_alone_changes_the_picture(tiny_model, tmp_path):
    def paint(name, seed):
        target = tmp_path / name
        size = ["--height=64", "--width=64", "--steps=2", f"--seed={seed}"]
        [(code, _, _), _] = run(2, "--model", tiny_model, "--output", target, *size)
        assert code == 0
        return target.read_bytes()

    first, again, other = paint("a.png", 7), paint("b.png", 7), paint("c.png", 8)
    assert first == again
    assert first != other


def test_the_last_line_tells_what_was_painted_and_what_it_took(tiny_model, tmp_path):
    target = tmp_path / "a.png"
    results = run(
        2, "--model", tiny_model, "--output", target, "--height=64", "--width=96", "--steps=1"
    )
    assert [code for code, _, _ in results] == [0, 0]
    assert results[1][1] == ""
    line = results[0][1].splitlines()[-1]
    assert line.startswith(f"{target}: 96x64 px in ")
    assert " s on 2 ranks, " in line
    assert line.endswith(" MB sent per rank")


def test_a_page_to_look_at_stands_beside_the_picture(tiny_model, tmp_path, monkeypatch):
    target, beside = tmp_path / "a.png", tmp_path / "a.dzi"
    size = ["--model", tiny_model, "--height=64", "--width=96", "--steps=1"]
    view = ["--file.view", "--file.tiles=png", "--file.bits=16"]
    results = run(2, *size, *view, "--output", target)
    assert [code for code, _, _ in results] == [0, 0]
    assert (tmp_path / "a.html").exists()
    deep = by_oiio(target)
    assert deep.dtype == np.uint16
    tiles = by_joining_tiles(beside)
    assert abs(tiles - deep / 257).max() < 0.51
    monkeypatch.chdir(tmp_path)
    for picture in (target, beside):  # each is painted again by what it says
        [(code, _, err), _] = run(
            2, "--config", picture, "--output", tmp_path / f"b{picture.suffix}"
        )
        assert code == 0, err
    assert (by_oiio(tmp_path / "b.png") == deep).all()
    assert (by_joining_tiles(tmp_path / "b.dzi") == tiles).all()
    again = [*size, *view, "--output", target, "--resume"]
    assert "is finished already" in run(2, *again)[0][1]
    for part in (beside, tmp_path / "a.html"):
        part.unlink()
    shutil.rmtree(tmp_path / "a_files")
    assert "is finished already" not in run(2, *again)[0][1]
    assert beside.exists()
    [(code, _, err), _] = run(2, *size, "--file.view", "--output", beside)
    assert code == 2
    assert "is there to be looked at as it is" in err


def test_the_file_tells_how_it_was_made(tiny_model, tmp_path):
    target = tmp_path / "a.png"
    prompt = "ein See in der Dämmerung, 湖"
    run(1, "--model", tiny_model, "--output", target, "--height=32", "--width=32", "--steps=1",
        "--seed=5", "--prompt", prompt, "--negative-prompt=fog")  # fmt: skip
    text = Image.open(target).text
    facts = json.loads(text["linfusion-engine"])
    settings, around = facts["settings"], facts["run"]
    assert text["prompt"] == settings["prompt"] == prompt
    assert (settings["seed"], settings["steps"], settings["negative_prompt"]) == (5, 1, "fog")
    assert (settings["dtype"], settings["codec"]["rungs"]) == ("float32", ["exact"])
    assert settings["model"] == str(tiny_model)
    assert settings["model_sha256"] == weights_sha256(weight_files(str(tiny_model)))
    modules = weight_files(str(tiny_model / "linfusion"))
    assert settings["linfusion_sha256"] == weights_sha256(modules)
    assert facts["engine"] == engine.__version__
    assert (around["ranks"], around["device"], around["seams"]) == (1, "cpu", None)
    assert around["versions"]["torch"] == torch.__version__


REPEATED = {
    "a.png": ["--file.bits=16"],
    "b.tif": ["--file.pyramid", "--mesh.guidance=1", "--memory.token-chunks=3"],
    "c.dzi": ["--file.tiles=png", "--ladder.strategy=sdedit", "--ladder.base=64", "--codec.rungs",
              "exact,streaming"],
    "d.exr": ["--dtype=float64"],
    "e.jpg": ["--file.quality=70", "--mesh.synchronisation=displaced", "--mesh.guidance=1"],
    "f.webp": ["--linfusion=none"],
    "g.png": ["--ladder.strategy=sdedit", "--ladder.upscale=own.png", "--ladder.strengths=0.5"],
}  # fmt: skip


def pixels_in(path):
    """What an independent reader sees."""
    if path.suffix == ".dzi":
        return by_joining_tiles(path)
    return by_pillow(path) if path.suffix == ".webp" else by_oiio(path)


def paint_and_paint_again(mesh, model, folder):
    """Every picture of `REPEATED`, and then by nothing but what is in its file."""
    os.chdir(folder)
    for name, flags in REPEATED.items():
        size = ["--height=96", "--width=128", "--steps=3", "--seed=3", "--model", str(model)]
        assert generate.main([*size, *flags, "--output", str(folder / name)]) == 0
        again = ["--config", str(folder / name), "--output", str(folder / "again" / name)]
        assert generate.main(again) == 0


def test_a_finished_picture_is_painted_again_from_its_own_file(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels_of(48, 64)).save("own.png")
    run_ranks(2, paint_and_paint_again, tiny_model, tmp_path)
    for name in REPEATED:
        first, again = tmp_path / name, tmp_path / "again" / name
        np.testing.assert_array_equal(pixels_in(first), pixels_in(again))
        settings = [provenance.read(path)["settings"] for path in (first, again)]
        assert settings[0] == settings[1]
    Image.new("RGB", (64, 48)).save("own.png")
    results = run(1, "--config", tmp_path / "g.png")
    assert "error: ladder.upscale: what is there has the SHA-256" in results[0][2]


def test_a_picture_painted_again_has_its_own_name(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--height=32", "--width=32", "--steps=1"]
    run(1, "--model", tiny_model, "--output", tmp_path / "a.tif", *size)
    with contextlib.chdir(tmp_path):
        settings = Settings.load(["--config", "a.tif"], provenance.read_config)
    assert settings.output == Path("outputs/a.tif")
    assert (settings.height, settings.model) == (32, str(tiny_model))


def test_other_weights_than_those_of_the_picture_are_refused(tiny_model, tmp_path):
    size = ["--height=32", "--width=32", "--steps=1"]
    run(1, "--model", tiny_model, "--output", tmp_path / "a.png", *size)
    results = run(2, "--config", tmp_path / "a.png", "--model", "demo")
    assert [code for code, _, _ in results] == [2, 2]
    found, wanted = (weights_sha256(weight_files(model)) for model in ("demo", str(tiny_model)))
    assert results[0][2] == (
        f"error: model: what is there has the SHA-256 {found}, not {wanted} as model_sha256 asks; "
        "name the same, or --model-sha256 any\n"
    )
    assert results[1][2] == ""
    pinned = ["--model", tiny_model, "--linfusion-sha256", wanted]
    assert "error: linfusion: what is there has" in run(1, *pinned)[0][2]
    nothing = ["--model", tiny_model, "--linfusion=none", "--linfusion-sha256", wanted]
    assert "error: linfusion: has no files" in run(1, *nothing)[0][2]
    free = ["--model-sha256=any", "--linfusion-sha256=any", "--linfusion=none"]
    assert run(1, "--config", tmp_path / "a.png", *free, "--output", tmp_path / "b.png")[0][0] == 0


def test_a_picture_of_another_program_is_no_config(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    results = run(2, "--config", tmp_path / "a.png")
    assert [code for code, _, _ in results] == [2, 2]
    assert results[0][2] == (
        f"error: {tmp_path / 'a.png'}: does not say how it was painted; give a picture that this "
        "engine has written and no other program has saved again\n"
    )


def test_seams_are_one_line_and_in_the_file(tiny_model, tmp_path):
    size = ["--height=96", "--width=64", "--steps=2", "--model", tiny_model]
    results = run(3, *size, "--output", tmp_path / "a.png")
    seams = facts_of(tmp_path / "a.png")["run"]["seams"]
    assert seams["borders"] == 2
    said = [err for _, _, err in results]
    assert said[0].count("seams: at 2 band borders rows differ at most") == 1
    assert "seams" not in said[1] + said[2]


def test_a_configuration_file_is_read_and_flags_win_over_it(tiny_model, tmp_path):
    target, config = tmp_path / "a.png", tmp_path / "a.yaml"
    config.write_text(f"model: {tiny_model}\noutput: {target}\nheight: 32\nwidth: 64\nsteps: 1\n")
    [(code, _, _)] = run(1, "--config", config, "--width", "48")
    assert code == 0
    assert read(target).shape == (32, 48, 3)


def test_displaced_mode_is_another_picture_and_says_so(tiny_model, tmp_path):
    def paint(name, *flags):
        target = tmp_path / name
        size = ["--height=64", "--width=64", "--steps=4", "--mesh.guidance=1", *flags]
        codes = [code for code, _, _ in run(2, "--model", tiny_model, "--output", target, *size)]
        assert codes == [0, 0]
        return read(target), facts_of(target)["settings"]

    exact, _ = paint("exact.png")
    displaced = ["--mesh.synchronisation=displaced", "--mesh.warmup-steps"]
    warm, facts = paint("warm.png", *displaced, "4")
    stale, _ = paint("stale.png", *displaced, "1")
    assert facts["mesh"] == {"guidance": "1", "synchronisation": "displaced", "warmup_steps": 4}
    assert (warm == exact).all()
    assert (stale != exact).any()


MISTAKES = {
    "unknown flag": (["--heigth=64"], "--heigth: unknown flag; did you mean '--height'?"),
    "no multiple of 8": (
        ["--height=250"],
        "--height: 250 px is not a positive multiple of 8; 248 or 256 would work",
    ),
    "too many ranks for the UNet": (
        ["--height=32", "--mesh.guidance=1"],
        "a picture of 32 px height cannot be shared by 2 ranks: start 1, or ask for 40 px or more",
    ),
    "too many ranks for the decoder": (
        ["--height=8"],
        "a picture of 8 px height cannot be shared by 2 ranks: start 1, or ask for 16 px or more",
    ),
    "no number of ranks for these axes": (
        ["--height=8", "--mesh.guidance=2"],
        "a picture of 8 px height cannot be shared by 2 ranks: ask for 16 px or more",
    ),
    "no second side of guidance": (
        ["--mesh.guidance=2", "--guidance-scale=1"],
        "a guidance axis of 2 needs a guidance scale above 1: without it there is one side only",
    ),
    "no writer": (
        ["--output=a.tga"],
        "a.tga: no writer for .tga files; .png, .tif, "
        ".tiff, .exr, .dzi, .jpg, .jpeg or .webp would work",
    ),
    "no GPU": (
        ["--device=cuda"],
        "device cuda needs a GPU for each of the 1 ranks on this host, which has 0: start no "
        "ranks here, or choose --device cpu",
    ),
}


if torch.cuda.is_available():
    del MISTAKES["no GPU"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_on_rank_0_and_exit_code_2_on_all(mistake, tiny_model):
    flags, sentence = MISTAKES[mistake]
    results = run(2, "--model", tiny_model, *flags)
    assert [code for code, _, _ in results] == [2, 2]
    assert [err for _, _, err in results] == [f"error: {sentence}\n", ""]


def test_an_unreadable_model_is_named(tmp_path):
    for model in (tmp_path / "nowhere", tmp_path):
        results = run(2, "--model", model, "--output", tmp_path / "a.png")
        assert [code for code, _, _ in results] == [2, 2]
        message = results[0][2]
        assert f"error: model {str(model)!r} is not readable: give 'demo', a diffusers" in message
        assert message.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "a.png"
    results = run(2, "--model", tiny_model, "--output", target)
    assert [code for code, _, _ in results] == [2, 2]
    assert results[0][2].startswith(f"error: {target}: cannot be written (")


def test_linfusion_modules_that_are_not_there_are_named(tiny_model, tmp_path):
    target = tmp_path / "a.png"
    results = run(2, "--model", tiny_model, "--linfusion", tmp_path / "no", "--output", target)
    assert [code for code, _, _ in results] == [2, 2]
    assert f"LinFusion modules '{tmp_path / 'no'}' are not readable" in results[0][2]
    assert not target.exists()


def paint_onto_a_full_disk(mesh, model, target):
    """A disk that is full for one rank alone, when it closes its part."""
    from engine.output import PngWriter

    if mesh.rank == 1:
        PngWriter.close = fail_with_full_disk
    size = ["--height=64", "--width=64", "--steps=1"]
    return command_line(mesh, ["--model", str(model), "--output", str(target), *size])


def fail_with_full_disk(part):
    raise OSError(28, "No space left on device")


def test_a_full_disk_on_one_rank_ends_all_and_leaves_what_was_painted(tiny_model, tmp_path):
    target = tmp_path / "a.png"
    results = run_ranks(2, paint_onto_a_full_disk, tiny_model, target)
    assert [code for code, _, _ in results] == [2, 2]
    assert results[0][2].splitlines()[-1] == (
        f"error: {target}: writing failed (no space left on device); free some space or name "
        "another folder"
    )
    assert os.listdir(tmp_path) == [".a.png.checkpoint"]
    resumed = run(2, "--model", tiny_model, "--output", target, "--height=64", "--width=64",
                  "--steps=1", "--resume")  # fmt: skip
    assert [code for code, _, _ in resumed] == [0, 0]
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.slow
def test_torchrun_paints(tiny_model, tmp_path):
    target = tmp_path / "a.png"
    size = ["--height=72", "--width=64", "--steps=2"]
    code, out, err = torchrun(3, *ENGINE, "--model", tiny_model, "--output", target, *size)
    assert code == 0, err
    assert out.startswith(f"{target}: 64x72 px in ")
    assert " s on 3 ranks, " in out
    run(1, "--model", tiny_model, "--output", tmp_path / "b.png", *size)
    assert abs(read(target) - read(tmp_path / "b.png")).max() <= 1


@pytest.mark.slow
def test_torchrun_ends_on_a_mistake_with_its_sentence():
    code, _, err = torchrun(2, *ENGINE, "--setps", "3")
    assert code != 0
    assert err.count("error: --setps: unknown flag; did you mean '--steps'?") == 1
    assert "engine/generate.py" not in err, "a traceback through the engine"
