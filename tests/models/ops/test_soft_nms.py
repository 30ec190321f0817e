"""SoftNMS: the reference and kernels of every instruction set against float64, torchvision, mmcv's rule and each other.

The op in ONNX Runtime is compared with the reference.
"""

import ctypes
import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calmclip.models.errors import BadRequest
from calmclip.models.ops import build, reference
from calmclip.models.ops.spec import METHODS, SOFT_NMS
from tests.models.ops.harness import Contract, kernels, load, model, node

ISAS = build.isas("")
SIZES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)
FLOAT, SIZE, POINTER = ctypes.c_float, ctypes.c_size_t, ctypes.c_void_p
IMAGE = ctypes.CFUNCTYPE(  # SoftNmsImage of csrc/kernels/soft_nms.h
    SIZE, *[POINTER] * 3, SIZE, *[ctypes.c_int] * 2, *[FLOAT] * 3, SIZE, *[POINTER] * 2
)
RACE = ctypes.CFUNCTYPE(SIZE, *[POINTER] * 6, SIZE, ctypes.c_int, *[FLOAT] * 3, SIZE, *[POINTER] * 3)  # SoftNms

# five boxes; their results were computed in float64 outside this project's code
BOXES = np.array([[0, 0, 100, 100], [10, 10, 110, 110], [20, 20, 120, 120], [200, 200, 300, 300], [0, 0, 50, 100]])
SCORES = np.array([0.95, 0.9, 0.8, 0.85, 0.6])


def suppress(function, boxes, scores, classes=None, *, method, per_class=False, iou_threshold=0.3, sigma=0.5,
             min_score=1e-3, max_output=None):  # fmt: skip
    """-> indices, scores. Memory past the results must not change."""
    boxes, scores = np.ascontiguousarray(boxes, np.float32), np.ascontiguousarray(scores, np.float32)
    n, most = len(scores), len(scores) if max_output is None else max_output
    labels = np.zeros(n, np.int64) if classes is None else np.ascontiguousarray(classes, np.int64)
    room = min(n, most)
    kept, decayed = np.full(room + 8, -7, np.int64), np.full(room + 8, -7, np.float32)
    count = function(
        *(part.ctypes.data for part in (boxes, scores, labels)),
        n,
        METHODS.index(method),
        int(per_class),
        iou_threshold,
        sigma,
        min_score,
        most,
        kept.ctypes.data,
        decayed.ctypes.data,
    )
    assert count <= room
    assert (kept[room:] == -7).all()
    assert (decayed[room:] == -7).all()
    return kept[:count], decayed[:count]


def by_reference(boxes, scores, classes=None, **how):
    """-> indices, scores."""
    return reference.soft_nms(np.float32(boxes), np.float32(scores), classes, **how)[:2]


@pytest.fixture(scope="module")
def images(library):
    """Instruction set -> `suppress` with its kernel."""
    functions = kernels(library, "soft_nms_image", IMAGE)
    return {isa: functools.partial(suppress, function) for isa, function in functions.items()}


@pytest.fixture(scope="module")
def every(images):
    """The kernels and the reference, for properties of all."""
    return [*images.values(), by_reference]


@pytest.fixture(params=[*ISAS, "reference"])
def image(request):
    if request.param == "reference":
        return by_reference
    images = request.getfixturevalue("images")
    if request.param not in images:
        pytest.skip(f"this processor has no {request.param}")
    return images[request.param]


def random_boxes(rng, n, most=60.0):
    corner = rng.uniform(0, 100, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(0, most, (n, 2))], axis=1).astype(np.float32)


def random_scores(rng, n):
    return (rng.permutation(n).astype(np.float32) + 1) / np.float32(n + 1)


def close(kept, expected, rel=2e-6):
    """The same boxes with the same scores. Two scores that differ only in float64 may swap in float32."""
    assert dict(zip(kept[0].tolist(), kept[1].tolist(), strict=True)) == pytest.approx(
        dict(zip(expected.indices.tolist(), expected.scores.tolist(), strict=True)), rel=rel, abs=1e-9
    )
    assert kept[1] == pytest.approx(expected.scores, rel=rel, abs=1e-9)


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
    assert reference.iou(BOXES[pair[0]], BOXES[pair[1] : pair[1] + 1])[0] == pytest.approx(value, abs=1e-6)


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
def test_golden_vectors(image, how, indices, scores):
    kept, decayed = image(BOXES, SCORES, **how)
    assert kept.tolist() == indices
    assert decayed == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scores": np.array([0.5, np.nan, 0.5])}, "score 1 is NaN"),
        ({"sigma": 0.0}, "sigma"),
        ({"method": "soft"}, "hard, linear, gaussian"),
    ],
)
def test_the_reference_refuses(change, says):
    with pytest.raises(BadRequest, match=says):
        reference.soft_nms(**{"boxes": BOXES[:3], "scores": SCORES[:3], "method": "gaussian"} | change)


def test_boxes_without_area_suppress_nothing(image):
    boxes = [[4, 3, 5, 3], [4, 3, 5, 4], *[[3, 1, 3, 1]] * 4]
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], np.float32)
    kept, decayed = image(boxes, scores, method="linear", iou_threshold=0.6)
    assert kept.tolist() == [0, 1, 2, 3, 4]  # the last is under min_score
    assert decayed.tolist() == scores[:5].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", SIZES)
def test_equals_float64(images, n, method):
    rng = np.random.default_rng(n)
    rounds = 1 if n == 1000 else 3
    for _ in range(rounds):
        boxes, scores, classes = random_boxes(rng, n), random_scores(rng, n), rng.integers(-2, 3, n)
        for per_class in (False, True):
            how = {"method": method, "per_class": per_class, "iou_threshold": 0.4, "sigma": 0.3}
            expected = reference.soft_nms(boxes, scores, classes, **how)
            results = [image(boxes, scores, classes, **how) for image in images.values()]
            for kept in results:
                close(kept, expected)
                for part, first in zip(kept, results[0], strict=True):
                    assert part.tobytes() == first.tobytes()  # the same bits for all instruction sets


def test_the_race_alone_gives_the_same_bits(library):
    """`soft_nms` itself, on arrays of coordinates at unaligned addresses."""
    rng = np.random.default_rng(5)
    for n, method in itertools.product((1, 16, 33, 300), range(3)):
        boxes = random_boxes(rng, n)
        boxes[rng.random(n) < 0.1] = [np.finfo(np.float32).max] * 2 + [-np.finfo(np.float32).max] * 2
        x0, y0, x1, y1 = boxes.T
        with np.errstate(over="ignore"):
            area = np.where(x1 > x0, (x1 - x0) * (y1 - y0), 0)
        columns = [np.concatenate([[0], c]).astype(np.float32)[1:] for c in (x0, y0, x1, y1, area, rng.random(n))]
        good = area > 0
        expected = reference.soft_nms(
            np.where(good[:, None], boxes, 0), columns[5], method=METHODS[method], min_score=0.0
        )
        bits = set()
        for function in kernels(library, "soft_nms", RACE).values():
            scratch = np.full(64 * ((n + 63) // 64 * 64) + 4096 + 64, 0xA5, np.uint8)
            kept, decayed = np.empty(n, np.int32), np.empty(n, np.float32)
            count = function(
                *(c.ctypes.data for c in columns), n, method, 0.3, 0.5, 0.0, n,
                (scratch.ctypes.data + 63) // 64 * 64, kept.ctypes.data, decayed.ctypes.data
            )  # fmt: skip
            close((kept[:count], decayed[:count]), expected)
            bits.add(kept[:count].tobytes() + decayed[:count].tobytes())
        assert len(bits) == 1


def test_hard_equals_torchvision_on_many_sets(image):
    from torchvision.ops import nms

    rng = np.random.default_rng(0)
    for _ in range(300 if image is by_reference else 1000):
        n = int(rng.integers(1, 80))
        boxes, scores = random_boxes(rng, n), random_scores(rng, n)
        threshold = float(rng.uniform(0.1, 0.9))
        expected = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).tolist()
        kept, decayed = image(boxes, scores, method="hard", iou_threshold=threshold, min_score=0.0)
        assert kept.tolist() == expected
        assert decayed.tolist() == scores[expected].tolist()


@pytest.mark.parametrize("n", [1024, 1025, 5000])  # the blocks' bounds are compared 64 x 16 boxes at a time
def test_many_boxes(images, n):
    from torchvision.ops import nms

    rng = np.random.default_rng(n)
    boxes, scores = random_boxes(rng, n, 10.0), random_scores(rng, n)
    expected = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.3).tolist()
    bits = set()
    for image in images.values():
        assert image(boxes, scores, method="hard", min_score=0.0)[0].tolist() == expected
        bits.add(b"".join(part.tobytes() for part in image(boxes, scores, method="linear", iou_threshold=0.1)))
    assert len(bits) == 1


def mmcv(boxes, scores, method, threshold, sigma, least):
    """mmcv's rule in float64, offset 0: `>=`; every box is tested each round, except the first taken box.

    -> indices, scores.
    """
    boxes, scores = boxes.astype(np.float64), scores.astype(np.float64)
    open_boxes, kept = np.arange(len(scores)), []
    while open_boxes.size:
        best = open_boxes[np.argmax(scores[open_boxes])]
        kept.append(int(best))
        open_boxes = open_boxes[open_boxes != best]
        low, high = (
            np.maximum(boxes[best, :2], boxes[open_boxes, :2]),
            np.minimum(boxes[best, 2:], boxes[open_boxes, 2:]),
        )
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        o = np.divide(shared, areas[best] + areas[open_boxes] - shared, out=np.zeros_like(shared), where=shared > 0)
        scores[open_boxes] *= np.exp(-o * o / sigma) if method == "gaussian" else np.where(o >= threshold, 1 - o, 1)
        open_boxes = open_boxes[scores[open_boxes] >= least]
    return kept, scores[kept]


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_equals_mmcv_on_a_thousand_sets(every, method):
    rng = np.random.default_rng(1)
    for number in range(1000):
        n = int(rng.integers(1, 40))
        boxes, scores = random_boxes(rng, n), random_scores(rng, n)
        alike = number % 4 == 0  # equal sides, or no area: float32 may find other boxes equal
        threshold, sigma, least = float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.1, 1)), float(rng.uniform(0, 0.02))
        boxes = np.floor(boxes / 8) if alike else boxes
        indices, decayed = mmcv(boxes, scores, method, threshold, sigma, least)
        for image in every[-1:] if alike else every if number % 4 == 1 else every[:-1]:
            kept = image(boxes, scores, method=method, iou_threshold=threshold, sigma=sigma, min_score=least)
            assert kept[0].tolist() == indices
            np.testing.assert_allclose(kept[1], decayed, rtol=3e-6)


def greedy32(boxes, scores, classes, *, method, per_class, iou_threshold, min_score, max_output):
    """The rule box by box in numpy's float32, hard and linear; the kernels must give the same bits."""
    boxes, score = np.float32(boxes), np.float32(scores).copy()
    alive, kept = [i for i in range(len(score)) if score[i] >= np.float32(min_score)], []
    limits = np.finfo(np.float32)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    good = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (area >= limits.tiny) & (area <= limits.max)
    while alive and len(kept) < max_output:
        best = max(alive, key=lambda i: (score[i], -i))
        kept.append((best, score[best]))
        alive.remove(best)
        for i in list(alive):
            if per_class and classes[i] != classes[best]:
                continue
            iou = np.float32(0)
            low, high = np.maximum(boxes[i, :2], boxes[best, :2]), np.minimum(boxes[i, 2:], boxes[best, 2:])
            if good[i] and good[best] and (low < high).all():
                shared = np.prod(high - low, dtype=np.float32)
                iou = shared / ((area[i] + area[best]) - shared)
            weight = np.float32(1)
            if iou > np.float32(iou_threshold):
                weight = np.float32(0) if method == "hard" else 1 - iou
            if weight > 0:
                score[i] *= weight
            if not (weight > 0 and score[i] >= np.float32(min_score)):
                alive.remove(i)
    return [i for i, _ in kept], np.array([s for _, s in kept], np.float32)


ODD = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-30, -0.0, 2e19])
COORDINATE = st.one_of(st.integers(0, 24).map(float), st.integers(0, 24).map(float), ODD)
SCORE = st.one_of(st.integers(-4, 16).map(lambda x: x / 16), st.sampled_from([np.inf, -np.inf, -0.0, 1e-45, 3e38]))


@st.composite
def odd_scenes(draw, most=24):
    n = draw(st.integers(0, most))
    boxes = np.array([[draw(COORDINATE) for _ in range(4)] for _ in range(n)], np.float32).reshape(n, 4)
    scores = np.array([draw(SCORE) for _ in range(n)], np.float32)
    classes = np.array([draw(st.sampled_from([0, 1, 2, -(2**63), 2**63 - 1])) for _ in range(n)], np.int64)
    return boxes, scores, classes


SETTINGS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "per_class": st.booleans(),
        "iou_threshold": st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.25, 0.5, 1.0, np.inf]),
        "min_score": st.sampled_from([-np.inf, -0.2, 0.0, 1e-3, 0.25, np.inf]),
        "max_output": st.integers(0, 26),
    }
)


@given(odd_scenes(), SETTINGS, st.sampled_from([1e-40, 0.1, 0.5, 1e30, np.inf]))
@settings(max_examples=120, deadline=None)
def test_odd_floats_follow_the_rule(images, scene, how, sigma):
    """Hard and linear give the rule's bits; gaussian gives the same bits for every instruction set."""
    results = [image(*scene, **how, sigma=sigma) for image in images.values()]
    for kept, decayed in results:
        assert kept.tolist() == results[0][0].tolist()
        assert decayed.tobytes() == results[0][1].tobytes()
        assert (decayed >= np.float32(how["min_score"])).all()
        assert len(set(kept.tolist())) == len(kept)
    if how["method"] != "gaussian":
        with np.errstate(all="ignore"):
            indices, scores = greedy32(*scene, **how)
        assert results[0][0].tolist() == indices
        np.testing.assert_array_equal(results[0][1], scores)


@st.composite
def scenes(draw, most=40):
    n = draw(st.integers(0, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    side = draw(st.sampled_from([2.0, 20.0, 100.0]))
    return random_boxes(rng, n, side), random_scores(rng, n), rng.integers(0, 4, n)


@given(scenes(), st.sampled_from(METHODS), st.integers(0, 40), st.booleans())
@settings(max_examples=80, deadline=None)
def test_scores_do_not_rise_and_max_output_is_a_prefix(every, scene, method, most, per_class):
    for image in every:
        kept, decayed = image(*scene, method=method, per_class=per_class)
        assert (np.diff(decayed) <= 0).all()
        assert (decayed >= np.float32(1e-3)).all()
        cut = image(*scene, method=method, per_class=per_class, max_output=most)
        assert cut[0].tolist() == kept[:most].tolist()
        assert cut[1].tolist() == decayed[:most].tolist()


@given(scenes(), st.sampled_from(METHODS), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_boxes_does_not_matter(every, scene, method, random):
    boxes, scores, _ = scene
    order = list(range(len(scores)))
    random.shuffle(order)
    for image in every:
        plain, mixed = image(boxes, scores, method=method), image(boxes[order], scores[order], method=method)
        assert [order[i] for i in mixed[0]] == plain[0].tolist()
        assert mixed[1].tolist() == plain[1].tolist()


@given(scenes(), st.sampled_from(METHODS), st.sampled_from([0.25, 2.0, 8.0, 2.0**40]))
@settings(max_examples=40, deadline=None)
def test_neither_shift_nor_scale_matters(every, scene, method, scale):
    boxes, scores, _ = scene
    boxes = boxes.round()  # a shift then rounds nothing
    for image in every:
        plain = image(boxes, scores, method=method)
        for moved in (boxes * np.float32(scale), boxes - 512):
            again = image(moved, scores, method=method)
            assert again[0].tolist() == plain[0].tolist()
            assert again[1].tolist() == plain[1].tolist()


@given(scenes(), st.sampled_from(METHODS), st.sampled_from([1, 10**18]))
@settings(max_examples=60, deadline=None)
def test_per_class_is_each_class_alone(every, scene, method, stride):
    boxes, scores, classes = scene
    for image in every:
        kept, decayed = image(boxes, scores, classes * stride - 5, method=method, per_class=True)
        alone = {}
        for name in set(classes.tolist()):
            rows = np.flatnonzero(classes == name)
            mine = image(boxes[rows], scores[rows], method=method)
            alone |= dict(zip(rows[mine[0]].tolist(), mine[1].tolist(), strict=True))
        assert dict(zip(kept.tolist(), decayed.tolist(), strict=True)) == alone
        assert (np.diff(decayed) <= 0).all()


@given(scenes())
@settings(max_examples=30, deadline=None)
def test_an_infinite_sigma_and_a_threshold_of_one_change_no_score(every, scene):
    boxes, scores, _ = scene
    for image in every:
        for how in ({"method": "gaussian", "sigma": 1e12}, {"method": "gaussian", "sigma": np.inf},
                    {"method": "linear", "iou_threshold": 1.0}):  # fmt: skip
            kept, decayed = image(boxes, scores, **how)
            assert decayed.tolist() == sorted(scores.tolist(), reverse=True)
            assert kept.tolist() == np.argsort(-scores).tolist()


@pytest.mark.parametrize("per_class", [False, True])
def test_ties_go_to_the_lower_index(image, per_class):
    n = 500  # apart, in an order that is independent of their positions
    rng = np.random.default_rng(2)
    corner = np.stack(np.divmod(rng.permutation(n), 25), axis=1) * 10.0
    boxes, classes = np.concatenate([corner, corner + 5], axis=1), rng.integers(0, 3, n)
    for method in METHODS:
        kept, _ = image(boxes, np.full(n, 0.5), classes, method=method, per_class=per_class)
        assert kept.tolist() == list(range(n))
    twins = np.repeat(boxes[:20], 2, axis=0)
    kept, _ = image(twins, np.full(40, 0.5), method="hard")
    assert kept.tolist() == list(range(0, 40, 2))


@pytest.mark.parametrize(("shift", "over"), [(3, [0, 1]), (2, [0])])
def test_an_overlap_equal_to_the_threshold_is_not_over_it(image, shift, over):
    # 17 x 10 boxes shifted by 3 share 14 of 20 columns: 7/10, which rounds to 0.7 as float32
    boxes = np.array([[0, 0, 17, 10], [shift, 0, 17 + shift, 10]])
    scores = np.array([0.9, 0.8])
    assert image(boxes, scores, method="hard", iou_threshold=0.7)[0].tolist() == over


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [1e-30, 1e-20])  # areas 0 and 1e-40: under the smallest normal float32
def test_an_area_that_is_no_normal_float_overlaps_nothing(image, side, method):
    boxes, scores = np.array([[0, 0, side, side]] * 3), np.float32([0.9, 0.8, 0.7])
    kept, decayed = image(boxes, scores, method=method)
    assert kept.tolist() == [0, 1, 2]
    assert decayed.tolist() == scores.tolist()


def test_a_side_beyond_float32_overlaps_nothing(image):
    """6e38 by 1/1024: the area fits float32, the width does not."""
    boxes, scores = np.float32([[-3e38, 0, 3e38, 2**-10]] * 2), np.float32([0.9, 0.8])
    assert image(boxes, scores, method="hard")[0].tolist() == [0, 1]
    infinite = np.array([[0, 0, np.inf, 10], [0, 0, 10, 10], [-np.inf, 0, 10, 10]])
    assert image(infinite, np.array([0.9, 0.8, 0.7]), method="hard")[0].tolist() == [0, 1, 2]


def test_the_smallest_sigma_does_not_decay_boxes_that_do_not_overlap(image):
    # IoU 1e-30 / 2e10: in float32 its square is 0 and 1 / sigma is infinite; the weight is still 1
    boxes = np.array([[0, 0, 1e5, 1e5], [-1e5, -1e5, 1e-15, 1e-15]])
    kept, decayed = image(boxes, np.float32([0.9, 0.8]), method="gaussian", sigma=1e-40)
    assert kept.tolist() == [0, 1]
    assert decayed.tolist() == np.float32([0.9, 0.8]).tolist()


def test_exp_is_exact_to_the_last_digits(image):
    """One box of weight exp(-IoU^2 / sigma), over the whole range of float32."""
    for width in np.geomspace(1e-3, 1, 60):
        boxes, scores = np.array([[0, 0, 1, 1], [0, 0, width, 1]]), np.array([2.0, 1.0])
        for sigma in (0.5, 0.1, 0.012, 0.0115, 0.011):
            expected = reference.soft_nms(boxes, scores, method="gaussian", sigma=sigma, min_score=0.0)
            kept, decayed = image(boxes, scores, method="gaussian", sigma=sigma, min_score=0.0)
            assert kept.tolist() == expected.indices.tolist()
            # the exponent, up to 87, is a product of three floats: an error of 1.5 units in the last place
            exponent = float(width) ** 2 / sigma
            assert decayed == pytest.approx(expected.scores, rel=4e-7 + 2e-7 * exponent)


def test_the_reference_of_a_batch_is_each_image_alone():
    rng = np.random.default_rng(3)
    boxes, scores = np.stack([random_boxes(rng, 30) for _ in range(3)]), rng.random((3, 30)).astype(np.float32)
    scores[1] = 0  # no box of this image is kept
    kept, images = reference.soft_nms_batch(boxes, scores, method="linear", max_output=5)
    assert images.tolist() == [0] * 5 + [2] * 5
    for place, row in ((np.s_[:5], 0), (np.s_[5:], 2)):
        alone = reference.soft_nms(boxes[row], scores[row], method="linear", max_output=5)
        for part, batched in zip(alone, kept, strict=True):
            np.testing.assert_array_equal(batched[place], part)
    scores[2, 7] = np.nan
    with pytest.raises(BadRequest, match="image 2: score 7 is NaN"):
        reference.soft_nms_batch(boxes, scores, method="linear")


# the op, in ONNX Runtime


@pytest.fixture(scope="module")
def session(library):
    """One node with inputs of any shape."""
    ends = [
        {name: (tensor.dtype, None) for name, tensor in side.items()} for side in (SOFT_NMS.inputs, SOFT_NMS.outputs)
    ]
    return load(model([node(SOFT_NMS, *ends)], *ends), library, threads=2)


def feeds(boxes, scores, classes, *, method="gaussian", per_class=False, **others):
    values = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 1e-3, "max_output": 1000} | others
    values |= {"method": METHODS.index(method), "per_class": int(per_class)}
    settings_ = {k: np.array([v], np.dtype(SOFT_NMS.inputs[k].dtype)) for k, v in values.items()}
    return {
        "boxes": np.float32(boxes),
        "scores": np.float32(scores),
        "classes": np.asarray(classes, np.int64),
        **settings_,
    }


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_op_equals_the_reference(session, method, per_class):
    rng = np.random.default_rng(4)
    for n in (0, 1, 40, 300):
        boxes, scores, classes = random_boxes(rng, n), random_scores(rng, n), rng.integers(0, 4, n)
        kept = session.run(None, feeds(boxes, scores, classes, method=method, per_class=per_class))
        close(kept, reference.soft_nms(boxes, scores, classes, method=method, per_class=per_class))
        assert kept[2].tolist() == classes[kept[0]].tolist()
        assert kept[3].tolist() == [0] * len(kept[0])
        assert [part.dtype for part in kept] == [np.int64, np.float32, np.int64, np.int64]


@pytest.mark.parametrize("shape", [(3, 40), (5, 300), (2, 1), (4, 0), (0, 7), (0, 0), (600, 9), (45, 300)])
def test_a_batch_is_its_images_one_after_the_other(session, shape):
    rng = np.random.default_rng(6)
    boxes = random_boxes(rng, shape[0] * shape[1]).reshape(*shape, 4)
    scores, classes = rng.random(shape).astype(np.float32), rng.integers(0, 4, shape)
    scores[::2] *= 1e-3  # no box of these images remains
    for method, most in itertools.product(METHODS, (0, 3, 1000)):
        how = {"method": method, "per_class": True, "max_output": most}
        kept = session.run(None, feeds(boxes, scores, classes, **how))
        alone = [session.run(None, feeds(*inputs, **how)) for inputs in zip(boxes, scores, classes, strict=True)]
        for place in range(3):
            parts = [outputs[place] for outputs in alone]
            np.testing.assert_array_equal(kept[place], np.concatenate(parts) if parts else [])
        assert kept[3].tolist() == [image for image, outputs in enumerate(alone) for _ in outputs[0]]


GOOD = feeds(BOXES, SCORES, [0] * 5)


@pytest.mark.parametrize("shape", [(2**40, 0), (0, 2**40)])
def test_a_batch_without_boxes_may_claim_any_size(session, shape):
    kept = session.run(None, feeds(np.empty((*shape, 4)), np.empty(shape), np.empty(shape)))
    assert [part.shape for part in kept] == [(0,)] * 4


def test_a_setting_may_be_a_scalar(session):
    scalars = {name: GOOD[name].reshape(()) for name in ("method", "sigma", "max_output")}
    for part, expected in zip(session.run(None, GOOD | scalars), session.run(None, GOOD), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_max_output_may_be_the_greatest_number(session):
    assert len(session.run(None, GOOD | {"max_output": np.array([2**63 - 1])})[0]) == 5


CONTRACTS = [
    Contract(
        SOFT_NMS,
        lambda seed, columns: GOOD,
        refused=[
            ({"scores": np.float32([0.5, 0.5, 0.5, np.nan, 0.5])}, "score 3 is NaN"),
            (
                {
                    "boxes": [3, 5, 4],
                    "scores": np.where(np.arange(15) == 14, np.nan, 0.5).reshape(3, 5),
                    "classes": [3, 5],
                },
                "score 4 of image 2 is NaN",
            ),
            ({"scores": [4]}, r"scores has the shape \[4\]; expected \[5\].*\[5, 4\]"),
            ({"classes": [6]}, r"classes has the shape \[6\]; expected \[5\]"),
            ({"scores": [1, 5]}, r"scores has the shape \[1, 5\]; expected \[5\]"),
            ({"boxes": [5, 3]}, r"boxes has the shape \[5, 3\]; expected \[N, 4\] or \[B, N, 4\]"),
            ({"boxes": [4]}, r"boxes has the shape \[4\]"),
            ({"boxes": [1, 1, 5, 4]}, r"boxes has the shape \[1, 1, 5, 4\]"),
            ({"boxes": []}, r"boxes has the shape \[\]"),
            ({"method": np.array([3])}, "method is 3; expected 0 .hard., 1 .linear. or 2"),
            ({"method": np.array([-1])}, "method is -1"),
            ({"method": np.array([2**40])}, "method is 1099511627776"),
            ({"method": [2]}, r"method has the shape \[2\]; expected \[1\]"),
            ({"method": [0]}, r"method has the shape \[0\]"),
            ({"sigma": [1, 1]}, r"sigma has the shape \[1, 1\]"),
            ({"per_class": np.array([2])}, "per_class is 2; expected 0 or 1"),
            ({"iou_threshold": np.float32([np.nan])}, "iou_threshold is NaN"),
            ({"sigma": np.float32([0])}, "sigma is 0.0*; expected more than 0"),
            ({"sigma": np.float32([-1])}, "sigma is -1"),
            ({"sigma": np.float32([np.nan])}, "sigma is -?nan"),
            ({"min_score": np.float32([np.nan])}, "min_score is NaN"),
            ({"max_output": np.array([-1])}, "max_output is -1; expected 0 or more"),
        ],
    ),
]
