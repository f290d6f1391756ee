"""Value noise that is the same at every resolution, and the small tools of a painter.

Numbers come from a table addressed by lattice cell and are never drawn per pixel; octaves that are
finer than the pixels fade out. So a small painting is the reduction of a large one.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Noise:
    """Value noise in one and two dimensions, the same at every resolution.

    `footprint` is the size of a pixel in the units of x: octaves that it cannot hold fade out.
    """

    def __init__(self, seed: int, footprint: float) -> None:
        rng = np.random.default_rng([seed, 1])
        self._table: Array = rng.random(1024, dtype=np.float32)
        self._shuffle = rng.permutation(1024)
        self._footprint = footprint

    def cell(self, i: NDArray[np.int64], j: NDArray[np.int64] | int) -> Array:
        """A number in 0..1 for every lattice cell."""
        return np.asarray(self._table[(self._shuffle[i & 1023] + j) & 1023], np.float32)

    def line(
        self, x: Array, frequency: float, channel: int, octaves: int = 4, ridged: bool = False
    ) -> Array:
        """[...] x -> fractal noise in 0..1; `ridged` folds it into peaks and sharp valleys."""
        total = np.zeros_like(x)
        for k, weight, visible in self._octaves(frequency, octaves):
            value = self._line(x * np.float32(frequency * 2.0**k), channel * 37 + k)
            value = 1 - np.abs(2 * value - 1) if ridged else value
            total += np.float32(weight) * (visible * value + (1 - visible) * np.float32(0.5))
        return total

    def plane(
        self, x: Array, y: Array, frequency: tuple[float, float], channel: int, octaves: int = 3
    ) -> Array:
        """As `line`, over the plane, with one frequency along x and one along y."""
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
        for k, weight, visible in self._octaves(max(frequency), octaves):
            u, v = (np.float32(f * 2.0**k) for f in frequency)
            value = self._plane(x * u, y * v, channel * 37 + k)
            total += np.float32(weight) * (visible * value + (1 - visible) * np.float32(0.5))
        return total

    def _octaves(self, frequency: float, octaves: int) -> list[tuple[int, float, np.float32]]:
        """(octave, weight, how much of it the pixels can hold), for those they hold at all."""
        scale = 1 / (1 - 0.5**octaves)
        result = []
        for k in range(octaves):
            visible = np.clip(2 - 4 * self._footprint * frequency * 2.0**k, 0, 1)
            result.append((k, 0.5 ** (k + 1) * scale, np.float32(visible)))
        return result

    def _line(self, x: Array, channel: int) -> Array:
        i = np.floor(x).astype(np.int64)
        f = smooth(x - i)
        return self.cell(i, channel * 71) * (1 - f) + self.cell(i + 1, channel * 71) * f

    def _plane(self, x: Array, y: Array, channel: int) -> Array:
        i, j = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        f, g = smooth(x - i), smooth(y - j)
        j = j + channel * 71
        top = self.cell(i, j) * (1 - f) + self.cell(i + 1, j) * f
        bottom = self.cell(i, j + 1) * (1 - f) + self.cell(i + 1, j + 1) * f
        return np.asarray(top * (1 - g) + bottom * g, np.float32)


def smooth(t: NDArray[np.floating]) -> Array:
    """The smoothstep of 0..1, clipped."""
    t = np.clip(t, 0, 1).astype(np.float32)
    return t * t * (3 - 2 * t)


def mix(a: Array, b: NDArray[np.floating], weight: NDArray[np.floating]) -> Array:
    """a where `weight` is 0, b where it is 1; `weight` is [h, w], the colours [h, w, 3] or [3]."""
    return np.asarray(a + (b - a) * weight[..., None], np.float32)


def rgb(*colour: float) -> Array:
    return np.asarray(colour, np.float32)
