"""detect over invented regions: the feeds of the graphs, and the positions of boxes in the picture."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest, TaskNotServed
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.suppression import Suppression
from calmclip.models.tasks import require
from calmclip.models.tasks.detect import DETECTED, REGIONS, SUPPRESSION, Detections, DetectRequest, Example, detect
from calmclip.models.tasks.regions import Grid

Png = Callable[..., bytes]
PROPOSED = {
    "class_embeds": np.zeros((1, 7, 3), np.float32),
    "boxes": np.full((1, 7, 4), (0, 0, 8, 8), np.float32),
    "objectness": np.zeros((1, 7), np.float32),
}
KEPT = {  # in pixels of the 8 x 8 letterbox
    "kept_boxes": np.array([[1, 2, 3, 4], [-1, 0, 9, 9]], np.float32),
    "scores": np.array([0.5, 0.25], np.float32),
    "raw_scores": np.array([0.5, 0.75], np.float32),
    "classes": np.array([1, 0], np.int64),
    "candidates": np.array([12], np.int64),
}


def find(bundle: Bundle, picture: bytes, suppressed: Arrays = KEPT, **more: Any) -> tuple[Detections, list[Call]]:
    calls: list[Call] = []
    answers: dict[str, Arrays] = {
        "text": {"text_embeds": np.array([[2, 0, 0], [0, 2, 0]], np.float32)},
        "regions": PROPOSED,
        "detect": suppressed,
    }

    def run(call: Call) -> Arrays:
        calls.append(call)
        return answers[call.graph]

    return drive(detect(bundle, DetectRequest(picture, ["red", "green"], **more)), run), calls


def test_boxes_come_back_in_pixels_of_the_original(finder: Bundle, png: Png):
    # 16 x 32 fits 8 x 8 at a quarter: every coordinate times 4, clipped to the picture
    detections, _ = find(finder, png("red", (16, 32)))
    assert (detections.width, detections.height, detections.candidates) == (16, 32, 12)
    first, second = detections
    assert (first.label, first.index, first.score, first.raw_score) == ("green", 1, 0.5, 0.5)
    assert first.box.tolist() == [4, 8, 12, 16]
    assert (second.label, second.index, second.score, second.raw_score) == ("red", 0, 0.25, 0.75)
    assert second.box.tolist() == [0, 0, 16, 32]


def test_the_detect_graph_takes_regions_unit_texts_and_settings(finder: Bundle, png: Png):
    settings = Suppression("linear", sigma=0.25, iou_threshold=0.5, min_score=0.125, max_output=7, per_class=False)
    _, calls = find(finder, png("red"), suppression=settings)
    text, regions, last = calls
    assert [text.graph, regions.graph, last.graph] == ["text", "regions", "detect"]
    assert regions.feeds["pixels"].shape == (1, 3, 8, 8)
    assert set(last.feeds) == {*REGIONS, "text_embeds", *SUPPRESSION}
    assert all(last.feeds[name] is PROPOSED[name] for name in REGIONS)
    assert last.feeds["text_embeds"].tolist() == [[1, 0, 0], [0, 1, 0]]
    sent = {name: (last.feeds[name].dtype.name, last.feeds[name].tolist()) for name in SUPPRESSION}
    assert sent == {
        "method": ("int64", [1]),
        "per_class": ("int64", [0]),
        "iou_threshold": ("float32", [0.5]),
        "sigma": ("float32", [0.25]),
        "min_score": ("float32", [0.125]),
        "max_output": ("int64", [7]),
    }


def test_a_box_in_the_padding_is_not_an_answer(finder: Bundle, png: Png):
    # 16 x 32 fills 4 x 8 of the letterbox; the second box begins where the picture ends
    suppressed = KEPT | {"kept_boxes": np.array([[3, 0, 5, 8], [4, 0, 8, 8]], np.float32)}
    detections, _ = find(finder, png("red", (16, 32)), suppressed)
    assert [detection.box.tolist() for detection in detections] == [[12, 0, 16, 32]]


def test_boxes_in_the_padding_do_not_count_as_output(finder: Bundle, png: Png, monkeypatch: pytest.MonkeyPatch):
    # two of the regions lie beside 4 x 8; with two labels suppression may keep each twice, before the requested box
    boxes = np.array([[[0, 0, 8, 8]] * 5 + [[4, 0, 8, 8], [5, 1, 6, 2]]], np.float32)
    monkeypatch.setitem(PROPOSED, "boxes", boxes)
    suppressed: Arrays = KEPT | {
        "kept_boxes": np.array([[4, 0, 8, 8], [5, 1, 6, 2], [3, 0, 5, 8], [0, 0, 1, 1]], np.float32),
        **{name: KEPT[name].repeat(2) for name in ("scores", "raw_scores", "classes")},
    }
    detections, calls = find(finder, png("red", (16, 32)), suppressed, suppression=Suppression(max_output=1))
    assert calls[-1].feeds["max_output"].tolist() == [1 + 2 * 2]
    assert [detection.box.tolist() for detection in detections] == [[12, 0, 16, 32]]


def test_no_detection_is_an_answer(finder: Bundle, png: Png):
    none: dict[str, Array] = {name: array[:0] for name, array in KEPT.items()} | {"candidates": np.array([0])}
    detections, _ = find(finder, png("red"), none)
    assert (list(detections), detections.candidates) == ([], 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "soft"}, "method is 'soft'; expected one of hard, linear, gaussian"),
        ({"sigma": 0.0}, "sigma is 0.0; expected 1e-06 to 1000000.0"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"sigma": float("inf")}, "sigma is inf"),
        ({"iou_threshold": -0.1}, "iou_threshold is -0.1; expected 0.0 to 1.0"),
        ({"iou_threshold": float("nan")}, "iou_threshold is nan"),
        ({"min_score": 1.5}, "min_score is 1.5; expected 0.0 to 1.0"),
        ({"max_output": 0}, "max_output is 0; expected 1 to 1000"),
        ({"max_output": 1001}, "max_output is 1001"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(finder: Bundle, png: Png, change: dict[str, Any], says: str):
    with pytest.raises(BadRequest, match=says):
        find(finder, png("red"), suppression=Suppression(**change))


def test_names_of_tensors_are_those_of_the_manifest():
    assert set(SUPPRESSION) == set(Suppression().tensors())
    assert set(DETECTED) == set(KEPT)


def searched(bundle: Bundle, request: DetectRequest) -> list[Call]:
    """The calls of a search; the map's cells are red, green, blue and red."""
    calls: list[Call] = []
    none: Arrays = {name: array[:0] for name, array in KEPT.items()} | {"candidates": np.array([0])}
    cells = np.array([[[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 0, 0]]]], np.float32)

    def run(call: Call) -> Arrays:
        calls.append(call)
        texts = {"text_embeds": np.eye(3, dtype=np.float32)[: len(call.feeds.get("ids", ()))]}
        return {"dense": {"patches": cells}, "text": texts}.get(call.graph, none)

    drive(detect(bundle, request), run)
    return calls


def test_a_bundle_without_proposals_searches_windows(mapped_finder: Bundle, png: Png):
    calls = searched(mapped_finder, DetectRequest(png("red", (16, 16)), ["red"]))
    assert [call.graph for call in calls] == ["text", "dense", "detect"]
    feeds, windows = calls[-1].feeds, Grid().windows(16, 16)
    assert feeds["boxes"] == pytest.approx(windows[None] / 2)  # 16 pixels fit 8
    assert feeds["objectness"].tolist() == [[1.0] * len(windows)]
    assert feeds["class_embeds"][0, 0] == pytest.approx(np.array([2, 1, 1]) / 6**0.5)


def test_given_boxes_are_regions_and_examples_are_of_the_same_map(mapped_finder: Bundle, png: Png):
    shown = [Example(png("red", (16, 16))), Example(png("red", (16, 16)), (8, 0, 16, 8))]
    boxes = [(0, 8, 8, 16), (0, 0, 8, 8)]
    calls = searched(mapped_finder, DetectRequest(png("red", (16, 16)), examples=shown, boxes=boxes))
    assert [call.graph for call in calls] == ["dense", "dense", "dense", "detect"]
    assert calls[-1].feeds["class_embeds"].tolist() == [[[0, 0, 1], [1, 0, 0]]]
    assert calls[-1].feeds["boxes"].tolist() == [[[0, 4, 4, 8], [0, 0, 4, 4]]]
    assert calls[-1].feeds["text_embeds"] == pytest.approx(np.array([[2 / 6**0.5, 6**-0.5, 6**-0.5], [0, 1, 0]]))


def test_boxes_and_a_grid_exclude_each_other_and_need_a_map(mapped_finder: Bundle, png: Png):
    both = DetectRequest(png("red"), ["red"], boxes=[(0, 0, 1, 1)], grid=Grid())
    with pytest.raises(BadRequest, match="boxes and grid were given"):
        searched(mapped_finder, both)
    with pytest.raises(BadRequest, match=r"example 0: box is \[1.0, 0.0, 1.0, 1.0\]"):
        searched(mapped_finder, DetectRequest(png("red"), examples=[Example(png("red"), (1, 0, 1, 1))]))


def test_proposals_alone_have_no_vector_for_a_box(finder: Bundle, png: Png):
    with pytest.raises(TaskNotServed, match="has no graph 'dense'"):
        find(finder, png("red"), boxes=[(0, 0, 1, 1)])


def test_a_manifest_without_regions_and_map_does_not_detect(finder: Bundle):
    graphs = {role: graph for role, graph in finder.manifest.graphs.items() if role != "regions"}
    with pytest.raises(ValueError, match="task 'detect' needs a graph 'regions' or 'dense'"):
        require(finder.manifest.model_copy(update={"graphs": graphs}))
