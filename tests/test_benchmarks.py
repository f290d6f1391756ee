"""The arithmetic of benchmarks, and that each comes to its last line at tiny sizes."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import load_file

import engine
from benchmarks import (
    attention,
    common,
    communication,
    end_to_end,
    headline,
    mixers,
    mixing,
    projection,
    report,
)
from benchmarks.common import Aim, Noise
from benchmarks.peers import __main__ as peers
from benchmarks.peers import jobs, models
from engine.bands import Mesh, Traffic, banded
from engine.distill.student import attentions, build_student, learning
from engine.loading import load
from engine.parallel import band_layers
from engine.simulation import pretended
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
TINY = {
    "attention": "--tokens 64 256 --models SD-1.5 --memory-tokens 256 --repeats 1",
    "communication": "--ranks 2 --measured-px 128 --px 1024 --gpus 2 --simulated-gpus 8",
    "scaling": "--px 128 --steps 2 --repeats 1 --modes guidance exact --no-weak",
    "projection": "--px 1024 --timed-px 512 --gpus 2 --most-latents 256 --repeats 1",
    "peers": "--only engine diffusers --ranks 1 --height 64 --width 64 --steps 2 --repeats 1",
    "end_to_end": "--ranks 1 --height 64 --width 64 --steps 2 --repeats 1",
    "headline": "--model demo --height 64 --width 128 --steps 4 --warm-up 0 --set ladder.base=64",
    "mixers": "--steps 2 --pictures 2 --held-out 1 --batch 2",
}


# --- quality --------------------------------------------------------------------------------------


def test_naive_patches_are_pictures_of_their_own():
    quality = pytest.importorskip("benchmarks.quality", exc_type=ImportError)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(2, 4))
    x, traffic = torch.randn(1, 4, 6, 5), Traffic()
    with torch.no_grad():
        expected = network(x)
        band_layers(network)
        with banded(quality.NaivePatches(Mesh(1, 3, torch.device("cpu"), None), traffic)):
            torch.testing.assert_close(network(x), expected)
    assert not traffic.rounds


def test_similarity_is_1_for_the_same_and_falls_with_noise():
    quality = pytest.importorskip("benchmarks.quality", exc_type=ImportError)
    picture = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0)).numpy()
    noise = torch.randn(32, 32, 3, generator=torch.Generator().manual_seed(1)).numpy()
    assert quality.ssim(picture, picture, peak=1) == pytest.approx(1)
    values = [quality.ssim(picture + scale * noise, picture, peak=1) for scale in (0.03, 0.1, 0.3)]
    assert 1 > values[0] > values[1] > values[2]


# --- noise and pairs ------------------------------------------------------------------------------


def test_noise_is_the_median_between_the_extremes():
    assert Noise.of([3.0, 1.0, 10.0]) == Noise(3.0, 1.0, 10.0)
    assert Noise.of([1.0, 2.0]).median == 1.5


def test_functions_take_turns_after_a_first_that_does_not_count():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "ab"}

    def measure(function):
        function()
        return float(len(called))

    assert common.in_turn(functions, 2, measure) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert called == list("ababab")


def test_a_ratio_is_taken_pair_by_pair():
    # A machine that slows down to a tenth meanwhile changes no pair.
    assert common.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == Noise(2.0, 2.0, 2.0)
    assert common.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Noise(2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("value", "at_most", "met"),
    [(0.5, True, True), (2.0, True, False), (2.0, False, True), (0.5, False, False),
     (None, True, None)],
)  # fmt: skip
def test_an_aim_is_met_missed_or_not_measured(value, at_most, met):
    assert Aim("so much", value, 1.0, at_most).met is met


def test_the_last_line_is_json_and_says_what_was_measured_where(tmp_path, capsys):
    options = argparse.Namespace(repeats=2, output=tmp_path)
    record = {"rows": [{"s": Noise(1.0, 0.5, 2.0), "error": float("inf"), "path": Path("a")}]}
    common.finish("trial", options, record, [Aim("aim", 1.0, 2.0)])
    line = capsys.readouterr().out.splitlines()[-1]
    said = json.loads(line)
    assert said["rows"] == [
        {"s": {"median": 1.0, "min": 0.5, "max": 2.0}, "error": None, "path": "a"}
    ]
    assert (said["settings"], said["aims"][0]["met"]) == ({"repeats": 2}, True)
    assert {"device", "cores", "threads", "torch", "diffusers", "date"} <= said["machine"].keys()
    assert (tmp_path / "trial.json").read_text() == line + "\n"


# --- attention ------------------------------------------------------------------------------------


def test_all_linear_forwards_are_one_function():
    options = argparse.Namespace(dtype="float64")
    module = attention.build(attention.SHAPES["SD-1.5"], options)
    with torch.no_grad():
        x = attention.tokens_of(module, 50)
        expected = attention.naive(module, x)
        for forward in (attention.ours, attention.plain):
            torch.testing.assert_close(forward(module, x), expected, rtol=1e-10, atol=1e-12)


def refusals(module, count, seconds):
    """Of every forward, after it has taken so long for 1024 tokens."""
    estimates = {n: attention.Estimate(seconds, 1024, n == "softmax") for n in attention.FORWARDS}
    options = argparse.Namespace(limit_s=8.0)
    return {
        name: attention.refusal(name, count, module, estimates, options) or ""
        for name in attention.FORWARDS
    }


@torch.no_grad()
def test_what_is_left_out_is_said_before_it_is_begun(monkeypatch):
    module = attention.build(attention.SHAPES["SDXL"], argparse.Namespace(dtype="float32"))
    monkeypatch.setattr(attention, "free_bytes", lambda module: 10**13)
    assert not any(refusals(module, 4096, seconds=0.01).values())
    late = refusals(module, 1048576, seconds=0.01)
    assert late["naive"] == "it would take about 10 s, over --limit-s 8"
    assert late["softmax"] == "it would take about 1e+04 s, over --limit-s 8"
    assert not late["ours"]
    monkeypatch.setattr(attention, "free_bytes", lambda module: 24 * 10**9)
    small = refusals(module, 1048576, seconds=0.0001)
    assert small["naive"] == "it would need 29.5 GB, over 60% of the 24.0 GB that are free"
    assert not small["ours"]


def test_ours_is_measured_where_all_others_are_left_out():
    options = argparse.Namespace(dtype="float32", limit_s=0.0, repeats=3)
    module = attention.build(attention.SHAPES["demo"], options)
    estimates = dict.fromkeys(attention.FORWARDS, attention.Estimate(1.0, 64, False))
    with torch.no_grad():
        timed = attention.time_in_turn(module, 64, ["ours"], estimates, options)
    assert timed.keys() == {"ours"}
    assert timed["ours"]["speed_up"] is None


def test_what_is_beside_the_products_is_never_nothing():
    assert attention.beside([5.0, 4.0], [3.0, 6.0]) == [2.0, 0.04]


# --- communication --------------------------------------------------------------------------------


def counted(mesh, model, mode):
    return communication.measure_mode(mesh, model, mode, 16)


@pytest.mark.parametrize("mode", communication.MODES)
def test_formulas_say_what_real_ranks_send(mode):
    for row in run_ranks(2, counted, "quarter SDXL", mode):
        assert communication.deviation(row["sent"], row["formula"]) < 0.1
        assert row["sent"].keys() == row["formula"].keys()
        if mode != "displaced":
            assert row["rounds"] == row["formula_rounds"]


def test_a_deviation_is_the_worst_kind_of_layer():
    assert communication.deviation({"a": 100, "b": 98}, {"a": 100, "b": 100}) == 2.0
    assert communication.deviation({}, {"a": 100}) == 100.0


@pytest.mark.parametrize(
    ("name", "level"),
    [("conv_in", 0), ("down_blocks.1.resnets.0.conv1", 1), ("mid_block.resnets.0.norm1", 2),
     ("up_blocks.0.resnets.0.conv1", 2), ("up_blocks.0.upsamplers.0.conv", 2), ("conv_out", 0)],
)  # fmt: skip
def test_levels_of_layers(name, level):
    assert communication.level_of(name, levels=3) == level


@pytest.mark.slow
def test_published_methods_on_sdxl():
    unet = communication.shapes("SDXL")
    job = communication.Job(ranks=8, rank=1, height=128, width=128, element_bytes=2)
    # Keys and values of all layers at 1024 px are 419.4 MB, rows at borders 8.2, states 10.8.
    softmax, linear = (communication.published(unet, job, linear) / 1e6 for linear in (False, True))
    assert softmax == pytest.approx(7 / 8 * 419.4 + 7 * 8.17, rel=0.005)
    assert linear == pytest.approx(7 * (10.8 + 8.17), rel=0.005)


# --- projection -----------------------------------------------------------------------------------


def test_a_rank_alone_computes_its_band_of_real_numbers():
    unet = projection.build("quarter SDXL")
    band_layers(unet)
    share = projection.share_of(unet, px=256, gpus=4, most_latents=10**9)
    assert (share.rows, share.rows_run, share.width) == (8, 8, 32)
    with torch.inference_mode():
        assert share.run(unet).isfinite().all()
    assert share.traffic.rounds["linear attention"] == 17


def test_shares_that_are_not_there_or_run_in_part():
    with pretended():
        unet = projection.build("quarter SDXL")
    assert projection.share_of(unet, px=256, gpus=9, most_latents=10**9) is None
    share = projection.share_of(unet, px=1024, gpus=2, most_latents=16 * 128)
    assert (share.rows, share.rows_run) == (64, 16)


def test_the_wire_between_nodes_is_another():
    options = argparse.Namespace(latency_us=10, gb_s=100, node_latency_us=50, node_gb_s=10)
    assert projection.wire_s(8, 1e9, 100, options) == pytest.approx((0.001, 0.01))
    assert projection.wire_s(9, 1e9, 100, options) == pytest.approx((0.005, 0.1))
    assert projection.waiting(1.0, 0.005, 0.1) == pytest.approx(1.105)
    assert projection.overlapping(0.05, 0.005, 0.1) == 0.1


# --- mixers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 64), (7, 64), (64, 16), (150, 16), (150, 64)])
def test_the_scan_in_chunks_is_the_scan_token_by_token(tokens, chunk):
    draws = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, tokens, width, generator=draws, dtype=torch.float64)
        for width in (4, 4, 5)
    )
    # From hardly any decay to one that leaves nothing of a chunk.
    decay = -torch.logspace(-3, 1.5, tokens, dtype=torch.float64).expand(2, 3, -1)
    expected = mixing.scan_naive(query, key, value, decay)
    found = mixing.scan(query, key, value, decay, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def mixer_of(name):
    """A mixer in float64 that has learnt something at random."""
    torch.manual_seed(0)
    mixer = mixing.MIXERS[name].from_attention(Attention(query_dim=24, heads=3, dim_head=8))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer.double()


NORMALISED = {"normalised SSM", "normalised, non-causal", "linear attention"}


@pytest.mark.parametrize("name", list(mixing.MIXERS))
def test_the_size_is_nothing_to_normalised_mixers_alone(name):
    mixer = mixer_of(name)
    one = torch.randn(2, 1, 24, dtype=torch.float64)
    with torch.no_grad():
        small, large = (mixer(one.expand(-1, tokens, -1)) for tokens in (16, 64))
    change = (large - small.repeat(1, 4, 1)).abs().max() / small.abs().max()
    assert change < 1e-3 if name in NORMALISED else change > 0.1


@pytest.mark.parametrize("name", ["normalised, non-causal", "linear attention"])
def test_without_an_order_repeated_tokens_change_nothing(name):
    mixer, tokens = mixer_of(name), torch.randn(2, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(tokens.repeat(1, 4, 1)), mixer(tokens).repeat(1, 4, 1))


def test_scans_see_what_is_before_and_behind():
    mixer, tokens = mixer_of("SSM without gate and norm"), torch.randn(1, 9, 24).double()
    seen = torch.autograd.functional.jacobian(lambda x: mixer(x)[0, 4].sum(), tokens)
    assert (seen[0].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("name", list(mixing.MIXERS))
def test_students_learn_with_every_mixer(name):
    teacher = load("demo", "none").unet
    student = build_student(teacher, mixer=mixing.MIXERS[name].from_attention)
    assert {type(attention) for attention in attentions(student)} == {mixing.MIXERS[name]}
    output = student(torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 4, 128)).sample
    output.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in learning(student))


def test_scenes_are_the_same_at_every_size():
    (unit,) = mixers.Scenes(32, range(2)).units()
    small = list(mixers.Scenes(32, range(2)).read(unit))
    large = list(mixers.Scenes(64, range(2)).read(unit))
    assert [sample.name for sample in small] == [sample.name for sample in large]
    for a, b in zip(small, large, strict=True):
        pixels = [np.asarray(p.resize((8, 8))).astype(float) for p in (a.picture, b.picture)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 10


# --- peers ----------------------------------------------------------------------------------------


def no_distrifuser(python=None):
    return jobs.Distrifuser(python, cuda_graph=True, warmup_steps=4, timeout_s=5)


@pytest.mark.parametrize(
    ("ranks", "gpus", "said"),
    [
        (2, 0, "needs a CUDA GPU for each of its 2 ranks, since it exchanges by NCCL, and this "
         "machine has none"),
        (4, 2, "and this machine has 2"),
        (3, 4, "runs on 1, 2, 4, 8, ... ranks, not on 3"),
        (2, 2, "install what is in benchmarks/peers/distrifuser.txt and pass its interpreter as "
         "--distrifuser-python"),
    ],
)  # fmt: skip
def test_distrifusion_is_refused_in_a_sentence(ranks, gpus, said):
    assert said in jobs.why_not_distrifuser(ranks, no_distrifuser(), gpus)


def test_an_interpreter_without_distrifusion_is_named(tmp_path):
    said = jobs.why_not_distrifuser(2, no_distrifuser(Path(sys.executable)), gpus=2)
    assert "cannot import distrifuser: ModuleNotFoundError" in said
    missing = jobs.why_not_distrifuser(2, no_distrifuser(tmp_path / "python"), gpus=2)
    assert "No such file" in missing


def test_what_distrifusion_ends_with_is_said():
    with pytest.raises(jobs.NotRun, match=r"ended with code 1: ValueError: so it is"):
        jobs.run_or_say_why([sys.executable, "-c", "raise ValueError('so it is')"], timeout_s=60)
    with pytest.raises(jobs.NotRun, match=r"not done after 0\.1 s"):
        jobs.run_or_say_why([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.1)


STAND_IN = """
import torch
from PIL import Image
from torch import distributed

for name in ("synchronize", "reset_peak_memory_stats"):
    setattr(torch.cuda, name, lambda: None)


class DistriConfig:
    def __init__(self, height, width, do_classifier_free_guidance, warmup_steps, use_cuda_graph):
        distributed.init_process_group("gloo")
        self.rank, self.size = distributed.get_rank(), (width, height)


class DistriSDPipeline:
    @classmethod
    def from_pretrained(cls, distri_config, pretrained_model_name_or_path, torch_dtype, **options):
        assert not options["requires_safety_checker"]
        pipe = cls()
        pipe.size = distri_config.size
        return pipe

    def set_progress_bar_config(self, disable):
        pass

    def __call__(self, prompt, num_inference_steps, guidance_scale, generator):
        self.images = [Image.new("RGB", self.size)]
        return self


DistriSDXLPipeline = None
"""


def test_distrifusions_script_speaks_its_api(tmp_path, monkeypatch):
    """By a stand-in with the signatures of distrifuser 0.0.1b1, which needs GPUs."""
    package = tmp_path / "distrifuser"
    package.mkdir()
    for name in ("pipelines", "utils"):
        (package / f"{name}.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    how = jobs.Distrifuser(Path(sys.executable), False, warmup_steps=1, timeout_s=200)
    job = jobs.Job("demo", "a", 64, 128, 2, 0, 4.0, "float32")
    measured = jobs.by_distrifuser(2, how, job, tmp_path / "picture.png")
    assert [set(rank) for rank in measured] == [{"s", "cpu_s", "loaded_mb", "peak_mb"}] * 2
    assert Image.open(tmp_path / "picture.png").size == (128, 64)


def test_a_peer_that_cannot_run_is_a_row_and_if_asked_for_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["peers", "--only", "distrifuser"])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert str(ended.value.code).startswith("distrifuser: not run: DistriFusion needs a CUDA GPU")
    printed = capsys.readouterr().out
    assert "DistriFusion, softmax, 2 ranks: not run: DistriFusion needs a CUDA GPU" in printed
    assert "not_run" in json.loads(printed.splitlines()[-1])["rows"][0]


def test_peers_take_turns_and_are_held_against_the_engine(tmp_path):
    painted = []

    def peer(name, s):
        def paint(job, picture):
            painted.append(name)
            return [
                {"s": s * rank, "cpu_s": s, "loaded_mb": 1.0, "peak_mb": 2.0} for rank in (1, 2)
            ]

        return jobs.Peer(name, 2, paint)

    both = {"engine": peer("engine", 1.0), "diffusers": peer("diffusers", 3.0)}
    measured, reasons = peers.measure(both, None, 2, tmp_path)
    assert (painted, reasons) == (["engine", "diffusers"] * 2, {})
    black = torch.zeros(2, 2, 3, dtype=torch.uint8).numpy()
    rows = peers.table_of(both, measured, {}, {"engine": black, "diffusers": black + 1})
    assert (rows[0]["s"].median, rows[1]["to_engine"].median) == (2.0, 3.0)
    assert rows[1]["psnr_db"] == pytest.approx(48.13, abs=0.01)
    assert rows[1]["largest_difference"] == 1


def test_a_folder_for_libraries_of_2023(tmp_path):
    folder = Path(models.readable_by_old("demo", tmp_path))
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    merges = (folder / "tokenizer" / "merges.txt").read_text().splitlines()
    assert "<|endoftext|>" in vocabulary
    assert len(merges[1].split()) == 2
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in encoder)
    assert (folder / "unet" / "config.json").is_symlink()
    assert models.readable_by_old("somebody/something", tmp_path) == "somebody/something"


@pytest.mark.slow
def test_random_weights_paint_with_contrast(tmp_path):
    models.write("quarter SDXL", tmp_path, torch.float32)
    pipe = engine.load(str(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64}
    pixels = pipe("a", **size, num_inference_steps=2, generator=seed, output_type="np").images
    assert 0.05 < pixels.std() < 0.4


# --- whole jobs, and the page ---------------------------------------------------------------------


def test_of_each_part_the_slowest_rank_counts():
    ranks = [[{"a": (1.0, 5.0), "b": (1.0, 1.0)}], [{"a": (2.0, 3.0), "b": (1.0, 1.0)}]]
    parts = end_to_end.slowest(ranks)
    assert (parts["a"]["s"].median, parts["a"]["cpu_s"].median) == (2.0, 5.0)
    assert parts["all"]["s"].median == 3.0


def test_a_failure_is_on_the_page_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    runs = {"missing": report.Run("Not there", ""), "common": report.Run("Nothing", "")}
    monkeypatch.setattr(report, "RUNS", runs)
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main()
    page = (tmp_path / "REPORT.md").read_text()
    assert "No module named benchmarks.missing" in page
    assert page.index("## Not there") < page.index("## Nothing")
    assert "| cores |" in page


def test_the_page_has_the_tables_without_the_json():
    assert report.table_of('a   b\n1   2  \n{"benchmark": 1}\n') == "a   b\n1   2"
    assert report.table_of("    ms\nours 1\n\n") == "    ms\nours 1"  # columns stay in line


@pytest.mark.parametrize(("load", "is_busy"), [(0.3, False), (9.4, True)])
def test_the_page_says_that_the_machine_was_busy(load, is_busy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "machine", lambda: {"load_average": load, "cores": 2})
    assert ("The machine was busy" in report.page([], tmp_path)) is is_busy


def test_the_headlines_models_have_the_published_shapes():
    def millions(network):
        named = network.named_parameters()  # without what LinFusion adds
        return sum(
            w.numel() for name, w in named if ".to_q_." not in name and ".to_k_." not in name
        )

    for model, expected in {"SD-1.5": 859.5, "SDXL": 2567.5}.items():
        pipe = headline.build(model, torch.device("meta"), torch.float16)
        found = [round(millions(part) / 1e6, 1) for part in (pipe.unet, pipe.vae)]
        assert found == [expected, 83.7]


@pytest.mark.parametrize("name", list(report.RUNS))
def test_what_the_report_asks_for_is_understood(name, monkeypatch):
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "__path__"):  # a package, which is run by its __main__
        module = importlib.import_module(f"benchmarks.{name}.__main__")
    for arguments in {report.RUNS[name].arguments, report.RUNS[name].on_gpu or ""}:
        monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
        assert module.parse_arguments()


@pytest.mark.long
@pytest.mark.parametrize("name", list(TINY))
def test_each_benchmark_ends_with_a_line_of_json(name, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", f"benchmarks.{name}", *TINY[name].split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["benchmark"] == name
    assert all(aim["met"] is not False for aim in said["aims"])
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert said.get("projection", False) == (name == "projection")
