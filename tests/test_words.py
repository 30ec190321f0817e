"""Names and pages use the words of the field: no local that says nothing, no private word for a known thing."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "export", "service", "tests")
EMPTY_NAMES = {"found", "one", "own"}  # a name says what it holds
# private word -> the term of the field
TERMS = {
    r"doorm[ae]n": "op wrapper",
    r"evened|made even": "equalized",
    r"at rest|resting": "unloaded",
    r"whoever|somebody|nobody": "the caller, the client, the driver",
    r"Recall|RowMemory": "CacheGet, CachePut, RowCache",
    r"kin": "variants",
}


def files(suffixes: set[str]) -> list[Path]:
    paths = (path for package in PACKAGES[:3] for path in sorted((ROOT / package).rglob("*")))
    return [path for path in paths if path.suffix in suffixes and "bundles" not in path.parts]


def stored_names(tree: ast.AST) -> set[str]:
    """Every name that an assignment, a loop or a parameter binds."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_local_says_what_it_holds(package: str):
    for path in sorted((ROOT / package).rglob("*.py")):
        empty = stored_names(ast.parse(path.read_text(encoding="utf-8"))) & EMPTY_NAMES
        assert not empty, f"{path.relative_to(ROOT)} binds {sorted(empty)}; name the thing"


@pytest.mark.parametrize("word", TERMS)
def test_a_term_of_the_field_stands_for_each_private_word(word: str):
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in [*files({".py", ".md", ".cc", ".h", ".inc", ".js", ".html"}), *pages]:
        hit = re.search(rf"\b({word})\b", path.read_text(encoding="utf-8"))
        assert not hit, f"{path.relative_to(ROOT)} says {hit and hit[0]!r}; write {TERMS[word]}"
