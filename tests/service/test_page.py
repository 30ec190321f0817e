"""The page in a real browser, over a real service with answers known by hand (see conftest.py)."""

import base64
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, Response, expect

from calmclip.models.bundle.store import Sealed
from calmclip.service import keys
from calmclip.service.hub import Hub
from calmclip.service.indexing import index
from calmclip.service.settings import Settings
from tests.service.browsing import Draw, Serve

BROKEN: FilePayload = {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
TABS = ("Classify", "Detect", "Segment", "Tag", "Explain", "Anomaly", "Search", "Fit")


@pytest.fixture
def page(browser: Browser, client: httpx.Client) -> Iterator[Page]:
    with opened(browser, client) as page:
        expect(page.get_by_label("Model")).to_have_value("colours-int8")
        yield page


@contextmanager
def opened(browser: Browser, client: httpx.Client) -> Iterator[Page]:
    """The open page. At the end: no request went to another host, and no script or policy error occurred."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(10_000)
    requested: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and "Failed to load" not in m.text else None)
    page.goto(str(client.base_url))
    yield page
    context.close()
    allowed = (str(client.base_url), "blob:", "data:")
    assert [url for url in requested if not url.startswith(allowed)] == []
    assert wrong == []


CUSTOM = {"min_score": 0.123, "sigma": 3.0, "method": "hard", "per_class": False}  # outside the sliders' steps or range


@pytest.fixture(scope="module")
def several(
    owl_bundles: Path, bundle_maker: Callable[..., Sealed], serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A service of an OWLv2 and three bundles of colours: unchanged, with custom suppression, and without detect."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(owl_bundles / "owl-int8", folder / "bundles" / "owl-int8")
    changed = {"colours-int8": {}, "custom-int8": {"suppression": CUSTOM}, "words": {"tasks": ["classify"]}}
    for name, changes in changed.items():
        manifest = bundle_maker(folder / "bundles", name).directory / "bundle.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))
    with serve(Settings(bundles_dir=folder / "bundles", data_dir=folder / "data", threads=1)) as client:
        yield client


@pytest.fixture
def models(browser: Browser, several: httpx.Client) -> Iterator[Page]:
    """The page over several models, with the tab Detect open."""
    with opened(browser, several) as page:
        expect(page.get_by_label("Model")).to_have_value("colours-int8")
        page.get_by_role("tab", name="Detect").click()
        yield page


def detected(page: Page, act: Callable[[], object]) -> Response:
    """The answer of the detect request that ``act`` starts, after all earlier requests ended."""
    expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
    with page.expect_response("**/v1/detect") as waiting:
        act()
    assert waiting.value.status == 200, waiting.value.text()
    return waiting.value


def used(response: Response) -> dict[str, object]:
    suppression = response.json()["suppression"]
    return {name: suppression[name] for name in CUSTOM}


def choose(page: Page, *files: FilePayload) -> None:
    page.get_by_label("Choose a picture").set_input_files(list(files))


def opaque(page: Page, x: int, y: int, canvas: str = "boxes") -> bool:
    """Whether the overlay covers this pixel of the picture."""
    script = "([x, y, id]) => document.getElementById(id).getContext('2d').getImageData(x, y, 1, 1).data[3]"
    return bool(page.evaluate(script, [x, y, canvas]))


def test_labels_become_bars_and_the_stages_are_shown(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, green\nblue")
    choose(page, file("blue"))
    bars = page.locator("#answer li")
    expect(bars).to_have_count(3)
    # cosines 1, 0, 0 times the head's 10: softmax e^10 / (e^10 + 2) = 99.99 %
    expect(bars.first).to_have_text(re.compile(r"blue\s*100\.0 %"))
    widths = bars.locator("i").evaluate_all("all => all.map((bar) => bar.getBoundingClientRect().width)")
    full = bars.first.bounding_box()["width"]
    assert widths[0] == pytest.approx(full, rel=0.01)
    assert max(widths[1:]) < 5
    stages = page.locator("#stages")
    expect(stages).to_contain_text(re.compile(r"decode \d+\.\d"))
    expect(stages).to_contain_text(re.compile(r"infer \d+\.\d"))
    assert page.locator("#bar i").count() == page.locator("#stages span").count()


def test_boxes_are_drawn_where_the_colours_are_and_follow_the_sliders(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, blue")
    page.get_by_role("tab", name="Detect").click()
    page.get_by_label("minimum score").fill("0.3")
    choose(page, file("red", "green", "blue", "white"))
    rows = page.locator("#answer li")
    # red 1, blue 1, and white is 1 / sqrt(3) = 0.58 of either, less what the resize mixes at the edges
    expect(rows).to_have_text([re.compile(p) for p in ("red1.00", "blue1.00", "0.5[78]", "0.5[78]")])
    assert opaque(page, 240, 160)  # the white quarter's upper edge
    page.get_by_label("minimum score").fill("0.9")
    expect(rows).to_have_count(2)
    assert opaque(page, 160, 80)  # the red quarter's right edge
    assert opaque(page, 160, 240)  # the blue quarter's
    assert not opaque(page, 80, 80)
    assert not opaque(page, 240, 240)
    expect(page.get_by_label("IoU threshold")).to_be_disabled()
    page.get_by_label("linear").check()
    expect(page.locator("#answer p")).to_contain_text("kept by linear")
    expect(page.get_by_label("IoU threshold")).to_be_enabled()
    expect(page.get_by_label("sigma")).to_be_disabled()


def test_words_of_a_picture_and_of_its_regions(page: Page, file: Draw) -> None:
    page.get_by_role("tab", name="Tag").click()
    page.get_by_label("Words one").fill("red, blue\ngreen")
    page.get_by_label("Words one").press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("Choose, drop or paste a picture first")
    choose(page, file("red", "red", "red", "blue"))
    # of the whole, 3 red quarters and a blue one: 3 / sqrt(10) = .95 and 1 / sqrt(10) = .32
    expect(page.locator("#answer .tags li")).to_have_text(
        [re.compile(r"red\s*0\.9[45]"), re.compile(r"blue\s*0\.3[12]")]
    )
    expect(page.locator("#answer q")).to_have_text("a photo of red and blue")
    expect(page.locator("#answer")).to_contain_text("the best words in a fixed sentence")
    rows = page.locator("#answer .detections li")
    expect(rows.filter(has_text="blue").first).to_have_text(re.compile(r"blue1\.00"))
    assert opaque(page, 160, 240)  # the blue quarter's left edge
    rows.first.focus()
    assert opaque(page, 240, 160)


def test_masks_cover_their_labels_and_are_turned_off_and_faded(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, blue")
    page.get_by_role("tab", name="Segment").click()
    page.get_by_label("Background").fill("green")
    choose(page, file("red", "red", "blue", "blue"))
    # both labels are equally likely in the middle
    half = [re.compile(rf"{label}\d\.\d\d50\.0 %") for label in ("red", "blue")]
    expect(page.locator("#answer li").filter(has_text="red")).to_have_text(half[0])
    expect(page.locator("#answer li").filter(has_text="blue")).to_have_text(half[1])
    places = {"red": (40, 158), "blue": (280, 162)}

    def covered() -> set[str]:
        return {name for name, (x, y) in places.items() if opaque(page, x, y, "masks")}

    assert covered() == {"red", "blue"}
    page.get_by_role("checkbox", name="red", exact=True).uncheck()
    assert covered() == {"blue"}
    page.get_by_label("opacity").fill("0.25")
    expect(page.locator("#masks")).to_have_css("opacity", "0.25")
    with page.expect_response("**/v1/segment"):
        page.get_by_label("each label alone").check()
    expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("checkbox", name="red", exact=True)).not_to_be_checked()
    expect(page.locator("output[for=threshold]")).to_have_text("0.50")
    page.get_by_label("Labels").fill("green")
    page.get_by_label("Background").fill("red\nblue")
    page.get_by_label("Background").press("Control+Enter")
    expect(page.locator("#answer")).to_have_text("No label fits a part of the picture.")
    assert covered() == set()
    expect(page.get_by_label("opacity")).to_be_hidden()


def test_a_caption_is_coloured_and_its_wrong_word_is_marked(page: Page, file: Draw) -> None:
    page.get_by_role("tab", name="Explain").click()
    choose(page, file("red"))
    expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("alert")).to_be_empty()  # nothing was asked yet
    page.get_by_role("button", name="Explain", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("Enter a caption first")
    page.get_by_label("Caption").fill("🎈 a red  and\nblue thing.")
    page.get_by_label("Caption").press("Control+Enter")
    caption = page.locator("#answer .caption")
    expect(caption).to_have_text("🎈 a red and blue thing.", use_inner_text=True)
    expect(caption.locator("mark")).to_have_text("blue")
    # cosine 1 / sqrt(2); without "blue" 1, without "red" 0
    shares = caption.locator(".tint").evaluate_all(
        "all => all.map((word) => [word.textContent, word.classList[1], word.style.getPropertyValue('--share')])"
    )
    shown = {word: (side, float(share.removesuffix("%"))) for word, side, share in shares}
    assert (len(shares), shown["red"]) == (6, ("for", 100))
    assert shown["blue"] == ("against", pytest.approx(100 * (np.sqrt(2) - 1), abs=0.01))
    assert {shown[word][1] for word in ("🎈", "a", "and", "thing")} == {0}
    rows = page.locator("#answer tbody tr")
    expect(rows).to_have_count(6)
    expect(rows.filter(has_text="blue")).to_have_text(re.compile(r"blue(\s*\u22120\.293){2}\s*flagged"))
    expect(rows.filter(has_text="red")).to_have_text(re.compile(r"red(\s*\+0\.707){2}\s*$"))
    expect(page.locator("#answer .scale")).to_contain_text(re.compile(r"\u22120\.707\s*0\s*\+0\.707"))
    expect(page.locator("#answer")).to_contain_text("cosine 0.707 · CLIPScore 1.768 · F-CLIPScore 1.036")
    expect(page.get_by_label("Explain by")).to_be_hidden()  # there is one method
    page.set_viewport_size({"width": 360, "height": 740})
    page.get_by_label("Caption").fill(f"a red {'x' * 90} thing")
    page.get_by_label("Caption").press("Control+Enter")
    expect(rows).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


# Machado, Oliveira and Fernandes 2009, table 1, severity 1: linear RGB as colour-blind people see it
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
RGB = """(name) => {
    const element = Object.assign(document.createElement("i"), { className: name });
    document.querySelector("main section").append(element);
    const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    element.style.setProperty("--share", "100%");
    pen.fillStyle = getComputedStyle(element)[name ? "backgroundColor" : "color"];
    pen.fillRect(0, 0, 1, 1);
    element.remove();
    return [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}"""


def test_the_colours_of_words_can_be_told_apart_and_read(page: Page) -> None:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        values = np.array([page.evaluate(RGB, name) for name in ("tint for", "tint against", "")]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        *tints, text = linear @ to_xyz[1]
        for tint in tints:  # WCAG 2.2, 1.4.3
            assert (max(tint, text) + 0.05) / (min(tint, text) + 0.05) >= 4.5
        for matrix in (np.eye(3), *map(np.array, BLINDNESS.values())):
            xyz = np.clip(linear[:2] @ matrix.T, 0, 1) @ to_xyz.T / [0.9505, 1.0, 1.089]
            root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
            lab = np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], 1)
            assert np.linalg.norm(lab[0] - lab[1]) > 20  # CIE 1976; 2.3 is just noticeable


def test_a_model_with_several_methods_offers_them(page: Page, client: httpx.Client, file: Draw) -> None:
    """The bundle has one method; the catalogue is changed on its way, so the service refuses the other."""
    methods = ["gradient", "leave_one_out"]
    catalogue = client.get("/v1/models").json()
    catalogue["models"][0]["explanation"]["methods"] = methods
    page.route("**/v1/models", lambda route: route.fulfill(json=catalogue))
    page.reload()
    page.get_by_role("tab", name="Explain").click()
    choose(page, file("red"))
    expect(page.get_by_label("Explain by")).to_have_text("".join(methods))
    page.get_by_label("Caption").fill("red")
    page.get_by_role("button", name="Explain", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("no graph 'attribution'")
    page.get_by_label("Explain by").select_option("leave_one_out")
    expect(page.locator("#answer .caption")).to_have_text("red")


def test_a_heat_map_shows_where_a_picture_looks_damaged(page: Page, file: Draw) -> None:
    page.get_by_role("tab", name="Anomaly").click()
    page.get_by_label("Thing").fill("bottle")
    choose(page, file("red"))
    # no word of the states is known, so both are alike
    expect(page.locator("#answer li")).to_have_text(re.compile(r"anomaly score\s*50\.0 %"))
    expect(page.locator("#answer p")).to_contain_text("No verdict, because no threshold is known. Method: text")
    assert opaque(page, 160, 160, "masks")
    page.get_by_role("tab", name="Classify").click()
    assert not opaque(page, 160, 160, "masks")


def test_normal_pictures_are_fitted_and_a_picture_is_compared_with_them(page: Page, file: Draw) -> None:
    page.get_by_role("tab", name="Fit").click()
    page.get_by_label("Method").select_option("memory")
    expect(page.get_by_label("Name of class 1")).to_have_value("normal")
    page.get_by_label("Add pictures to class 1").set_input_files([file("red"), file("yellow")])
    page.get_by_label("Name of the classifier").fill("goods")
    page.get_by_label("Name of the classifier").press("Enter")
    expect(page.locator("#report")).to_contain_text("threshold 0.1464")  # (1 - sqrt(1/2)) / 2
    choose(page, file("blue"))
    expect(page.locator("#answer li")).to_have_text(re.compile(r"anomaly score\s*50\.0 %"))  # (1 - cosine) / 2
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("#answer")).to_contain_text("The tab Anomaly uses it now")
    page.get_by_role("tab", name="Anomaly").click()
    expect(page.get_by_label("or the normal pictures of")).to_have_value("goods")
    expect(page.locator("#answer p")).to_have_text("Damaged by a threshold of 0.146. Method: memory.")
    page.get_by_role("tab", name="Classify").click()
    expect(page.get_by_role("option", name="goods", include_hidden=True)).to_have_count(1)  # not a classifier of labels


def test_a_box_label_does_not_hide_another(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, yellow")  # 1 and 1 / sqrt(2), both of the red quarter's box
    page.get_by_role("tab", name="Detect").click()
    choose(page, file("blue", "blue", "blue", "red"))
    expect(page.locator("#answer li")).to_have_count(2)
    assert opaque(page, 165, 150)  # red, over the box's corner
    assert opaque(page, 165, 175)  # yellow, under it
    assert not opaque(page, 165, 190)


def teach(page: Page, number: int, name: str, *files: FilePayload) -> None:
    page.get_by_label(f"Name of class {number}").fill(name)
    page.get_by_label(f"Add pictures to class {number}").set_input_files(list(files))


def test_a_classifier_is_fitted_to_pictures_tried_and_kept(page: Page, file: Draw, client: httpx.Client) -> None:
    page.get_by_role("tab", name="Fit").click()
    teach(page, 1, "warm", file("red"))
    page.locator(".class .drop").first.evaluate(
        TRANSFER, [list(file("red", "yellow")["buffer"]), "drop", "dataTransfer"]
    )
    noise = np.zeros((800, 1200, 3), np.uint8)
    noise[..., 2] = np.random.default_rng(0).integers(128, 256, (800, 1200))  # compresses badly
    large = io.BytesIO()
    Image.fromarray(noise).save(large, "PNG")
    huge: FilePayload = {"name": "huge.png", "mimeType": "image/png", "buffer": large.getvalue()}
    teach(page, 2, "cold", file("blue"), file("red"), huge)
    expect(page.get_by_role("group", name="Class 2: 3 pictures")).to_be_visible()
    page.get_by_role("button", name="Remove red.png").last.click()
    expect(page.get_by_role("group", name="Class 2: 2 pictures")).to_be_visible()

    page.get_by_label("Method").select_option("prototype")
    page.get_by_label("Name of the classifier").fill("mine")
    with page.expect_request("**/v1/classifiers/mine/fit") as sent:
        page.get_by_role("button", name="Fit", exact=True).click()
    body = sent.value.post_data_json
    assert ([item["label"] for item in body["items"]], body["replace"]) == (["warm", "warm", "cold", "cold"], False)
    pictures = [base64.b64decode(item["image"]["b64"]) for item in body["items"]]
    assert pictures[2] == file("blue")["buffer"]
    assert Image.open(io.BytesIO(pictures[3])).size == (1024, 683)
    # the words of both labels are unknown, so all pictures are "warm" before the fit
    bars = page.locator("#report li")
    expect(bars).to_have_text([re.compile(r"before.*50\.0 %"), re.compile(r"after.*100\.0 %")])
    expect(page.locator("#report")).to_contain_text("measured by 2-fold cross-validation")

    choose(page, file("blue", "green"))
    expect(page.locator("#answer li").first).to_have_text(re.compile("cold"))
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("#fitted")).to_be_hidden()
    page.get_by_role("tab", name="Classify").click()
    expect(page.get_by_label("or a registered classifier")).to_have_value("mine")
    expect(page.locator("#answer li").first).to_have_text(re.compile("cold"))

    page.get_by_role("tab", name="Fit").click()
    page.get_by_label("Name of the classifier").fill("mine")
    page.get_by_label("Name of the classifier").press("Enter")  # what is kept is not replaced
    expect(page.get_by_role("alert")).to_contain_text("there is a classifier 'mine' already")
    assert client.get("/v1/classifiers/mine").json()["version"] == 1
    page.get_by_label("Name of the classifier").fill("other")
    page.get_by_label("Name of the classifier").press("Enter")
    expect(page.locator("#report")).to_contain_text("other: 4 pictures of 2 classes")
    page.get_by_role("button", name="Fit", exact=True).click()  # what waits for a decision is
    expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("alert")).to_be_empty()
    page.get_by_role("button", name="Throw it away").click()
    expect(page.locator("#answer")).to_have_text("other was thrown away.")
    assert client.get("/v1/classifiers/other").status_code == 404


def test_a_fit_says_what_is_missing(page: Page, file: Draw) -> None:
    problem, fit = page.get_by_role("alert"), page.get_by_role("button", name="Fit", exact=True)
    page.get_by_role("tab", name="Fit").click()
    page.get_by_label("Name of the classifier").fill("lacking")
    fit.click()
    expect(problem).to_contain_text("Add some pictures to each class first")
    page.get_by_label("Name of class 1").fill("warm")
    fit.click()
    expect(problem).to_contain_text("Add a picture to the class warm")
    teach(page, 1, "", file("red"))
    fit.click()
    expect(problem).to_contain_text("Enter a name for class 1")
    page.get_by_label("Name of class 1").fill("warm")
    fit.click()
    expect(problem).to_contain_text("expected at least 2 labels")
    page.get_by_role("button", name="Add a class").click()
    expect(page.get_by_label("Name of class 3")).to_be_focused()
    page.get_by_role("button", name="Remove class 2").click()
    expect(page.get_by_role("button", name="Add a class")).to_be_focused()
    expect(page.get_by_role("group", name="Class 2: 0 pictures")).to_be_visible()


def test_an_indexed_folder_shows_its_pictures(page: Page, file: Draw, client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "green.png").write_bytes(file("green")["buffer"])
    (tmp_path / "broken.png").write_bytes(BROKEN["buffer"])
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (128, 128, 3))  # compresses badly
    Image.fromarray(noise).save(tmp_path / "noise.png")
    turned, tags = Image.new("RGB", (512, 64), "blue"), Image.Exif()
    tags[0x0112] = 6  # Orientation: a quarter to the right
    turned.save(tmp_path / "blue.jpg", exif=tags)

    def run() -> dict[str, object]:  # in another thread: this thread has Playwright's event loop
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(index, tmp_path, "folder", url=str(client.base_url)).result()

    first, second = run(), run()
    assert ([entry["id"] for entry in first["broken"]], first["added"], second["skipped"]) == (["broken.png"], 3, 3)
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Collection", exact=True).select_option("folder")
    page.get_by_label("Search for").fill("a photo of a green thing")
    page.get_by_label("Search for").press("Enter")
    hits = page.locator("#answer li")
    expect(hits).to_have_text([re.compile(name) for name in ("green.png", "noise.png", "blue.jpg")])
    size = "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
    assert [hits.nth(i).locator("img").evaluate(size) for i in range(3)] == [
        [107, 107],
        [128, 128],
        [16, 128],
    ]  # of 320


def test_a_page_opened_while_models_load_finds_them_later(
    browser: Browser, serve: Serve, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, plain = threading.Event(), Hub._open
    monkeypatch.setattr(Hub, "_open", lambda *arguments: gate.wait(10) and plain(*arguments))
    with serve(settings(), ready=False) as client:
        page = browser.new_page()
        page.goto(str(client.base_url))
        expect(page.get_by_label("Model")).to_have_text("none loaded yet")
        gate.set()
        expect(page.get_by_label("Model")).to_have_value("colours-int8")
        page.close()


def test_sliders_start_at_the_defaults_of_the_api(page: Page, client: httpx.Client) -> None:
    fields = client.get("/openapi.json").json()["components"]["schemas"]["DetectBody"]["properties"]
    sliders = page.locator("#detect input[type=range]").evaluate_all("all => all.map((one) => [one.name, one.value])")
    assert {name: float(value) for name, value in sliders} == {
        name: fields[name]["default"] for name in ("sigma", "iou_threshold", "min_score")
    }


def test_a_models_settings_apply_until_a_slider_is_moved(models: Page, file: Draw) -> None:
    least, beside = models.get_by_label("minimum score"), models.locator("output[for=min-score]")
    reset = models.get_by_role("button", name="Reset to the model's defaults")
    models.get_by_label("Labels").fill("red")
    detected(models, lambda: choose(models, file("red")))
    usual = {"min_score": 0.15, "sigma": 0.5, "method": "gaussian", "per_class": True}
    switch = models.get_by_label("Model").select_option
    assert used(detected(models, lambda: switch("owl-int8"))) == usual | {"min_score": 0.1}  # from its manifest
    expect(beside).to_have_text("0.10")
    assert used(detected(models, lambda: switch("custom-int8"))) == CUSTOM
    expect(beside).to_have_text("0.123")
    expect(models.get_by_label("hard")).to_be_checked()
    expect(models.get_by_label("suppress each label separately")).not_to_be_checked()
    expect(reset).to_be_hidden()

    assert used(detected(models, lambda: least.fill("0.4"))) == CUSTOM | {"min_score": 0.4}
    expect(beside).to_have_text("0.40")
    assert used(detected(models, lambda: models.get_by_label("gaussian").check())) == CUSTOM | {
        "min_score": 0.4,
        "method": "gaussian",
    }
    expect(models.locator("output[for=sigma]")).to_have_text("3.00")  # beyond the slider's range
    assert used(detected(models, reset.click)) == CUSTOM
    expect(reset).to_be_hidden()
    expect(models.get_by_label("hard")).to_be_focused()

    detected(models, lambda: least.fill("0.4"))
    assert used(detected(models, lambda: switch("colours-int8"))) == usual
    expect(beside).to_have_text("0.15")


def test_examples_are_detected_with_or_without_labels(models: Page, file: Draw) -> None:
    models.get_by_label("Labels").fill("red")
    models.get_by_label("minimum score").fill("0.9")
    detected(models, lambda: choose(models, file("red", "green", "green", "blue")))
    rows = models.locator("#answer li")
    expect(rows).to_have_text([re.compile("red1.00")])
    expect(models.get_by_role("group", name="Examples")).to_contain_text("At most 8")
    expect(models.get_by_role("group", name="Examples")).to_contain_text("Without a box")

    sent = detected(models, lambda: add(models, file("white"), file("blue"))).request.post_data_json
    assert [sorted(entry) for entry in sent["examples"]] == [["image"], ["image"]]
    assert base64.b64decode(sent["examples"][1]["image"]["b64"]) == file("blue")["buffer"]
    assert sorted({*sent} - {"image", "examples"}) == ["labels", "min_score", "model"]
    expect(rows).to_have_text([re.compile("red1.00"), re.compile("example 11.00")])
    name = models.get_by_label("Name for blue.png")
    expect(name).to_have_attribute("placeholder", "example 1")
    name.fill("mine")
    detected(models, lambda: name.press("Enter"))
    expect(rows).to_have_text([re.compile("red1.00"), re.compile("mine1.00")])

    detected(models, models.get_by_role("button", name="Remove white.png").click)
    expect(models.get_by_label("Add example pictures")).to_be_focused()
    expect(name).to_have_attribute("placeholder", "example 0")
    models.get_by_label("Labels").fill("")
    detections = detected(models, models.get_by_role("button", name="Detect").click).json()["detections"]
    assert [(entry["label"], entry["index"]) for entry in detections] == [("mine", 0)]
    expect(rows).to_have_text([re.compile("mine1.00")])
    assert opaque(models, 160, 240)  # the blue quarter's left edge
    assert not opaque(models, 160, 80)


def add(page: Page, *files: FilePayload) -> None:
    page.get_by_label("Add example pictures").set_input_files(list(files))


def test_an_owl_detector_finds_its_example(models: Page, photographs: dict[str, Path]) -> None:
    models.get_by_label("Model").select_option("owl-int8")
    models.get_by_label("Labels").fill("")
    models.get_by_label("Add example pictures").set_input_files(photographs["rocket"])
    models.get_by_label("Name for rocket.jpg").fill("this")
    models.get_by_label("Choose a picture").set_input_files(photographs["rocket"])
    rows = models.locator("#answer li")
    expect(rows.first).to_have_text(re.compile(r"this0\.\d\d"))
    assert {row[:4] for row in rows.all_inner_texts()} == {"this"}


def test_examples_are_shown_if_the_model_detects(models: Page, file: Draw) -> None:
    models.get_by_label("Labels").fill("red")
    detected(models, lambda: choose(models, file("red")))
    detected(models, lambda: add(models, file("blue")))
    models.get_by_label("Model").select_option("words")  # it does not serve detect, so another tab opens
    expect(models.get_by_role("tab", name="Classify")).to_have_attribute("aria-selected", "true")
    expect(models.locator("#answer li")).to_have_text([re.compile("red")])
    models.get_by_role("tab", name="Detect").click()
    expect(models.get_by_role("alert")).to_contain_text("does not serve 'detect'")
    expect(models.get_by_role("group", name="Examples")).to_be_hidden()
    answer = detected(models, lambda: models.get_by_label("Model").select_option("colours-int8"))
    assert len(answer.request.post_data_json["examples"]) == 1


def test_nine_examples_are_refused_with_a_message(models: Page, file: Draw) -> None:
    detected(models, lambda: choose(models, file("red")))
    add(models, *[file("blue")] * 9)
    expect(models.get_by_role("alert")).to_contain_text("9 examples were given; at most 8 are read")
    detected(models, models.get_by_role("button", name="Remove blue.png").first.click)
    expect(models.get_by_role("alert")).to_be_empty()


# drops a PNG on an element, or pastes it there
TRANSFER = """(element, [bytes, event, carrier, name = ""]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    const Kind = event === "paste" ? ClipboardEvent : DragEvent;
    element.dispatchEvent(new Kind(event, { [carrier]: data, cancelable: true, bubbles: true }));
}"""


def test_a_file_dropped_or_pasted_in_the_zone_of_examples_is_an_example(models: Page, file: Draw) -> None:
    zone = models.locator("#examples .drop")
    for number, (event, carrier) in enumerate((("drop", "dataTransfer"), ("paste", "clipboardData"))):
        zone.evaluate(TRANSFER, [list(file("blue")["buffer"]), event, carrier])
        expect(models.locator("#example-list li")).to_have_count(number + 1)
    expect(models.locator("#stage")).to_be_hidden()  # no file became the picture


def test_a_picture_is_dropped_and_pasted(page: Page, file: Draw) -> None:
    page.get_by_label("Labels").fill("red, green, blue")
    for colour, event, carrier in (("green", "drop", "dataTransfer"), ("red", "paste", "clipboardData")):
        page.locator("body").evaluate(TRANSFER, [list(file(colour)["buffer"]), event, carrier])
        expect(page.locator("#answer li").first).to_have_text(re.compile(colour))


def test_problems_are_shown_as_text_and_the_page_goes_on(page: Page, file: Draw) -> None:
    problem = page.get_by_role("alert")
    page.get_by_role("button", name="Classify").click()
    expect(problem).to_contain_text("Choose, drop or paste a picture first")

    page.get_by_label("Labels").fill("")
    choose(page, file("red"))
    expect(problem).to_contain_text("Too few or too many labels")
    expect(problem).to_contain_text("no labels were given")

    page.get_by_label("Labels").fill("red, blue")
    choose(page, BROKEN)
    expect(problem).to_contain_text("Unsupported image")
    page.get_by_role("link", name="Unsupported image").click()
    expect(page.get_by_role("heading")).to_have_text("415 Unsupported image")
    page.go_back()

    page.get_by_label("Labels").fill("red, blue")
    page.route("**/v1/classify", lambda route: route.abort())
    choose(page, file("red"))
    expect(problem).to_contain_text("The service cannot be reached")
    page.unroute("**/v1/classify")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#answer li")).to_have_count(2)
    expect(problem).to_be_empty()


def test_the_page_fits_a_phone(page: Page, file: Draw) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    choose(page, *[file(colour) for colour in ("red", "green", "blue", "white", "yellow")])
    page.get_by_role("tab", name="Detect").click()
    add(page, file("red"), file("blue"))
    page.get_by_label("Add pictures to class 1").set_input_files([file("red")] * 9)
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_asks_for_a_key_keeps_it_in_the_tab_and_sends_it(
    browser: Browser, serve: Serve, settings: Callable[..., Settings], tmp_path: Path, file: Draw
) -> None:
    key_file = tmp_path / "keys.json"
    reader, writer = keys.add(key_file, "reader", ["read"]), keys.add(key_file, "writer", ["read", "write"])
    with serve(settings(keys=key_file)) as client, opened(browser, client) as page:
        problem, key_field = page.locator("#problem"), page.get_by_label("API key kept in this tab only")
        expect(problem).to_contain_text("a key is needed")

        def give(key: str) -> None:
            key_field.fill(key)
            key_field.press("Enter")

        give("wrong")
        expect(problem).to_contain_text("not one of this service's")
        give(reader)
        expect(page.get_by_label("Model")).to_have_value("colours-int8")
        expect(key_field).to_be_hidden()
        expect(problem).to_be_empty()
        page.reload()
        expect(page.get_by_label("Model")).to_have_value("colours-int8")
        assert page.evaluate("[sessionStorage.length, document.cookie]") == [1, ""]
        assert reader not in page.evaluate("JSON.stringify(localStorage)")
        choose(page, file("red"))
        expect(page.locator("#answer li").first).to_be_visible()
        page.get_by_role("tab", name="Search").click()
        page.get_by_label("Name of the new collection").fill("photos")
        page.get_by_role("button", name="Add the chosen pictures").click()
        expect(problem).to_contain_text("needs one for write")
        give(writer)
        page.get_by_role("button", name="Add the chosen pictures").click()
        expect(problem).to_be_empty()
        expect(page.locator("#uploads")).to_contain_text("Done: 1 of 1 picture added")
        assert client.get("/v1/collections/photos", headers={"X-API-Key": reader}).json()["items"] == 1
