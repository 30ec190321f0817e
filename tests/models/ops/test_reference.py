"""SoftNMS in numpy: vectors worked out elsewhere, a greedy loop of our own and torchvision's, and its invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from calmclip.models.errors import BadRequest
from calmclip.models.ops.reference import iou, soft_nms
from calmclip.models.ops.spec import METHODS

# Five boxes whose results were computed in float64 outside this project's code.
BOXES = np.array([[0, 0, 100, 100], [10, 10, 110, 110], [20, 20, 120, 120], [200, 200, 300, 300], [0, 0, 50, 100]])
SCORES = np.array([0.95, 0.9, 0.8, 0.85, 0.6])


@st.composite
def scenes(draw):
    """Boxes on a grid of whole pixels, distinct scores: no two results that rounding could swap."""
    n = draw(st.integers(0, 12))
    sides = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(0, 20)] * 2)
    boxes = np.array([draw(sides) for _ in range(n)], np.float64).reshape(n, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array(draw(st.permutations(range(1, n + 1))), np.float64) / 16
    classes = np.array([draw(st.integers(0, 2)) for _ in range(n)], np.int64)
    return boxes, scores, classes


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ((0, 1), 0.680672),
        ((0, 2), 0.470588),
        ((0, 4), 0.5),
        ((1, 2), 0.680672),
        ((1, 4), 0.315789),
        ((2, 4), 0.190476),
        ((0, 3), 0.0),
    ],
)
def test_iou(pair, value):
    assert iou(BOXES[pair[0]], BOXES[pair[1] : pair[1] + 1])[0] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("how", "indices", "scores"),
    [
        ({"method": "hard"}, [0, 3], [0.95, 0.85]),
        ({"method": "linear"}, [0, 3, 2, 4, 1], [0.95, 0.85, 0.423529, 0.3, 0.062792]),
        ({"method": "gaussian"}, [0, 3, 2, 4, 1], [0.95, 0.85, 0.513734, 0.338447, 0.115548]),
        ({"method": "gaussian", "sigma": 0.3}, [0, 3, 2, 4, 1], [0.95, 0.85, 0.382387, 0.231056, 0.029407]),
        ({"method": "linear", "min_score": 0.3}, [0, 3, 2, 4], [0.95, 0.85, 0.423529, 0.3]),
        ({"method": "linear", "max_output": 2}, [0, 3], [0.95, 0.85]),
    ],
)
def test_golden_vectors(how, indices, scores):
    kept = soft_nms(BOXES, SCORES, **how)
    assert kept.indices.tolist() == indices
    assert kept.scores == pytest.approx(scores, abs=1e-6)


def test_boxes_without_area_suppress_nothing():
    boxes = [[4, 3, 5, 3], [4, 3, 5, 4], *[[3, 1, 3, 1]] * 4]
    kept = soft_nms(np.array(boxes), np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0]), method="linear", iou_threshold=0.6)
    assert kept.indices.tolist() == [0, 1, 2, 3, 4]  # the last is under min_score
    assert kept.scores == pytest.approx([0.9, 0.9, 0.5, 0.5, 0.4])


def test_infinite_sides_count_as_no_area():
    boxes = np.array([[0, 0, np.inf, 10], [0, 0, 10, 10], [-np.inf, 0, 10, 10]])
    assert soft_nms(boxes, np.array([0.9, 0.8, 0.7]), method="hard").indices.tolist() == [0, 1, 2]


def test_nothing_in_nothing_out():
    kept = soft_nms(np.empty((0, 4)), np.empty(0), method="gaussian")
    assert [part.shape for part in kept] == [(0,)] * 3
    assert [part.dtype for part in kept] == [np.int64, np.float32, np.int64]


def test_ties_go_to_the_lower_index():
    boxes = np.array([[0, 0, 2, 2], [5, 5, 7, 7], [0, 0, 2, 2]])
    assert soft_nms(boxes, np.full(3, 0.5), method="hard").indices.tolist() == [0, 1]


def test_a_nan_score_is_named():
    with pytest.raises(BadRequest, match="score 1 is NaN"):
        soft_nms(BOXES[:3], np.array([0.5, np.nan, 0.5]), method="hard")


@pytest.mark.parametrize(("how", "says"), [({"sigma": 0.0}, "sigma"), ({"method": "soft"}, "hard, linear, gaussian")])
def test_settings_out_of_range_are_refused(how, says):
    with pytest.raises(BadRequest, match=says):
        soft_nms(BOXES, SCORES, **{"method": "gaussian", **how})


def test_hard_equals_torchvision_on_a_thousand_sets():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n = int(rng.integers(1, 40))
        corner = rng.uniform(0, 60, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(0, 60, (n, 2))], axis=1).astype(np.float32)
        scores = rng.permutation(n).astype(np.float32) / n
        threshold = float(rng.uniform(0.1, 0.9))
        expected = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).tolist()
        kept = soft_nms(boxes, scores, method="hard", iou_threshold=threshold, min_score=0.0)
        assert kept.indices.tolist() == expected


def textbook(boxes, scores, method, threshold=0.3, sigma=0.5, least=1e-3):
    """The paper's figure 2, box by box, with the score test of mmcv: (index, score) pairs."""
    left, found = {i: float(s) for i, s in enumerate(scores) if s >= least}, []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        found.append((best, left.pop(best)))
        a = boxes[best]
        for i, b in list(zip(left, boxes[list(left)], strict=True)):
            shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
            o = shared / union if shared else 0.0
            decay = {"hard": 0.0, "linear": 1 - o}
            left[i] *= np.exp(-o * o / sigma) if method == "gaussian" else decay[method] if o > threshold else 1.0
            if left[i] < least:
                del left[i]
    return found


@given(scenes(), st.sampled_from(METHODS))
@settings(max_examples=150, deadline=None)
def test_equals_the_textbook(scene, method):
    boxes, scores, _ = scene
    kept = soft_nms(boxes, scores, method=method)
    expected = textbook(boxes, scores, method)
    assert kept.indices.tolist() == [i for i, _ in expected]
    assert kept.scores == pytest.approx([s for _, s in expected], rel=1e-6)


@given(scenes(), st.sampled_from(METHODS))
@settings(max_examples=60, deadline=None)
def test_scores_do_not_rise_and_stay_over_the_floor(scene, method):
    boxes, scores, _ = scene
    kept = soft_nms(boxes, scores, method=method, min_score=0.1).scores
    assert (np.diff(kept) <= 0).all()
    assert (kept >= np.float32(0.1)).all()


@given(scenes(), st.sampled_from(METHODS), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_boxes_does_not_matter(scene, method, random):
    boxes, scores, _ = scene
    order = list(range(len(scores)))
    random.shuffle(order)
    plain = soft_nms(boxes, scores, method=method)
    mixed = soft_nms(boxes[order], scores[order], method=method)
    decayed = dict(zip(plain.indices.tolist(), plain.scores.tolist(), strict=True))
    assert {order[i]: s for i, s in zip(mixed.indices, mixed.scores.tolist(), strict=True)} == decayed


@given(scenes(), st.sampled_from(METHODS), st.integers(-64, 64), st.sampled_from([0.25, 2.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_neither_shift_nor_scale_matters(scene, method, shift, scale):
    boxes, scores, _ = scene
    plain = soft_nms(boxes, scores, method=method)
    moved = soft_nms(boxes * scale + shift, scores, method=method)
    assert moved.indices.tolist() == plain.indices.tolist()
    assert moved.scores == pytest.approx(plain.scores, rel=1e-6)


@given(scenes(), st.sampled_from(METHODS))
@settings(max_examples=60, deadline=None)
def test_per_class_is_each_class_alone(scene, method):
    boxes, scores, classes = scene
    together = soft_nms(boxes, scores, classes, method=method, per_class=True)
    alone = {}
    for name in set(classes.tolist()):
        rows = np.flatnonzero(classes == name)
        kept = soft_nms(boxes[rows], scores[rows], method=method)
        alone |= dict(zip(rows[kept.indices].tolist(), kept.scores.tolist(), strict=True))
    assert dict(zip(together.indices.tolist(), together.scores.tolist(), strict=True)) == alone
    assert together.classes.tolist() == classes[together.indices].tolist()


@given(scenes())
@settings(max_examples=40, deadline=None)
def test_an_endless_sigma_and_a_threshold_of_one_change_no_score(scene):
    boxes, scores, _ = scene
    for how in ({"method": "gaussian", "sigma": 1e12}, {"method": "linear", "iou_threshold": 1.0}):
        kept = soft_nms(boxes, scores, **how)
        assert kept.scores == pytest.approx(sorted(scores, reverse=True))
