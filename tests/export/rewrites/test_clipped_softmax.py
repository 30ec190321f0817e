"""The four nodes of a clipped softmax -> one op Softmax: constants, variants, and graphs that only look alike."""

import itertools
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import parser

from calmclip.export import rewrites
from calmclip.export.nets import Tower
from calmclip.export.parity import onnx_run
from calmclip.export.rewrites.clipped_softmax import stretch
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.ops.spec import DOMAIN

BOTH = ["softmax", "clipped_softmax"]


def graph(a=1.03, b=-0.03, low=0.0, high=1.0, *, mul="s, a", add="m, b", more="", outputs="float[r, n] y"):
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[r, n] x) => ({outputs})
        <float a = {{{a}}}, float b = {{{b}}}, float low = {{{low}}}, float high = {{{high}}}>
        {{ s = Softmax <axis = -1> (x) m = Mul ({mul}) t = Add ({add}) y = Clip (t, low, high) {more} }}
    """)


def settings(model):
    (node,) = [n for n in model.graph.node if n.domain == DOMAIN]
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def rows(seed=0):
    return np.random.default_rng(seed).standard_normal((50, 40)).astype(np.float32) * 4


def clipped(x, gamma, zeta):
    chances = torch.softmax(torch.from_numpy(x).double(), -1)
    return torch.clip((zeta - gamma) * chances + gamma, 0, 1).numpy()


class Written(torch.nn.Module):
    def __init__(self, gamma, zeta, minus):
        super().__init__()
        self.gamma, self.zeta, self.minus = gamma, zeta, minus

    def forward(self, x):
        wide = torch.softmax(x, dim=-1) * (self.zeta - self.gamma)
        return torch.clip(wide - -self.gamma if self.minus else wide + self.gamma, 0, 1)


@pytest.mark.parametrize(("mul", "add"), [*itertools.product(("s, a", "a, s"), ("m, b", "b, m"))])
def test_operands_in_either_order(mul, add):
    model = graph(mul=mul, add=add)
    done = rewrites.apply(model, BOTH)
    assert done.counts == {"softmax": 0, "clipped_softmax": 1}
    assert [n.op_type for n in done.model.graph.node] == ["Softmax"]
    assert settings(done.model) == {"axis": -1, "gamma": pytest.approx(-0.03), "zeta": 1.0}
    x = rows()
    before, after = (onnx_run(version)({"x": x})["y"] for version in (model, done.model))
    np.testing.assert_allclose(after, before, atol=2e-7)
    np.testing.assert_allclose(after, clipped(x, -0.03, 1.0), atol=1e-6)
    assert 0.2 < (after == 0).mean() < 1  # it clips


@pytest.mark.parametrize("minus", [False, True])
def test_a_graph_traced_by_torch(minus):
    spec = Tensor(dtype="float32", shape=("B", 40))
    tower = Tower(Written(-0.025, 1.003, minus), {"x": spec}, {"y": spec}, None, quantizer="none")
    model = to_onnx(tower)
    assert ("Sub" in [node.op_type for node in model.graph.node]) == minus
    done = rewrites.apply(model, BOTH)
    assert done.counts == {"softmax": 0, "clipped_softmax": 1}
    assert settings(done.model) == {"axis": -1, "gamma": pytest.approx(-0.025), "zeta": pytest.approx(1.003)}
    np.testing.assert_allclose(onnx_run(done.model)({"x": rows()})["y"], clipped(rows(), -0.025, 1.003), atol=1e-6)


def test_the_factor_comes_back_to_within_an_ulp():
    """The kernel's factor, float32(zeta - gamma), equals the factor of the graph except for its last bit."""
    for gamma in -np.logspace(-7, 1, 400).astype(np.float32):
        for zeta in (1.0, 1.0 + 1e-6, 1.003, 1.1, 2.5, 12.0):
            a = np.float32(np.float32(zeta) - gamma)
            zeta_back = stretch(a, gamma)
            assert zeta_back.dtype == np.float32
            assert zeta_back >= 1
            assert abs(np.float32(zeta_back - gamma) - a) <= np.spacing(a)


def test_zeta_is_never_a_rounding_below_one():
    for step in np.arange(1, 2000):
        gamma = np.float32(-step / 1000)
        a = np.float32(1 - float(gamma))
        done = rewrites.apply(graph(float(a), float(gamma)), BOTH) if step % 250 == 0 else None
        assert stretch(a, gamma) == 1.0
        assert done is None or done.counts["clipped_softmax"] == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"high": 0.9}, r"the clip is \[0, 0.9\]; expected \[0, 1\]"),
        ({"low": -0.5}, r"the clip is \[-0.5, 1\]; expected \[0, 1\]"),
        ({"b": 0.1}, r"gamma is 0.1 and zeta 1.13; expected -1e30 <= gamma <= 0"),
        ({"a": 0.9}, r"gamma is -0.03 and zeta 0.87; .* and 1 <= zeta <= 1e30"),
        ({"mul": "s, x"}, "not one constant number: the factor$"),
        ({"mul": "s, x", "add": "m, x"}, "not one constant number: the factor, the summand$"),
        ({"a": 0.0}, "gamma is -0.03 and zeta -0.03"),
        ({"more": "w = Relu (m)", "outputs": "float[r, n] y, float[r, n] w"}, "a value between its nodes is used"),
        ({"outputs": "float[r, n] y, float[r, n] s"}, "a value between its nodes is used"),
    ],
)
def test_a_graph_that_only_looks_alike_keeps_its_clip_and_gets_a_plain_softmax(change, why):
    model = graph(**change)
    done = rewrites.apply(model, BOTH)
    assert done.counts == {"softmax": 1, "clipped_softmax": 0}
    assert settings(done.model) == {"axis": -1, "gamma": 0.0, "zeta": 1.0}
    (reason,) = done.missed["clipped_softmax"].values()
    assert re.search(why, reason)
    before, after = (onnx_run(version)({"x": rows()})["y"] for version in (model, done.model))
    np.testing.assert_allclose(after, before, atol=2e-7)


@pytest.mark.parametrize(
    ("factor", "y"),
    [("float[2] a = {1.1, 1.2}", "float[r, 2] y"), ("float[1, 1, 1] a = {1.1}", "float[1, r, 2] y")],
    ids=["a factor per head", "a factor that adds an axis"],
)
def test_a_factor_of_another_shape_is_not_matched(factor, y):
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[r, 2] x) => ({y})
        <{factor}, float[1] b = {{-0.1}}, float low = {{0.0}}, float high = {{1.0}}>
        {{ s = Softmax (x) m = Mul (s, a) t = Add (m, b) y = Clip (t, low, high) }}
    """)
    assert rewrites.apply(model, BOTH).counts == {"softmax": 1, "clipped_softmax": 0}


@pytest.mark.parametrize("name", ["a", "b", "low", "high"])
def test_a_number_that_the_caller_may_change_is_not_a_constant(name):
    """An initializer that is also an input is only a default value."""
    model = graph()
    model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []))
    onnx.checker.check_model(model)
    done = rewrites.apply(model, BOTH)
    assert done.counts == {"softmax": 1, "clipped_softmax": 0}
    changed = {"x": rows(), name: np.array(0.5, np.float32)}
    before, after = (onnx_run(version)(changed)["y"] for version in (model, done.model))
    np.testing.assert_allclose(after, before, atol=2e-7)


@pytest.mark.parametrize(("a", "b"), [("inf", -0.1), (3.4e38, -3.3e38), (2e30, -1e29), (2e30, -1.5e30)])
def test_numbers_out_of_the_ops_range_stay_in_standard_ops(library, a, b):
    model = graph(b=b)
    (number,) = [i for i in model.graph.initializer if i.name == "a"]
    number.CopyFrom(onnx.numpy_helper.from_array(np.float32(a), "a"))
    done = rewrites.apply(model, BOTH)
    assert done.counts == {"softmax": 1, "clipped_softmax": 0}
    assert onnx_run(done.model, library=library)({"x": rows()})["y"].shape == (50, 40)


def test_half_precision_does_not_change():
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float16[r, 2] x) => (float16[r, 2] y)
        {
            two = Constant <value_float = 2.0> () one = Constant <value_float = 1.0> ()
            a = Cast <to = 10> (two) b = Cast <to = 10> (one) low = Neg (b) high = Neg (low)
            s = Softmax (x) m = Mul (s, a) t = Add (m, b) y = Clip (t, low, high)
        }
    """)
    done = rewrites.apply(model, BOTH)
    assert done.ops() == {}
    assert list(done.missed["clipped_softmax"].values()) == ["its input is FLOAT16; the op takes FLOAT"]


def test_constants_may_be_nodes():
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[r, n] x) => (float[r, n] y)
        {
            a = Constant <value_float = 1.5> () b = Constant <value = float[1] {-0.25}> ()
            low = Constant <value_float = 0.0> () high = Constant <value_float = 1.0> ()
            s = Softmax (x) m = Mul (s, a) t = Add (m, b) y = Clip (t, low, high)
        }
    """)
    done = rewrites.apply(model, BOTH)
    assert settings(done.model) == {"axis": -1, "gamma": -0.25, "zeta": 1.25}
    onnx.checker.check_model(done.model, full_check=True)
