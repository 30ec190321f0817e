"""The graphs that ship without weights, beside those that torch traces from the modules."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from calmclip.export import light
from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED, constants, graphs
from calmclip.export.nets.mini.draw import traced
from calmclip.models.errors import ExportError

ROLES = ("image", "text", "regions", "dense", "masks", "attribution")


def serialized(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def without_empty_fields(model: onnx.ModelProto) -> onnx.ModelProto:
    """The tracer sets texts to "", which protobuf writes; `graphs` keeps those of small constants alone."""
    assert not model.producer_version
    model.ClearField("producer_version")
    for part in (model, model.graph, *model.graph.initializer):
        assert not part.doc_string
        part.ClearField("doc_string")
    return model


@pytest.mark.slow  # five traces
def test_torch_draws_these_very_graphs_with_these_very_weights():
    """Byte for byte, so that an export by torch would give the same bundle."""
    arrays, models = constants(SHIPPED, DETECTOR, MASKS), traced()
    assert {*arrays} == {*models} == {*ROLES}
    for role, model in models.items():
        emptied = serialized(graphs.emptied(model, arrays[role]))
        assert emptied == (graphs.FOLDER / f"{role}.onnx").read_bytes(), "run calmclip.export.nets.mini.draw"
        filled = graphs.filled(role, arrays[role])
        assert [t.name for t in filled.graph.initializer] == [t.name for t in model.graph.initializer]
        assert serialized(without_empty_fields(filled)) == serialized(without_empty_fields(model)), role


@pytest.mark.parametrize("role", ROLES)
def test_a_drawn_graph_holds_no_large_constant(role: str):
    model = onnx.load(graphs.FOLDER / f"{role}.onnx", load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert len(outside) >= 9  # `masks` has so many
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert all(len(t.raw_data) < graphs.LEAST for t in inside)


def small(shape: str = "64, 2") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 64] x) => (float[1, 2] y) <float[{shape}] w> {{ y = MatMul (x, w) }}"""
    )
    array = np.arange(128, dtype=np.float32).reshape([int(side) for side in shape.split(",")])
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    return model


def test_a_transposed_weight_is_found_and_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = light.lighten(small(), 10**6)  # a copy without the parser's marks
    weight = np.arange(128, dtype=np.float32).reshape(64, 2).T.copy()
    empty = graphs.emptied(model, {"layer.weight": weight})
    (tensor,) = empty.graph.initializer
    assert {item.key: item.value for item in tensor.external_data} == {"location": "layer.weight", "transposed": "1"}
    onnx.save(empty, tmp_path / "small.onnx")
    monkeypatch.setattr(graphs, "FOLDER", tmp_path)
    assert serialized(graphs.filled("small", {"layer.weight": weight})) == serialized(model)


def test_a_constant_that_is_no_parameter_is_an_error():
    with pytest.raises(ExportError, match=r"the constant w \[64, 2\] is no parameter, nor its transpose"):
        graphs.emptied(small(), {"layer.weight": np.zeros((2, 64), np.float32)})
