"""The service's page in a real browser; the ranks only pretend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.service import Service, serving
from tests.test_viewer import CHROMIUM, DRIVER, PATIENCE, Page, browsing

KEY = "a-key-of-some-length-0123456789"
EVIL = "<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\">"

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and ChromeDriver: make browser"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browsing(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("served"), "--queue-limit", 3) as service:
        yield service


@pytest.fixture
def page(driver: Any, service: Service) -> Iterator[Page]:
    """The page of a ready service; its console stays without errors."""
    driver.get("about:blank")
    page = Page(driver)
    page.errors()
    page.size(1280, 900)
    page.open(service.url)
    page.wait("return document.querySelector('#health').textContent === 'ready'")
    yield page
    assert page.errors() == []


def fill(page: Page, **values: object) -> None:
    for name, value in values.items():
        field = page.driver.find_element(By.NAME, name)
        if field.tag_name == "select":
            Select(field).select_by_visible_text(str(value))
        else:
            field.clear()
            field.send_keys(str(value))


def paint(page: Page, **values: object) -> None:
    fill(page, **values)
    page.driver.find_element(By.CSS_SELECTOR, "#ask button").click()


def row(page: Page, prompt: str) -> Any:
    """The newest job of that prompt on the page."""
    found = (
        "return [...document.querySelectorAll('li')]"
        ".find((li) => li.querySelector('.prompt').textContent === arguments[0])"
    )
    page.wait(found.replace("arguments[0]", repr(prompt)))
    return page.run(found, prompt)


def text(element: Any, selector: str) -> str:
    content: str = element.find_element(By.CSS_SELECTOR, selector).text
    return content


def until_state(page: Page, element: Any, words: str) -> None:
    script = "return arguments[0].querySelector('.pill').textContent === arguments[1]"
    WebDriverWait(page.driver, PATIENCE, 0.02).until(lambda _: page.run(script, element, words))


def test_a_picture_is_asked_for_watched_and_looked_at(page: Page, service: Service) -> None:
    prompt = "a long coast pause_s=0.15"
    paint(page, prompt=prompt, width=1200, height=800, steps=30, seed=7, output_format="jpeg")
    job = row(page, prompt)
    until_state(page, job, "painting")
    page.wait("return document.querySelector('progress:not([hidden])')?.value > 10")
    page.wait("return /step \\d+ of 30 · about .* left/.test(document.body.innerText)")
    page.wait("return document.querySelector('li img:not([hidden])')?.naturalWidth === 120")
    assert not job.find_element(By.CSS_SELECTOR, ".view").is_displayed()
    until_state(page, job, "done")
    page.wait("return document.querySelector('li img:not([hidden])')?.naturalWidth === 300")
    assert text(job, ".facts") == "1200 × 800 px · 30 steps · seed 7 · guidance 4"
    content = job.find_element(By.CSS_SELECTOR, ".file").get_attribute("href")
    assert service.http.get(content).headers["content-type"] == "image/jpeg"
    job.find_element(By.CSS_SELECTOR, ".view").click()
    page.wait("return typeof viewer !== 'undefined'")
    page.settle()
    shot = page.shot()
    assert shot.std() > 10, "the picture is there, not a blank page"


def test_what_is_wrong_is_said_beside_the_form(page: Page) -> None:
    page.run("document.querySelectorAll('#ask [type=number]').forEach((f) => { f.step = 'any' })")
    paint(page, prompt="a lake", width=100, height=64)
    page.wait("return !document.querySelector('#problem').hidden")
    assert "multiple of 8" in page.driver.find_element(By.ID, "problem").text
    errors = page.errors()
    assert all("400" in error for error in errors), errors
    page.driver.find_element(By.NAME, "height").clear()
    page.driver.find_element(By.CSS_SELECTOR, "#ask button").click()
    page.wait("return /both/.test(document.querySelector('#problem').textContent)")


def test_jobs_are_cancelled_removed_and_used_again(page: Page, service: Service) -> None:
    paint(page, prompt="slow pause_s=0.2", width=64, height=96, steps=100, seed=11)
    job = row(page, "slow pause_s=0.2")
    until_state(page, job, "painting")
    job.find_element(By.CSS_SELECTOR, ".stop").click()
    until_state(page, job, "cancelled")
    fill(page, prompt="other", width=8, seed=1)
    job.find_element(By.CSS_SELECTOR, ".again").click()
    values = page.run("return Object.fromEntries(new FormData(document.querySelector('#ask')))")
    assert values["prompt"] == "slow pause_s=0.2"
    assert (values["width"], values["height"], values["seed"]) == ("64", "96", "11")
    name = job.get_attribute("data-id")
    job.find_element(By.CSS_SELECTOR, ".stop").click()
    page.wait(f"return document.querySelector('[data-id=\"{name}\"]') === null")
    assert service.http.get(f"/v1/images/{name}").status_code == 404


def test_a_prompt_is_never_markup(page: Page, service: Service) -> None:
    name = service.wait_for(service.ask(EVIL)["id"])["id"]
    job = row(page, EVIL)
    assert text(job, ".prompt") == EVIL
    assert page.driver.title == "linfusion-engine"
    page.open(f"{service.url}/v1/images/{name}/view/")
    page.settle()
    assert page.driver.title != "evil"
    assert page.run("return document.querySelectorAll('img').length") == 0


def test_no_script_runs_but_the_pages_own(page: Page) -> None:
    page.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = \"evil\"';"
        "document.body.append(s)"
    )
    assert page.driver.title == "linfusion-engine"
    assert any("Content Security Policy" in error for error in page.errors())


def test_older_ones_are_shown_when_asked_for(page: Page, service: Service) -> None:
    for _ in range(22):
        service.wait_for(service.ask("one of many", size="64x64", steps=1)["id"])
    page.wait("return !document.querySelector('#older').hidden")
    page.wait("return document.querySelectorAll('li').length === 20")
    page.run("document.querySelector('#older').click()")
    page.wait("return document.querySelectorAll('li').length > 20")


def test_every_control_has_a_name_and_the_page_fits_a_phone(page: Page, service: Service) -> None:
    service.wait_for(service.ask("a" * 300, size="64x64", steps=1)["id"])
    row(page, "a" * 300)
    for element in page.driver.find_elements(By.CSS_SELECTOR, "input, textarea, select, button, a"):
        assert element.accessible_name or not element.is_displayed()
    page.size(360, 740)
    assert page.run("return document.documentElement.scrollWidth") <= 360
    page.wait("return document.querySelector('li img').getBoundingClientRect().height > 100")
    assert page.run("return document.querySelector('.frame').offsetHeight") > 100


def test_the_key_is_asked_for(driver: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    service = Service(tmp_path / "served", "--api-key-file", tmp_path / "key")
    try:
        service.begin(KEY).ready()
        page = Page(driver)
        page.open(service.url)
        assert driver.current_url.endswith("/login")
        fill(page, key="wrong")
        driver.find_element(By.TAG_NAME, "button").click()
        page.wait("return document.querySelector('#wrong')?.checkVisibility()")
        fill(page, key=KEY)
        driver.find_element(By.TAG_NAME, "button").click()
        page.wait("return document.querySelector('#health')?.textContent === 'ready'")
        assert driver.get_cookie("linfusion_session")["httpOnly"]
        paint(page, prompt="a lake", width=64, height=64, steps=2)
        until_state(page, row(page, "a lake"), "done")
        page.wait("return document.querySelector('li img:not([hidden])')?.naturalWidth === 64")
        driver.find_element(By.CSS_SELECTOR, "header button").click()
        page.wait("return location.pathname === '/login'")
        page.open(service.url)
        assert driver.current_url.endswith("/login")
    finally:
        service.close()
