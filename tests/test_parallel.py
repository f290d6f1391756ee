"""Whole networks over bands against the same networks in one process, in float64."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

import engine
from engine import codec
from engine.bands import ExactExchange, Mesh, Traffic
from engine.bands.boundary import (
    Layout,
    UNetBoundary,
    VAEBoundary,
    digest,
    downsampling_factor,
    with_boundary,
)
from engine.config import UserError
from engine.parallel import band_layers
from tests.models import latent, save_tiny_pipeline, tiny_unet, tiny_vae
from tests.ranks import run_ranks, torchrun

RANKS = [2, 3, pytest.param(5, marks=pytest.mark.long)]
SIZES = [(64, 64), (32, 48), (41, 32)]  # latent rows and columns of 512x512, 384x256, 256x328 px


def text(batch=2):
    return latent(7, 24, channels=1, batch=batch)[:, 0]


def band(mesh, network, boundary):
    """Band one network, without a pipeline around it."""
    traffic = Traffic()
    exchange = ExactExchange(mesh, traffic)
    band_layers(network)
    alone = Mesh(0, 1, mesh.device, None)
    with_boundary(network, boundary, Layout(mesh, alone, exchange, traffic))
    return exchange


def banded_unet(mesh, **options):
    unet = tiny_unet(**options)
    return unet, band(mesh, unet, UNetBoundary)


def unet_errors(mesh, linear):
    errors = []
    unet, _ = banded_unet(mesh, linear=linear)
    for height, width in SIZES:
        sample = latent(height, width)
        whole = unet(sample, 500, text()).sample
        if mesh.rank == 0:  # one comparison is enough: every rank gathered the same rows
            expected = tiny_unet(linear=linear)(sample, 500, text()).sample
            errors.append((whole - expected).abs().max().item())
    return errors


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "softmax"])
def test_the_unet_over_bands_is_the_unet(ranks, linear):
    errors = run_ranks(ranks, unet_errors, linear)[0]
    assert len(errors) == len(SIZES)
    assert max(errors) < 1e-10, errors


def decoder_errors(mesh):
    vae, errors = tiny_vae(), []
    exchange = band(mesh, vae, VAEBoundary)
    for height, width in SIZES:
        sample = latent(height, width // 2, batch=1)
        rows, pixels = codec.decode(vae, sample)
        assert pixels.shape[2] == len(rows)
        whole = exchange.gather(vae, pixels, dim=2)
        torch.testing.assert_close(whole, vae.decode(sample / vae.config.scaling_factor).sample)
        if mesh.rank == 0:
            expected = tiny_vae().decode(sample / vae.config.scaling_factor).sample
            errors.append((whole - expected).abs().max().item())
    return errors


@pytest.mark.parametrize("ranks", RANKS)
def test_the_decoder_over_bands_is_the_decoder(ranks):
    errors = run_ranks(ranks, decoder_errors)[0]
    assert len(errors) == len(SIZES)
    assert max(errors) < 1e-10, errors


def encoder_errors(mesh):
    vae, errors = tiny_vae(), []
    band(mesh, vae, VAEBoundary)
    for height in (128, 200, 205):  # 205 px: the encoder drops what is no whole latent row
        picture = latent(height, 32, channels=3, batch=1)
        moments = vae.encode(picture).latent_dist.parameters
        expected = tiny_vae().encode(picture).latent_dist.parameters
        errors.append((moments - expected).abs().max().item())
    return errors


def test_the_encoder_over_bands_is_the_encoder():
    for errors in run_ranks(3, encoder_errors):
        assert max(errors) < 1e-10, errors


def attention_traffic(mesh):
    unet, exchange = banded_unet(mesh, dtype=torch.float32)
    sent = []
    for pixels in (256, 2048):
        before = exchange.traffic.bytes_sent["linear attention"]
        unet(latent(pixels // 8, pixels // 8, batch=1).float(), 500, text(1).float())
        sent.append(exchange.traffic.bytes_sent["linear attention"] - before)
    return sent


def test_linear_attention_sends_the_same_bytes_at_any_size():
    modules = [m for m in tiny_unet().modules() if hasattr(m, "to_q_")]
    for small, large in run_ranks(2, attention_traffic):
        assert small == large
        # d x (d + 1) numbers a head and the token count, in fp32, once around a ring of two.
        dims = [(m.heads, m.to_q.out_features // m.heads) for m in modules]
        assert small == sum(4 * (heads * d * (d + 1) + 1) for heads, d in dims)


def too_many_ranks(mesh):
    unet, _ = banded_unet(mesh)
    with pytest.raises(UserError, match=r"blocks of 4 can be shared by 2 ranks at most, not by 3"):
        unet(latent(8, 8), 500, text())
    return True


def test_more_ranks_than_rows_are_refused_on_every_rank():
    assert all(run_ranks(3, too_many_ranks))


def saved_config(mesh, folder):
    unet, _ = banded_unet(mesh, linear=False)
    if mesh.rank == 0:
        unet.save_pretrained(folder)


def test_a_banded_unet_saves_and_loads_as_a_plain_one(tmp_path):
    run_ranks(2, saved_config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == (
        "UNet2DConditionModel"
    )
    again = UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is UNet2DConditionModel
    sample = latent(8, 8)
    expected = tiny_unet(linear=False)(sample, 500, text()).sample
    torch.testing.assert_close(again(sample, 500, text()).sample, expected)


def test_layers_outside_of_bands_are_the_plain_layers():
    unet, vae = tiny_unet(linear=False), tiny_vae()
    band_layers(unet)
    band_layers(vae)
    sample = latent(9, 8)
    expected = tiny_unet(linear=False)(sample, 500, text()).sample
    torch.testing.assert_close(unet(sample, 500, text()).sample, expected)
    torch.testing.assert_close(vae.decode(sample).sample, tiny_vae().decode(sample).sample)


class PerturbedProcessor(AttnProcessor2_0):
    """Stands for the processors that do something else to self-attention, such as PAG's."""


def test_a_processor_with_no_exact_form_is_refused_by_name():
    unet = tiny_unet(linear=False)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(PerturbedProcessor())
    with pytest.raises(UserError, match="PerturbedProcessor, which has no exact form over bands"):
        band_layers(unet)


def test_down_sampling_factors_of_the_real_models():
    assert downsampling_factor([320, 640, 1280, 1280]) == 8  # SD-1.5: rows in blocks of 8
    assert downsampling_factor([320, 640, 1280]) == 4  # SDXL
    assert downsampling_factor([128, 256, 512, 512]) == 8  # their VAE: 8 pixels a latent row


def other_version_on_rank_1(mesh, folder):
    import diffusers

    pipe = engine.load(str(folder))
    if mesh.rank == 1:
        diffusers.__version__ = "0.30.0"
    with pytest.raises(UserError) as caught:
        engine.distribute(pipe, mesh)
    return str(caught.value)


def test_mixed_versions_are_refused_on_every_rank(tmp_path):
    save_tiny_pipeline(tmp_path)
    for sentence in run_ranks(2, other_version_on_rank_1, tmp_path):
        assert re.match(r"rank 1 runs torch .*, diffusers 0.30.0, but rank 0 runs torch", sentence)


SCRIPT = """
import sys
import torch
import engine

pipe = engine.load(sys.argv[1])
engine.distribute(pipe)
image = pipe("a lake", height=72, width=64, num_inference_steps=2,
             generator=torch.Generator().manual_seed(0)).images[0]
image.save(f"{sys.argv[2]}/{torch.distributed.get_rank()}.png")
"""


@pytest.mark.slow
def test_two_lines_in_a_script_of_ones_own(tiny_model, tmp_path):
    (tmp_path / "paint.py").write_text(SCRIPT)
    code, _, err = torchrun(3, tmp_path / "paint.py", tiny_model, tmp_path)
    assert code == 0, err
    pictures = [np.asarray(Image.open(tmp_path / f"{rank}.png")).astype(int) for rank in range(3)]
    pipe = engine.load(str(tiny_model))
    plain = pipe(
        "a lake", height=72, width=64, num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert all((picture == pictures[0]).all() for picture in pictures)
    assert abs(pictures[0] - np.asarray(plain).astype(int)).max() <= 1


def test_a_digest_tells_any_bit_in_any_chunk(monkeypatch):
    monkeypatch.setattr("engine.bands.boundary._DIGEST_CHUNK", 7)
    x, cpu = torch.randn(3, 10), torch.device("cpu")
    seen = {tuple(digest([x], cpu).tolist())}
    for place in range(x.numel()):
        other = x.clone()
        other.view(-1)[place] = torch.nextafter(x.view(-1)[place], torch.tensor(9e9))
        seen.add(tuple(digest([other], cpu).tolist()))
    assert len(seen) == 1 + x.numel()
    assert torch.equal(digest([x.clone()], cpu), digest([x], cpu))
