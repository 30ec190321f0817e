"""Proposals, region features and the detect graph of the built-in model. Oracles: torchvision, pixels, numpy."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

from calmclip.export import rewrites
from calmclip.export.nets.common.detect_graph import CANDIDATES
from calmclip.export.nets.mini.boxhead import STRIDE, BoxHead, centres, decode, fold
from calmclip.export.nets.mini.regions import (
    CELL,
    PROPOSALS,
    SCALE,
    Regions,
    average,
    detect_graph,
    pairwise_iou,
    propose,
    survivors,
)
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


def test_pairwise_iou_equals_torchvision():
    boxes = random_boxes(1, 1, 50)
    torch.testing.assert_close(pairwise_iou(boxes)[0], box_iou(boxes[0], boxes[0]))


def test_boxes_without_area_overlap_nothing():
    assert pairwise_iou(torch.tensor([[[3.0, 3, 3, 9], [3, 3, 3, 9]]])).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_proposals_are_padded_with_zeros():
    boxes = torch.tensor([[0.0, 0, 64, 64]]).repeat(1, 1600, 1)  # one box, 1600 times
    boxes[0, 7] = torch.tensor([200.0, 200, 300, 300])
    objectness = torch.full((1, 1600), 0.5)
    objectness[0, 7] = 0.9
    proposals, certain = propose(boxes, objectness)
    assert proposals.shape == (1, PROPOSALS, 4)
    assert certain[0, :3].tolist() == pytest.approx([0.9, 0.5, 0.0])
    assert proposals[0, 0].tolist() == [200, 200, 300, 300]


def test_average_is_the_mean_of_the_pixels_in_the_box():
    features = torch.randn(2, 5, 20, 20, generator=torch.Generator().manual_seed(2))
    boxes = random_boxes(3, 2, 6).round()
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    painted = F.interpolate(features, scale_factor=CELL, mode="nearest")  # every pixel holds its cell's value
    averages = average(features, boxes)
    for picture, row, means in zip(painted, boxes.int(), averages, strict=True):
        for (x0, y0, x1, y1), mean in zip(row.tolist(), means, strict=True):
            torch.testing.assert_close(mean, picture[:, y0:y1, x0:x1].mean((1, 2)), atol=1e-5, rtol=1e-5)


def test_a_box_thinner_than_a_pixel_reads_its_cell():
    features = torch.arange(400.0).reshape(1, 1, 20, 20)
    assert average(features, torch.tensor([[[100.0, 50, 100, 50]]])).item() == 1 * 20 + 3  # row 50 // 32, col 100 // 32


def test_decode_counts_from_the_cells_centres():
    centre = centres(2, 3)
    assert centre[4].tolist() == [1.5 * STRIDE, 1.5 * STRIDE]  # second row, second column
    reach = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    # 24 - 16, 24 - 32, 24 + 48, 24 + 64
    assert decode(reach, centre)[4].tolist() == pytest.approx([8.0, -8.0, 72.0, 88.0], abs=1e-4)


def test_folding_changes_nothing():
    torch.manual_seed(4)
    head = BoxHead().eval()
    for norm in (module for module in head.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    maps = torch.randn(1, 120, 8, 8), torch.randn(1, 1280, 4, 4)
    with torch.no_grad():
        before = head(*maps)
        after = fold(head)(*maps)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in head.modules())
    for unfolded, folded in zip(before, after, strict=True):
        torch.testing.assert_close(unfolded, folded, rtol=1e-4, atol=1e-4)


class Fake(nn.Module):
    """A backbone whose maps are the pooled pixels, repeated for each channel."""

    def forward(self, pixels):
        mean16, mean32 = (F.avg_pool2d(pixels.mean(1, keepdim=True), n) for n in (16, 32))
        return mean16.repeat(1, 120, 1, 1), mean32.repeat(1, 1280, 1, 1).clamp(0, 6)


def test_pictures_of_a_batch_are_independent():
    torch.manual_seed(5)
    head = fold(BoxHead())
    nn.init.normal_(head.out.weight, std=0.3)
    tower = Regions(Fake(), head, nn.Linear(1280, 8)).eval()
    pixels = torch.randn(3, 3, 640, 640)
    with torch.no_grad():
        together, alone = tower(pixels), tower(pixels[1:2])
    for batched, single in zip(together, alone, strict=True):
        torch.testing.assert_close(batched[1:2], single, rtol=1e-4, atol=1e-3)


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
    scores = chances * scene["objectness"][0][:, None]
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
    scores = (powers / powers.sum(1, keepdims=True))[:, :60] * scene["objectness"][0][:, None]
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
