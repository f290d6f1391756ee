"""LinFusion's attention against the paper's formula, and its checkpoints."""

import json

import pytest
import torch
from diffusers.models.attention_processor import Attention

from engine import linfusion
from engine.config import UserError
from engine.kernels import streamed
from engine.kernels.formula import apply_state, attention_state, feature_map
from engine.linfusion import LinearAttention
from tests.models import latent, randomise, tiny_unet


def reference(query, key, value):
    """The formula in float64, pairwise where that fits: M_ij = phi(q_i).phi(k_j) / (N (r_i + eps)).

    arXiv:2409.02097, Proposition 1 and the published code's eps, for [B, heads, N, d].
    """
    q, k, v = (x.double() for x in (query, key, value))
    phi_q, phi_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    r = (phi_q * phi_k.mean(-2, keepdim=True)).sum(-1, keepdim=True)
    tokens = k.shape[-2]
    if tokens <= 1024:
        return (phi_q @ phi_k.transpose(-2, -1) / (tokens * (r + 1e-4))) @ v
    return phi_q @ (phi_k.transpose(-2, -1) @ v / tokens) / (r + 1e-4)


def attend(query, key, value):
    return apply_state(query, attention_state(key, value) / key.shape[-2])


def random_qkv(tokens, dtype=torch.float32, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(tokens)
    draw = [torch.randn(1, 2, tokens, 8, generator=generator) for _ in "qkv"]
    return [(scale * x + mean).to(dtype) for x in draw]


def relative_error(result, expected):
    return ((result.double() - expected).norm() / expected.norm()).item()


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def marks_of(tokens, dtype):
    """Of the largest size, the dtype with the smallest range is not left to the long tests."""
    if tokens == 1 << 22 and dtype != torch.float16:
        return pytest.mark.long
    return pytest.mark.slow if tokens >= 1 << 20 else ()


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [
        pytest.param(dtype, tokens, marks=marks_of(tokens, dtype))
        for dtype in TOLERANCES
        for tokens in (64, 1024, 4096, 65536, 262144, 1 << 20, 1 << 22)
    ],
)
def test_attention_is_the_papers_formula(dtype, tokens):
    query, key, value = random_qkv(tokens, dtype)
    result = attend(query, key, value)
    assert result.dtype == dtype
    assert relative_error(result, reference(query, key, value)) < TOLERANCES[dtype]


@pytest.mark.parametrize(("mean", "scale"), [(-8.0, 1.0), (0.0, 16.0), (6.0, 4.0)])
def test_strongly_negative_and_large_activations_survive_half_precision(mean, scale):
    query, key, _ = random_qkv(4096, torch.float16, mean, scale)
    value = random_qkv(4096, torch.float16, scale=50.0)[2]
    result = attend(query, key, value)
    assert torch.isfinite(result).all()
    assert relative_error(result, reference(query, key, value)) < 1e-2


def test_constant_values_pass_through_times_the_row_sum():
    query, key, _ = random_qkv(4096, torch.float64)
    value = torch.full_like(key, 3.0)
    r = (feature_map(query) * feature_map(key).mean(-2, keepdim=True)).sum(-1, keepdim=True)
    torch.testing.assert_close(attend(query, key, value), (3 * r / (r + 1e-4)).expand_as(value))


def test_feature_map_keeps_its_precision_below_zero():
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    expected = torch.where(x > 0, x + 1, x.exp())
    assert relative_error(feature_map(x.half()), expected) < 1e-3
    assert (feature_map(x.half()) / expected - 1).abs().max() < 1e-2


def test_feature_map_has_finite_gradients_everywhere():
    x = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0, 1000.0], requires_grad=True)
    feature_map(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(x > 0, 1.0, x.exp()))


def test_the_module_is_the_published_forward_written_down():
    torch.manual_seed(0)
    module = LinearAttention(query_dim=12, heads=3, dim_head=4).double().eval()
    x = torch.randn(2, 50, 12, dtype=torch.float64)
    q = module.to_q(x + module.to_q_(x))
    k = module.to_k(x + module.to_k_(x))
    heads = [t.view(2, 50, 3, 4).transpose(1, 2) for t in (q, k, module.to_v(x))]
    expected = module.to_out[0](reference(*heads).transpose(1, 2).reshape(2, 50, 12))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def published(module, x):
    """The module as it is published, head by head, [B, n, C] -> the same."""
    batch, tokens, width = x.shape
    q = module.to_q(x + module.to_q_(x))
    k = module.to_k(x + module.to_k_(x))
    heads = [
        t.view(batch, tokens, module.heads, -1).transpose(1, 2) for t in (q, k, module.to_v(x))
    ]
    mixed = reference(*heads).to(x.dtype).transpose(1, 2).reshape(batch, tokens, width)
    return module.to_out[0](mixed)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("mid_dim", [None, 8, -1])
@pytest.mark.parametrize("tokens", [1, 511, 1300, 40_000])
@torch.no_grad()
def test_streams_compute_the_published_forward(dtype, tolerance, mid_dim, tokens):
    torch.manual_seed(tokens)
    module = LinearAttention(
        query_dim=24, heads=3, dim_head=8, bias=True, projection_mid_dim=mid_dim
    )
    randomise(module).to(dtype)
    x = torch.randn(2, tokens, 24, dtype=dtype)
    assert streamed.can_stream(module)
    assert relative_error(module(x), published(module.double(), x.double())) < tolerance


def attach_hook(module):
    module.to_k.register_forward_hook(lambda layer, inputs, output: 2 * output)


def offload(module):
    """As accelerate's hooks do it."""
    module.to_q.forward = lambda x, forward=module.to_q.forward: 2 * forward(x)


def adapt(module):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module.to_out[0].__class__ = Adapted


def keep_half(module):
    module.bfloat16()


@pytest.mark.parametrize("change", [attach_hook, offload, adapt, keep_half])
@torch.no_grad()
def test_what_is_attached_to_a_module_is_heeded(change):
    torch.manual_seed(0)
    module = randomise(LinearAttention(query_dim=24, heads=3, dim_head=8))
    x = torch.randn(1, 700, 24)
    before = module(x)
    change(module)
    assert not streamed.can_stream(module)
    x = x.to(module.to_q.weight.dtype)
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
    assert relative_error(module(x), published(module, x).double()) < tolerance
    if change is not keep_half:
        assert relative_error(module(x), before.double()) > 1e-3


def test_gradients_flow_where_they_are_wanted():
    torch.manual_seed(0)
    module = LinearAttention(query_dim=24, heads=3, dim_head=8)
    assert not streamed.can_stream(module)
    module(torch.randn(1, 700, 24)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_distillation_starts_at_the_softmax_weights():
    torch.manual_seed(0)
    softmax = Attention(query_dim=12, heads=3, dim_head=4)
    linear = LinearAttention.from_attention(softmax)
    x = torch.randn(1, 5, 12)
    torch.testing.assert_close(linear.to_q(x + linear.to_q_(x)), softmax.to_q(x))
    torch.testing.assert_close(linear.to_out[0].bias, softmax.to_out[0].bias)


def test_checkpoints_have_the_published_layout_and_come_back(tmp_path):
    unet = tiny_unet(dtype=torch.float32)
    linfusion.save(unet, tmp_path)
    first = json.loads((tmp_path / "config.json").read_text())["modules_list"][0]
    assert first == {
        "module_name": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "dim_n": 16,
        "heads": 4,
        "projection_mid_dim": None,
    }
    again = tiny_unet(linear=False, dtype=torch.float32)
    linfusion.load(again, tmp_path)
    x, text = latent(8, 8).float(), latent(5, 24).mean(1).float()
    torch.testing.assert_close(again(x, 9, text).sample, unet(x, 9, text).sample)


def test_modules_for_another_unet_are_refused_by_name(tmp_path):
    linfusion.save(tiny_unet(dtype=torch.float32), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["modules_list"][0]["dim_n"] = 320
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"attn1 is 320 wide with 4 heads .* and 16 wide"):
        linfusion.load(tiny_unet(linear=False), tmp_path)


def test_a_folder_without_modules_is_refused(tmp_path):
    with pytest.raises(UserError, match="no LinFusion checkpoint"):
        linfusion.load(tiny_unet(linear=False), tmp_path)


def test_published_modules_are_chosen_by_the_unets_own_shape():
    with pytest.raises(UserError, match="24 wide text embeddings"):
        linfusion.published_for(24)
    assert linfusion.published_for(2048) == "Yuanshi/LinFusion-XL"


def test_autocast_leaves_the_state_in_fp32():
    torch.manual_seed(0)
    module = LinearAttention(query_dim=12, heads=3, dim_head=4).eval()
    x = torch.randn(1, 4097, 12)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x)
    # bfloat16 rounds 4097 tokens to 4096 and their sums to two digits; the projections may be half.
    assert relative_error(result, expected.double()) < 2e-2


def test_a_lora_that_would_be_lost_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    linfusion.save(tiny_unet(dtype=torch.float32), tmp_path)
    unet = tiny_unet(linear=False, dtype=torch.float32)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with pytest.raises(UserError, match="attn1 has a LoRA, which the LinFusion modules would"):
        linfusion.load(unet, tmp_path)


def test_the_state_of_sdxl_has_the_size_that_the_byte_formula_counts():
    """5.4 million numbers over all 70 layers, 21.6 MB in fp32, at any size of picture."""
    attention = [(10, 640)] * 10 + [(20, 1280)] * 60  # (heads, width) of SDXL's self-attentions
    state = 0
    for heads, width in attention:
        head = torch.empty(1, heads, 1, width // heads, device="meta")
        state += attention_state(head, head).numel()
    assert state == 5_408_000
