"""LinFusion's headline on this machine: a whole recipe in a model's true shape, by random weights.

    python -m benchmarks.headline --model SD-1.5                       16384x16384 px
    python -m benchmarks.headline --model SDXL --height 8192           16384x8192, two branches
    python -m benchmarks.headline --model demo --width 512 --height 256 --steps 8

The published recipes (configs/sd15_16k.yaml, sdxl_16k.yaml) from the prompt to the last row of
pixels: what a picture takes does not depend on what the weights have learnt, so nothing is
downloaded. UNet and VAE have the shapes of the published ones, the tokenizer is the demo's. Printed
are seconds of each part, as `benchmarks.end_to_end` has them, and the GPU's memory at the peak.
What is painted is noise, which takes longer to write: the aims are for the painting alone.

By torchrun it is several ranks' picture, and rank 0 prints.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline

from benchmarks import common
from benchmarks.common import COLOURS, GB, MB, Aim, Noise
from benchmarks.end_to_end import Stopwatch
from benchmarks.peers import models
from engine import linfusion, memory
from engine.bands import is_first_process, open_mesh
from engine.config import Settings
from engine.fuse import choose_kernels, kernels_for
from engine.keeper import Control
from engine.loading import load
from engine.pipeline import Engine
from engine.plan import dtype_of
from engine.preflight import memory_options
from engine.progress import Progress

AIMS_S = {("SD-1.5", 16384, 16384): 45, ("SDXL", 16384, 8192): 60}
LADDERS = {
    "SD-1.5": {"strategy": "sdedit", "base": 1024, "strengths": [0.4, 0.3, 0.2, 0.1]},
    "SDXL": {"strategy": "demofusion", "base": 1024, "preset": "fast"},
    "demo": {"strategy": "demofusion", "base": 128},
}
CODEC = {"mode": "streaming", "chunk_rows": 32}  # a host launches few large chunks sooner


def parse_arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--model", choices=list(LADDERS), default="SD-1.5")
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--height", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=1024, metavar="PX", help="0 for none")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FLAG=VALUE", help="settings: memory.token_chunks=8"
    )
    return parser.parse_args()


# --- models ---------------------------------------------------------------------------------------


def build(model: str, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline in the model's shape."""
    if model == "demo":
        return load("demo", dtype=dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            pipe = models.build(model)
            linfusion.convert(pipe.unet)
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.vae.register_to_config(force_upcast=True)  # as the published ones
    for part in (pipe.unet, pipe.vae):
        part.eval().requires_grad_(False)
    return pipe


# --- measuring ------------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace, folder: Path) -> Settings:
    """The recipe, with what `--set` changes."""
    recipe = {
        "prompt": "a lake at dawn", "width": options.width, "height": options.height,
        "steps": options.steps, "ladder": LADDERS[options.model], "codec": CODEC,
        "output": str(folder / "picture.png"),
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return Settings.load(["--config", str(file), *(f"--{flag}" for flag in options.set)])


def measure(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Seconds of each part in every repeat, and memory."""
    current = [Stopwatch()]
    with open_mesh() as mesh:
        mesh = mesh.on_device(settings.device)
        dtype = dtype_of(settings, mesh.device)
        pipe = build(options.model, mesh.device, dtype)

        def tell(told: Progress) -> None:
            known = set(current[0].parts)
            current[0](told)
            for part in current[0].parts.keys() - known if mesh.rank == 0 else ():
                print(f"{part}: {current[0].parts[part][0]:.1f} s", flush=True)

        engine = Engine(pipe, mesh, control=Control(tell=tell))
        for network in (pipe.unet, pipe.vae):
            choose_kernels(network, kernels_for(settings.kernels, mesh.device, dtype))
        memory.apply(pipe.unet, memory_options(settings), mesh)
        if options.warm_up:  # libraries choose their kernels, and kernels are compiled
            share = options.warm_up / max(options.width, options.height)
            sides = {s: 8 * round(getattr(options, s) * share / 8) for s in ("width", "height")}
            one = {name: getattr(settings.ladder, name)[:1] for name in ("strengths", "steps")}
            ladder = settings.ladder.model_copy(update={**one, "base": options.warm_up // 2})
            small = settings.model_copy(update={**sides, "steps": 10, "ladder": ladder})
            _, pixels = engine.paint(small)
            assert pixels.isfinite().all(), "numbers overflowed: choose another --set dtype"
        common.start_peak_mb()
        parts = [_once(engine, settings, current) for _ in range(options.repeats)]
        return {"parts": parts, "peak_gb": common.peak_mb() * MB / GB, "ranks": mesh.size}


def _once(engine: Engine, settings: Settings, current: list[Stopwatch]) -> dict[str, float]:
    engine.mesh.barrier()
    current[0] = Stopwatch()
    engine.generate(settings)
    return {name: wall for name, (wall, _) in current[0].parts.items()}


def print_parts(record: dict[str, Any], options: argparse.Namespace) -> None:
    ranks = f"{record['ranks']} rank{'s' * (record['ranks'] > 1)}"
    print(f"{options.model}, {options.width}x{options.height} px, {ranks}\n")
    rows = [[name, Noise.of([p[name] for p in record["parts"]])] for name in record["parts"][0]]
    rows.append(["painting: all but writing", Noise.of(painting(record))])
    common.print_table(["", "s"], rows)
    print(f"\nmemory at the peak: {record['peak_gb']:.1f} GB\n")


def painting(record: dict[str, Any]) -> list[float]:
    """Seconds until all pixels are there."""
    return [sum(s for name, s in p.items() if name != "write") for p in record["parts"]]


def aims(record: dict[str, Any], options: argparse.Namespace) -> list[Aim]:
    limit = AIMS_S.get((options.model, options.width, options.height))
    if limit is None:
        return []
    took = Noise.of(painting(record)).median if torch.cuda.is_available() else None
    return [Aim("one H200: seconds of painting", took, limit)]


def draw(record: dict[str, Any], options: argparse.Namespace, plt: Any) -> Any:
    """A bar for each part, one below the other as they follow, with the noise of the repeats."""
    names = list(record["parts"][0])
    noise = [Noise.of([parts[name] for parts in record["parts"]]) for name in names]
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(names) + 1.2), layout="constrained")
    begun = 0.0
    for name, part in zip(names, noise, strict=True):
        colour = COLOURS["plain" if name == "write" else "ours"]
        axes.barh(name, part.median, left=begun, color=colour)
        axes.annotate(f" {part}", (begun + part.median, name), va="center")
        begun += part.median
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.grid(axis="y", visible=False)
    axes.set_title(
        f"{options.model}, {options.width}x{options.height} px: seconds since the prompt"
    )
    return figure


def main() -> None:
    options = parse_arguments()
    common.machine()
    with tempfile.TemporaryDirectory(prefix="linfusion-engine-") as folder:
        record = measure(options, settings_of(options, Path(folder)))
    if is_first_process():
        print_parts(record, options)
        drawn = partial(draw, record, options)
        common.finish("headline", options, record, aims(record, options), drawn)


if __name__ == "__main__":
    main()
