"""Softmax -> the op Softmax: the graph before and after, against torch; and graphs that must not change."""

import numpy as np
import onnx
import pytest
import torch
from onnx import parser

from calmclip.export import rewrites
from calmclip.export.nets import Tower
from calmclip.export.parity import onnx_run
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.ops.spec import DOMAIN

RULE = ["softmax"]


def graph(body, inputs="float[b, h, 5, n] x", outputs="float[b, h, 5, n] y", opset=20):
    return parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')


def missed(model):
    """The graph did not change -> why, for its only near miss."""
    done = rewrites.apply(model, RULE)
    assert done.counts == {"softmax": 0}
    assert done.ops() == {}
    assert done.model == model
    (why,) = done.missed["softmax"].values()
    return why


class Attention(torch.nn.Module):
    """Two layers of attention with an additive mask, as exporters write it, and scores over labels along axis 1."""

    def forward(self, x, mask):
        for _ in range(2):
            x = torch.softmax(3 * x @ x.transpose(1, 2) + mask, dim=-1) @ x
        return torch.softmax(x, dim=1)


def attention():
    shape = ("B", "T", 8)
    x, y = Tensor(dtype="float32", shape=shape), Tensor(dtype="float32", shape=shape)
    mask = Tensor(dtype="float32", shape=("B", "T", "T"))
    return to_onnx(Tower(Attention(), {"x": x, "mask": mask}, {"y": y}, None, quantizer="none"))


def feeds():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 6, 8)).astype(np.float32)
    mask = np.where(np.tril(np.ones((6, 6))), 0.0, -np.inf).astype(np.float32)
    return {"x": x, "mask": np.stack([mask, np.zeros((6, 6), np.float32), np.where(mask < 0, -1e4, 0)]).astype("f4")}


def test_every_softmax_of_a_net_is_replaced_and_the_answers_stay():
    model = attention()
    done = rewrites.apply(model, RULE)
    assert done.counts == {"softmax": 3}
    assert done.missed == {}
    assert [n.op_type for n in done.model.graph.node if n.domain == DOMAIN] == ["Softmax"] * 3
    assert not [n for n in done.model.graph.node if n.op_type == "Softmax" and n.domain == ""]
    torch_output = Attention()(*(torch.from_numpy(feeds()[name]) for name in ("x", "mask"))).numpy()
    for version in (model, done.model):
        np.testing.assert_allclose(onnx_run(version)(feeds())["y"], torch_output, atol=1e-6)


def test_nothing_else_in_the_graph_changes():
    model = attention()
    changed = rewrites.apply(model, RULE).model
    for node, other in zip(model.graph.node, changed.graph.node, strict=True):
        assert (node.name, node.op_type, node.input, node.output) == (
            other.name,
            other.op_type,
            other.input,
            other.output,
        )
        assert other.domain == (DOMAIN if node.op_type == "Softmax" else "")
        assert not other.metadata_props
        if node.op_type != "Softmax":
            assert node.attribute == other.attribute
    assert model.graph.initializer == changed.graph.initializer
    assert model.graph.input == changed.graph.input
    assert model.graph.output == changed.graph.output
    assert [(v.name, v.type) for v in model.graph.value_info] == [(v.name, v.type) for v in changed.graph.value_info]
    assert [o for o in changed.opset_import if o.domain == ""] == list(model.opset_import)


@pytest.mark.parametrize(("axis", "text"), [(-1, ""), (1, "<axis = 1>"), (0, "<axis = 0>")])
def test_the_axis_is_that_of_the_standard_op(axis, text):
    model = rewrites.apply(graph(f"y = Softmax {text} (x)"), RULE).model
    (node,) = model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"axis": axis, "gamma": 0.0, "zeta": 1.0}
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(onnx_run(model)({"x": x})["y"], torch.softmax(torch.from_numpy(x), axis), atol=1e-7)


def test_between_quantized_tensors_it_replaces_the_runtimes_integer_softmax(library):
    model = graph(
        "f = DequantizeLinear (x, s, z) p = Softmax (f) y = QuantizeLinear (p, t, z)",
        "uint8[b, 77] x, float s, float t, uint8 z",
        "uint8[b, 77] y",
    )
    done = rewrites.apply(model, RULE)
    assert done.counts == {"softmax": 1}
    x = np.random.default_rng(3).integers(0, 256, (40, 77), np.uint8)
    exact = torch.softmax(torch.from_numpy(x).double() * 0.03125, -1).numpy() / np.float64(np.float32(1 / 255))
    sure = np.abs(exact % 1 - 0.5) > 1e-4  # not at a tie
    feed = {"x": x, "s": np.array(0.03125, "f4"), "t": np.array(1 / 255, "f4"), "z": np.array(0, "u1")}
    for op_library in (None, library):
        assert np.array_equal(onnx_run(done.model, library=op_library)(feed)["y"][sure], np.rint(exact)[sure])
    assert np.array_equal(onnx_run(model, apart=["p"])(feed)["y"][sure], np.rint(exact)[sure])  # the oracle agrees
    assert [value.name for value in model.graph.output] == ["y"]


def test_a_softmax_with_a_nan_check_does_not_change():
    """The decomposition of `scaled_dot_product_attention`: 0 for a fully masked row, for which our op answers 1/n."""
    model = graph(
        "p = Softmax (x) none = IsNaN (p) y = Where (none, zero, p)", "float[b, 7] x, float zero", "float[b, 7] y"
    )
    assert "IsNaN" in missed(model)


def test_half_precision_does_not_change():
    assert (
        missed(graph("y = Softmax (x)", "float16[b, 7] x", "float16[b, 7] y"))
        == "its input is FLOAT16; the op takes FLOAT"
    )


def test_types_that_the_graph_does_not_state_are_inferred():
    body = "z = Cast <to = 1> (x) p = Softmax (z) y = Cast <to = 10> (p)"
    assert rewrites.apply(graph(body, "float16[b, 7] x", "float16[b, 7] y"), RULE).counts == {"softmax": 1}
