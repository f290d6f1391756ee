"""From pixels in bands to a finished file: what the ranks have to say to each other about it.

    own rows [h, W, 3] -> recut to the format's blocks -> encoded by every rank -> parts -> one file
                             |
                             v halved, and again, for pyramids and the preview

Formats encode blocks of rows, such as the 256 of a TIFF's tiles, and bands begin where the latent
was cut. So each border moves down to the next block: a rank hands its topmost rows to the rank
above, and what it keeps is not copied. Beyond that the ranks tell each other whether all is well
after each stage, so that a full disk on one of them ends the job on all, and leaves nothing.
"""

import contextlib
import logging
import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine import output
from engine.bands import Mesh, Traffic
from engine.bands.exchange import fetch_pieces
from engine.config import UserError
from engine.output import BandWriter, Metadata, Part, Target
from engine.output.jpeg import JpegWriter
from engine.output.lock import Lock
from engine.output.pixels import halve, reduce_to, to_8_bits
from engine.output.seams import Seams, find_seams, row_steps
from engine.output.writer import leftovers, remove

T = TypeVar("T")

logger = logging.getLogger(__name__)

PREVIEW_PX = 1024
"""long side of the preview"""
_PREVIEW_BEYOND_PX = 4096


def save(
    target: Target,
    mesh: Mesh,
    traffic: Traffic,
    rows: range,
    pixels: np.ndarray,
    describe: Callable[[Seams | None], Metadata],
    with_preview: bool = True,
) -> Seams | None:
    """Write a picture of which each rank has its own rows. Every rank makes the call.

    Args:
        target: its token is replaced by a new one.
        rows, pixels: this rank's, [h, W, 3] in the target's type of numbers.
        describe: what the file is to keep, once it is known how the band borders look.
        with_preview: whether a large picture gets one.

    Returns:
        how they look, or None for a single band

    Raises:
        UserError: some rank could not write.
    """
    agree, is_first = _agreeing(mesh, target.path), mesh.rank == 0
    token = mesh.gather_objects(secrets.token_hex(4))[0]
    target = replace(target, token=token)
    bands = mesh.gather_objects(rows)
    seams = _find_seams(mesh, traffic, bands, pixels)
    writer = output.writer_for(target.path)
    # Whatever fails, on whichever rank: leaving the stack removes this rank's part.
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(Lock(target.path))
        agree(lambda: _begin(lock, target, mesh.timeout_s / 2) if is_first else None)
        part = agree(lambda: stack.enter_context(writer(target, mesh.rank)))
        preview_level = _preview_level(target) if with_preview else -1
        preview = _write_levels(mesh, traffic, part, bands, pixels, preview_level)
        summaries: list[Part] = mesh.gather_objects(agree(part.close))
        metadata = agree(lambda: describe(seams) if is_first else {})
        agree(lambda: writer.assemble(target, summaries, metadata) if is_first else None)
        agree(lambda: None if preview is None else _save_preview(target, preview, metadata))
    return seams


def _agreeing(mesh: Mesh, path: Path) -> Callable[[Callable[[], T]], T]:
    """`mesh.agree`, where what a file system says becomes a sentence."""

    def checked(action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"{path}: writing failed ({reason}); free some space or name another folder"
            ) from error

    return lambda action: mesh.agree(lambda: checked(action))


def _begin(lock: Lock, target: Target, patience_s: float) -> None:
    """Be the only job that writes this file, and clear up after those that were killed at it."""
    lock.acquire(patience_s)
    if output.writer_for(target.path).restore(target.path):
        logger.warning("%s: put back after an interrupted run", target.path)
    left = [*leftovers(target.path), *leftovers(preview_path(target.path))]
    for file in left:
        try:
            remove(file)
        except OSError as error:  # somebody else's, and no reason to give up a painted picture
            logger.warning("%s: cannot be removed (%s)", file, error.strerror or error)
    if left:
        logger.warning("removed what an interrupted run had left: %s", ", ".join(map(str, left)))


# --- levels ---------------------------------------------------------------------------------------


def _write_levels(
    mesh: Mesh,
    traffic: Traffic,
    part: BandWriter,
    bands: list[range],
    pixels: np.ndarray,
    preview_level: int,
) -> np.ndarray | None:
    """Write the picture, and its halves as often as the format or the preview want them.

    Returns:
        on rank 0 the picture at the size that a preview is made of, if there is to be one
    """
    agree = _agreeing(mesh, part.target.path)
    count, preview = part.levels(part.target), None
    last = max(count - 1, preview_level)
    for level in range(last + 1):
        multiple = math.lcm(2, part.row_multiple if level < count else 2)
        bands, chunks = recut(mesh, traffic, bands, pixels, multiple)
        if level < count:
            agree(partial(_write, part, bands[mesh.rank], chunks, level))
        if level == preview_level:
            preview = _gather(mesh, traffic, bands, np.concatenate(chunks))
        if level < last:
            halves = [halve(chunk) for chunk in chunks]
            pixels = np.concatenate(halves) if len(halves) > 1 else halves[0]
            bands = halved(bands)
    return preview


def _write(part: BandWriter, rows: range, chunks: list[np.ndarray], level: int) -> None:
    row = rows.start
    for chunk in chunks:
        part.write(range(row, row + len(chunk)), chunk, level)
        row += len(chunk)


def recut(
    mesh: Mesh, traffic: Traffic, bands: list[range], pixels: np.ndarray, multiple: int
) -> tuple[list[range], list[np.ndarray]]:
    """Move each border between bands down to the next multiple of `multiple` rows.

    Args:
        bands: of all ranks, from the top; some may be empty.
        pixels: this rank's, [h, W, 3].

    Returns:
        (the new bands, this rank's rows in chunks that begin on such multiples too)
    """
    cut = moved_down(bands, multiple)
    # What a rank lacks comes from below, from one rank or from several short ones. It is fetched
    # together with the rank's own rows of the same block, since blocks are encoded whole.
    blocks = [
        range(max(new.start, old.stop // multiple * multiple), new.stop)
        if new.stop > old.stop
        else range(new.stop, new.stop)
        for old, new in zip(bands, cut, strict=True)
    ]
    last = _fetch(mesh, traffic, bands, pixels, blocks)
    old, new, block = bands[mesh.rank], cut[mesh.rank], blocks[mesh.rank]
    kept = pixels[new.start - old.start : block.start - old.start]
    return cut, [kept, last] if len(block) else [kept]


def moved_down(bands: list[range], multiple: int) -> list[range]:
    """The bands with each border moved down to the next multiple, or to the end of the picture."""
    height = bands[-1].stop
    starts = [min(height, -(-rows.start // multiple) * multiple) for rows in bands]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], height], strict=True)]


def halved(bands: list[range]) -> list[range]:
    """The bands of the picture halved, given ones that begin on even rows or at its end."""
    return [range(-(-rows.start // 2), -(-rows.stop // 2)) for rows in bands]


def _fetch(
    mesh: Mesh, traffic: Traffic, bands: list[range], pixels: np.ndarray, want: list[range]
) -> np.ndarray:
    """The rows `want[rank]` of a picture in `bands`, from whoever has them."""
    # As bytes: not every type of numbers travels.
    height, width, channels = pixels.shape
    flat = np.ascontiguousarray(pixels).view(np.uint8)
    flat = flat.reshape(1, 1, height, width * channels * pixels.itemsize)
    fetched: Tensor
    (fetched,) = fetch_pieces(
        mesh, traffic, _Rows, torch.from_numpy(flat), bands, [[rows] for rows in want]
    )
    rows: np.ndarray = fetched.numpy().view(pixels.dtype)
    return rows.reshape(len(want[mesh.rank]), width, channels)


def _gather(
    mesh: Mesh, traffic: Traffic, bands: list[range], pixels: np.ndarray
) -> np.ndarray | None:
    """All rows on rank 0."""
    want = [range(bands[-1].stop), *[range(0)] * (mesh.size - 1)]
    whole = _fetch(mesh, traffic, bands, pixels, want)
    return whole if mesh.rank == 0 else None


class _Rows:
    """Labels what travels for the file in the count of traffic."""

    traffic_kind = "rows for the file"


# --- what stands beside the file ------------------------------------------------------------------


def _find_seams(
    mesh: Mesh, traffic: Traffic, bands: list[range], pixels: np.ndarray
) -> Seams | None:
    """The same on every rank."""
    if mesh.size == 1:
        return None
    above = [range(max(0, rows.start - 1), rows.start) for rows in bands]
    row_above = _fetch(mesh, traffic, bands, pixels, above)
    across = row_steps(np.concatenate([row_above, pixels[: len(row_above)]]))
    steps = np.concatenate(mesh.gather_objects(np.concatenate([across, row_steps(pixels)])))
    return find_seams(steps, [rows.start for rows in bands[1:]])


def preview_path(path: Path) -> Path:
    """Where the preview of a large picture is."""
    return path.with_name(f"{path.name}.preview.jpg")


def _preview_level(target: Target) -> int:
    """How often the picture is halved before its preview is made; -1 where there is none."""
    if max(target.height, target.width) <= _PREVIEW_BEYOND_PX:
        return -1
    level = 0
    while max(target.level_size(level + 1)) >= PREVIEW_PX:
        level += 1
    return level


def _save_preview(target: Target, pixels: np.ndarray, metadata: Metadata) -> None:
    """A JPEG beside the file; `pixels` are of one to two times its size."""
    small = reduce_to(to_8_bits(pixels), PREVIEW_PX)
    height, width, _ = small.shape
    preview = Target(preview_path(target.path), height, width, token=target.token)
    try:
        with JpegWriter(preview, 0) as part:
            part.write(range(height), small)
            JpegWriter.assemble(preview, [part.close()], metadata)
    except OSError as error:  # the picture itself is safe
        logger.warning("%s: no preview (%s)", preview.path, error.strerror or error)
