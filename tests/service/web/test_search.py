"""The tab Search in a real browser: queries of words and pictures, and a hit in its dialog, by keyboard."""

import re
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.asking import b64
from tests.service.browsing import Draw
from tests.service.test_page import BROKEN, choose, opened
from tests.service.web.test_uploads import create

COLOURS = ("red", "green", "blue", "yellow", "white")


@pytest.fixture
def page(browser: Browser, client: httpx.Client) -> Iterator[Page]:
    with opened(browser, client) as page:
        page.get_by_role("tab", name="Search").click()
        yield page


def searched(page: Page, act: Callable[[], object]) -> dict[str, object]:
    """The body of the search that ``act`` starts."""
    with page.expect_response("**/search") as waiting:
        act()
    assert waiting.value.status == 200, waiting.value.text()
    expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
    body: dict[str, object] = waiting.value.request.post_data_json
    return body


def test_hits_open_large_lead_to_others_and_are_deleted(page: Page, file: Draw, client: httpx.Client) -> None:
    """All of it by keyboard: a dialog is entered, stepped through and left, and the focus returns."""
    create(page, "paints")
    choose(page, *[file(colour) for colour in COLOURS[:4]], BROKEN)
    page.get_by_role("button", name="Add the chosen pictures").press("Enter")
    expect(page.locator("#uploads")).to_contain_text("Done: 4 of 5 pictures added, 1 not added")
    expect(page.locator("#described")).to_have_text("4 items · colours-int8 · keeps the pictures")

    page.get_by_label("Search for").fill("a photo of a green thing")
    page.get_by_label("least relevance").evaluate("slider => slider.closest('details').open = true")
    body = searched(page, lambda: page.keyboard.press("Enter"))
    assert body == {"query": {"text": "a photo of a green thing"}, "top_k": 24}
    hits, dialog = page.locator(".hits button"), page.get_by_role("dialog").first
    # cosines 1, 1 / sqrt(2), 0, 0
    expect(hits).to_have_text([re.compile(name) for name in ("green.png", "yellow.png", "png", "png")])
    assert hits.first.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 128

    hits.first.focus()
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("heading")).to_have_text("green.png")
    expect(dialog).to_contain_text("1 of 4")
    large = dialog.get_by_role("img", name="green.png")
    expect(large).to_have_js_property("naturalWidth", 320)  # the original
    expect(dialog.get_by_role("region", name="Metadata")).to_contain_text("cosine1.0000")
    expect(dialog.get_by_role("link", name="Download")).to_have_attribute("download", "green.png")
    size = dialog.bounding_box()
    for key, title, place in [
        ("ArrowLeft", "green.png", "1 of 4"),  # there is none before it
        ("ArrowRight", "yellow.png", "2 of 4"),
        ("ArrowRight", "", "3 of 4"),
        ("ArrowLeft", "yellow.png", "2 of 4"),
    ]:
        page.keyboard.press(key)
        expect(dialog.get_by_role("heading")).to_contain_text(title)
        expect(dialog).to_contain_text(place)
        assert dialog.bounding_box() == size
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(hits.first).to_be_focused()

    # its deletion is asked for; the next one follows
    hits.last.press("Enter")
    last = hits.last.locator("span").inner_text()
    for answer, items in (("Keep", 4), ("Delete", 3)):
        dialog.get_by_role("button", name="Delete…").press("Enter")
        sure = page.locator("#sure")
        expect(sure).to_contain_text(f"Delete {last} from paints?")
        expect(sure.get_by_role("button", name="Keep")).to_be_focused()
        sure.get_by_role("button", name=answer).press("Enter")
        expect(sure).to_be_hidden()
        expect(dialog).to_contain_text(f"{items} of {items}")
        expect(dialog.get_by_role("button", name="Delete…")).to_be_focused()
    page.keyboard.press("Escape")
    expect(hits).to_have_count(3)
    assert client.get(f"/v1/collections/paints/items/{last}").status_code == 404

    page.get_by_role("button", name="Show all").press("Enter")
    expect(hits).to_have_text(sorted({"blue.png", "green.png", "red.png", "yellow.png"} - {last}))
    page.get_by_role("button", name="Delete…").press("Enter")
    page.locator("#sure").get_by_role("button", name="Delete").press("Enter")
    expect(page.locator("#answer")).to_have_text("paints was deleted.")
    assert client.get("/v1/collections/paints").status_code == 404


def test_a_query_is_composed_of_words_pictures_and_words_to_leave_out(
    page: Page, file: Draw, client: httpx.Client
) -> None:
    client.put("/v1/collections/mixed", json={})
    items = [{"id": f"{c}.png", "image": b64(file(c)["buffer"])} for c in ("red", "green", "blue", "yellow")]
    client.post("/v1/collections/mixed/items", json={"items": items})
    page.reload()
    choose(page, file("red"))
    page.get_by_label("Collection", exact=True).select_option("mixed")
    hits, dialog = page.locator(".hits button"), page.get_by_role("dialog").first
    page.locator("#query summary").click()
    page.get_by_role("button", name="Show all").press("Enter")
    hits.nth(3).press("Enter")
    body = searched(page, lambda: dialog.get_by_role("button", name="More like this").press("Enter"))
    assert body["query"] == {"id": "yellow.png"}
    expect(hits).to_have_text([re.compile("red|green")] * 2 + [re.compile("blue")])  # without itself
    expect(page.locator("#parts")).to_contain_text("like yellow.png")
    page.get_by_label("without").fill("red, white")
    page.get_by_label("Search for").fill("blue")
    body = searched(page, lambda: page.keyboard.press("Enter"))
    less = [{"text": text, "weight": pytest.approx(-1.25)} for text in ("red", "white")]
    assert body["query"] == [{"text": "blue"}, {"id": "yellow.png"}, *less]
    # (0, 0, 1) + (1, 1, 0) / sqrt(2) - 1.25 (1, 0, 0) - 1.25 (1, 1, 1) / sqrt(3)
    less_white = 1.25 * 3**-0.5
    vector = np.array([0.5**0.5 - 1.25 - less_white, 0.5**0.5 - less_white, 1 - less_white])
    assert list(vector).index(max(vector)) == 2
    expect(hits.first).to_contain_text("blue.png")
    page.get_by_label("without").fill("")
    page.get_by_label("Search for").fill("")
    body = searched(page, lambda: page.get_by_role("button", name="Search with the picture").press("Enter"))
    query = body["query"]
    assert isinstance(query, list)
    assert [sorted(part) for part in query] == [["id"], ["image"]]
    body = searched(page, lambda: page.get_by_role("button", name="Leave yellow.png out").press("Enter"))
    assert body["query"] == {"image": b64(file("red")["buffer"])}
    expect(hits.first).to_contain_text("red.png")


def test_nothing_is_relevant_until_the_threshold_is_lowered(page: Page, client: httpx.Client) -> None:
    """The service's answers are written here: a relevance needs a model that was trained."""
    client.put("/v1/collections/mine", json={})
    client.post("/v1/collections/mine/items", json={"items": [{"id": "a", "text": "red", "meta": {"title": "first"}}]})
    hits = [
        {"id": name, "score": 0.3, "relevance": relevance, "meta": {}}
        for name, relevance in (("a", 0.9993), ("b", 0.94), ("c", 0.6), ("d", 0.1))
    ]

    def answer(count: int, least: float, why: str | None = None) -> None:
        page.unroute("**/search")
        shown = hits[:count]
        body = {"collection": "mine", "hits": shown, "min_relevance": least, "below": 4 - count, "uncalibrated": why}
        page.route("**/search", lambda route: route.fulfill(json=body))

    page.reload()
    page.get_by_label("Collection", exact=True).select_option("mine")
    sentence, cards, text = page.get_by_label("Search for"), page.locator(".hits button"), page.locator("#answer")
    sentence.fill("an invoice")
    answer(0, 0.93)
    assert "min_relevance" not in searched(page, lambda: sentence.press("Enter"))
    expect(text).to_contain_text("Nothing in mine has a relevance of at least 0.93")
    expect(page.locator("output[for=least]")).to_have_text("0.93")
    answer(4, 0)
    lower = page.get_by_role("button", name="Show the nearest 4 anyway")
    assert searched(page, lambda: lower.press("Enter"))["min_relevance"] == 0
    words = ("strong match, 0.999", "good match, 0.94", "doubtful match, 0.60", "weak match, 0.10")
    expect(cards).to_have_text([re.compile(word) for word in words])
    answer(2, 0.93)
    assert "min_relevance" not in searched(page, lambda: sentence.press("Enter"))
    expect(text).to_contain_text("2 hits with a relevance of at least 0.93")
    expect(page.get_by_role("button", name="Show 2 more that are less relevant")).to_be_visible()
    answer(4, 0.05)
    page.locator("#query summary").click()
    assert searched(page, lambda: page.get_by_label("least relevance").fill("0.05"))["min_relevance"] == 0.05
    answer(0, 0.93)
    reset = page.get_by_role("button", name="Reset to the service's default")
    assert "min_relevance" not in searched(page, reset.click)
    expect(page.get_by_label("least relevance")).to_be_focused()
    answer(4, 0.93, "the collection is being measured; search again in a second")
    searched(page, lambda: sentence.press("Enter"))
    expect(text).to_contain_text("4 hits. Their relevance is not known: the collection is being measured")
    answer(0, 0.93)
    page.get_by_role("button", name="Delete…").click()
    page.locator("#sure").get_by_role("button", name="Delete").click()
