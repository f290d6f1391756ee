"""The page beside a .dzi, in a real browser; and the same tiles in OpenSeadragon."""

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains, ScrollOrigin
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.interaction import POINTER_MOUSE, POINTER_TOUCH
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.pictures import write_picture

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SEADRAGON = (
    Path(__file__).parents[1]
    / ".browser/node_modules/openseadragon/build/openseadragon/openseadragon.min.js"
)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-color-profile=srgb",
]
PATIENCE = 60  # seconds until a test fails instead of waiting on; usually it is far less than one

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and ChromeDriver: make browser"
)

HEIGHT, WIDTH, TILE = 1900, 2600, 512


def write_dzi(path: Path, pixels: np.ndarray, prompt: str = "a lake", tiles: str = "png") -> Path:
    """A picture and its page, by three ranks that do not have equally much; returns the page."""
    facts = {"settings": {"seed": 7, "ladder": {"steps": [20, 15]}}, "ranks": 3}
    metadata = {"prompt": prompt, "linfusion-engine": facts}
    write_picture(path, pixels, [TILE, 3 * TILE], metadata=metadata, tiles=tiles)
    return path.with_suffix(".html")


def places(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture whose pixels tell where they are, and which tile of the last level they are in."""
    y, x = np.mgrid[:height, :width]
    checker = (y // TILE + x // TILE) % 2 * 255
    return np.stack([x // 8 % 256, y // 8 % 256, checker], axis=-1).astype(np.uint8)


def gradient(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, axis=-1).round().astype(np.uint8)


class Page:
    """What a person does with the page, and sees of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str) -> None:
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)
        self.wait("return document.readyState === 'complete'")

    def size(self, width: int, height: int) -> None:
        """Of the window."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> None:
        WebDriverWait(self.driver, PATIENCE, 0.02).until(lambda _: self.run(script), script)

    def settle(self) -> None:
        self.wait("return viewer.pending() === 0")

    def view(self) -> tuple[float, float, float]:
        view = self.run("return viewer.view")
        return view["x"], view["y"], view["scale"]

    def go(self, x: float, y: float, scale: float) -> None:
        self.run("viewer.go(...arguments)", x, y, scale)
        self.settle()

    def shot(self) -> np.ndarray:
        """The window without what lies over the picture, in device pixels: [h, W, 3]."""
        self.run("(document.querySelector('footer') ?? {style: {}}).style.display = 'none'")
        png = Image.open(io.BytesIO(self.driver.get_screenshot_as_png()))
        return np.asarray(png.convert("RGB"))

    def type(self, keys: str) -> None:
        self.driver.find_element(By.TAG_NAME, "body").send_keys(keys)

    def errors(self) -> list[str]:
        """What the console has received since they were last asked for."""
        log = self.driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


@contextmanager
def browsing(profile: Path, *flags: str) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browsing(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    """A window of 800x600 px; the console stays without errors."""
    driver.get("about:blank")
    page = Page(driver)
    page.errors()
    page.size(800, 600)
    yield page
    assert page.errors() == []


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `places()`."""
    return write_dzi(tmp_path_factory.mktemp("places") / "picture.dzi", places())


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `gradient()`."""
    return write_dzi(tmp_path_factory.mktemp("gradient") / "smooth.dzi", gradient())


def as_seen(page: Page) -> tuple[np.ndarray, np.ndarray]:
    """Where each device pixel's centre is in the picture, as rows and columns."""
    x, y, scale = page.view()
    height, width = page.run("return [canvas.height, canvas.width]")
    rows = y + (np.arange(height) + 0.5 - height / 2) / scale
    columns = x + (np.arange(width) + 0.5 - width / 2) / scale
    return rows, columns


def check_places(page: Page, pixels: np.ndarray) -> None:
    """The window shows `places()` where the view says; but for pixels that mix others."""
    shot = page.shot()
    rows, columns = as_seen(page)
    height, width, _ = pixels.shape
    margin = 3 / page.view()[2]  # in the picture; halves mix about two device pixels
    for length, all_seen in ((height, rows), (width, columns)):
        outside = (all_seen < -margin) | (all_seen > length + margin)
        where = np.nonzero(outside)[0]
        edge = shot[where] if all_seen is rows else shot[:, where]
        assert (edge == 0x11).all()
    good_rows, good_columns = clear(rows, height, margin), clear(columns, width, margin)
    assert good_rows.size
    assert good_columns.size
    seen = shot[np.ix_(good_rows, good_columns)].astype(int)
    told = pixels[np.ix_(rows[good_rows].astype(int), columns[good_columns].astype(int))]
    assert np.abs(seen - told).max() <= 1 + margin / 8


def clear(seen: np.ndarray, length: int, margin: float) -> np.ndarray:
    """The device pixels that are inside the picture, and far from the edges of its tiles."""
    far = np.abs((seen + TILE / 2) % TILE - TILE / 2) > margin
    return np.nonzero((seen > margin) & (seen < length - margin) & far)[0]


def test_opens_from_a_file_with_the_whole_picture(page: Page, picture: Path) -> None:
    page.open(picture)
    page.settle()
    assert page.view() == (WIDTH / 2, HEIGHT / 2, 800 / WIDTH)
    check_places(page, places())
    assert page.driver.title == "picture"
    assert page.run("return viewer.failed") == 0
    text = page.run("return document.querySelector('#readout').textContent")
    assert text == "30.8 % · 2600 × 1900 px"


def check_full(page: Page, picture: Path) -> np.ndarray:
    page.open(picture)
    page.run("viewer.full()")
    page.settle()
    shot = page.shot()
    height, width, _ = shot.shape
    top, left = (HEIGHT - height) // 2, (WIDTH - width) // 2
    assert (shot == places()[top : top + height, left : left + width]).all()
    return shot


def test_full_resolution_has_the_very_pixels(page: Page, picture: Path) -> None:
    assert check_full(page, picture).shape == (600, 800, 3)
    page.size(641, 421)
    assert check_full(page, picture).shape == (421, 641, 3)


def test_a_dense_screen_has_the_very_pixels(tmp_path: Path, picture: Path) -> None:
    flags = "--force-device-scale-factor=1.5", "--window-size=600,500"
    with browsing(tmp_path, *flags) as driver:
        shot = check_full(Page(driver), picture)
        assert shot.shape[1] == round(1.5 * driver.execute_script("return innerWidth"))


def test_every_level_is_there(page: Page, picture: Path) -> None:
    page.open(picture)
    pixels = places()
    for depth in range(12):
        scale = 0.9 / 2**depth
        page.size(max(8, min(800, int(WIDTH * scale))), max(8, min(600, int(HEIGHT * scale))))
        page.go(WIDTH / 2, HEIGHT / 2, scale)
        assert page.run("return viewer.failed") == 0
        if depth < 5:  # beyond, no pixel is clear of a tile's edge
            check_places(page, pixels)


def test_pixels_are_as_fine_as_the_device(page: Page, picture: Path) -> None:
    page.size(400, 300)
    for scale, level in ((1, 12), (0.51, 12), (0.5, 11), (0.26, 11), (0.25, 10)):
        page.open(picture)
        page.settle()
        page.go(WIDTH / 2, HEIGHT / 2, scale)
        levels = page.run("return [...tiles.keys()].map((url) => Number(url.split('/')[1]))")
        assert max(levels) == level
        assert min(levels) == 9


ONLY_FINEST = """
const level = (url) => Number(url.split('/')[1]);
const finest = Math.max(...[...tiles.keys()].map(level));
for (const url of [...tiles.keys()]) if (level(url) < finest && tiles.delete(url)) broken.add(url);
redraw();
"""


@pytest.mark.parametrize("scale", [0.32, 0.371, 0.613, 0.87, 1.13, 1.77, 2.3, 3.71])
def test_no_seams(page: Page, smooth: Path, scale: float) -> None:
    """Not even without the coarser tiles below, which would hide them."""
    page.open(smooth)
    step = 255 / min(WIDTH, HEIGHT) / scale
    for x, y in ((WIDTH / 2, HEIGHT / 2), (1024.3, 1023.8), (WIDTH, HEIGHT)):
        page.go(x, y, scale)
        page.run(ONLY_FINEST)
        page.settle()
        shot = page.shot().astype(int)
        columns = np.nonzero((shot[300] != 0x11).any(axis=-1))[0]
        inside = shot[:, columns[0] : columns[-1] + 1]
        assert inside.size > shot.size / 2
        for axis in (0, 1):
            assert np.abs(np.diff(inside, axis=axis)).max() <= np.ceil(step) + 2


def test_magnified_pixels_are_squares(page: Page, picture: Path) -> None:
    page.size(512, 400)
    page.open(picture)
    page.go(1024, 512, 8)
    shot = page.shot()
    expected = places()[512 - 25 : 512 + 25, 1024 - 32 : 1024 + 32]
    assert (shot == expected.repeat(8, axis=0).repeat(8, axis=1)).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (200, 300), (513, 512), (40, 2100)])
def test_other_sizes(page: Page, tmp_path: Path, height: int, width: int) -> None:
    """Small pictures are not enlarged."""
    pixels = places(height, width)
    page.open(write_dzi(tmp_path / "other.dzi", pixels))
    page.settle()
    assert page.view()[2] == min(1, 800 / width)
    assert page.run("return viewer.failed") == 0
    if width > 1:
        check_places(page, pixels)
    page.go(width / 2, height / 2, 1)
    left, top = max(0, 800 - width + 1) // 2, max(0, 600 - height + 1) // 2
    start = max(0, width - 800) // 2
    seen = page.shot()[top : top + height, left : left + min(width, 800)]
    assert (seen == pixels[:, start : start + 800]).all()


def test_jpeg_tiles(page: Page, tmp_path: Path) -> None:
    pixels = gradient(700, 900)
    page.open(write_dzi(tmp_path / "photo.dzi", pixels, tiles="jpg"))
    page.run("viewer.full()")
    page.settle()
    seen = page.shot().astype(int)
    assert np.abs(seen - pixels[50:650, 50:850]).max() < 6
    assert page.run("return viewer.failed") == 0


def under(page: Page, x: float, y: float) -> tuple[float, float]:
    """The place in the picture that is at a point of the window of 800x600 px."""
    centre_x, centre_y, scale = page.view()
    return centre_x + (x - 400) / scale, centre_y + (y - 300) / scale


def pointer(page: Page, kind: str, *paths: list[tuple[int, int]]) -> None:
    """Fingers, or the mouse, each along its path and up again, at the same time."""
    actions = ActionBuilder(page.driver, mouse=PointerInput(kind, f"{kind}0"), duration=10)
    inputs = [actions.pointer_inputs[0]]
    inputs += [actions.add_pointer_input(kind, f"{kind}{i}") for i in range(1, len(paths))]
    for device, path in zip(inputs, paths, strict=True):
        device.create_pointer_move(duration=0, x=path[0][0], y=path[0][1])
        device.create_pointer_down(button=0)
        for x, y in path[1:]:
            device.create_pointer_move(duration=10, x=x, y=y)
        device.create_pointer_up(0)
    actions.perform()


def test_the_mouse_drags(page: Page, picture: Path) -> None:
    page.open(picture)
    page.go(1300, 950, 0.5)
    pointer(page, POINTER_MOUSE, [(300, 300), (350, 280), (360, 270)])
    assert page.view() == pytest.approx((1300 - 60 / 0.5, 950 + 30 / 0.5, 0.5))
    ActionChains(page.driver).move_by_offset(5, 5).perform()  # no longer held
    assert page.view() == pytest.approx((1300 - 60 / 0.5, 950 + 30 / 0.5, 0.5))


@pytest.mark.parametrize("kind", [POINTER_MOUSE, POINTER_TOUCH])
def test_the_picture_cannot_be_dragged_away(page: Page, picture: Path, kind: str) -> None:
    page.open(picture)
    page.go(410, 310, 1)
    pointer(page, kind, [(100, 100), (400, 400), (700, 500)])
    assert page.view() == (400, 300, 1)
    page.settle()
    check_places(page, places())


def test_the_wheel_zooms_about_the_cursor(page: Page, picture: Path) -> None:
    page.open(picture)
    page.go(1300, 950, 0.7)
    before = under(page, 550, 200)
    origin = ScrollOrigin.from_viewport(550, 200)
    ActionChains(page.driver).scroll_from_origin(origin, 0, -200).perform()
    page.wait("return viewer.view.scale > 1")
    assert under(page, 550, 200) == pytest.approx(before)
    ActionChains(page.driver).scroll_from_origin(origin, 0, 200).perform()
    page.wait("return viewer.view.scale < 0.71")
    assert page.view() == pytest.approx((1300, 950, 0.7))


def test_two_fingers_zoom_and_move(page: Page, picture: Path) -> None:
    page.open(picture)
    page.go(1300, 950, 0.7)
    before = under(page, 400, 300)
    pointer(page, POINTER_TOUCH, [(350, 300), (320, 320)], [(450, 300), (520, 320)])
    assert page.view()[2] == pytest.approx(1.4)
    assert under(page, 420, 320) == pytest.approx(before)


def test_one_finger_moves(page: Page, picture: Path) -> None:
    page.open(picture)
    page.go(1300, 950, 1)
    pointer(page, POINTER_TOUCH, [(300, 300), (340, 310), (380, 320)])
    assert page.view() == pytest.approx((1220, 930, 1))


def test_a_double_click_zooms_in(page: Page, picture: Path) -> None:
    page.open(picture)
    page.go(1300, 950, 0.7)
    before = under(page, 300, 250)
    canvas = page.driver.find_element(By.TAG_NAME, "canvas")
    ActionChains(page.driver).move_to_element_with_offset(
        canvas, -100, -50
    ).double_click().perform()
    assert page.view()[2] == pytest.approx(1.4)
    assert under(page, 300, 250) == pytest.approx(before)


def test_keys(page: Page, picture: Path) -> None:
    page.open(picture)
    page.go(1300, 950, 0.5)
    for key, x, y, scale in (
        (Keys.ARROW_RIGHT, 1300 + 160 / 0.5, 950, 0.5),
        (Keys.ARROW_LEFT, 1300, 950, 0.5),
        (Keys.ARROW_UP, 1300, 950 - 120 / 0.5, 0.5),
        (Keys.ARROW_DOWN, 1300, 950, 0.5),
        ("+", 1300, 950, 0.75),
        ("-", 1300, 950, 0.5),
        ("1", 1300, 950, 1),
        ("0", 1300, 950, 800 / WIDTH),
        ("+++", 1300, 950, 800 / WIDTH * 1.5**3),
        (Keys.HOME, 1300, 950, 800 / WIDTH),
        ("+" * 15, 1300, 950, 8),
        ("-" * 15, 1300, 950, 800 / WIDTH),
    ):
        page.type(key)
        assert page.view() == pytest.approx((x, y, scale)), key


def test_full_screen(page: Page, picture: Path) -> None:
    page.open(picture)
    page.type("f")
    page.wait("return document.fullscreenElement !== null")
    page.type("f")
    page.wait("return document.fullscreenElement === null")


def test_a_new_size_keeps_the_centre(page: Page, picture: Path) -> None:
    page.open(picture)
    page.go(1000, 700, 1)
    page.size(500, 600)
    page.wait("return canvas.width === 500")
    assert page.view() == (1000, 700, 1)
    page.settle()
    check_places(page, places())
    page.run("viewer.fit()")
    page.size(1000, 600)
    page.wait("return canvas.width === 1000")
    assert page.view() == (WIDTH / 2, HEIGHT / 2, 600 / HEIGHT)


def test_a_prompt_is_text_and_a_name_may_be_odd(page: Page, tmp_path: Path) -> None:
    prompt = "</script><img src=x onerror=\"document.title = 'bad'\"><b>Bäume &amp; 湖</b>"
    name = "ein See #1, 100 % <b>"
    page.open(write_dzi(tmp_path / f"{name}.dzi", places(600, 600), prompt))
    page.settle()
    assert page.run("return viewer.failed") == 0
    article = page.driver.find_element(By.TAG_NAME, "article")
    assert not article.is_displayed()
    page.type("i")
    assert article.is_displayed()
    told = page.run("return arguments[0].textContent", article)
    assert told.startswith(name + prompt)
    assert "size600 × 600 px" in told
    assert "settingsseed7ladder" in told
    assert "steps20, 15" in told
    assert page.run("return document.querySelectorAll('img, b').length") == 0
    assert page.run("return canvas.getAttribute('aria-label')") == prompt
    assert page.driver.title == name
    page.type("i")
    assert not article.is_displayed()


def test_a_missing_tile_is_counted_and_the_rest_shows(page: Page, tmp_path: Path) -> None:
    html = write_dzi(tmp_path / "holed.dzi", places())
    tiles = tmp_path / "holed_files"
    (tiles / "12/2_1.png").unlink()
    (tiles / "12/2_2.png").write_bytes(b"no picture")
    page.open(html)
    page.go(1300, 950, 1)
    assert page.run("return viewer.failed") == 2
    check_places(page, places())  # coarser, where finer ones are missing
    assert "missing tiles: 2" in page.run("return document.querySelector('#readout').textContent")
    page.go(1310, 950, 1)
    assert page.run("return viewer.failed") == 2
    assert [message for message in page.errors() if "2_1.png" not in message] == []


def test_memory_is_bounded(page: Page, picture: Path) -> None:
    small = picture.with_name("small.html")
    text = picture.read_text()
    assert text.count("MOST_TILES = 300") == 1
    small.write_text(text.replace("MOST_TILES = 300", "MOST_TILES = 3"))
    page.size(500, 400)
    page.open(small)
    for x in range(200, WIDTH, 500):
        page.go(x, 512 if x % 1000 == 200 else 1500, 1)
        assert page.run("return tiles.size") <= 8  # twice what the window needs
        check_places(page, places())


def test_loads_are_bounded_and_the_unseen_are_dropped(page: Page, picture: Path) -> None:
    page.size(1280, 950)
    page.open(picture)
    page.settle()
    page.run("Image.prototype.decode = () => new Promise(() => {})")  # loading for ever
    page.run("viewer.go(1024, 950, 1)")
    page.wait("return drawing === 0")
    assert page.run("return [loading.size, queue.length, viewer.pending()]") == [8, 4, 12]
    page.size(300, 200)
    page.wait("return canvas.width === 300")
    page.run("viewer.go(2600, 1900, 1)")
    page.wait("return drawing === 0")
    assert page.run("return loading.size") == 8
    assert page.run("return queue") == [f"picture_files/12/{name}.png" for name in ("4_3", "5_3")]


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Folders on this machine's own network; returns their address."""
    servers = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    def start(folder: Path) -> str:
        handler = partial(Handler, directory=str(folder))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_opens_from_a_server(page: Page, picture: Path, serve: Callable[[Path], str]) -> None:
    page.open(f"{serve(picture.parent)}/{picture.name}")
    page.settle()
    check_places(page, places())


SEADRAGON_PAGE = """<!doctype html><link rel="icon" href="data:,"><style>
body { margin: 0; background: #111 } #picture { width: 800px; height: 600px }
</style><div id="picture"></div><script src="openseadragon.min.js"></script><script>
const failed = [];
let drawn = 0;
const seadragon = OpenSeadragon({ id: "picture", tileSources: "picture.dzi", drawer: "canvas",
  showNavigationControl: false, immediateRender: true, animationTime: 0, blendTime: 0 });
seadragon.addHandler("tile-load-failed", (event) => failed.push(event.tile.getUrl()));
seadragon.addHandler("open-failed", (event) => failed.push(event.message));
seadragon.addHandler("update-viewport", () => { drawn += 1; });
const done = () => drawn > 0 && seadragon.world.getItemAt(0)?.getFullyLoaded();
</script>"""


@pytest.mark.skipif(not SEADRAGON.exists(), reason="needs OpenSeadragon: make browser")
def test_openseadragon_opens_it(page: Page, picture: Path, serve: Callable[[Path], str]) -> None:
    shutil.copy(SEADRAGON, picture.parent)
    picture.with_name("seadragon.html").write_text(SEADRAGON_PAGE)
    page.open(f"{serve(picture.parent)}/seadragon.html")
    page.wait("return done()")
    size = page.run("return seadragon.world.getItemAt(0).getContentSize()")
    assert (size["x"], size["y"]) == (WIDTH, HEIGHT)
    pixels = places()
    for scale in (800 / WIDTH, 1):
        page.run("seadragon.viewport.zoomTo(arguments[0], null, true)", scale * WIDTH / 800)
        page.run("drawn = 0; seadragon.forceRedraw()")
        page.wait("return done()")
        shot = page.shot().astype(int)
        for x, y in ((150, 150), (250, 420), (400, 200), (620, 300), (700, 500)):
            column = int(WIDTH / 2 + (x + 0.5 - 400) / scale)
            row = int(HEIGHT / 2 + (y + 0.5 - 300) / scale)
            assert np.abs(shot[y, x] - pixels[row, column]).max() <= 2, (scale, x, y)
    assert page.run("return failed") == []


def test_the_page_knows_its_picture(picture: Path) -> None:
    line = next(s for s in picture.read_text().splitlines() if s.startswith("const picture = "))
    told = json.loads(line.removeprefix("const picture = ").removesuffix(";"))
    assert (told["width"], told["height"], told["tileSize"]) == (WIDTH, HEIGHT, TILE)
    assert (told["name"], told["tiles"], told["format"]) == ("picture", "picture_files", "png")
