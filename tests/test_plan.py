"""Plans against published figures, against real jobs, and against what they then refuse."""

import math
import re

import pytest
import torch

from engine import plan
from engine.bands import Mesh
from engine.config import Settings, UserError
from engine.hardware import Speeds
from engine.loading import Description, count_text_parameters, describe, load
from engine.output import target_of
from engine.pipeline import Engine
from engine.plan import make_plan
from engine.plan.needs import DryRun
from engine.plan.parts import dilated_steps
from engine.plan.table import columns, duration, rows_text
from engine.simulation import CpuKernels, Kernels
from tests.ranks import run_ranks
from tests.shapes import sd15, sdxl

KERNELS = CpuKernels(torch.get_num_threads())
ALONE = Mesh(0, 1, torch.device("cpu"), None)
GB = 10**9


class NoWorkspace(Kernels):
    """Activations alone, as the published figures count them."""

    def convolution(self, x, weight, out, stride, dilation):
        return 0


@pytest.fixture(autouse=True)
def known_speeds(monkeypatch):
    """Measuring takes two seconds, and `tests/test_hardware.py` does it."""
    speeds = Speeds(1e11, 1e11, 1e10, 1e8, 1e5, 1e3, 1e8)
    monkeypatch.setattr(plan, "measure", lambda mesh, dtype, width, fused: speeds)


def settings(**values):
    return Settings.model_validate(values)


@pytest.fixture
def any_size(monkeypatch):
    """The exact codec at sizes that no kernel takes."""
    monkeypatch.setattr("engine.codec.MAX_ELEMENTS", 2**60)


def peaks(model, ranks=1, side=16384, **memory):
    """GB of each part at `side` x `side` px, in half precision."""
    job = settings(height=side, width=side, memory=memory)
    needs = DryRun(model, torch.float16, NoWorkspace()).needs(job, ranks)
    (rung,) = needs.rungs
    return {part.name: part.once.peak_bytes / GB for part in rung.parts}


# Computed apart from this code, from the shapes of the published networks: the activations that an
# eager forward at 16384 x 16384 px has at its peak, in fp16, with guidance at once and in turn.


def test_the_peak_of_sd15_at_16384_px(any_size):
    at_once, in_turn = peaks(sd15()), peaks(sd15(), guidance_in_turn=True)
    assert at_once["UNet"] == pytest.approx(140, rel=0.02)
    assert in_turn["UNet"] == pytest.approx(70, rel=0.02)
    assert at_once["decoder"] == pytest.approx(412, rel=0.02)


def test_the_peak_of_sdxl_at_16384_px(any_size):
    assert peaks(sdxl())["UNet"] == pytest.approx(85, rel=0.02)
    assert peaks(sdxl(), guidance_in_turn=True)["UNet"] == pytest.approx(42, rel=0.02)


def test_ranks_share_the_peak(any_size):
    at_once = peaks(sdxl(), ranks=8)  # two groups of four bands
    assert at_once["UNet"] == pytest.approx(85 / 8, rel=0.3)  # the whole output is gathered


def test_two_layers_peak_as_ten_do(any_size):
    job = settings(height=4096, width=4096)
    whole = DryRun(sdxl(), torch.float16, NoWorkspace())
    shallow = whole.shallow()
    assert shallow.needs(job, 1).peak_bytes == pytest.approx(whole.needs(job, 1).peak_bytes, 1e-3)
    assert shallow.weights(job, 1) == whole.weights(job, 1)


def test_shared_weights(any_size):
    dry_run = DryRun(sdxl(), torch.float16, NoWorkspace())
    whole = dry_run.weights(settings(), 8)["UNet"]
    shared = dry_run.weights(settings(memory={"sharded_weights": True}), 8)["UNet"]
    assert whole / 8 < shared < whole / 8 + 0.2 * GB


# --- the codec ------------------------------------------------------------------------------------


def demo_needs(ranks=1, limit_bytes=math.inf, kernels=None, **values):
    job = settings(**{"height": 512, "width": 512, **values})
    dry_run = DryRun(describe("demo"), torch.float32, kernels or NoWorkspace())
    dry_run.limit_bytes = limit_bytes
    return dry_run.needs(job, ranks)


TALL = {"height": 1024, "width": 128}


def test_memory_settings():
    def peak(**memory):
        (rung,) = demo_needs(memory={"guidance_in_turn": True, **memory}).rungs
        return next(part.once.peak_bytes for part in rung.parts if part.name == "UNet")

    chunked, parked = {"token_chunks": 8, "row_chunks": 8}, {"skips_on_host": True}
    peaks = [peak(), peak(**chunked), peak(**chunked, **parked)]
    assert peaks[1] < 0.8 * peaks[0], peaks
    assert peaks[2] < 0.9 * peaks[1], peaks


def test_what_does_not_fit_exactly_is_streamed():
    values = {**TALL, "ladder": {"strategy": "sdedit", "base": 768}}
    exact = demo_needs(**values)
    assert [rung.codec for rung in exact.rungs] == ["exact", "exact"]
    both = demo_needs(**values, limit_bytes=exact.peak_bytes - 1)
    assert [rung.codec for rung in both.rungs] == ["exact", "streaming"]
    assert both.peak_bytes < exact.peak_bytes
    asked = demo_needs(**values, codec={"mode": "exact"}, limit_bytes=1)
    assert [rung.codec for rung in asked.rungs] == ["exact", "exact"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_long_stream_costs_what_two_short_ones_tell(monkeypatch, ranks):
    streaming = {"mode": "streaming", "chunk_rows": 5, "statistics_px": 64, "passes": 1}

    def decoder(long_band):
        monkeypatch.setattr("engine.plan.parts._LONG_BAND", long_band)
        (rung,) = demo_needs(ranks, height=1024, width=512, codec=streaming).rungs
        return rung.parts[-1].once

    told, whole = decoder(40), decoder(1000)
    assert told != whole
    assert told.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.05)
    assert told.flops.total() == pytest.approx(whole.flops.total(), rel=0.05)
    assert told.bytes_moved == pytest.approx(whole.bytes_moved, rel=0.05)


# --- a real job -----------------------------------------------------------------------------------


def sent_and_planned(mesh, job):
    """Bytes and rounds of a real job on this rank, and of its plan."""
    planned = make_plan(job, mesh)
    engine = Engine.load(job, mesh)
    engine.generate(job)
    traffic, needs = engine.traffic, planned.needs
    cost = sum((rung.cost for rung in needs.rungs[1:]), needs.rungs[0].cost)
    real = traffic.bytes_sent.total(), traffic.rounds.total()
    return real, (cost.bytes_sent, cost.rounds), str(planned)


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_job_sends_what_its_plan_says(tiny_model, tmp_path, in_turn):
    job = settings(
        model=str(tiny_model), height=64, width=48, steps=2, output=tmp_path / "picture.png",
        memory={"guidance_in_turn": in_turn}, mesh={"guidance": "1"},
    )  # fmt: skip
    results = run_ranks(2, sent_and_planned, job)
    for (sent, rounds), (planned_sent, planned_rounds), _ in results:
        assert sent <= planned_sent
        assert rounds == planned_rounds
    assert max(sent for (sent, _), _, _ in results) == planned_sent  # the busiest rank's
    assert results[0][2] == results[1][2]  # the very same plan


def test_weights_are_those_of_the_loaded_model(tiny_model):
    pipe = load(str(tiny_model))
    dry_run = DryRun(describe(str(tiny_model)), torch.float32, NoWorkspace())
    weights = dry_run.needs(settings(height=64, width=64), 1).weights
    assert weights["UNet"] == sum(weight.nbytes for weight in pipe.unet.parameters())
    assert weights["VAE"] == sum(weight.nbytes for weight in pipe.vae.parameters())
    encoder = sum(weight.numel() for weight in pipe.text_encoder.parameters())
    assert count_text_parameters(str(tiny_model)) == encoder > 0


# --- what it says ---------------------------------------------------------------------------------


def demo_plan(**values):
    return make_plan(settings(**{"height": 512, "width": 768, "steps": 3, **values}), ALONE)


def test_the_table_of_a_ladder(tmp_path):
    made = demo_plan(
        output=tmp_path / "picture.png", ladder={"strategy": "demofusion", "base": 384, "steps": 9}
    )
    made.check()
    text = str(made)
    for word in ("384x256", "768x512", "dilated UNet", "encoder", "decoder", "estimate", "weights"):
        assert word in text
    base, top = made.needs.rungs
    assert [part.name for part in base.parts] == ["UNet", "decoder"]
    assert [part.name for part in top.parts] == ["encoder", "UNet", "dilated UNet", "decoder"]
    assert top.largest.peak_bytes > base.largest.peak_bytes
    assert top.parts[1].calls == top.rung.steps_run
    assert made.seconds > 0


def test_columns_line_up():
    assert columns([["a", "bcd"], ["efg", "h"]]) == "  a  bcd\nefg    h"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.23, "1.2 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3599, "59 min 59 s"),
        (7300, "2 h 01 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_equal_bands_are_counted():
    dry_run = DryRun(describe("demo"), torch.float32, NoWorkspace())
    job = settings(height=352, width=64, mesh={"guidance": "1"})
    (rung,) = dry_run.needs(job, 5).rungs
    assert rows_text(rung) == "96, 4 x 64"
    assert sum(rung.rows) == 352


def test_the_dilated_branch_is_left_out_where_it_weighs_little():
    values = {"height": 512, "width": 768, "steps": 50}
    exact = settings(**values, ladder={"strategy": "demofusion", "base": 192})
    fast = settings(**values, ladder={"strategy": "demofusion", "base": 192, "preset": "fast"})
    calls = {}
    for name, job in (("exact", exact), ("fast", fast)):
        needs = DryRun(describe("demo"), torch.float32, NoWorkspace()).needs(job, 1)
        calls[name] = [dilated_steps(job, rung.rung) for rung in needs.rungs]
        assert calls[name][0] == 0
    assert calls["exact"] == [0] + [rung.rung.steps_run for rung in needs.rungs[1:]]
    assert all(f <= e for f, e in zip(calls["fast"], calls["exact"], strict=True))
    assert sum(calls["fast"]) < sum(calls["exact"])


# --- what it refuses ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_unet():
    """The demo model's with a UNet that needs more memory than the VAE does."""
    demo = describe("demo")
    return Description({**demo.unet, "block_out_channels": (512, 512, 512)}, demo.vae, None)


def peak_gb(model, job, ranks=1):
    dry_run = DryRun(
        model, torch.float32, KERNELS, 4 * count_text_parameters("demo"),
    )  # fmt: skip
    return dry_run.needs(job, ranks).peak_bytes / GB


def test_guidance_in_turn_is_named_where_it_is_enough(wide_unet):
    job = settings(height=512, width=512)
    in_turn = settings(height=512, width=512, memory={"guidance_in_turn": True})
    limit = (peak_gb(wide_unet, job) + peak_gb(wide_unet, in_turn)) / 2
    limited = job.model_copy(update={"memory": job.memory.model_copy(update={"limit_gb": limit})})
    with pytest.raises(UserError) as caught:
        make_plan(limited, ALONE, wide_unet).check()
    assert re.match(
        r"the UNet of the rung of 512x512 px needs \d+ MB on a rank, besides \d+ MB of weights, "
        r"and \d+ MB are free: --memory.guidance-in-turn true would do",
        str(caught.value),
    )
    followed = limited.memory.model_copy(update={"guidance_in_turn": True})
    make_plan(limited.model_copy(update={"memory": followed}), ALONE, wide_unet).check()


def test_more_ranks_are_named_where_they_are_enough(wide_unet):
    job = settings(height=512, width=512, memory={"guidance_in_turn": True})
    limit = (peak_gb(wide_unet, job) + peak_gb(wide_unet, job, ranks=2)) / 2
    memory = job.memory.model_copy(update={"limit_gb": limit})
    with pytest.raises(UserError, match="2 ranks of as much memory each would do"):
        make_plan(job.model_copy(update={"memory": memory}), ALONE, wide_unet).check()


def test_weights_that_do_not_fit_are_refused_at_once():
    with pytest.raises(
        UserError, match=r"the weights alone take \d+ MB on every rank, and 1 MB are"
    ):
        demo_plan(height=64, width=64, memory={"limit_gb": 1e-3}).check()


def test_the_streaming_codec_is_named_where_exact_is_asked_for():
    values = {**TALL, "codec": {"mode": "exact"}}
    exact = demo_needs(**values, kernels=KERNELS)
    streaming = demo_needs(**TALL, codec={"mode": "streaming"}, kernels=KERNELS)
    memory = {"limit_gb": (exact.peak_bytes + streaming.peak_bytes) / 2 / GB}
    with pytest.raises(UserError, match=r"the decoder of .*: --codec.mode streaming would do"):
        demo_plan(**values, memory=memory).check()


def test_a_full_disk_is_refused(monkeypatch):
    monkeypatch.setattr(plan, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"output: .* will take about .*, and 0 MB are free there"):
        demo_plan(height=64, width=64).check()


def test_a_format_that_is_encoded_whole_needs_the_memory(monkeypatch):
    monkeypatch.setattr(plan, "free_host_bytes", lambda: 50_000)
    with pytest.raises(UserError, match=r"a .webp file is encoded whole, in 0 MB of rank 0's host"):
        demo_plan(height=64, width=64, output="a.webp").check()
    demo_plan(height=64, width=64, output="a.jpg").check()


def test_the_disk_that_writing_takes_is_the_formats():
    def disk(name, **file):
        target = target_of(settings(height=1024, width=1024, output=name, file=file))
        return plan._disk_bytes([target], 4) / (3 * 1024 * 1024)

    assert disk("a.png") == pytest.approx(0.6 * 5 / 4)
    assert disk("a.png", bits="16") == pytest.approx(2 * 0.9 * 5 / 4)
    assert disk("a.tif", pyramid=True) == pytest.approx(4 / 3 * disk("a.tif"))
    assert disk("a.dzi") < disk("a.jpg") * 4 / 3 < disk("a.dzi", tiles="png")
    assert disk("a.webp") > 1  # its parts are raw rows


def test_a_single_file_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="plan with the diffusers folder"):
        demo_plan(model=str(tmp_path / "model.safetensors"))
