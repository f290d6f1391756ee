"""The training set: whole pictures of many shapes, and close-ups, rendered once to disk.

A diffusion model paints well only at sizes that it has seen, so the pictures come in *buckets* of
one shape each; a batch comes from one bucket. Close-ups are windows of paintings of 512 to 2048 px:
they teach what a detail looks like on the upper rungs of the ladder. Their captions tell what the
window shows, and the UNet sees them at low noise only, where a picture's layout is settled.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine.demo.captions import caption
from engine.demo.fit import Run
from engine.demo.landscapes import Window, draw_scene, render

WORDINGS = 3


@dataclass(frozen=True)
class Bucket:
    """`count` pictures of one shape; close-ups where `close_up`, whole landscapes otherwise."""

    height: int
    width: int
    count: int
    close_up: bool = False

    @property
    def name(self) -> str:
        return f"{'close' if self.close_up else 'whole'}_{self.height}x{self.width}"

    @property
    def large(self) -> bool:
        return self.height * self.width >= 256 * 256


BUCKETS = (
    Bucket(128, 128, 2400, close_up=True),
    Bucket(256, 256, 1000),
    Bucket(128, 128, 5000),
    Bucket(96, 144, 2400),
    Bucket(144, 96, 1600),
    Bucket(128, 192, 2400),
    Bucket(192, 128, 1200),
    Bucket(256, 384, 900),
    Bucket(384, 256, 300),
    Bucket(512, 512, 240),
)


def buckets(run: Run) -> tuple[Bucket, ...]:
    """What the run renders and learns from: all of it, or a little of three kinds."""
    return tuple(replace(b, count=6) for b in BUCKETS[:3]) if run.fast else BUCKETS


def render_buckets(run: Run) -> None:
    """Render the pictures, each rank its share. Picture and captions depend on the bucket and the
    number of the picture alone, so that any rank may render them."""
    for bucket in buckets(run):
        path = run.work / f"{bucket.name}.npy"
        shape = (bucket.count, bucket.height, bucket.width, 3)
        parts = [_captions_path(bucket, run.work, rank, run.ranks) for rank in range(run.ranks)]
        if all(part.exists() for part in parts):
            continue
        if run.rank == 0:
            np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        run.barrier()
        pictures = np.lib.format.open_memmap(path, "r+", np.uint8, shape)
        captions = {}
        mine = range(run.rank, bucket.count, run.ranks)
        for number in tqdm(mine, bucket.name, disable=run.rank > 0, mininterval=5):
            pictures[number], captions[number] = draw_picture(bucket, number)
        run.barrier()
        parts[run.rank].write_text(json.dumps(captions))


def _captions_path(bucket: Bucket, work: Path, rank: int, ranks: int) -> Path:
    return work / f"{bucket.name}.{rank}-{ranks}.json"


def load_bucket(bucket: Bucket, work: Path) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """The pictures [n, H, W, 3], mapped from the disk, and the wordings of each."""
    captions: dict[int, list[str]] = {}
    for part in work.glob(f"{bucket.name}.*.json"):
        captions |= {int(number): words for number, words in json.loads(part.read_text()).items()}
    pictures = np.load(work / f"{bucket.name}.npy", mmap_mode="r")
    return pictures, [captions[number] for number in range(bucket.count)]


def draw_picture(bucket: Bucket, number: int) -> tuple[NDArray[np.uint8], list[str]]:
    seed = [bucket.height, bucket.width, int(bucket.close_up), number]
    rng = np.random.default_rng(seed)
    scene = draw_scene(int(rng.integers(2**31)))
    whole, window = (bucket.height, bucket.width), None
    if bucket.close_up:
        whole, window = _close_up(rng, bucket)
    words = [caption(scene, rng, whole, window) for _ in range(WORDINGS)]
    return render(scene, *whole, window), words


def _close_up(rng: np.random.Generator, bucket: Bucket) -> tuple[tuple[int, int], Window]:
    """A painting of 512 to 2048 px a side and a window in it, two times in three about the
    horizon, where there is most to see."""
    height, width = (int(side) for side in 2 ** rng.uniform(9, 11, 2))
    top = int(rng.integers(0, height - bucket.height))
    if rng.random() < 0.67:
        top = int((0.6 + rng.uniform(-0.25, 0.15)) * height - bucket.height / 2)
    left = int(rng.integers(0, width - bucket.width))
    return (height, width), (top, left, bucket.height, bucket.width)
