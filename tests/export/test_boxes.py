"""Views, assignment and loss of the box head's training, by hand and against torchvision; a scene is learned."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou, generalized_box_iou

from calmclip.export.boxes import (
    PAD,
    SIZE,
    Photo,
    Views,
    by_quality,
    by_size,
    draw,
    pairs,
    place,
    read_photos,
    save,
    train,
)
from calmclip.export.nets.mini.boxhead import BoxHead, centres, load
from calmclip.models.errors import ExportError, WeightsMissing


@pytest.fixture(autouse=True)
def one_thread():
    """With arrays this small a second thread costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photo(tmp_path):
    """320 x 160, white, a black box at (40, 20)-(120, 100)."""
    picture = np.full((160, 320, 3), 255, np.uint8)
    picture[20:100, 40:120] = 0
    Image.fromarray(picture).save(tmp_path / "a.png")
    return Photo(tmp_path / "a.png", np.array([[40.0, 20, 120, 100]]))


def is_black(canvas, box):
    x0, y0, x1, y1 = np.rint(box).astype(int)
    grey = np.asarray(canvas.convert("L"), float)
    return grey[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4].max() < 40 and grey[y0 + 4 : y1 - 4, x1 + 4].min() > 100


def test_the_first_views_are_as_served_and_mirrored(photo):
    rng = np.random.default_rng(0)
    canvas, boxes = draw([photo], 0, 0, rng)
    assert boxes.tolist() == [[80, 40, 240, 200]]  # twice as large, top left
    assert is_black(canvas, boxes[0])
    assert canvas.getpixel((5, 500)) == (PAD,) * 3
    canvas, boxes = draw([photo], 0, 1, rng)
    assert boxes.tolist() == [[400, 40, 560, 200]]
    assert is_black(canvas, boxes[0])


def test_boxes_go_with_the_picture_in_every_view(photo):
    rng = np.random.default_rng(1)
    seen = 0
    for _ in range(12):
        canvas = Image.new("RGB", (SIZE, SIZE), (PAD,) * 3)
        boxes = place(canvas, photo, (100, 50, 600, 550), scale=0.8, at=rng.random(2), mirror=rng.random() < 0.5)
        assert is_black(canvas, boxes[0])
        seen += len(boxes)
    assert seen == 12


def test_a_box_mostly_cut_away_is_not_taught(photo):
    canvas = Image.new("RGB", (SIZE, SIZE))
    # four times as large is 2560 x 1280; the right end, from x = 1920 on, is shown; the box ends at 960
    assert len(place(canvas, photo, (0, 0, SIZE, SIZE), scale=4.0, at=np.array([1.0, 0.0]), mirror=False)) == 0


def test_iou_and_generalised_iou_are_torchvisions():
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(2, 9, 4, generator=generator)
    boxes[..., 2:] += boxes[..., :2]
    overlap, generalised = pairs(boxes[0][:, None], boxes[1])
    torch.testing.assert_close(overlap, box_iou(*boxes))
    torch.testing.assert_close(generalised, generalized_box_iou(*boxes))


def test_the_smallest_box_takes_the_cell():
    centre = centres(40, 40)
    true = torch.tensor([[0.0, 0, 640, 640], [300, 300, 340, 340]])
    which = by_size(true, centre).reshape(40, 40)
    assert which[20, 20] == 1  # centre at (328, 328): in both
    assert which[12, 12] == 0  # (200, 200): in the middle half of the large one, 160 to 480
    assert which[2, 2] == -1


def test_cells_that_say_it_best_are_taken():
    centre = centres(40, 40)
    true = torch.tensor([[100.0, 100, 300, 300], [400, 400, 500, 500]])
    predicted = torch.cat((centre - 8, centre + 8), dim=1)  # small boxes around every centre...
    predicted[10 * 40 + 12] = torch.tensor([100.0, 100, 300, 310])  # ... but for one cell that knows the first, and
    predicted[27 * 40 + 27] = torch.tensor([400.0, 400, 500, 500])  # one that knows the second
    which = by_quality(true, centre, predicted, torch.full((1600,), 0.5))
    assert which[10 * 40 + 12] == 0
    assert which[27 * 40 + 27] == 1
    assert (which >= 0).sum() == 2  # one cell fits each true box, so each takes one


def test_training_learns_what_it_is_shown():
    map16, map32 = torch.zeros(2, 120, 40, 40), torch.zeros(2, 1280, 20, 20)
    map16[0, :, 4:10, 20:26] = 1.0  # one bright square a picture, somewhere
    map16[1, :, 25:31, 8:14] = 1.0
    true = [torch.tensor([[320.0, 64, 416, 160]]), torch.tensor([[128.0, 400, 224, 496]])]
    head = train(Views(map16.half(), map32.to(torch.uint8), true), epochs=60, seed=0, batch=2)
    with torch.no_grad():
        logits, boxes = head(map16, map32)
    best = boxes[torch.arange(2), logits.argmax(1)]
    assert box_iou(best, torch.cat(true)).diagonal().min() > 0.6


def test_a_saved_head_is_the_same_folded(tmp_path):
    torch.manual_seed(4)
    head = BoxHead().eval()
    save(head, tmp_path / "boxes.safetensors", "nothing")
    maps = torch.randn(1, 120, 8, 8), torch.randn(1, 1280, 4, 4)
    with torch.no_grad():
        for output, other in zip(head(*maps), load(tmp_path / "boxes.safetensors")(*maps), strict=True):
            torch.testing.assert_close(output, other, rtol=1e-2, atol=0.1)  # float16 between them


def test_a_file_that_is_no_head_is_refused(tmp_path):
    (tmp_path / "boxes.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsMissing, match=r"export\.boxes"):
        load(tmp_path / "boxes.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "instances form"),
        ({"images": [{"id": 1, "file_name": "gone.jpg"}], "annotations": []}, r"names gone\.jpg"),
    ],
)
def test_instances_that_do_not_fit_are_refused(tmp_path, content, message):
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=message):
        read_photos(tmp_path / "instances.json", tmp_path)


def test_crowds_are_not_taught(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    annotation = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [annotation, {**annotation, "iscrowd": 1}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert read_photos(tmp_path / "instances.json", tmp_path)[0].boxes.tolist() == [[1, 2, 4, 6]]
