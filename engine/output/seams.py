"""Does the picture show where it was cut into bands? A number for it, whatever the picture shows.

The step of a row is the mean difference to the row above it. A picture's steps change slowly from
row to row, with outliers where it has edges, such as a horizon. A seam is an outlier at a border of
bands. So each step is held against the median of the steps around it, and those at borders against
what is usual in the rest of this picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_COLUMNS = 1024  # that are looked at, evenly spaced
_CHUNK_ROWS = 64
_AROUND = 16  # rows above and below, whose steps are a step's surroundings
_FLOOR = 0.25  # of a step, in 1/255: in a flat picture rounding alone is no seam
_MARGIN = 1.25


@dataclass(frozen=True)
class Seams:
    """How much rows differ at band borders, and elsewhere; 1 is as much as around them.

    Attributes:
        largest: of the borders' contrasts.
        usual: what all other rows stay below but for one in `rare`.
        rare: a hundred times the number of borders, so that chance alone seldom gives an alarm.
    """

    borders: int
    largest: float
    usual: float
    rare: int

    @property
    def visible(self) -> bool:
        """Whether some border stands out from what the picture itself has."""
        return self.largest > _MARGIN * max(1.0, self.usual)

    def __str__(self) -> str:
        return (
            f"seams: at {self.borders} band border{'s' if self.borders > 1 else ''} rows differ at "
            f"most {self.largest:.2f} times as much as around them; all other rows but one in "
            f"{self.rare}: at most {self.usual:.2f} times"
        )


def row_steps(pixels: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each row to the next: [h, W, 3] -> [h - 1], in 1/255 of white."""
    stride = max(1, pixels.shape[1] // _COLUMNS)
    unit = 1.0 if pixels.dtype == np.float16 else float(np.iinfo(pixels.dtype).max)
    steps = np.empty(max(0, len(pixels) - 1))
    for top in range(0, len(steps), _CHUNK_ROWS):
        rows = pixels[top : top + _CHUNK_ROWS + 1, ::stride].astype(np.float32)
        steps[top : top + _CHUNK_ROWS] = np.abs(np.diff(rows, axis=0)).mean((1, 2))
    return steps * (255 / unit)


def find_seams(steps: np.ndarray, borders: Sequence[int]) -> Seams | None:
    """Compares the steps of all rows of a picture, [H - 1], with those at `borders`.

    Args:
        borders: first rows of the bands but for the topmost one.

    Returns:
        None where there are no borders, or no other rows.
    """
    at = np.asarray(borders, dtype=int) - 1
    if not len(at) or len(at) == len(steps):
        return None
    rest = np.delete(np.arange(len(steps)), at)
    around = steps.copy()
    around[at] = np.interp(at, rest, steps[rest])  # a seam is not to hide in its surroundings
    padded = np.pad(around, _AROUND, mode="reflect" if len(steps) > _AROUND else "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * _AROUND + 1)
    contrast = (steps + _FLOOR) / (np.median(windows, axis=-1) + _FLOOR)
    rare = 100 * len(at)
    usual = float(np.percentile(contrast[rest], 100 * (1 - 1 / rare)))
    return Seams(len(at), round(float(contrast[at].max()), 3), round(usual, 3), rare)
