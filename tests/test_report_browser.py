"""The page in a real browser: no error, no request, figures there, no sideways scrolling."""

import json
import shutil
from pathlib import Path

import pytest
from fake_run import HOSTILE, fake_run

from prefloop.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WIDTHS = {"phone": 360, "desktop": 1280}

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)

BOXES = """
return [...document.querySelectorAll("figure > svg, figure > img")].map(
    figure => [figure.getBoundingClientRect().width, figure.getBoundingClientRect().height])
"""
TOO_WIDE = """
const room = document.documentElement.clientWidth + 1;
return [...document.querySelectorAll("body *")].filter(
    part => part.getBoundingClientRect().right > room && !part.closest(".scroll, svg"))
    .map(part => part.outerHTML.slice(0, 200))
"""
SMALL_TEXT = """
return [...document.querySelectorAll("figure > svg")].map(figure => Math.min(
    ...[...figure.querySelectorAll("text")].map(text => text.getBoundingClientRect().height)))
"""


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    runs = [fake_run(folder / "warm"), fake_run(folder / "hostile", text=HOSTILE + "x" * 3000)]
    return write_report(runs, folder / "page.html")


@pytest.fixture(params=WIDTHS)
def opened(request, browser, page):
    """The browser with the page open at one width, and what it logged since."""
    size = {"width": WIDTHS[request.param], "height": 800, "deviceScaleFactor": 1}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "mobile": False})
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def test_the_page_logs_nothing_runs_nothing_and_asks_the_network_for_nothing(opened, page):
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert opened.execute_script("return window.pwned") is None
    assert opened.execute_script("return document.scripts.length") == 0


def test_every_figure_is_there_and_large_enough_to_read(opened):
    boxes = opened.execute_script(BOXES)
    # 8 curves, 1 scatter; of each run 1 histogram, 1 overlap of rules and 4 of its own
    assert len(boxes) == 21
    assert min(width for width, _ in boxes) > 250
    assert min(height for _, height in boxes) > 80
    assert min(opened.execute_script(SMALL_TEXT)) > 8  # pixels of line height


def test_nothing_makes_the_page_scroll_sideways(opened):
    assert opened.execute_script(TOO_WIDE) == []
    width = opened.execute_script("return document.documentElement.scrollWidth")
    assert width <= opened.execute_script("return window.innerWidth")


def test_what_is_folded_opens_without_a_script(opened):
    opened.execute_script("document.querySelector('details.long summary').click()")
    shown = "return document.querySelector('details.long[open] .text:last-of-type').offsetHeight"
    assert opened.execute_script(shown) > 0


def test_dark_and_light_both_have_readable_ink(browser, page):
    seen = set()
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(page.as_uri())
        colours = browser.execute_script(
            "const style = getComputedStyle(document.body), tick = document.querySelector("
            "'figure > svg text'); return [style.color, style.backgroundColor, "
            "getComputedStyle(tick).fill]"
        )
        ink, paper, tick = (luminance(colour) for colour in colours)
        for part in (ink, tick):
            assert (max(part, paper) + 0.05) / (min(part, paper) + 0.05) > 4.5  # WCAG AA
        seen.add(paper < 0.5)
    assert seen == {True, False}


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
