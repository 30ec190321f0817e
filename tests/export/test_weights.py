from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calmclip.export import weights
from calmclip.export.weights import SHARED, save
from tests.export.graphs import parse

RNG = np.random.default_rng(0)
COMMON = RNG.standard_normal((64, 64)).astype(np.float32)  # 16 KiB


def graph(private: np.ndarray) -> onnx.ModelProto:
    """y = x @ COMMON @ private"""
    text = "g (float[B, 64] x) => (float[B, 64] y) { h = MatMul (x, common) y = MatMul (h, private) }"
    return parse(text, common=COMMON, private=private)


def is_product(file: Path, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the graph computes x @ first @ second."""
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    (y,) = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    want = x.astype(np.float64) @ first.astype(np.float64) @ second.astype(np.float64)
    return y == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_a_weight_of_two_graphs_is_stored_once_and_both_still_run(tmp_path: Path):
    privates = {role: RNG.standard_normal((64, 64)).astype(np.float32) for role in ("image", "regions")}
    save({role: graph(private) for role, private in privates.items()}, tmp_path)
    assert (tmp_path / SHARED).stat().st_size == COMMON.nbytes
    assert all((tmp_path / f"{role}.onnx").stat().st_size < 1.3 * COMMON.nbytes for role in privates)
    assert all(is_product(tmp_path / f"{role}.onnx", COMMON, private) for role, private in privates.items())


def test_a_single_graph_contains_its_weights(tmp_path: Path):
    save({"image": graph(COMMON + 1)}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["image.onnx"]


def test_a_graph_over_the_limit_gets_a_file_for_its_private_weights(tmp_path: Path, monkeypatch):
    """With a limit of 16 KiB, one weight fits and two do not. Shared weights stay in the shared file."""
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
    assert is_product(tmp_path / "text.onnx", COMMON + 3, COMMON + 2)
    assert is_product(tmp_path / "image.onnx", COMMON, COMMON + 1)


def test_two_shared_weights_start_on_pages(tmp_path: Path):
    small = RNG.standard_normal((64, 64)).astype(np.float32)[:33]  # 8448 bytes, no multiple of a page
    a, b = graph(COMMON + 1), graph(COMMON + 1)
    for model in (a, b):
        model.graph.initializer.insert(0, numpy_helper.from_array(small, "small"))  # the next weight needs an offset
    save({"a": a, "b": b}, tmp_path)
    offsets = {
        int(entry.value)
        for i in onnx.load(tmp_path / "a.onnx", load_external_data=False).graph.initializer
        for entry in i.external_data
        if entry.key == "offset"
    }
    assert len(offsets) == 3
    assert all(offset % 4096 == 0 for offset in offsets)
