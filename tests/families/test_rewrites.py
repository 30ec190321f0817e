"""What every rewrite promises, each on a graph that holds its pattern."""

import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser
from pydantic import ValidationError

from export import rewrites
from export.rewrites import REWRITES
from models.ops.spec import DOMAIN, VERSION

NAMES = REWRITES.names()
_NUMBERS = "<float a = {1.1}, float b = {-0.1}, float low = {0.0}, float high = {1.0}>"
# rule -> a graph it fires on once, without the header
EXAMPLES = {
    "softmax": "g (float[r, 7] x) => (float[r, 7] y) { s = Softmax (x) y = Relu (s) }",
    "clipped_softmax": f"""g (float[r, 7] x) => (float[r, 7] y) {_NUMBERS}
        {{ s = Softmax (x) m = Mul (s, a) t = Add (m, b) y = Clip (t, low, high) }}""",
    "image_to_pixels": "g (float[b, 3, 8, 8] pixels) => (float[b, 3, 8, 8] y) { y = Relu (pixels) }",
    "soft_nms": """
        g (float[n, 4] b, float[n] s, int64[n] c) =>
          (float[n, 4] candidate_boxes, float[n] candidate_scores, int64[n] candidate_classes)
        { candidate_boxes = Relu (b) candidate_scores = Sigmoid (s) candidate_classes = Abs (c) }""",
}
PARAMS: dict[str, dict] = {
    "image_to_pixels": {"preprocess": {"size": (8, 8), "shortest": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}}
}
SWAPS = [name for name in NAMES if not REWRITES.get(name).attaches]
NOTHING = "g (float[r, 7] x) => (float[r, 7] y) { y = Relu (x) }"


def graph(text: str, opset: int = 20) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')


def applied(name: str, model: onnx.ModelProto) -> rewrites.Applied:
    return rewrites.apply(model, [name], PARAMS)


def test_every_rule_has_an_example():
    assert sorted(EXAMPLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_fires_once_and_says_so(name: str):
    found = applied(name, graph(EXAMPLES[name]))
    assert found.counts == {name: 1}
    assert found.missed == {}
    assert found.ops() == {REWRITES.get(name).op.name: 1}
    onnx.checker.check_model(found.model, full_check=True)


@pytest.mark.parametrize("name", NAMES)
def test_its_node_is_what_the_spec_says(name: str):
    op = REWRITES.get(name).op
    (node,) = [n for n in applied(name, graph(EXAMPLES[name])).model.graph.node if n.domain == DOMAIN]
    assert (len(node.input), len(node.output)) == (len(op.inputs), len(op.outputs))
    assert {a.name for a in node.attribute} == set(op.attributes)
    assert node.name


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_brings_the_ops_body_and_a_plain_runtime_loads_it(name: str):
    model = applied(name, graph(EXAMPLES[name])).model
    op = REWRITES.get(name).op
    (function,) = model.functions
    assert (function.domain, function.name) == (DOMAIN, op.name)
    assert (list(function.input), list(function.output)) == (list(op.inputs), list(op.outputs))
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, DOMAIN: VERSION}
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", SWAPS)
def test_one_that_swaps_leaves_inputs_outputs_and_answers(name: str):
    before = graph(EXAMPLES[name])
    after = applied(name, before).model
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32) * 3
    one, other = (ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0] for m in (before, after))
    np.testing.assert_allclose(other, one, atol=1e-6)


@pytest.mark.parametrize("name", SWAPS)
def test_one_that_swaps_finds_nothing_more_in_what_it_made(name: str):
    once = applied(name, graph(EXAMPLES[name])).model
    again = applied(name, once)
    assert again.counts == {name: 0}
    assert again.model == once


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_a_graph_without_its_pattern_alone(name: str):
    model = graph(NOTHING)
    found = applied(name, model)
    assert found.counts == {name: 0}
    assert found.model == model
    assert bool(found.missed) == REWRITES.get(name).attaches  # which was asked for, so it must say why not


@pytest.mark.parametrize("opset", [12, 17, 18, 22])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_older_than_the_ops_body_stays_as_it_is_and_says_why(name: str, opset: int):
    """One model has one opset; the checker refuses a body of a later one, and Softmax was another op before 13."""
    model = graph(EXAMPLES[name], opset)
    found = applied(name, model)
    assert found.counts == {name: int(opset >= 18)}
    onnx.checker.check_model(found.model, full_check=True)
    if opset < 18:
        assert found.model == model
        assert found.missed == {name: {"the graph": f"it is of opset {opset}; the body of the op needs 18"}}


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_the_graph_it_is_given_alone_and_answers_the_same_twice(name: str):
    model = graph(EXAMPLES[name])
    before = model.SerializeToString(deterministic=True)
    first, second = (applied(name, model).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_does_and_where_it_is_from(name: str):
    module = sys.modules[REWRITES.get(name).rewrite.__module__]
    assert module.__doc__
    assert "Source: " in module.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_params_that_are_not_its_own_are_refused(name: str):
    with pytest.raises(ValidationError, match="no_such_param"):
        rewrites.apply(graph(NOTHING), [name], {name: {**PARAMS.get(name, {}), "no_such_param": 1}})
