"""Uploads of the page in a real browser: folders, refusals, a busy service, pauses, a reload."""

import hashlib
import io
import json
import re
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Dialog, Page, Route, expect

from tests.service.test_page import TRANSFER, opened

COLOURS = ("red", "green", "blue", "yellow", "white")


def painted(colour: str, seed: int) -> bytes:
    """A small PNG that no other seed has, and whose mean is nearly ``colour``."""
    image = Image.new("RGB", (8, 8), colour)
    image.putpixel((seed % 8, seed // 8 % 8), (seed % 256, seed // 256, 128))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def fill(folder: Path, count: int) -> Path:
    """A folder with ``count`` pictures, half of them in a folder of it."""
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        name = f"{COLOURS[number % 5]}-{number:03}.png"
        (folder / ("deep" if number % 2 else "") / name).write_bytes(painted(COLOURS[number % 5], number))
    return folder


def create(page: Page, name: str) -> None:
    page.get_by_role("tab", name="Search").click()
    if page.locator("#create").is_hidden():
        page.get_by_role("button", name="New…").click()
    page.get_by_label("Name of the new collection").fill(name)
    page.get_by_label("Name of the new collection").press("Enter")
    expect(page.get_by_label("Collection", exact=True)).to_have_value(name)


class Hold:
    """Requests that wait until they are released. Before, ``busy`` are answered 503, and ``free`` are served.
    ``sizes``: the items of each."""

    def __init__(self, page: Page, url: str, free: int, busy: int = 0) -> None:
        self._busy = busy
        self.sizes: list[int] = []
        self.held: list[Route] = []
        self._free = free
        self._page = page
        page.route(url, self._take)

    def _take(self, route: Route) -> None:
        if route.request.method != "POST":
            return route.continue_()
        self.sizes.append(len(json.loads(route.request.post_data or "")["items"]))
        if self._busy:
            self._busy -= 1
            problem = {"type": "/problems/overloaded", "title": "Overloaded", "status": 503, "detail": "busy"}
            return route.fulfill(status=503, json=problem, headers={"Retry-After": "2"})
        self._free -= 1
        if self._free >= 0:
            route.continue_()
        else:
            self.held.append(route)

    def wait(self, count: int) -> None:
        """Until so many requests wait, and no more."""
        for _ in range(500):
            if len(self.held) >= count:
                break
            self._page.wait_for_timeout(20)
        self._page.wait_for_timeout(100)
        assert len(self.held) == count

    def abandon(self) -> None:
        """Forget the requests that wait: the page has given them up."""
        self.held.clear()

    def release(self) -> None:
        self._free = 10_000
        for route in self.held:
            route.continue_()
        self.held.clear()


def ids(client: httpx.Client, collection: str) -> set[str]:
    return {item["id"] for item in client.get(f"/v1/collections/{collection}/items?limit=1000").json()["items"]}


def test_a_folder_arrives_while_the_page_is_used(browser: Browser, client: httpx.Client, tmp_path: Path) -> None:
    """300 pictures in bounded batches, two requests at a time. A search and another tab do not end them."""
    folder = fill(tmp_path / "holiday", 300)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture either")
    (folder / ".hidden.png").write_bytes(painted("red", 999))
    with opened(browser, client) as page:
        create(page, "paints")
        hold = Hold(page, "**/paints/items", free=8)  # the first batch holds the broken picture and is split
        page.locator("#upload-folder").set_input_files(folder)
        expect(page.locator("#upload-list")).to_contain_text(re.compile("Adding: [1-9]"))
        page.get_by_label("Search for").fill("blue")
        page.get_by_label("Search for").press("Enter")
        expect(page.locator(".hits button").first).to_contain_text("blue")
        page.get_by_role("tab", name="Classify").click()
        hold.wait(2)  # requests at a time
        hold.release()
        row = page.locator("#upload-list > li")
        expect(row).to_contain_text("Done: 300 of 302 pictures added, 2 not added, 1 other file left out.")
        expect(row).to_contain_text("from the folder holiday")
        expect(page.locator("#upload-status")).to_contain_text("paints: Done: 300 of 302")
        broken, empty = sorted(row.locator("details li").all_text_contents())
        assert re.match("holiday/broken.png .* no picture we read", broken)
        assert empty == "holiday/empty.png The file is empty."
        assert max(hold.sizes) == 16
        assert len(ids(client, "paints")) == 300
        assert "holiday/deep/green-001.png" in ids(client, "paints")

        # the same folder with a changed, a new and a moved picture
        (folder / "red-000.png").write_bytes(painted("red", 1000))
        (folder / "new.png").write_bytes(painted("blue", 1001))
        page.get_by_role("tab", name="Search").click()
        page.locator("#upload-folder").set_input_files(folder)
        expect(row.last).to_contain_text("Done: 2 of 303 pictures added, 299 stored already, 2 not added")
        expect(page.locator("#described")).to_contain_text("301 items")
        stored = client.get("/v1/collections/paints/items?limit=1000").json()["items"]
        hashes = {item["id"]: item["meta"]["sha256"] for item in stored}
        assert hashes["holiday/red-000.png"] == hashlib.sha256(painted("red", 1000)).hexdigest()

        page.get_by_role("button", name="Close the upload").first.click()
        expect(page.get_by_role("tab", name="Search")).to_be_focused()
        expect(row).to_have_count(1)


def test_an_upload_waits_pauses_and_goes_on_after_a_reload(
    browser: Browser, client: httpx.Client, tmp_path: Path
) -> None:
    """A busy service is asked again. What was stored before a pause, a reload or a cancellation is not sent again."""
    folder = fill(tmp_path / "trip", 100)
    with opened(browser, client) as page:
        create(page, "slow")
        hold = Hold(page, "**/slow/items", busy=2, free=2)
        page.locator("#upload-folder").set_input_files(folder)
        row = page.locator("#upload-list > li")
        expect(row).to_contain_text("Waiting: 0 of 100 pictures. The service is busy; the next try is in 2 s.")
        expect(row).to_contain_text("Adding: 32 of 100")
        hold.wait(2)
        page.get_by_role("button", name="Pause the upload to slow").press("Enter")
        expect(row).to_contain_text("Paused: 32 of 100")
        expect(page.get_by_role("button", name="Resume the upload to slow")).to_be_focused()
        hold.abandon()
        page.keyboard.press("Enter")
        hold.wait(2)
        expect(row).to_contain_text("Adding: 32 of 100")

        asked: list[str] = []

        def leave(dialog: Dialog) -> None:
            asked.append(dialog.type)
            dialog.accept()

        page.once("dialog", leave)
        page.reload()
        assert asked == ["beforeunload"]
        page.unroute("**/slow/items")
        expect(row).to_contain_text("The page was left after 32 of 100 pictures. Choose the folder trip again")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose again…").click()
        hold = Hold(page, "**/slow/items", free=100)
        chooser.value.set_files(folder)
        expect(row).to_have_text(
            re.compile("slow from the folder trip.*Done: 68 of 100 pictures added, 32 stored already")
        )
        assert len(ids(client, "slow")) == 100
        assert page.evaluate("sessionStorage.length") == 0


def test_single_files_and_a_cancelled_upload(browser: Browser, client: httpx.Client, tmp_path: Path) -> None:
    """Files of one name and another content stay apart."""
    with opened(browser, client) as page:
        create(page, "single")
        row = page.locator("#upload-list > li")
        page.locator("#upload-files").set_input_files(
            [{"name": "IMG_1.png", "mimeType": "image/png", "buffer": painted("red", 500)}]
        )
        expect(row.last).to_contain_text("Done: 1 of 1 picture added")
        second = painted("green", 501)
        page.locator("#search .drop").evaluate(TRANSFER, [list(second), "drop", "dataTransfer", "IMG_1.png"])
        expect(row.last).to_contain_text("Done: 1 of 1 picture added")
        expect(row).to_have_count(2)
        assert ids(client, "single") >= {"IMG_1.png", f"IMG_1-{hashlib.sha256(second).hexdigest()[:8]}.png"}
        hold = Hold(page, "**/single/items", free=1)
        page.locator("#upload-folder").set_input_files(fill(tmp_path / "other", 40))
        hold.wait(2)
        page.get_by_role("button", name="Cancel the upload to single").click()
        expect(row.last).to_contain_text("Cancelled: 16 of 40 pictures")
        hold.abandon()
        assert len(ids(client, "single")) == 18


def test_the_hash_without_tls_is_sha_256(browser: Browser, client: httpx.Client) -> None:
    """Browsers have SHA-256 only on https and localhost."""
    with opened(browser, client) as page:
        for length in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000):
            data = bytes(i * 31 % 256 for i in range(length))
            script = "async (bytes) => [...(await import('./sha256.js')).plain(new Uint8Array(bytes))]"
            assert bytes(page.evaluate(script, list(data))) == hashlib.sha256(data).digest()
