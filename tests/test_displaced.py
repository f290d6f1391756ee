"""The displaced mode on real ranks: exact while it warms up, one step behind the others after."""

import time
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

import engine
from engine.bands import DisplacedExchange, ExactExchange, Mesh, Traffic, banded, split_rows
from engine.bands.boundary import Layout, UNetBoundary, with_boundary
from engine.config import UserError
from engine.linfusion import LinearAttention
from engine.parallel import band_layers
from tests.models import latent, save_tiny_pipeline, tiny_unet
from tests.ranks import run_ranks

LAYERS = {
    "convolution": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "strided convolution": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "dilated convolution": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "group norm": lambda: nn.GroupNorm(4, 8),
    "softmax attention": lambda: Attention(8, heads=2, dim_head=4),
    "linear attention": lambda: LinearAttention(8, heads=2, dim_head=4),
}


def displaced(warmup_steps, extrapolate=True):
    return partial(DisplacedExchange, warmup_steps=warmup_steps, extrapolate=extrapolate)


def text(batch=2):
    return latent(7, 24, channels=1, batch=batch)[:, 0]


def banded_unet(mesh, mode, **options):
    unet = tiny_unet(**options)
    exchange = mode(mesh, Traffic())
    band_layers(unet)
    layout = Layout(mesh, Mesh(0, 1, mesh.device, None), exchange, exchange.traffic)
    with_boundary(unet, UNetBoundary, layout)
    return unet, exchange


def forwards(mesh, mode, samples, **options):
    """What the UNet makes of each sample, one forward after the other."""
    unet, exchange = banded_unet(mesh, mode, **options)
    outputs = [unet(sample, 500, text(len(sample))).sample for sample in samples]
    exchange.reset()
    return outputs


def errors(results, expected):
    return [(a - b).abs().max().item() for a, b in zip(results, expected, strict=True)]


# --- what a layer sees ----------------------------------------------------------------------------


def make_layer(name):
    torch.manual_seed(0)
    network = nn.Sequential(LAYERS[name]()).double()
    for parameter in network.parameters():
        parameter.data.normal_()
    return network.eval()


def layer_input(name, step, height):
    """Different noise of another size at every step: [2, 8, H, 6], or as tokens."""
    picture = (step + 1) * latent(height, 6 + step, channels=8)[..., :6]
    return picture.flatten(2).transpose(1, 2) if "attention" in name else picture


def band_of(x, rows, whole_rows):
    """The rows `rows` of `whole_rows` of a picture, of its tokens, or of a smaller picture."""
    dim = 1 if x.ndim == 3 else 2
    start, stop = (-(-edge * x.shape[dim] // whole_rows) for edge in (rows.start, rows.stop))
    return x.narrow(dim, start, stop - start)


def layer_errors(mesh, height, steps):
    """Each layer against the plain one over own rows of this step among others' of the last."""
    own, worst = split_rows(height, mesh.size, 2)[mesh.rank], {}
    for name in LAYERS:
        network, plain = make_layer(name), make_layer(name)
        exchange = displaced(1, extrapolate=False)(mesh, Traffic())
        band_layers(network)
        for step in range(steps):
            fresh, mixed = (layer_input(name, s, height) for s in (step, max(0, step - 1)))
            band_of(mixed, own, height).copy_(band_of(fresh, own, height))
            if name == "dilated convolution":
                mixed = fresh  # a halo of more than a row is waited for
            exchange.start(fresh)
            with banded(exchange):
                result = network(band_of(fresh, own, height).contiguous())
            expected = band_of(plain(mixed), own, height)
            worst[name, step] = (result - expected).abs().max().item()
        exchange.reset()
    return worst


@pytest.mark.parametrize(("ranks", "height"), [(2, 16), (3, 20)])
def test_a_layer_sees_its_own_rows_of_now_among_the_others_of_the_step_before(ranks, height):
    for worst in run_ranks(ranks, layer_errors, height, 3):
        assert len(worst) == 3 * len(LAYERS)
        assert max(worst.values()) < 1e-10, worst


def sums_along_a_line(mesh):
    """Sums of values that change evenly, and of one that a line would take below zero."""
    exchange = displaced(1)(mesh, Traffic())
    found = []
    for step in range(4):
        x = torch.tensor([1.0 + step, 10.0 * mesh.rank - step, (16.0, 4.0, 1.0, 0.25)[step]])
        exchange.start(x)
        found.append(exchange.sum("layer", x).tolist())
    exchange.reset()
    return found


def test_sums_follow_their_trend_as_far_as_half_or_double():
    for found in run_ranks(2, sums_along_a_line):
        assert found[0] == [2, 10, 32]  # warm-up
        assert (found[1][0], found[1][2]) == (3, 20)  # the others one step behind
        assert (found[2][0], found[2][2]) == (6, 1 + 2)  # on the line; 16 -> 4 goes on to 2, not -8
        assert found[3] == [8, 4, 0.25 + 0.5]


def ahead_of_rank_1(mesh, flag):
    """Rank 0 goes through every kind of exchange of a step that rank 1 begins only after that."""
    exchange = DisplacedExchange(mesh, Traffic(), warmup_steps=1)
    x = latent(4, 4)
    for step in range(2):
        if step == 1 and mesh.rank == 1:
            deadline = time.monotonic() + 60
            while not flag.exists():
                assert time.monotonic() < deadline, "rank 0 waits for what rank 1 has not yet sent"
                time.sleep(0.01)
        exchange.start(x)
        exchange.halo("convolution", x, 1, 1)
        exchange.sum("norm", x)
        exchange.gather("attention", x, dim=2)
        if step == 1 and mesh.rank == 0:
            flag.touch()
    exchange.reset()
    return exchange.buffer_bytes


def test_no_layer_waits_for_the_step_that_it_is_in(tmp_path):
    assert run_ranks(2, ahead_of_rank_1, tmp_path / "flag") == [0, 0]


# --- whole networks -------------------------------------------------------------------------------


def drifting(change, steps, height=24, width=8):
    """Samples that move by `change` at each step, as a picture in the making does."""
    noise, direction = latent(height, width), latent(height, width + 1)[..., :width]
    return [noise + change * step * direction for step in range(steps)]


def unet_errors(mesh, linear, extrapolate):
    """Deviations from exact mode, forward by forward, for several speeds of change."""
    found, mode = {}, displaced(2, extrapolate)
    for change in (0.0, 1e-3, 1e-2):
        samples = drifting(change, steps=3)
        exact = forwards(mesh, ExactExchange, samples, linear=linear)
        found[change] = errors(forwards(mesh, mode, samples, linear=linear), exact)
    return found


@pytest.mark.parametrize(
    ("ranks", "linear", "extrapolate"),
    [(2, True, False), (3, True, True), (2, False, True)],
    ids=["two", "three", "softmax"],
)
def test_the_unet_errs_only_after_warm_up_and_by_as_much_as_its_input_changes(
    ranks, linear, extrapolate
):
    for found in run_ranks(ranks, unet_errors, linear, extrapolate):
        assert all(warm == [0, 0] for warm in (error[:2] for error in found.values())), found
        assert max(found[0.0]) < 1e-10, found
        slow, fast = max(found[1e-3]), max(found[1e-2])
        assert slow > 1e-6, "stale it is"
        assert fast / slow == pytest.approx(10, rel=0.3), found  # to first order


SHAPES = [(2, 4, 24, 8), (2, 4, 29, 8), (1, 4, 29, 8)]


def errors_after_each_change_of_shape(mesh):
    samples = [latent(h, w, batch=b) * k for b, _, h, w in SHAPES for k in (1, 2)]
    exact = forwards(mesh, ExactExchange, samples)
    return errors(forwards(mesh, displaced(1), samples), exact)


def test_another_height_or_batch_warms_up_again():
    for found in run_ranks(2, errors_after_each_change_of_shape):
        assert found[0::2] == [0] * len(SHAPES)
        assert min(found[1::2]) > 1e-3, (
            "each second sample is another, which displaced mode errs on"
        )


# --- wild activations -----------------------------------------------------------------------------


def are_finite(mesh, dtype, extrapolate):
    """Whether layers return numbers when activations leap by many orders of magnitude."""
    found, huge = {}, 1e3 if dtype == torch.float16 else 1e6
    for name in ("group norm", "linear attention"):
        network = make_layer(name).to(dtype)
        band_layers(network)
        exchange = displaced(1, extrapolate)(mesh, Traffic())
        for step, scale in enumerate((1.0, huge, 1 / huge, 0.0, huge, 0.0, 0.0, 1.0)):
            x = layer_input(name, 0, 8) * (scale if mesh.rank == step % 2 else 1 / huge)
            exchange.start(x)
            with banded(exchange):
                found[name, step] = network(x.to(dtype)).isfinite().all().item()
        exchange.reset()
    return found


@pytest.mark.parametrize("extrapolate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wild_changes_never_give_nan_or_infinity(dtype, extrapolate):
    for found in run_ranks(2, are_finite, dtype, extrapolate):
        assert all(found.values()), found


# --- pipelines ------------------------------------------------------------------------------------


def paint(pipe, prompt, steps=2, height=256, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt,
        num_inference_steps=steps,
        height=height,
        width=128,
        generator=generator,
        output_type="latent",
        **options,
    ).images


def load(folder, mesh, **options):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    engine.linearize(pipe, folder / "linfusion")
    return pipe, engine.distribute(pipe, mesh, **options)


def pipeline_errors(mesh, folder):
    """Deviations of a displaced pipeline from what it should paint, one exact step in each call."""
    exact, _ = load(folder, mesh)
    pipe, layout = load(folder, mesh, exchange=displaced(1))
    held = []

    def watch(pipe, step, timestep, tensors):
        held.append(layout.exchange.buffer_bytes)
        return tensors

    def error(latent, expected):
        return (latent - expected).abs().max().item()

    first = paint(pipe, "a lake", callback_on_step_end=watch)
    held.append(layout.exchange.buffer_bytes)
    second = paint(pipe, "a forest")
    taller = paint(pipe, "a lake", steps=1, height=328)
    decoded = [pipe.vae.decode(latent).sample for latent in (first, second)]
    engine.distribute(pipe, mesh, exchange=displaced(1))
    return held, {
        "stale": error(first, paint(exact, "a lake")),
        "second prompt": error(second, paint(pipe, "a forest")),
        "other size": error(taller, paint(exact, "a lake", steps=1, height=328)),
        "vae": error(decoded[0], exact.vae.decode(first).sample),
        "vae again": error(decoded[1], exact.vae.decode(second).sample),
    }


def test_every_call_of_a_pipeline_warms_up_and_its_vae_is_exact(tmp_path):
    save_tiny_pipeline(tmp_path)
    for (*steps, after), found in run_ranks(2, pipeline_errors, tmp_path):
        assert min(steps) > 0
        assert after == 0, "nothing is held, and nothing on its way, between two pictures"
        assert found.pop("stale") > 1e-4
        assert set(found.values()) == {0}, found


# --- costs ----------------------------------------------------------------------------------------


def expected_buffer_bytes(unet, exchange, neighbours, bands, sums_kept):
    """A list that fills, as the banded UNet runs, with what each of its layers should hold."""
    held = []
    halo_later, statistics = exchange.halo_later, exchange.statistics

    def convolution(layer, x, above, below, shared=False):
        held.append(halo_bytes(x, above, below))
        return halo_later(layer, x, above, below, shared)

    def norm(layer, parts, groups, shift=None):
        held.append(2 * sums_kept * 3 * len(parts[0]) * groups * 8)
        return statistics(layer, parts, groups, shift)

    def halo_bytes(x, above, below):
        received = above * ("above" in neighbours) + below * ("below" in neighbours)
        sent = below * ("above" in neighbours) + above * ("below" in neighbours)
        return (received + sent) * x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()

    def linear(layer, args):
        d = layer.to_q.out_features // layer.heads
        numbers = args[0].shape[0] * layer.heads * d * (d + 1) + 1
        held.append(2 * sums_kept * numbers * max(4, args[0].element_size()))

    def softmax(layer, args):
        batch, tokens, channels = args[0].shape
        held.append(2 * bands * batch * tokens * channels * args[0].element_size())

    exchange.halo_later, exchange.statistics = convolution, norm
    for name, layer in unet.named_modules():
        if name.endswith("attn1"):
            layer.register_forward_pre_hook(linear if type(layer) is LinearAttention else softmax)
    return held


def costs(mesh, dtype, linear, extrapolate):
    """(bytes held, bytes that should be), and each mode's traffic in one step after warm-up."""
    neighbours = {"above"} if mesh.rank else set()
    neighbours |= {"below"} if mesh.rank < mesh.size - 1 else set()
    sample, prompt = latent(12 * mesh.size, 16).to(dtype), text().to(dtype)
    sent, rounds = [], []
    for mode in (ExactExchange, displaced(1, extrapolate)):
        unet, exchange = banded_unet(mesh, mode, linear=linear, dtype=dtype)
        unet(sample, 500, prompt)
        exchange.traffic.bytes_sent.clear()
        exchange.traffic.rounds.clear()
        sums = 2 if extrapolate else 1
        expected = expected_buffer_bytes(unet, exchange, neighbours, mesh.size, sums)
        unet(sample, 500, prompt)
        sent.append(dict(exchange.traffic.bytes_sent))
        rounds.append(dict(exchange.traffic.rounds))
    held = exchange.buffer_bytes
    exchange.reset()
    return (held, sum(expected)), sent, rounds


@pytest.mark.parametrize(
    ("ranks", "dtype", "linear", "extrapolate"),
    [
        (3, torch.float32, True, True),
        (2, torch.float64, True, False),
        (2, torch.float32, False, True),
    ],
)
def test_buffers_are_those_of_the_formula_and_bytes_sent_those_of_exact_mode(
    ranks, dtype, linear, extrapolate
):
    for (held, expected), sent, rounds in run_ranks(ranks, costs, dtype, linear, extrapolate):
        assert held == expected > 0
        (exact, stale), (exact_rounds, stale_rounds) = sent, rounds
        if not linear:  # exact mode asks for the number of tokens in each round, 8 bytes a peer
            attentions = stale_rounds["softmax attention"]
            exact["softmax attention"] -= 8 * (ranks - 1) * attentions
            exact_rounds["softmax attention"] -= attentions
        assert stale == exact
        assert stale_rounds == exact_rounds


def no_warm_up(mesh):
    with pytest.raises(UserError, match="warmup_steps is 0: it must be 1 or more"):
        DisplacedExchange(mesh, Traffic(), warmup_steps=0)
    return True


def test_the_first_step_must_be_exact():
    assert all(run_ranks(2, no_warm_up))
