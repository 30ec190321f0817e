"""Trident's windows and its affinity over the whole picture. Oracle: numpy in float64, from the definition."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.errors import TaskNotServed
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import Scene, ScoreMap, Windows, chosen, default
from calmclip.models.segmenters.maps import Maps
from calmclip.models.segmenters.trident import Params, scored

RANDOM = np.random.default_rng(0)
FRAME = Frame(50, 30, (0.1, 0.1), (0.0, 0.0))


def units(*shape: int, shared: float = 0.0) -> Array:
    rows = RANDOM.standard_normal(shape) + shared
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


MAPS = Maps(RANDOM.standard_normal((3, 5, 4)).astype(np.float32), FRAME, units(3, 5, 6, shared=0.7))
TEXT, WORDS = units(3, 4), units(2, 4)
SCENE = Scene(Image.new("RGB", (50, 30)), ("a", "b", "c"), TEXT, WORDS)


@pytest.mark.parametrize("factor", [0.0, 1.2])
def test_scores_are_the_definition(factor: float):
    keys, features = (np.asarray(rows, np.float64).reshape(15, -1) for rows in (MAPS.keys, MAPS.patches))
    cosines = keys @ keys.T
    threshold = np.minimum(factor * cosines.mean(axis=1, keepdims=True), 0.9)
    assert (threshold > 0).all() == bool(factor)
    weights = np.where(cosines > threshold, cosines, 0)
    mixed = (weights / weights.sum(axis=1, keepdims=True)) @ features
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    scores = scored(MAPS, SCENE, Params(factor=factor, bias=0.5))
    assert scores.labels == pytest.approx((40 * TEXT @ mixed.T).reshape(3, 3, 5), abs=1e-3)
    assert scores.background == pytest.approx((40 * WORDS @ mixed.T).max(axis=0).reshape(3, 5) + 0.5, abs=1e-3)


def test_alike_keys_give_every_patch_the_mean_of_the_picture():
    alike = Maps(MAPS.patches, FRAME, np.broadcast_to(np.asarray(MAPS.keys)[0, 0], (3, 5, 6)))
    mean = MAPS.patches.mean(axis=(0, 1))
    scores = scored(alike, SCENE, Params())
    wanted = 40 * TEXT @ mean / np.linalg.norm(mean)
    assert scores.labels == pytest.approx(np.broadcast_to(wanted[:, None, None], (3, 3, 5)), abs=1e-3)


def colours(call: Call) -> Arrays:
    patches = call.feeds["pixels"][:, :, ::4, ::4].transpose(0, 2, 3, 1)
    return {"patches": patches, "keys": patches}


@pytest.fixture
def keyed(mapped: Bundle) -> Bundle:
    """The bundle whose map has keys."""
    graphs = dict(mapped.manifest.graphs)
    keys = {"keys": Tensor(dtype="float32", shape=("B", 2, 2, 3))}
    graphs["dense"] = graphs["dense"].model_copy(update={"outputs": {**graphs["dense"].outputs, **keys}})
    mapped.manifest = mapped.manifest.model_copy(update={"graphs": graphs})
    return mapped


def segmented(bundle: Bundle, image: Image.Image, windows: Windows | None, calls: list[Call]) -> ScoreMap:
    def run(call: Call) -> Arrays:
        calls.append(call)
        return colours(call)

    method, params = chosen(bundle.manifest, "trident", {})
    labels = np.eye(3, dtype=np.float32)[:2]
    seen = Scene(image, ("red", "green"), labels, np.empty((0, 3), np.float32), windows)
    scores: ScoreMap = drive(method.flow(bundle, seen, params), run)
    return scores


def test_an_elongated_picture_is_seen_in_windows(keyed: Bundle):
    """Red beside blue: 4 x 2 cells in three windows, pooled over the whole picture by colour."""
    image = Image.fromarray(np.repeat(np.eye(3, dtype=np.uint8)[[0, 2]], 8, axis=0)[None].repeat(8, 0) * 255)
    calls: list[Call] = []
    scores = segmented(keyed, image, None, calls)
    assert len(calls) == 3
    assert scores.labels[0] == pytest.approx(np.array([[40, 40, 0, 0]] * 2), abs=1e-3)
    assert scores.frame == Frame(16, 8, (0.25, 0.25), (0.0, 0.0))
    segmented(keyed, image, Windows(size=0.5, stride=1.0), calls := [])
    assert len(calls) == 8


def test_a_square_picture_is_seen_once(keyed: Bundle):
    segmented(keyed, Image.new("RGB", (31, 31), "red"), None, calls := [])
    assert len(calls) == 1


def test_a_bundle_without_keys_says_what_to_do(keyed: Bundle):
    assert default(keyed.manifest) == "trident"
    dense = keyed.manifest.graphs["dense"]
    outputs: dict[str, Any] = {"patches": dense.outputs["patches"]}
    graphs = {**keyed.manifest.graphs, "dense": dense.model_copy(update={"outputs": outputs})}
    without = keyed.manifest.model_copy(update={"graphs": graphs})
    with pytest.raises(TaskNotServed, match="no output 'keys'; export the checkpoint with --dense guided"):
        chosen(without, "trident", {})
    guide = {**dense.inputs, "guide": dense.outputs["keys"]}
    graphs["dense"] = dense.model_copy(update={"inputs": guide, "outputs": outputs})
    assert chosen(without.model_copy(update={"graphs": graphs}), "trident", {})[1] == Params()
