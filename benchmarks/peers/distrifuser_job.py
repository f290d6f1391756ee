"""A job by DistriFusion's public API, in an environment that has it and not this engine.

    torchrun --nproc_per_node 2 distrifuser_job.py JOB.json

JOB.json has the fields of `jobs.Job`, and besides

    picture, results         where rank 0 leaves the picture, and each rank RANK.json
    is_sdxl                  the kind of pipeline
    warmup_steps, cuda_graph as in DistriConfig
"""

import json
import sys
import time
from pathlib import Path

import torch
from distrifuser.pipelines import DistriSDPipeline, DistriSDXLPipeline
from distrifuser.utils import DistriConfig
from torch import distributed

MB = 1e6


def load(job):
    """The pipeline and its DistriConfig, which starts the process group."""
    config = DistriConfig(
        height=job["height"],
        width=job["width"],
        do_classifier_free_guidance=job["guidance_scale"] > 1,
        warmup_steps=job["warmup_steps"],
        use_cuda_graph=job["cuda_graph"],
    )
    kind, options = DistriSDXLPipeline, {}
    if not job["is_sdxl"]:
        kind = DistriSDPipeline
        options = {"safety_checker": None, "feature_extractor": None}
        options["requires_safety_checker"] = False
    pipe = kind.from_pretrained(
        config,
        pretrained_model_name_or_path=job["model"],
        torch_dtype=getattr(torch, job["dtype"]),
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return config, pipe


def paint(job, config, pipe):
    """Seconds from the prompt to the file, by this rank's clock, and of its CPU."""
    distributed.barrier()
    torch.cuda.synchronize()
    begun, worked = time.perf_counter(), time.process_time()
    picture = pipe(
        prompt=job["prompt"],
        num_inference_steps=job["steps"],
        guidance_scale=job["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(job["seed"]),
    ).images[0]
    if config.rank == 0:
        picture.save(job["picture"])
    torch.cuda.synchronize()
    cpu_s = time.process_time() - worked
    distributed.barrier()
    return {"s": time.perf_counter() - begun, "cpu_s": cpu_s}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    config, pipe = load(job)
    # It goes on alone where it cannot start its process group, which would be another job.
    if not distributed.is_initialized():
        sys.exit("DistriFusion could not start NCCL")
    loaded_mb = torch.cuda.memory_allocated() / MB
    paint(job, config, pipe)
    torch.cuda.reset_peak_memory_stats()
    seconds = paint(job, config, pipe)
    peak_mb = torch.cuda.max_memory_allocated() / MB
    measured = {**seconds, "loaded_mb": loaded_mb, "peak_mb": peak_mb}
    Path(job["results"], f"{config.rank}.json").write_text(json.dumps(measured))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
