"""The browser and its pictures, and a service for all tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from calmclip.service.settings import Settings
from tests.service.browsing import Serve

expect.set_options(timeout=30_000)  # the first upload imports the store


@pytest.fixture(scope="module")
def client(bundles: Path, tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> Iterator[httpx.Client]:
    """It may import the store for long, and gives hits of every relevance: when they are measured is not known."""
    data = tmp_path_factory.mktemp("data")
    with serve(Settings(bundles_dir=bundles, data_dir=data, threads=1, deadline_ms=60_000, min_relevance=0)) as client:
        yield client
