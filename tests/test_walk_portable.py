"""`calmclip export --portable`, then every graph in OpenVINO and in onnxruntime-web, and the code of docs/portable.md.

The oracle of another engine is ONNX Runtime, which runs the same files; that of a portable bundle is the bundle with
our operators, and the float bundle for INT8.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from calmclip.export.nets import owl
from calmclip.export.nets.mini import detection
from calmclip.export.samples import texts
from calmclip.models.cli import main
from calmclip.models.flow import Arrays
from calmclip.models.ops.reference import iou
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner, open_bundle
from tests import engines, process

pytestmark = pytest.mark.slow
Open = Callable[[str, str], Runner]
ENOUGH = 0.9999  # cosine of the same graph in two engines
PICTURES = ("cat", "coffee", "astronaut", "rocket")
LABELS = ["a cat", "a cup of coffee"]
PAGE = (Path(__file__).parent.parent / "docs" / "portable.md").read_text(encoding="utf-8")
Rows = Sequence[tuple[engines.Case, Arrays]]


@pytest.fixture(scope="module")
def opened(tiny_hf_clip: Path, tiny_owl: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """(name, "int8" or "float") -> its portable bundle, which is exported at the first request. What INT8 costs decides
    whether a bundle is called int8 or mixed; both are the quantized one here."""
    out = tmp_path_factory.mktemp("portable")
    checkpoints = {"clip": tiny_hf_clip, "owl": tiny_owl, "mini": "mini"}

    def runner(name: str, kind: str) -> Runner:
        floats = out / f"{name}-float"
        if not floats.exists():
            command = ["export", str(checkpoints[name]), "--portable", "--keep-float", "--name", name]
            command += [] if name == "owl" else ["--attribution"]
            assert main([*command, "--out", str(out)]) == 0
        (quantized,) = set(out.glob(f"{name}-*")) - {floats}
        return open_bundle(floats if kind == "float" else quantized)

    return runner


def cosines(rows: Rows, reference: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """Graph and output -> the cosine of each answer with the reference. Proposals, which a rounding error may put into
    another order, count as the net's summary of them; numbers that are no floats are 1 if they are equal."""
    by_output: Mapping[str, list[float]] = defaultdict(list)
    for (case, answers), expected in zip(rows, reference, strict=True):
        pair = (expected, answers)
        if case.role == "regions":
            net = partial(owl.summary, side=96) if "logit_shift" in answers else detection.summary
            pair = net(expected), net(answers)
        for name in pair[0]:
            a, b = (np.asarray(side[name], np.float64).ravel() for side in pair)
            assert a.shape == b.shape, f"{case.role}: {name}"
            exact = expected.get(name, a).dtype.kind != "f" or not a.any()
            same = float((a == b).all()) if exact else float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            by_output[f"{case.role}.{name}"].append(same)
    return {name: np.array(values) for name, values in by_output.items()}


def run(name: str, runner: Runner, photographs: Mapping[str, Path], folder: Path) -> Rows:
    tokens = runner.bundle.text("text")
    fitting = [text for text in (*LABELS, *texts()[-4:]) if tokens.count(text) <= tokens.spec.context]
    cases = list(engines.cases(runner, [photographs[picture] for picture in PICTURES], fitting))
    return list(zip(cases, engines.ENGINES[name](runner, cases, folder), strict=True))


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize(("name", "kind"), [("clip", "float"), ("clip", "int8"), ("owl", "float"), ("mini", "float")])
def test_another_engine_gives_our_answers(
    name: str, kind: str, engine: str, opened: Open, photographs: Mapping[str, Path], tmp_path: Path
):
    runner = opened(name, kind)
    rows = run(engine, runner, photographs, tmp_path / "job")
    assert {case.role for case, _ in rows} == runner.bundle.manifest.graphs.keys()
    for output, values in cosines(rows, [case.answers for case, _ in rows]).items():
        assert values.min() >= ENOUGH, output


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("name", ["owl", "mini"])
def test_another_engine_is_as_close_to_float_as_we_are_in_int8(
    name: str, engine: str, opened: Open, photographs: Mapping[str, Path], tmp_path: Path
):
    """After many layers a rounding error moves most numbers by a step of INT8, so engines agree less than ENOUGH."""
    int8, floats = (opened(name, kind) for kind in ("int8", "float"))
    rows = run(engine, int8, photographs, tmp_path / "job")
    reference = [floats.session(case.role).run(case.feeds) for case, _ in rows]
    theirs, ours = cosines(rows, reference), cosines([(case, case.answers) for case, _ in rows], reference)
    between = cosines(rows, [case.answers for case, _ in rows])
    for output, values in between.items():
        if output.startswith("detect"):  # a float graph, and its inputs are the same
            assert values.min() >= ENOUGH, output
        else:
            assert theirs[output].mean() >= ours[output].mean() - 0.01, output
            assert values.mean() >= 0.98, output


def test_our_own_runner_and_service_serve_it(
    opened: Open,
    owl_bundles: Path,
    photographs: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Beside the bundle with our operators; in float, so that no answer depends on rounding."""
    fast, plain, int8 = open_bundle(owl_bundles / "owl-float"), opened("owl", "float"), opened("owl", "int8")
    folder = plain.bundle.directory.parent
    assert not fast.bundle.manifest.portable
    assert plain.bundle.manifest.portable
    picture, labels = photographs["coffee"], ["a cat", "two dogs"]
    want, boxes = (runner.detect(picture, labels).detections for runner in (fast, plain))
    assert want
    assert [row.label for row in boxes] == [row.label for row in want]
    assert [row.score for row in boxes] == pytest.approx([row.score for row in want], abs=1e-5)
    with process.serving(folder, tmp_path / "data") as (_, client, _):
        form = {"labels": labels, "model": "owl-float"}
        answer = client.post("/v1/detect", files={"image": picture.read_bytes()}, data=form).json()
    assert [row["score"] for row in answer["detections"]] == pytest.approx([row.score for row in boxes], abs=1e-5)

    capsys.readouterr()
    for directory in (int8.bundle.directory, plain.bundle.directory):
        assert main(["check", str(directory)]) == 0
        assert capsys.readouterr().out.count("portable: operators of ai.onnx") == 3
        assert main(["show", str(directory)]) == 0
        assert "standard ONNX operators alone: portable" in capsys.readouterr().out


def test_the_code_of_the_page_gives_our_answers(opened: Open, photographs: Mapping[str, Path], tmp_path: Path):
    """The blocks are run as they stand, and print cosines and boxes."""
    engines.engine()
    runner, picture = opened("mini", "float"), photographs["coffee"]
    directory = runner.bundle.directory
    *queries, vector = runner.embed(texts=LABELS, images=[picture])
    want = [float(query @ vector) for query in queries]
    hits = runner.detect(picture, LABELS, templates=["{}"]).detections
    assert hits

    (code,) = re.findall(r"^```python\n([\s\S]*?)^```", PAGE, re.MULTILINE)
    script = tmp_path / "with_openvino.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, str(script), str(directory), str(picture), *LABELS]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.splitlines()
    assert [float(line.split()[0]) for line in lines[:2]] == pytest.approx(want, abs=1e-4)
    assert [line.partition(" ")[2] for line in lines[:2]] == LABELS
    for line, hit in zip(lines[2:], hits, strict=True):
        score, _, label = line.partition(" ")
        assert float(score) == pytest.approx(hit.score, abs=1e-3)
        assert label.startswith(hit.label)
        theirs = np.array([float(side) for side in line.split()[-4:]])
        assert iou(theirs, hit.box[None]) > 0.9  # of two proposals for a thing, rounding decides which is better

    module, main_script = re.findall(r"^```js\n([\s\S]*?)^```", PAGE, re.MULTILINE)
    spec = json.loads((directory / "bundle.json").read_text())["graphs"]["image"]["preprocess"]
    pixels = runner.bundle.image().prepare(decode(picture.read_bytes()))[0][0].transpose(1, 2, 0)
    grey = np.round((pixels * spec["std"] + spec["mean"]) * 255)  # what was normalized
    (tmp_path / "picture.rgb").write_bytes(grey.astype(np.uint8).tobytes())
    for name, text in (("clip.mjs", module), ("compare.mjs", main_script)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    printed = engines.node(
        tmp_path / "compare.mjs", directory, tmp_path / "picture.rgb", *LABELS, beside=[tmp_path / "clip.mjs"]
    ).splitlines()
    assert [float(line.split()[0]) for line in printed] == pytest.approx(want, abs=1e-4)
    assert [line.partition(" ")[2] for line in printed] == LABELS


def test_openvino_reads_no_local_functions(owl_bundles: Path, tmp_path: Path):
    """docs/portable.md says so of 2026.4, and that the process crashes if a Clip with one bound follows."""
    import onnx

    engines.engine()
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x) => (float[2] y) <float low = {0.0}> { a = local.f (x) y = Clip (a, low) }
        <domain: "local", opset_import: ["" : 17]> f (a) => (b) { b = Relu (a) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "clip.onnx")
    for file, ends in ((tmp_path / "clip.onnx", "-11"), (owl_bundles / "owl-float" / "detect.onnx", "No conversion")):
        code = "import openvino, sys; openvino.Core().read_model(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
        assert ends in f"{done.returncode} {done.stderr}"
