"""SoftNMS as a local function in a plain ONNX Runtime, against the numpy reference."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.functions.soft_nms import OPSET, soft_nms
from models.ops import reference
from models.ops.spec import DOMAIN, METHODS, SOFT_NMS, VERSION


@pytest.fixture(scope="module")
def session():
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    declare = lambda tensors: [helper.make_tensor_value_info(k, kinds[t.dtype], t.shape) for k, t in tensors.items()]  # noqa: E731
    node = helper.make_node(SOFT_NMS.name, list(SOFT_NMS.inputs), list(SOFT_NMS.outputs), domain=DOMAIN)
    graph = helper.make_graph([node], "alone", declare(SOFT_NMS.inputs), declare(SOFT_NMS.outputs))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[soft_nms()], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, boxes, scores, classes, *, method, per_class=False, threshold=0.3, sigma=0.5, least=1e-3, most=100):
    settings = (
        np.array([METHODS.index(method)]),
        np.array([int(per_class)]),
        *(np.array([value], np.float32) for value in (threshold, sigma, least)),
        np.array([most]),
    )
    return session.run(None, dict(zip(SOFT_NMS.inputs, (boxes, scores, classes, *settings), strict=True)))


def scene(seed, n):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-50, 50, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 70, (n, 2))], axis=1).astype(np.float32)
    boxes[rng.random(n) < 0.05, 2] = -60  # turned inside out
    return boxes, rng.random(n).astype(np.float32), rng.integers(0, 4, n)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 60, 250])
def test_equals_the_reference(session, n, method, per_class):
    for seed in range(6):
        boxes, scores, classes = scene(seed, n)
        for threshold, sigma, least in ((0.3, 0.5, 1e-3), (0.6, 0.1, 0.2), (0.05, 2.0, 0.0)):
            how = {"method": method, "per_class": per_class, "sigma": sigma}
            kept = run(session, boxes, scores, classes, threshold=threshold, least=least, most=1000, **how)
            expected = reference.soft_nms(boxes, scores, classes, iou_threshold=threshold, min_score=least, **how)
            # in float32 two scores may swap that float64 tells apart: compare per box, then the order of the scores
            assert dict(zip(kept[0].tolist(), kept[1].tolist(), strict=True)) == pytest.approx(
                dict(zip(expected.indices.tolist(), expected.scores.tolist(), strict=True)), rel=1e-4, abs=1e-7
            )
            assert kept[1] == pytest.approx(expected.scores, rel=1e-4, abs=1e-7)
            assert kept[2].tolist() == classes[kept[0]].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_stops_at_max_output_with_the_best(session, method):
    boxes, scores, classes = scene(3, 100)
    expected = reference.soft_nms(boxes, scores, classes, method=method, max_output=9)
    assert run(session, boxes, scores, classes, method=method, most=9)[0].tolist() == expected.indices.tolist()


def test_ties_go_to_the_lower_index(session):
    boxes = np.array([[0, 0, 2, 2], [5, 5, 7, 7], [0, 0, 2, 2]], np.float32)
    kept = run(session, boxes, np.full(3, 0.5, np.float32), np.zeros(3, np.int64), method="hard")
    assert kept[0].tolist() == [0, 1]


def test_a_nan_score_drops_out(session):
    boxes = np.array([[0, 0, 2, 2], [5, 5, 7, 7]], np.float32)
    kept = run(session, boxes, np.array([np.nan, 0.5], np.float32), np.zeros(2, np.int64), method="gaussian")
    assert kept[0].tolist() == [1]
