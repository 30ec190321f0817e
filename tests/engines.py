"""Other engines run the graphs of a portable bundle: OpenVINO, and onnxruntime-web under Node.

A test without them is skipped; in CI it fails. Node's packages are pinned, with hashes, in `tests/data/node`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from calmclip.models.flow import Arrays
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner
from calmclip.models.suppression import METHODS, Suppression
from tests.process import installed

ROOT = Path(__file__).parent
SCRIPT, PACKAGES = ROOT / "onnxruntime_web.mjs", ROOT / "data" / "node"
WITHOUT = "no graph runs in onnxruntime-web"
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # of OpenVINO, which else computes in bfloat16 if the processor does


@dataclass(frozen=True)
class Case:
    """Inputs of the graph ``role``, and our answers."""

    role: str
    feeds: Arrays
    answers: Arrays


def cases(runner: Runner, pictures: Sequence[Path], texts: Sequence[str]) -> Iterator[Case]:
    """Every graph of the bundle: pictures and texts one at a time; ``detect`` for each picture, with the texts as
    queries, and the three methods of suppression in turn; if there are such graphs, ``masks`` for the best boxes of
    each picture, ``known`` for all texts, and ``attribution`` for each picture with one of them."""
    bundle, graphs = runner.bundle, runner.bundle.manifest.graphs

    def case(role: str, feeds: Arrays) -> Case:
        return Case(role, feeds, runner.session(role).run(feeds))

    queries = [case("text", bundle.text("text").prepare([text])) for text in texts]
    yield from queries
    vectors = np.concatenate([query.answers["text_embeds"] for query in queries])
    if "known" in graphs:
        yield case("known", {"text_embeds": vectors})
    for role in sorted(graphs.keys() & {"dense", "image", "regions"}):
        for number, picture in enumerate(pictures):
            yield (prepared := case(role, {"pixels": bundle.image(role).prepare(decode(picture.read_bytes()))[0]}))
            if role == "image" and "attribution" in graphs:
                vector = {"image_embeds": prepared.answers["image_embeds"]}
                yield case("attribution", {**queries[number % len(queries)].feeds, **vector})
            if role == "regions":
                # a low score, because each picture needs a box: see "nothing is found" on the page
                settings = Suppression(method=METHODS[number % len(METHODS)], min_score=0.0005, max_output=20)
                known = {**prepared.answers, **settings.tensors(), "text_embeds": vectors}
                yield case("detect", {name: known[name] for name in graphs["detect"].inputs})
                if "masks" in graphs:
                    boxes = prepared.answers["boxes"][:, : 2 + number]
                    yield case("masks", {"mask_features": prepared.answers["mask_features"], "boxes": boxes})


def openvino(runner: Runner, cases: Sequence[Case], folder: Path) -> list[Arrays]:
    """The answers of OpenVINO to each case, in float32 where the graph has no INT8. It needs no ``folder``."""
    core, graphs = engine().Core(), runner.bundle.manifest.graphs
    files = {case.role: str(runner.bundle.directory / graphs[case.role].file) for case in cases}
    compiled = {role: core.compile_model(file, "CPU", FLOAT32) for role, file in files.items()}
    return [
        {name: array.copy() for value, array in compiled[case.role](dict(case.feeds)).items() for name in value.names}
        for case in cases
    ]


def onnxruntime_web(runner: Runner, cases: Sequence[Case], folder: Path) -> list[Arrays]:
    """The answers of onnxruntime-web to each case. Tensors go through files in the new ``folder``."""
    directory, graphs = runner.bundle.directory, runner.bundle.manifest.graphs
    folder.mkdir()
    data = [str(path) for path in sorted(directory.glob("*.bin"))]
    jobs: dict[str, dict[str, Any]] = {}
    for number, case in enumerate(cases):
        job = jobs.setdefault(case.role, {"file": str(directory / graphs[case.role].file), "data": data, "runs": []})
        feeds = {}
        for name, array in case.feeds.items():
            feeds[name] = {"dtype": array.dtype.name, "shape": array.shape, "file": f"{number}.in.{name}"}
            (folder / f"{number}.in.{name}").write_bytes(np.ascontiguousarray(array).tobytes())
        job["runs"].append({"feeds": feeds, "out": str(number)})
    (folder / "job.json").write_text(json.dumps([*jobs.values()]))
    node(SCRIPT, folder)
    answers: Mapping[str, Mapping[str, Any]] = json.loads((folder / "answers.json").read_text())
    return [
        {
            name: np.fromfile(folder / f"{number}.{name}", facts["dtype"]).reshape(facts["shape"])
            for name, facts in answers[str(number)].items()
        }
        for number in range(len(cases))
    ]


ENGINES = {"openvino": openvino, "onnxruntime-web": onnxruntime_web}


def engine() -> Any:
    try:
        import openvino
    except ModuleNotFoundError:
        _missing("openvino is not installed: no graph runs in it; pip install -e '.[engines]'")
    return openvino


def node(script: Path, *words: str | Path, beside: Sequence[Path] = ()) -> str:
    """What ``script`` prints. It runs as a copy with those ``beside`` it, where Node finds its packages."""
    folder = _packages()
    for file in (script, *beside):
        shutil.copy(file, folder)
    command = [installed("node", WITHOUT), script.name, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _packages() -> Path:
    """The folder with Node's packages, which the first call installs."""
    npm, folder = installed("npm", WITHOUT), ROOT.parent / "build" / "node"
    lock, here = PACKAGES / "package-lock.json", folder / "package-lock.json"
    if (folder / "node_modules").is_dir() and here.is_file() and here.read_bytes() == lock.read_bytes():
        return folder
    shutil.copytree(PACKAGES, folder, dirs_exist_ok=True)
    command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        here.unlink()  # so that the next call tries again
        _missing(f"npm cannot install onnxruntime-web, so {WITHOUT}: {done.stderr[-300:]}")
    return folder


def _missing(why: str) -> NoReturn:
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    raise AssertionError(why)  # both raise
