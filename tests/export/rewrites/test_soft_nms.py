"""Candidates -> SoftNMS attached: the detector's answers against the numpy reference, and graphs without candidates."""

import re

import numpy as np
import onnx
import pytest
from onnx import parser

from calmclip.export import rewrites
from calmclip.export.parity import onnx_run
from calmclip.export.rewrites.soft_nms import SETTINGS
from calmclip.models.ops import reference
from calmclip.models.ops.spec import DOMAIN, METHODS, SOFT_NMS

RULE = ["soft_nms"]
BODY = """
    scaled = Mul (b, two)
    candidate_boxes = Identity (scaled)
    candidate_scores = Sigmoid (s)
    candidate_classes = Identity (c)
    count = Shape (s)
"""
ENDS = "float[n, 4] candidate_boxes, float[n] candidate_scores, int64[n] candidate_classes, int64[1] count"


def detector(inputs="float[n, 4] b, float[n] s, int64[n] c", outputs=ENDS, body=BODY):
    return parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> d ({inputs}) => ({outputs}) <float two = {{2.0}}> {{ {body} }}'
    )


def scene(n=60):
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, 40, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 30, (n, 2))], axis=1).astype(np.float32)
    return {"b": boxes, "s": rng.standard_normal(n).astype(np.float32), "c": rng.integers(0, 3, n)}


def settings(method, per_class, most=1000):
    values = {"method": METHODS.index(method), "per_class": per_class, "max_output": most}
    values |= {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.2}
    return {name: np.array([values[name]], tensor.dtype) for name, tensor in SETTINGS.items()}


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_graph_answers_as_the_reference_on_its_candidates(method, per_class):
    model = detector()
    candidates = onnx_run(model)(scene())
    done = rewrites.apply(model, RULE)
    assert done.counts == {"soft_nms": 1}
    assert done.ops() == {"SoftNMS": 1}
    answer = onnx_run(done.model)({**scene(), **settings(method, int(per_class))})
    boxes, scores, classes = (candidates[f"candidate_{name}"] for name in ("boxes", "scores", "classes"))
    expected = reference.soft_nms(boxes, scores, classes, method=method, per_class=per_class, min_score=0.2)
    assert 5 < len(expected.indices) < 60
    np.testing.assert_array_equal(answer["kept_boxes"], boxes[expected.indices])
    np.testing.assert_array_equal(answer["raw_scores"], scores[expected.indices])
    np.testing.assert_allclose(answer["scores"], expected.scores, rtol=1e-5)
    np.testing.assert_array_equal(answer["classes"], expected.classes)
    assert answer["count"].tolist() == [60]


def test_the_answers_come_in_one_order_and_the_settings_are_inputs():
    changed = rewrites.apply(detector(), RULE).model
    assert [v.name for v in changed.graph.output] == ["kept_boxes", "scores", "raw_scores", "classes", "count"]
    assert [v.name for v in changed.graph.input] == ["b", "s", "c", *SETTINGS]
    onnx.checker.check_model(changed, full_check=True)
    (node,) = [n for n in changed.graph.node if n.domain == DOMAIN]
    assert list(node.input) == ["candidate_boxes", "candidate_scores", "candidate_classes", *SETTINGS]
    assert len(node.output) == len(SOFT_NMS.outputs)  # a new output in the spec is also a new output of the node


def test_an_existing_input_for_a_setting_is_reused():
    body = BODY + "good = GreaterOrEqual (candidate_scores, min_score)"
    model = detector("float[n, 4] b, float[n] s, int64[n] c, float[1] min_score", f"{ENDS}, bool[n] good", body)
    changed = rewrites.apply(model, RULE).model
    assert sorted(v.name for v in changed.graph.input) == sorted(["b", "s", "c", *SETTINGS])
    answer = onnx_run(changed)({**scene(), **settings("hard", 0)})
    assert answer["scores"].min() >= 0.2
    assert answer["good"].sum() < 60


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (
            parser.parse_model(
                '<ir_version: 10, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { y = Relu (x) }'
            ),
            "it has no output candidate_boxes, candidate_scores, candidate_classes",
        ),
        (detector(outputs=ENDS.replace(", int64[n] candidate_classes", "")), "it has no output candidate_classes"),
        (
            detector("float[m, n, 4] b, float[n] s, int64[n] c", ENDS.replace("[n, 4]", "[m, n, 4]")),
            "candidate_boxes is FLOAT .* expected float32",
        ),
        (
            detector("float[n, 4] b, float[n] s, int32[n] c", ENDS.replace("int64[n]", "int32[n]")),
            "candidate_classes is INT32 .* expected int64",
        ),
        (
            detector("float[n, 4] b, float[n] s, int64[n] c, float[3] sigma", ENDS, BODY),
            r"sigma is FLOAT \[3\]; expected float32 \[1\]",
        ),
        (detector(body=BODY + "scores = Relu (s)"), "it has a tensor 'scores' already"),
        (detector(body=BODY.replace("scaled", "sigma")), "it has a tensor 'sigma' already"),
        (
            parser.parse_model(str(onnx.printer.to_text(detector())).replace("two", "sigma")),
            "it has a tensor 'sigma' already",
        ),
    ],
)
def test_a_graph_without_candidates_does_not_change_and_the_report_says_why(graph, why):
    done = rewrites.apply(graph, RULE)
    assert done.counts == {"soft_nms": 0}
    assert done.model == graph
    assert re.search(why, done.missed["soft_nms"]["the graph"])
