"""Distillation: any Stable Diffusion model's self-attention is made linear, by its own teaching.

    python -m engine.distill --config configs/distill_demo.yaml
    torchrun --nproc_per_node 8 -m engine.distill --config configs/distill_sdxl.yaml

The teacher is the model as it is. The student is the same network, to the very tensors, but for its
self-attentions, which are LinFusion's modules with the teacher's projections to begin with; they
alone learn (LinFusion, arXiv:2409.02097, section 3.3).

settings.py     what can be asked for
teacher.py      the model: its prompts, latents and noise
student.py      the network that learns, and the three losses
sources.py      pictures with captions: a folder, tar files, or (landscapes.py) the demo's own
buckets.py      the shapes that pictures are cut to
latents.py      the pictures as latents, on disk, computed once
draws.py        what a step sees: by its number, whatever the number of ranks
lessons.py      from pictures and draws to what both networks see
backends.py     one process, DDP or DeepSpeed, behind one interface
trainer.py      the loop: steps, checkpoints, an average of the weights
records.py      the curve of the losses, as a table and a picture; progress.py tells it on the way
evaluation.py   student and teacher compared on what neither has trained on
metrics.py      PSNR, SSIM, FID, CLIP score
"""
