from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from calmclip.export import weights
from calmclip.export.weights import SHARED, save

RNG = np.random.default_rng(0)
COMMON = RNG.standard_normal((64, 64)).astype(np.float32)  # 16 KiB


def graph(own: np.ndarray) -> onnx.ModelProto:
    """y = x @ COMMON @ own"""
    nodes = [helper.make_node("MatMul", ["x", "common"], ["h"]), helper.make_node("MatMul", ["h", "own"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 64]) for name in "xy"]
    weights = [numpy_helper.from_array(COMMON, "common"), numpy_helper.from_array(own, "own")]
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), opset_imports=opset, ir_version=10
    )


def test_what_two_graphs_hold_is_stored_once_and_both_still_run(tmp_path: Path):
    owns = {role: RNG.standard_normal((64, 64)).astype(np.float32) for role in ("image", "regions")}
    save({role: graph(own) for role, own in owns.items()}, tmp_path)
    assert (tmp_path / SHARED).stat().st_size == COMMON.nbytes
    assert all((tmp_path / f"{role}.onnx").stat().st_size < 1.3 * COMMON.nbytes for role in owns)
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    for role, own in owns.items():
        session = ort.InferenceSession(tmp_path / f"{role}.onnx", providers=["CPUExecutionProvider"])
        want = x.astype(np.float64) @ COMMON.astype(np.float64) @ own.astype(np.float64)
        assert session.run(None, {"x": x})[0] == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_one_graph_alone_keeps_its_weights_inside(tmp_path: Path):
    save({"image": graph(COMMON + 1)}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["image.onnx"]


def test_a_graph_with_too_much_inside_gets_a_file_for_its_own_weights(tmp_path: Path, monkeypatch):
    """Protobuf's limit, made small: 16 KiB fit, 32 do not. What is shared lies with what is shared."""
    monkeypatch.setattr(weights, "LARGEST", 16 << 10)
    graphs = {"image": graph(COMMON + 1), "text": graph(COMMON + 2), "regions": graph(COMMON + 1)}
    graphs["text"].graph.initializer[0].CopyFrom(numpy_helper.from_array(COMMON + 3, "common"))
    before = {role: model.SerializeToString() for role, model in graphs.items()}
    save(graphs, tmp_path)
    assert {role: model.SerializeToString() for role, model in graphs.items()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "image.onnx", "regions.onnx", "text.bin", "text.onnx", "weights.bin",
    ]  # fmt: skip
    assert (tmp_path / "text.bin").stat().st_size == 2 * COMMON.nbytes
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    for role, first, second in (("text", COMMON + 3, COMMON + 2), ("image", COMMON, COMMON + 1)):
        session = ort.InferenceSession(tmp_path / f"{role}.onnx", providers=["CPUExecutionProvider"])
        want = x.astype(np.float64) @ first.astype(np.float64) @ second.astype(np.float64)
        assert session.run(None, {"x": x})[0] == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_two_shared_weights_start_on_pages(tmp_path: Path):
    small = RNG.standard_normal((64, 64)).astype(np.float32)[:33]  # 8448 bytes, no multiple of a page
    a, b = graph(COMMON + 1), graph(COMMON + 1)
    for model in (a, b):
        model.graph.initializer.insert(0, numpy_helper.from_array(small, "small"))  # what follows must be moved on
    save({"a": a, "b": b}, tmp_path)
    offsets = {
        int(entry.value)
        for i in onnx.load(tmp_path / "a.onnx", load_external_data=False).graph.initializer
        for entry in i.external_data
        if entry.key == "offset"
    }
    assert len(offsets) == 3
    assert all(offset % 4096 == 0 for offset in offsets)
