"""A projection to many GPUs: one rank's share of the work, alone, and a model of the network.

    python -m benchmarks.projection
    python -m benchmarks.projection --model SDXL --gpus 8 64 --px 4096 16384      # on a GPU

**Nothing here was run on as many ranks as a line says.** One rank computes its own band among ranks
that are not there: its layers ask for rows and sums as ever and get zeros and their own sums back
at once. What they sent is counted. To the time of the share comes that of the wire:

    step       = share + rounds x latency + bytes / bandwidth
    efficiency = time of the whole on one GPU / (N x step)
    displaced  = the same with messages that travel while the share is computed

The share comes from two sources, which the first column tells apart:

    timed      here, by `--model` in the precision of the device. Bands of more than
               `--most-latents` latents are timed by fewer rows and scaled up, as is the whole: rows
               cost alike. On a CPU this is a projection of as many such CPUs, and slow ranks make
               any network look fast.
    counted    for an SDXL in fp16 on a GPU of `--tflops` and `--memory-tb-s`, both as reached and
               not as advertised: the real code on tensors without numbers (`engine.simulation`);
               arithmetic / rate + other bytes / bandwidth, or `--launch-us` for each operation if
               that is more.

The network: up to 8 GPUs a node with one latency and bandwidth (NVLink), beyond it another
(InfiniBand, an adapter for each GPU), for all messages alike, since the slowest rank counts: the
one at a node's edge. A latency is that of a whole small collective and does not grow with N here;
contention, stragglers and jitter are left out. A step is one call of the UNet; with guidance there
are two, or one on each half of the ranks.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks import common
from benchmarks.common import MB, Noise
from benchmarks.networks import MODELS, build, call
from engine.bands import ExactExchange, Traffic, banded, max_bands, split_rows
from engine.bands.boundary import downsampling_factor
from engine.parallel import band_layers
from engine.simulation import Cost, CudaKernels, PretendedMesh, pretended, simulate

COUNTED_MODEL = "SDXL"
NODE = 8
LABEL = "PROJECTION: one rank's share, and a model of the network; no such job was run"


def parse_arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    on_gpu = torch.cuda.is_available()
    default = "SDXL" if on_gpu else "quarter SDXL"
    parser.add_argument("--model", choices=list(MODELS), default=default, help="that is timed")
    parser.add_argument("--px", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--timed-px", type=int, nargs="*", default=[4096], help="some of --px")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--most-latents", type=int, default=2**20 if on_gpu else 2**13)
    parser.add_argument("--tflops", type=float, default=400)
    parser.add_argument("--memory-tb-s", type=float, default=2.5)
    parser.add_argument("--launch-us", type=float, default=5)
    parser.add_argument("--latency-us", type=float, default=25, help="of a collective in a node")
    parser.add_argument("--gb-s", type=float, default=300, help="each way, in a node")
    parser.add_argument("--node-latency-us", type=float, default=60, help="between nodes")
    parser.add_argument("--node-gb-s", type=float, default=40, help="each way, between nodes")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    return parser.parse_args()


# --- a rank among others that are not there -------------------------------------------------------


@dataclass(frozen=True)
class LonelyMesh(PretendedMesh):
    """Computes with real numbers: others' rows are zeros, and their tokens are like its own."""

    def all_gather(self, parts: list[Tensor], x: Tensor) -> list[dist.Work]:
        for part in parts:
            part.copy_(x)
        return []

    def swap(
        self, outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]]
    ) -> list[dist.Work]:
        for _, rows in incoming:
            rows.zero_()
        return []


@dataclass(frozen=True)
class Share:
    """The work of the rank that has most to do.

    Attributes:
        rows: of the latent that it has.
        rows_run: of these that are computed here.
        mesh: None where one GPU does it all.
    """

    rows: int
    rows_run: int
    width: int
    mesh: PretendedMesh | None
    traffic: Traffic

    def run(self, unet: UNet2DConditionModel) -> Tensor:
        """[1, 4, rows_run, W]"""
        exchange = self.mesh and ExactExchange(self.mesh, self.traffic)
        with banded(exchange):
            return call(unet, self.rows_run, self.width)


def share_of(unet: UNet2DConditionModel, px: int, gpus: int, most_latents: int) -> Share | None:
    """None where there are too few rows for so many."""
    side, multiple = px // 8, downsampling_factor(unet.config.block_out_channels)
    if gpus > max_bands(side, multiple):
        return None
    rows = max(len(band) for band in split_rows(side, gpus, multiple))
    most = most_latents // side // multiple * multiple
    rows_run = min(rows, max(multiple, most))
    if gpus == 1:
        return Share(rows, rows_run, side, None, Traffic())
    mesh = LonelyMesh.of(gpus, gpus * rows_run, multiple)
    mesh = replace(mesh, device=unet.device)
    return Share(rows, rows_run, side, mesh, Traffic())


# --- both sources ---------------------------------------------------------------------------------


def timed(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = common.default_device()
    unet = build(options.model).to(device, torch.float16 if device.type == "cuda" else None)
    band_layers(unet)

    def measure(shares: dict[int, Share]) -> dict[int, list[float]]:
        functions = {str(gpus): partial(share.run, unet) for gpus, share in shares.items()}
        measured = common.in_turn(
            functions, options.repeats, partial(common.seconds, device=device)
        )
        return {
            gpus: [share.rows / share.rows_run * s for s in measured[str(gpus)]]
            for gpus, share in shares.items()
        }

    with torch.inference_mode():
        return [
            row
            for px in options.timed_px
            for row in project(unet, "timed", options.model, px, measure, options)
        ]


def counted(options: argparse.Namespace) -> list[dict[str, Any]]:
    with pretended(torch.float16):
        unet = build(COUNTED_MODEL)
    band_layers(unet)

    def count(shares: dict[int, Share]) -> dict[int, list[float]]:
        return {
            gpus: [cost_s(simulate(partial(share.run, unet), CudaKernels()), options)]
            for gpus, share in shares.items()
        }

    return [
        row
        for px in options.px
        for row in project(unet, "counted", COUNTED_MODEL, px, count, options)
    ]


def cost_s(cost: Cost, options: argparse.Namespace) -> float:
    busy = cost.flops.total() / (options.tflops * 1e12)
    busy += cost.bytes_moved / (options.memory_tb_s * 1e12)
    return max(busy, cost.operations * options.launch_us / 1e6)


def project(
    unet: UNet2DConditionModel,
    source: str,
    model: str,
    px: int,
    measure: Callable[[dict[int, Share]], dict[int, list[float]]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for one GPU, and one for each number of them."""
    side = px // 8
    most = options.most_latents if source == "timed" else side * side
    shares = {n: share_of(unet, px, n, most) for n in sorted({1, *options.gpus})}
    fitting = {gpus: share for gpus, share in shares.items() if share}
    seconds = measure(fitting)
    rows = []
    for gpus, share in fitting.items():
        traffic = sent_in_one(unet, px, gpus)
        wire = wire_s(gpus, *traffic, options)
        efficiency, displaced = (
            common.ratio(seconds[1], [gpus * step(s, *wire) for s in seconds[gpus]])
            for step in (waiting, overlapping)
        )
        rows.append({
            "projection": True, "source": source, "model": model, "px": px, "gpus": gpus,
            "rows": share.rows, "rows_run": share.rows_run, "share_s": Noise.of(seconds[gpus]),
            "mb_sent": traffic[0] / MB, "rounds": traffic[1], "wire_s": sum(wire),
            "step_s": Noise.of([waiting(s, *wire) for s in seconds[gpus]]),
            "efficiency": efficiency, "displaced_efficiency": displaced,
        })  # fmt: skip
    return rows


def waiting(share_s: float, latency_s: float, bytes_s: float) -> float:
    return share_s + latency_s + bytes_s


def overlapping(share_s: float, latency_s: float, bytes_s: float) -> float:
    return max(share_s, bytes_s)


def sent_in_one(unet: UNet2DConditionModel, px: int, gpus: int) -> tuple[float, int]:
    """(bytes, rounds) of the rank with most to do; all ranks get the whole prediction."""
    if gpus == 1:
        return 0.0, 0
    from benchmarks.communication import Job, formula  # which holds it against real runs

    job = Job(gpus, min(1, gpus - 2), px // 8, px // 8, unet.dtype.itemsize)
    sent, rounds = formula(unet, job)
    return sent.total(), rounds.total()


def wire_s(
    gpus: int, sent_bytes: float, rounds: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of (latency, bytes)."""
    between = gpus > NODE
    latency_us = options.node_latency_us if between else options.latency_us
    gb_s = options.node_gb_s if between else options.gb_s
    return rounds * latency_us / 1e6, sent_bytes / (gb_s * 1e9)


# --- what it comes to -----------------------------------------------------------------------------


def print_rows(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{LABEL}\n")
    columns = ["", "px", "GPUs", "rows", "run", "share ms", "MB sent", "rounds", "wire ms",
               "step ms", "(min - max)", "efficiency", "displaced"]  # fmt: skip
    cells = []
    for row in rows:
        step = row["step_s"]
        spread = f"({1e3 * step.min:.4g} - {1e3 * step.max:.4g})"
        cells.append([
            f"{row['source']}, {row['model']}", row["px"], row["gpus"], row["rows"],
            row["rows_run"], f"{1e3 * row['share_s'].median:.4g}", f"{row['mb_sent']:.1f}",
            row["rounds"], f"{1e3 * row['wire_s']:.3g}", f"{1e3 * step.median:.4g}",
            spread if row["source"] == "timed" else None,
            f"{row['efficiency'].median:.1%}", f"{row['displaced_efficiency'].median:.1%}",
        ])  # fmt: skip
    common.print_table(columns, cells)
    print(f"\n{assumptions(options)}")


def assumptions(options: argparse.Namespace) -> str:
    return (
        f"network: {options.latency_us:g} us and {options.gb_s:g} GB/s each way up to {NODE} GPUs, "
        f"{options.node_latency_us:g} us and {options.node_gb_s:g} GB/s beyond;\n"
        f"counted: {options.tflops:g} TFLOP/s, {options.memory_tb_s:g} TB/s, "
        f"{options.launch_us:g} us an operation;  timed: {common.device_name()}, "
        f"{options.threads} threads"
    )


def draw(rows: list[dict[str, Any]], options: argparse.Namespace, plt: Any) -> Any:
    """Efficiency and seconds of a step over GPUs, a line for each size; the timed ones dotted."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    sizes = sorted({row["px"] for row in rows})
    shades = dict(
        zip(
            sizes,
            plt.get_cmap("viridis_r")(
                [0.15 + 0.75 * i / max(1, len(sizes) - 1) for i in range(len(sizes))]
            ),
            strict=True,
        )
    )
    for source, style in (("counted", "o-"), ("timed", "^:")):
        for px in sizes:
            own = [row for row in rows if (row["source"], row["px"]) == (source, px)]
            if not own:
                continue
            gpus, label = [row["gpus"] for row in own], f"{px} px, {source} ({own[0]['model']})"
            line = {"ms": 4, "color": shades[px], "label": label}
            left.plot(gpus, [100 * row["efficiency"].median for row in own], style, **line)
            right.plot(gpus, [row["step_s"].median for row in own], style, **line)
    left.set(ylim=(0, 105), title="efficiency, per cent (projected)")
    right.set(yscale="log", title="seconds of one call of the UNet (projected)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["gpus"] for row in rows}))
        axes.xaxis.set_major_formatter(lambda n, _: f"{n:.0f}")
        axes.set_xlabel("GPUs")
    right.yaxis.set_major_formatter(lambda s, _: f"{s:g}")
    figure.suptitle(f"{LABEL}\n{assumptions(options)}", x=0.01, ha="left", fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    common.machine()
    rows = [*counted(options), *timed(options)]
    print_rows(rows, options)
    record = {"projection": True, "label": LABEL, "rows": rows}
    common.finish("projection", options, record, draw=partial(draw, rows, options))


if __name__ == "__main__":
    main()
