"""Softmax -> ours: the graph before and after, against torch; and what it must leave alone."""

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


def left(model):
    """Nothing was done; -> why, for the one place there is."""
    found = rewrites.apply(model, RULE)
    assert found.counts == {"softmax": 0}
    assert found.ops() == {}
    assert found.model == model
    (why,) = found.missed["softmax"].values()
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


def test_every_softmax_of_a_net_becomes_ours_and_the_answers_stay():
    model = attention()
    found = rewrites.apply(model, RULE)
    assert found.counts == {"softmax": 3}
    assert found.missed == {}
    assert [n.op_type for n in found.model.graph.node if n.domain == DOMAIN] == ["Softmax"] * 3
    assert not [n for n in found.model.graph.node if n.op_type == "Softmax" and n.domain == ""]
    torch_found = Attention()(*(torch.from_numpy(feeds()[name]) for name in ("x", "mask"))).numpy()
    for one in (model, found.model):
        np.testing.assert_allclose(onnx_run(one)(feeds())["y"], torch_found, atol=1e-6)


def test_all_else_in_the_graph_stays_as_it_was():
    model = attention()
    found = rewrites.apply(model, RULE).model
    for one, other in zip(model.graph.node, found.graph.node, strict=True):
        assert (one.name, one.op_type, one.input, one.output) == (other.name, other.op_type, other.input, other.output)
        assert other.domain == (DOMAIN if one.op_type == "Softmax" else "")
        assert not other.metadata_props
        if one.op_type != "Softmax":
            assert one.attribute == other.attribute
    assert model.graph.initializer == found.graph.initializer
    assert model.graph.input == found.graph.input
    assert model.graph.output == found.graph.output
    assert [(v.name, v.type) for v in model.graph.value_info] == [(v.name, v.type) for v in found.graph.value_info]
    assert [o for o in found.opset_import if o.domain == ""] == list(model.opset_import)


@pytest.mark.parametrize(("axis", "text"), [(-1, ""), (1, "<axis = 1>"), (0, "<axis = 0>")])
def test_its_axis_is_the_standard_ops(axis, text):
    model = rewrites.apply(graph(f"y = Softmax {text} (x)"), RULE).model
    (node,) = model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"axis": axis, "gamma": 0.0, "zeta": 1.0}
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(onnx_run(model)({"x": x})["y"], torch.softmax(torch.from_numpy(x), axis), atol=1e-7)


def test_between_eight_bits_it_takes_the_place_of_the_runtimes_own_softmax_in_integers(library):
    model = graph(
        "f = DequantizeLinear (x, s, z) p = Softmax (f) y = QuantizeLinear (p, t, z)",
        "uint8[b, 77] x, float s, float t, uint8 z",
        "uint8[b, 77] y",
    )
    found = rewrites.apply(model, RULE)
    assert found.counts == {"softmax": 1}
    x = np.random.default_rng(3).integers(0, 256, (40, 77), np.uint8)
    exact = torch.softmax(torch.from_numpy(x).double() * 0.03125, -1).numpy() / np.float64(np.float32(1 / 255))
    sure = np.abs(exact % 1 - 0.5) > 1e-4  # not at a tie
    feed = {"x": x, "s": np.array(0.03125, "f4"), "t": np.array(1 / 255, "f4"), "z": np.array(0, "u1")}
    for one in (None, library):
        assert np.array_equal(onnx_run(found.model, library=one)(feed)["y"][sure], np.rint(exact)[sure])
    assert np.array_equal(
        onnx_run(model, apart=["p"])(feed)["y"][sure], np.rint(exact)[sure]
    )  # what it is held against
    assert [value.name for value in model.graph.output] == ["y"]


def test_a_softmax_whose_nan_is_looked_for_is_left_alone():
    """As `scaled_dot_product_attention` is decomposed: 0 for a row that is masked throughout, where ours has 1/n."""
    model = graph(
        "p = Softmax (x) none = IsNaN (p) y = Where (none, zero, p)", "float[b, 7] x, float zero", "float[b, 7] y"
    )
    assert "IsNaN" in left(model)


def test_half_precision_is_left_alone():
    assert (
        left(graph("y = Softmax (x)", "float16[b, 7] x", "float16[b, 7] y"))
        == "its input is FLOAT16; the op takes FLOAT"
    )


def test_types_that_the_graph_does_not_state_are_worked_out():
    body = "z = Cast <to = 1> (x) p = Softmax (z) y = Cast <to = 10> (p)"
    assert rewrites.apply(graph(body, "float16[b, 7] x", "float16[b, 7] y"), RULE).counts == {"softmax": 1}
