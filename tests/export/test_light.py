"""Large graphs without their weights. The oracles are ONNX's shape inference and plain sessions of ONNX Runtime."""

import gc
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from calmclip.export import light
from calmclip.export.trace import to_onnx
from tests.export.graphs import parse


@pytest.fixture(scope="module")
def model(tiny_hf_clip):
    from calmclip.export.nets import NETS

    return to_onnx(NETS.get("clip").load(str(tiny_hf_clip)).towers["text"])


def test_only_large_weights_are_removed_and_all_come_back(model, monkeypatch):
    monkeypatch.setattr(light, "SMALL", 4096)  # a tiny net has no larger weight
    bare = light.lighten(model)
    external = {t.name for t in bare.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert external == {t.name for t in model.graph.initializer if len(t.raw_data) >= light.SMALL}
    assert 0 < len(external) < len(model.graph.initializer)
    assert len(bare.SerializeToString()) < len(model.SerializeToString()) / 4
    assert light.lighten(bare) == bare
    filled = light.fill(bare, model)
    for part in ("node", "input", "output", "value_info", "initializer"):
        assert list(getattr(filled.graph, part)) == list(getattr(model.graph, part)), part
    assert list(filled.opset_import) == list(model.opset_import)
    assert (filled.ir_version, filled.producer_name) == (model.ir_version, model.producer_name)


@pytest.mark.parametrize("large", [light.LARGE, 0])  # in memory, and through a file
def test_a_session_equals_a_plain_session_after_the_graph_is_deleted(
    model, large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(light, "LARGE", large)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    session = light.Session(copy)
    del copy
    gc.collect()
    ids = {"ids": np.arange(14).reshape(2, 7)}
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for _ in range(3):
        noise = [np.full(100_000, np.nan) for _ in range(20)]  # overwrites freed memory
        np.testing.assert_array_equal(session.run(None, ids)[0], plain.run(None, ids)[0])
        del noise
    assert not [*tmp_path.iterdir()]


def test_shapes_are_those_of_the_graph_with_weights(model):
    assert light.shapes(model) == list(onnx.shape_inference.infer_shapes(model).graph.value_info)


def test_the_checker_still_finds_an_error(model):
    light.check(model)
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    broken.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(onnx.checker.ValidationError, match="nowhere"):
        light.check(broken)


@pytest.mark.slow
def test_a_graph_over_two_gigabytes_is_run_checked_and_saved(tmp_path):
    """The limit of protobuf is 2 GiB. y = x W V; W and V take 2.4 GB and average, so y is the mean of x."""
    from calmclip.export import weights

    rows, columns = 12_000, 25_000
    names, shapes = ("w", "v"), ((rows, columns), (columns, rows))
    model = parse(f"g (float[B, {rows}] x) => (float[B, {rows}] y) {{ h = MatMul (x, w) y = MatMul (h, v) }}")
    for name, shape in zip(names, shapes, strict=True):
        tensor = numpy_helper.from_array(np.full(shape, 1 / shape[0], np.float32), name)
        model.graph.initializer.append(tensor)
        del tensor
    light.check(model)
    weights.save({"image": model}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.bin", "image.onnx"]
    x = np.random.default_rng(0).random((1, rows), np.float32)
    del model
    session = ort.InferenceSession(tmp_path / "image.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], np.full((1, rows), x.mean()), rtol=1e-4)
