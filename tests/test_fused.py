"""The fused kernels: who gets them, who is refused, and their results, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import fuse, linfusion
from engine.bands import open_mesh
from engine.config import Settings, UserError
from engine.kernels import fused
from engine.linfusion import FusedLinearAttention
from engine.memory import MemoryOptions, apply
from engine.pipeline import Engine
from tests.models import tiny_unet

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


def test_auto_is_fused_where_there_are_kernels(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(fused, "is_available", lambda device: device.type == "cuda")
    assert fuse.kernels_for("auto", gpu, torch.float16) == "fused"
    assert fuse.kernels_for("auto", gpu, torch.float64) == "plain"
    assert fuse.kernels_for("auto", cpu, torch.float32) == "plain"
    assert fuse.kernels_for("plain", gpu, torch.float16) == "plain"
    monkeypatch.setattr(fused, "is_available", lambda device: False)
    assert fuse.kernels_for("auto", gpu, torch.float16) == "plain"


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


def test_unknown_kernels_are_refused():
    with pytest.raises(UserError, match="'fast': choose plain or fused"):
        fuse.choose_kernels(tiny_unet(), "fast")
