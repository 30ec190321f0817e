"""Proposals, region features and the detect graph of the built-in model. Oracles: torchvision, pixels, numpy."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

from calmclip.export import rewrites
from calmclip.export.nets.common.detect_graph import CANDIDATES
from calmclip.export.nets.mini import nanodet
from calmclip.export.nets.mini.detection import FACTOR, HIGH, LOW, SCALE, detect_graph
from calmclip.export.nets.mini.facts import PROPOSALS
from calmclip.export.nets.mini.regions import average, overlapping, survivors
from calmclip.models.ops.reference import soft_nms
from calmclip.models.ops.spec import METHODS
from calmclip.models.suppression import Suppression
from calmclip.models.tasks.detect import DETECTED, REGIONS, SUPPRESSION


def random_boxes(seed, *shape, most=200.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * (640 - most)
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=generator) * most), dim=-1)


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_survivors_equal_torchvisions_nms(threshold):
    boxes = random_boxes(0, 2, 400)
    survives = survivors(boxes, threshold)
    for row, flags in zip(boxes, survives, strict=True):
        expected = nms(row, torch.arange(400.0, 0.0, -1.0), threshold)
        assert flags.nonzero()[:, 0].tolist() == expected.sort().values.tolist()


def test_boxes_overlap_where_torchvisions_iou_is_above_the_threshold():
    boxes = random_boxes(1, 1, 50)
    assert torch.equal(overlapping(boxes, 0.35)[0], box_iou(boxes[0], boxes[0]) > 0.35)


def test_boxes_without_area_overlap_nothing():
    assert not overlapping(torch.tensor([[[3.0, 3, 3, 9], [3, 3, 3, 9]]]), 0.0).any()


def test_average_is_the_mean_of_the_pixels_in_the_box():
    features = torch.randn(2, 5, 20, 20, generator=torch.Generator().manual_seed(2))
    boxes = random_boxes(3, 2, 6).round()
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    painted = F.interpolate(features, scale_factor=32, mode="nearest")  # every pixel holds its cell's value
    averages = average(features, boxes, 32)
    for picture, row, means in zip(painted, boxes.int(), averages, strict=True):
        for (x0, y0, x1, y1), mean in zip(row.tolist(), means, strict=True):
            torch.testing.assert_close(mean, picture[:, y0:y1, x0:x1].mean((1, 2)), atol=1e-5, rtol=1e-5)


def test_a_box_thinner_than_a_pixel_reads_its_cell():
    features = torch.arange(400.0).reshape(1, 1, 20, 20)
    assert (
        average(features, torch.tensor([[[100.0, 50, 100, 50]]]), 32).item() == 1 * 20 + 3
    )  # row 50 // 32, col 100 // 32


def test_cells_are_those_of_each_grid_row_by_row():
    cells = nanodet.grid()
    assert cells.shape == (52 * 52 + 26 * 26 + 13 * 13, 3)  # 416 / 8, 416 / 16, 416 / 32
    assert cells[[0, 1, 52]].tolist() == [[4, 4, 8], [12, 4, 8], [4, 12, 8]]
    assert cells[[52 * 52, -1]].tolist() == [[8, 8, 16], [400, 400, 32]]


def test_a_box_lies_at_its_sides_mean_distances_in_strides():
    sides = torch.full((4, nanodet.BINS), -100.0)
    for side, bins in enumerate(([1], [2], [3], [4, 5])):  # left, top, right, bottom: half 4 and half 5
        sides[side, bins] = 0.0
    box = nanodet.decode(sides.reshape(1, 1, -1), torch.tensor([[[20.0, 36.0, 8.0]]]))
    assert box[0, 0].tolist() == pytest.approx([20 - 8, 36 - 16, 20 + 24, 36 + 36])


def test_boxes_equal_a_loop_over_their_sides():
    generator = torch.Generator().manual_seed(8)
    cells = nanodet.grid()[::500]
    bins = torch.randn(2, len(cells), 4 * nanodet.BINS, generator=generator)
    boxes = nanodet.decode(bins, cells)
    for row, picture in zip(bins.double().numpy(), boxes, strict=True):
        for logits, (x, y, stride), box in zip(row.reshape(-1, 4, nanodet.BINS), cells.tolist(), picture, strict=True):
            chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            left, top, right, bottom = (stride * sum(i * p for i, p in enumerate(side)) for side in chances)
            assert box.tolist() == pytest.approx([x - left, y - top, x + right, y + bottom], abs=1e-3)


def test_the_first_convolution_reads_our_pixels_as_the_published_one_reads_its_own():
    generator = torch.Generator().manual_seed(9)
    published = {
        "stem.conv.weight": torch.randn(4, 3, 3, 3, generator=generator).numpy(),
        "stem.conv.bias": torch.randn(4, generator=generator).numpy(),
    }
    rgb = 255 * torch.rand(1, 3, 9, 9, generator=generator)
    # NanoDet's own configuration: B, G, R; mean 103.53, 116.28, 123.675; deviation 57.375, 57.12, 58.395
    mean, std = (torch.tensor(n).reshape(3, 1, 1) for n in ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395)))
    want = F.conv2d((rgb.flip(1) - mean) / std, *(torch.from_numpy(array) for array in published.values()))
    ours = nanodet.normalized(published)
    ours_of_rgb = F.conv2d((rgb - 127) / 128, ours["stem.conv.weight"], ours["stem.conv.bias"])
    torch.testing.assert_close(ours_of_rgb, want, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def scene():
    """Random regions, prompts and background, with many overlaps."""
    rng = np.random.default_rng(6)
    unit = lambda *shape: F.normalize(torch.from_numpy(rng.normal(size=shape)), dim=-1).numpy()  # noqa: E731
    return {
        "background": unit(3, 16).astype(np.float32),
        "class_embeds": unit(1, PROPOSALS, 16).astype(np.float32),
        "text_embeds": unit(5, 16).astype(np.float32),
        "boxes": random_boxes(7, 1, PROPOSALS, most=400.0).numpy(),
        "objectness": np.where(np.arange(PROPOSALS) < 60, rng.random((1, PROPOSALS)), 0.0).astype(np.float32),
    }


def detector(background):
    """A session of the detect graph as a bundle contains it."""
    built = detect_graph(background)
    model = rewrites.apply(built.model, [*rewrites.swaps(), *built.attach]).model
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def calibrated(products):
    """Beta calibration, by logits."""
    logits = np.log(FACTOR) + LOW * np.log(products) - HIGH * np.log(1 - products)
    return 1 / (1 + np.exp(-logits))


def run(session, feeds):
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_the_detect_graph_has_the_inputs_and_outputs_of_its_task(scene):
    session = detector(scene["background"])
    assert {i.name for i in session.get_inputs()} == {*REGIONS, "text_embeds", *SUPPRESSION}
    assert {o.name for o in session.get_outputs()} == {*DETECTED}
    shapes = {o.name: o.shape for o in session.get_outputs()}
    assert (shapes["kept_boxes"], shapes["candidates"]) == (["K", 4], [1])


def test_the_graph_without_rewrites_has_standard_operators_and_its_example_runs(scene):
    built = detect_graph(scene["background"])
    assert {node.domain for node in built.model.graph.node} == {""}
    assert not built.model.functions
    (example,) = built.examples
    outputs = run(ort.InferenceSession(built.model.SerializeToString()), example)
    assert 20 < outputs["candidates"].item() < 5 * PROPOSALS  # some pairs pass the threshold


@pytest.mark.parametrize("per_class", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_the_detect_graph_equals_its_formula(scene, method, per_class):
    session = detector(scene["background"])
    settings = Suppression(
        method, per_class=bool(per_class), iou_threshold=0.3, sigma=0.5, min_score=0.02, max_output=20
    )
    feeds = {name: scene[name] for name in ("class_embeds", "text_embeds", "boxes", "objectness")}
    outputs = run(session, feeds | settings.tensors())

    texts = np.concatenate((scene["text_embeds"], scene["background"])).astype(np.float64)
    powers = np.exp(SCALE * scene["class_embeds"][0].astype(np.float64) @ texts.T)
    chances = (powers / powers.sum(1, keepdims=True))[:, :5]
    with np.errstate(divide="ignore"):
        scores = calibrated(chances * scene["objectness"][0][:, None])
    box, label = np.nonzero(scores >= 0.02)
    suppressed = soft_nms(
        scene["boxes"][0][box],
        scores[box, label],
        label,
        method=method,
        per_class=bool(per_class),
        min_score=0.02,
        max_output=20,
    )
    assert outputs["candidates"].tolist() == [len(box)]
    assert len(outputs["scores"]) > 5
    np.testing.assert_array_equal(outputs["kept_boxes"], scene["boxes"][0][box[suppressed.indices]])
    np.testing.assert_array_equal(outputs["classes"], suppressed.classes)
    np.testing.assert_allclose(outputs["scores"], suppressed.scores, rtol=1e-4)
    np.testing.assert_allclose(outputs["raw_scores"], scores[box, label][suppressed.indices], rtol=1e-4)


def test_only_the_best_pairs_reach_suppression(scene):
    dim = scene["text_embeds"].shape[1]
    texts = np.random.default_rng(3).standard_normal((60, dim)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    feeds = {name: scene[name] for name in ("class_embeds", "boxes", "objectness")} | {"text_embeds": texts}
    feeds |= Suppression("hard", per_class=False, iou_threshold=0.3, min_score=0.0, max_output=1000).tensors()
    outputs = run(detector(scene["background"]), feeds)
    assert outputs["candidates"].tolist() == [60 * PROPOSALS]
    every = np.concatenate((texts, scene["background"])).astype(np.float64)
    powers = np.exp(SCALE * scene["class_embeds"][0].astype(np.float64) @ every.T)
    with np.errstate(divide="ignore"):
        scores = calibrated((powers / powers.sum(1, keepdims=True))[:, :60] * scene["objectness"][0][:, None])
    best = np.argsort(-scores.ravel(), kind="stable")[:CANDIDATES]
    suppressed = soft_nms(
        scene["boxes"][0][best // 60], scores.ravel()[best], method="hard", min_score=0.0, max_output=1000
    )
    np.testing.assert_array_equal(outputs["kept_boxes"], scene["boxes"][0][best[suppressed.indices] // 60])
    assert outputs["raw_scores"].min() >= scores.ravel()[best[-1]] * 0.999


def test_regions_without_objectness_give_no_box(scene):
    feeds = {name: scene[name] for name in ("class_embeds", "text_embeds", "boxes")}
    feeds |= {**Suppression("gaussian").tensors(), "objectness": np.zeros((1, PROPOSALS), np.float32)}
    outputs = run(detector(scene["background"]), feeds)
    assert outputs["kept_boxes"].shape == (0, 4)
    assert outputs["scores"].shape == (0,)
    assert outputs["candidates"].tolist() == [0]
