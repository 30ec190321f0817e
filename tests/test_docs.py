"""What the pages say exists, exists; and what exists is said."""

import re
from pathlib import Path

import pytest

from calmclip.models.cli import VERBS
from calmclip.models.ops.spec import OPS, Op
from calmclip.models.registry import FAMILIES, catalog

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/performance.md",
    "models/README.md",
    "export/README.md",
    "service/README.md",
    "service/monitoring/README.md",
    "service/deploy/k8s/README.md",
    "service/deploy/ray.md",
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code(page: str) -> str:
    """Its code blocks and spans."""
    return "\n".join(re.findall(r"```[\s\S]*?```|`[^`\n]+`", read(page)))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_a_page_links_to_or_names_is_there(page: str):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!http|#|/)([^)#\s]+)", read(page))
    named = re.findall(r"`((?:models|export|service|tests)/[\w./-]*\w)`", read(page))
    for link in links:
        assert (folder / link).exists(), f"{page} links to {link}"
    for path in named:
        made = path.startswith("models/bundles")  # by an export
        assert made or (ROOT / path).exists(), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_a_page_shows_is_a_verb(page: str):
    verbs = set(re.findall(r"(?<!from )\bcalmclip ([a-z]+)\b", code(page)))
    assert verbs <= set(VERBS), f"{page} shows {sorted(verbs - set(VERBS))}"


def test_every_verb_is_in_the_readme():
    assert all(f"calmclip {verb}" in read("README.md") for verb in VERBS)


def test_every_make_target_a_page_shows_is_there():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    shown = {page: set(re.findall(r"\bmake ([a-z-]+)", code(page))) for page in PAGES}
    assert {"serve", "test"} <= shown["README.md"]
    for page, found in shown.items():
        assert found <= targets, f"{page} shows {sorted(found - targets)}"
    assert targets <= set.union(*shown.values()), "a target nobody is told of"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plug_in_is_in_its_packages_page(family: str):
    from importlib import import_module

    module, name = FAMILIES[family].split(":")
    page = f"{module.split('.')[1]}/README.md"
    names = getattr(import_module(module), name).names()
    assert catalog(family) == names, "a module registers other names than its source says: see calmclip.models.registry"
    for plugin in names:
        assert f"`{plugin}`" in read(page), f"{page} does not name {family} {plugin!r}"


def test_every_layout_has_a_row_that_says_what_how_and_against_what():
    from calmclip.export.layouts import LAYOUTS

    table = read("export/README.md").split("\n## Layouts\n")[1].split("\n## ")[0]
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
