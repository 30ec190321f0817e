"""tag over invented vectors: beside a brute force in float64, and by hand; a captioner of three tokens."""

from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from calmclip.models import vocabulary
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import read, seal, stage
from calmclip.models.errors import BadRequest, BundleInvalid
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.runner import Runner
from calmclip.models.tasks.tag import Tag, TagRequest, Tags, filled, soft_nms, tag

Png = Callable[..., bytes]
CAPTION = """<ir_version: 9, opset_import: ["" : 18]>
caption (float[1, K, 3] word_embeds, float[1, 3] image_embeds) => (int64[1, T] ids) {
    first = Constant <value_ints = [0]> ()
    nearest = ArgMax <axis = 2, keepdims = 0> (word_embeds)
    tokens = Shape (word_embeds)
    two = Constant <value_ints = [2]> ()
    ids = Add (nearest, two)
}"""  # the axis of each tag -> the token of its colour


def run(
    bundle: Bundle, row: Array, words: dict[str, Array], seen: tuple[Array, Array] | None = None, **asked: Any
) -> Tags:
    """``words`` and the picture's ``row``: unit vectors; ``seen``: regions' vectors, and boxes of a 16 x 16 picture."""

    def answer(call: Call) -> Arrays:
        if call.graph == "text":
            assert call.keys is not None
            return {"text_embeds": np.stack([words[key] for key in call.keys])}
        if call.graph == "image":
            return {"image_embeds": row[None]}
        assert seen is not None
        vectors, boxes = seen
        objectness = np.linspace(1, 0.5, len(boxes), dtype=np.float32)
        return {"class_embeds": vectors[None], "boxes": boxes[None] / 2, "objectness": objectness[None]}

    picture = np.zeros((16, 16, 3), np.uint8)
    return drive(tag(bundle, TagRequest(picture, list(words), **asked)), answer)


def units(seed: int, count: int) -> Array:
    rows = np.random.default_rng(seed).standard_normal((count, 3))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute_force(words: Array, rows: Array, boxes: Array, each: int, top: int) -> list[tuple[int, int, float]]:
    """(word, row, score) by definition, in float64; of each row the best ``each`` words compete."""
    wide = words.astype(np.float64)
    centred = wide - wide.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    pairs = {(w, r): float(rows[r].astype(np.float64) @ wide[w]) for r in range(len(rows)) for w in range(len(words))}
    for row in range(len(rows)):
        for word in sorted(range(len(words)), key=lambda w: -pairs[w, row])[each:]:
            del pairs[word, row]
    pairs = {pair: score for pair, score in pairs.items() if score > 0}
    kept = []
    while pairs and len(kept) < top:
        best = max(pairs, key=lambda pair: pairs[pair])
        kept.append((*best, pairs.pop(best)))
        for word, row in pairs:
            if word == best[0] or centred[word] @ centred[best[0]] >= 0.7:
                (a, b), (c, d) = boxes[row].reshape(2, 2), boxes[best[1]].reshape(2, 2)
                sides = np.clip(np.minimum(b, d) - np.maximum(a, c), 0, None)
                shared = sides.prod() / min((b - a).prod(), (d - c).prod())
                pairs[word, row] *= exp(-(shared**2) / 0.25)
    return kept


def test_tags_are_those_of_a_brute_force_in_float64(finder: Bundle):
    names = [f"word{i}" for i in range(12)]
    words, row, vectors = units(0, 12), units(1, 1)[0], units(2, 4)
    boxes = np.array([[0, 0, 8, 8], [2, 2, 10, 10], [0, 0, 16, 16], [9, 9, 16, 12]], np.float32)
    answer = run(finder, row, dict(zip(names, words, strict=True)), (vectors, boxes), top=9)
    whole = brute_force(words, row[None], np.array([[0, 0, 1, 1]]), 12, 9)
    parts = brute_force(words, vectors, boxes, 2, 9)
    assert len(parts) >= 6
    for tags, want in ((answer.picture, whole), (answer.regions, parts)):
        assert [(t.word, t.index) for t in tags] == [(names[word], word) for word, _, _ in want]
        assert [t.score for t in tags] == pytest.approx([score for _, _, score in want], abs=1e-6)
    assert [t.box for t in answer.picture] == [None] * len(whole)
    assert [t.box.tolist() for t in answer.regions if t.box is not None] == [boxes[row].tolist() for _, row, _ in parts]


def test_one_word_over_overlapping_boxes_and_synonyms_over_one_box_lose(finder: Bundle):
    near = np.array([0.96, 0.28, 0], np.float32)
    words = {"red": np.eye(3, dtype=np.float32)[0], "rose": near, "blue": np.eye(3, dtype=np.float32)[2]}
    words |= {"green": np.array([-0.6, 0, -0.8], np.float32)}
    row = np.array([0.8, 0, 0.6], np.float32)  # its cosine with green is below 0
    answer = run(finder, row, words, (np.stack([row, row]), np.array([[0, 0, 16, 8], [0, 6, 16, 16]], np.float32)))
    centred = np.stack([*words.values()]) - np.mean([*words.values()], axis=0)
    cosine = centred[0] @ centred[1] / np.linalg.norm(centred[0]) / np.linalg.norm(centred[1])
    assert cosine > 0.7 > centred[0] @ centred[2] / np.linalg.norm(centred[0]) / np.linalg.norm(centred[2])
    # before soft-NMS red has .8, rose .768, blue .6
    assert [(t.word, t.score) for t in answer.picture] == [
        ("red", pytest.approx(0.8)), ("blue", pytest.approx(0.6)), ("rose", pytest.approx(0.768 * exp(-4))),
    ]  # fmt: skip
    # the boxes share a quarter of the first, which is the smaller and wins the tie
    halves = [t.score for t in answer.regions if t.word == "red"]
    assert halves == pytest.approx([0.8, 0.8 * exp(-0.25)])
    assert [t.cosine for t in answer.regions if t.word == "red"] == pytest.approx([0.8, 0.8])


def test_words_that_are_all_near_to_each_other_are_no_synonyms(finder: Bundle):
    rows = np.ones((3, 3)) + 0.2 * np.eye(3)  # cosines of .99; less their mean, of -.5
    words = dict(zip(("red", "green", "blue"), (rows / np.linalg.norm(rows[0])).astype(np.float32), strict=True))
    answer = run(finder, np.array([0.6, 0, 0.8], np.float32), words, regions=False)
    assert [t.word for t in answer.picture] == ["blue", "red", "green"]
    assert [t.score for t in answer.picture] == [t.cosine for t in answer.picture]


def test_the_caption_is_a_template_unless_the_bundle_has_a_captioner(finder: Bundle):
    words = dict(zip(("red", "green", "blue"), np.eye(3, dtype=np.float32), strict=True))
    answer = run(finder, np.array([0.6, 0, 0.8], np.float32), words, regions=False)
    assert (answer.caption, answer.captioned_by, answer.regions) == ("a photo of blue and red", "template", ())
    rows = np.array([[0, 1, 0], [0, 0.6, 0.8]], np.float32)  # green, blue and green
    seen = run(finder, np.array([0.6, 0, 0.8], np.float32), words, (rows, np.array([[0, 0, 8, 8]] * 2, np.float32)))
    assert seen.caption == "a photo of blue, green and red"
    assert [filled(w) for w in ([], ["a"], ["a", "b", "c"])] == ["a photo", "a photo of a", "a photo of a, b and c"]


def captioner(colours: dict[str, Any], write: Callable[[Path], Manifest], folder: Path, **changed: Any) -> Bundle:
    inputs = {"word_embeds": {"dtype": "float32", "shape": [1, "K", 3]}}
    inputs["image_embeds"] = {"dtype": "float32", "shape": [1, 3]}
    graph = {"file": "caption.onnx", "batch": False, "inputs": inputs}
    graph["outputs"] = {"ids": {"dtype": "int64", "shape": [1, "T"]}}
    colours["graphs"]["caption"] = graph | changed
    with stage(folder / "captioners", "colours") as staged:
        (staged / "caption.onnx").write_bytes(parser.parse_model(CAPTION).SerializeToString())
        return Bundle(read(seal(staged, write(staged)).directory))


def test_a_captioner_reads_the_tags_and_writes_tokens(colours: Any, write: Any, tmp_path: Path, png: Png):
    bundle = captioner(colours, write, tmp_path)
    answer = Runner(bundle).tag(png((255, 0, 128)), ["blue", "red", "green"])
    assert [t.word for t in answer.picture] == ["red", "blue"]
    assert (answer.caption, answer.captioned_by) == ("red blue", "graph")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"inputs": {"pixels": {"dtype": "float32", "shape": [1, 3]}}}, "'pixels'; a captioner may read"),
        ({"outputs": {"text": {"dtype": "int64", "shape": [1, "T"]}}}, "expected 'ids' alone, int64"),
        ({"outputs": {"ids": {"dtype": "float32", "shape": [1, "T"]}}}, "expected 'ids' alone, int64"),
    ],
)
def test_a_captioner_of_another_form_is_refused(colours: Any, write: Any, tmp_path: Path, changed: Any, says: str):
    with pytest.raises(BundleInvalid, match=says):
        captioner(colours, write, tmp_path, **changed)


def test_without_words_the_vocabulary_is_used_and_its_vectors_are_kept(bundle: Bundle, png: Png):
    runner = Runner(bundle)
    first = runner.tag(png("red"), top=1)
    assert "red" in first.picture[0].word.split("-")  # the only colour that the tokenizer knows
    assert vocabulary.words()[first.picture[0].index] == first.picture[0].word
    called: list[str] = []
    session = runner.session
    runner.session = lambda role: called.append(role) or session(role)  # type: ignore[func-returns-value,method-assign]
    assert runner.tag(png("red"), top=1) == first
    assert called == ["image"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"top": 0}, "top is 0; expected 1 to 100"),
        ({"top": 101}, "top is 101"),
        ({"words": ["red", "red"]}, "'red' is given twice"),
        ({"words": ["red", " "]}, "label 1 is empty"),
        ({"words": "red"}, "words is the text 'red'; expected a list"),
        ({"templates": ["a photo"]}, "has no '{}'"),
    ],
)
def test_wrong_requests_say_what_is_expected(bundle: Bundle, png: Png, asked: dict[str, Any], says: str):
    with pytest.raises(BadRequest, match=says):
        Runner(bundle).ask("tag", TagRequest(png("red"), **asked))


def test_soft_nms_by_hand():
    overlap = np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    kept: Sequence[tuple[int, float]] = soft_nms(np.array([0.9, 0.8, 0.6]), overlap, 3)
    assert kept == [(0, 0.9), (2, 0.6), (1, pytest.approx(0.8 * exp(-1)))]
    assert [i for i, _ in soft_nms(np.array([0.5, 0.5]), np.eye(2), 2)] == [0, 1]
    assert soft_nms(np.zeros(0), np.zeros((0, 0)), 5) == []


def test_a_picture_without_regions_has_none(finder: Bundle):
    words = {"red": np.eye(3, dtype=np.float32)[0]}
    nothing = (np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32))
    answer = run(finder, np.array([1, 0, 0], np.float32), words, nothing)
    assert answer.regions == ()
    assert answer.picture == (Tag("red", 0, 1.0, 1.0),)
