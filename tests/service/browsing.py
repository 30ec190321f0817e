"""The browser of the page's tests, and the pictures that they choose; pytest reads the fixtures from here."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
from playwright.sync_api import Browser, FilePayload, sync_playwright

from tests.process import installed

Serve = Callable[..., AbstractContextManager[httpx.Client]]
Draw = Callable[..., FilePayload]  # a picture of these colours


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = installed("chromium", "the page is not opened")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def file(picture: Callable[..., bytes]) -> Draw:
    def make(*colours: str) -> FilePayload:
        return {"name": f"{colours[0]}.png", "mimeType": "image/png", "buffer": picture(*colours, size=(320, 320))}

    return make
