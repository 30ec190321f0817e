"""Fixtures that several packages' tests share: tiny checkpoints, and bundles made of them by the real pipeline."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calmclip.export.samples import pictures
from calmclip.models.ops.library import Library, find, why_not
from tests import postgres as own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops-folder", type=Path, help="an op library other than the installed one, such as a sanitized")


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--ops-folder"):
        from calmclip.models.ops import build

        build.FOLDER = folder


@pytest.fixture(scope="session")
def library() -> Library:
    """The compiled op library; where none is built, what needs it is skipped with one line, in CI it fails."""
    found = find()
    if found is None:
        reason = f"{why_not()}; 'calmclip ops build' makes one"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def postgres() -> Iterator[own.Server]:
    """A running PostgreSQL with pgvector; where there is none, it is skipped with one line, in CI it fails."""
    if reason := own.why_not():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # pytest's own is closed to other users, and too long
        Path(folder).chmod(0o755)
        with own.serving(Path(folder) / "cluster") as server:
            yield server


@pytest.fixture(scope="session")
def photographs() -> dict[str, Path]:
    """Name -> a real photograph whose content is known: cat, coffee, astronaut, rocket, …"""
    return {path.stem: path for path in pictures()}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a layout -> a tiny checkpoint of it. Not to be changed: `tests.tiny.changed` makes a copy."""
    from tests.tiny_layouts.checkpoints import CHECKPOINTS, MORE

    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = (CHECKPOINTS | MORE)[name](tmp_path_factory.mktemp("layouts") / name)
        return made[name]

    return of


def tiny_checkpoint(kind: str) -> Any:
    """A fixture: a directory that `tests.tiny` writes."""

    @pytest.fixture(scope="session")
    def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
        from tests import tiny

        return getattr(tiny, kind)(tmp_path_factory.mktemp("checkpoints") / f"tiny-{kind.replace('_', '-')}")

    return made


tiny_hf_clip, tiny_open_clip, tiny_owl = map(tiny_checkpoint, ("hf_clip", "open_clip", "owl"))
tiny_bert, tiny_opt, tiny_vit = map(tiny_checkpoint, ("bert", "opt", "vit"))


@pytest.fixture(scope="session", autouse=True)
def _small_weights():  # type: ignore[no-untyped-def]
    """Tiny nets' weights are no larger than what is written around them: their bundles may be called int8 too."""
    from calmclip.export import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SIZE", 10.0)
        yield


@pytest.fixture(scope="session")
def owl_bundles(tiny_owl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with owl-int8 and owl-float, an OWLv2. Not to be changed: copy it."""
    return _exported(tiny_owl, tmp_path_factory.mktemp("detectors"), "owl")


@pytest.fixture(scope="session")
def tiny_bundles(tiny_hf_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny-int8 and tiny-float. Not to be changed: copy it."""
    return _exported(tiny_hf_clip, tmp_path_factory.mktemp("bundles"), "tiny")


def _exported(checkpoint: Path, out: Path, name: str) -> Path:
    """``out``, with NAME-int8 and NAME-float in it, by the one command that a user types."""
    from calmclip.models.cli import main

    assert main(["export", str(checkpoint), "--out", str(out), "--name", name, "--keep-float"]) == 0
    return out
