"""Masks as run lengths beside pycocotools, enlarged beside torch, and as PNG beside Pillow."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from calmclip.models.flow import Array
from calmclip.models.tasks.masks import Mask, Painted, compressed, indexed_png, palette, starts

DRAW = np.random.default_rng(0)


def blobs(rows: int, columns: int, seed: int = 0) -> Array:
    """int [rows, columns] from -1 to 2, in patches of several pixels."""
    coarse = np.random.default_rng(seed).integers(-1, 3, (-(-rows // 3), -(-columns // 4)))
    return np.kron(coarse, np.ones((3, 4), int))[:rows, :columns]


def plain(names: Array, name: int) -> Mask:
    return Painted(names, names.shape[1], names.shape[0]).mask(name)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (24, 36), (37, 50)])
@pytest.mark.parametrize("kind", ["blobs", "noise", "full", "empty"])
def test_the_text_and_the_area_are_those_of_pycocotools(kind: str, rows: int, columns: int):
    noise = DRAW.integers(-1, 2, (rows, columns))
    names = {"blobs": blobs(rows, columns), "noise": noise, "full": noise * 0, "empty": noise * 0 - 1}[kind]
    mask = plain(names, 0)
    want: Any = coco.encode(np.asfortranarray(names == 0).astype(np.uint8))
    assert mask.rle() == {"size": [rows, columns], "counts": want["counts"].decode()}
    assert mask.area == coco.area(want)
    assert np.array_equal(mask.pixels(), names == 0)
    assert np.array_equal(coco.decode(mask.rle()), names == 0)


def test_a_text_worked_out_by_hand():
    """The differences from the fourth count on: 5, 40, 3, 2 - 40 = -38 and 1000 - 3 = 997, in groups of 5 bits, the
    least first; 32 says that more follow, 16 is the sign, and "0" is 0."""
    groups = [5, 32 | 8, 1, 3, 32 | (-38 & 31), -38 >> 5 & 31, 32 | (997 & 31), 32 | (997 >> 5), 0]
    assert groups[1:3] == [40, 1]
    assert groups[6:] == [32 | 5, 32 | 31, 0]
    assert compressed(np.array([5, 40, 3, 2, 1000])) == "".join(chr(48 + group) for group in groups)


def test_long_runs_have_the_text_of_pycocotools():
    """Up to 40 million pixels, as of the largest picture that is read."""
    for counts in (
        [0, 40_000_000],
        [39_999_999, 1],
        [1, 20_000_000, 1, 19_999_997, 1],
        [7, 31, 32, 33, 1024, 5, 0xFFFF],
    ):
        want: Any = coco.frPyObjects({"size": [1, sum(counts)], "counts": counts}, 1, sum(counts))
        assert compressed(np.array(counts)) == want["counts"].decode()


@pytest.mark.parametrize(
    ("size", "bigger"), [((5, 7), (5, 7)), ((5, 7), (50, 70)), ((5, 7), (13, 8)), ((3, 4), (4, 9))]
)
def test_an_enlarged_mask_is_the_nearest_neighbour(size: tuple[int, int], bigger: tuple[int, int]):
    names = DRAW.integers(-1, 3, size)
    tensor = torch.from_numpy(names)[None, None].float()
    want = torch.nn.functional.interpolate(tensor, bigger, mode="nearest-exact")[0, 0].numpy()
    painted = Painted(names, bigger[1], bigger[0])
    for name in range(3):
        mask = painted.mask(name)
        assert np.array_equal(mask.pixels(), want == name)
        assert mask.rle()["counts"] == coco.encode(np.asfortranarray(want == name).astype(np.uint8))["counts"].decode()
        assert (mask.counts[1:] > 0).all()


def test_the_count_of_runs_is_known_before_they_are_made():
    names = blobs(30, 40)
    painted = Painted(names, 400, 300)
    made = sum(len(painted.mask(name).counts) for name in range(3))
    assert abs(made - painted.runs) <= 3 * (400 + 1)


@pytest.mark.parametrize(("size", "cells"), [(10, 5), (11, 4), (4000, 512), (7, 7), (3, 1)])
def test_a_pixel_belongs_to_the_cell_of_its_middle(size: int, cells: int):
    edges = starts(size, cells)
    assert edges[0] == 0
    assert edges[-1] == size
    for pixel in range(size):
        cell = int((pixel + 0.5) * cells / size)
        assert edges[cell] <= pixel < edges[cell + 1]


def test_pictures_show_the_masks():
    names = blobs(12, 16)
    masks = [plain(names, name) for name in range(3)]
    picture = Image.open(io.BytesIO(masks[1].png()))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "1", (16, 12))
    assert np.array_equal(np.asarray(picture), names == 1)
    colours = palette(3)
    numbered = [*enumerate(masks, start=1)]
    labels = {1: "a cup", 3: 'ein Löffel, "silbern"'}
    indexed = Image.open(io.BytesIO(indexed_png(16, 12, numbered, colours, labels)))
    assert (indexed.mode, json.loads(indexed.text["labels"])) == ("P", {"1": labels[1], "3": labels[3]})
    assert np.array_equal(np.asarray(indexed), names + 1)
    assert np.array_equal(np.asarray(indexed.convert("RGB")), np.vstack(([[0, 0, 0]], colours))[names + 1])
    over = Image.open(io.BytesIO(indexed_png(16, 12, [(1, masks[0]), (2, plain(names * 0, 0))], colours, {})))
    assert np.asarray(over).min() == 2  # the last one lies above


def test_colours_differ():
    colours = palette(255)
    assert len({*map(tuple, colours.tolist())}) == 255
    first = colours[:8].astype(int)
    apart = np.abs(first[:, None] - first).sum(axis=2)[~np.eye(8, dtype=bool)]
    assert apart.min() > 60
