import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from calmclip.export.masks import Outlined, around, drawn, loss, moved, read, targets, train
from calmclip.export.nets.mini.facts import SAMPLES
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.placement import Frame

FRAME = Frame(832, 624, (0.5, 0.5), (0.0, 0.0))
POLYGON = [[100.0, 80.0, 420.0, 120.0, 380.0, 400.0, 60.0, 300.0]]


def test_a_drawn_thing_is_that_of_pycocotools():
    shape = drawn(POLYGON, FRAME).numpy() / 255
    half = [(np.array(POLYGON[0]) * 0.5).tolist()]
    expected = coco.decode(coco.merge(coco.frPyObjects(half, 416, 416)))
    assert np.abs(shape - expected).sum() < 0.01 * expected.sum()
    np.testing.assert_allclose(around(POLYGON, FRAME), [30, 40, 210, 200])


def test_targets_are_the_parts_of_samples():
    shapes = torch.zeros(1, 416, 416, dtype=torch.uint8)
    shapes[0, :, :160] = 255
    wanted = targets(shapes, torch.tensor([[80.0, 100.0, 240.0, 300.0]]))[0]  # enlarged: x from 64 to 256
    expected = np.clip((160 - (64 + 12 * np.arange(SAMPLES))) / 12, 0, 1)  # a sample is 12 pixels wide
    np.testing.assert_allclose(wanted, np.tile(expected, (SAMPLES, 1)), atol=0.02)


def test_moved_boxes_stay_in_the_input_and_keep_a_size():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0.0, 416.0, 416.0], [10.0, 10.0, 13.0, 13.0], [50.0, 60.0, 150.0, 160.0]]).repeat(
        200, 1
    )
    jittered = moved(boxes)
    assert jittered.min() >= 0
    assert jittered.max() <= 416
    assert (jittered[:, 2:] - jittered[:, :2]).min() >= 3 - 1e-4
    assert 6 < (jittered - boxes)[2::3].std() < 10  # 8 % of 100 pixels


def test_loss_is_cross_entropy_and_half_of_dice():
    logits, wanted = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.0, 1.0]]])
    p = 1 / (1 + np.exp(-np.array([0.0, 2.0])))
    expected = -(np.log(1 - p[0]) + np.log(p[1])) / 2 + 0.5 * (1 - (2 * p[1] + 1) / ((p**2).sum() + 1 + 1))
    assert loss(logits, wanted).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_training_learns_shapes_that_the_maps_show():
    torch.manual_seed(0)
    seen = []
    for _ in range(4):
        shape = torch.zeros(1, 416, 416, dtype=torch.uint8)
        shape[0, 100:300, 100:200] = 255
        stage8 = torch.randn(128, 52, 52) * 0.1
        stage8[0] = torch.nn.functional.avg_pool2d(shape.float() / 255, 8)[0]
        maps = stage8.half(), torch.zeros(128, 52, 52).half(), torch.zeros(128, 26, 26).half()
        seen.append(Outlined(maps, torch.tensor([[80.0, 80.0, 320.0, 320.0]]), shape))
    head = train(seen, epochs=40)
    features = head.features(*(each.float()[None] for each in seen[0].maps))
    logits = head.masks(features, seen[0].boxes[None])[0]
    wanted = targets(seen[0].shapes, seen[0].boxes)
    inside, outside = logits[wanted > 0.9], logits[wanted < 0.1]
    assert (inside > 0).float().mean() > 0.9
    assert (outside < 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "cannot be read"),
        (json.dumps({"images": [{"id": 0, "file_name": "a.jpg"}], "annotations": []}), "outlines no thing"),
    ],
)
def test_a_file_without_outlines_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(BadRequest, match=message):
        read(tmp_path)
