"""ExCEL's bank, its enriched texts and feature surgery. Oracles: explicit loops in float64; scikit-learn's k-means."""

import math

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.cache import RowCache
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, TaskNotServed
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import Scene, ScoreMap, chosen, default
from calmclip.models.segmenters.attributes import enriched, k_means, refined, start
from calmclip.models.segmenters.excel import Params, scored, stretched, surgery
from calmclip.models.segmenters.maps import Maps
from calmclip.models.tasks.segment import SegmentRequest, segment

FRAME = Frame(40, 30, (0.1, 0.1), (0.0, 0.0))
NO_WORDS = np.empty((0, 3), np.float32)


def units(*shape: int, seed: int = 0) -> Array:
    rows = np.random.default_rng(seed).standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def enriched_by_definition(text: Array, attributes: Array) -> Array:
    answer = []
    for t in text.astype(np.float64):
        alike = [sum(a * b for a, b in zip(t, attribute, strict=True)) for attribute in attributes.astype(np.float64)]
        for index in sorted(range(len(alike)), key=lambda k: alike[k])[: int(0.1 * len(alike))]:
            alike[index] = -math.inf
        total = sum(math.exp(value) for value in alike)
        row = [
            t[d] + sum(math.exp(a) / total * float(b[d]) for a, b in zip(alike, attributes, strict=True))
            for d in range(len(t))
        ]
        length = math.sqrt(sum(value * value for value in row))
        answer.append([value / length for value in row])
    return np.array(answer)


@pytest.mark.parametrize("count", [1, 9, 10, 25])  # of 9 none is left out: the authors' code then leaves out all
def test_texts_are_enriched_by_the_definition(count: int):
    text, attributes = units(4, 8), 0.7 * units(count, 8, seed=1)
    assert enriched(text, attributes) == pytest.approx(enriched_by_definition(text, attributes), abs=1e-6)


def test_a_bank_of_one_attribute_is_added_and_an_empty_one_changes_nothing():
    text, (attribute,) = units(3, 8), units(1, 8, seed=1)
    want = np.stack([(attribute + t) / np.linalg.norm(attribute + t) for t in text])
    assert enriched(text, attribute[None]) == pytest.approx(want, abs=1e-6)
    assert enriched(text, np.empty((0, 8), np.float32)) is text


def test_the_centres_are_those_of_scikit_learn_from_the_same_start():
    rows = units(60, 8)
    sorted_rows = np.unique(rows, axis=0).astype(np.float64)
    first = start(sorted_rows, 7, np.random.default_rng(0))
    want = KMeans(7, init=first, n_init=1, algorithm="lloyd", tol=0).fit(sorted_rows).cluster_centers_
    assert refined(sorted_rows, first) == pytest.approx(want, abs=1e-9)
    assert k_means(rows[::-1], 7) == pytest.approx(want, abs=1e-6)  # in any order


def test_as_many_centres_as_different_rows_are_the_rows():
    rows = units(5, 8)
    centres = k_means(np.concatenate((rows, rows[:2])), 112)
    assert np.array_equal(np.unique(centres, axis=0), np.unique(rows, axis=0))


def test_one_centre_is_the_mean_of_the_rows():
    rows = units(9, 8)
    assert k_means(rows, 1)[0] == pytest.approx(rows.mean(axis=0), abs=1e-6)


def test_surgery_is_the_definition_and_its_mean_over_texts_is_nothing():
    patches, text, (vector,) = units(6, 8), units(3, 8, seed=1), units(1, 8, seed=2)
    x, t, v = (rows.astype(np.float64) for rows in (patches, text, vector))
    powers = [math.exp(2 * sum(a * b for a, b in zip(v, row, strict=True))) for row in t]
    shares = [power / sum(powers) for power in powers]
    weights = [share / (sum(shares) / 3) for share in shares]
    want = np.zeros((6, 3))
    for n in range(6):
        for d in range(8):
            features = [x[n, d] * t[c, d] * weights[c] for c in range(3)]
            for c in range(3):
                want[n, c] += features[c] - sum(features) / 3
    relevance = surgery(patches, text, vector)
    assert relevance == pytest.approx(want, abs=1e-6)
    assert relevance.sum(axis=1) == pytest.approx(np.zeros(6), abs=1e-6)
    planes = stretched(relevance)
    assert planes.min(axis=0) == pytest.approx([0, 0, 0])
    assert planes.max(axis=0) == pytest.approx([1, 1, 1])


def test_scores_are_the_stretched_relevance_and_the_best_word_of_the_background():
    maps = Maps(3 * units(3, 4, 8), FRAME)
    text, words, (vector,) = units(2, 8, seed=1), units(2, 8, seed=2), units(1, 8, seed=3)
    relevance = surgery(units(3, 4, 8).reshape(12, 8), np.concatenate((text, words)), vector)
    planes = (relevance - relevance.min(axis=0)) / (relevance.max(axis=0) - relevance.min(axis=0))
    scores = scored(maps, vector, text, words, Params(scale=7, bias=0.5))
    assert scores.labels == pytest.approx(7 * planes[:, :2].T.reshape(2, 3, 4), abs=1e-5)
    assert scores.background == pytest.approx(7 * planes[:, 2:].max(axis=1).reshape(3, 4) + 0.5, abs=1e-5)
    assert scores.frame == FRAME
    assert (scored(maps, vector, text, words[:0], Params()).background == -np.inf).all()
    plain = scored(maps, vector, text, words, Params(stretch=False))
    assert plain.labels == pytest.approx(100 * relevance[:, :2].T.reshape(2, 3, 4), abs=1e-4)
    assert scored(maps, vector, text, words, Params()).labels == pytest.approx(scores.labels / 7 * 10, abs=1e-5)


def test_a_picture_of_one_colour_prefers_no_label():
    maps = Maps(np.ones((3, 4, 8), np.float32), FRAME)
    scores = scored(maps, units(1, 8)[0], units(2, 8), units(0, 8), Params())
    assert (scores.labels == 0).all()


def halves(call: Call) -> Arrays:
    """Red at the left, blue at the right."""
    if call.graph == "dense":
        row = np.array([[1, 0, 0], [0, 0, 1]], np.float32)
        return {"patches": np.stack([row, row])[None]}
    return {"image_embeds": np.array([[0.8, 0, 0.6]], np.float32)}


def test_the_flow_reads_the_map_and_the_pictures_vector(mapped: Bundle):
    method, params = chosen(mapped.manifest, "excel", {"scale": 4})
    calls: list[str] = []

    def run(call: Call) -> Arrays:
        calls.append(call.graph)
        return halves(call)

    scene = Scene(Image.new("RGB", (8, 8)), ("red", "blue"), np.eye(3, dtype=np.float32)[[0, 2]], NO_WORDS)
    scores: ScoreMap = drive(method.flow(mapped, scene, params), run)
    assert calls == ["image", "dense"]
    assert scores.labels == pytest.approx(np.array([[[4, 0], [4, 0]], [[0, 4], [0, 4]]]))
    alone = Scene(scene.image, ("red",), scene.text[:1], NO_WORDS)
    with pytest.raises(BadRequest, match=r"there is one label; expected two labels, or one and background words"):
        drive(method.flow(mapped, alone, params), run)


def test_the_descriptions_of_a_classifier_make_the_bank_once(mapped: Bundle):
    """Texts of the colours' bundle are known by their words, so its own graph is not needed."""
    classifier = Classifier(("red", "blue"), descriptions={"red": ("red", "warm"), "blue": ("blue", "cold")})
    embedded: list[tuple[str, ...]] = []
    rows = {"red": (1, 0, 0), "blue": (0, 0, 1), "warm": (0.6, 0.8, 0), "cold": (0, 0.6, 0.8)}

    def run(call: Call) -> Arrays:
        if call.graph != "text":
            return halves(call)
        assert call.keys is not None
        embedded.append(call.keys)
        return {"text_embeds": np.array([rows[key] for key in call.keys], np.float32)}

    mapped.tasks = (*mapped.tasks, "segment")
    cache = RowCache(100)
    request = SegmentRequest(Image.new("RGB", (8, 8)), (), (), classifier, "excel", {"centres": 2}, background=())
    runs = []
    for _ in range(2):
        answer = drive(segment(mapped, request), run, cache=lambda asked: cache.answer("bundle", asked))
        assert {each.label: each.mask.pixels()[0].tolist() for each in answer} == {
            "red": [True] * 4 + [False] * 4,
            "blue": [False] * 4 + [True] * 4,
        }
        runs.append(len(embedded))
    assert {key for keys in embedded for key in keys} == rows.keys()
    assert runs[0] == runs[1]  # labels and bank are cached


def test_it_answers_only_if_it_is_named_and_says_what_a_bundle_lacks(mapped: Bundle):
    assert default(mapped.manifest) != "excel"
    graphs = {role: graph for role, graph in mapped.manifest.graphs.items() if role != "image"}
    with pytest.raises(TaskNotServed, match="cannot segment by 'excel': it has no graph 'image'"):
        chosen(mapped.manifest.model_copy(update={"graphs": graphs}), "excel", {})
