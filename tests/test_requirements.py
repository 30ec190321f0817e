"""What the service's image is made of is pinned, and the pins are what pyproject.toml asks for."""

import re
import shlex
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.requirements import pinned

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = {  # -> the options of the command that made it, which stands at its head
    "service/deploy/requirements.txt": {
        ("--extra", "service"),
        ("--extra", "postgres"),
        ("--extra", "otel"),
        ("--excludes", "service/deploy/excluded.txt"),
    },
    "service/deploy/requirements-build.txt": {("--group", "image")},
}
# Where the image runs, whatever runs the tests.
TARGET = {"python_version": "3.11", "python_full_version": "3.11.14", "sys_platform": "linux", "os_name": "posix"}
EACH = pytest.mark.parametrize("name", FILES)


def excluded(name: str) -> set[str]:
    files = [ROOT / of for option, of in FILES[name] if option == "--excludes"]
    lines = [line for file in files for line in file.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(line) for line in lines}


def asked(name: str) -> list[Requirement]:
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    texts = [text for option, of in FILES[name] if option == "--group" for text in groups[of]]
    for option, of in FILES[name]:
        if option == "--extra":
            texts += [*project["dependencies"], *project["optional-dependencies"][of]]
    return [Requirement(text) for text in texts]


@EACH
def test_all_that_is_asked_for_is_pinned_at_a_version_that_fits(name: str) -> None:
    there = pinned(ROOT / name)
    assert len(asked(name)) > 2
    assert not excluded(name) & set(there)
    for wanted in asked(name):
        version = there[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), f"{wanted} is pinned at {version}; run the command at its head"


@EACH
def test_what_a_pinned_package_asks_for_is_pinned_too(name: str) -> None:
    """As far as it is installed here; then `pip install --require-hashes` finds all it needs, on every processor."""
    there = pinned(ROOT / name)
    todo = [(wanted.name, frozenset(wanted.extras)) for wanted in asked(name)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        package, extras = todo.pop()
        if (package, extras) in seen:
            continue
        seen.add((package, extras))
        try:
            needs = [Requirement(text) for text in requires(package) or ()]
        except PackageNotFoundError:
            continue
        markers = [
            {**TARGET, "platform_machine": machine, "extra": extra}
            for machine in ("x86_64", "aarch64")
            for extra in extras or {""}
        ]
        for need in needs:
            wanted = need.marker is None or any(need.marker.evaluate(one) for one in markers)
            if wanted and canonicalize_name(need.name) not in excluded(name):
                assert canonicalize_name(need.name) in there, f"{package} asks for {need}; run the command at its head"
                todo.append((need.name, frozenset(need.extras)))


@EACH
def test_the_head_says_how_it_was_made_and_no_line_which_index_it_came_from(name: str) -> None:
    text = (ROOT / name).read_text()
    (command,) = re.findall(r"^#    (uv pip compile .+)$", text, re.MULTILINE)
    words = shlex.split(command)
    options = set(pairwise(words))
    assert {pair for pair in options if pair[0] in ("--extra", "--group", "--excludes")} == FILES[name]
    assert ("--output-file", name) in options
    assert "--generate-hashes" in words
    (python,) = (value for option, value in options if option == "--python-version")
    assert f"FROM python:{python}-" in (ROOT / "Dockerfile").read_text()
    assert not re.search(r"://|--index|--extra-index|--find-links", text)
