"""Recorded forwards: when there are any, and that nothing is left of them; see tests/gpu.py too."""

from copy import deepcopy

import pytest
import torch

from engine import graphs
from engine.bands import ExactExchange, Traffic
from engine.bands.boundary import UNetBoundary
from engine.config import Settings
from engine.ladder import Rung, State
from engine.pipeline import Engine
from tests.models import latent, tiny_unet
from tests.ranks import run_ranks
from tests.test_displaced import banded_unet, text


class Tape:
    """Stands for a recording: adds 1000, so that its results are known, and counts."""

    made = 0

    @classmethod
    def of(cls, forward, leaves, shape, pool):
        cls.made += 1
        return cls()

    def replay(self, leaves):
        return (leaves[0] + 1000,)


@pytest.fixture
def recordings(monkeypatch):
    monkeypatch.setattr(graphs, "Recording", Tape)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(Tape, "made", 0)
    return graphs.Recordings(bands=True)


def forward(sample, scale):
    return (sample * scale,)


def test_the_third_call_is_recorded_and_all_that_are_like_it_replayed(recordings):
    x = torch.ones(2, 3)
    results = [
        recordings.call(forward, {"sample": i * x, "scale": 2}, ("state",))[0][0, 0].item()
        for i in range(5)
    ]
    assert results == [0, 2, 1002, 1003, 1004]
    assert Tape.made == 1


@pytest.mark.parametrize(
    ("sample", "scale", "state"),
    [
        (torch.ones(3, 3), 2, "state"), (torch.ones(2, 3).double(), 2, "state"),
        (torch.ones(2, 3), 3, "state"), (torch.ones(2, 3), 2, "another exchange"),
    ],
)  # fmt: skip
def test_what_differs_is_another_recording(recordings, sample, scale, state):
    for _ in range(3):
        recordings.call(forward, {"sample": torch.ones(2, 3), "scale": 2}, ("state",))
    (result,) = recordings.call(forward, {"sample": sample, "scale": scale}, (state,))
    assert torch.equal(result, sample * scale)
    for _ in range(3):
        recordings.call(forward, {"sample": sample, "scale": scale}, (state,))
    assert Tape.made == 2


def test_what_cannot_be_recorded_is_called_as_ever(recordings, monkeypatch, caplog):
    def fails(*arguments):
        raise torch.OutOfMemoryError("no room\nand more")

    monkeypatch.setattr(Tape, "of", fails)
    for scale in range(5):
        (result,) = recordings.call(forward, {"sample": torch.ones(1), "scale": 7}, (scale // 5,))
        assert result.item() == 7
    assert [record.message for record in caplog.records] == [
        "UNet calls are not recorded, which costs time only: no room"
    ]


def test_traffic_of_a_part_is_counted_again():
    traffic = Traffic()
    traffic.count(object(), 5)
    before = deepcopy(traffic)
    traffic.count("layer", 7)
    traffic.count("layer", 2, shared=True)
    sent = traffic.since(before)
    assert (sent.bytes_sent, sent.rounds) == ({"str": 9}, {"str": 1})
    traffic.add(sent)
    assert (traffic.bytes_sent["str"], traffic.rounds["str"]) == (18, 2)
    assert traffic.bytes_sent["object"] == 5


@torch.no_grad()
def test_a_cpu_computes_as_ever_and_nothing_is_left():
    unet, x = tiny_unet(), latent(16, 12)
    kind, before = type(unet), set(vars(unet))
    expected = unet(x, 500, text(2), return_dict=False)[0]
    with graphs.replayed(unet):
        assert type(unet).__name__ == kind.__name__
        assert isinstance(unet, kind)
        for _ in range(3):
            assert torch.equal(unet(x, 500, text(2), return_dict=False)[0], expected)
        assert torch.equal(unet(x, 500, text(2)).sample, expected)
    assert type(unet) is kind
    assert set(vars(unet)) == before


def over_bands(mesh):
    unet, _ = banded_unet(mesh, ExactExchange)
    kind, x, layout = type(unet), latent(16, 12), unet.layout
    with torch.no_grad():
        expected = unet(x, 500, text(2), return_dict=False)[0]
        with graphs.replayed(unet):
            assert isinstance(unet, UNetBoundary)  # which asks the other ranks, in front
            assert type(unet).__mro__.index(UNetBoundary) == 1
            results = [unet(x, 500, text(2), return_dict=False)[0] for _ in range(3)]
        again = unet(x, 500, text(2), return_dict=False)[0]
    assert unet.layout is layout
    assert type(unet).__bases__ == kind.__bases__
    return all(torch.equal(result, expected) for result in [*results, again])


def test_over_bands_the_boundary_stays_in_front():
    assert run_ranks(2, over_bands) == [True, True]


CUDA, SMALL, LARGE = torch.device("cuda"), (64, 128), (2048, 2048)


@pytest.mark.parametrize(
    ("size", "step", "changes", "device", "expected"),
    [
        (SMALL, 0, {}, CUDA, True), (SMALL, 0, {"graphs": "all"}, CUDA, True),
        (SMALL, 0, {"graphs": "off"}, CUDA, False), (SMALL, 0, {}, torch.device("cpu"), False),
        (LARGE, 0, {}, CUDA, False), (SMALL, 15, {}, CUDA, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("moves", [False, True])
def test_when_it_pays(monkeypatch, size, step, changes, device, expected, moves):
    asked, wanted = Settings.model_validate({"steps": 20, **changes}), []
    monkeypatch.setattr(graphs, "replayed", lambda unet, bands: wanted.append(bands))
    monkeypatch.setattr("engine.ladder.calls", lambda scheduler, rung: 20)
    monkeypatch.setattr("engine.memory.moves", lambda unet: moves)
    engine = Engine.__new__(Engine)
    engine.mesh, engine.pipe = type("M", (), {"device": device}), type("P", (), {})
    engine.pipe.unet = engine.pipe.scheduler = None
    state = State(0, step, torch.empty(1, 4, *size), None, torch.Generator())
    engine._replayed(asked, state, Rung(0, 8 * size[0], 8 * size[1], 20, 1.0, 7.5))
    assert wanted == ([asked.graphs == "all"] if expected and not moves else [])
