"""Which region stands for an example: the rule by hand, and in the flow. Against transformers: test_owl."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadImage, BadRequest, TooManyLabels
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.runner import open_bundle
from calmclip.models.tasks.detect import DetectRequest, Example, Suppression, default_suppression, detect
from calmclip.models.tasks.examples import overlaps, pick

Png = Callable[..., bytes]
WHOLE = np.array([0, 0, 8, 8], np.float32)
AXES = np.eye(3, dtype=np.float32)


def found(boxes: list[list[float]], rows: list[int], objectness: list[float] | None = None, **more: Any) -> Arrays:
    """Regions that look along the axes ``rows``."""
    chance = [1.0] * len(rows) if objectness is None else objectness
    return {
        "boxes": np.array([boxes], np.float32),
        "class_embeds": AXES[rows][None],
        "objectness": np.array([chance], np.float32),
        **{name: np.array([value], np.float32) for name, value in more.items()},
    }


def test_of_boxes_that_fit_nearly_as_well_the_least_common_look_is_taken():
    # IoU with the whole: 1, 56/64 = 0.875, 48/64 = 0.75. The mean look is (2, 1, 1) / 4.
    boxes = [[0, 0, 8, 8], [0, 0, 8, 7], [0, 0, 8, 6], [0, 0, 1, 1]]
    assert pick(found(boxes, [0, 1, 2, 0]), WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    assert pick(found(boxes, [1, 0, 2, 0]), WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    assert pick(found(boxes, [0, 0, 1, 1]), WHOLE, drawn=False).tolist() == [[1, 0, 0]]  # 0.75 is too far from 1


def test_long_embeddings_weigh_more_in_the_mean():
    boxes = [[0, 0, 8, 8], [0, 0, 8, 7], [0, 0, 1, 1], [0, 0, 1, 1]]
    rows = [0, 1, 0, 0]
    assert pick(found(boxes, rows), WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    # (6, 0, 0) and (0, 9, 0), the mean (1.5 + 0.05, 2.25, 0): their products with it are 9.3 and 20.25
    long = {"lengths": [6, 9, 0.1, 0.1]}
    assert pick(found(boxes, rows, **long), WHOLE, drawn=False).tolist() == [[1, 0, 0]]


def test_where_nobody_drew_the_most_objective_region_is_meant():
    boxes = [[0, 0, 8, 8], [0, 0, 2, 2], [4, 4, 8, 8], [0, 0, 8, 8]]
    regions = found(boxes, [0, 1, 2, 1], [0.2, 0.9, 0.1, 0.0])
    assert pick(regions, WHOLE, drawn=False).tolist() == [[0, 1, 0]]
    assert pick(regions, np.array([4, 4, 8, 8], np.float32), drawn=True).tolist() == [[0, 0, 1]]
    assert pick(regions, WHOLE, drawn=True).tolist() == [[1, 0, 0]]  # and not the last, where there is nothing


def test_a_box_that_none_overlaps_gets_the_nearest():
    regions = found([[0, 0, 1, 1], [3, 3, 4, 4]], [0, 1])
    assert pick(regions, np.array([6, 6, 8, 8], np.float32), drawn=True).tolist() == [[0, 1, 0]]


def test_a_picture_without_regions_is_no_example():
    with pytest.raises(BadRequest, match="nothing was found in the picture"):
        pick(found([[0, 0, 1, 1]], [0], [0.0]), WHOLE, drawn=True)


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
    """What the `detect` graph is asked, while `regions` answers these in turn."""
    calls: list[Call] = []
    rest = iter(regions)
    none = {"kept_boxes": np.zeros((0, 4)), "scores": [], "raw_scores": [], "classes": [], "candidates": [0]}

    def run(call: Call) -> Arrays:
        calls.append(call)
        if call.graph == "regions":
            return next(rest)
        return {"text_embeds": AXES[:2]} if call.graph == "text" else none  # type: ignore[return-value]

    drive(detect(bundle, request), run)
    return calls[-1].feeds["text_embeds"], calls


def test_examples_are_rows_behind_the_labels(finder: Bundle, png: Png):
    # 16 x 32 fits 8 x 8 at a quarter, so the picture is 4 x 8 and the box drawn at 8 16 16 32 is 2 4 4 8 there
    # (the last region is where the box would lie if nobody translated it)
    regions = found([[0, 0, 4, 8], [2, 4, 4, 8], [7, 7, 8, 8]], [0, 2, 1])
    shown = [Example(png("red", (16, 32)), (8, 16, 16, 32)), Example(png("red", (16, 32)), (8, 16, 99, 99))]
    asked, calls = queries(
        finder, DetectRequest(png("blue"), ["one", "two"], examples=[*shown, Example(png("red", (16, 32)))]),
        [regions] * 4,
    )  # fmt: skip
    assert asked.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]]
    assert [call.graph for call in calls] == ["text", "regions", "regions", "regions", "regions", "detect"]
    assert asked.dtype == np.float32


def test_examples_alone_ask_for_no_labels(finder: Bundle, png: Png):
    regions = found([[0, 0, 8, 8]], [2])
    asked, calls = queries(finder, DetectRequest(png("blue"), examples=[Example(png("red"))]), [regions] * 2)
    assert asked.tolist() == [[0, 0, 1]]
    assert "text" not in [call.graph for call in calls]
    with pytest.raises(TooManyLabels, match="no labels were given"):
        queries(finder, DetectRequest(png("blue")), [regions])


def test_an_answer_names_its_example(detector: Path, png: Png):
    runner = open_bundle(detector)  # one region, the mean colour of the whole letterbox
    red, blue = png("red", (8, 8)), png("blue", (8, 8))
    (one,) = runner.detect(red, examples=[blue, red])
    assert (one.label, one.index, round(one.score, 3)) == ("example 1", 1, 1.0)
    (two,) = runner.detect(red, ["green"], examples=[Example(red, label="this"), blue])
    assert (two.label, two.index) == ("this", 1)


def test_a_runner_reads_examples_from_paths(detector: Path, png: Png, tmp_path: Path):
    runner, red = open_bundle(detector), png("red", (8, 8))
    (tmp_path / "red.png").write_bytes(red)
    for path in (tmp_path / "red.png", str(tmp_path / "red.png")):
        (one,) = runner.detect(red, examples=[Example(path, (0, 0, 8, 8), "mine")])
        assert (one.label, round(one.score, 3)) == ("mine", 1.0)
        with pytest.raises(BadRequest, match="examples is one picture; expected a list of them"):
            runner.detect(red, examples=path)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=r"'nowhere.png' cannot be read"):
        runner.detect(red, examples=[Example("nowhere.png")])
    with pytest.raises(BadRequest, match="example 0: the picture is a str; expected a path"):
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
def test_a_box_that_is_none_is_refused_with_its_place(finder: Bundle, png: Png, box: Any, says: str):
    request = DetectRequest(png("red"), examples=[Example(png("red")), Example(png("red"), box)])
    with pytest.raises(BadRequest, match=f"example 1: .*{says}" if "example" not in says else says):
        queries(finder, request, [found([[0, 0, 8, 8]], [0])] * 3)


def test_a_box_may_be_the_array_of_an_answer(finder: Bundle, png: Png):
    regions = found([[0, 0, 8, 8], [0, 0, 2, 2]], [0, 1])
    box = np.array([0, 0, 2, 2], np.float32)
    asked, _ = queries(finder, DetectRequest(png("red"), examples=[Example(png("red", (8, 8)), box)]), [regions] * 2)
    assert asked.tolist() == [[0, 1, 0]]
    wrong = Example(png("red"), np.array([2, 0, 2, 2], np.float32))
    with pytest.raises(BadRequest, match=r"box is \[2.0, 0.0, 2.0, 2.0\]; expected"):
        queries(finder, DetectRequest(png("red"), examples=[wrong]), [regions] * 2)


@pytest.mark.parametrize("label", ["", " \n"])
def test_a_name_without_words_is_refused_as_labels_are(finder: Bundle, png: Png, label: str):
    with pytest.raises(BadRequest, match="example 0: its label is empty"):
        queries(finder, DetectRequest(png("red"), examples=[Example(png("red"), label=label)]), [])


def test_a_broken_example_is_named(finder: Bundle, png: Png):
    with pytest.raises(BadImage, match="example 0: 5 bytes"):
        queries(finder, DetectRequest(png("red"), ["red"], examples=[Example(b"hello")]), [])
    with pytest.raises(BadRequest, match="example 0: nothing was found"):
        queries(finder, DetectRequest(png("red"), examples=[Example(png("red"))]), [found([[0, 0, 1, 1]], [0], [0.0])])


def test_a_bundle_brings_defaults_of_its_own(finder: Bundle):
    assert default_suppression(finder) == Suppression()
    said = finder.manifest.model_validate(
        finder.manifest.model_dump() | {"suppression": {"min_score": 0.5, "sigma": 2}}
    )
    finder.manifest = finder.manifest.model_validate(said)
    assert default_suppression(finder) == Suppression(min_score=0.5, sigma=2)


def test_the_defaults_of_the_bundle_reach_the_graph(finder: Bundle, png: Png):
    finder.manifest = finder.manifest.model_validate(
        finder.manifest.model_dump() | {"suppression": {"min_score": 0.5, "method": "hard"}}
    )
    _, calls = queries(finder, DetectRequest(png("red"), ["a", "b"]), [found([[0, 0, 8, 8]], [0])])
    assert (calls[-1].feeds["min_score"], calls[-1].feeds["method"]) == (0.5, 0)
    own = Suppression(min_score=0.25)
    _, calls = queries(finder, DetectRequest(png("red"), ["a", "b"], suppression=own), [found([[0, 0, 8, 8]], [0])])
    assert (calls[-1].feeds["min_score"], calls[-1].feeds["method"]) == (0.25, 2)


def test_a_graph_is_fed_what_it_takes_of_the_regions(finder: Bundle, png: Png):
    inputs = finder.manifest.graphs["detect"].inputs
    extra = found([[0, 0, 8, 8]], [0], shift=[3.0], lengths=[2.0])
    _, calls = queries(finder, DetectRequest(png("red"), ["a", "b"]), [extra])
    assert set(calls[-1].feeds) == set(inputs)
