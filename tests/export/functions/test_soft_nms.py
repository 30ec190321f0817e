"""SoftNMS as a local function: in a plain ONNX Runtime against the numpy reference, and against the op library."""

import numpy as np
import pytest

from calmclip.export.functions import alone
from calmclip.export.parity import onnx_run
from calmclip.models.ops import reference
from calmclip.models.ops.spec import METHODS, SOFT_NMS


def model(*front):
    """The node and its body. ``front``: dimensions before N."""
    inputs, outputs = (
        {n: t.model_copy(update={"shape": (*front, *t.shape)}) if t.shape[0] == "N" else t for n, t in tensors.items()}
        for tensors in (SOFT_NMS.inputs, SOFT_NMS.outputs)
    )
    return alone(SOFT_NMS, inputs, outputs, {})


@pytest.fixture(scope="module")
def session():
    return onnx_run(model())


@pytest.fixture(scope="module")
def batches():
    return onnx_run(model("B"))


@pytest.fixture(scope="module")
def compiled(library):
    """The same two graphs with the op library: its kernel runs instead of the function."""
    return onnx_run(model(), library=library), onnx_run(model("B"), library=library)


def run(session, boxes, scores, classes, *, method, per_class=False, threshold=0.3, sigma=0.5, least=1e-3, most=100):
    settings = (
        np.array([METHODS.index(method)]),
        np.array([int(per_class)]),
        *(np.array([value], np.float32) for value in (threshold, sigma, least)),
        np.array([most]),
    )
    return [*session(dict(zip(SOFT_NMS.inputs, (boxes, scores, classes, *settings), strict=True))).values()]


def scene(seed, n):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-50, 50, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 70, (n, 2))], axis=1).astype(np.float32)
    boxes[rng.random(n) < 0.05, 2] = -60  # x1 < x0
    return boxes, rng.random(n).astype(np.float32), rng.integers(0, 4, n)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 60, 250])
def test_equals_the_reference(session, n, method, per_class):
    for seed in range(6):
        boxes, scores, classes = scene(seed, n)
        for threshold, sigma, least in ((0.3, 0.5, 1e-3), (0.6, 0.1, 0.2), (0.05, 2.0, 0.0)):
            how = {"method": method, "per_class": per_class, "sigma": sigma}
            output = run(session, boxes, scores, classes, threshold=threshold, least=least, most=1000, **how)
            expected = reference.soft_nms(boxes, scores, classes, iou_threshold=threshold, min_score=least, **how)
            # in float32 two scores may swap that float64 tells apart: compare per box, then the order of the scores
            assert dict(zip(output[0].tolist(), output[1].tolist(), strict=True)) == pytest.approx(
                dict(zip(expected.indices.tolist(), expected.scores.tolist(), strict=True)), rel=1e-4, abs=1e-7
            )
            assert output[1] == pytest.approx(expected.scores, rel=1e-4, abs=1e-7)
            assert output[2].tolist() == classes[output[0]].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_stops_at_max_output_with_the_best(session, method):
    boxes, scores, classes = scene(3, 100)
    expected = reference.soft_nms(boxes, scores, classes, method=method, max_output=9)
    assert run(session, boxes, scores, classes, method=method, most=9)[0].tolist() == expected.indices.tolist()


def test_ties_go_to_the_lower_index(session):
    boxes = np.array([[0, 0, 2, 2], [5, 5, 7, 7], [0, 0, 2, 2]], np.float32)
    output = run(session, boxes, np.full(3, 0.5, np.float32), np.zeros(3, np.int64), method="hard")
    assert output[0].tolist() == [0, 1]


def test_a_nan_score_drops_out(session):
    boxes = np.array([[0, 0, 2, 2], [5, 5, 7, 7]], np.float32)
    output = run(session, boxes, np.array([np.nan, 0.5], np.float32), np.zeros(2, np.int64), method="gaussian")
    assert output[0].tolist() == [1]


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 20), (1, 9), (4, 1), (2, 0), (0, 5), (0, 0)])
def test_a_batch_equals_the_reference(batches, shape, method, per_class):
    boxes, scores, classes = scene(11, shape[0] * shape[1])
    boxes, scores, classes = boxes.reshape(*shape, 4), scores.reshape(shape), classes.reshape(shape)
    scores[:1] *= 1e-3  # the first image has no box above the least score
    for most in (0, 3, 1000):
        output = run(batches, boxes, scores, classes, method=method, per_class=per_class, most=most)
        how = {"method": method, "per_class": per_class, "max_output": most}
        expected, images = reference.soft_nms_batch(boxes, scores, classes, **how)
        np.testing.assert_array_equal(output[0], expected.indices)
        np.testing.assert_allclose(output[1], expected.scores, rtol=1e-5)
        np.testing.assert_array_equal(output[2], expected.classes)
        np.testing.assert_array_equal(output[3], images)
        assert [part.dtype for part in output] == [np.int64, np.float32, np.int64, np.int64]


ODD = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-30, -0.0, 2e19, 0.0], np.float32)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_library_gives_what_the_function_gives(session, compiled, method, per_class):
    """Invalid boxes, overlaps equal to the threshold, settings at their limits."""
    rng = np.random.default_rng(12)
    for number in range(60):
        boxes, scores, classes = scene(number, int(rng.integers(0, 70)))
        if number % 2:
            boxes, scores = boxes.round(), np.float32(scores + 0.01)
        if number % 3 == 0:
            boxes = np.where(rng.random(boxes.shape) < 0.1, rng.choice(ODD, boxes.shape), boxes)
        how = {
            "method": method,
            "per_class": per_class,
            "threshold": float(rng.choice([-1, 0, 0.25, 0.3, 0.5, 1])),
            "sigma": float(rng.choice([1e-40, 0.1, 0.5, 1e30, np.inf])),
            "least": float(rng.choice([-np.inf, 0, 1e-3, 0.2])),
            "most": int(rng.choice([0, 1, 5, 1000])),
        }
        ours, theirs = (run(opened, boxes, scores, classes, **how) for opened in (compiled[0], session))
        for place in (0, 2, 3):
            np.testing.assert_array_equal(ours[place], theirs[place])
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6, rtol=1e-6)
        if method != "gaussian":  # no exp: the same bits
            np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("method", METHODS)
def test_the_library_gives_what_the_function_gives_for_a_batch(batches, compiled, method):
    for shape in ((5, 40), (1, 1), (3, 0), (0, 3)):
        boxes, scores, classes = scene(13, shape[0] * shape[1])
        feeds = boxes.reshape(*shape, 4), scores.reshape(shape), classes.reshape(shape)
        for most in (0, 4, 1000):
            ours, theirs = (
                run(opened, *feeds, method=method, per_class=True, most=most) for opened in (compiled[1], batches)
            )
            for place in (0, 2, 3):
                np.testing.assert_array_equal(ours[place], theirs[place])
            np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)
