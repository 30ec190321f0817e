import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calmclip.export import parity
from calmclip.export.nets.mini import MASKS, graphs, parameters
from calmclip.export.nets.mini.facts import MARGIN, SAMPLES
from calmclip.export.nets.mini.masks import MaskFeatures, MaskHead, sampled
from calmclip.export.nets.mini.segmentation import known_graph, masks_graph
from calmclip.models.errors import WeightsMissing

BOXES = torch.tensor([[40.0, 60.0, 200.0, 100.0], [0.0, 0.0, 416.0, 416.0], [300.0, 300.0, 301.0, 380.0]])


def test_samples_are_those_of_torch_and_places_follow():
    features = torch.randn(3, 52, 52, generator=torch.Generator().manual_seed(0))
    answer = sampled(features, BOXES, torch.from_numpy(parameters.places()))
    assert answer.shape == (3, 3 + 5, SAMPLES, SAMPLES)
    for box, row in zip(BOXES, answer, strict=True):
        low, size = box[:2], box[2:] - box[:2]
        middles = (torch.arange(SAMPLES) + 0.5) / SAMPLES * (1 + 2 * MARGIN) - MARGIN
        y, x = torch.meshgrid(low[1] + middles * size[1], low[0] + middles * size[0], indexing="ij")
        grid = torch.stack((x, y), -1)[None] / 416 * 2 - 1
        expected = F.grid_sample(features[None], grid, padding_mode="border", align_corners=False)[0]
        torch.testing.assert_close(row[:3], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(row[7, 0, 0], torch.log2(size.prod().sqrt() / 416) / 4)
    torch.testing.assert_close(answer[0, 3:7, 0, -1], torch.tensor([1.0, -1.0, 1.0, 1.0]))


def test_features_are_three_products_at_stride_8():
    torch.manual_seed(0)
    module = MaskFeatures()
    maps = torch.randn(1, 128, 4, 4), torch.randn(1, 128, 4, 4), torch.ones(1, 128, 2, 2)
    with torch.inference_mode():
        answer = module(*maps)
    weights = [getattr(module, name).weight[:, :, 0, 0] for name in ("stage8", "neck8", "neck16")]
    place = [each[0, :, 1, 2] for each in maps[:2]] + [torch.ones(128)]  # a map of ones stays one
    expected = sum(w @ x for w, x in zip(weights, place, strict=True)) + module.stage8.bias
    torch.testing.assert_close(answer[0, :, 1, 2], expected, atol=1e-5, rtol=0)


def test_the_graph_with_the_weights_that_ship_is_the_module():
    constants = parameters.masks(parameters.read(MASKS, None, ""))
    head, built = MaskHead.load(MASKS), masks_graph(graphs.filled("masks", constants))
    (feeds,) = built.examples
    with torch.inference_mode():
        expected = head.masks(*(torch.from_numpy(feeds[name]) for name in ("mask_features", "boxes"))).numpy()
    answer = parity.onnx_run(built.model)(feeds)["mask_logits"]
    assert answer.shape == (1, 5, SAMPLES, SAMPLES)
    np.testing.assert_allclose(answer, expected, atol=1e-4)


def test_known_is_the_best_cosine_with_a_name():
    units = np.random.default_rng(0).standard_normal((81, 384)).astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    rows, other = units[:80], units[80:]
    nearest = parity.onnx_run(known_graph(rows).model)({"text_embeds": np.concatenate((rows[:2], other))})["nearest"]
    np.testing.assert_allclose(nearest, [1, 1, (rows @ other[0]).max()], atol=1e-5)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "masks.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsMissing, match=r"holds no mask head.*calmclip\.export\.masks"):
        MaskHead.load(tmp_path / "masks.safetensors")
