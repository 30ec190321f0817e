"""The pages of docs/decisions: their form, the index, and the links of docs/."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "decisions"
PAGES = sorted(FOLDER.glob("[0-9]*.md"))
HEADINGS = ["## Context", "## Decision", "## Consequence", "## What would change it"]
MOST_WORDS = 180


def words(text: str) -> int:
    return sum(1 for token in text.split() if re.search(r"\w", token))


def title(page: Path) -> str:
    match = re.match(r"# (\d{4})\. (\S.*)\n\nDate: \d{4}-\d\d\n", page.read_text(encoding="utf-8"))
    assert match, f"{page.name} does not start with its title and its date"
    assert page.name.startswith(f"{match[1]}-"), f"{page.name} has the number {match[1]}"
    return match[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_decision_has_four_headings_and_is_short(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^#{2,}.*$", text, re.MULTILINE) == HEADINGS
    assert words(text) <= MOST_WORDS, f"{page.name} has {words(text)} words"


def test_numbers_are_unique_and_have_no_gaps():
    assert [int(page.name[:4]) for page in PAGES] == list(range(1, len(PAGES) + 1))


def test_the_index_lists_each_page_with_its_title():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d{4})\]\((\S+)\) \| (.+) \| \w+ \|$", index, re.MULTILINE)
    assert rows == [(page.name[:4], page.name, title(page)) for page in PAGES]
    assert words(index) <= 12 * len(PAGES)


@pytest.mark.parametrize("page", [*sorted(FOLDER.glob("*.md")), DOCS / "performance.md"], ids=lambda page: page.stem)
def test_links_and_paths_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{page.name} links to {link}#{anchor}"
    for path in re.findall(r"`((?:models|export|service|tests)/[\w./-]*\w)`", text):
        assert (DOCS.parent / path).exists(), f"{page.name} names {path}"
