"""CLIP-DINOiser's pooling and background rule. Oracle: torch in float64, from the definition."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.errors import BadRequest, TaskNotServed
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import Scene, ScoreMap, Windows, chosen, default
from calmclip.models.segmenters.dinoiser import Params, ruled, scored
from calmclip.models.segmenters.maps import Maps

RANDOM = np.random.default_rng(0)
NONE = np.empty((0, 4), np.float32)
FRAME = Frame(50, 30, (0.1, 0.1), (0.0, 0.0))


def units(*shape: int) -> Array:
    rows = RANDOM.standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


KEYS = units(3, 5, 6)
MAPS = Maps(RANDOM.standard_normal((3, 5, 4)).astype(np.float32), FRAME, KEYS, RANDOM.random((3, 5)).astype(np.float32))
TEXT, WORDS = units(3, 4), units(2, 4)


def scene(background: Array = NONE) -> Scene:
    return Scene(Image.new("RGB", (50, 30)), ("a", "b", "c"), TEXT, background)


def definition(maps: Maps, gamma: float, scale: float) -> tuple[Tensor, Tensor]:
    """-> probabilities of classes [C, h, w] before the background's rule, and the classes' similarities."""
    features = torch.from_numpy(maps.patches).double().permute(2, 0, 1)  # [D, h, w]
    keys = torch.from_numpy(np.asarray(maps.keys)).double().permute(2, 0, 1).flatten(1)
    affinity = keys.T @ keys
    affinity[affinity < gamma] = 0
    pooled = torch.einsum("nj,cj->cn", affinity, features.flatten(1)) / (affinity.sum(1) + 1e-6)
    similar = F.conv2d(F.normalize(pooled, dim=0)[None, :, :, None], torch.from_numpy(TEXT).double()[:, :, None, None])
    return (scale * similar).softmax(1)[0, :, :, 0].reshape(3, 3, 5), similar[0, :, :, 0].reshape(3, 3, 5)


def test_scores_are_the_definition():
    _, similar = definition(MAPS, 0.2, 100)
    scores = scored(MAPS, scene(), Params(delta=0))
    assert scores.labels == pytest.approx(100 * similar.numpy(), abs=1e-3)
    assert scores.background.max() == -np.inf
    assert scores.frame is FRAME


def test_the_background_wins_where_the_rule_says_so():
    """Without background words the classes' probabilities decide alone; at this scale some are unsure."""
    probabilities, _ = definition(MAPS, 0.2, 5)
    nothing = (probabilities.amax(0) < 0.99).numpy() & (np.asarray(MAPS.objectness) <= 0.5)
    assert 0 < nothing.sum() < nothing.size
    scores = scored(MAPS, scene(), Params(scale=5))
    planes = torch.from_numpy(np.concatenate((scores.labels, scores.background[None]))).softmax(0).numpy()
    assert ((planes.argmax(0) == 3) == nothing).all()
    assert planes[3][nothing].min() > 0.999
    assert planes[3][~nothing].max() < 0.001
    assert planes[:3].argmax(0)[~nothing].tolist() == probabilities.argmax(0).numpy()[~nothing].tolist()


def test_background_words_stay_where_the_rule_is_silent():
    plain = scored(MAPS, scene(WORDS), Params(delta=0, scale=5)).background
    scores = scored(MAPS, scene(WORDS), Params(scale=5))
    changed = scores.background != plain
    best = scores.labels.max(axis=0)
    assert (scores.background >= plain).all()
    assert scores.background[changed] == pytest.approx((best + 10)[changed])
    assert np.asarray(MAPS.objectness)[changed].max() <= 0.5


def test_the_rule_by_hand():
    labels = np.array([[[9.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]], np.float32)
    nowhere = np.full((1, 4), -np.inf, np.float32)
    objectness = np.array([[0.1, 0.1, 0.5, 0.6]], np.float32)
    assert ruled(labels, nowhere, objectness, 0.99).tolist() == [[-1, 10, 10, -10]]  # sure; unsure; at 0.5; a thing


def answers(call: Call) -> Arrays:
    """A map of 2 x 2 cells: colours at their corners, which are their keys too."""
    patches = call.feeds["pixels"][:, :, ::4, ::4].transpose(0, 2, 3, 1)
    return {"patches": patches, "keys": patches, "objectness": np.ones((1, 2, 2), np.float32)}


@pytest.fixture
def keyed(mapped: Bundle) -> Bundle:
    """The bundle whose map has keys and objectness."""
    graphs = dict(mapped.manifest.graphs)
    more = {"keys": Spec(dtype="float32", shape=("B", 2, 2, 3)), "objectness": Spec(dtype="float32", shape=("B", 2, 2))}
    graphs["dense"] = graphs["dense"].model_copy(update={"outputs": {**graphs["dense"].outputs, **more}})
    mapped.manifest = mapped.manifest.model_copy(update={"graphs": graphs})
    return mapped


@pytest.mark.parametrize(("windows", "half"), [(None, 4), (Windows(size=1.0, stride=0.5), 8)])
def test_a_picture_is_read_by_its_colours(keyed: Bundle, windows: Windows | None, half: int):
    """Red beside blue: patches of one colour are pooled with each other alone."""
    image = Image.fromarray(np.repeat(np.eye(3, dtype=np.uint8)[[0, 2]], half, axis=0)[None].repeat(8, 0) * 255)
    seen = Scene(image, ("red", "green"), np.eye(3, dtype=np.float32)[:2], NONE[:, :3], windows)
    method, params = chosen(keyed.manifest, "dinoiser", {"delta": 0})
    scores: ScoreMap = drive(method.flow(keyed, seen, params), answers)
    columns = np.repeat([100.0, 0.0], half // 4)
    assert scores.labels[0] == pytest.approx(np.stack((columns, columns)), abs=1e-3)
    assert scores.labels[1].max() == pytest.approx(0)


def test_a_bundle_without_keys_says_what_to_do(mapped: Bundle, keyed: Bundle):
    assert default(keyed.manifest) == "dinoiser"
    without: Manifest = keyed.manifest.model_copy(
        update={"graphs": {**keyed.manifest.graphs, "dense": mapped.manifest.graphs["dense"]}}
    )
    outputs: dict[str, Any] = {"patches": without.graphs["dense"].outputs["patches"]}
    dense = without.graphs["dense"].model_copy(update={"outputs": outputs})
    without = without.model_copy(update={"graphs": {**without.graphs, "dense": dense}})
    with pytest.raises(TaskNotServed, match=r"no outputs 'keys' and 'objectness'; export .* --dinoiser FILE"):
        chosen(without, "dinoiser", {})
    with pytest.raises(BadRequest, match=r"'dinoiser': .*gamma"):
        chosen(keyed.manifest, "dinoiser", {"gamma": 1.5})
