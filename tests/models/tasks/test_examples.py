"""The choice of a region for an example: by hand, and in the flow. test_owl compares it with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadImage, BadRequest, TooManyLabels
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.runner import open_bundle
from calmclip.models.suppression import Suppression
from calmclip.models.tasks.detect import DetectRequest, Example, default_suppression, detect
from calmclip.models.tasks.examples import overlaps, pick

Png = Callable[..., bytes]
WHOLE = np.array([0, 0, 8, 8], np.float32)
AXES = np.eye(3, dtype=np.float32)


def proposed(boxes: list[list[float]], rows: list[int], objectness: list[float] | None = None, **more: Any) -> Arrays:
    """Regions whose embeddings are the axes ``rows``."""
    chance = [1.0] * len(rows) if objectness is None else objectness
    return {
        "boxes": np.array([boxes], np.float32),
        "class_embeds": AXES[rows][None],
        "objectness": np.array([chance], np.float32),
        **{name: np.array([value], np.float32) for name, value in more.items()},
    }


def test_of_boxes_that_fit_nearly_as_well_the_least_similar_region_wins():
    # IoU with the picture: 1, 56/64 = 0.875, 48/64 = 0.75. The mean embedding is (2, 1, 1) / 4.
    boxes = [[0, 0, 8, 8], [0, 0, 8, 7], [0, 0, 8, 6], [0, 0, 1, 1]]
    assert pick(proposed(boxes, [0, 1, 2, 0]), WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    assert pick(proposed(boxes, [1, 0, 2, 0]), WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    assert pick(proposed(boxes, [0, 0, 1, 1]), WHOLE, drawn=False).tolist() == [[1, 0, 0]]  # 0.75 is too far from 1


def test_long_embeddings_weigh_more_in_the_mean():
    boxes = [[0, 0, 8, 8], [0, 0, 8, 7], [0, 0, 1, 1], [0, 0, 1, 1]]
    rows = [0, 1, 0, 0]
    assert pick(proposed(boxes, rows), WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    # (6, 0, 0) and (0, 9, 0), the mean (1.5 + 0.05, 2.25, 0): their products with it are 9.3 and 20.25
    long = {"lengths": [6, 9, 0.1, 0.1]}
    assert pick(proposed(boxes, rows, **long), WHOLE, drawn=False).tolist() == [[1, 0, 0]]


def test_without_a_drawn_box_the_region_of_highest_objectness_wins():
    boxes = [[0, 0, 8, 8], [0, 0, 2, 2], [4, 4, 8, 8], [0, 0, 8, 8]]
    regions = proposed(boxes, [0, 1, 2, 1], [0.2, 0.9, 0.1, 0.0])
    assert pick(regions, WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    assert pick(regions, np.array([4, 4, 8, 8], np.float32), drawn=True).tolist() == [[0, 0, 1]]
    assert pick(regions, WHOLE, drawn=True).tolist() == [[1, 0, 0]]  # not the last region, which has no objectness


def test_without_an_overlap_the_nearest_region_wins():
    regions = proposed([[0, 0, 1, 1], [3, 3, 4, 4]], [0, 1])
    assert pick(regions, np.array([6, 6, 8, 8], np.float32), drawn=True).tolist() == [[0, 1, 0]]


def test_a_picture_without_regions_is_refused():
    with pytest.raises(BadRequest, match="the picture shows no object"):
        pick(proposed([[0, 0, 1, 1]], [0], [0.0]), WHOLE, drawn=True)


def test_overlaps_are_those_of_torchvision():
    import torch
    from torchvision.ops import box_iou, generalized_box_iou

    random = np.random.default_rng(0)
    low = random.uniform(0, 5, (50, 2))
    boxes = np.concatenate((low, low + random.uniform(0.1, 5, (50, 2))), axis=1).astype(np.float32)
    for box, oracle in ((WHOLE, box_iou), (np.array([20, 20, 22, 23], np.float32), generalized_box_iou)):
        want = oracle(torch.tensor(box)[None], torch.tensor(boxes))[0]
        assert overlaps(box, boxes) == pytest.approx(want.numpy(), abs=1e-6)


def queries(bundle: Bundle, request: DetectRequest, regions: list[Arrays]) -> tuple[Array, list[Call]]:
    """-> the queries of the `detect` graph, and all calls; ``regions``: the answers of `regions` in turn."""
    calls: list[Call] = []
    pending = iter(regions)
    none = {"kept_boxes": np.zeros((0, 4)), "scores": [], "raw_scores": [], "classes": [], "candidates": [0]}

    def run(call: Call) -> Arrays:
        calls.append(call)
        if call.graph == "regions":
            return next(pending)
        return {"text_embeds": AXES[: len(call.feeds["ids"])]} if call.graph == "text" else none  # type: ignore[return-value]

    drive(detect(bundle, request), run)
    return calls[-1].feeds["text_embeds"], calls


def test_examples_are_rows_after_the_labels(finder: Bundle, png: Png):
    # 16 x 32 fits 8 x 8 at a quarter: the picture is 4 x 8, and the box 8 16 16 32 becomes 2 4 4 8
    # (the last region is where the box would be without the mapping)
    regions = proposed([[0, 0, 4, 8], [2, 4, 4, 8], [7, 7, 8, 8]], [0, 2, 1])
    shown = [Example(png("red", (16, 32)), (8, 16, 16, 32)), Example(png("red", (16, 32)), (8, 16, 99, 99))]
    query, calls = queries(
        finder, DetectRequest(png("blue"), ["one", "two"], examples=[*shown, Example(png("red", (16, 32)))]),
        [regions] * 4,
    )  # fmt: skip
    assert query.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]]
    assert [call.graph for call in calls] == ["text", "regions", "regions", "regions", "regions", "detect"]
    assert query.dtype == np.float32


def test_examples_without_labels_embed_no_text(finder: Bundle, png: Png):
    regions = proposed([[0, 0, 8, 8]], [2])
    query, calls = queries(finder, DetectRequest(png("blue"), examples=[Example(png("red"))]), [regions] * 2)
    assert query.tolist() == [[0, 0, 1]]
    assert "text" not in [call.graph for call in calls]
    with pytest.raises(TooManyLabels, match="no labels were given"):
        queries(finder, DetectRequest(png("blue")), [regions])


def test_an_answer_names_its_example(detector: Path, png: Png):
    runner = open_bundle(detector)  # one region, the mean colour of the letterbox
    red, blue = png("red", (8, 8)), png("blue", (8, 8))
    (first,) = runner.detect(red, examples=[blue, red])
    assert (first.label, first.index, round(first.score, 3)) == ("example 1", 1, 1.0)
    (second,) = runner.detect(red, ["green"], examples=[Example(red, label="this"), blue])
    assert (second.label, second.index) == ("this", 1)


def test_a_runner_reads_examples_from_paths(detector: Path, png: Png, tmp_path: Path):
    runner, red = open_bundle(detector), png("red", (8, 8))
    (tmp_path / "red.png").write_bytes(red)
    for path in (tmp_path / "red.png", str(tmp_path / "red.png")):
        (detection,) = runner.detect(red, examples=[Example(path, (0, 0, 8, 8), "mine")])
        assert (detection.label, round(detection.score, 3)) == ("mine", 1.0)
        with pytest.raises(BadRequest, match=r"examples is one picture, a \w+; expected a list of pictures"):
            runner.detect(red, examples=path)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=r"'nowhere.png' cannot be read"):
        runner.detect(red, examples=[Example("nowhere.png")])
    with pytest.raises(BadRequest, match="example 0: the picture is of the type str; expected a path"):
        runner.run(detect(runner.bundle, DetectRequest(red, examples=[Example("red.png")])))


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ((0, 0, 4), "expected x0, y0, x1, y1"),
        ((4, 0, 4, 4), "x0 < x1"),
        ((0, 5, 4, 4), "y0 < y1"),
        ((0, 0, float("nan"), 4), "example 1: box is"),
        ((0, 0, float("inf"), 4), "box is"),
        ((8, 0, 9, 4), "lies outside of its picture, 8 x 6 pixels"),
        ((-3, -3, 0, 0), "lies outside of its picture"),
    ],
)
def test_an_invalid_box_is_refused_with_its_index(finder: Bundle, png: Png, box: Any, says: str):
    request = DetectRequest(png("red"), examples=[Example(png("red")), Example(png("red"), box)])
    with pytest.raises(BadRequest, match=f"example 1: .*{says}" if "example" not in says else says):
        queries(finder, request, [proposed([[0, 0, 8, 8]], [0])] * 3)


def test_a_box_may_be_the_array_of_an_answer(finder: Bundle, png: Png):
    regions = proposed([[0, 0, 8, 8], [0, 0, 2, 2]], [0, 1])
    box = np.array([0, 0, 2, 2], np.float32)
    query, _ = queries(finder, DetectRequest(png("red"), examples=[Example(png("red", (8, 8)), box)]), [regions] * 2)
    assert query.tolist() == [[0, 1, 0]]
    wrong = Example(png("red"), np.array([2, 0, 2, 2], np.float32))
    with pytest.raises(BadRequest, match=r"box is \[2.0, 0.0, 2.0, 2.0\]; expected"):
        queries(finder, DetectRequest(png("red"), examples=[wrong]), [regions] * 2)


@pytest.mark.parametrize("label", ["", " \n"])
def test_an_empty_name_is_refused(finder: Bundle, png: Png, label: str):
    with pytest.raises(BadRequest, match="example 0: its label is empty"):
        queries(finder, DetectRequest(png("red"), examples=[Example(png("red"), label=label)]), [])


def test_a_broken_example_is_named(finder: Bundle, png: Png):
    with pytest.raises(BadImage, match="example 0: 5 bytes"):
        queries(finder, DetectRequest(png("red"), ["red"], examples=[Example(b"hello")]), [])
    request = DetectRequest(png("red"), examples=[Example(png("red"))])
    with pytest.raises(BadRequest, match="example 0: the picture shows no object"):
        queries(finder, request, [proposed([[0, 0, 1, 1]], [0], [0.0])])


def test_the_defaults_of_the_bundle_reach_the_graph(finder: Bundle, png: Png):
    assert default_suppression(finder) == Suppression()
    defaults = {"suppression": {"min_score": 0.5, "method": "hard", "sigma": 2}}
    finder.manifest = finder.manifest.model_validate(finder.manifest.model_dump() | defaults)
    assert default_suppression(finder) == Suppression(min_score=0.5, method="hard", sigma=2)
    for suppression, expected in ((None, (0.5, 0)), (Suppression(min_score=0.25), (0.25, 2))):
        request = DetectRequest(png("red"), ["a", "b"], suppression=suppression)
        _, calls = queries(finder, request, [proposed([[0, 0, 8, 8]], [0])])
        assert (calls[-1].feeds["min_score"], calls[-1].feeds["method"]) == expected


def test_a_graph_is_fed_only_its_inputs_from_the_regions(finder: Bundle, png: Png):
    inputs = finder.manifest.graphs["detect"].inputs
    extra = proposed([[0, 0, 8, 8]], [0], shift=[3.0], lengths=[2.0])
    _, calls = queries(finder, DetectRequest(png("red"), ["a", "b"]), [extra])
    assert set(calls[-1].feeds) == set(inputs)
