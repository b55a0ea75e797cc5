"""The page in Debian's Chromium: every tab from click to result, and what it refuses.  One app serves all tests."""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mmaccel.pocket.pictures import pictures
from tests.demos.browser import chromium, missing, running_app, until
from tests.demos.page import TABS, Page

if lacking := missing():
    pytest.skip(f"NO BROWSER TESTS: {lacking}", allow_module_level=True)

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDTHS = (1280, 390)
ENTER = "\ue007"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def app(models):
    with running_app("--models", str(models), "--upload-megabytes", "1") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(app, browser):
    return Page(browser, app.address)


@pytest.fixture(autouse=True)
def nothing_on_the_console(page):
    yield
    assert page.errors() == []


def shoot(page: Page, name: str) -> None:
    """Pictures of the tab, wide and narrow, light and dark, to be looked at; nothing is wider than the page."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        for shade in ("light", "dark"):
            page.shade(shade)
            assert page.shoot(SHOTS / f"{name}-{width}-{shade}.png", width) <= width
    page.shade("light")


def ask(page: Page) -> None:
    page.press("#ask-run")


def answered(page: Page) -> str:
    """The table, once both sides have answered."""

    def done() -> str:
        table = page.text("#ask-table")
        return table if "visual tokens 1" in table and "…" not in table and page.text("#ask-answer-1 textarea") else ""

    return until(done, "two answers")


def test_the_first_page_costs_less_than_eight_seconds_of_one_processor(app):
    assert 0 < app.cpu_seconds_to_page < 8


def test_a_picture_is_asked_about_twice_and_the_kept_tokens_are_drawn(page):
    ask(page)
    table = answered(page)
    assert "visual tokens 144 36 0.25 x" in table and "first token, ms" in table
    assert (
        page.text("#ask-answer-0 textarea") == dict(pictures("pocket-llava")[0].questions)["what colour is the cross?"]
    )
    assert page.picture("#ask-drawing-0") != page.picture("#ask-drawing-1")
    shoot(page, "ask")


def test_a_wrong_or_a_huge_file_is_refused_and_a_right_one_is_not(page, tmp_path):
    wrong, huge = tmp_path / "wrong.png", tmp_path / "huge.png"
    wrong.write_text("no picture at all")
    huge.write_bytes(os.urandom(2**21))
    page.upload("#ask-picture", wrong)
    assert page.said("this file is no picture of the kinds PNG, JPEG, WEBP")
    until(lambda: page.all("#ask-picture input[type=file]"), "empty field")
    page.upload("#ask-picture", huge)
    assert page.said("maximum allowed size")
    logged = until(lambda: len(found := page.errors()) >= 2 and found, "Gradio's log of what it refused")
    assert all("upload" in error or "Response" in error for error in logged)
    page.upload("#ask-picture", pictures("pocket-llava")[1].file)
    assert page.picture("#ask-picture")
    page.write("#ask-question textarea, #ask-question input", "what shape is the purple thing?")
    ask(page)
    until(lambda: "square" in page.text("#ask-answer-0 textarea"), "an answer about the new picture")
    assert "visual tokens 144" in answered(page)


def test_the_keyboard_alone_asks_and_changes_tabs(page, app):
    page.load(app.address)
    page.reach(page.one("#ask-run")).send_keys(ENTER)
    assert "visual tokens 144 36 0.25 x" in answered(page)
    page.reach(page.tab_button("search")).send_keys(ENTER)
    assert until(page.one("#search-run").is_displayed, "the next tab")


def test_a_search_shows_candidates_curve_and_finalists(page):
    page.tab("search")
    page.write("#search-nfe input[type=number]", "100")
    page.press("#search-run")
    until(lambda: page.all("#search-finalists img"), "finalists")
    assert "denoiser rows (NFE)" in page.text("#search-figures")
    assert len({page.picture(f"#search-{name}") for name in ("candidates", "curve", "best")}) == 3
    shoot(page, "search")


def test_a_stopped_search_returns_the_best_so_far(page):
    page.tab("search")
    page.write("#search-nfe input[type=number]", "2000")
    page.press("#search-run")
    until(lambda: "pictures scored" not in page.text("#search-figures"), "new run")
    until(lambda: "pictures scored" in page.text("#search-figures"), "a first sight")
    page.press("#search-stop")
    until(lambda: "stopped with the best so far" in page.text("#search-figures"), "the end")
    assert page.picture("#search-best")


def test_a_search_that_waits_or_loads_its_model_is_stopped_too(page, app):
    page.load(app.address)
    page.tab("search")
    page.write("#search-nfe input[type=number]", "2000")
    page.press("#search-run")
    page.press("#search-stop")
    assert until(lambda: "stopped with the best so far" in page.text("#search-figures"), "the end")


def test_a_moment_is_found_and_jumped_to(page, browser):
    page.tab("moment")
    page.press("#moment-run")
    until(lambda: page.all("#moment-sheet img"), "a contact sheet")
    assert "verified: blue square 0:4" in page.text("#moment-figures")
    shoot(page, "moment")
    page.press("#moment-sheet button:has(img)")
    where = "return document.querySelector('#moment-film video').currentTime"
    assert until(lambda: browser.execute_script(f"{where} > 40"), "jump")


def test_a_film_that_is_none_is_refused(page, tmp_path):
    page.tab("moment")
    wrong = tmp_path / "wrong.mp4"
    wrong.write_bytes(b"\0\0\0\x18ftypmp42" + os.urandom(1000))
    page.upload("#moment-film", wrong)
    assert page.said("this file cannot be read as a video")


def test_the_painting_tab_colours_the_tokens_of_the_embedded_pair(page, app):
    page.load(app.address)
    page.tab("painting")
    page.press("#painting-run")
    assert page.picture("#painting-origins")
    assert "drafts accepted, share" in page.text("#painting-figures")
    shoot(page, "painting")


def test_the_robot_tab_shows_an_episode_to_its_end(page):
    page.tab("robot")
    page.press("#robot-run")
    figures = until(lambda: "ended" in page.text("#robot-figures") and page.text("#robot-figures"), "the end")
    assert "ended success" in figures and "actions a second" in figures
    assert page.picture("#robot-seen")
    shoot(page, "robot")


def test_two_users_at_once_get_their_own_answers_and_figures(page, app):
    with chromium() as other:
        second = Page(other, app.address)
        page.load(app.address)
        second.write("#ask-budget input[type=number]", "0.5")
        second.write("#ask-question textarea, #ask-question input", "how many squares are there?")
        ask(page), ask(second)
        assert "visual tokens 144 36 0.25 x" in answered(page)
        assert "visual tokens 144 72 0.50 x" in answered(second)
        assert page.text("#ask-answer-0 textarea") == "green" and page.text("#ask-answer-1 textarea") == "green"
        assert second.text("#ask-answer-0 textarea") == "two"
        assert second.errors() == []


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", str(Path(__file__))])
def test_no_path_from_the_browser_opens_a_file_outside(app, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{app.address}gradio_api/file={path}")
    assert refused.value.code in (403, 404)
    config = json.loads(urllib.request.urlopen(f"{app.address}config").read())
    (number,) = [each["id"] for each in config["dependencies"] if each["api_name"] == "ask"]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [file, "what is this?", "pocket-llava", 8, "hired", "settings of your own", 0.25, ""]
    heard = joined(app.address, {"data": data, "fn_index": number, "session_hash": "intruder"})
    assert '"success":false' in heard and "root:" not in heard


def joined(address: str, body: dict[str, object]) -> str:
    """What the queue answers to a call without a browser."""
    call = urllib.request.Request(
        f"{address}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(call).read()
        with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={body['session_hash']}") as stream:
            lines = []
            for line in stream:
                lines.append(line.decode())
                if "process_completed" in lines[-1]:
                    break
            return "".join(lines)
    except urllib.error.HTTPError as error:
        return f'"success":false {error.code}'


def test_the_tabs_are_those_that_the_screenshots_show(page):
    names = {one.get_attribute("textContent").strip() for one in page.all("button[role=tab]")}
    assert names == set(TABS.values())
