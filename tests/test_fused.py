"""The fused kernels: who gets them, who is refused, and their results, in Triton's interpreter."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import attach_align_device_hook

from engine import fuse, linfusion
from engine.bands import Mesh, open_mesh
from engine.bands.boundary import UNetBoundary, with_boundary
from engine.bands.resnet import FusedResnetBlock2D
from engine.config import Settings, UserError
from engine.kernels import fused, norms
from engine.kernels.norms import FusedLayerNorm
from engine.linfusion import FusedLinearAttention
from engine.memory import MemoryOptions, apply
from engine.parallel import band_layers, collect, share_out
from engine.pipeline import Engine
from tests.models import latent, tiny_unet

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    """Its own process, on one thread, since the interpreter's matrices are small."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", ["tests/interpreted.py", "tests/interpreted_pointwise.py"])
def test_the_kernels_in_tritons_interpreter(file):
    if not fused.is_installed():
        pytest.skip("needs Triton: pip install triton")
    done = run("-m", "pytest", file, "--durations=5", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.mark.long
def test_the_kernels_fit_into_smaller_gpus(tmp_path):
    """Compiled for A100 and RTX 30; tests/gpu.py runs them on what there is."""
    if not fused.is_installed():
        pytest.skip("needs Triton: pip install triton")
    done = run("-m", "tests.compiled", "80", "86", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_engine_does_without_triton():
    done = run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, engine.pipeline\n"
        "from engine.kernels import fused\n"
        "assert not fused.is_available(torch.device('cuda'))\n"
        "assert not [m for m in sys.modules if m.startswith('engine.') and m.endswith('_triton')]",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(fused.is_interpreted(), reason="the interpreter computes on the CPU")
def test_fused_kernels_on_the_cpu_are_refused_before_anything_is_loaded():
    asked = Settings(model="no/such", device="cpu", kernels="fused")
    with open_mesh() as mesh, pytest.raises(UserError, match="and this job computes on the CPU"):
        Engine.load(asked, mesh)


def test_a_gpu_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(fused, "is_installed", lambda: False)
    with pytest.raises(UserError, match="which is not installed: install the triton that"):
        fuse.require_kernels("fused", torch.device("cuda"))
    fuse.require_kernels("plain", torch.device("cuda"))


def test_where_no_fused_kernel_would_compute_they_are_refused():
    with pytest.raises(UserError, match="choose another dtype, or leave kernels out"):
        Settings.load(["--kernels", "fused", "--dtype", "float64"])


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(fused, "is_available", lambda device: False)
    monkeypatch.setattr(fused, "is_installed", lambda: True)
    with pytest.raises(UserError, match="from Ampere on, and this one is older: leave kernels"):
        fuse.require_kernels("fused", torch.device("cuda"))


def test_auto_is_fused_where_the_kernels_run(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(fused, "runs", lambda device: device.type == "cuda")
    assert fuse.kernels_for("auto", gpu, torch.float16) == "fused"
    assert fuse.kernels_for("auto", gpu, torch.float64) == "plain"
    assert fuse.kernels_for("auto", cpu, torch.float32) == "plain"
    assert fuse.kernels_for("plain", gpu, torch.float16) == "plain"
    monkeypatch.setattr(fused, "runs", lambda device: False)
    assert fuse.kernels_for("auto", gpu, torch.float16) == "plain"


def test_kernels_that_fail_when_tried_are_not_taken(monkeypatch, caplog):
    def fails(key, value):
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    device = torch.device("cpu", 0)
    monkeypatch.setattr(fused, "is_available", lambda device: True)
    monkeypatch.setattr(fused, "fused_state", fails)
    fused.runs.cache_clear()
    assert not fused.runs(device)
    assert not fused.runs(device)
    assert [record.message for record in caplog.records] == [
        "kernels are plain, since fused ones do not run here: Failed to find C compiler."
    ]
    monkeypatch.setattr(fused, "fused_state", lambda key, value: key)
    fused.runs.cache_clear()
    assert fused.runs(device)
    fused.runs.cache_clear()


def test_kernels_do_not_determine_the_picture_but_for_rounding():
    assert Settings(kernels="fused").provenance() == Settings().provenance()


@pytest.mark.skipif(fused.is_interpreted(), reason="the interpreter computes on the CPU")
@torch.no_grad()
def test_on_the_cpu_the_fused_network_is_the_plain_one():
    unet = tiny_unet(dtype=torch.float32)
    module = next(a for _, a in linfusion.self_attentions(unet))
    x, sample, text = torch.randn(1, 70, 16), torch.randn(1, 4, 16, 12), torch.randn(1, 5, 24)
    expected, picture = module(x), unet(sample, 9, text).sample
    fuse.choose_kernels(unet, "fused")
    assert type(module) is FusedLinearAttention
    assert torch.equal(module(x), expected)
    assert torch.allclose(unet(sample, 9, text).sample, picture, atol=1e-5)
    apply(unet, MemoryOptions(inplace_activations=True))
    assert torch.allclose(unet(sample, 9, text).sample, picture, atol=1e-5)


@torch.no_grad()
def test_weights_that_are_fetched_when_a_layer_is_called():
    """accelerate's sequential offload: whoever takes a layer's weights past its call finds none."""
    unet, sample, text = tiny_unet(dtype=torch.float32), torch.randn(1, 4, 16, 12), latent(7, 24)
    text = text.mean(1)[:1].float()
    expected = unet(sample, 9, text).sample
    fuse.choose_kernels(unet, "fused")
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    cpu = torch.device("cpu")
    attach_align_device_hook(unet, execution_device=cpu, offload=True, weights_map=weights)
    assert unet.conv_in.weight.is_meta
    assert torch.allclose(unet(sample, 9, text).sample, expected, atol=1e-5)


def kinds(network):
    return Counter(type(module) for module in network.modules())


def test_kernels_and_bands_in_any_order():
    mesh = Mesh(0, 1, torch.device("cpu"), None)
    plain = kinds(tiny_unet())
    fused_alone = tiny_unet()
    fuse.choose_kernels(fused_alone, "fused")
    fused_alone = kinds(fused_alone)
    layout = share_out(mesh, 1, check_drift=False)
    for before in (False, True):
        unet = tiny_unet()
        if before:
            fuse.choose_kernels(unet, "fused")
        band_layers(unet)
        with_boundary(unet, UNetBoundary, layout)
        fuse.choose_kernels(unet, "fused")
        assert kinds(unet)[FusedResnetBlock2D] == fused_alone[FusedResnetBlock2D]
        pipe = SimpleNamespace(unet=unet)
        collect(pipe)
        assert kinds(unet) == fused_alone
        fuse.choose_kernels(unet, "plain")
        assert kinds(unet) == plain


def test_a_layout_of_ones_own_stays():
    unet = tiny_unet().to(memory_format=torch.channels_last)
    fuse.choose_kernels(unet, "plain")
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_layer_norm_of_another_width_is_left_to_torch():
    norm, x = FusedLayerNorm(16), torch.randn(4, 32)
    assert not norms.can_layer_norm(norm, x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="normalized_shape"):
        norm(x)


def test_unknown_kernels_are_refused():
    with pytest.raises(UserError, match="'fast': choose plain or fused"):
        fuse.choose_kernels(tiny_unet(), "fast")
