"""What the pages say exists, exists; and what exists is said."""

import re
import tomllib
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from calmclip.models.cli import VERBS, main
from calmclip.models.ops.spec import Op
from calmclip.models.ops.table import OPS
from calmclip.models.registry import FAMILIES, catalog

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "models", "export", "service")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for pages in (ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in FOLDERS))
    for path in sorted(pages)
    if "bundles" not in path.parts
]
KINDS = {
    "train": ("mlm", "clm", "classes", "contrastive"),
    "keys": ("add", "list", "remove"),
    "ops": ("build",),
    "resilience": ("inject", "calibrate"),
    "collection": ("create", "items", "delete-items", "export", "import", "re-embed"),
    "run": (
        "BUNDLE anomaly",
        "BUNDLE classify",
        "BUNDLE embed",
        "BUNDLE detect",
        "mini-int8 anomaly",
        "mini-int8 classify",
        "mini-int8 compress",
        "mini-int8 embed",
        "mini-int8 explain",
        "mini-int8 rank",
        "mini-int8 segment",
        "mini-int8 tag",
    ),
}
MOST_WORDS = {"README.md": 900, "ARCHITECTURE.md": 2500, "CONTRIBUTING.md": 600}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code(page: str) -> str:
    """Its code blocks and spans."""
    return "\n".join(re.findall(r"```[\s\S]*?```|`[^`\n]+`", read(page)))


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```[\s\S]*?^```", "", read(page), flags=re.MULTILINE)


def headings(page: str) -> list[tuple[int, str]]:
    """(level, text) of each heading, in order."""
    return [(len(marks), text) for marks, text in re.findall(r"^(#+) (.+)$", prose(page), re.MULTILINE)]


def anchors(page: str) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    texts = (re.sub(r"[^\w\- ]", "", text.lower()) for _, text in headings(page))
    return {text.replace(" ", "-") for text in texts}


@pytest.mark.parametrize(("page", "most"), MOST_WORDS.items())
def test_a_page_is_short(page: str, most: int):
    assert len(read(page).split()) <= most


@pytest.mark.parametrize("page", PAGES)
def test_a_page_makes_sense_read_aloud(page: str):
    """What a screen reader needs: headings without gaps in their levels, headers over columns, texts for pictures."""
    levels = [level for level, _ in headings(page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    for (before, _), (level, text) in pairwise(headings(page)):
        assert level <= before + 1, f"{page}: {text!r} skips a level"
    lines = ["", *prose(page).splitlines(), ""]
    for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not above.startswith("|"):
            assert re.fullmatch(r"[|:\- ]+", below), f"{page}: a table without a header: {line}"
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert all(cells), f"{page}: a column without a header: {line}"
    assert "![](" not in prose(page), f"{page}: a picture without a text"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_a_page_links_to_or_names_is_there(page: str):
    folder = (ROOT / page).parent
    for link, anchor in re.findall(r"\]\((?!http|/)([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        target = folder / link if link else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), f"{page} links to {link}#{anchor}"
    for path in re.findall(r"`((?:models|export|service|tests|docs)/[\w./-]*\w)`", read(page)):
        made = path.startswith(("models/bundles", "models/ops/lib"))  # by an export, by a build
        assert made or (ROOT / path).exists(), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_a_page_shows_is_a_verb(page: str):
    verbs = set(re.findall(r"(?<!from )\bcalmclip ([a-z]+)\b", code(page)))
    assert verbs <= set(VERBS), f"{page} shows {sorted(verbs - set(VERBS))}"


def test_every_verb_is_in_the_page_of_the_command_line():
    assert all(f"| `calmclip {verb}` |" in read("docs/command-line.md") for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_a_page_shows_is_one_of_its_verb(verb: str, capsys: pytest.CaptureFixture[str]):
    """In code blocks, one command a line. `train` and `run` have options for each kind or task."""
    shown = {
        option: page
        for page in PAGES
        for block in re.findall(r"^```[a-z]*\n([\s\S]*?)^```", read(page), re.MULTILINE)
        for line in block.replace("\\\n", " ").splitlines()
        if (words := line.split("#")[0].partition(f"calmclip {verb} "))[1]
        for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", words[2])
    }
    known = ""
    for kind in ([], *(words.split() for words in KINDS.get(verb, ()))):
        with suppress(SystemExit):
            main([verb, *kind, "--help"])
        known += capsys.readouterr().out
    for option, page in shown.items():
        assert re.search(rf"{option}\b", known), f"{page} shows calmclip {verb} {option}"


@pytest.mark.parametrize("page", PAGES)
def test_every_toml_example_is_toml(page: str):
    for block in re.findall(r"^```toml\n([\s\S]*?)^```", read(page), re.MULTILINE):
        tomllib.loads(block)


def test_every_make_target_a_page_shows_is_there():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    shown = {page: set(re.findall(r"\bmake ([a-z-]+)", code(page))) for page in PAGES}
    assert {"serve", "test"} <= shown["README.md"]
    for page, commands in shown.items():
        assert commands <= targets, f"{page} shows {sorted(commands - targets)}"
    assert targets <= set.union(*shown.values()), "a target nobody is told of"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plug_in_is_in_its_packages_page(family: str):
    from importlib import import_module

    module, name = FAMILIES[family].split(":")
    page = {"endpoints": "docs/using.md", "stores": "docs/operating.md"}.get(
        family, f"{module.split('.')[1]}/README.md"
    )
    names = getattr(import_module(module), name).names()
    assert catalog(family) == names, "a module registers other names than its source says: see calmclip.models.registry"
    for plugin in names:
        assert f"`{plugin}`" in read(page), f"{page} does not name {family} {plugin!r}"


def test_every_layout_has_a_row_that_says_what_how_and_against_what():
    from calmclip.export.layouts import LAYOUTS

    table = read("export/README.md").split("\n## Layouts\n")[1].split("\n| layout |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(LAYOUTS.names()) <= named
    assert all(len(row) == 4 and all(row) for row in rows)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_operator_and_what_it_takes_is_in_its_page(op: Op):
    page = read("models/README.md").split("\n## Operators\n")[1]
    for name in (op.name, *op.inputs, *op.outputs, *op.attributes):
        assert f"`{name}`" in page, f"models/README.md does not say what {name} of {op.name} is"


@pytest.mark.parametrize("package", ["models", "export", "service"])
def test_the_architecture_page_draws_every_module(package: str):
    """Each top-level module and package stands in the part of the tree that is its own."""
    house = re.search(r"^## The house$([\s\S]*?)^## ", read("ARCHITECTURE.md"), re.MULTILINE)
    assert house
    part = re.search(rf"^{package}/[\s\S]*?(?=^\S)", house[1], re.MULTILINE)
    assert part
    there = {path.parent.name + "/" for path in (ROOT / package).glob("*/__init__.py")}
    there |= {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    drawn = set(re.findall(r"[\w.]+\.py|\w+/", part[0]))
    assert there <= drawn, f"ARCHITECTURE.md does not draw {sorted(there - drawn)} of {package}"
