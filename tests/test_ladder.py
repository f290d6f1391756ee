"""The ladder: which rungs, each strategy against its paper written down, any number of ranks."""

import copy
import itertools
import logging
import math

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
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine import ladder
from engine.bands import open_mesh
from engine.config import Settings, UserError
from engine.diffusion import Denoiser, dilated, encode
from engine.ladder import Rung, begin_base, begin_rung, climb, low_frequencies, rungs
from engine.pipeline import Engine
from tests import families
from tests.models import latent
from tests.ranks import run_ranks

ASKED = {"prompt": "a lake", "negative_prompt": "people", "guidance_scale": 3.0, "steps": 4}


def settings(height=512, width=768, **options):
    return Settings.model_validate({**ASKED, "height": height, "width": width, "ladder": options})


# --- rungs ----------------------------------------------------------------------------------------


@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.floats(1.1, 4.0)
)  # fmt: skip
def test_rungs_grow_from_the_base_to_the_picture(height, width, base, growth):
    height, width, base = 8 * height, 8 * width, 8 * base
    made = rungs(
        settings(height, width, strategy="sdedit", base=base, growth=growth, steps=[50]), native=512
    )
    assert (made[-1].height, made[-1].width) == (height, width)
    assert [rung.index for rung in made] == list(range(len(made)))
    assert max(made[0].height, made[0].width) == min(base, max(height, width))
    for below, rung in itertools.pairwise(made):
        assert rung.height % 8 == rung.width % 8 == 0
        # Sides are rounded to 8 px, so a rung may grow by a rounding more than was allowed.
        assert max(rung.height, rung.width) <= growth * (max(below.height, below.width) + 4) + 4


def test_published_sizes_and_strengths():
    made = rungs(settings(8192, 16384, strategy="sdedit", base=1024, steps=[50]), native=512)
    assert [str(rung) for rung in made[1:]] == ["2048x1024", "4096x2048", "8192x4096", "16384x8192"]
    assert [rung.steps_run for rung in made] == [4, 20, 15, 10, 5]
    assert [rung.scale for rung in made] == [1, 2, 4, 8, 16]
    fusion = rungs(settings(8192, 16384, strategy="demofusion", steps=[50]), native=1024)
    assert [rung.steps_run for rung in fusion[1:]] == [16, 12, 8, 4]


def test_sides_steps_strengths_and_guidance_of_each_rung():
    made = rungs(
        settings(
            800, 800, strategy="sdedit", base=256, sides=[400, 600], steps=[10, 20],
            strengths=[0.5, 0.4, 0.3], guidance_scale=1.5,
        ),
        native=64,
    )  # fmt: skip
    assert [str(rung) for rung in made] == ["256x256", "400x400", "600x600", "800x800"]
    assert [(rung.steps, rung.strength) for rung in made[1:]] == [(10, 0.5), (20, 0.4), (20, 0.3)]
    assert [rung.guidance_scale for rung in made] == [3.0, 1.5, 1.5, 1.5]


def test_no_ladder_is_one_rung_and_the_default_base_is_the_models_own():
    (only,) = rungs(settings(512, 768), native=64)
    assert (only.height, only.width, only.steps_run) == (512, 768, 4)
    assert str(rungs(settings(strategy="sdedit", steps=[20]), native=384)[0]) == "384x256"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sides": [64, 900]}, "ladder.sides: 64, 900 px do not lie between the base's 128 and"),
        ({"steps": [5] * 4}, "ladder.steps: 4 numbers for 3 rungs above the base: give one"),
        ({"strengths": [0.1]}, "ladder: 0.1 of 4 steps is not one step for the rung of 232x152"),
    ],
)
def test_ladders_that_do_not_fit_the_picture(options, sentence):
    with pytest.raises(UserError) as caught:
        rungs(settings(strategy="sdedit", base=128, **options), native=64)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ((300, 300), "ladder.upscale: the picture is 300x300 px, and 768x512 has another shape"),
        ((512, 768), "ladder.upscale: the picture is 768x512 px already: ask for more than 768x"),
    ],
)
def test_pictures_that_cannot_be_upscaled_to_what_is_asked(start, sentence):
    with pytest.raises(UserError, match="") as caught:
        rungs(settings(strategy="sdedit", upscale="a.png"), 64, start)
    assert str(caught.value).startswith(sentence)


def test_an_upscaled_picture_need_not_be_a_multiple_of_8():
    made = rungs(settings(strategy="sdedit", upscale="a.png", steps=[20]), 64, (203, 301))
    assert [str(rung) for rung in made] == ["301x203", "480x320", "768x512"]


# --- denoising, against diffusers -----------------------------------------------------------------

FAMILIES = {
    "sd15": (families.sd15, StableDiffusionImg2ImgPipeline),
    "sd21": (families.sd21, StableDiffusionImg2ImgPipeline),
    "sdxl": (families.sdxl, StableDiffusionXLImg2ImgPipeline),
}
SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
]


def denoiser(pipe, height=64, width=96, scale=3.0, **options):
    conditions = encode(
        pipe, "a lake", "people", guided=scale > 1, height=height, width=width
    )  # fmt: skip
    return Denoiser(pipe, conditions, scale, **options)


def no_options(**options):
    return Settings.model_validate({"ladder": options}).ladder


def nothing(state):
    pass


def reference_of(height, width):
    return latent(height // 8, width // 8, batch=1)


@pytest.mark.parametrize("scale", [3.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_what_diffusers_paints(family, scale):
    pipe = FAMILIES[family][0]()
    generator = torch.Generator().manual_seed(5)
    like = torch.empty(0, dtype=torch.float64)
    rung = Rung(0, 64, 96, 4, 1.0, scale)
    state = begin_base(rung, pipe.scheduler, generator, like, 4)
    climb(denoiser(pipe, scale=scale), state, rung, no_options(), nothing)
    expected = pipe(
        "a lake", negative_prompt="people", height=64, width=96, num_inference_steps=4,
        guidance_scale=scale, generator=torch.Generator().manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(state.latent, expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_rung_of_sdedit_is_img2img_of_diffusers(family, scheduler):
    make, img2img = FAMILIES[family]
    pipe = make()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    reference = reference_of(64, 96)
    rung = Rung(1, 64, 96, 6, 0.5, 3.0)
    state = begin_rung(rung, pipe.scheduler, reference, torch.Generator().manual_seed(5), None)
    climb(denoiser(pipe), state, rung, no_options(strategy="sdedit"), nothing)
    other = img2img(**pipe.components, **_extras(family))
    other.set_progress_bar_config(disable=True)
    expected = other(
        "a lake", negative_prompt="people", image=reference, strength=0.5, num_inference_steps=6,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(state.latent, expected, rtol=0, atol=1e-12)


class Drawn(TorchDispatchMode):
    """Notes in which dtypes noise is drawn."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "randn" in str(function) or "normal" in str(function):
            self.dtypes.append(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_is_never_drawn_in_half_precision(dtype):
    """There torch draws other noise, or did (2.11), of which fp16 would paint another picture."""
    pipe = families.sd15().to(dtype)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    rung, generator = Rung(1, 64, 96, 4, 0.5, 3.0), torch.Generator().manual_seed(5)
    reference = reference_of(64, 96).to(dtype)
    with Drawn() as drawn:
        base = begin_base(rung, pipe.scheduler, generator, reference, 4)
        state = begin_rung(rung, pipe.scheduler, reference, generator, None)
        climb(denoiser(pipe), state, rung, no_options(strategy="sdedit"), nothing)
    assert base.latent.dtype == state.latent.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert drawn.dtypes == [wide] * 4  # base and rung, and two steps


def _extras(family):
    return {} if family == "sdxl" else {"requires_safety_checker": False}


def test_guidance_in_turn_is_guidance_at_once():
    pipe = families.sdxl()
    t, noised = torch.tensor(500), reference_of(64, 96)
    at_once, in_turn = denoiser(pipe)(noised, t), denoiser(pipe, in_turn=True)(noised, t)
    torch.testing.assert_close(at_once, in_turn, rtol=0, atol=1e-12)


# --- strategies, against their papers written down naively ----------------------------------------


def begun(pipe, strategy, scale=2, **options):
    rung = Rung(1, 64, 96, 10, 0.3, 3.0, scale)
    below = begin_base(
        Rung(0, 32, 48, 4, 1.0, 3.0), pipe.scheduler, torch.Generator().manual_seed(1),
        torch.empty(0, dtype=torch.float64), 4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    state = begin_rung(rung, pipe.scheduler, reference_of(64, 96), generator, below)
    return rung, state, no_options(strategy=strategy, **options), below


def naive_demofusion(pipe, model, rung, state, below, sigma_0=0.8):
    """LinFusion's loop for SDXL: two branches, each with a step of its own, mixed after it."""
    z, trained = state.latent, pipe.scheduler.config.num_train_timesteps
    scheduler = copy.deepcopy(state.scheduler)
    for t in scheduler.timesteps[rung.steps - rung.steps_run :]:
        f = 0.5 * (1 + math.cos(math.pi * (trained - t.item()) / trained))
        z = z * (1 - f**3) + scheduler.add_noise(state.reference, state.noise, t[None]) * f**3
        plain = scheduler.step(model(z, t), t, z).prev_sample
        size, sigma = 2 * rung.scale - 1, sigma_0 * (0.99 * f + 0.01)
        places = torch.arange(size) - (size - 1) / 2
        bell = torch.exp(-(places**2) / (2 * sigma**2)).double()
        kernel = torch.outer(bell, bell) / torch.outer(bell, bell).sum()
        blurred = F.conv2d(z.transpose(0, 1), kernel[None, None], padding=size // 2)
        blurred = restored(blurred.transpose(0, 1), z)
        with dilated(model.unet, rung.scale):
            wide = scheduler.step(model(blurred, t), t, z).prev_sample
        z = (1 - f) * plain + f * wide
    return restored(z, below.latent)


def restored(z, like):
    def normal(x):
        return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)

    return normal(z) * like.std((2, 3), keepdim=True) + like.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("scale", [2, 3])
def test_demofusion_is_the_published_loop(scale):
    pipe = families.sdxl()
    rung, state, options, below = begun(pipe, "demofusion", scale)
    expected = naive_demofusion(pipe, denoiser(pipe), rung, state, below)
    climb(denoiser(pipe), state, rung, options, nothing)
    # fp32 statistics and a kernel in fp32 are what the naive loop does not have
    torch.testing.assert_close(state.latent, expected, rtol=1e-5, atol=1e-5)


class Counted(Denoiser):
    """Counts what it is asked, by dilation."""

    asked = ()

    def __call__(self, scaled, t):
        self.asked = (*self.asked, self.unet.conv_in.dilation[0])
        return super().__call__(scaled, t)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, (1, 2, 1, 2, 1, 2)),
        ({"preset": "fast"}, (1, 2, 1, 2, 1)),
        ({"branch_threshold": 0.05}, (1, 2, 1, 1)),
        ({"branch_threshold": 1.0}, (1, 1, 1)),
    ],
)
def test_a_branch_of_little_weight_is_left_out_and_the_log_says_so(options, asked, caplog):
    pipe = families.sd15()
    rung, state, options, _ = begun(pipe, "demofusion", 2, **options)
    conditions = encode(pipe, "a lake", "", guided=False, height=64, width=96)
    model = Counted(pipe, conditions, 1.0)
    with caplog.at_level(logging.INFO, logger="engine"):
        climb(model, state, rung, options, nothing)
    assert model.asked == asked
    left_out = [r for r in caplog.messages if "dilated branch left out" in r]
    assert len(left_out) == 3 - asked.count(2)


def _fail_dilated(unet):
    with dilated(unet, 4):
        assert unet.conv_in.dilation == unet.conv_in.padding == (4, 4)
        raise RuntimeError("a step failed")


def test_dilation_is_undone_also_after_a_failure():
    unet = families.sd15().unet
    plain = [(m.dilation, m.padding) for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]
    with pytest.raises(RuntimeError, match="a step failed"):
        _fail_dilated(unet)
    now = [(m.dilation, m.padding) for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert now == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_wavelet_guidance_keeps_the_references_low_frequencies(family):
    # DDIM's last step gives the predicted clean picture itself, where set_alpha_to_one is on.
    pipe = FAMILIES[family][0]()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=True, clip_sample=False
    )
    rung, state, options, _ = begun(pipe, "wavelet", wavelet_levels=2)
    climb(denoiser(pipe), state, rung, options, nothing)
    kept = low_frequencies(state.reference, 2)
    torch.testing.assert_close(low_frequencies(state.latent, 2), kept, rtol=0, atol=1e-6)
    assert (state.latent - state.reference).abs().max() > 0.1


def test_wavelet_guidance_ends_after_its_steps():
    pipe = families.sd15()
    rung, guided, options, _ = begun(pipe, "wavelet", wavelet_steps=1)
    _, plain, _, _ = begun(pipe, "sdedit")
    for state, kind in ((guided, options), (plain, no_options(strategy="sdedit"))):
        climb(denoiser(pipe), state, rung, kind, nothing)
    assert (guided.latent - plain.latent).abs().max() > 1e-3


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_low_frequencies_are_a_projection(levels, height, width):
    x = latent(height, width)
    low = low_frequencies(x, levels)
    assert low.shape == x.shape
    size = 2**levels
    whole = x[..., : height // size * size, : width // size * size]
    blocks = whole.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)) if whole.numel() else None
    if blocks is not None:
        expected = blocks.mean((-1, -3), keepdim=True).expand_as(blocks)
        expected = expected.flatten(-2).flatten(-3, -2)
        got = low[..., : whole.shape[-2], : whole.shape[-1]]
        torch.testing.assert_close(got, expected)
        again = low_frequencies(low, levels)[..., : whole.shape[-2], : whole.shape[-1]]
        torch.testing.assert_close(again, got)


@pytest.mark.parametrize("strategy", ["sdedit", "demofusion", "wavelet"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_state_taken_in_between_goes_on_to_the_same_picture(strategy, scheduler):
    pipe = families.sd15()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    rung, state, options, _ = begun(pipe, strategy)
    taken = []
    climb(denoiser(pipe), state, rung, options, lambda now: taken.append(copy.deepcopy(now)))
    assert [one.step for one in taken] == [1, 2, 3]
    for one in taken:
        climb(denoiser(pipe), one, rung, options, nothing)
        assert torch.equal(one.latent, state.latent)


# --- any number of ranks --------------------------------------------------------------------------

LADDERS = {
    "sdedit": {"strategy": "sdedit", "base": 96, "strengths": [0.5]},
    # 256 px of height: a dilation of 3 reaches beyond the bands of the deepest level.
    "demofusion": {"strategy": "demofusion", "base": 96, "strengths": [0.5]},
    "wavelet": {"strategy": "wavelet", "base": 96, "strengths": [0.5], "wavelet_levels": 2},
    "uneven": {"strategy": "demofusion", "base": 104, "sides": [200], "strengths": [0.5]},
}


def ladder_latents(mesh, family, in_turn=False):
    """The latent that each of `LADDERS` ends with."""
    engine = Engine(FAMILIES[family][0](), mesh)
    memory = {"guidance_in_turn": in_turn}
    made = {
        name: Settings.model_validate(
            {**ASKED, "height": 168, "width": 256, "ladder": options, "memory": memory}
        )
        for name, options in LADDERS.items()
    }
    # Tensors would need this process to live until they are read.
    return {name: engine.latent(asked).numpy() for name, asked in made.items()}


def one_process(family):
    with open_mesh() as mesh:
        return ladder_latents(mesh, family)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "ranks", "in_turn"), [("sd15", 2, True), ("sd15", 3, False), ("sdxl", 3, False)]
)
def test_any_number_of_ranks_climbs_to_the_same_latent(family, ranks, in_turn):
    expected = one_process(family)
    for latents in run_ranks(ranks, ladder_latents, family, in_turn):
        for name, whole in expected.items():
            np.testing.assert_allclose(latents[name], whole, rtol=0, atol=1e-10, err_msg=name)


def test_more_ranks_than_bands_compute_the_same_in_groups():
    few = settings(64, 64, strategy="sdedit", base=64)
    rung = Rung(0, 64, 64, 4, 1.0, 3.0)
    assert [ladder.groups(few, rung, ranks, 8, True) for ranks in (1, 2, 3, 4, 6)] == [
        1,
        2,
        3,
        4,
        6,
    ]
    tall = Rung(0, 256, 64, 4, 1.0, 3.0)
    assert [ladder.groups(few, tall, ranks, 8, True) for ranks in (1, 2, 3, 4, 8)] == [
        1,
        2,
        1,
        2,
        2,
    ]
    assert ladder.groups(few, tall, 8, 8, False) == 2
