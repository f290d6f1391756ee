"""Whole pipelines with everything their users attach, on N ranks against plain diffusers.

Each row of the table is a small program that a user might write. It gets `distribute` and returns
pictures. One process runs it with a `distribute` that does nothing; N ranks run it with the
engine's, under the sentinel and with different random states; the pictures have to agree.
"""

import functools
import traceback

import diffusers as df
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import engine
from engine.config import UserError
from tests import families as fam
from tests.families import convert, lora, mask, picture, sd15, sd21, sdxl
from tests.ranks import run_ranks
from tests.sentinel import Sentinel

HEIGHT, WIDTH = 8 * 21, 8 * 10  # latent bands of 16 + 5 rows, or of 8 + 8 + 5

ROWS = {}


def row(within=1e-10):
    """Enter a program into the table, and how far its pictures (from 0 to 1) may be off."""

    def enter(program):
        ROWS[program.__name__] = (program, within)
        return program

    return enter


def paint(pipe, prompt="a lake at dawn", *, seed=0, steps=2, **options):
    """Call `pipe` as its users do; the picture is the program's result."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    size = {} if "image" in options else {"height": HEIGHT, "width": WIDTH}
    call = {"generator": generator, "output_type": "pt", **size, **options}
    return pipe(prompt, num_inference_steps=steps, **call).images


# --- families and calls ---------------------------------------------------------------------------


@row()
def image_to_image(distribute):
    pipe = convert(sd15(df.StableDiffusionImg2ImgPipeline))
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH), strength=0.6, steps=4)


@row()
def inpainting_with_a_masked_latent(distribute):
    pipe = sd15(df.StableDiffusionInpaintPipeline)
    distribute(pipe)
    size = {"height": HEIGHT, "width": WIDTH, "strength": 0.9}
    return paint(
        pipe, image=picture(HEIGHT, WIDTH), mask_image=mask(HEIGHT, WIDTH), steps=3, **size
    )


@row()
def inpainting_with_nine_channels(distribute):
    pipe = sd15(df.StableDiffusionInpaintPipeline, in_channels=9)
    distribute(pipe)
    size = {"height": HEIGHT, "width": WIDTH}
    return paint(pipe, image=picture(HEIGHT, WIDTH), mask_image=mask(HEIGHT, WIDTH), **size)


@row()
def inpainting_with_sdxl(distribute):
    pipe = convert(sdxl(df.StableDiffusionXLInpaintPipeline, in_channels=9))
    distribute(pipe)
    size = {"height": HEIGHT, "width": WIDTH, "strength": 0.99}
    return paint(pipe, image=picture(HEIGHT, WIDTH), mask_image=mask(HEIGHT, WIDTH), **size)


@row()
def sdxl_image_to_image(distribute):
    pipe = sdxl(df.StableDiffusionXLImg2ImgPipeline)
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH), strength=0.6, steps=4)


@row()
def sdxl_base_and_refiner(distribute):
    base, refiner = sdxl(), fam.sdxl_refiner(df.StableDiffusionXLImg2ImgPipeline)
    distribute(base)
    distribute(refiner)
    latent = paint(base, steps=4, denoising_end=0.5, output_type="latent")
    return paint(refiner, image=latent, steps=4, denoising_start=0.5)


@row()
def instruct_pix2pix(distribute):
    pipe = sd15(df.StableDiffusionInstructPix2PixPipeline, in_channels=8)
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH))


@row()
def several_pictures_and_negative_prompts(distribute):
    pipe = sdxl()
    distribute(pipe)
    prompts, unwanted = ["a lake", "a hill"], ["fog", "rain"]
    return paint(pipe, prompts, negative_prompt=unwanted, num_images_per_prompt=2)


@row()
def guidance_off(distribute):
    pipe = sd21()
    distribute(pipe)
    return paint(pipe, guidance_scale=1.0)


@row()
def guidance_rescale(distribute):
    pipe = sd21()
    distribute(pipe)
    return paint(pipe, guidance_rescale=0.7)


@row()
def latents_out_and_in(distribute):
    pipe = sd15()
    distribute(pipe)
    latent = paint(pipe, output_type="latent")
    return [latent, paint(pipe, latents=latent)]


@row()
def a_callback_that_changes_the_latents(distribute):
    def brighten(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + 0.1}

    pipe = sd15()
    distribute(pipe)
    return paint(pipe, callback_on_step_end=brighten)


@row()
def changing_sizes_prompts_batches_and_adapters(distribute):
    pipe = sd15()
    distribute(pipe)
    pictures = [paint(pipe, "a lake"), paint(pipe, "a hill", height=8 * 24, width=8 * 7)]
    pipe.load_lora_weights(lora(pipe.unet, fam.CONV_LAYERS))
    pictures.append(paint(pipe, ["a lake", "a hill"], height=8 * 17))
    pipe.unload_lora_weights()
    return [*pictures, paint(pipe, "a lake")]


# --- attachments ----------------------------------------------------------------------------------


@row()
def lora_loaded_before(distribute):
    pipe = convert(sdxl())
    pipe.load_lora_weights(lora(pipe.unet))
    distribute(pipe)
    return paint(pipe)


@row()
def lora_loaded_after(distribute):
    pipe = convert(sdxl())
    distribute(pipe)
    pipe.load_lora_weights(lora(pipe.unet))
    return paint(pipe)


@row()
def convolution_lora_loaded_before(distribute):
    pipe = sd15()
    pipe.load_lora_weights(lora(pipe.unet, fam.CONV_LAYERS))
    distribute(pipe)
    return paint(pipe)


@row()
def convolution_lora_loaded_after(distribute):
    pipe = sd15()
    distribute(pipe)
    pipe.load_lora_weights(lora(pipe.unet, fam.CONV_LAYERS))
    return paint(pipe)


@row()
def dora(distribute):
    pipe = sd15()
    distribute(pipe)
    pipe.load_lora_weights(lora(pipe.unet, ("to_q", *fam.CONV_LAYERS), dora=True))
    return paint(pipe)


@row()
def two_loras_weighted(distribute):
    pipe = sd15()
    pipe.load_lora_weights(lora(pipe.unet, seed=1), adapter_name="style")
    distribute(pipe)
    pipe.load_lora_weights(lora(pipe.unet, fam.CONV_LAYERS, seed=2), adapter_name="detail")
    pipe.set_adapters(["style", "detail"], [0.7, 0.4])
    return paint(pipe)


@row()
def lora_fused_and_unfused(distribute):
    pipe = sd15()
    distribute(pipe)
    pipe.load_lora_weights(lora(pipe.unet, fam.CONV_LAYERS))
    pipe.fuse_lora(lora_scale=0.5)
    fused = paint(pipe)
    pipe.unfuse_lora()
    return [fused, paint(pipe)]


@row()
def lora_fused_before(distribute):
    pipe = convert(sd15())
    pipe.load_lora_weights(lora(pipe.unet, ("to_q", "conv1")))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    distribute(pipe)
    return paint(pipe)


@row()
def lora_unloaded(distribute):
    pipe = sd15()
    pipe.load_lora_weights(lora(pipe.unet, fam.CONV_LAYERS))
    distribute(pipe)
    with_it = paint(pipe)
    pipe.unload_lora_weights()
    return [with_it, paint(pipe)]


@row()
def lora_swapped_in_place(distribute):
    pipe = sd15()
    distribute(pipe)
    pipe.load_lora_weights(lora(pipe.unet, fam.CONV_LAYERS, seed=1), adapter_name="style")
    first = paint(pipe)
    other = lora(pipe.unet, fam.CONV_LAYERS, seed=2)
    pipe.load_lora_weights(other, adapter_name="style", hotswap=True)
    return [first, paint(pipe)]


@row()
def controlnet(distribute):
    net = fam.controlnet(sd15().unet)
    pipe = with_controlnet(df.StableDiffusionControlNetPipeline, sd15, net)
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH), controlnet_conditioning_scale=0.8)


def with_controlnet(pipeline, family, net):
    return convert(family(pipeline, controlnet=net))


@row()
def controlnet_in_guess_mode(distribute):
    net = fam.controlnet(sd15().unet)
    pipe = with_controlnet(df.StableDiffusionControlNetPipeline, sd15, net)
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH), guess_mode=True)


@row()
def controlnet_that_pools_its_conditions(distribute):
    net = fam.controlnet(sd15().unet, global_pool_conditions=True)
    pipe = with_controlnet(df.StableDiffusionControlNetPipeline, sd15, net)
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH))


@row()
def several_controlnets(distribute):
    nets = [fam.controlnet(sd15().unet), fam.controlnet(sd15().unet, other=True)]
    pipe = with_controlnet(df.StableDiffusionControlNetPipeline, sd15, nets)
    distribute(pipe)
    images = [picture(HEIGHT, WIDTH, seed) for seed in (1, 2)]
    return paint(pipe, image=images, controlnet_conditioning_scale=[0.9, 0.3])


@row()
def controlnet_image_to_image(distribute):
    net = fam.controlnet(sd15().unet)
    pipe = with_controlnet(df.StableDiffusionControlNetImg2ImgPipeline, sd15, net)
    distribute(pipe)
    images = {"image": picture(HEIGHT, WIDTH, 1), "control_image": picture(HEIGHT, WIDTH, 2)}
    return paint(pipe, **images, strength=0.6, steps=4)


@row()
def controlnet_inpainting(distribute):
    net = fam.controlnet(sd15().unet)
    pipe = with_controlnet(df.StableDiffusionControlNetInpaintPipeline, sd15, net)
    distribute(pipe)
    images = {"image": picture(HEIGHT, WIDTH, 1), "control_image": picture(HEIGHT, WIDTH, 2)}
    return paint(pipe, **images, mask_image=mask(HEIGHT, WIDTH), strength=0.9, steps=3)


@row()
def controlnet_for_sdxl(distribute):
    net = fam.controlnet(sdxl().unet)
    pipe = with_controlnet(df.StableDiffusionXLControlNetPipeline, sdxl, net)
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH), controlnet_conditioning_scale=0.8)


@row()
def controlnet_union(distribute):
    net = fam.controlnet_union(sdxl().unet)
    pipe = with_controlnet(df.StableDiffusionXLControlNetUnionPipeline, sdxl, net)
    distribute(pipe)
    images = [picture(HEIGHT, WIDTH, seed) for seed in (1, 2)]
    size = {"height": HEIGHT, "width": WIDTH}
    return paint(pipe, control_image=images, control_mode=[0, 3], **size)


@row()
def ip_adapter_loaded_before(distribute):
    pipe = sdxl()
    load_ip_adapter(pipe)
    distribute(pipe)
    return paint(pipe, ip_adapter_image=picture(40, 40))


def load_ip_adapter(pipe, *seeds):
    states = [fam.ip_adapter(pipe.unet, seed) for seed in seeds or (0,)]
    pipe.load_ip_adapter(states, subfolder="", weight_name=[""] * len(states))


@row()
def ip_adapter_loaded_after_on_linear_attention(distribute):
    pipe = convert(sd15())
    distribute(pipe)
    load_ip_adapter(pipe)
    pipe.set_ip_adapter_scale(0.6)
    return paint(pipe, ip_adapter_image=picture(40, 40))


@row()
def ip_adapter_with_masks(distribute):
    pipe = sd15()
    distribute(pipe)
    load_ip_adapter(pipe, 0, 1)
    halves = df.image_processor.IPAdapterMaskProcessor().preprocess(
        [mask(HEIGHT, WIDTH), mask(HEIGHT, WIDTH).transpose(1)], height=HEIGHT, width=WIDTH
    )
    masks = [half[None] for half in halves.double()]
    pictures = [picture(40, 40, 1), picture(40, 40, 2)]
    return paint(
        pipe, ip_adapter_image=pictures, cross_attention_kwargs={"ip_adapter_masks": masks}
    )


@row()
def t2i_adapter(distribute):
    pipe = sd15(df.StableDiffusionAdapterPipeline, adapter=fam.t2i_adapter())
    distribute(pipe)
    size = {"height": HEIGHT, "width": WIDTH, "output_type": "latent"}  # others are in fp32
    return paint(pipe, image=picture(HEIGHT, WIDTH), adapter_conditioning_scale=0.7, **size)


@row()
def t2i_adapter_for_sdxl(distribute):
    adapter = fam.t2i_adapter("full_adapter_xl")
    pipe = sdxl(df.StableDiffusionXLAdapterPipeline, adapter=adapter)
    distribute(pipe)
    size = {"height": 8 * 22, "width": WIDTH}  # this adapter takes multiples of 16
    return paint(pipe, image=picture(8 * 22, WIDTH), adapter_conditioning_scale=0.7, **size)


@row()
def textual_inversion(distribute):
    pipe = sd15()
    distribute(pipe)
    word = torch.full((2, fam.TEXT_WIDTH), 0.3, dtype=torch.float64)
    pipe.load_textual_inversion({"<dawn>": word})
    return paint(pipe, "a lake at <dawn>")


@row(within=1e-5)  # diffusers filters in fp32
def freeu(distribute):
    pipe = convert(sdxl())
    distribute(pipe)
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    with_it = paint(pipe)
    pipe.disable_freeu()
    return [with_it, paint(pipe)]


@row()
def sliced_vae(distribute):
    pipe = sd15()
    distribute(pipe)
    pipe.vae.enable_slicing()
    return paint(pipe, num_images_per_prompt=2)


@row()
def prompt_embeddings(distribute):
    pipe = sd15()
    distribute(pipe)
    wanted, unwanted = pipe.encode_prompt("a lake", "cpu", 1, True, "fog")
    return paint(pipe, None, prompt_embeds=wanted, negative_prompt_embeds=unwanted)


# --- schedulers and random numbers ----------------------------------------------------------------


SCHEDULERS = {  # some of them compute in fp32, whatever the latent is in
    "ddim_with_eta": (df.DDIMScheduler.from_config, {"eta": 1.0}, 1e-10),
    "ddpm": (df.DDPMScheduler.from_config, {}, 1e-10),
    "dpm_2m": (df.DPMSolverMultistepScheduler.from_config, {}, 1e-5),
    "dpm_2m_sde": (
        functools.partial(
            df.DPMSolverMultistepScheduler.from_config, algorithm_type="sde-dpmsolver++"
        ),
        {},
        1e-5,
    ),
    "euler": (df.EulerDiscreteScheduler.from_config, {}, 1e-5),
    "euler_ancestral": (df.EulerAncestralDiscreteScheduler.from_config, {}, 1e-5),
    "heun": (df.HeunDiscreteScheduler.from_config, {}, 1e-5),
    "lcm": (df.LCMScheduler.from_config, {"guidance_scale": 1.0}, 1e-5),
    "pndm": (functools.partial(df.PNDMScheduler.from_config, skip_prk_steps=True), {}, 1e-10),
    "unipc": (df.UniPCMultistepScheduler.from_config, {}, 1e-5),
}


def enter_scheduler(name, seed):
    make, options, within = SCHEDULERS[name]

    def program(distribute):
        pipe = sd15()
        pipe.scheduler = make(pipe.scheduler.config)
        distribute(pipe)
        return paint(pipe, seed=seed, steps=3, **options)

    program.__name__ = f"{name}_{'unseeded' if seed is None else 'seeded'}"
    row(within)(program)


for _name in SCHEDULERS:
    enter_scheduler(_name, seed=0)
for _name in ("ddim_with_eta", "euler_ancestral", "dpm_2m_sde", "lcm"):
    enter_scheduler(_name, seed=None)


@row()
def unseeded_image_to_image(distribute):
    pipe = sd15(df.StableDiffusionImg2ImgPipeline)
    distribute(pipe)
    return paint(pipe, image=picture(HEIGHT, WIDTH), seed=None, strength=0.6, steps=4)


@row()
def a_generator_for_each_picture(distribute):
    pipe = sd15()
    distribute(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    return paint(pipe, ["a lake", "a hill"], generator=generators)


@row()
def rank_0_decides_how_generators_are_seeded(distribute):
    pipe = sd15()
    rank = distribute(pipe)
    return paint(pipe, generator=torch.Generator().manual_seed(rank))


# --- the table against one process ----------------------------------------------------------------


def run_rows(mesh, names, options):
    """{name: the row's pictures, or its traceback} on this rank, one of several or alone."""

    def distribute(pipe):
        if mesh.size > 1:
            engine.distribute(pipe, mesh, **options)
        torch.manual_seed(100 + mesh.rank)
        return mesh.rank

    return {name: _run_row(mesh, ROWS[name][0], distribute) for name in names}


def _run_row(mesh, program, distribute):
    try:
        with Sentinel() as sentinel:
            pictures = program(distribute)
        assert (sentinel.seen > 0) == (mesh.size > 1)
    except Exception:
        return traceback.format_exc()
    return [np.asarray(x) for x in (pictures if isinstance(pictures, list) else [pictures])]


@pytest.fixture(scope="module")
def pictures(request):
    """pictures(ranks) -> for every rank, its pictures of all rows that are selected."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]

    @functools.cache
    def run(ranks, **options):
        selected = {
            name
            for p in params
            if ranks == 1 or (p.get("ranks"), p.get("groups")) == (ranks, options.get("groups"))
            for name in p.get("rows", [p.get("name")])
        }
        names = [name for name in ROWS if name in selected]
        try:
            return run_ranks(ranks, run_rows, names, options)
        except AssertionError as error:  # said once for each row, not tried again for each
            return [dict.fromkeys(names, str(error))] * ranks

    return run


def check(pictures, name, ranks, **options):
    """Every rank has the picture that one process paints."""
    (expected,) = (result[name] for result in pictures(1))
    assert not isinstance(expected, str), f"in one process: {expected}"
    for rank, result in enumerate(pictures(ranks, **options)):
        assert not isinstance(result[name], str), f"rank {rank}: {result[name]}"
        for got, wanted in zip(result[name], expected, strict=True):
            assert got.shape == wanted.shape
            assert abs(got - wanted).max() <= ROWS[name][1], f"rank {rank}"


# Rows that go through every kind of exchange, also where a band has a neighbour on both sides.
WITH_A_MIDDLE = [
    "inpainting_with_sdxl",
    "two_loras_weighted",
    "several_controlnets",
    "ip_adapter_with_masks",
    "freeu",
    "ddim_with_eta_unseeded",
]


def mostly_long(names, few):
    """All `names`, those that are not among the `few` with the long tests."""
    return [
        pytest.param(name, marks=[] if name in few else pytest.mark.long, id=name) for name in names
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
@pytest.mark.parametrize("name", ROWS)
def test_the_table_on_two_ranks(pictures, name, ranks):
    check(pictures, name, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3])
@pytest.mark.parametrize("name", mostly_long(ROWS, WITH_A_MIDDLE))
def test_the_table_on_three_ranks(pictures, name, ranks):
    check(pictures, name, ranks)


# Rows whose batches are shared out in different ways between two groups of ranks.
GROUPED = [
    "image_to_image",
    "instruct_pix2pix",  # three to a picture: one and two
    "guidance_off",  # one picture, which both groups compute
    "several_pictures_and_negative_prompts",
    "controlnet",
    "controlnet_in_guess_mode",
    "controlnet_that_pools_its_conditions",
    "several_controlnets",
    "controlnet_union",
    "ip_adapter_with_masks",
    "t2i_adapter_for_sdxl",
    "freeu",
    "euler_ancestral_unseeded",
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "groups"), [(2, 2)])
@pytest.mark.parametrize("name", GROUPED)
def test_the_batch_in_two_groups(pictures, name, ranks, groups):
    check(pictures, name, ranks, groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "groups"), [(4, 2)])
@pytest.mark.parametrize("name", mostly_long(GROUPED, ["instruct_pix2pix", "several_controlnets"]))
def test_the_batch_in_two_groups_of_bands(pictures, name, ranks, groups):
    check(pictures, name, ranks, groups=groups)


# Rows that may paint what another row paints.
SAME_BY_DESIGN = {
    "lora_loaded_after": "lora_loaded_before",
    "convolution_lora_loaded_after": "convolution_lora_loaded_before",
    "lora_unloaded": "convolution_lora_loaded_before",
}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [tuple(ROWS)], ids=["all"])
def test_no_two_rows_paint_the_same(pictures, rows):
    """An attachment that silently did nothing would pass all of the above."""
    (painted,) = pictures(1)
    firsts = {}
    for name in rows:
        if name not in SAME_BY_DESIGN:
            other = firsts.setdefault(painted[name][0].tobytes(), name)
            assert other == name, f"{name} paints what {other} paints"
    for name, twin in SAME_BY_DESIGN.items():
        assert abs(painted[name][0] - painted[twin][0]).max() == 0


# --- the families at any height -------------------------------------------------------------------


def family_errors(mesh, family, rows):
    """Errors at each height, with softmax and with LinFusion's modules."""
    errors = {}
    for attention in ("softmax", "linear"):
        with Sentinel():
            pipe = build(family, attention)
            engine.distribute(pipe, mesh)
            got = [paint(pipe, height=8 * height, width=72, steps=1) for height in rows]
        if mesh.rank == 0:
            plain = build(family, attention)
            expected = [paint(plain, height=8 * height, width=72, steps=1) for height in rows]
            worst = [(x - y).abs().max().item() for x, y in zip(got, expected, strict=True)]
            errors[attention] = dict(zip(rows, worst, strict=True))
    return errors


def build(family, attention):
    pipe = getattr(fam, family)()
    return convert(pipe) if attention == "linear" else pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks", [1, 2, 3, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 5))]
)
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_families_at_even_odd_and_ragged_heights(family, ranks):
    # The last band has as many rows as the others, or 5 of 8, or a single one.
    block = 4 if family == "sdxl" else 8
    rows = [block * ranks, block * ranks - 3, block * (ranks - 1) + 1]
    errors = run_ranks(ranks, family_errors, family, [max(height, 8) for height in rows])[0]
    assert max(max(worst.values()) for worst in errors.values()) < 1e-10, errors


# --- ranks that were told different things --------------------------------------------------------


OTHER_INPUTS = {  # of rank 1, and what is said about it
    "prompts": (
        lambda other: {"prompt": "a hill" if other else "a lake"},
        "rank 1 was given another prompt than rank 0",
    ),
    "embeddings": (
        lambda other: {"prompt": None, "prompt_embeds": words(other)},
        "rank 1 works on another latent, prompt or picture than rank 0",
    ),
    "latents": (
        lambda other: {"latents": torch.full((1, 4, 21, 10), float(other)).double()},
        "rank 1 works on another latent, prompt or picture than rank 0",
    ),
    "pictures": (
        lambda other: {"image": picture(HEIGHT, WIDTH, seed=int(other))},
        "rank 1 works on another latent, prompt or picture than rank 0",
    ),
}


def words(other):
    return torch.full((1, 16, fam.TEXT_WIDTH), 1.0 + other, dtype=torch.float64)


def other_inputs(mesh):
    """Rank 1 is told something else than the others."""
    pipe = sd15(df.StableDiffusionControlNetPipeline, controlnet=fam.controlnet(sd15().unet))
    engine.distribute(pipe, mesh)
    same = {"image": picture(HEIGHT, WIDTH), "prompt": "a lake", "guidance_scale": 1.0}
    for inputs, sentence in OTHER_INPUTS.values():
        with pytest.raises(UserError, match=sentence):
            paint(pipe, **{**same, **inputs(mesh.rank == 1)})
    paint(pipe, **same)  # and it is as good as ever
    return True


@pytest.mark.slow
def test_ranks_that_are_told_different_things_are_named_on_all():
    assert all(run_ranks(3, other_inputs))


def other_generators(mesh):
    pipe = sd15()
    engine.distribute(pipe, mesh)
    with pytest.raises(UserError, match="rank 1 was given 0 generators, rank 0 1"):
        paint(pipe, seed=None if mesh.rank else 0)
    return True


@pytest.mark.slow
def test_a_generator_that_is_missing_on_one_rank_is_named_on_all():
    assert all(run_ranks(2, other_generators))


# --- and back -------------------------------------------------------------------------------------


def collected(mesh):
    net = fam.controlnet(sd15().unet)
    pipe = sd15(df.StableDiffusionControlNetPipeline, controlnet=net)
    classes = classes_of(pipe)
    engine.distribute(pipe, mesh)
    assert classes_of(pipe) != classes
    paint(pipe, image=picture(HEIGHT, WIDTH))
    engine.collect(pipe)
    assert classes_of(pipe) == classes
    if mesh.rank == 0:  # alone, and whole
        plain = sd15(df.StableDiffusionControlNetPipeline, controlnet=net)
        expected = paint(plain, image=picture(HEIGHT, WIDTH))
        torch.testing.assert_close(paint(pipe, image=picture(HEIGHT, WIDTH)), expected)
    return True


def classes_of(pipe):
    networks = (pipe.unet, pipe.vae, pipe.controlnet)
    return [type(pipe), *(type(module) for network in networks for module in network.modules())]


@pytest.mark.slow
def test_a_collected_pipeline_is_the_plain_one():
    assert all(run_ranks(2, collected))


def save_distributed(mesh, folder):
    pipe = sdxl()
    engine.distribute(pipe, mesh)
    if mesh.rank == 0:
        pipe.save_pretrained(folder)
    return paint(pipe).numpy()


@pytest.mark.slow
def test_a_distributed_pipeline_saves_and_loads_as_a_plain_one(tmp_path):
    expected = run_ranks(2, save_distributed, tmp_path)[0]
    again = df.DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is df.StableDiffusionXLPipeline
    assert type(again.unet) is df.UNet2DConditionModel
    again.set_progress_bar_config(disable=True)
    assert abs(paint(again).numpy() - expected).max() < 1e-10


# --- what is refused, by name and on every rank ---------------------------------------------------


def gligen():
    """A UNet that attends to boxes."""
    config = {k: v for k, v in sd15().unet.config.items() if not k.startswith("_")}
    unet = df.UNet2DConditionModel.from_config({**config, "attention_type": "gated"})
    pipe = sd15()
    pipe.register_modules(unet=unet)
    return pipe


def offloaded():
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = sd15()
    add_hook_to_module(pipe.unet, ModelHook())
    return pipe


class StyleProcessor(AttnProcessor2_0):
    """Stands for those that do something else to self-attention."""


def with_style(pipe):
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.set_processor(StyleProcessor())
    return pipe


def pooling():
    """A UNet with other blocks, such as those of DeepFloyd IF."""
    options = {"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D")}
    unet = df.UNet2DConditionModel(
        up_block_types=("UpBlock2D",) * 2, block_out_channels=(32, 32), **options
    )
    pipe = sd15()
    pipe.register_modules(unet=unet)
    return pipe


REFUSED_AT_ONCE = {
    "gligen": (gligen, "grounding boxes .GLIGEN."),
    "pag": (lambda: sd15(df.StableDiffusionPAGPipeline), "StableDiffusionPAGPipeline perturbs"),
    "offloading": (offloaded, "unet has offload hooks"),
    "custom processor": (lambda: with_style(sd15()), "attn1 uses StyleProcessor"),
    "custom processor on linear": (lambda: with_style(convert(sd15())), "uses StyleProcessor"),
    "other blocks": (pooling, "a UNet of ResnetDownsampleBlock2D"),
    "another family": (
        lambda: df.PixArtAlphaPipeline(None, None, None, None, None),
        "PixArtAlphaPipeline has no UNet2DConditionModel",
    ),
}


def refuse_at_once(mesh, name):
    build_it, sentence = REFUSED_AT_ONCE[name]
    with pytest.raises(UserError, match=sentence):
        engine.distribute(build_it(), mesh)
    return True


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_what_cannot_be_exact_is_refused_on_every_rank(name):
    assert run_ranks(2, refuse_at_once, name) == [True, True]


def refuse_later(mesh):
    """What is attached after distribute is refused by the call, before its first step."""
    pipe = sd15()
    engine.distribute(pipe, mesh)
    steps = []

    def call():
        paint(pipe, callback_on_step_end=lambda *args: steps.append(1) or {})

    pipe.vae.enable_tiling()
    with pytest.raises(UserError, match="VAE tiling"):
        call()
    pipe.vae.disable_tiling()
    with_style(pipe)
    with pytest.raises(UserError, match="attn1 uses StyleProcessor"):
        call()
    assert steps == []
    return True


def test_what_is_attached_later_is_refused_before_the_first_step():
    assert all(run_ranks(2, refuse_later))
