"""Bytes on the wire: counted in real runs, by formula, and beside the published methods.

    python -m benchmarks.communication
    python -m benchmarks.communication --ranks 2 3 4 --px 1024 16384 --gpus 8 64

All figures are of what *one rank sends* in one call of the UNet, batch 1; a rank between two others
receives as much. MB are 10^6 bytes. With N ranks, and rows of W latent pixels at a level:

    linear attention   2 (N-1)/N x (heads d (d+1) + 1) numbers, of fp32, by a ring all-reduce
    convolution        a row of C x W to each neighbour, as many as the kernel reaches into; in a
                       residual block in one round with the sums of the norm before it
    group norm         2 (N-1)/N x 3 numbers of fp64 a group
    softmax attention  (N-1) x keys and values of the rank's own tokens, and its count
    output             (N-1) x the rank's own rows of the prediction, so that all have the whole

First, small networks of the real blocks run on real ranks, and what `engine.bands.Traffic` counted
stands beside these formulas, which know nothing but the layers. The displaced mode sends what the
exact one sends; what it saves is waiting. Then, on the true shapes and in fp16, for the rank that
sends most:

    ours             the formulas; for `--simulated-gpus` also the real code, on tensors without
                     numbers and among ranks that are not there
    DistriFusion     softmax; keys and values, rows at borders (both of each convolution but the
                     first) and outputs are all gathered by all ranks (arXiv:2402.19481)
    LinFusion on it  the same, but instead of keys and values all ranks gather each rank's state, in
                     fp16 (arXiv:2409.02097, section 3.4)

"-" is where there are too few rows for so many ranks.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks import common
from benchmarks.common import MB, Aim
from benchmarks.networks import build, call
from engine.bands import (
    DisplacedExchange,
    ExactExchange,
    Traffic,
    banded,
    max_bands,
    open_mesh,
    split_rows,
)
from engine.bands.boundary import UNetBoundary, downsampling_factor, with_boundary
from engine.bands.layers import BandConv2d, BandGroupNorm, BandSelfAttention
from engine.linfusion import LinearAttention
from engine.parallel import band_layers, share_out
from engine.simulation import META, PretendedMesh, pretended

MODES = ("exact", "displaced", "softmax")
MEASURED_MODELS = ("quarter SD-1.5", "quarter SDXL")
REAL_MODELS = ("SD-1.5", "SDXL")
OUTPUT = UNetBoundary.traffic_kind
DEVIATION = 2.0  # per cent, at most


def parse_arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="of the real runs")
    parser.add_argument("--measured-px", type=int, default=256)
    parser.add_argument(
        "--px", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="by formula"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 8, 64], help="by formula")
    parser.add_argument("--simulated-gpus", type=int, default=8, help="one of --gpus")
    return parser.parse_args()


# --- the formulas ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer that looks beyond its own rows, and how often the picture was halved before it.

    Attributes:
        is_up: convolves what is doubled; we send rows before they are.
        shares_round: its rows travel with the sums of the norm before it.
    """

    module: nn.Module
    level: int
    is_first: bool
    is_up: bool
    shares_round: bool


@dataclass(frozen=True)
class Job:
    """One rank's share of one call.

    Attributes:
        height, width: of the latent.
        element_bytes: of an activation.
    """

    ranks: int
    rank: int
    height: int
    width: int
    element_bytes: int
    batch: int = 1

    @property
    def neighbours(self) -> tuple[int, int]:
        """Whether there is a band (above, below) this one, as numbers."""
        return int(self.rank > 0), int(self.rank < self.ranks - 1)

    def ring(self, payload_bytes: float) -> float:
        """What an all-reduce of so much sends."""
        return 2 * (self.ranks - 1) / self.ranks * payload_bytes


def layers_of(unet: UNet2DConditionModel) -> Iterator[Layer]:
    """Every layer that exchanges anything, of a network whose classes were swapped."""
    kinds = (BandConv2d, BandGroupNorm, BandSelfAttention, LinearAttention)
    for name, module in unet.named_modules():
        is_pointwise = isinstance(module, BandConv2d) and module.halo_rows() == (0, 0)
        if isinstance(module, kinds) and not is_pointwise:
            yield Layer(
                module,
                level_of(name, len(unet.down_blocks)),
                is_first=name == "conv_in",
                is_up="upsamplers" in name,
                shares_round="resnets" in name and isinstance(module, BandConv2d),
            )


def level_of(name: str, levels: int) -> int:
    """Of what a module is given, by its name in diffusers."""
    match name.split("."):
        case ["down_blocks", index, *_]:
            return int(index)
        case ["up_blocks", index, *_]:
            return levels - 1 - int(index)
        case ["mid_block", *_]:
            return levels - 1
    return 0


def formula(unet: UNet2DConditionModel, job: Job) -> tuple[Counter[str], Counter[str]]:
    """Bytes that the rank sends and rounds that it takes part in, by kind of layer."""
    sent: Counter[str] = Counter()
    rounds: Counter[str] = Counter()
    bands = split_rows(job.height, job.ranks, downsampling_factor(unet.config.block_out_channels))
    for layer in layers_of(unet):
        kind = layer.module.traffic_kind
        sent[kind] += job.batch * _bytes_of(layer, job, max(map(len, bands)))
        rounds[kind] += 2 if kind == "softmax attention" else int(not layer.shares_round)
    prediction = 4 * max(map(len, bands)) * job.width * job.element_bytes
    sent[OUTPUT] += (job.ranks - 1) * job.batch * prediction
    rounds[OUTPUT] += 1
    return Counter({kind: round(number) for kind, number in sent.items()}), rounds


def _bytes_of(layer: Layer, job: Job, longest: int) -> float:
    """Of one picture of the batch. `longest` is the number of latent rows in the longest band."""
    module, width = layer.module, -(-job.width // 2**layer.level)
    match module:
        case BandConv2d():
            above, below = module.halo_rows()  # what this rank wants, and so do its neighbours
            has_above, has_below = job.neighbours
            rows = above * has_below + below * has_above
            return rows * module.in_channels * width * job.element_bytes
        case BandGroupNorm():
            return job.ring(3 * module.num_groups * 8)
        case LinearAttention():
            return job.ring((state_numbers(module) + 1) * max(4, job.element_bytes))
        case BandSelfAttention():
            tokens = -(-longest // 2**layer.level) * width
            numbers = 2 * module.to_k.out_features * tokens
            return (job.ranks - 1) * (numbers * job.element_bytes + 8)
    raise AssertionError(type(module))


def state_numbers(attention: LinearAttention) -> int:
    """heads x d x (d + 1)"""
    head_width = attention.to_q.out_features // attention.heads
    return attention.heads * head_width * (head_width + 1)


def published(unet: UNet2DConditionModel, job: Job, linear: bool) -> float:
    """Bytes that a rank sends by DistriFusion's method, or by LinFusion's on top of it, in fp16."""
    others, sent = job.ranks - 1, 0.0
    for layer in layers_of(unet):
        module, width = layer.module, -(-job.width // 2**layer.level)
        match module:
            case BandConv2d() if not layer.is_first:  # which every rank does on the whole sample
                columns = width * (2 if layer.is_up else 1)
                sent += others * 2 * module.padding[0] * module.in_channels * columns * 2
            case BandGroupNorm():
                sent += others * 2 * module.num_groups * 2
            case LinearAttention() if linear:
                sent += others * state_numbers(module) * 2
            case LinearAttention():
                tokens = -(-job.height // 2**layer.level) * width
                sent += others / job.ranks * 2 * module.to_k.out_features * tokens * 2
    return sent + others / job.ranks * 4 * job.height * job.width * 2


# --- real ranks -----------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each network and mode, on this rank."""
    with open_mesh() as mesh, torch.inference_mode():
        torch.set_num_threads(1)
        side = options.measured_px // 8
        return [
            measure_mode(mesh, model, mode, side) for model in MEASURED_MODELS for mode in MODES
        ]


def measure_mode(mesh: Any, model: str, mode: str, side: int) -> dict[str, Any]:
    unet = build(model, linear=mode != "softmax")
    band_layers(unet)
    displaced = partial(DisplacedExchange, warmup_steps=1)
    layout = share_out(mesh, 1, displaced if mode == "displaced" else ExactExchange)
    with_boundary(unet, UNetBoundary, layout)
    call(unet, side, side)  # which a displaced mode waits in
    traffic, before = layout.traffic, Counter(layout.traffic.bytes_sent)
    rounds_before = Counter(traffic.rounds)
    call(unet, side, side)
    if layout.exchange is not None:
        layout.exchange.reset()
    sent, rounds = formula(unet, Job(mesh.size, mesh.rank, side, side, 4))
    return {
        "model": model,
        "mode": mode,
        "ranks": mesh.size,
        "rank": mesh.rank,
        "sent": dict(traffic.bytes_sent - before),
        "formula": dict(sent),
        "rounds": dict(traffic.rounds - rounds_before),
        "formula_rounds": dict(rounds),
    }


def deviation(counted: dict[str, float], expected: dict[str, float]) -> float:
    """The worst of all kinds of layers, in per cent of what the formula says."""
    return max(
        100 * abs(counted.get(kind, 0) - expected.get(kind, 0)) / max(1, expected.get(kind, 0))
        for kind in counted.keys() | expected.keys()
    )


# --- true shapes ----------------------------------------------------------------------------------


@cache
def shapes(model: str) -> UNet2DConditionModel:
    """The network without numbers, its layers banded."""
    with pretended(torch.float16):
        unet = build(model)
    band_layers(unet)
    return unet


def by_formula(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    unet, rows = shapes(model), []
    multiple = downsampling_factor(unet.config.block_out_channels)
    for px in sorted(options.px):
        for gpus in sorted(options.gpus):
            side = px // 8
            job = Job(gpus, min(1, gpus - 2), side, side, 2)
            fits = gpus <= max_bands(side, multiple)
            own = formula(unet, job)[0].total() if fits else None
            rows.append({
                "model": model, "px": px, "gpus": gpus,
                "ours_mb": own and own / MB,
                "simulated_mb": simulated_bytes(unet, px, gpus) / MB
                if own and gpus == options.simulated_gpus else None,
                "distrifusion_mb": published(unet, job, linear=False) / MB if fits else None,
                "linfusion_mb": published(unet, job, linear=True) / MB if fits else None,
            })  # fmt: skip
    return rows


def simulated_bytes(unet: UNet2DConditionModel, px: int, gpus: int) -> float:
    """What the real code would send from the rank that has most to do, and then its output."""
    side, multiple = px // 8, downsampling_factor(unet.config.block_out_channels)
    mesh, traffic = PretendedMesh.of(gpus, side, multiple), Traffic()
    rows = [len(band) for band in split_rows(side, gpus, multiple)]
    with META, torch.no_grad(), banded(ExactExchange(mesh, traffic)):
        prediction = call(unet, rows[mesh.rank], side)
    return traffic.bytes_sent.total() + (gpus - 1) * prediction.nbytes


# --- what it comes to -----------------------------------------------------------------------------


def print_measured(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in (row for row in rows if row["rank"] == min(1, row["ranks"] - 2)):
        for kind, counted in sorted(row["sent"].items()):
            expected = row["formula"].get(kind, 0)
            cells.append([
                f"{row['model']}, {row['mode']}, {row['ranks']} ranks: {kind}",
                row["rounds"][kind], row["formula_rounds"].get(kind, 0), f"{counted:,}",
                f"{expected:,}", f"{100 * (counted - expected) / max(1, expected):+.2f} %",
            ])  # fmt: skip
    columns = ["counted on real ranks", "rounds", "formula", "bytes", "formula", "deviation"]
    common.print_table(columns, cells)
    print()


def print_by_formula(rows: list[dict[str, Any]]) -> None:
    columns = ["MB sent per rank and call", "px", "ours", "simulated", "DistriFusion", "of ours",
               "LinFusion on it", "of ours"]  # fmt: skip
    cells = []
    for row in rows:
        own, theirs, linear = (row[f"{m}_mb"] for m in ("ours", "distrifusion", "linfusion"))
        cells.append([
            f"{row['model']}, {row['gpus']} GPUs", row["px"], *map(_mb, (own, row["simulated_mb"])),
            _mb(theirs), own and f"{theirs / own:.1f} x",
            _mb(linear), own and f"{linear / own:.1f} x",
        ])  # fmt: skip
    common.print_table(columns, cells)
    print()


def _mb(value: float | None) -> str | None:
    return None if value is None else f"{value:,.1f}"


def aims(measured: list[dict[str, Any]], counted: list[dict[str, Any]]) -> list[Aim]:
    rounds = [deviation(row["rounds"], row["formula_rounds"]) for row in measured
              if row["mode"] != "displaced"]  # fmt: skip
    simulated = [
        100 * abs(row["simulated_mb"] - row["ours_mb"]) / row["ours_mb"]
        for row in counted
        if row["simulated_mb"]
    ]
    worst = max(deviation(row["sent"], row["formula"]) for row in measured)
    return [
        Aim("bytes of real runs, worst kind, rank and mode: % off the formula", worst, DEVIATION),
        Aim("rounds of real runs: % off the formula", max(rounds), DEVIATION),
        Aim("bytes simulated on true shapes: % off the formula", max(simulated, default=None),
            DEVIATION),
    ]  # fmt: skip


LINES = {
    "distrifusion_mb": ("DistriFusion (softmax)", common.COLOURS["softmax"]),
    "linfusion_mb": ("LinFusion on DistriFusion", common.COLOURS["naive"]),
    "ours_mb": ("this engine", common.COLOURS["ours"]),
}


def draw(rows: list[dict[str, Any]], plt: Any) -> Any:
    """MB over px, a panel for each model; the fewest and the most GPUs told apart by their line."""
    models = list({row["model"]: None for row in rows})
    figure, panels = plt.subplots(
        1, len(models), figsize=(10.5, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    counts = sorted({row["gpus"] for row in rows})[-2:]
    for axes, model in zip(panels[0], models, strict=True):
        for key, (label, colour) in LINES.items():
            for gpus, style in zip(counts, ("o-", "s--"), strict=False):
                own = [r for r in rows if (r["model"], r["gpus"]) == (model, gpus) and r[key]]
                axes.plot([r["px"] for r in own], [r[key] for r in own], style, ms=4,
                          color=colour, label=f"{label}, {gpus} GPUs")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="side of the picture, px", title=model)
        axes.set_xticks(sorted({row["px"] for row in rows}), minor=False)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda px, _: f"{px:.0f}")
        axes.yaxis.set_major_formatter(lambda mb, _: f"{mb:,.0f}")
    panels[0, 0].set_ylabel("MB sent per rank and call of the UNet")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    options = parse_arguments()
    common.machine()
    measured = [
        row for ranks in options.ranks for rows in common.on_ranks(ranks, measure, options)
        for row in rows
    ]  # fmt: skip
    counted = [row for model in REAL_MODELS for row in by_formula(model, options)]
    print_measured(measured)
    print_by_formula(counted)
    record = {"measured": measured, "by_formula": counted}
    common.finish("communication", options, record, aims(measured, counted), partial(draw, counted))


if __name__ == "__main__":
    main()
