"""Elongated pictures: the slices of a size, and regions of slices put together, over invented regions."""

import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.flow import Array, Arrays, Call, Flow, drive
from calmclip.models.tasks.detect import DetectRequest, Example, detect, propose
from calmclip.models.tasks.elongated import MOST, slices
from calmclip.models.tasks.regions import region_vectors


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def regions(*rows: tuple[float, Sequence[float]]) -> Arrays:
    """Objectness and box of each row; the vector of a row is its objectness, 0, 0."""
    objectness = np.array([[row[0] for row in rows]], np.float32)
    boxes = np.array([[row[1] for row in rows]], np.float32)
    return {"objectness": objectness, "boxes": boxes, "class_embeds": objectness[..., None] * [1, 0, 0]}


# A picture of 300 x 100 in the letterbox of 8 x 8: the whole is 8 x 3, a slice of 150 x 100 is 8 x 5 pixels
VIEWS = (
    regions((0.3, [0, 0, 8, 3]), (0.1, [0, 0, 4, 3]), (0, [0, 0, 1, 1])),
    regions((0.9, [2, 0, 4, 5]), (0.95, [4, 0, 8, 5]), (0.94, [4, 0, 7.96, 5])),  # two are cut at 150
    regions((0.99, [0, 1, 4, 3]), (0.8, [1, 1, 3, 3]), (0.2, [1, 1, 3, 3])),  # the first is cut at 75
    regions((0.5, [4, 0, 8, 5]), (0.97, [4, 6, 8, 8]), (0.4, [4, 0, 8, 5])),  # the second lies below the picture
)


def driven(flow: Flow, answers: Sequence[Arrays]):
    """-> the answer of the flow, and its calls. ``answers``: of the graph `regions`, in the order of its runs."""
    calls: list[Call] = []
    waiting = iter(answers)

    def run(call: Call) -> Arrays:
        calls.append(call)
        return next(waiting) if call.graph == "regions" else NOTHING

    return drive(flow, run), calls


NOTHING: dict[str, Array] = {
    "kept_boxes": np.zeros((0, 4), np.float32),
    **{name: np.zeros(0, np.float32) for name in ("scores", "raw_scores")},
    "classes": np.zeros(0, np.int64),
    "candidates": np.zeros(1, np.int64),
}


@pytest.mark.parametrize("size", [(100, 100), (640, 480), (1920, 1080), (100, 200)])
def test_ordinary_pictures_have_no_slices(size: tuple[int, int]):
    assert slices(*size) == []


def test_slices_by_hand():
    # 3 short sides: each slice is 1.5 long, and steps of .75 cover the picture
    assert slices(300, 100) == [(0, 0, 150, 100), (75, 0, 225, 100), (150, 0, 300, 100)]
    assert slices(100, 300) == [(0, 0, 100, 150), (0, 75, 100, 225), (0, 150, 100, 300)]
    # 8.5 = 8 slices of 1.5 with steps of 1
    assert slices(850, 100) == [(100 * k, 0, 100 * k + 150, 100) for k in range(8)]
    # more would be too many, so they become longer: 100 = 8 * 12.9375 - 7 * .5
    assert slices(100, 10_000)[1] == (0, 1244, 100, 2538)


@pytest.mark.parametrize("long", [*range(201, 1300, 7), 4096, 30_000])
def test_slices_cover_the_picture_and_half_a_short_side_lies_whole_in_one(long: int):
    parts = slices(long, 100)
    assert (parts[0][0], parts[-1][2]) == (0, long)
    assert 2 <= len(parts) <= MOST
    assert all(0 <= left < right <= long for left, _, right, _ in parts)
    assert all(before[2] - after[0] >= 49 for before, after in pairwise(parts))


def test_an_ordinary_picture_is_one_run_whose_answer_does_not_change(finder: Bundle):
    answer, calls = driven(propose(finder, png(200, 100)), VIEWS)
    assert len(calls) == 1
    assert answer.outputs is VIEWS[0]
    assert answer.frame.scale == (8 / 200, 4 / 100)


def test_every_slice_is_a_run_on_its_pixels(finder: Bundle):
    data = png(100, 300)
    _, calls = driven(propose(finder, data), VIEWS)
    picture = Image.open(io.BytesIO(data))
    parts = (picture, *(picture.crop((0, top, 100, top + 150)) for top in (0, 75, 150)))
    for call, part in zip(calls, parts, strict=True):
        assert (call.feeds["pixels"] == finder.image("regions").prepare(part)[0]).all()


def test_the_best_whole_boxes_of_all_views_answer_in_pixels_of_the_picture(finder: Bundle):
    answer, _ = driven(propose(finder, png(300, 100)), VIEWS)
    assert answer.outputs["objectness"][0] == pytest.approx([0.9, 0.8, 0.5])
    assert answer.outputs["class_embeds"][0, :, 0] == pytest.approx([0.9, 0.8, 0.5])
    # 18.75 pixels of the picture are one across, 20 are one down
    want = [[37.5, 0, 75, 100], [93.75, 20, 131.25, 60], [225, 0, 300, 100]]
    assert answer.outputs["boxes"][0] == pytest.approx(np.array(want))
    assert answer.boxes == pytest.approx(np.array(want))  # the frame leaves them
    assert (answer.frame.width, answer.frame.height) == (300, 100)


def test_a_picture_that_the_decoder_made_smaller_answers_in_pixels_of_its_file(finder: Bundle, halved):
    half, calls = driven(propose(finder, halved(600, 200)), VIEWS)
    whole, _ = driven(propose(finder, png(300, 100)), VIEWS)
    assert len(calls) == len(VIEWS)
    assert half.outputs["objectness"].tolist() == whole.outputs["objectness"].tolist()
    assert half.boxes == pytest.approx(2 * whole.boxes)
    assert (half.frame.width, half.frame.height) == (600, 200)


def test_vectors_of_regions_come_from_the_slices_too(finder: Bundle):
    (vectors, boxes), calls = driven(region_vectors(finder, png(300, 100)), VIEWS)
    proposed, _ = driven(propose(finder, png(300, 100)), VIEWS)
    assert len(calls) == len(VIEWS)
    assert boxes.tolist() == proposed.boxes.tolist()
    assert vectors.tolist() == [[1, 0, 0]] * len(boxes)


def test_outputs_that_are_no_rows_come_from_the_whole_picture(finder: Bundle):
    maps = [{**view, "map": np.full((1, 2, 5), number)} for number, view in enumerate(VIEWS)]
    answer, _ = driven(propose(finder, png(300, 100)), maps)
    assert (answer.outputs["map"] == 0).all()


def test_without_objectness_the_whole_picture_answers_alone(finder: Bundle):
    answer, calls = driven(propose(finder, png(300, 100)), [{**VIEWS[0], "objectness": np.ones((1, 3), np.float32)}])
    assert len(calls) == 1
    assert answer.frame.scale == (8 / 300, 3 / 100)


def test_the_object_of_an_elongated_example_is_a_box_of_a_slice(finder: Bundle):
    request = DetectRequest(png(8, 8), examples=[Example(png(300, 100), [90, 15, 135, 65])])
    _, calls = driven(detect(finder, request), [*VIEWS, VIEWS[0]])
    assert [call.graph for call in calls] == ["regions"] * 5 + ["detect"]
    assert calls[-1].feeds["text_embeds"].tolist() == [[pytest.approx(0.8), 0, 0]]
