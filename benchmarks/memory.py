"""What each setting that saves the UNet's memory saves, and what it costs in time.

    python benchmarks/memory.py --px 2048
    python benchmarks/memory.py --no-measure            # the real models' peaks only, in a minute

Printed for each setting of `engine.memory`:

    SDXL, SD-1.5   peak GB (10^9 bytes) of activations in one forward of the UNet at `--real-px`, in
                   fp16, batch 1, linear attention, as `engine.simulation` counts them with its
                   allowance for a GPU's kernels; weights come on top: 6.0 and 1.8 GB
    host           GB that wait on the host meanwhile
    measured       MB that a process really grew by at its peak, in a forward of a UNet shaped as
                   SDXL's and a quarter as wide, at `--px` in fp32 on the CPU: each setting in a
                   process of its own, which has done a small forward before
    of plain       that, relative to the plain UNet
    CPU time       of the forward relative to the plain UNet's, the least of `--repeats`:
                   unlike seconds, it hardly depends on what else the machine does

Skips go to the host from a GPU only, so they are counted and not measured. The table is followed by
one line of JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging

from engine import linfusion, memory
from engine.memory import MemoryOptions
from engine.simulation import META, CudaKernels, pretended, simulate

MB, GB = 1e6, 1e9

SETTINGS = {
    "plain": MemoryOptions(),
    "inplace_activations": MemoryOptions(inplace_activations=True),
    "token_chunks 16": MemoryOptions(token_chunks=16),
    "row_chunks 16": MemoryOptions(row_chunks=16),
    "skips_on_host": MemoryOptions(skips_on_host=True),
    "token_chunks, row_chunks 16": MemoryOptions(token_chunks=16, row_chunks=16),
    "both, and skips_on_host": MemoryOptions(token_chunks=16, row_chunks=16, skips_on_host=True),
}

_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}
MODELS = {
    "SDXL": {
        **_SDXL,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
    },
    "SD-1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "quarter SDXL": {
        **_SDXL,
        "block_out_channels": (80, 160, 320),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 256,
        "norm_num_groups": 16,
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--px", type=int, default=2048, help="side of the measured picture")
    parser.add_argument("--real-px", type=int, default=16384, help="side of the counted picture")
    parser.add_argument("--repeats", type=int, default=2, help="measured forwards")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-measure", action="store_true", help="count only")
    parser.add_argument("--only", choices=list(SETTINGS), help=argparse.SUPPRESS)
    return parser.parse_args()


def build(model: str) -> UNet2DConditionModel:
    logging.set_verbosity_error()
    unet = UNet2DConditionModel(**MODELS[model])
    linfusion.convert(unet)
    return unet.eval().requires_grad_(False)


def forward(unet: UNet2DConditionModel, px: int) -> None:
    """One forward on the device and in the dtype of `unet`."""
    weight = unet.conv_in.weight
    sample = weight.new_zeros(1, 4, px // 8, px // 8)
    text = weight.new_zeros(1, 77, unet.config.cross_attention_dim)
    unet(sample, torch.zeros((), dtype=torch.int64, device=weight.device), text)


# --- counted --------------------------------------------------------------------------------------


def count(model: str, px: int) -> dict[str, dict[str, float]]:
    """Every setting's peak GB, on the device and on the host."""
    with pretended(torch.float16):
        unet = build(model)
    assert unet.device == META
    peaks = {}
    for name, options in SETTINGS.items():
        memory.apply(unet, options)
        cost = simulate(lambda: forward(unet, px), CudaKernels())
        peaks[name] = {"device_gb": cost.peak_bytes / GB, "host_gb": cost.host_bytes / GB}
    return peaks


# --- measured -------------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The peak growth and the CPU seconds of a forward, from a process of its own."""
    flags = [f"--{flag}={getattr(options, flag)}" for flag in ("px", "repeats", "threads")]
    command = [sys.executable, __file__, "--only", name, *flags]
    # Freed tensors go back to the system at once, whatever their size.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(name: str, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unet = build("quarter SDXL")
    memory.apply(unet, SETTINGS[name])
    with torch.no_grad():
        forward(unet, 256)  # what libraries allocate once
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before_mb = resident_mb("VmRSS")
        seconds = [timed(unet, options.px) for _ in range(options.repeats)]
    return {"grown_mb": resident_mb("VmHWM") - before_mb, "cpu_seconds": min(seconds)}


def timed(unet: UNet2DConditionModel, px: int) -> float:
    start = time.process_time()
    forward(unet, px)
    return time.process_time() - start


def resident_mb(field: str) -> float:
    """This process's memory now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / MB


# --- printed --------------------------------------------------------------------------------------


def rows(options: argparse.Namespace) -> list[dict[str, object]]:
    counted = {model: count(model, options.real_px) for model in ("SDXL", "SD-1.5")}
    measured = {}
    for name, setting in SETTINGS.items():
        if not (setting.skips_on_host or options.no_measure):
            measured[name] = measure(name, options)
    return [
        {
            "setting": name,
            **{model: peaks[name] for model, peaks in counted.items()},
            "measured": measured.get(name),
        }
        for name in SETTINGS
    ]


def print_table(table: list[dict], options: argparse.Namespace) -> None:
    print(f"Counted at {options.real_px} px, measured at {options.px} px\n")
    print(
        f"{'setting':<28}{'SDXL':>7}{'host':>7}{'SD-1.5':>8}{'host':>7}"
        f"{'measured':>10}{'of plain':>10}{'CPU time':>10}"
    )
    plain = table[0]["measured"]
    for row in table:
        text = f"{row['setting']:<28}"
        for model, width in (("SDXL", 7), ("SD-1.5", 8)):
            peaks = row[model]
            text += f"{peaks['device_gb']:>{width}.1f}{peaks['host_gb']:>7.1f}"
        if measured := row["measured"]:
            share, slower = (measured[key] / plain[key] for key in ("grown_mb", "cpu_seconds"))
            text += f"{measured['grown_mb']:>10.0f}{share:>10.2f}{slower:>10.2f}"
        print(text)


def main() -> None:
    options = parse_arguments()
    if options.only:
        print(json.dumps(measure_here(options.only, options)))
        return
    table = rows(options)
    print_table(table, options)
    settings = {key: value for key, value in vars(options).items() if key != "only"}
    print(json.dumps({"benchmark": "memory", **settings, "rows": table}))


if __name__ == "__main__":
    main()
