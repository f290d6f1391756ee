"""The Triton kernels in Triton's interpreter, on CPU tensors, against the formula in float64.

Triton has to be told before it is imported, so `tests/test_fused.py` runs this file in a process of
its own; by hand it is `TRITON_INTERPRET=1 python -m pytest tests/interpreted.py`.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import fuse, linfusion
from engine.bands import open_mesh
from engine.config import Settings
from engine.keeper import Control, Interrupted
from engine.kernels.formula import apply_state, attention_state
from engine.kernels.fused import (
    fused_apply,
    fused_state,
    is_interpreted,
    tiles_of_apply,
    tiles_of_state,
)
from engine.linfusion import FusedLinearAttention, LinearAttention
from engine.pipeline import Engine
from engine.provenance import read_config
from tests.models import latent, randomise, save_tiny_pipeline, tiny_unet
from tests.test_linfusion import relative_error

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="needs Triton and TRITON_INTERPRET=1")

# The interpreter cuts bf16 numbers off where a GPU rounds them.
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 5e-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)


def random_qkv(tokens, width, dtype, *, batch=1, heads=2, mean=0.0, scale=1.0, values=1.0):
    """Three [B, heads, n, d], the heads side by side in memory as the projections make them."""
    generator = torch.Generator().manual_seed(tokens)
    draw = [torch.randn(batch, tokens, heads, width, generator=generator) for _ in "qkv"]
    scaled = scale * draw[0] + mean, scale * draw[1] + mean, values * draw[2]
    return [x.to(dtype).transpose(1, 2) for x in scaled]


def errors(query, key, value):
    """Of the state, and of what is read from it, against float64."""
    tokens = key.shape[-2]
    state = fused_state(key, value)
    assert state.dtype == torch.float32
    out = fused_apply(query, state / tokens)
    assert (out.dtype, out.stride()) == (query.dtype, query.stride())
    assert torch.isfinite(out).all()
    exact = attention_state(key.double(), value.double())
    expected = apply_state(query.double(), exact / tokens)
    return relative_error(state, exact), relative_error(out, expected)


@DTYPES
@pytest.mark.parametrize(
    ("width", "tokens"), [(32, 1000), (40, 777), (64, 321), (80, 257), (128, 100), (160, 131)]
)
def test_kernels_compute_the_formula(width, tokens, dtype):
    assert max(errors(*random_qkv(tokens, width, dtype))) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize(("mean", "scale"), [(-8.0, 1.0), (-12.0, 1.0), (0.0, 16.0), (6.0, 4.0)])
def test_strongly_negative_and_large_activations_survive(mean, scale, dtype):
    qkv = random_qkv(600, 40, dtype, mean=mean, scale=scale, values=50.0)
    assert max(errors(*qkv)) < (2e-3 if dtype == torch.float16 else TOLERANCES[dtype])


@DTYPES
@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 300),
    width=st.integers(1, 72),
)
def test_any_shape(dtype, batch, heads, tokens, width):
    qkv = random_qkv(tokens, width, dtype, batch=batch, heads=heads)
    assert max(errors(*qkv)) < 2 * TOLERANCES[dtype]


def columns_first(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def with_gaps(x):
    wider = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 3), float("nan"), dtype=x.dtype)
    wider[:, :, ::2, 1:-2] = x
    return wider[:, :, ::2, 1:-2]


@DTYPES
@pytest.mark.parametrize("view", [torch.Tensor.contiguous, columns_first, with_gaps])
def test_strides_change_nothing(view, dtype):
    query, key, value = random_qkv(140, 40, dtype)
    state = fused_state(key, value)
    assert view(key).stride() != key.stride()
    assert torch.equal(fused_state(view(key), value), state)
    assert torch.equal(fused_state(key, view(value)), state)
    assert torch.equal(fused_apply(view(query), state), fused_apply(query, state))


@DTYPES
@pytest.mark.parametrize("mean", [-16.0, -30.0, -100.0])
def test_queries_that_see_hardly_anything_are_scaled(mean, dtype):
    query, key, value = random_qkv(100, 40, dtype)
    query = query + mean
    state = attention_state(key.double(), value.double()) / 100
    out = fused_apply(query, state.float())
    expected = apply_state(query.double(), state)
    smallest = torch.finfo(dtype).smallest_normal
    assert torch.allclose(out.double(), expected, rtol=1e-2, atol=float(smallest))


@DTYPES
def test_the_same_bits_again_and_in_any_batch(dtype):
    query, key, value = random_qkv(300, 40, dtype, batch=2)
    state = fused_state(key, value)
    out = fused_apply(query, state)
    assert torch.equal(fused_state(key, value), state)
    assert torch.equal(fused_apply(query, state), out)
    assert torch.equal(fused_state(key[1:, 1:], value[1:, 1:]), state[1:, 1:])
    assert torch.equal(fused_apply(query[1:, 1:], state[1:, 1:]), out[1:, 1:])


@DTYPES
def test_what_is_no_number_is_not_hidden(dtype):
    query, key, value = random_qkv(100, 40, dtype)
    state = fused_state(key, value) / 100
    key[0, 1, 50, 7] = query[0, 0, 3, 2] = float("nan")
    assert fused_state(key, value)[0, 1, 7].isnan().all()
    assert fused_apply(query, state).isnan().all(-1).nonzero().tolist() == [[0, 0, 3]]


def test_no_tokens_are_a_state_of_zeros():
    empty = torch.empty(1, 2, 0, 40)
    assert torch.equal(fused_state(empty, empty), torch.zeros(1, 2, 40, 41))
    assert fused_apply(empty, torch.zeros(1, 2, 40, 41)).shape == (1, 2, 0, 40)


def test_tiles_cover_every_head():
    kinds = itertools.product((tiles_of_state, tiles_of_apply), (torch.float16, torch.float32))
    for tiles_of, dtype in kinds:
        for width in range(1, 161):
            tiles = tiles_of(width, dtype, 1 << 17)
            assert width <= tiles.wide
            for side in (tiles.wide, tiles.columns, tiles.block):
                assert side >= 16
                assert side.bit_count() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_module_with_fused_kernels_is_the_plain_one(dtype):
    unet, x, text = tiny_unet(dtype=dtype), latent(8, 8), latent(5, 24).mean(1)
    expected = unet(x.to(dtype), 9, text.to(dtype)).sample
    names, kinds = list(unet.state_dict()), linfusion.list_modules(unet)
    fuse.choose_kernels(unet, "fused")
    assert {type(a) for _, a in linfusion.self_attentions(unet)} == {FusedLinearAttention}
    assert (list(unet.state_dict()), linfusion.list_modules(unet)) == (names, kinds)
    result = unet(x.to(dtype), 9, text.to(dtype)).sample
    bound = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-13}  # without kernels
    assert not torch.equal(result, expected)
    assert relative_error(result, expected.double()) < bound[dtype]
    fuse.choose_kernels(unet, "plain")
    assert torch.equal(unet(x.to(dtype), 9, text.to(dtype)).sample, expected)


def test_gradients_are_left_to_the_plain_module():
    module = LinearAttention(query_dim=24, heads=3, dim_head=8)
    module.__class__ = FusedLinearAttention
    module(torch.randn(1, 70, 24)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_half_precision_module_reads_through_chunks():
    module = randomise(LinearAttention(query_dim=24, heads=3, dim_head=8)).half()
    x = torch.randn(2, 300, 24).half()
    expected = module(x)
    module.__class__ = FusedLinearAttention
    state = module.mean_state(x.split(130, dim=1))
    result = torch.cat([module.attend(chunk, state) for chunk in x.split(130, dim=1)], 1)
    assert relative_error(result, expected.double()) < 2e-3


def test_pictures_are_painted_and_go_on_with_other_kernels(tmp_path):
    save_tiny_pipeline(tmp_path / "model")
    asked = Settings(
        prompt="a lake", model=str(tmp_path / "model"), height=64, width=48, steps=2, device="cpu",
        output=tmp_path / "plain.png",
    )  # fmt: skip
    fused = asked.model_copy(update={"kernels": "fused", "output": tmp_path / "fused.png"})
    with open_mesh() as mesh:
        Engine.load(asked, mesh).generate(asked)
        engine = Engine.load(fused, mesh)
        engine.generate(fused)
        assert engine.differs(asked) == "kernels"
    assert read_config(fused.output)["kernels"] == "fused"
    assert "kernels" not in read_config(asked.output)
    plain_pixels = torch.tensor(list(Image.open(asked.output).tobytes())).int()
    difference = plain_pixels - torch.tensor(list(Image.open(fused.output).tobytes())).int()
    assert difference.abs().max() <= 1

    asked.output.unlink()
    with open_mesh() as mesh, pytest.raises(Interrupted):  # after the first step
        Engine.load(asked, mesh, Control(should_stop=lambda: True)).generate(asked)
    again = asked.model_copy(update={"kernels": "fused", "resume": True})
    with open_mesh() as mesh:
        Engine.load(again, mesh).generate(again)
    difference = plain_pixels - torch.tensor(list(Image.open(asked.output).tobytes())).int()
    assert difference.abs().max() <= 1
