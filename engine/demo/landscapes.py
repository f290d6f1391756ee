"""Procedural landscapes with captions: all the data that the demo model ever sees.

A `Scene` holds a few words and numbers and no pixels. `render` evaluates it as a function of
position, so that the same scene can be painted at any resolution, and any window of a 2048 px
painting can be had without the rest. Three ideas carry the module:

- Randomness is a table of numbers addressed by lattice cell, never drawn per pixel, and octaves
  finer than the pixels fade out: a small painting is the reduction of a large one.
- A landscape is a stack of layers, each covering all that lies below its ridge line.
- A lake is the landscape looked up at mirrored rows: reflections are right by construction.

Positions: `y` runs from 0 to 1 down the picture; `x` is 0 in the middle and counts in units of
sqrt(height * width), as all sizes of things do, so that a sun is round and of one size relative
to the picture whatever the aspect ratio.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.demo.noise import Array, Noise, mix, rgb, smooth

Window = tuple[int, int, int, int]
"""top, left, height, width in pixels of the whole picture"""

TIMES = ("day", "sunrise", "sunset", "dusk", "night")
TERRAINS = ("snowy mountains", "rocky mountains", "hills", "desert", "pine forest", "autumn forest")
WEATHERS = ("clear", "clouds", "fog")


@dataclass(frozen=True)
class Scene:
    """What a landscape shows; `light` is "sun", "full moon", "crescent moon" or "" (none)."""

    seed: int
    time: str
    terrain: str
    weather: str
    light: str
    stars: bool
    lake: bool
    cabin: bool
    horizon: float
    """y of the shore line where there is a lake, of the foot of the mountains elsewhere"""
    light_x: float
    """-0.5 at the left edge, 0.5 at the right"""
    light_y: float
    light_radius: float
    cabin_x: float


@dataclass(frozen=True)
class Palette:
    """The colours of a time of day, RGB in 0..1."""

    zenith: tuple[float, float, float]
    middle: tuple[float, float, float]
    haze: tuple[float, float, float]
    """the sky at the horizon, which distance and fog fade into"""
    light: tuple[float, float, float]
    """what falls on the terrain, multiplied with its own colour"""
    disc: tuple[float, float, float]
    cloud: tuple[float, float, float]


PALETTES = {
    "day": Palette((0.16, 0.42, 0.86), (0.42, 0.68, 0.95), (0.80, 0.90, 0.98),
                   (1.00, 1.00, 0.96), (1.00, 0.97, 0.70), (0.98, 0.98, 1.00)),
    "sunrise": Palette((0.50, 0.62, 0.88), (0.97, 0.74, 0.76), (1.00, 0.90, 0.66),
                       (1.00, 0.86, 0.78), (1.00, 0.95, 0.72), (1.00, 0.82, 0.80)),
    "sunset": Palette((0.42, 0.16, 0.30), (0.88, 0.28, 0.16), (1.00, 0.60, 0.16),
                      (0.92, 0.50, 0.32), (1.00, 0.88, 0.40), (0.98, 0.46, 0.26)),
    "dusk": Palette((0.14, 0.17, 0.42), (0.32, 0.30, 0.58), (0.56, 0.46, 0.68),
                    (0.44, 0.42, 0.64), (0.95, 0.93, 0.86), (0.46, 0.40, 0.62)),
    "night": Palette((0.02, 0.03, 0.12), (0.05, 0.09, 0.24), (0.13, 0.20, 0.38),
                     (0.30, 0.36, 0.56), (0.97, 0.97, 0.88), (0.19, 0.23, 0.38)),
}  # fmt: skip


def draw_scene(seed: int) -> Scene:
    """The scene of a seed, every attribute drawn so that none predicts another by more than sense
    asks: stars only at night, a sun only by day, a moon only when it is dim."""
    rng = np.random.default_rng(seed)
    time = str(rng.choice(TIMES))
    weather = str(rng.choice(WEATHERS, p=[0.45, 0.35, 0.2]))
    dim = time in ("dusk", "night")
    lights = ["full moon", "crescent moon", ""] if dim else ["sun", ""]
    light = str(rng.choice(lights, p=[0.4, 0.3, 0.3] if dim else [0.7, 0.3]))
    low = time in ("sunrise", "sunset")
    return Scene(
        seed=seed,
        time=time,
        terrain=str(rng.choice(TERRAINS)),
        weather=weather,
        light=light,
        stars=time == "night" and weather == "clear" and bool(rng.random() < 0.7),
        lake=bool(rng.random() < 0.45),
        cabin=bool(rng.random() < 0.25),
        horizon=float(rng.uniform(0.56, 0.63)),
        light_x=float(rng.uniform(-0.34, 0.34)),
        light_y=float(rng.uniform(0.19, 0.29) if low else rng.uniform(0.13, 0.22)),
        light_radius=float(rng.uniform(0.062, 0.085)),
        cabin_x=float(rng.uniform(-0.3, 0.3)),
    )


# ------------------------------------------------------------------------------------- painting


class _Painter:
    """One window of one scene, painted from the sky forward; y is [h, w], x is [1, w]."""

    def __init__(self, scene: Scene, height: int, width: int, window: Window) -> None:
        top, left, rows, columns = window
        self.scene = scene
        self.palette = PALETTES[scene.time]
        self.unit = float(np.sqrt(height * width))
        self.aspect = height / self.unit
        self.pixel = 1 / height
        self.noise = Noise(scene.seed, 1 / self.unit)
        columns_x = np.arange(left, left + columns) + 0.5 - width / 2
        self.x: Array = (columns_x / self.unit).astype(np.float32)[None]
        self.wide = width / self.unit
        y = ((np.arange(top, top + rows) + 0.5) / height).astype(np.float32)[:, None]
        self.water: Array = np.zeros_like(y)
        self.row: Array = y
        if scene.lake:
            self.water = np.clip((y - scene.horizon) / self.pixel + 0.5, 0, 1)
            depth = np.maximum(y - scene.horizon, 0)
            ripple = self.noise.plane(self.x, y, (3.0, 38.0), 9, 2) - 0.5
            y = np.where(y > scene.horizon, scene.horizon - depth + ripple * depth * 0.10, y)
        self.y: Array = np.broadcast_to(y, (rows, columns)).astype(np.float32)
        self.canvas: Array = np.zeros((rows, columns, 3), np.float32)

    def paint(self) -> Array:
        """[h, w, 3] in 0..1"""
        self.sky()
        if self.scene.stars:
            self.stars()
        if self.scene.light:
            self.disc()
        if self.scene.weather == "clouds":
            self.clouds()
        LAND[self.scene.terrain](self)
        if self.scene.weather == "fog":
            self.fog()
        if self.scene.cabin:
            self.cabin()
        if self.scene.lake:
            self.lake()
        return np.clip(self.canvas, 0, 1)

    # the sky

    def sky(self) -> None:
        """A gradient of three colours, and a glow around the sun or moon."""
        p, t = self.palette, self.y / self.scene.horizon
        self.canvas = mix(rgb(*p.zenith), rgb(*p.middle), smooth(t / 0.6))
        self.canvas = mix(self.canvas, rgb(*p.haze), smooth((t - 0.45) / 0.55))

    def stars(self) -> None:
        """Few and large: a star for every other cell of a lattice, never across its edges."""
        size = 0.13
        u, v = self.x / size, self.y * self.aspect / size
        i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
        jitter_x, jitter_y = (0.25 + 0.5 * self.noise.cell(i, j + c) for c in (211, 337))
        distance = np.hypot(u - i - jitter_x, v - j - jitter_y) * size
        radius = 0.011 + 0.008 * self.noise.cell(i, j + 419)
        bright = smooth(1.6 - distance / radius) * (self.noise.cell(i, j + 523) < 0.55)
        self.canvas = mix(self.canvas, rgb(1.0, 1.0, 0.92), bright)

    def disc(self) -> None:
        """The sun, the full moon, or a crescent, with its glow."""
        s = self.scene
        x, y, distance = self.from_light()
        glow = np.exp(-((distance / 0.17) ** 2)) * (0.55 if s.light == "sun" else 0.30)
        self.canvas = mix(self.canvas, rgb(*self.palette.disc), glow)
        cover = np.clip((s.light_radius - distance) * self.unit + 0.5, 0, 1)
        if s.light == "crescent moon":
            bite = np.hypot(x - 0.55 * s.light_radius, y + 0.25 * s.light_radius)
            cover = cover * np.clip((bite - 0.9 * s.light_radius) * self.unit + 0.5, 0, 1)
        self.canvas = mix(self.canvas, rgb(*self.palette.disc), cover)

    def from_light(self) -> tuple[Array, Array, Array]:
        """x, y and distance from the middle of the sun or moon"""
        x = self.x - np.float32(self.scene.light_x * self.wide)
        y = (self.y - np.float32(self.scene.light_y)) * np.float32(self.aspect)
        return x, y, np.hypot(x, y)

    def clouds(self) -> None:
        density = self.noise.plane(self.x, self.y, (2.6, 8.0), 1, 4)
        cover = smooth((density - 0.50) / 0.16) * smooth((self.scene.horizon - self.y) / 0.2)
        if self.scene.light:  # clouds part before the sun and moon, which a prompt asked to see
            cover = cover * smooth(self.from_light()[2] / 0.09 - 1)
        shade = smooth((density - 0.55) / 0.3)
        colour = rgb(*self.palette.cloud) * (1 - 0.16 * shade)[..., None]
        self.canvas = mix(self.canvas, colour, 0.9 * cover)

    # the land

    def layer(self, ridge: Array, colour: Array, distance: float) -> None:
        """Cover all below `ridge` [1, w], lit by the hour and `distance` (0..1) into the haze."""
        cover = np.clip((self.y - ridge) / self.pixel + 0.5, 0, 1)
        lit = colour * rgb(*self.palette.light)
        lit = lit + (rgb(*self.palette.haze) - lit) * np.float32(distance)
        self.canvas = mix(self.canvas, lit, cover)

    def mountains(self, snow: bool) -> None:
        """Two ranges and their foreland."""
        foot = self.scene.horizon
        stone, dark = rgb(0.56, 0.50, 0.46), rgb(0.27, 0.25, 0.26)
        for k, (rise, frequency, distance) in enumerate(((0.30, 1.7, 0.32), (0.19, 2.6, 0.06))):
            peaks = self.noise.line(self.x, frequency, 11 + k, 5, ridged=True)
            ridge = foot - rise * (1.25 * peaks - 0.15)
            face = self.faces(frequency, 11 + k, slant=0.45)
            rough = self.noise.plane(self.x, self.y, (9.0, 9.0), 13 + k, 3) - 0.5
            shade = smooth(0.5 + 0.6 * face + 0.5 * rough)
            colour = mix(dark, stone, shade)
            if snow:
                white = mix(rgb(0.46, 0.58, 0.80), rgb(0.99, 0.99, 1.0), shade)
                line = (self.y - ridge) / rise + 0.9 * rough
                colour = mix(colour, white, 1 - smooth((line - 0.55) / 0.12))
            self.layer(ridge, colour, distance)
        near, far = (
            (rgb(0.97, 0.98, 1.0), rgb(0.80, 0.87, 0.96)) if snow
            else (rgb(0.46, 0.44, 0.30), rgb(0.60, 0.56, 0.44))
        )  # fmt: skip
        self.foreland(near, far, 0.02)

    def hills(self) -> None:
        foot = self.scene.horizon
        greens = (rgb(0.42, 0.62, 0.44), rgb(0.36, 0.62, 0.30), rgb(0.40, 0.70, 0.24))
        for k, green in enumerate(greens[: 2 if self.scene.lake else 3]):
            swell = self.noise.line(self.x, 1.1 + 0.3 * k, 21 + k, 2)
            ridge = foot - (0.06 if k < 2 else -0.16) - (0.17 - 0.06 * k) * swell
            depth = smooth((self.y - ridge) / 0.22)
            mottle = self.noise.plane(self.x, self.y, (6.0, 16.0), 25 + k, 2) - 0.5
            shade = 1.08 - 0.34 * depth + 0.30 * mottle
            self.layer(ridge, green * shade[..., None], (0.35, 0.12, 0.0)[k])

    def desert(self) -> None:
        """Dunes: one side of each crest in the light, the other in shadow."""
        foot = self.scene.horizon
        sand, shadow = rgb(0.98, 0.80, 0.50), rgb(0.70, 0.46, 0.26)
        for k in range(2 if self.scene.lake else 3):
            crest = self.noise.line(self.x, 1.2 + 0.25 * k, 31 + k, 2, ridged=True)
            face = self.faces(1.2 + 0.25 * k, 31 + k, slant=0.9)
            ridge = foot - (0.03, 0.0, -0.15)[k] - (0.16, 0.10, 0.13)[k] * crest
            ripple = self.noise.plane(self.x, self.y, (3.0, 40.0), 35 + k, 1) - 0.5
            shade = smooth(0.55 + 1.1 * face + 0.25 * ripple)
            self.layer(ridge, mix(shadow, sand, shade), (0.25, 0.08, 0.0)[k])

    def forest(self, autumn: bool) -> None:
        """Rows of trees, larger and darker towards the front."""
        foot = self.scene.horizon
        rows = ((-0.10, 0.14, 0.055, 0.42), (-0.03, 0.20, 0.085, 0.16), (0.02, 0.27, 0.12, 0.0))
        for k, (base, tall, wide, distance) in enumerate(rows):
            swell = self.noise.line(self.x, 1.4, 41 + k, 2) - 0.5
            ridge, cell = self.trees(foot + base + 0.10 * swell, tall, wide, k, round_top=autumn)
            tone = self.noise.cell(cell, 617 + k)
            below = smooth((self.y - ridge) / (1.3 * tall))
            mottle = self.noise.plane(self.x, self.y, (16.0, 16.0), 45 + k, 2) - 0.5
            shade = 1.12 - 0.5 * below + 0.45 * mottle
            if autumn:
                leaf = mix(rgb(0.80, 0.22, 0.10), rgb(0.96, 0.68, 0.16), tone)
            else:
                leaf = mix(rgb(0.07, 0.26, 0.17), rgb(0.16, 0.42, 0.24), tone)
            self.layer(ridge, leaf * shade[..., None], distance)
        near = rgb(0.62, 0.46, 0.20) if autumn else rgb(0.22, 0.40, 0.20)
        self.foreland(near, near * np.float32(0.8), 0.14)

    def trees(
        self, base: Array, tall: float, wide: float, row: int, round_top: bool
    ) -> tuple[Array, NDArray[np.int64]]:
        """The tree line of one row [1, w] and the number of the tree at every x."""
        at = self.x / wide + 0.37 * row
        cell = np.floor(at).astype(np.int64)
        across = np.abs(2 * (at - cell) - 1).astype(np.float32)
        high = 0.6 + 0.4 * self.noise.cell(cell, 701 + row)
        shape = np.sqrt(np.maximum(1 - across**2, 0)) if round_top else 1 - across
        return base - np.float32(tall) * high * (0.35 + 0.65 * shape) * 0.75, cell

    def foreland(self, near: Array, far: Array, offset: float) -> None:
        """The ground in front: a narrow shore before a lake, a wide plain elsewhere."""
        foot = self.scene.horizon
        swell = self.noise.line(self.x, 1.6, 51, 3) - 0.5
        ridge = foot - 0.035 + 0.02 * swell if self.scene.lake else foot + offset + 0.06 * swell
        depth = smooth((self.y - ridge) / 0.35)
        mottle = self.noise.plane(self.x, self.y, (5.0, 18.0), 53, 3) - 0.5
        self.layer(ridge, mix(far, near, depth) * (1 + 0.28 * mottle)[..., None], 0.0)

    def faces(self, frequency: float, channel: int, slant: float) -> Array:
        """[h, w] in -1..1: the slope of a ridge line, read off at a slant, which carries each lit
        or shaded side of a peak down the mountain. Its finer octaves would only be stripes."""
        step = np.float32(0.01)
        at = self.x + np.float32(slant) * (self.y - self.scene.horizon)
        right, left = (self.noise.line(at + d, frequency, channel, 2, True) for d in (step, -step))
        return np.clip((right - left) / (2 * step) * 0.45, -1, 1)

    # what lies over it

    def fog(self) -> None:
        """Thin above, thick at the foot of the land."""
        foot = self.scene.horizon
        drift = self.noise.plane(self.x, self.y, (1.5, 5.0), 61, 2)
        thick = np.exp(-(((self.y - foot) / 0.22) ** 2)) * (0.55 + 0.6 * drift)
        haze = rgb(*self.palette.haze) * 0.9 + 0.1 * rgb(*self.palette.cloud)
        self.canvas = mix(self.canvas, haze, np.clip(0.15 + 0.75 * thick, 0, 0.88))

    def cabin(self) -> None:
        """A wooden house with a red roof and a lit window."""
        s = self.scene
        ground = s.horizon - 0.004 if s.lake else s.horizon + 0.14
        x, up = self.x - s.cabin_x * self.wide, (ground - self.y) * self.aspect
        light = rgb(*self.palette.light)
        wall = self._box(np.abs(x) - 0.085) * self._box(np.abs(up - 0.05) - 0.05)
        self.canvas = mix(self.canvas, rgb(0.50, 0.32, 0.19) * light, wall)
        roof = self._box(np.abs(x) - 0.115 * (1.9 - up / 0.1)) * self._box(np.abs(up - 0.14) - 0.05)
        self.canvas = mix(self.canvas, rgb(0.66, 0.18, 0.13) * light, roof)
        window = self._box(np.abs(np.abs(x) - 0.042) - 0.02) * self._box(np.abs(up - 0.052) - 0.022)
        self.canvas = mix(self.canvas, rgb(1.0, 0.86, 0.42), window)

    def _box(self, outside: Array) -> Array:
        """Cover from a signed distance: 1 inside, smooth over one pixel."""
        return np.clip(0.5 - outside * self.unit, 0, 1)

    def lake(self) -> None:
        """The mirrored rows are painted already: water dims and cools them a little."""
        depth = smooth((self.row - self.scene.horizon) / (1 - self.scene.horizon))
        tint = rgb(*self.palette.zenith) * 0.5 + rgb(*self.palette.middle) * 0.5
        self.canvas = mix(self.canvas, tint, self.water * (0.14 + 0.22 * depth))


LAND: dict[str, Callable[[_Painter], None]] = {
    "snowy mountains": lambda painter: painter.mountains(snow=True),
    "rocky mountains": lambda painter: painter.mountains(snow=False),
    "hills": _Painter.hills,
    "desert": _Painter.desert,
    "pine forest": lambda painter: painter.forest(autumn=False),
    "autumn forest": lambda painter: painter.forest(autumn=True),
}


def render(
    scene: Scene, height: int, width: int, window: Window | None = None
) -> NDArray[np.uint8]:
    """Paint `window` (all of it by default) of the height x width picture: [h, w, 3], 8 bits."""
    picture = _Painter(scene, height, width, window or (0, 0, height, width)).paint()
    return (picture * 255 + 0.5).astype(np.uint8)
