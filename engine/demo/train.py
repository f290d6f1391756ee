"""Make the demo model: `python -m engine.demo.train`.

The stages, in order: *data* (render the landscapes), *vae* (the autoencoder), *latents* (encode
them all), *unet* (text encoder and UNet), *decoder* (sharpen the VAE's decoder), *weights* (write
the diffusers folder). Each goes on where a killed run left it, and does nothing when it is done.
Two CPU cores take under two hours; a GPU is much faster. The linear attention is then distilled
from it as from any other model: `engine.distill` with `configs/distill_demo.yaml`.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch.multiprocessing.spawn import spawn

from engine.demo import WEIGHTS, data, unet, vae
from engine.demo.fit import Run
from engine.demo.unet import PromptedUNet

STAGES = ("data", "vae", "latents", "unet", "decoder", "weights")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m engine.demo.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--until", choices=STAGES, default="weights", help="the last stage")
    parser.add_argument("--work", type=Path, help="pictures, checkpoints [build/demo]")
    parser.add_argument("--out", type=Path, help="the diffusers folder [that of the package]")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2,
                        help="processes: one for each GPU or CPU core")  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="a few steps of everything, to try it;"
                        " by default in build/demo-fast alone")  # fmt: skip
    asked = parser.parse_args()
    # A trial must neither be taken for a run to resume nor replace the weights of the package.
    asked.work = asked.work or Path("build/demo-fast" if asked.fast else "build/demo")
    asked.out = asked.out or (asked.work / "weights" if asked.fast else WEIGHTS)
    asked.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        spawn(_rank, (asked, Path(meeting) / "ranks"), nprocs=asked.ranks)


def _rank(rank: int, asked: argparse.Namespace, meeting: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=asked.ranks
    )
    train(Run(asked.work, rank, asked.ranks, asked.fast), asked.out, asked.until)
    dist.destroy_process_group()


def train(run: Run, out: Path, until: str = "weights") -> None:
    """Run this rank's part of the stages up to `until`; rank 0 writes the weights to `out`."""
    for stage in _stages(run, out):
        run.barrier()
        if stage == until:
            break


def _stages(run: Run, out: Path) -> Iterator[str]:
    """Run one stage after the other, and name each when it is done."""
    data.render_buckets(run)
    yield "data"
    autoencoder = vae.train(run)
    yield "vae"
    unet.encode_latents(run, autoencoder)
    yield "latents"
    teacher = unet.train(run)
    yield "unet"
    vae.train_decoder(run, autoencoder)
    yield "decoder"
    if run.rank == 0:
        save(autoencoder, teacher, run.work, out)
    yield "weights"


def save(autoencoder: AutoencoderKL, teacher: PromptedUNet, work: Path, out: Path) -> None:
    """Write the folder that diffusers loads, in fp16."""
    autoencoder.register_to_config(scaling_factor=unet.scaling_factor(work), force_upcast=False)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer,
        unet=teacher.unet,
        scheduler=unet.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(out)
    _tidy(out)


def _tidy(out: Path) -> None:
    """Drop what names the machine that trained, and let plain `from_pretrained` give fp32, which
    transformers otherwise decides for the text encoder alone."""
    for path in out.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    for path in out.glob("*/*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
