"""What a picture shows, in words: captions of whole landscapes and of windows of them."""

import numpy as np

from engine.demo.landscapes import Scene, Window

WORDS = {
    "day": ("at day", "in daylight", "at noon", "by day", "on a bright day", "in the daytime"),
    "sunrise": ("at sunrise", "at dawn", "in the early morning", "in the morning light"),
    "sunset": ("at sunset", "at sundown", "under a red evening sky", "in the evening sun"),
    "dusk": ("at dusk", "at twilight", "in the blue hour", "in the violet dusk"),
    "night": ("at night", "by night", "in the night", "at midnight"),
    "snowy mountains": ("snowy mountains", "snow-covered mountains", "white mountains with snow"),
    "rocky mountains": ("rocky mountains", "bare stone mountains", "grey rocky peaks"),
    "hills": ("green hills", "rolling green hills", "grassy hills", "green meadows on hills"),
    "desert": ("a desert", "desert dunes", "sand dunes", "a sandy desert"),
    "pine forest": ("a pine forest", "a forest of pines", "green fir trees", "a conifer forest"),
    "autumn forest": (
        "an autumn forest",
        "autumn trees",
        "a red autumn forest",
        "a forest in fall",
    ),
    "sun": ("the sun", "a bright sun", "the sun in the sky", "a yellow sun"),
    "full moon": ("a full moon", "the full moon", "a big round moon"),
    "crescent moon": ("a crescent moon", "a thin moon", "the crescent of the moon"),
    "stars": ("stars", "many stars", "a starry sky", "bright stars"),
    "clouds": ("clouds", "a cloudy sky", "big clouds", "drifting clouds"),
    "fog": ("fog", "mist", "thick fog", "drifting mist"),
    "lake": ("a lake", "a calm lake", "a lake with reflections", "a mirror lake", "still water"),
    "cabin": ("a cabin", "a small house", "a wooden hut", "a cottage with a red roof"),
}
FRAMES = (
    "{}",
    "{}",
    "{}",
    "a painting of {}",
    "a picture of {}",
    "a landscape of {}",
    "{}, landscape",
)


def caption(
    scene: Scene, rng: np.random.Generator, whole: tuple[int, int], window: Window | None = None
) -> str:
    """One wording of what `window` of the `whole` (height, width) picture shows: nothing that the
    window leaves out, so that a crop of bare water never teaches what "a lake" looks like."""

    def say(thing: str) -> str:
        return str(rng.choice(WORDS[thing]))

    seen = visible(scene, whole, window or (0, 0, *whole))
    land = say(scene.terrain) if "land" in seen else "water" if "water" in seen else "the sky"
    details = [say(thing) for thing in seen if thing in WORDS]
    rng.shuffle(details)
    if len(details) > 1:
        joined = ", ".join(details[:-1]) + " and " + details[-1]
    else:
        joined = "".join(details)
    order = rng.random()
    if order < 0.15:
        return ", ".join([land, say(scene.time), *details])
    if order < 0.3:
        return ", ".join([say(scene.time), land, *details])
    text = f"{land} {say(scene.time)}" + (f" with {joined}" if details else "")
    return str(rng.choice(FRAMES)).format(text)


def visible(scene: Scene, whole: tuple[int, int], window: Window) -> list[str]:
    """The things of the scene that lie in the window, of "land", "water" and the keys of WORDS."""
    (height, width), (top, left, rows, columns) = whole, window
    y0, y1 = top / height, (top + rows) / height
    x0, x1 = left / width - 0.5, (left + columns) / width - 0.5
    foot, unit = scene.horizon, float(np.sqrt(height * width))
    reach_x, reach_y = (0.7 * scene.light_radius * unit / side for side in (width, height))
    inside = {
        "land": y0 < foot - 0.04 and y1 > foot - 0.1 if scene.lake else y1 > foot - 0.1,
        "water": scene.lake and y1 > foot + 0.05,
        "lake": scene.lake and y0 < foot - 0.05 and y1 > foot + 0.08,
        "sky": y0 < foot - 0.25,
        "light": bool(scene.light)
        and x0 < scene.light_x - reach_x
        and scene.light_x + reach_x < x1
        and y0 < scene.light_y - reach_y
        and scene.light_y + reach_y < y1,
        "cabin": scene.cabin
        and x0 < scene.cabin_x - 0.06
        and scene.cabin_x + 0.06 < x1
        and y0 < foot
        and y1 > foot + (0 if scene.lake else 0.1),
    }
    things = [thing for thing in ("land", "water", "lake", "cabin") if inside[thing]]
    if inside["light"]:
        things.append(scene.light)
    if scene.stars and inside["sky"]:
        things.append("stars")
    if scene.weather == "fog" or (scene.weather == "clouds" and inside["sky"]):
        things.append(scene.weather)
    return things
