"""The detection metric against COCO's code, and one average precision computed by hand."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from calmclip.models.errors import BadRequest
from calmclip.models.evals import NoParams, detection, measure
from calmclip.models.evals.average_precision import THRESHOLDS, Boxes, Matches, covered
from calmclip.models.runner import open_bundle

NAMES = 3


def scene(rng, pictures=12):
    """Random true boxes (some crowds), and detections: true boxes moved a little, and random boxes."""
    truth, detected = [], []
    for _ in range(pictures):
        n, extra = int(rng.integers(0, 8)), int(rng.integers(0, 12))
        boxes = rng.uniform(0, 100, (n, 2))
        boxes = np.concatenate([boxes, boxes + rng.uniform(30, 60, (n, 2))], axis=1)
        classes = rng.integers(NAMES, size=n)
        truth.append(Boxes.true(boxes, classes, rng.random(n) < 0.15))
        moved = boxes + rng.normal(0, 4, boxes.shape)
        corner = rng.uniform(0, 100, (extra, 2))
        stray = np.concatenate([corner, corner + rng.uniform(5, 60, (extra, 2))], axis=1)
        names = np.where(rng.random(n) < 0.8, classes, rng.integers(NAMES, size=n))
        scores = rng.integers(0, 50, n + extra) / 50  # ties on purpose
        detected.append(
            Boxes.detected(np.concatenate([moved, stray]), np.append(names, rng.integers(NAMES, size=extra)), scores)
        )
    return truth, detected


def cocoeval(truth, detected):
    wide = lambda b: [*map(float, b[:2]), *map(float, b[2:] - b[:2])]  # noqa: E731
    annotations = [
        {
            "image_id": i,
            "category_id": int(c),
            "bbox": wide(b),
            "area": float(np.prod(b[2:] - b[:2])),
            "iscrowd": int(k),
        }
        for i, t in enumerate(truth)
        for b, c, k in zip(t.boxes, t.classes, t.crowd, strict=True)
    ]
    results = [
        {"image_id": i, "category_id": int(c), "bbox": wide(b), "score": float(s)}
        for i, f in enumerate(detected)
        for b, c, s in zip(f.boxes, f.classes, f.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(truth))],
            "categories": [{"id": c} for c in range(NAMES)],
            "annotations": [{**a, "id": n + 1} for n, a in enumerate(annotations)],
        }
        gold.createIndex()
        run = COCOeval(gold, gold.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 2]  # thresholds, recalls, names; all areas; 100 detections
    return np.array([row[row > -1].mean() for row in precision])


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_code_of_coco(seed):
    truth, detected = scene(np.random.default_rng(seed))
    np.testing.assert_allclose(
        Matches(truth, detected, THRESHOLDS).average_precision(np.ones(len(truth), int)),
        cocoeval(truth, detected),
        atol=1e-12,
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_picture_that_was_drawn_three_times_counts_three_times(seed):
    draw = np.random.default_rng(seed)
    truth, detected = scene(draw)
    detected = [replace(boxes, scores=draw.random(len(boxes.scores))) for boxes in detected]  # no ties
    drawn = draw.integers(0, 12, 12)
    weighted = Matches(truth, detected, THRESHOLDS).average_precision(np.bincount(drawn, minlength=12))
    again = cocoeval([truth[i] for i in drawn], [detected[i] for i in drawn])
    np.testing.assert_allclose(weighted, again, atol=1e-12)


def test_a_right_detection_after_a_wrong_one():
    # Best first: false, true. Precision at recall 1/2 is 1/2, beyond it 0: 51 of the 101 recalls read 1/2.
    box, other, nowhere = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]
    truth = [Boxes.true(np.array([box, other]), np.array([0, 0]))]
    detected = [Boxes.detected(np.array([nowhere, box]), np.array([0, 0]), np.array([0.9, 0.8]))]
    matches = Matches(truth, detected, (0.5,))
    assert matches.average_precision(np.ones(1, int)) == pytest.approx([0.5 * 51 / 101])
    assert matches.curve().tolist() == [0.5] * 51 + [0.0] * 50


def test_recall_needs_an_iou_of_a_half():
    # IoU of [0,0,10,10] with [0,0,10,20] is 1/2 and counts; with [0,0,10,21] it is 10/21 and does not.
    truth = [Boxes.true(np.array([[0.0, 0, 10, 10], [40, 40, 50, 50]]), np.array([0, 1]))]
    assert [n.tolist() for n in covered(truth, [np.array([[0.0, 0, 10, 20]])])] == [[1], [2]]
    assert [n.tolist() for n in covered(truth, [np.array([[0.0, 0, 10, 21]])])] == [[0], [2]]


def test_instances_are_read_with_names_in_their_order(tmp_path):
    content = {
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4]}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    instances = detection.read(tmp_path, NoParams())
    assert instances.names == ("cat", "dog")
    assert instances.pictures[1] == tmp_path / "images" / "b.jpg"
    assert len(instances.truth[0].boxes) == 0
    assert instances.truth[1].boxes.tolist() == [[1, 2, 4, 6]]
    assert instances.truth[1].classes.tolist() == [1]


@pytest.mark.parametrize("text", ["{}", "["])
def test_instances_in_another_form_are_refused(tmp_path, text):
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(BadRequest, match="COCO's instances form"):
        measure.read("detection", tmp_path)


def test_regions_are_computed_once_a_picture_and_answers_are_those_of_detect(detector, png, monkeypatch):
    """The one region of the fixture's detector is the whole picture; see tests/models/test_runner.py."""
    calls, propose = [], detection.propose
    monkeypatch.setattr(detection, "propose", lambda *arguments: calls.append(arguments) or propose(*arguments))
    truth = [Boxes.true(np.array([[0.0, 0, 32, 16]]), np.array([place])) for place in (0, 1)]
    pictures = [png("red", (32, 16)), png("red", (32, 16))]
    data = detection.Instances(["red", "blue"], pictures, truth)
    samples = measure.predict("detection", open_bundle(detector), data)
    assert len(calls) == 2
    # with both names as labels each picture has a red detection, the first right; with blue alone there is none
    assert samples.arrays["found_counts"].tolist() == [1, 1]
    assert samples.arrays["present_counts"].tolist() == [1, 0]
    assert samples.arrays["proposals_boxes"].tolist() == [[0, 0, 32, 16]] * 2
    # red: best first right, wrong (equal scores), so precision 1 at every recall; blue 0: the mean is 1/2
    expected = {"AP50": 50.0, "AP50:95": 50.0, "AP50 present names": 50.0, "recall@100 boxes": 100.0}
    assert measure.named(samples) == {**expected, "pictures": 2, "names": 2}
