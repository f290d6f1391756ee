"""The demo model: its data, its training, and what the shipped weights paint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from engine import linfusion
from engine.demo import WEIGHTS, fit
from engine.demo.captions import caption, visible
from engine.demo.data import buckets, load_bucket, render_buckets
from engine.demo.fit import Run, Stage
from engine.demo.landscapes import Scene, draw_scene, render
from engine.demo.train import train
from engine.distill.settings import DistillSettings
from tests.students import distil_alone

SEEDS = 10


def _load(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, feature_extractor=None
    )
    linfusion.load(pipeline.unet, folder / "linfusion")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------ landscapes


def test_a_seed_renders_the_same_picture_again() -> None:
    first, again = (render(draw_scene(7), 64, 96) for _ in range(2))
    assert first.shape == (64, 96, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, render(draw_scene(8), 64, 96))


@pytest.mark.parametrize("seed", range(12))
def test_a_large_rendering_reduces_to_the_small_one(seed: int) -> None:
    scene = draw_scene(seed)
    small = render(scene, 96, 144).astype(float)
    large = render(scene, 288, 432).reshape(96, 3, 144, 3, 3).mean((1, 3))
    assert np.abs(large - small).mean() < 4


def test_a_window_is_a_part_of_the_whole() -> None:
    scene = draw_scene(3)
    whole = render(scene, 128, 192)
    window = render(scene, 128, 192, (40, 70, 60, 50))
    assert np.abs(whole[40:100, 70:120].astype(int) - window).max() <= 1


def test_captions_tell_what_is_there() -> None:
    scene = next(s for s in map(draw_scene, range(1000)) if s.lake and s.light == "sun")
    assert {"land", "lake", "sun"} <= set(visible(scene, (256, 256), (0, 0, 256, 256)))
    water = (220, 0, 30, 256)
    assert "sun" not in visible(scene, (256, 256), water)
    assert "lake" not in visible(scene, (256, 256), water)
    wordings = {caption(scene, np.random.default_rng(i), (256, 256)) for i in range(20)}
    assert len(wordings) > 15


def test_nights_are_dark_and_lakes_mirror_in_the_data() -> None:
    def scenes(wanted: Callable[[Scene], bool]) -> list[Scene]:
        return [s for s in map(draw_scene, range(400)) if wanted(s)][:15]

    def mean(time: str) -> float:
        return float(np.mean([render(s, 48, 48) for s in scenes(lambda s: s.time == time)]))

    assert mean("night") < 0.5 * mean("day")
    pictures = [render(s, 96, 96) for s in scenes(lambda s: s.lake)]
    assert float(np.mean(mirroring(np.stack(pictures) / 255))) > 0.9


# -------------------------------------------------------------------------------------- training


@pytest.mark.long
def test_every_stage_of_training_runs(tmp_path: Path) -> None:
    """A few steps of everything, from rendering to a folder that diffusers loads and paints with,
    once its attention is distilled; run again, it finds all done."""
    run, out = Run(tmp_path, fast=True), tmp_path / "out"
    train(run, out)
    work = ["--output", str(tmp_path / "distill"), "--data.pictures", "60"]
    few = ["--steps", "3", "--batch", "2", "--data.held-out", "4", "--evaluation.pictures", "0"]
    distil_alone(DistillSettings.load(["--model", str(out), *work, *few]))
    shutil.copytree(tmp_path / "distill" / "linfusion", out / "linfusion")
    pipeline = _load(out)
    picture = pipeline("a lake at night", height=64, width=96, num_inference_steps=2).images[0]
    assert picture.size == (96, 64)
    made = (tmp_path / "unet.pt").stat().st_mtime_ns
    train(run, tmp_path / "again")
    assert (tmp_path / "unet.pt").stat().st_mtime_ns == made
    for name in ("unet", "vae"):
        weights = f"{name}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()


def test_the_ranks_render_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "barrier", lambda _run: None)  # the ranks take turns here
    for name, ranks in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for rank in range(ranks):
            render_buckets(Run(tmp_path / name, rank, ranks, fast=True))
    for bucket in buckets(Run(tmp_path, fast=True)):
        one, two = (load_bucket(bucket, tmp_path / name) for name in ("one", "two"))
        assert np.array_equal(one[0], two[0])
        assert one[1] == two[1]


def test_a_killed_stage_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 5)
    straight, resumed = (_regress(tmp_path / name, killed_at) for name, killed_at in
                         (("straight", None), ("resumed", 8)))  # fmt: skip
    assert torch.equal(straight, resumed)


def _regress(work: Path, killed_at: int | None) -> Tensor:
    """Twelve steps of a tiny regression, killed once on the way if so asked: its weights."""
    work.mkdir()
    calls = 0

    def attempt() -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)

        def loss(step: int, generator: torch.Generator) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=generator)
            return (model(x) - x[:, :3]).square().mean()

        fit.fit(Stage("toy", 12, lr=0.05), model, loss, Run(work))
        return model.weight.detach()

    try:
        return attempt()
    except KeyboardInterrupt:
        return attempt()


# --------------------------------------------------------------------------- the shipped weights


def test_the_weights_are_small_and_in_half_precision() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    for path in WEIGHTS.rglob("*.safetensors"):
        assert "fp16" not in path.name
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert kinds == {"F16"}, path


def test_the_linear_attention_is_in_the_published_layout() -> None:
    folder = WEIGHTS / "linfusion"
    modules = json.loads((folder / "config.json").read_text())["modules_list"]
    assert set(modules[0]) == {"module_name", "dim_n", "heads", "projection_mid_dim"}
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as tensors:
        keys = set(tensors.keys())
    last = len(modules) - 1
    assert {"0.to_q.weight", "0.to_q_.0.weight", f"{last}.to_k_.3.bias"} <= keys


def test_the_autoencoder_has_the_attention_of_the_real_ones(painter: "Painter") -> None:
    vae = painter.pipeline.vae
    assert vae.encoder.mid_block.attentions[0] is not None
    assert vae.decoder.mid_block.attentions[0] is not None
    pictures = np.stack([render(draw_scene(10_000 + i), 128, 128) for i in range(6)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((again - pixels).square().mean() / 4).log10()
    assert psnr > 26


@pytest.mark.parametrize("prompt", ["озеро ночью", "夜の湖", "بحيرة في الليل", "🏔️ ½ \x00 ﷽"])
def test_the_tokenizer_takes_any_script(painter: "Painter", prompt: str) -> None:
    tokenizer = painter.pipeline.tokenizer
    tokens = tokenizer(prompt).input_ids
    assert len(tokens) > 3
    assert tokenizer.unk_token_id not in tokens[1:-1]


class Painter:
    """Ten pictures of a prompt, seeds 0 to 9, with linear attention; each prompt painted once."""

    def __init__(self) -> None:
        self.pipeline = _load(WEIGHTS)
        self._painted: dict[str, NDArray[np.float32]] = {}

    def __call__(self, prompt: str) -> NDArray[np.float32]:
        """[SEEDS, H, W, 3] in 0..1"""
        if prompt not in self._painted:
            self._painted[prompt] = self.pipeline(
                [prompt] * SEEDS,
                height=128,
                width=128,
                num_inference_steps=10,
                guidance_scale=4.0,
                generator=[torch.Generator().manual_seed(seed) for seed in range(SEEDS)],
                output_type="np",
            ).images
        return self._painted[prompt]


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter()


def redness(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """[B, H, W, 3] -> [B]: how far red is above blue"""
    return (pictures[..., 0] - pictures[..., 2]).mean((1, 2))


def mirroring(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """[B, H, W, 3] -> [B]: correlation of what lies below a shore line with the flipped landscape
    above it, at that line where it is highest, of those where the data has its shores."""
    height = pictures.shape[1]
    shores = range(round(0.55 * height), round(0.64 * height))
    return np.max([_mirroring_at(pictures, shore) for shore in shores], axis=0)


def _mirroring_at(pictures: NDArray[np.float32], shore: int) -> list[float]:
    below = pictures[:, shore:]
    above = pictures[:, 2 * shore - pictures.shape[1] : shore][:, ::-1]
    return [
        float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in zip(above, below, strict=True)
    ]


def test_night_is_darker_than_day(painter: Painter) -> None:
    day, night = (painter(f"rocky mountains at {time} with clouds") for time in ("day", "night"))
    assert night.mean() < 0.5 * day.mean()
    assert (night.mean((1, 2, 3)) < day.mean((1, 2, 3))).sum() >= 9


def test_sunset_is_redder_than_dusk(painter: Painter) -> None:
    sunset, dusk = (redness(painter(f"green hills at {time}")) for time in ("sunset", "dusk"))
    assert sunset.mean() > dusk.mean() + 0.2
    assert (sunset > dusk).sum() >= 9


def test_a_lake_mirrors_the_land(painter: Painter) -> None:
    lake = mirroring(painter("green hills at day with a lake and the sun"))
    plain = mirroring(painter("green hills at day with the sun"))
    assert lake.mean() > plain.mean() + 0.4
    assert (lake > plain).sum() >= 9
