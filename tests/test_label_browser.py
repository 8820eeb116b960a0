"""The label page in a real browser: keys store judgements, nothing is logged, text stays text."""

import shutil
import threading
import time

import pytest

from prefloop.labelling import Labeller, Store, serve, tasks_of
from prefloop.types import Comparison

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script> & so on"

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)

ROWS = (
    Comparison(
        prompt=({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}),
        responses=("first", "second", "third"),
        scores=(0.0, 2.0, 5.0),
        id="three",
    ),
    Comparison(prompt="two?", responses=("good", "bad"), scores=(1.0, 0.0), id="two"),
    Comparison(prompt=HOSTILE, responses=(HOSTILE, "   "), id="hostile"),
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "labels.sqlite")
    yield made
    made.close()


@pytest.fixture
def page(browser, store):
    """The browser at the page of a fresh database."""
    server = serve(Labeller(store=store, tasks=tasks_of(ROWS), annotator="ann"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    browser.get_log("browser")
    browser.get(server.url)
    until(browser, "Be kind.")
    yield browser
    server.shutdown()
    server.server_close()
    thread.join()


def text(browser) -> str:
    return browser.execute_script("return document.body.innerText")


def until(browser, wanted: str) -> None:
    """Wait until the page says `wanted`."""
    end = time.monotonic() + 20
    while wanted not in text(browser):
        assert time.monotonic() < end, f"{wanted!r} did not come; the page says {text(browser)!r}"
        time.sleep(0.02)


def press(browser, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def ranks(store) -> dict[str, tuple[int, ...]]:
    """Ranks in the order on the screen, by task."""
    tasks = {task.row.id: task for task in tasks_of(ROWS)}
    return {
        found.extra["task"]: tuple(
            found.rank[place] for place in tasks[found.extra["task"]].order("ann")
        )
        for found in store.comparisons()
    }


def test_keys_rank_tie_skip_and_undo_and_nothing_is_logged(page, store):
    press(page, "31")  # the third is best, the first second, the second is left
    until(page, "two?")
    assert ranks(store) == {"three": (2, 3, 1)}
    press(page, "t")
    until(page, "2 of 3")
    assert ranks(store)["two"] == (1, 1)
    press(page, "u")
    until(page, "1 of 3")
    press(page, "2")
    until(page, "2 of 3")
    assert ranks(store)["two"] == (2, 1)
    press(page, "s")
    until(page, "Every prompt is judged")
    assert store.count("ann").skipped == 1
    press(page, "1ts")  # nothing is asked any more
    assert "3 of 3, 1 skipped" in text(page)
    assert page.get_log("browser") == []


def test_after_the_best_of_three_the_others_may_be_tied_and_undo_first_clears_the_screen(
    page, store
):
    press(page, "1")
    until(page, "And of the others?")
    press(page, "u")
    assert page.execute_script("return document.querySelectorAll('[data-rank]').length") == 0
    press(page, "2t")
    until(page, "two?")
    assert ranks(store) == {"three": (2, 1, 2)}


def test_clicks_do_what_keys_do_and_keys_without_meaning_do_nothing(page, store):
    press(page, "9xq0")
    assert ranks(store) == {}
    for place in (2, 0):
        page.execute_script(f"document.querySelectorAll('.answer')[{place}].click()")
    until(page, "two?")
    assert ranks(store) == {"three": (2, 3, 1)}


def test_text_of_a_model_is_shown_and_never_run(page):
    press(page, "s")
    until(page, "two?")
    press(page, "s")
    until(page, "so on")
    shown = page.execute_script(
        "return [document.querySelector('.message').textContent,"
        " ...[...document.querySelectorAll('.text')].map(part => part.textContent)]"
    )
    assert shown[0] == HOSTILE
    assert sorted(shown[1:]) == sorted([HOSTILE, "(empty)"])
    assert page.execute_script("return window.pwned") is None
    assert page.execute_script("return document.images.length") == 0


def test_a_long_prompt_leaves_the_answers_in_sight_and_marks_that_turn_text_are_shown(
    browser, store
):
    turned = "safe \u202egnp.exe\u202c, hidden \u200b"
    row = Comparison(
        prompt="word " * 2000, responses=(turned, "x" * 20_000, "z\n" * 800), id="long"
    )
    server = serve(Labeller(store=store, tasks=tasks_of([row]), annotator="ann"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    browser.get(server.url)
    until(browser, "safe [U+202E]gnp.exe[U+202C], hidden [U+200B]")
    tops = browser.execute_script(
        "return [...document.querySelectorAll('.answer')]"
        ".map(part => part.getBoundingClientRect().top / window.innerHeight)"
    )
    assert min(tops) < 0.7  # in a window of this width the third stands below
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1300
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_page_fits_a_phone(page):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = page.execute_script("return document.documentElement.scrollWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 360


def test_a_server_that_is_gone_is_said_and_nothing_is_lost_silently(browser, store):
    server = serve(Labeller(store=store, tasks=tasks_of(ROWS), annotator="ann"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    browser.get(server.url)
    until(browser, "Be kind.")
    server.shutdown()
    server.server_close()
    thread.join()
    press(browser, "s")
    until(browser, "Not saved")
    assert store.count("ann").skipped == 0
    assert "Be kind." in text(browser)
