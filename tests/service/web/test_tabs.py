"""The page's tabs but Search: where answers stand, boxes on examples, what is remembered, commands of answers."""

import io
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect

from calmclip.models.preprocess.formats import SUFFIXES
from calmclip.service import keys
from calmclip.service.routes.catalog import WEB
from calmclip.service.settings import Settings
from tests.process import installed
from tests.service.browsing import Draw, Serve
from tests.service.test_page import BROKEN, choose, detected, opened, teach

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture
def page(browser: Browser, client: httpx.Client) -> Iterator[Page]:
    with opened(browser, client) as page:
        expect(page.get_by_label("Model")).to_have_value("colours-int8")
        yield page


def opens(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_an_answer_stands_beside_the_picture_and_on_a_phone_below(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, green")
    choose(page, file("red"))
    expect(page.locator("#answer li")).to_have_count(2)
    for name in ("Classify", "Detect", "Segment", "Tag", "Anomaly"):
        opens(page, name)
        expect(page.locator("#answer")).not_to_be_empty()
        for size in (DESK, PHONE):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            picture, answer = page.locator("#stage").bounding_box(), page.locator("#answer").bounding_box()
            if size is DESK:
                assert answer["x"] >= picture["x"] + picture["width"], name
                assert answer["y"] < picture["y"] + picture["height"], name
            else:
                assert answer["y"] >= picture["y"] + picture["height"], name


def test_a_box_is_drawn_on_an_example(page: Page, file: Draw) -> None:
    """320 x 320 pixels, of which the dialog shows each as one of the page; a key moves 2 % of them, so 6."""
    opens(page, "Detect")
    page.get_by_label("Labels").fill("")
    detected(page, lambda: (add(page, file("red", "green", "blue", "white")), choose(page, file("blue"))))
    draw, dialog = page.get_by_role("button", name=re.compile("red.png")).first, page.get_by_role("dialog")
    draw.click()
    frame = page.get_by_label("Box", exact=True)
    expect(frame).to_be_focused()
    place = page.locator("#frame-picture").bounding_box()
    assert (place["width"], place["height"]) == (320, 320)

    def at(x: float, y: float) -> tuple[float, float]:
        return place["x"] + x, place["y"] + y

    def drag(start: tuple[float, float], end: tuple[float, float]) -> list[int]:
        page.mouse.move(*at(*start))
        page.mouse.down()
        page.mouse.move(*at(*end), steps=3)
        page.mouse.up()
        return box()

    def box() -> list[int]:
        left, top, width, height = (int(page.get_by_label(side).input_value()) for side in SIDES)
        return [left, top, left + width, top + height]

    assert drag((20, 180), (140, 300)) == [20, 180, 140, 300]
    assert drag((80, 240), (90, 230)) == [30, 170, 150, 290]  # the middle moves it
    assert drag((150, 170), (170, 150)) == [30, 150, 170, 290]  # a corner changes its size
    assert drag((100, 200), (-200, 900)) == [0, 180, 140, 320]  # it stays in the picture
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowLeft", "Shift+ArrowDown"):
        page.keyboard.press(key)
    assert box() == [6, 174, 140, 320]
    page.get_by_label("width").fill("100")
    page.get_by_label("width").press("Tab")
    assert box() == [6, 174, 106, 320]
    answer = detected(page, lambda: page.get_by_role("button", name="Use the box").click())
    expect(draw).to_be_focused()
    expect(draw).to_have_text("Box 100 by 146")
    assert answer.request.post_data_json["examples"][0]["box"] == [6, 174, 106, 320]
    assert answer.json()["detections"][0]["score"] > 0.99  # the box is in the blue quarter

    draw.press("Enter")
    expect(dialog).to_be_visible()
    page.keyboard.press("Delete")
    expect(page.get_by_role("button", name="Use the box")).to_be_disabled()
    page.keyboard.press("ArrowRight")  # the first one makes a box
    assert box() == [80, 80, 240, 240]
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(draw).to_have_text("Box 100 by 146")
    draw.press("Enter")
    answer = detected(page, lambda: page.get_by_role("button", name="No box").press("Enter"))
    assert sorted(answer.request.post_data_json["examples"][0]) == ["image"]


SIDES = ("left", "top", "width", "height")


def add(page: Page, *files: FilePayload) -> None:
    page.get_by_label("Add example pictures").set_input_files(list(files))


def test_labels_tab_model_and_sliders_are_remembered(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, yellow")
    opens(page, "Segment")
    page.locator("#threshold").fill("0.25")
    opens(page, "Detect")
    page.get_by_label("minimum score").fill("0.4")
    page.get_by_label("hard").check()
    choose(page, file("red"))
    page.reload()
    expect(page.get_by_role("tab", name="Detect")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("Labels")).to_have_value("red, yellow")
    expect(page.get_by_label("hard")).to_be_checked()
    expect(page.locator("output[for=min-score]")).to_have_text("0.40")
    expect(page.locator("#stage")).to_be_hidden()
    sent = detected(page, lambda: choose(page, file("red"))).json()["suppression"]
    assert (sent["min_score"], sent["method"], sent["sigma"]) == (0.4, "hard", 0.5)
    expect(page.locator("output[for=threshold]")).to_have_text("0.25")
    kept = page.evaluate("Object.entries(localStorage)")
    assert [name for name, _ in kept] == ["calmclip"]
    assert file("red")["name"] not in kept[0][1]

    page.get_by_role("button", name="Reset to the model's defaults").click()
    page.reload()
    expect(page.locator("output[for=min-score]")).to_have_text("0.15")
    page.get_by_role("button", name="Forget my entries").click()
    expect(page.get_by_label("Labels")).to_have_value(re.compile("a dog"))
    assert page.evaluate("localStorage.length") == 0


def test_a_page_without_storage_works(browser: Browser, client: httpx.Client, file: Draw) -> None:
    with opened(browser, client) as page:
        page.add_init_script(
            "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no'); } })"
        )
        page.reload()
        page.get_by_label("Labels").fill("red")
        choose(page, file("red"))
        expect(page.locator("#answer li")).to_have_text([re.compile("red")])


ODD = 'it\'s 1, "2"; $HOME `id` \\.png'  # the name of a file that a shell would change


def test_each_tabs_command_gives_the_answer_that_is_shown(
    browser: Browser, serve: Serve, settings: Callable[..., Settings], tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    """The command is run by bash in the folder of the pictures; the key is in a variable."""
    installed("curl", "commands of the page")
    folder, file = tmp_path / "pictures", tmp_path / "keys.json"
    folder.mkdir()
    for name, colours in ((ODD, ["red", "blue"]), ("green.png", ["green"]), ("blue.png", ["blue"])):
        (folder / name).write_bytes(picture(*colours, size=(64, 64)))
    secret = keys.add(file, "writer", ["read", "write"])
    with serve(settings(keys=file)) as client, opened(browser, client) as page:
        page.get_by_label("API key").fill(secret)
        page.get_by_label("API key").press("Enter")
        expect(page.get_by_label("Model")).to_have_value("colours-int8")

        def check(path: str, act: Callable[[], object]) -> None:
            expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
            with page.expect_response(path) as waiting:
                act()
            shown = waiting.value.json()
            expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
            command = page.locator("#command").text_content() or ""
            assert secret not in command
            environment = {**os.environ, "CALMCLIP_API_KEY": secret}
            bash = ["bash", "-c", command]
            run = subprocess.run(bash, check=True, cwd=folder, env=environment, capture_output=True, timeout=30)
            assert stable(json.loads(run.stdout)) == stable(shown), command

        page.get_by_label("Labels").fill("red\n$HOME, it's a `blue`\\")
        check("**/v1/classify", lambda: page.get_by_label("Choose a picture").set_input_files(folder / ODD))
        opens(page, "Detect")
        page.get_by_label("Add example pictures").set_input_files(folder / "blue.png")
        expect(page.locator("#example-list li")).to_have_count(1)
        page.get_by_label("Name for blue.png").fill('"a $blue` thing\\')
        check("**/v1/detect", page.get_by_role("button", name="Detect", exact=True).click)
        check("**/v1/segment", lambda: opens(page, "Segment"))
        opens(page, "Tag")
        page.get_by_label("Words one").fill("red, blue")
        check("**/v1/tag", page.get_by_role("button", name="Tag", exact=True).click)
        opens(page, "Explain")
        page.get_by_label("Caption").fill("a red\n thing")
        check("**/v1/explain", page.get_by_role("button", name="Explain", exact=True).click)
        check("**/v1/anomaly", lambda: opens(page, "Anomaly"))
        opens(page, "Fit")
        for number, name in enumerate(("green", "blue"), start=1):
            page.get_by_label(f"Name of class {number}").fill(name)
            page.get_by_label(f"Add pictures to class {number}").set_input_files(folder / f"{name}.png")
        page.get_by_label("Method", exact=True).select_option("prototype")
        page.get_by_label("Name of the classifier").fill("mine")
        with page.expect_response("**/fit"):
            page.get_by_role("button", name="Fit", exact=True).click()
        check("**/fit", page.get_by_role("button", name="Fit", exact=True).click)  # it replaces the first one
        opens(page, "Classify")
        page.get_by_label("Choose a picture").set_input_files([folder / "green.png", folder / ODD])
        expect(page.get_by_role("button", name="Classify all 2")).to_be_visible()
        check("**/v1/classify", page.get_by_role("button", name="Classify all 2").click)


def stable(answer: object) -> object:
    """The answer without what differs between equal requests: times and versions."""
    if isinstance(answer, dict):
        left_out = ("seconds", "version", "created", "updated")
        return {name: stable(value) for name, value in answer.items() if name not in left_out}
    return [stable(value) for value in answer] if isinstance(answer, list) else answer


def test_a_command_is_copied(browser: Browser, client: httpx.Client, page: Page, file: Draw) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose(page, file("red"))
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#command").text_content()
    assert "Authorization" not in copied
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as without TLS
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    expect(page.get_by_role("region", name="Command")).to_be_visible()
    opens(page, "Search")
    expect(page.get_by_role("button", name="Copy as curl")).to_be_hidden()


def test_all_chosen_pictures_are_classified(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, green, blue")
    every = page.get_by_role("button", name=re.compile("Classify all"))
    choose(page, file("red"))
    expect(page.locator("#answer li")).to_have_count(3)
    expect(every).to_be_hidden()
    files = [file(("red", "green", "blue")[i % 3]) for i in range(17)]
    choose(page, *files[:16], BROKEN)
    expect(every).to_have_text("Classify all 17")
    every.click()
    rows = page.locator("#answer li")
    expect(page.locator("#answer p")).to_have_text("17 of 17 pictures")
    expect(rows).to_have_count(17)
    assert [text.split()[1] for text in rows.all_inner_texts()[:16]] == ["red", "green", "blue"] * 5 + ["red"]
    expect(rows.last).to_contain_text("no picture we read")
    assert (page.locator("#command").text_content() or "").count("curl ") == 1  # the broken one has no answer


def test_normal_pictures_are_asked_for_if_there_is_no_verdict(page: Page, file: Draw) -> None:
    opens(page, "Fit")
    teach(page, 1, "cup", file("red"))
    page.get_by_label("Name of class 2").fill("plate")
    opens(page, "Anomaly")
    choose(page, file("red"))
    page.get_by_role("button", name="Fit some normal pictures, for a verdict").click()
    expect(page.get_by_role("tab", name="Fit")).to_be_focused()
    expect(page.get_by_label("Method", exact=True)).to_have_value("memory")
    first, second = page.get_by_label("Name of class 1"), page.get_by_label("Name of class 2")
    expect(first).to_have_value("normal")
    expect(second).to_have_value("damaged")
    expect(second).not_to_be_editable()
    page.get_by_label("Name of the classifier").fill("good-cups")
    page.get_by_role("button", name="Fit", exact=True).click()  # without a damaged picture
    expect(page.locator("#report")).to_contain_text("good-cups")
    page.get_by_role("button", name="Throw it away").click()
    expect(page.locator("#fitted")).to_be_hidden()
    page.get_by_label("Method", exact=True).select_option("prototype")
    expect(first).to_have_value("cup")
    expect(second).to_have_value("plate")
    expect(second).to_be_editable()


def test_a_picture_that_the_browser_cannot_show_is_sent(page: Page) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "TIFF")
    page.get_by_label("Labels").fill("red, blue")
    with page.expect_response("**/v1/classify"):
        choose(page, {"name": "red.TIFF", "mimeType": "", "buffer": file.getvalue()})
    expect(page.locator("#unseen")).to_be_visible()


def test_every_field_of_files_offers_the_formats_that_are_read(page: Page) -> None:
    accepted = page.locator("input[type=file][accept]").evaluate_all("all => all.map((field) => field.accept)")
    assert len(accepted) >= 5  # the picture, examples, uploads and two classes
    assert {*accepted} == {",".join(("image/*", *SUFFIXES))}


def test_the_pages_files_are_sent_once(client: httpx.Client) -> None:
    for file in sorted(WEB.iterdir()):
        path = "/" if file.name == "index.html" else f"/{file.name.removesuffix('.html')}"
        first = client.get(path)
        assert first.content == file.read_bytes(), path
        for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
            again = client.get(path, headers={"if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"]), path
        assert client.get(path, headers={"if-none-match": '"other"'}).content == first.content
