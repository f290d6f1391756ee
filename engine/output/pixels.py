"""Arithmetic on rows of finished pictures: made smaller, and cut into tiles."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

_CHUNK_ROWS = 64  # halved at a time: bounds the memory


def halve(pixels: np.ndarray) -> np.ndarray:
    """Means over 2 x 2 pixels, rounded to nearest: [h, W, 3] -> [ceil(h / 2), ceil(W / 2), 3].

    An odd last row or column is its own mean.
    """
    height, width, channels = pixels.shape
    small = np.empty((-(-height // 2), -(-width // 2), channels), pixels.dtype)
    for top in range(0, height, _CHUNK_ROWS):
        rows = pixels[top : top + _CHUNK_ROWS]
        small[top // 2 : -(-(top + len(rows)) // 2)] = _halve(rows)
    return small


def _halve(rows: np.ndarray) -> np.ndarray:
    if rows.dtype == np.uint8:
        reduced: np.ndarray = np.asarray(Image.fromarray(rows).reduce(2))
        return reduced
    odd_rows, odd_columns = rows.shape[0] % 2, rows.shape[1] % 2
    if odd_rows or odd_columns:
        rows = np.pad(rows, ((0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    wide = np.float32 if rows.dtype == np.float16 else np.uint32
    tall = rows[0::2].astype(wide) + rows[1::2]
    total = tall[:, 0::2] + tall[:, 1::2]
    return (total / 4 if wide is np.float32 else (total + 2) >> 2).astype(rows.dtype)


def tile_rows(rows: range, pixels: np.ndarray, side: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of tiles: their number from the top of the picture, and pixels [at most side, W, 3]."""
    for top in range(rows.start, rows.stop, side):
        yield top // side, pixels[top - rows.start : top - rows.start + side]


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels [h, W, 3] of any type of numbers as uint8, to look at."""
    if pixels.dtype == np.uint8:
        return pixels
    small = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(pixels), _CHUNK_ROWS):
        rows = pixels[top : top + _CHUNK_ROWS]
        if pixels.dtype == np.uint16:
            small[top : top + _CHUNK_ROWS] = rows >> 8
        else:
            small[top : top + _CHUNK_ROWS] = np.rint(255 * _from_linear(rows.astype(np.float32)))
    return small


def reduce_to(pixels: np.ndarray, side: int) -> np.ndarray:
    """A picture of 8 bits, reduced to a longer side of `side`."""
    picture = Image.fromarray(pixels)
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    small: np.ndarray = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    return small


def _from_linear(light: np.ndarray) -> np.ndarray:
    """The transfer function of sRGB (IEC 61966-2-1)."""
    dark, bright = 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055
    return np.where(light <= 0.0031308, dark, bright)
