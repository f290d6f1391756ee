"""A job, and how each peer paints it: in fresh processes, once for nothing and once for the clock.

    peers = peers_of(ranks, distrifuser)
    measured = peers["engine"].paint(job, Path("picture.png"))      a Measured of each rank

Fresh processes each time cost the loading again, and give each peer its memory for itself. Where
there are no GPUs a rank is one thread, so that N ranks have N times what one has, as with GPUs.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

import engine
from benchmarks import common
from benchmarks.peers.models import readable_by_old
from engine.bands import open_mesh
from engine.config import Settings
from engine.demo import WEIGHTS
from engine.pipeline import Engine

DISTRIFUSER_JOB = Path(__file__).with_name("distrifuser_job.py")
REQUIREMENTS = "benchmarks/peers/distrifuser.txt"


@dataclass(frozen=True)
class Job:
    """One picture. `model` is 'demo', a diffusers folder, or a hub id."""

    model: str
    prompt: str
    height: int
    width: int
    steps: int
    seed: int
    guidance_scale: float
    dtype: str


class NotRun(Exception):
    """A peer cannot paint this job here, and why: a sentence without its full stop."""


Measured = dict[str, float]
"""s, cpu_s, loaded_mb, peak_mb of one rank"""


@dataclass(frozen=True)
class Peer:
    """Paints a job to a file.

    Attributes:
        paint: what each rank measured; raises NotRun.
    """

    title: str
    ranks: int
    paint: Callable[[Job, Path], list[Measured]]


@dataclass(frozen=True)
class Distrifuser:
    """How DistriFusion is started; `python` is the interpreter of its environment."""

    python: Path | None
    cuda_graph: bool
    warmup_steps: int
    timeout_s: float


def peers_of(ranks: int, distrifuser: Distrifuser) -> dict[str, Peer]:
    """All of them, ours first: the others are held against it."""
    theirs = partial(by_distrifuser, ranks, distrifuser)
    return {
        "engine": Peer(_plural("engine", ranks), ranks, partial(by_engine, ranks)),
        "engine-alone": Peer(_plural("engine", 1), 1, partial(by_engine, 1)),
        "diffusers": Peer("diffusers, same network", 1, partial(by_diffusers, "auto")),
        "diffusers-softmax": Peer("diffusers, softmax", 1, partial(by_diffusers, "none")),
        "distrifuser": Peer(_plural("DistriFusion, softmax", ranks), ranks, theirs),
    }


def _plural(name: str, ranks: int) -> str:
    return f"{name}, {ranks} rank{'s' * (ranks > 1)}"


# --- engine and diffusers -------------------------------------------------------------------------


def by_engine(ranks: int, job: Job, picture: Path) -> list[Measured]:
    return common.on_ranks(ranks, _engine_rank, job, picture)


def _engine_rank(job: Job, picture: Path) -> Measured:
    _quiet()
    settings = Settings(
        model=job.model,
        prompt=job.prompt,
        height=job.height,
        width=job.width,
        steps=job.steps,
        seed=job.seed,
        guidance_scale=job.guidance_scale,
        dtype=job.dtype,
        output=picture,
    )
    with open_mesh() as mesh:
        loaded = Engine.load(settings, mesh)
        return _measure(lambda: loaded.generate(settings), loaded.mesh.barrier)


def by_diffusers(linfusion: str, job: Job, picture: Path) -> list[Measured]:
    measured = common.on_ranks(1, _diffusers_rank, linfusion, job, picture)
    if isinstance(measured[0], str):
        raise NotRun(measured[0])
    return measured


def _diffusers_rank(linfusion: str, job: Job, picture: Path) -> Measured | str:
    """By the pipeline as diffusers has it, but for the linear attention in its UNet."""
    _quiet()
    pipe = engine.load(job.model, linfusion, dtype=getattr(torch, job.dtype))
    pipe.to(common.default_device()).set_progress_bar_config(disable=True)

    def paint() -> None:
        pipe(
            job.prompt,
            height=job.height,
            width=job.width,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed),
        ).images[0].save(picture)

    try:
        return _measure(paint, lambda: None)
    except torch.OutOfMemoryError:
        return "the picture does not fit into one GPU's memory"


def _quiet() -> None:
    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def _measure(paint: Callable[[], object], barrier: Callable[[], None]) -> Measured:
    """From the prompt to the file, after a first picture that does not count."""
    loaded_mb = common.start_peak_mb()
    paint()
    common.start_peak_mb()
    barrier()
    begun, worked = time.perf_counter(), time.process_time()
    paint()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    cpu_s = time.process_time() - worked
    barrier()
    s = time.perf_counter() - begun
    return {"s": s, "cpu_s": cpu_s, "loaded_mb": loaded_mb, "peak_mb": common.peak_mb()}


# --- DistriFusion ---------------------------------------------------------------------------------


def by_distrifuser(ranks: int, how: Distrifuser, job: Job, picture: Path) -> list[Measured]:
    """By its own interpreter's torchrun."""
    if refusal := why_not_distrifuser(ranks, how, torch.cuda.device_count()):
        raise NotRun(refusal)
    with tempfile.TemporaryDirectory(prefix="linfusion-engine-") as folder:
        told = Path(folder, "job.json")
        told.write_text(json.dumps(told_to_distrifuser(how, job, picture, Path(folder))))
        command = [
            *[str(how.python), "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)],
            *["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
            *[str(DISTRIFUSER_JOB), str(told)],
        ]
        run_or_say_why(command, how.timeout_s)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def why_not_distrifuser(ranks: int, how: Distrifuser, gpus: int) -> str | None:
    """A sentence, if it cannot run on this machine."""
    if gpus < ranks:
        return (
            f"DistriFusion needs a CUDA GPU for each of its {ranks} ranks, since it exchanges by "
            f"NCCL, and this machine has {gpus or 'none'}"
        )
    if ranks & (ranks - 1):
        return f"DistriFusion runs on 1, 2, 4, 8, ... ranks, not on {ranks}"
    if how.python is None:
        return (
            "DistriFusion needs an environment of its own: install what is in "
            f"{REQUIREMENTS} and pass its interpreter as --distrifuser-python"
        )
    try:
        trial = [how.python, "-c", "import distrifuser.pipelines"]
        subprocess.run(trial, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None)
        words = said.decode().strip().splitlines()[-1] if said else str(error)
        return f"--distrifuser-python {how.python} cannot import distrifuser: {words}"
    return None


def told_to_distrifuser(how: Distrifuser, job: Job, picture: Path, folder: Path) -> dict[str, Any]:
    """What `distrifuser_job.py` reads."""
    index = DiffusionPipeline.load_config(WEIGHTS if job.model == "demo" else job.model)
    return {
        **asdict(job),
        "model": readable_by_old(job.model, folder / "model"),
        "is_sdxl": index["_class_name"] == StableDiffusionXLPipeline.__name__,
        "warmup_steps": how.warmup_steps,
        "cuda_graph": how.cuda_graph,
        "picture": str(picture),
        "results": str(folder),
    }


def run_or_say_why(command: list[str], timeout_s: float) -> None:
    """All its processes end with it, also when it is late.

    Raises:
        NotRun: it was late, or ended with another code than 0.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise NotRun(f"it was not done after {timeout_s:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        if code:
            raise NotRun(f"it ended with code {code}: {last_error(said.read())}")


def last_error(said: str) -> str:
    """The last line that names an exception of the job's own, or else the last line."""
    lines = said.strip().splitlines() or ["it said nothing"]
    errors = [line for line in lines if "Error:" in line and "ChildFailedError" not in line]
    return (errors or lines)[-1].strip()
