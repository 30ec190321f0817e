"""Every flow of the page by the keyboard alone, at two sizes and in two themes, and axe-core over every state of it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, FilePayload, Locator, Page, expect

from calmclip.service import keys
from calmclip.service.settings import Settings
from tests.service.browsing import Draw, Serve
from tests.service.test_page import BROKEN, TABS, opened

SIZES = {"desk": (1200, 900), "phone": (390, 844)}
VARIANTS = [
    pytest.param("phone", "light", id="phone-light"),
    *(
        pytest.param(size, theme, marks=pytest.mark.slow, id=f"{size}-{theme}")
        for size, theme in (("phone", "dark"), ("desk", "light"), ("desk", "dark"))
    ),
]
RING = """() => {
    const shows = (element) => element && getComputedStyle(element).outlineStyle !== "none";
    const focused = document.activeElement;
    return shows(focused) || shows(focused.closest("label")) || focused === document.body;
}"""


class Audit:
    """``wrong``: what axe-core found in each checked state of the page, and states that are wider than the window."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.wrong: list[str] = []

    def __call__(self, state: str) -> None:
        if work := self._page.locator("#work[aria-busy]").all():  # an answer is pale until the next one is there
            expect(work[0]).not_to_have_attribute("aria-busy", "true")
        if not self._page.evaluate("'axe' in window"):
            self._page.evaluate(AXE_SCRIPT)
        for entry in self._page.evaluate(FOUND):
            self.wrong += [
                f"{state}: {entry['id']}: {node['html'][:200]}: {node['failureSummary']}" for node in entry["nodes"]
            ]
        if self._page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            self.wrong.append(f"{state}: wider than the window")


FOUND = "axe.run({ resultTypes: ['violations'] }).then((all) => all.violations)"


def reach(page: Page, wanted: Locator, key: str = "Tab") -> None:
    """Press Tab until ``wanted`` has the focus. Wherever the focus is, it can be seen."""
    expect(wanted).to_be_visible()
    for _ in range(120):
        if wanted.evaluate("element => element === document.activeElement"):
            assert page.evaluate(RING), wanted
            return
        page.keyboard.press(key)
    raise AssertionError(f"the keyboard does not reach {wanted}")


def put(page: Page, files: Locator, *chosen: FilePayload) -> None:
    reach(page, files)
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(list(chosen))


def write(page: Page, field: Locator, text: str, then: str = "") -> None:
    reach(page, field)
    page.keyboard.press("Control+a")
    page.keyboard.type(text)
    if then:
        page.keyboard.press(then)


def press(page: Page, name: str | re.Pattern[str], key: str = "Enter") -> None:
    button = page.get_by_role("button", name=name, exact=True)
    reach(page, button)
    page.keyboard.press(key)


def turn(page: Page, name: str) -> None:
    """Open the next tab."""
    reach(page, page.locator("[role=tab][aria-selected=true]"), "Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name=name)).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_have_count(1)


@contextmanager
def variant(browser: Browser, client: httpx.Client, size: str, theme: Any) -> Iterator[tuple[Page, Audit]]:
    """An open page. At its end, nothing was wrong in any checked state."""
    with opened(browser, client) as page:
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        width, height = SIZES[size]
        page.set_viewport_size({"width": width, "height": height})
        page.on("filechooser", lambda chooser: None)  # else the first one may be lost
        check = Audit(page)
        yield page, check
        assert check.wrong == []


def pictures_are_classified(page: Page, check: Audit, file: Draw) -> None:
    expect(page.get_by_label("Model")).to_have_value("colours-int8")
    answer = page.locator("#answer")
    check("empty")
    press(page, "Classify")
    expect(page.get_by_role("alert").first).to_contain_text("Choose, drop or paste a picture first")
    check("problem")
    put(page, page.get_by_label("Choose a picture"), file("red", "yellow"), file("blue"), BROKEN)
    reach(page, page.get_by_label("Labels"), "Shift+Tab")
    write(page, page.get_by_label("Labels"), "red, blue", "Control+Enter")
    expect(answer.locator("li")).to_have_count(2)
    check("labels")
    press(page, "Classify all 3")
    expect(answer.locator("p")).to_have_text("3 of 3 pictures")
    check("many pictures")
    press(page, "blue.png")
    expect(answer.locator("li").first).to_contain_text("blue")
    reach(page, page.locator("summary", has_text="Show the command"))
    page.keyboard.press("Enter")
    check("command")


def an_example_is_detected(page: Page, check: Audit, file: Draw) -> None:
    answer = page.locator("#answer")
    turn(page, "Detect")
    put(page, page.get_by_label("Add example pictures"), file("blue", "white"))
    press(page, "Draw a box: blue.png")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    check("box")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name=re.compile("^Box"))).to_be_focused()
    reach(page, page.get_by_label("minimum score"), "Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("button", name="Reset to the model's defaults")).to_be_visible()
    reach(page, answer.locator("li").first)
    check("detections")


def other_tasks(page: Page, check: Audit) -> None:
    answer = page.locator("#answer")
    turn(page, "Segment")
    expect(answer.locator("li")).not_to_have_count(0)
    reach(page, answer.get_by_role("checkbox").first)
    page.keyboard.press(" ")
    check("masks")
    turn(page, "Tag")
    write(page, page.get_by_label("Words one"), "red, blue", "Control+Enter")
    expect(answer.locator(".tags li")).not_to_have_count(0)
    check("tags")
    turn(page, "Explain")
    write(page, page.get_by_label("Caption"), "a red and blue thing", "Control+Enter")
    expect(answer.locator("tbody tr")).to_have_count(5)
    check("caption")
    turn(page, "Anomaly")
    expect(answer).to_contain_text("No verdict")
    check("heat map")
    turn(page, "Search")
    check("no collection")


def a_classifier_is_fitted(page: Page, check: Audit, file: Draw, name: str) -> None:
    turn(page, "Fit")
    check("classes")
    for number, label in enumerate(("warm", "cold"), start=1):
        write(page, page.get_by_label(f"Name of class {number}"), label)
        put(page, page.get_by_label(f"Add pictures to class {number}"), *[file(("red", "blue")[number - 1])] * 2)
    reach(page, page.get_by_label("Method", exact=True))
    page.keyboard.type("proto")
    write(page, page.get_by_label("Name of the classifier"), name, "Enter")
    expect(page.locator("#report")).to_contain_text("accuracy after the fit")
    check("fitted")
    press(page, "Try the picture")
    expect(page.locator("#answer").locator("li").first).to_contain_text("cold")
    check("tried")
    reach(page, page.get_by_role("button", name="Keep it"), "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Classify")).to_be_focused()
    check("kept")


@pytest.mark.parametrize(("size", "theme"), VARIANTS)
def test_every_flow_by_the_keyboard(browser: Browser, client: httpx.Client, file: Draw, size: str, theme: str) -> None:
    with variant(browser, client, size, theme) as (page, check):
        pictures_are_classified(page, check, file)
        an_example_is_detected(page, check, file)
        other_tasks(page, check)
        a_classifier_is_fitted(page, check, file, f"{size}-{theme}")
        page.goto(f"{client.base_url}/docs")
        write(page, page.get_by_label("Find"), "classify picture")
        expect(page.locator("#count")).to_contain_text(" of ")
        reach(page, page.locator("article:visible").first.get_by_role("button", name="Copy as curl"))
        check("reference")


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_states_without_a_key_and_empty_tabs(
    browser: Browser, serve: Serve, settings: Callable[..., Settings], tmp_path: Path, theme: str
) -> None:
    secret = keys.add(tmp_path / "keys.json", "reader", ["read"])
    with serve(settings(keys=tmp_path / "keys.json")) as client:
        for size in SIZES:
            with variant(browser, client, size, theme) as (page, check):
                expect(page.locator("#problem")).to_contain_text("a key is needed")
                check("no key")
                write(page, page.get_by_label("API key"), secret, "Enter")
                expect(page.get_by_label("Model")).to_have_value("colours-int8")
                for name in (*TABS[1:], TABS[0]):
                    turn(page, name)
                    check(name)
                page.goto(f"{client.base_url}/docs")
                expect(page.locator("article").first).to_be_visible()
                check("reference")
