"""All packages of the images are pinned, and the pins satisfy pyproject.toml."""

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
FILES = {  # file -> the options of the command at its head
    "service/deploy/requirements.txt": {
        ("--extra", "service"),
        ("--extra", "postgres"),
        ("--extra", "otel"),
        ("--excludes", "service/deploy/excluded.txt"),
    },
    "service/deploy/requirements-mini.txt": {("--extra", "mini"), ("--excludes", "service/deploy/excluded.txt")},
    "service/deploy/requirements-build.txt": {("--group", "image")},
    "service/deploy/requirements-export.txt": {
        ("--extra", "export"),
        ("--excludes", "service/deploy/excluded-export.txt"),
    },
    "service/deploy/requirements-nets.txt": {("--extra", "export"), ("--extra", "nets")},
}
TORCH = "service/deploy/requirements-torch.txt"  # of both files of export: written by hand, from another index
# The image's environment, not that of the tests.
TARGET = {"python_version": "3.11", "python_full_version": "3.11.14", "sys_platform": "linux", "os_name": "posix"}
EACH = pytest.mark.parametrize("name", FILES)


def excluded(name: str) -> set[str]:
    files = [ROOT / value for option, value in FILES[name] if option == "--excludes"]
    lines = [line for file in files for line in file.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(line) for line in lines}


def wanted(name: str) -> list[Requirement]:
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    texts = [text for option, value in FILES[name] if option == "--group" for text in groups[value]]
    for option, value in FILES[name]:
        if option == "--extra":
            texts += [*project["dependencies"], *project["optional-dependencies"][value]]
    needs = [Requirement(text) for text in texts]
    return [need for need in needs if canonicalize_name(need.name) not in excluded(name)]


def pins(name: str) -> dict[str, str]:
    """Those of the file, and those of torch where it leaves them out."""
    return pinned(ROOT / name) | (pinned(ROOT / TORCH) if "no-emit-package torch" in (ROOT / name).read_text() else {})


@EACH
def test_every_requirement_is_pinned_at_a_version_that_fits(name: str) -> None:
    versions = pins(name)
    assert len(wanted(name)) > 2
    assert not excluded(name) & set(versions)
    for need in wanted(name):
        version = versions[canonicalize_name(need.name)]
        assert need.specifier.contains(version), f"{need} is pinned at {version}; run the command at its head"


@EACH
def test_the_requirements_of_pinned_packages_are_pinned_too(name: str) -> None:
    """For installed packages. Without them `pip install --require-hashes` fails, perhaps on one processor alone."""
    versions = pins(name)
    todo = [(requirement.name, frozenset(requirement.extras)) for requirement in wanted(name)]
    visited: set[tuple[str, frozenset[str]]] = set()
    while todo:
        package, extras = todo.pop()
        if (package, extras) in visited:
            continue
        visited.add((package, extras))
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
            applies = need.marker is None or any(need.marker.evaluate(marker) for marker in markers)
            if applies and canonicalize_name(need.name) not in excluded(name):
                assert canonicalize_name(need.name) in versions, f"{package} needs {need}; run the command at its head"
                todo.append((need.name, frozenset(need.extras)))


@EACH
def test_the_head_has_the_command_and_no_line_has_an_index(name: str) -> None:
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


def test_torch_is_the_cpu_build_for_both_processors() -> None:
    """The build without CUDA has a local version; a package index has none such, so that none of its GB can come."""
    assert pinned(ROOT / TORCH).keys() == {"torch", "torchvision"}
    assert all(version.endswith("+cpu") for version in pinned(ROOT / TORCH).values())
    assert [text.count("--hash=") for text in re.split(r"^torch", (ROOT / TORCH).read_text(), flags=re.M)[1:]] == [2, 2]


def test_the_extra_of_any_checkpoint_has_all_of_the_extra_of_the_built_in_model() -> None:
    """Errors name the larger one where either would do, and the export's image installs both."""
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras["mini"]) < set(extras["export"])


def test_packages_that_several_files_pin_have_one_version() -> None:
    """The export's image installs two of the files in one environment; a bundle is measured as it is served."""
    versions: dict[str, set[str]] = {}
    for name in FILES:
        for package, version in pinned(ROOT / name).items():
            versions.setdefault(package, set()).add(version)
    assert not {package: several for package, several in versions.items() if len(several) > 1}
