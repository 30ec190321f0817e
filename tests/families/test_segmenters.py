"""The contract of every registered segmenter, over invented outputs of the graphs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph, Manifest, Quantization, Source
from calmclip.models.bundle.store import Sealed
from calmclip.models.flow import Array, Arrays, drive
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import SEGMENTERS, Scene, ScoreMap, default, fitting
from calmclip.models.segmenters.maps import in_cells

DIM, CELLS, PIXELS, PROPOSALS = 12, 6, 24, 5
LABELS = tuple("abcd")


def units(seed: int, *shape: int) -> Array:
    rows = np.random.default_rng(seed).standard_normal((*shape, DIM))
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).random(shape, np.float32)


# graph -> its outputs for one picture: all that a method may read
BOXES = np.sort(random(0, 1, PROPOSALS, 2, 2) * PIXELS, axis=2).reshape(1, PROPOSALS, 4)
ANSWERS: dict[str, Arrays] = {
    "image": {"image_embeds": units(10, 1)},
    "dense": {
        "patches": units(1, 1, CELLS, CELLS),
        "keys": units(2, 1, CELLS, CELLS),
        "objectness": random(3, 1, CELLS, CELLS),
    },
    "regions": {
        "class_embeds": units(4, 1, PROPOSALS),
        "boxes": BOXES,
        "objectness": random(5, 1, PROPOSALS),
        "mask_features": random(6, 1, 32, 3, 3),
    },
    "masks": {"mask_logits": random(7, 1, PROPOSALS, 16, 16) - 0.5},
}


def _graph(role: str, inputs: dict[str, Any], picture: bool) -> Graph:
    how = {"kind": "image", "size": [PIXELS, PIXELS], "resize": "letterbox", "mean": [0.0] * 3, "std": [1.0] * 3}
    outputs = {name: {"dtype": "float32", "shape": array.shape} for name, array in ANSWERS[role].items()}
    inputs = {name: {"dtype": "float32", "shape": shape} for name, shape in inputs.items()}
    return Graph(file=f"{role}.onnx", inputs=inputs, outputs=outputs, preprocess=how if picture else None)


PICTURE = {"pixels": ("B", 3, PIXELS, PIXELS)}
TEXT = Graph(
    file="text.onnx",
    inputs={"ids": {"dtype": "int64", "shape": ("B", "T")}},
    outputs={"text_embeds": {"dtype": "float32", "shape": ("B", DIM)}},
    preprocess={"kind": "text", "context": 8},
)
MANIFEST = Manifest(
    name="invented",
    precision="float",
    tasks=("segment",),
    source=Source(net="by_hand", model="invented", license="CC0-1.0"),
    graphs={
        "text": TEXT,
        "image": _graph("image", PICTURE, True),
        "dense": _graph("dense", PICTURE, True),
        "regions": _graph("regions", PICTURE, True),
        "masks": _graph("masks", {"mask_features": (1, 32, "H", "W"), "boxes": (1, "N", 4)}, False),
    },
    quantization=Quantization(name="none"),
    created="2026-01-01T00:00:00+00:00",
)
SCENE = Scene(Image.new("RGB", (48, 30), "teal"), LABELS, units(8, len(LABELS)), units(9, 3))


@pytest.fixture(params=fitting(MANIFEST))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(name: str, scene: Scene = SCENE) -> ScoreMap:
    """By the default params."""
    bundle, method = Bundle(Sealed(Path(), MANIFEST, "0" * 64)), SEGMENTERS.get(name)
    return drive(method.flow(bundle, scene, method.params()), lambda call: ANSWERS[call.graph])


def test_shapes_and_dtypes_hold_and_there_is_no_nan(name: str):
    scores = run(name)
    rows, columns = scores.background.shape
    assert scores.labels.shape == (len(LABELS), rows, columns)
    assert scores.labels.dtype == scores.background.dtype == np.float32
    for logits in (scores.labels, scores.background):
        assert not np.isnan(logits).any()
        assert (logits < np.inf).all()


def test_the_picture_lies_in_the_map(name: str):
    scores = run(name)
    assert (scores.frame.width, scores.frame.height) == (48, 30)
    rows, columns = scores.background.shape
    (corners,) = scores.frame.to_input(np.array([[0, 0, 48, 30]], np.float32))
    assert corners[:2].min() >= 0
    assert corners[2] <= columns + 1e-4
    assert corners[3] <= rows + 1e-4


def test_the_order_of_the_labels_is_that_of_the_planes(name: str):
    order = [2, 0, 3, 1]
    turned = replace(SCENE, labels=tuple(LABELS[i] for i in order), text=SCENE.text[order])
    plain, other = run(name), run(name, turned)
    assert other.labels == pytest.approx(plain.labels[order], abs=1e-4)
    assert other.background == pytest.approx(plain.background, abs=1e-4)


def test_the_background_may_have_no_words(name: str):
    scores = run(name, replace(SCENE, background=np.empty((0, DIM), np.float32)))
    assert not np.isnan(scores.background).any()


@pytest.mark.parametrize("each", SEGMENTERS.names())
def test_it_says_what_a_bundle_lacks(each: str):
    bare = MANIFEST.model_copy(update={"graphs": {"text": TEXT}})
    assert SEGMENTERS.get(each).why_not(bare)
    assert SEGMENTERS.get(each).summary


def test_the_plain_method_fits_and_a_bundle_without_a_choice_has_the_highest_rank():
    assert "maskclip" in fitting(MANIFEST)
    name = default(MANIFEST)
    assert name
    assert SEGMENTERS.get(name).rank == max(SEGMENTERS.get(each).rank for each in fitting(MANIFEST)) >= 0
    assert default(MANIFEST.model_copy(update={"graphs": {"text": TEXT}})) is None


# --- single methods --------------------------------------------------------------------------------------------------


def test_maskclip_is_the_scaled_cosine_and_the_best_word():
    """In float64; the frame: 48 x 30 pixels fill 24 x 15 of 24 x 24, so 6 x 3.75 of 6 x 6 cells."""
    scores = run("maskclip", SCENE)
    patches = ANSWERS["dense"]["patches"][0].astype(np.float64)
    patches /= np.linalg.norm(patches, axis=-1, keepdims=True)
    assert scores.labels == pytest.approx(100 * np.einsum("yxd,cd->cyx", patches, SCENE.text), abs=1e-4)
    words = 100 * np.einsum("yxd,cd->cyx", patches, SCENE.background)
    assert scores.background == pytest.approx(words.max(axis=0), abs=1e-4)
    assert scores.frame.scale == pytest.approx((6 / 48, 3.75 / 30))
    assert np.isneginf(run("maskclip", replace(SCENE, background=np.empty((0, DIM), np.float32))).background).all()


def test_a_cell_is_a_part_of_the_graphs_input():
    """Of 40 x 80 pixels, 10 x 8 cells of 4 x 10; the pixel (30, 20) of the picture is (50, 44) there: cell (5, 11)."""
    frame = in_cells(Frame(100, 50, (2.0, 2.0), (-10.0, 4.0)), (40, 80), (10, 8))
    assert frame.to_input(np.array([[30, 20, 100, 50]], np.float32))[0] == pytest.approx([5, 11, 19, 26])
