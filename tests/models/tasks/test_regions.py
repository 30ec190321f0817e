"""Vectors of regions over invented graphs: identities of the mean, order, pixels of the boxes, and errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph, Manifest
from calmclip.models.errors import BadRequest, TaskNotServed
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.preprocess.placement import Frame
from calmclip.models.tasks import require
from calmclip.models.tasks.embed import Boxed, EmbedRequest, embed
from calmclip.models.tasks.regions import Grid, pooled, region_embedding, region_vectors

Png = Callable[..., bytes]
AXES = np.eye(3, dtype=np.float32)
RANDOM = np.random.default_rng(0)
PATCHES = RANDOM.standard_normal((6, 9, 5)).astype(np.float32)
QUARTERS = np.array([[[[2, 0, 0], [0, 2, 0]], [[0, 0, 2], [2, 2, 0]]]], np.float32)  # patches [1, 2, 2, 3]


def proposals(boxes: list[list[float]], objectness: list[float]) -> Arrays:
    """Regions whose embeddings are the axes, twice as long."""
    rows = 2 * AXES[: len(boxes)]
    return {name: np.array([value], np.float32) for name, value in
            (("boxes", boxes), ("class_embeds", rows), ("objectness", objectness))}  # fmt: skip


def vectors(bundle: Bundle, picture: bytes, outputs: Arrays, boxes: Any = None) -> tuple[Array, Array]:
    return drive(region_vectors(bundle, picture, boxes), lambda call: outputs)


def test_the_whole_map_is_the_mean_of_all_patches_and_whole_cells_are_their_slice():
    boxes = np.array([[0, 0, 9, 6], [2, 1, 5, 4], [8, 5, 9, 6]], np.float32)
    wanted = [PATCHES.mean((0, 1)), PATCHES[1:4, 2:5].mean((0, 1)), PATCHES[5, 8]]
    assert pooled(PATCHES, boxes) == pytest.approx(np.stack(wanted), abs=1e-6)


def test_a_part_of_a_cell_weighs_its_area():
    """2 x 1.5 cells: x from .5 to 2.5 weighs 1/4, 1/2, 1/4; y from 1 to 2.5 weighs 2/3, 1/3."""
    wanted = np.einsum("y,x,yxd->d", [2 / 3, 1 / 3], [1 / 4, 1 / 2, 1 / 4], PATCHES[1:3, :3])
    assert pooled(PATCHES, np.array([[0.5, 1, 2.5, 2.5]], np.float32))[0] == pytest.approx(wanted, abs=1e-6)


def test_the_mean_is_linear_in_the_patches():
    other = RANDOM.standard_normal(PATCHES.shape).astype(np.float32)
    corners = RANDOM.uniform(0, 4, (20, 2))
    boxes = np.concatenate((corners, corners + RANDOM.uniform(0.1, 2, (20, 2))), axis=1).astype(np.float32)
    sides = pooled(3 * PATCHES - 2 * other, boxes), 3 * pooled(PATCHES, boxes) - 2 * pooled(other, boxes)
    assert sides[0] == pytest.approx(sides[1], abs=1e-5)


def test_aligned_boxes_are_those_of_torchvisions_roi_align():
    import torch
    from torchvision.ops import roi_align

    boxes = np.array([[1, 0, 4, 3], [0, 2, 9, 6], [7, 1, 8, 5]], np.float32)
    for box in boxes:
        x0, y0, x1, y1 = box.astype(int)
        rows = torch.tensor([0, *box.tolist()])[None]
        map_ = torch.from_numpy(PATCHES).permute(2, 0, 1)[None]
        cells = roi_align(map_, rows, (y1 - y0, x1 - x0), sampling_ratio=1, aligned=True)
        assert pooled(PATCHES, box[None])[0] == pytest.approx(cells.mean((2, 3))[0].numpy(), abs=1e-5)


def test_a_thin_box_and_one_at_the_edge_are_the_cell_they_touch():
    boxes = np.array([[3.2, 2.2, 3.2, 2.2], [9, 6, 9, 6], [0, 0, 0, 0]], np.float32)
    assert pooled(PATCHES, boxes) == pytest.approx(PATCHES[[2, 5, 0], [3, 8, 0]], abs=1e-6)


def test_boxes_are_mapped_from_the_picture_to_the_map():
    """A picture of 90 x 40 fills 45 x 20 of 45 x 60 pixels: 9 x 2 of 9 x 6 cells, each of 5 x 10 pixels."""
    frame = Frame(90, 40, (0.5, 0.5), (0.0, 0.0))
    rows = region_embedding(PATCHES, np.array([[0, 0, 90, 40], [20, 20, 40, 40]], np.float32), frame, (60, 45))
    wanted = np.stack([PATCHES[:2].mean((0, 1)), PATCHES[1, 2:4].mean(0)])
    assert rows == pytest.approx(wanted / np.linalg.norm(wanted, axis=1, keepdims=True), abs=1e-6)


def test_proposals_are_regions_best_first_in_pixels_of_the_picture(finder: Bundle, png: Png):
    # 16 x 32 fits 8 x 8 at a quarter; the second proposal lies beside the picture, the last is no object
    outputs = proposals([[0, 0, 2, 2], [5, 0, 8, 8], [1, 1, 4, 8]], [0.25, 0.75, 0.5])
    rows, boxes = vectors(finder, png("red", (16, 32)), outputs)
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert boxes.tolist() == [[4, 4, 16, 32], [0, 0, 8, 8]]
    rows, boxes = vectors(finder, png("red", (16, 32)), proposals([[0, 0, 2, 2]], [0.0]))
    assert (rows.shape, boxes.shape) == ((0, 3), (0, 4))


def test_without_a_map_a_box_has_the_vector_of_the_nearest_proposal(finder: Bundle, png: Png):
    outputs = proposals([[0, 0, 2, 2], [1, 1, 4, 8]], [0.25, 0.5])
    rows, boxes = vectors(finder, png("red", (16, 32)), outputs, [(4, 4, 99, 99), (0, 0, 8, 8)])
    assert rows.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert boxes.tolist() == [[4, 4, 16, 32], [0, 0, 8, 8]]


def test_boxes_of_a_map_keep_their_order_and_the_windows_begin_with_the_picture(mapped: Bundle, png: Png):
    outputs = {"patches": QUARTERS}
    rows, boxes = vectors(mapped, png("red", (16, 16)), outputs, [(8, 0, 99, 8), (0, 0, 8, 8), (0, 0, 16, 8)])
    half = 0.5**0.5
    assert rows == pytest.approx(np.array([[0, 1, 0], [1, 0, 0], [half, half, 0]]), abs=1e-6)
    assert boxes.tolist() == [[8, 0, 16, 8], [0, 0, 8, 8], [0, 0, 16, 8]]
    rows, boxes = vectors(mapped, png("red", (16, 16)), outputs)
    assert boxes[0].tolist() == [0, 0, 16, 16]
    assert rows[0] == pytest.approx(np.array([2, 2, 1]) / 3, abs=1e-6)
    assert len(boxes) == len(Grid().windows(16, 16))


def test_a_prompter_replaces_the_mean(mapped: Bundle, png: Png):
    """A made-up one: the cell under the corner x0, y0 of the box, twice as long."""
    graphs = {**mapped.manifest.graphs, "prompter": Graph.model_construct(file="prompter.onnx")}
    mapped.manifest = mapped.manifest.model_copy(update={"graphs": graphs})

    def run(call: Call) -> Arrays:
        if call.graph == "dense":
            return {"patches": QUARTERS}
        assert call.feeds["boxes"].tolist() == [[[1, 0, 2, 2], [0.25, 1, 1, 1.5]]]
        x, y = call.feeds["boxes"][0, :, :2].astype(int).T
        return {"region_embeds": 2 * call.feeds["patches"][:, y, x]}

    rows, _ = drive(region_vectors(mapped, png("red", (16, 16)), [(8, 0, 16, 16), (2, 8, 8, 12)]), run)
    assert rows.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_embed_puts_the_vectors_of_boxes_in_the_place_of_their_picture(mapped: Bundle, png: Png):
    def run(call: Call) -> Arrays:
        answers = {"text": {"text_embeds": AXES[[2]]}, "image": {"image_embeds": AXES[[1]]}}
        return answers.get(call.graph, {"patches": QUARTERS})

    boxed = Boxed(png("red", (16, 16)), [(0, 0, 8, 8), (0, 8, 8, 16)])
    answer = drive(embed(mapped, EmbedRequest([png("blue"), boxed, "red"])), run)
    assert answer.vectors.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_a_bundle_without_regions_says_what_to_do(bundle: Bundle, png: Png):
    with pytest.raises(TaskNotServed, match=r"has no graph 'dense'.*export the checkpoint with --dense"):
        vectors(bundle, png("red"), {}, [[0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([], "boxes is empty"),
        ([[0, 0, 4, 4], [0, 0, 4]], "box 1 is .*expected x0, y0, x1, y1"),
        ([[4, 0, 4, 4]], "box 0 is .*x0 < x1"),
        ([[0, 0, float("nan"), 4]], "box 0 is"),
        ([[0, 0, 4, 4], [8, 0, 9, 4]], "box 1, .* lies outside of its picture, 8 x 6 pixels"),
    ],
)
@pytest.mark.parametrize("which", ["finder", "mapped"])
def test_impossible_boxes_are_refused_with_their_number(
    request: pytest.FixtureRequest, which: str, png: Png, boxes: Any, says: str
):
    bundle: Bundle = request.getfixturevalue(which)
    with pytest.raises(BadRequest, match=says):
        vectors(bundle, png("red"), proposals([[0, 0, 8, 8]], [1.0]), boxes)


def test_windows_cover_the_picture_from_edge_to_edge():
    """40 x 20, squares of 10 with half steps: 7 places across and 3 down, after the whole picture."""
    boxes = Grid(sizes=(0.5,), ratios=(1.0,)).windows(40, 20)
    wanted = [[0, 0, 40, 20], *([x, y, x + 10, y + 10] for y in (0, 5, 10) for x in range(0, 31, 5))]
    assert boxes.tolist() == wanted
    wide = Grid(sizes=(0.5,), ratios=(4.0,), stride=1.0).windows(40, 20)[1:]
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in wide.tolist()} == {(20, 5)}
    assert len(Grid(sizes=(1.0,), ratios=(10.0,)).windows(40, 20)) == 1 + 6  # 40 x 6.3: a step is at most 3.2


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (Grid(sizes=()), r"sizes is \[\]"),
        (Grid(sizes=(0.5, 1.1)), "sizes is .*expected numbers from 0.02 to 1,"),
        (Grid(ratios=(0.0,)), "ratios is"),
        (Grid(stride=0.0), "stride is 0.0"),
        (Grid(sizes=(0.02,)), r"it makes \d+ windows or more of a picture of 40 x 20 pixels"),
    ],
)
def test_impossible_grids_are_refused(grid: Grid, says: str):
    with pytest.raises(BadRequest, match=f"grid: {says}"):
        grid.windows(40, 20)


def test_a_manifests_map_and_prompter_are_checked(mapped: Bundle):
    def changed(**graphs: Any) -> Manifest:
        return mapped.manifest.model_copy(update={"graphs": {**mapped.manifest.graphs, **graphs}})

    require(mapped.manifest)
    dense = mapped.manifest.graphs["dense"]
    with pytest.raises(ValueError, match=r"`graphs\.dense\.outputs` are .*expected .*patches"):
        require(changed(dense=dense.model_copy(update={"outputs": {"map": dense.outputs["patches"]}})))
    with pytest.raises(ValueError, match="'dense' must take pictures"):
        require(changed(dense=dense.model_copy(update={"preprocess": None})))
    with pytest.raises(ValueError, match=r"`graphs\.prompter\.inputs` are"):
        require(changed(prompter=dense))
