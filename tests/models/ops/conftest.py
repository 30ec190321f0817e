"""The compiled op library; where none is built, the tests of it are skipped with one line, in CI they fail."""

import os

import pytest

from models.ops.library import Library, find, why_not


@pytest.fixture(scope="session")
def library() -> Library:
    found = find()
    if found is None:
        reason = f"{why_not()}; 'calmclip ops build' makes one"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
