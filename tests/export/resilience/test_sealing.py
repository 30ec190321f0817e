"""The verb `resilience calibrate`, on a bundle that is worked out by hand, and refinement with a known answer."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from calmclip.export.resilience import refine
from calmclip.export.resilience.bounds import insert, sites
from calmclip.export.resilience.calibrate import bounds, forms, observe
from calmclip.export.resilience.forms import Bound
from calmclip.export.resilience.inject import Subject
from calmclip.export.samples import calibration_pictures, calibration_texts
from calmclip.models.bundle.store import read
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.runner import open_bundle
from tests.export.graphs import parse
from tests.export.resilience.conftest import COLOURS


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    (folder / "texts.txt").write_text("red\ngreen\nblue\n", encoding="utf-8")
    return folder


def calibrate(directory: Path, *flags: object) -> int:
    words = ["resilience", "calibrate", directory.name, "--bundles", directory.parent, *flags]
    return main([str(word) for word in words])


def test_the_new_bundle_serves_and_answers_the_same(colours, pictures, capsys):
    source = colours("colours-float")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert calibrate(source, "--data", pictures, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    made = read(source.with_name("colours-bounded-float"))
    assert (value["bundle"], value["digest"]) == (made.manifest.name, made.digest)
    assert value["from"] == {"name": "colours-float", "digest": read(source).digest}
    assert made.manifest.quantization.calibration["bounds"]["from"] == value["from"]
    assert json.loads((made.directory / "report.json").read_text())["bounds"]["graphs"] == value["graphs"]
    assert made.manifest.source == read(source).manifest.source
    image = value["graphs"]["image"]
    assert (image["layers"], image["stored"]) == (1, 1)
    assert image["bounds"]["row"] == [pytest.approx(-1, abs=1e-3), pytest.approx(2, abs=1e-3)]  # slack 1
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    said = []
    for name in ("colours-float", "colours-bounded-float"):  # one check fails for both: an unknown word has no length
        main(["check", name, "--bundles", str(source.parent)])
        said.append(capsys.readouterr().out.splitlines()[1:])
    assert said[0] == said[1]
    runners = [open_bundle(directory, threads=1) for directory in (source, made.directory)]
    vectors = [runner.embed(images=sorted(pictures.glob("*.png")), texts=[]) for runner in runners]
    np.testing.assert_array_equal(*vectors)


def test_bounds_keep_the_answers_that_infinity_takes(colours, pictures, data):
    """Bit 30 of the matrix's first 1.0: infinity. Without bounds no picture has an answer (`test_inject`). A stored
    bound gives 1 back; a layer's zero form loses the number that passes infinity alone, the red picture's."""
    source = colours("colours-float")
    assert calibrate(source, "--data", pictures, "--out", "stored") == 0
    assert calibrate(source, "--data", pictures, "--out", "zero", "--form", "zero", "--stored", "none") == 0
    from tests.export.resilience.test_inject import fault

    expected = {"colours-float": 0.0, "stored": 1.0, "zero": 2 / 3}
    for name, agreement in expected.items():
        subject = Subject(open_bundle(source.with_name(name), threads=1), data, ["image"], ["weight"])
        assert subject.trial(fault(0, 0, 30)).agreement == pytest.approx(agreement), name


def test_what_is_refused(colours, pictures, capsys, tmp_path):
    source = colours("colours-float")
    assert calibrate(source, "--data", pictures) == 0
    bounded = source.with_name("colours-bounded-float")

    def said(directory: Path, *flags: object) -> str:
        assert calibrate(directory, *flags) == 2
        return capsys.readouterr().err

    assert "colours-bounded-float has bounds already" in said(bounded)
    assert "exists; choose another name (--out), or --replace" in said(source)
    assert "is no folder" in said(source, "--data", tmp_path / "none", "--out", "other")
    assert "holds no pictures" in said(source, "--data", source, "--out", "other")
    assert "--refine moves bounds" in said(source, "--form", "smooth", "--refine", "--out", "other")
    assert [path.name for path in source.parent.iterdir() if path.name.startswith(".")] == []


def test_a_graph_without_layers_is_refused(colours, capsys):
    def plain(graphs: dict[str, onnx.ModelProto]) -> None:
        for model in graphs.values():
            row = next(node for node in model.graph.node if node.output[0] == "row")
            row.op_type, kept = "Identity", row.input[0]
            row.input[:] = [kept]
            del model.graph.initializer[:]
            gather = next((node for node in model.graph.node if node.op_type == "Gather"), None)
            if gather:
                model.graph.node.remove(gather)
                one_hot = parse("g (int64[B, T] ids) => (float[B, T, 3] each) { each = OneHot (ids, n, ab) }")
                model.graph.node.insert(0, one_hot.graph.node[0])
            fixed = {"area": np.array([2, 3]), "tokens": np.array([1]), "n": np.array([3]), "ab": np.array([0, 1])}
            for name, array in fixed.items():
                tensor = onnx.numpy_helper.from_array(array.astype("float32" if name == "ab" else "int64"), name)
                if any(name in node.input for node in model.graph.node):
                    model.graph.initializer.append(tensor)

    source = colours("plain", plain)
    assert calibrate(source, "--graphs", "image", "--count", "2") == 2
    assert "so there is nothing to bound" in capsys.readouterr().err


def test_refinement_shrinks_the_last_layer_first_and_keeps_the_best():
    """Two bounds; the clean vectors are [[1, 0], [0, 1]] while both factors are at least .75, and turn below. Faults
    add what the bounds let pass, so that smaller bounds answer better."""
    seen: list[tuple[float, float]] = []

    def clean(state):
        ends = (float(state["a"].high), float(state["b"].high))
        seen.append(ends)
        return np.eye(2) if min(ends) >= 0.75 else np.eye(2)[::-1]

    def faulty(state):
        return np.eye(2) + np.array([[0, float(state["b"].high) + 0.5 * float(state["a"].high)], [0, 0]])

    start = {name: Bound(np.float32(0), np.float32(1)) for name in ("a", "b")}
    best, steps = refine.refine(clean, [faulty], start)
    assert [(step.tensor, step.factor) for step in steps] == [("b", 0.75), ("a", 0.75)]
    assert (float(best["a"].high), float(best["b"].high)) == (0.75, 0.75)
    assert np.allclose(seen[1:4], [(1, 0.9), (1, 0.75), (1, 0.5)])  # b is last, so it moves first
    assert steps[-1].cosine == pytest.approx((1 / np.hypot(1, 1.125) + 1) / 2)


def test_an_answer_counts_although_its_vector_stays_near():
    """Two vectors with the cosine .9992 change places below a factor of .8: the cosine allows it, the answer not."""
    near = np.array([[1, 0.02], [1, -0.02]])
    start = {"a": Bound(np.float32(0), np.float32(1))}
    best, _ = refine.refine(
        lambda state: near if state["a"].high >= 0.8 else near[::-1],
        [lambda state: near + np.array([[0, -float(state["a"].high)], [0, 0]])],
        start,
    )
    assert best["a"].high == pytest.approx(0.9)


def test_agreement_of_vectors():
    truth = np.eye(3)
    vectors = np.array([[0.9, 0.1, 0], [1, 0, 0], [0, np.nan, 1]])
    assert refine.agreement(vectors, truth) == pytest.approx(1 / 3)
    assert refine.agreement(truth, truth) == 1


def test_runs_replace_bounds_without_a_new_session():
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = MatMul (x, w) }", w=np.eye(2, dtype=np.float32))
    feed = {"x": np.array([[1, 0], [0, 2]], np.float32)}
    places = sites(model)
    limits = bounds(model, places, observe(model, [feed], places, [None]))
    made = insert(model, limits, forms(places, "clamp"))
    clean, faulty = refine.runs(made, "y", feed, limits, 0.01, 3, 0)
    assert clean(limits).tolist() == [[1, 0], [0, 2]]
    assert clean({"y": Bound(np.float32(0), np.float32(1.5))}).tolist() == [[1, 0], [0, 1.5]]
    assert len(faulty) == 3
    assert any(run(limits).tolist() != [[1, 0], [0, 2]] for run in faulty)


def test_a_refined_bundle_is_sealed(colours, pictures, capsys):
    source = colours("colours-float")
    flags = ("--refine", "--rate", "0.01", "--faults", "2", "--graphs", "image", "--stored", "none", "--json")
    assert calibrate(source, "--data", pictures, *flags) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["refined"] is True
    assert value["graphs"]["image"]["against_unbounded"]["image_embeds"]["cosine_min"] > 0.9
    with pytest.raises(BadRequest):
        Subject(open_bundle(source.with_name("colours-bounded-float")), None, ["detect"])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--portable",)])
@pytest.mark.parametrize("method", ["layer", "hybrid"])
def test_int8_bundles_with_and_without_the_op_library(tiny_hf_clip, tmp_path, flags, method):
    """A transformer with our operators, and one with quantize and dequantize pairs: bounded, it serves the same
    vectors."""
    assert main(["export", str(tiny_hf_clip), "--out", str(tmp_path), "--name", "tiny", "--keep-float", *flags]) == 0
    for kind in ("int8", "float"):
        source = tmp_path / f"tiny-{kind}"
        assert calibrate(source, "--count", 16, "--method", method) == 0
        bounded = source.with_name(f"tiny-bounded-{kind}")
        assert read(bounded).manifest.portable == bool(flags)
        for ops in ("auto", "off"):
            assert main(["check", bounded.name, "--bundles", str(tmp_path), "--ops", ops]) == 0
            runners = [open_bundle(directory, threads=1, ops=ops) for directory in (source, bounded)]
            feeds = {"images": calibration_pictures()[:4], "texts": calibration_texts()[:1]}
            pairs = [runner.embed(**feeds) for runner in runners]
            np.testing.assert_allclose(pairs[1], pairs[0], atol=2e-6)
