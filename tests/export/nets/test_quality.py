"""How well a box fits, and how both trainings of the detector learn. Oracles: numbers worked out by hand, numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calmclip.export import box_quality, parity, regions
from calmclip.export.nets.mini import nanodet
from calmclip.export.nets.mini.quality import INPUTS, shape
from calmclip.export.nets.mini.regions import FEATURES, RegionHead, extent
from calmclip.models.evals.average_precision import Boxes

GENERATOR = torch.Generator().manual_seed(0)


def test_the_shape_of_distributions_by_hand():
    """Left: all at 3 strides. Top: even. Right: half at 0, half at 10. Bottom: all at 10."""
    bins = torch.full((1, 4, nanodet.BINS), -1e4)
    bins[0, 0, 3] = bins[0, 2, 0] = bins[0, 2, 10] = bins[0, 3, 10] = 0.0
    bins[0, 1] = 0.0
    (row,) = shape(bins.flatten(1), torch.tensor([[4.0, 4.0, 32.0]])).tolist()
    expected = [1, 1, 0.3, 0, 1 / 11, 1 / 11, 0.5, 0.1**0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 0, 2]
    np.testing.assert_allclose(row, expected, atol=1e-3)


def test_the_extent_of_a_box_is_the_root_of_its_part_of_the_picture():
    boxes = torch.tensor([[0.0, 0, 416, 416], [100, 100, 204, 204], [5, 5, 5, 90]])
    assert extent(boxes)[:, 0].tolist() == pytest.approx([1, 0.25, 0])


def test_quality_learns_the_overlap_from_the_shapes():
    shapes = torch.rand(1000, INPUTS, generator=GENERATOR)
    overlaps = 0.3 + 0.6 * shapes[:, 1]
    with parity.one_thread():
        trained, again = (box_quality.train(box_quality.Cells(shapes, overlaps), steps=60) for _ in range(2))
    fresh = torch.rand(500, INPUTS, generator=GENERATOR)
    assert (trained(fresh) - 0.3 - 0.6 * fresh[:, 1]).abs().mean() < 0.06
    assert torch.equal(trained(fresh), again(fresh))


def test_a_region_head_learns_from_crops_and_starts_as_the_image_head():
    """The teacher has eight vectors; NanoDet's features show which is meant, the vectors of the boxes do not."""
    vectors, texts, kinds = (torch.nn.functional.normalize(torch.randn(n, 384), dim=-1) for n in (512, 40, 8))
    meant = torch.arange(512) % 8
    features = torch.randn(512, FEATURES - 384) * 0.1
    features[torch.arange(512), meant] += 1
    assert torch.allclose(RegionHead()(vectors, features), vectors, atol=1e-5)
    with parity.one_thread():
        head = regions.train(regions.Seen(vectors, features, kinds[meant]), texts, epochs=16)
    assert (vectors * kinds[meant]).sum(-1).mean().abs() < 0.05
    assert (head(vectors, features) * kinds[meant]).sum(-1).mean() > 0.3


def test_the_loss_is_the_distance_and_the_cross_entropy_of_the_chances():
    student, teacher = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    texts = torch.eye(2)
    wanted = np.exp([20.0, 0.0]) / np.exp([20.0, 0.0]).sum()
    given = np.array([12.0, 16.0]) - np.log(np.exp([12.0, 16.0]).sum())
    assert regions.loss(student, teacher, texts).item() == pytest.approx(2 * 0.4 - float(wanted @ given), abs=1e-5)


def test_a_crop_has_a_tenth_of_its_sides_around_it_inside_the_picture():
    picture = Image.fromarray(np.arange(200 * 100, dtype=np.uint8).reshape(100, 200))
    assert regions.crop(picture, np.array([50, 20, 100, 60])).size == (60, 48)
    assert regions.crop(picture, np.array([0, 0, 200, 100])).size == (200, 100)
    assert regions.crop(picture, np.array([7.5, 7.5, 7.5, 7.5])).size == (1, 1)


def test_cells_without_a_box_near_are_an_error(tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    nothing = Boxes.true(np.empty((0, 4)), np.empty(0, int))
    module = type("Module", (), {"quality": box_quality.Quality()})()
    with pytest.raises(box_quality.BadRequest, match="no box of 1 pictures is near any place"):
        box_quality.see(module, [tmp_path / "a.png"], [nothing])
