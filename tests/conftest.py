"""Fixtures of several packages' tests: tiny checkpoints, and the bundles that the real pipeline exports from them."""

import io
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calmclip.export.samples import pictures
from calmclip.models.ops.library import Library, find, why_not
from tests import numpy_torch
from tests import postgres as cluster

numpy_torch.stand_in()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops-folder", type=Path, help="a folder with another op library, such as a sanitized one")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt programs that they start
    if folder := config.getoption("--ops-folder"):
        from calmclip.models.ops import build

        build.FOLDER = folder


@pytest.fixture(scope="session")
def library() -> Library:
    """The compiled op library. Without it a test is skipped; in CI it fails."""
    library = find()
    if library is None:
        reason = f"{why_not()}; 'calmclip ops build' makes one"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return library


@pytest.fixture(scope="session")
def postgres() -> Iterator[cluster.Server]:
    """A running PostgreSQL with pgvector. Without it a test is skipped; in CI it fails."""
    if reason := cluster.why_not():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # pytest's folder is closed to the user postgres, and its path is too long for a socket
    with tempfile.TemporaryDirectory(prefix="pg", dir=cluster.place()) as folder:
        Path(folder).chmod(0o755)
        with cluster.serving(Path(folder) / "cluster") as server:
            yield server


@pytest.fixture(scope="session")
def photographs() -> dict[str, Path]:
    """Name -> a photograph of it: cat, coffee, astronaut, rocket, …"""
    return {path.stem: path for path in pictures()}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a layout -> a tiny checkpoint of it. Do not change it: `tests.tiny.changed` makes a changed copy."""
    from tests.tiny_layouts.checkpoints import CHECKPOINTS, MORE

    @cache
    def write(name: str) -> Path:
        return (CHECKPOINTS | MORE)[name](tmp_path_factory.mktemp("layouts") / name)

    return write


def tiny_checkpoint(kind: str) -> Any:
    """A fixture: the checkpoint that the function ``kind`` of `tests.tiny` writes."""

    @pytest.fixture(scope="session")
    def write(tmp_path_factory: pytest.TempPathFactory) -> Any:
        from tests import tiny

        return getattr(tiny, kind)(tmp_path_factory.mktemp("checkpoints") / f"tiny-{kind.replace('_', '-')}")

    return write


tiny_hf_clip, tiny_open_clip, tiny_owl = map(tiny_checkpoint, ("hf_clip", "open_clip", "owl"))
tiny_bert, tiny_opt, tiny_vit = map(tiny_checkpoint, ("bert", "opt", "vit"))
tiny_light_map = tiny_checkpoint("light_map")


@pytest.fixture(scope="session")
def tiny_ranking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranking adapter over a ConvNeXt."""
    from tests.tiny_layouts.ranking import ranking

    return ranking(tmp_path_factory.mktemp("checkpoints") / "tiny-ranking")


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3: grouped queries, norms of q and k, the last token pooled. Do not change it."""
    from tests.tiny_layouts.decoders import decoder

    return decoder(tmp_path_factory.mktemp("checkpoints") / "tiny-decoder", "qwen3")


@pytest.fixture(scope="session", autouse=True)
def _tiny_nets() -> Iterator[None]:
    """Name bundles of tiny nets int8 although the graphs' other bytes outweigh the weights; trace equal towers once."""
    if find_spec("onnxscript") is None:  # tests.aarch64: nothing is exported there
        yield
        return
    from calmclip.export import report, trace
    from tests.traces import once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SIZE", 10.0)
        patch.setattr(trace, "to_onnx", once(trace.to_onnx))
        yield


@pytest.fixture(scope="session")
def owl_bundles(tiny_owl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with owl-int8 and owl-float, an OWLv2. Do not change it: copy it."""
    return _exported(tiny_owl, tmp_path_factory.mktemp("detectors"), "owl")


@pytest.fixture(scope="session")
def tiny_bundles(tiny_hf_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny-int8 and tiny-float. Do not change it: copy it."""
    return _exported(tiny_hf_clip, tmp_path_factory.mktemp("bundles"), "tiny")


def _exported(checkpoint: Path, out: Path, name: str) -> Path:
    """Export NAME-int8 and NAME-float into ``out`` by the command that a user types; returns ``out``."""
    from calmclip.models.cli import main

    assert main(["export", str(checkpoint), "--out", str(out), "--name", name, "--keep-float"]) == 0
    return out


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], bytes]:
    """Makes a JPEG of noise of this width and height that is decoded at half of its sides."""

    def make(width: int, height: int) -> bytes:
        for name, value in (("EXACT", width * height - 1), ("REDUCED", width * height // 2)):
            monkeypatch.setattr(f"calmclip.models.preprocess.image.{name}_PIXELS", value)
        monkeypatch.setattr("calmclip.models.preprocess.image.LEAST_SIDE", 1)
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG")
        return file.getvalue()

    return make
