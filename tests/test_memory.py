"""Settings that save memory: the same results on one rank and on several, and less of it held."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import engine
from engine import fuse, linfusion, memory
from engine.bands import DisplacedExchange, ExactExchange, Mesh, Traffic, banded, split_rows
from engine.bands.boundary import Layout, UNetBoundary, with_boundary
from engine.bands.chunks import convolve, split_evenly
from engine.bands.layers import BandConv2d
from engine.config import UserError
from engine.diffusion import dilated
from engine.kernels import convolution
from engine.memory import MemoryOptions
from engine.parallel import band_layers
from engine.simulation import CudaKernels, pretended, simulate
from tests import families, test_parity
from tests.models import latent, randomise, save_tiny_pipeline, tiny_unet
from tests.ranks import run_ranks
from tests.sentinel import Sentinel

OPTIONS = {
    "token chunks": MemoryOptions(token_chunks=3),
    "row chunks": MemoryOptions(row_chunks=3),
    "more chunks than rows": MemoryOptions(token_chunks=1000, row_chunks=1000),
    "in place": MemoryOptions(inplace_activations=True),
    "skips on the host": MemoryOptions(skips_on_host=True),
    "all": MemoryOptions(
        token_chunks=2, row_chunks=4, inplace_activations=True, skips_on_host=True
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only lose by more, above all where others use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Let skips go to the host and back on a CPU, where the engine refuses it as useless."""
    monkeypatch.setattr("engine.memory.skips.require_device", lambda device: None)


def call(unet, height, width):
    """A forward of batch 2 with all conditions that its family takes."""
    text = latent(7, unet.config.cross_attention_dim, channels=1)[:, 0]
    conditions = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = latent(1, families.TEXT_WIDTH, channels=1)[:, 0, 0]
        conditions = {"text_embeds": pooled, "time_ids": torch.ones(2, 6, dtype=torch.float64)}
    with torch.no_grad():
        return unet(latent(height, width), 500, text, added_cond_kwargs=conditions).sample


def error(result, expected):
    return (result - expected).abs().max().item()


# --- exactness on one rank ------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_every_setting_is_exact(family, attention, pretend_gpu):
    pipe = getattr(families, family)()
    unet = (families.convert(pipe) if attention == "linear" else pipe).unet
    for height, width in [(16, 16), (19, 24)]:
        memory.remove(unet)
        expected = call(unet, height, width)
        for name, options in OPTIONS.items():
            memory.apply(unet, options)
            assert error(call(unet, height, width), expected) < 1e-10, name


# What users attach to a pipeline, in programs that run once with the settings, once without.
ATTACHMENTS = [
    name
    for name, (program, _) in test_parity.ROWS.items()
    if not name.endswith("seeded") and name != "rank_0_decides_how_generators_are_seeded"
]


def pictures_of(program, distribute):
    torch.manual_seed(0)
    with torch.no_grad():
        pictures = program(distribute)
    pictures = pictures if isinstance(pictures, list) else [pictures]
    return torch.cat([torch.as_tensor(picture).flatten() for p in pictures for picture in p])


@pytest.mark.parametrize("name", ATTACHMENTS)
def test_all_settings_with_what_users_attach(name, pretend_gpu):
    program, _ = test_parity.ROWS[name]
    expected = pictures_of(program, lambda pipe: None)
    result = pictures_of(program, lambda pipe: memory.apply(pipe.unet, OPTIONS["all"]))
    assert error(result, expected) < 1e-10


def test_copies_of_a_unet_keep_their_settings_apart(pretend_gpu):
    unet = tiny_unet()
    expected = call(unet, 16, 16)
    memory.apply(unet, OPTIONS["all"])
    other = copy.deepcopy(unet)
    memory.remove(unet)
    assert torch.equal(call(unet, 16, 16), expected)
    assert error(call(other, 16, 16), expected) < 1e-10


def test_half_precision_under_autocast():
    unet = tiny_unet(dtype=torch.float32)
    sample, text = latent(16, 16).float(), latent(7, 24, channels=1)[:, 0].float()
    outputs = []
    for options in (MemoryOptions(), MemoryOptions(token_chunks=3, row_chunks=3)):
        memory.apply(unet, options)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs.append(unet(sample, 500, text).sample)
    plain, lean = outputs
    assert lean.dtype == plain.dtype
    assert error(lean, plain) < 0.05 * plain.abs().max()


# --- exactness on several ranks -------------------------------------------------------------------


def banded_unet(mesh, exchange_type=ExactExchange, **options):
    unet = tiny_unet(**options)
    exchange = exchange_type(mesh, Traffic())
    band_layers(unet)
    layout = Layout(mesh, Mesh(0, 1, mesh.device, None), exchange, exchange.traffic)
    with_boundary(unet, UNetBoundary, layout)
    return unet, exchange


def errors_on_bands(mesh):
    convolution._LEAST_PIXELS = 0  # doubled by phases, as large pictures are
    errors, traffic = {}, []
    for linear in (True, False):
        unet, exchange = banded_unet(mesh, linear=linear)
        plain = tiny_unet(linear=linear)
        for height, width in [(64, 16), (41, 32)]:
            expected = call(plain, height, width)
            for name in ("token chunks", "row chunks", "in place"):
                memory.remove(unet)
                before = copy.deepcopy(exchange.traffic)
                call(unet, height, width)
                between = copy.deepcopy(exchange.traffic)
                memory.apply(unet, OPTIONS[name])
                with Sentinel():
                    result = call(unet, height, width)
                errors[linear, height, name] = error(result, expected)
                traffic.append((_less(between, before), _less(exchange.traffic, between)))
    return errors, traffic


def _less(traffic, before):
    return traffic.bytes_sent - before.bytes_sent, traffic.rounds - before.rounds


def test_every_setting_is_exact_over_bands_and_sends_the_same():
    for errors, traffic in run_ranks(3, errors_on_bands):
        assert len(errors) == 12
        assert max(errors.values()) < 1e-10, errors
        for plain, lean in traffic:
            assert plain == lean


def dilated_errors(mesh):
    """On bands of 4 rows at the lowest level, a halo of 3 rows at all of them."""
    unet, _ = banded_unet(mesh)
    memory.apply(unet, MemoryOptions(token_chunks=2, row_chunks=3))
    alone, plain = tiny_unet(), tiny_unet()
    memory.apply(alone, MemoryOptions(row_chunks=5))
    with dilated(plain, 3):
        expected = call(plain, 32, 16)
    errors = []
    for network in (unet, alone):
        with dilated(network, 3):
            errors.append(error(call(network, 32, 16), expected))
    return errors


def test_dilated_convolutions_in_chunks_are_exact():
    for errors in run_ranks(2, dilated_errors):
        assert max(errors) < 1e-10


def displaced_forwards(mesh):
    results = []
    for options in (MemoryOptions(), MemoryOptions(token_chunks=2, row_chunks=2)):
        unet, exchange = banded_unet(mesh, DisplacedExchange)
        exchange.warmup_steps = 1
        memory.apply(unet, options)
        text = latent(7, 24, channels=1)[:, 0]
        results.append([unet(latent(24, 16) * x, 500, text).sample for x in (1, 0.9, 0.8)])
        exchange.reset()
    plain, lean = results
    return [error(a, b) for a, b in zip(plain, lean, strict=True)]


def test_the_displaced_mode_displaces_the_same_things():
    assert max(map(max, run_ranks(2, displaced_forwards))) < 1e-10


# --- sharded weights ------------------------------------------------------------------------------

SHARDED = MemoryOptions(token_chunks=3, row_chunks=2, sharded_weights=True)


def held_share(unet, whole):
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in unet.parameters())
    return held / sum(p.numel() for p in whole.parameters())


def sharded_and_back(mesh):
    whole, unet = tiny_unet(), tiny_unet()
    expected = call(whole, 16, 16)
    result = SimpleNamespace(errors=[], shares=[])
    for _ in range(2):  # sharing out anew after an undo works too
        for options in (MemoryOptions(sharded_weights=True), SHARDED):
            memory.apply(unet, options, mesh)
            result.errors += [error(call(unet, 16, 16), expected) for _ in range(2)]
            result.shares.append(held_share(unet, whole))
        memory.remove(unet)
    result.same_classes = [type(m) for m in unet.modules()] == [type(m) for m in whole.modules()]
    result.same_names = list(unet.state_dict()) == list(whole.state_dict())
    result.same_attributes = [set(vars(a)) for a in unet.modules()] == [
        set(vars(b)) for b in whole.modules()
    ]
    result.hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    result.same_weights = all(
        type(a) is nn.Parameter and torch.equal(a, b)
        for a, b in zip(unet.parameters(), whole.parameters(), strict=True)
    )
    return result


def test_sharded_weights_are_exact_and_undone():
    for result in run_ranks(3, sharded_and_back):
        assert max(result.errors) < 1e-10
        assert max(result.shares) < 0.4  # a third, and a little where a weight has few rows
        assert result.same_classes
        assert result.same_names
        assert result.same_attributes
        assert result.hooks == 0
        assert result.same_weights


def fused_and_sharded(mesh):
    with torch.inference_mode(False):  # as models are loaded
        unet = tiny_unet()
    expected = call(unet, 16, 16)
    fuse.choose_kernels(unet, "fused")
    memory.apply(unet, MemoryOptions(sharded_weights=True), mesh)
    errors = [error(call(unet, 16, 16), expected)]
    memory.remove(unet)
    return max(*errors, error(call(unet, 16, 16), expected))


def test_sharded_weights_of_a_fused_network():
    """Its convolutions' weights lie channels last, as FSDP2 takes none."""
    assert max(run_ranks(2, fused_and_sharded)) < 1e-10


def sharded_pipelines(mesh, names):
    """Programs with `engine.distribute`, and settings applied before or after it."""

    def memory_first(pipe):
        memory.apply(pipe.unet, SHARDED, mesh)
        engine.distribute(pipe, mesh)

    def memory_last(pipe):
        engine.distribute(pipe, mesh)
        memory.apply(pipe.unet, SHARDED, mesh)

    errors = {}
    with torch.inference_mode(False):  # in which no LoRA could be added to sharded weights
        for name in names:
            program, _ = test_parity.ROWS[name]
            expected = pictures_of(program, lambda pipe: None)
            for order in (memory_first, memory_last):
                errors[name, order.__name__] = error(pictures_of(program, order), expected)
    return errors


@pytest.mark.slow
def test_sharded_weights_in_distributed_pipelines():
    names = ["lora_loaded_before", "convolution_lora_loaded_after"]
    for errors in run_ranks(3, sharded_pipelines, names):
        assert len(errors) == 4
        assert max(errors.values()) < 1e-10, errors


def collected(mesh, folder):
    """Taken apart in either order, a pipeline is as it was loaded."""
    plain = engine.load(str(folder))
    same = []
    for undo in ("memory first", "bands first"):
        pipe = engine.load(str(folder))
        memory.apply(pipe.unet, SHARDED, mesh)
        engine.distribute(pipe, mesh)
        if undo == "memory first":
            memory.remove(pipe.unet)
            engine.collect(pipe)
        else:
            engine.collect(pipe)
            memory.remove(pipe.unet)
        classes, wanted = ([type(m) for m in p.unet.modules()] for p in (pipe, plain))
        same.append(classes == wanted)
        same.append(type(pipe.unet) is UNet2DConditionModel)
    return same


def refused_while_sharded(mesh, folder):
    unet = tiny_unet()
    memory.apply(unet, MemoryOptions(sharded_weights=True), mesh)
    sentences = []
    for attempt in (unet.fuse_lora, unet.unfuse_lora, lambda: unet.save_pretrained(folder)):
        with pytest.raises(UserError) as caught:
            attempt()
        sentences.append(str(caught.value))
    return sentences


def test_settings_and_bands_are_taken_off_in_any_order(tmp_path):
    save_tiny_pipeline(tmp_path)
    assert all(map(all, run_ranks(2, collected, tmp_path)))


def test_what_needs_whole_weights_is_refused(tmp_path):
    for sentences in run_ranks(2, refused_while_sharded, tmp_path):
        assert len(sentences) == 3
        assert all("sharded_weights): do it before" in sentence for sentence in sentences)


# --- undone ---------------------------------------------------------------------------------------


def test_removed_settings_leave_the_plain_unet(pretend_gpu):
    unet, plain = tiny_unet(), tiny_unet()
    expected = call(plain, 16, 16)
    for options in OPTIONS.values():
        memory.apply(unet, options)
        assert list(unet.state_dict()) == list(plain.state_dict())
        memory.remove(unet)
        assert [type(m) for m in unet.modules()] == [type(m) for m in plain.modules()]
        assert [set(vars(a)) for a in unet.modules()] == [set(vars(b)) for b in plain.modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
        assert torch.equal(call(unet, 16, 16), expected)


def test_new_settings_replace_the_old_ones():
    unet = tiny_unet()
    memory.apply(unet, MemoryOptions(row_chunks=3))
    memory.apply(unet, MemoryOptions(token_chunks=5))
    assert not any(hasattr(m, "row_chunks") for m in unet.modules())
    assert {m.token_chunks for m in unet.modules() if hasattr(m, "token_chunks")} == {5}


# --- what is held ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_sdxl():
    """Its shapes without weights."""
    with pretended(torch.float16):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 1, 1),  # of 1, 2 and 10: one holds as much as ten
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
        linfusion.convert(unet)
    return unet.eval().requires_grad_(False)


def peak(unet, options, pixels=16384):
    """GB on the GPU, GB on the host."""
    memory.apply(unet, options)
    side = pixels // 8
    inputs = [torch.empty(1, 4, side, side), torch.empty(()), torch.empty(1, 77, 2048)]
    inputs = [x.to("meta", torch.float16) for x in inputs]
    cost = simulate(lambda: unet(*inputs), CudaKernels())
    memory.remove(unet)
    return cost.peak_bytes / 1e9, cost.host_bytes / 1e9


def test_sdxl_at_16384_px_leaves_room_on_a_gpu_of_24_gb(real_sdxl):
    plain, _ = peak(real_sdxl, MemoryOptions())
    chunks, _ = peak(real_sdxl, MemoryOptions(token_chunks=16, row_chunks=16))
    lean, host = peak(real_sdxl, MemoryOptions(token_chunks=16, row_chunks=16, skips_on_host=True))
    assert plain > 41  # a feed-forward's, beside the skips
    assert chunks < 21  # 8 GB skips, and input and output of the largest residual block
    assert lean < 13.5  # and the weights are 6.0
    assert 12 < host < 14


def test_skips_leave_when_the_next_block_begins(pretend_gpu):
    unet = tiny_unet()
    alive = []

    def note(module, args, output):
        outputs = output[1] if isinstance(output, tuple) else [output]
        alive.extend(weakref.ref(tensor_of(skip).untyped_storage()) for skip in outputs)

    def tensor_of(skip):
        return skip if isinstance(skip, torch.Tensor) else skip.held

    def count(module, args):
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))

    counts = []
    unet.mid_block.register_forward_pre_hook(count)
    for resnet in [r for block in unet.down_blocks for r in block.resnets]:
        resnet.register_forward_hook(note)
    for sampler in [s for block in unet.down_blocks for s in block.downsamplers or ()]:
        sampler.register_forward_hook(note)
    call(unet, 16, 16)
    plain = counts.pop()
    alive.clear()
    memory.apply(unet, MemoryOptions(skips_on_host=True))
    call(unet, 16, 16)
    assert plain > 1
    assert counts == [1]  # the one that the next block begins with


class ConvolutionSizes(TorchFunctionMode):
    """The largest input or output of any convolution, in elements."""

    largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.conv2d or func is torch.conv2d:
            self.largest = max(self.largest, args[0].numel(), out.numel())
        return out


def test_no_convolution_is_given_more_than_the_limit(monkeypatch):
    unet = families.sdxl().unet
    expected = call(unet, 32, 32)
    largest = 2 * 48 * 32 * 32  # hidden states and skip of the last block
    limit = largest // 5
    with ConvolutionSizes() as plain:
        call(unet, 32, 32)
    monkeypatch.setattr("engine.kernels.convolution.MAX_ELEMENTS", limit)
    memory.apply(unet, MemoryOptions(row_chunks=8))
    with ConvolutionSizes() as lean:
        result = call(unet, 32, 32)
    assert plain.largest == largest
    assert 0 < lean.largest <= limit
    assert error(result, expected) < 1e-10


# --- row arithmetic -------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 600))
def test_even_chunks_cover_all_and_differ_little(length, chunks):
    ranges = split_evenly(length, chunks)
    assert [i for r in ranges for i in r] == list(range(length))
    assert len(ranges) <= chunks
    assert all(len(r) == len(ranges[0]) for r in ranges[:-1])


@given(
    height=st.integers(1, 12),
    chunks=st.integers(1, 14),
    dilation=st.integers(1, 3),
    kernel=st.sampled_from([1, 3, 5]),
)
def test_a_convolution_in_chunks_is_the_convolution(height, chunks, dilation, kernel):
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(2, 3, kernel, padding=padding, dilation=dilation).double()
    x = latent(height, 5, channels=2)
    read = []

    def rows(start, stop):
        read.append((start, stop))
        return x[:, :, start:stop]

    with torch.no_grad():
        pieces = [piece for _, piece in convolve(conv, rows, height, chunks)]
        torch.testing.assert_close(torch.cat(pieces, dim=2), conv(x))
    assert len(pieces) == len(split_evenly(height, chunks))
    assert [start for start, _ in read] == [r.start for r in split_evenly(height, chunks)]


@given(
    height=st.integers(1, 14),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    limit=st.integers(60, 400),
)
def test_a_convolution_beyond_the_limit_is_the_convolution(height, kernel, stride, dilation, limit):
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation).double()
    x = latent(height, 4, channels=2, batch=1)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = conv(x)
        patch.setattr("engine.kernels.convolution.MAX_ELEMENTS", limit)
        conv.__class__ = BandConv2d
        torch.testing.assert_close(conv(x), expected)


def convolutions_beyond_the_limit(mesh):
    whole = latent(21, 6, channels=2)
    conv = randomise(nn.Conv2d(2, 3, 3, padding=1)).double()
    expected = conv(whole)
    conv.__class__ = BandConv2d
    own = split_rows(21, mesh.size)[mesh.rank]
    with pytest.MonkeyPatch.context() as patch, banded(ExactExchange(mesh, Traffic())):
        patch.setattr("engine.kernels.convolution.MAX_ELEMENTS", 200)
        with ConvolutionSizes() as sizes:
            result = conv(whole[:, :, own.start : own.stop])
    return error(result, expected[:, :, own.start : own.stop]), sizes.largest


def test_a_convolution_beyond_the_limit_over_bands():
    for deviation, largest in run_ranks(3, convolutions_beyond_the_limit):
        assert deviation < 1e-12
        assert largest <= 200


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token_chunks", "row_chunks"])
def test_fewer_chunks_than_one_are_refused(name):
    with pytest.raises(UserError, match=f"{name} is 0: it must be 1 or more"):
        MemoryOptions(**{name: 0})


def test_skips_on_the_host_are_refused_on_a_cpu():
    unet = tiny_unet()
    memory.apply(unet, MemoryOptions(skips_on_host=True))
    with pytest.raises(UserError, match="this UNet computes on the CPU: leave it out"):
        call(unet, 16, 16)
    assert not unet.conv_in._forward_hooks


def test_sharded_weights_are_refused_on_one_rank():
    unet = tiny_unet()
    with pytest.raises(UserError, match="there is one only: start more"):
        memory.apply(unet, MemoryOptions(sharded_weights=True))


def test_offload_hooks_are_refused():
    unet = tiny_unet()
    add_hook_to_module(unet.conv_in, ModelHook())
    with pytest.raises(UserError, match="conv_in has an offload hook of its own"):
        memory.apply(unet, MemoryOptions(row_chunks=2))


def test_training_is_refused():
    unet = tiny_unet()
    memory.apply(unet, MemoryOptions(row_chunks=2))
    with pytest.raises(UserError, match="overwrite what training needs"):
        call(unet.train(), 16, 16)
    unet.eval().requires_grad_(True)
    with pytest.raises(UserError, match="overwrite what training needs"):
        unet(latent(16, 16), 500, latent(7, 24, channels=1)[:, 0])


def test_other_padding_is_refused():
    unet = tiny_unet()
    memory.apply(unet, MemoryOptions(row_chunks=2))
    unet.mid_block.resnets[0].conv1.padding_mode = "circular"
    with pytest.raises(UserError, match="a convolution pads with 'circular', which chunks"):
        call(unet, 16, 16)
