"""What the streaming codec costs and saves: landscapes decoded and encoded exactly and in a stream.

    python benchmarks/codec.py --px 1024 --pictures 6 --statistics-px 512 256 --passes 0 1 2 3
    python benchmarks/codec.py --px 2048 --statistics-px 1024 512 256 --passes 2
    python benchmarks/codec.py --model sdxl-shape --px 2048 --pictures 1    # memory and time only

One rank, on the GPU where there is one. Printed, for each setting:

    PSNR       decoder: of the picture against the exactly decoded one, in dB; mean and worst.
               encoder: of the picture that the exact decoder makes of the latent, likewise.
    latent     encoder: error of the latent, root mean square over the latent's spread
    step       how the rows next to the borders of chunks differ from each other, over the median of
               all rows; and the same of the exact picture. A seam would show here.
    seconds    a picture takes, mean
    MB         that the process grew by at its peak (of the GPU's memory, on a GPU)

"sdxl-shape" is an autoencoder as large as SDXL's, with random weights: too large to run exactly on
most machines, so it is only streamed, and the process's own peak is printed too. The table is
followed by one line of JSON.
"""

import argparse
import json
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from engine import codec
from engine.demo import WEIGHTS
from engine.demo.landscapes import draw_scene, render

MB = 1e6


@dataclass
class Measured:
    """What one setting gave, over all pictures."""

    name: str
    psnr_db: list[float] = field(default_factory=list)
    latent_error: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    exact_steps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    grown_mb: list[float] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        """Means, and the worst PSNR; None for what was not measured."""
        return {
            "mode": self.name,
            "psnr_db": _mean(self.psnr_db),
            "worst_psnr_db": min(self.psnr_db, default=None),
            "latent_error": _mean(self.latent_error),
            "step_at_borders": _mean(self.steps),
            "exact_step_at_borders": _mean(self.exact_steps),
            "seconds": _mean(self.seconds),
            "grown_mb": max(self.grown_mb, default=None),
        }


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="demo", help="'demo', 'sdxl-shape', or a folder of an AutoencoderKL"
    )
    parser.add_argument("--px", type=int, default=1024, help="height and width of the pictures")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--statistics-px", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--passes", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[8])
    parser.add_argument("--encode", action="store_true", help="measure the encoder too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    options = parser.parse_args()
    if options.px % 8:
        parser.error("--px must be a multiple of 8")
    return options


def load(options: argparse.Namespace) -> AutoencoderKL:
    dtype = getattr(torch, options.dtype)
    if options.model == "sdxl-shape":
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=32,
            latent_channels=4,
            scaling_factor=0.13025,
        ).to(dtype)
    else:
        folder = WEIGHTS / "vae" if options.model == "demo" else Path(options.model)
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype)
    return vae.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def landscape(seed: int, px: int, vae: AutoencoderKL) -> Tensor:
    """[1, 3, px, px] in -1 ... 1"""
    picture = torch.from_numpy(render(draw_scene(seed), px, px))
    return picture.permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1


# --- measuring ------------------------------------------------------------------------------------


@contextmanager
def watched(into: Measured) -> Iterator[None]:
    """Note the seconds that pass inside, and by how much memory grows at its peak."""
    watch = _GpuMemory() if torch.cuda.is_available() else _ProcessMemory()
    start = time.perf_counter()
    yield
    into.grown_mb.append(watch.grown() / MB)
    into.seconds.append(time.perf_counter() - start)


class _GpuMemory:
    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def grown(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


class _ProcessMemory:
    """Looks at the resident memory of this process a hundred times a second."""

    def __init__(self) -> None:
        self.before = self.peak = self._resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def grown(self) -> int:
        self.done.set()
        self.thread.join()
        return self.peak - self.before


def settings(options: argparse.Namespace) -> dict[str, codec.Streaming]:
    """Every streaming codec to be measured, by the name of its row."""
    return {
        f"statistics {px} px, {passes} passes, {rows} rows": codec.Streaming(px, passes, rows)
        for rows in options.chunk_rows
        for px in sorted(options.statistics_px, reverse=True)
        for passes in sorted(options.passes)
    }


def measure(vae: AutoencoderKL, options: argparse.Namespace) -> list[Measured]:
    """Decode, and encode if asked, all pictures by the exact codec and by all others."""
    streams = settings(options)
    decoders = {name: Measured(f"decode, {name}") for name in ["exact", *streams]}
    encoders = {name: Measured(f"encode, {name}") for name in ["exact", *streams]}
    for seed in range(options.pictures):
        print(f"landscape {seed} ...", file=sys.stderr, flush=True)
        picture = landscape(seed, options.px, vae)
        with watched(encoders["exact"]):
            latent = codec.encode(vae, picture, options.px)
        with watched(decoders["exact"]):
            _, exact = codec.decode(vae, latent)
        for name, streaming in streams.items():
            with watched(decoders[name]):
                _, pixels = codec.decode(vae, latent, streaming)
            compare(decoders[name], pixels, exact, 8 * streaming.chunk_rows)
            if options.encode:
                with watched(encoders[name]):
                    own = codec.encode(vae, picture, options.px, streaming)
                encoders[name].latent_error.append(float((own - latent).std() / latent.std()))
                compare(encoders[name], codec.decode(vae, own)[1], exact, 8 * streaming.chunk_rows)
    return [*decoders.values(), *(encoders.values() if options.encode else ())]


def measure_alone(vae: AutoencoderKL, options: argparse.Namespace) -> list[Measured]:
    """Decode noise by the streaming codecs, of a model that cannot run exactly."""
    noise = torch.randn(1, 4, options.px // 8, options.px // 8, dtype=vae.dtype).to(vae.device)
    rows = []
    for name, streaming in settings(options).items():
        rows.append(row := Measured(f"decode, {name}"))
        for _ in range(options.pictures):
            with watched(row):
                codec.decode(vae, noise, streaming)
    return rows


def compare(into: Measured, pixels: Tensor, exact: Tensor, border: int) -> None:
    into.psnr_db.append(psnr(pixels, exact))
    into.steps.append(step_at_borders(pixels, border))
    into.exact_steps.append(step_at_borders(exact, border))


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """In dB of pictures in -1 ... 1, cut to that range; infinite for equal ones."""
    error = (pixels.clamp(-1, 1).double() - reference.clamp(-1, 1).double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def step_at_borders(pixels: Tensor, border: int) -> float:
    """The mean step between the two rows at each border, over the median step of all rows."""
    steps = pixels.diff(dim=2).abs().mean((0, 1, 3)).float()
    at_borders = steps[border - 1 :: border]
    return float(at_borders.mean() / median(steps.tolist()))


# --- what it comes to -----------------------------------------------------------------------------


def print_table(rows: list[dict], options: argparse.Namespace) -> None:
    print(
        f"{options.pictures} x {options.px}x{options.px} px by {options.model!r} in "
        f"{options.dtype}\n"
    )
    columns: list[tuple[str, int, str, Callable[[dict], object]]] = [
        ("PSNR dB", 9, ".1f", lambda row: row["psnr_db"]),
        ("worst", 7, ".1f", lambda row: row["worst_psnr_db"]),
        ("latent", 9, ".4f", lambda row: row["latent_error"]),
        ("step", 7, ".3f", lambda row: row["step_at_borders"]),
        ("(exact)", 9, ".3f", lambda row: row["exact_step_at_borders"]),
        ("seconds", 9, ".1f", lambda row: row["seconds"]),
        ("MB", 8, ".0f", lambda row: row["grown_mb"]),
    ]
    print(f"{'mode':<44}" + "".join(f"{name:>{width}}" for name, width, _, _ in columns))
    for row in rows:
        cells = [
            f"{'-':>{width}}" if get(row) is None else f"{get(row):>{width}{spec}}"
            for _, width, spec, get in columns
        ]
        print(f"{row['mode']:<44}" + "".join(cells))


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    vae = load(options)
    with torch.inference_mode():
        measured = (measure_alone if options.model == "sdxl-shape" else measure)(vae, options)
    rows = [one.row() for one in measured]
    print_table(rows, options)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    print(f"\nthe process's peak: {peak_mb:.0f} MB")
    print(json_line(rows, options, peak_mb))


def json_line(rows: list[dict], options: argparse.Namespace, peak_mb: float) -> str:
    """Everything measured. An equal picture's PSNR is infinite, for which JSON has only null."""
    rows = [
        {key: None if value == math.inf else value for key, value in row.items()} for row in rows
    ]
    line = {"benchmark": "codec", **vars(options), "process_peak_mb": peak_mb, "rows": rows}
    return json.dumps(line, allow_nan=False)


if __name__ == "__main__":
    main()
