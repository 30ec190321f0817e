import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from calmclip.models.errors import BadRequest
from calmclip.models.evals import Samples, measure, retrieval


def test_recalls_by_hand():
    # Three pictures on the axes, four captions. Similarities (caption x picture):
    #   0: (.9, .1, 0) of picture 0 -> rank 0      1: (.2, .8, 0) of picture 0 -> rank 1
    #   2: (0, .6, .8) of picture 1 -> rank 1
    #   3: (.7, .5, .5) of picture 2 -> rank 1: the tie with picture 1 does not count
    texts = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.0, 0.6, 0.8], [0.7, 0.5, 0.5]])
    samples = Samples({"pictures": 3}, {"images": np.eye(3), "texts": texts, "owner": np.array([0, 0, 1, 2])})
    statistic = retrieval.score(samples, retrieval.Params())
    figures = {figure.name: figure.value for figure in statistic(np.arange(3))}
    assert figures["text_to_image_r1"] == 25.0
    assert figures["text_to_image_r5"] == 100.0
    # picture 0: its best caption is 0 (.9), rank 0; picture 1: its caption has .6, caption 1 has .8, rank 1;
    # picture 2: its caption has .5, caption 2 has .8, rank 1
    assert figures["image_to_text_r1"] == pytest.approx(100 / 3)
    assert figures["image_to_text_r5"] == 100.0
    # picture 0 twice, 1 once: two of five captions are first, two of three pictures
    figures = {figure.name: figure.value for figure in statistic(np.array([0, 1, 0]))}
    assert figures["text_to_image_r1"] == pytest.approx(100 * 2 / 5)
    assert figures["image_to_text_r1"] == pytest.approx(100 * 2 / 3)


def test_a_prefix_ranks_by_its_own_unit_vectors():
    # Caption 0 is nearer to its picture by all numbers: -.2 beside -.5. By the first two, normalized again, picture 0
    # is (0, 1) and caption 0 is (.6, .8), as picture 1 is: .8 beside 1. Caption 1 is picture 1.
    images = np.array([[0, 0.8, 0.6], [0.3, 0.4, 0.75**0.5]], np.float32)
    texts = np.array([[0.3, 0.4, -(0.75**0.5)], [0.3, 0.4, 0.75**0.5]], np.float32)
    samples = Samples({"pictures": 2}, {"images": images, "texts": texts, "owner": np.array([0, 1])})

    def recall(**params: int) -> float:
        statistic = retrieval.score(samples, retrieval.Params(**params))
        return {figure.name: figure.value for figure in statistic(np.arange(2))}["text_to_image_r1"]

    assert (recall(), recall(dimensions=3), recall(dimensions=2)) == (100.0, 100.0, 50.0)
    with pytest.raises(BadRequest, match="dimensions is 4; the vectors have 3"):
        recall(dimensions=4)


class Fake:
    """Pictures and captions whose first letters agree have the same vector."""

    bundle = SimpleNamespace(name="fake", digest="0", require=lambda task: None, reads_vectors=False)

    def embed(self, *, texts=(), images=()):
        keys = [str(t)[0] for t in texts] + [Path(i).name[0] for i in images]
        return np.array([np.eye(26)[ord(key) - ord("a")] for key in keys], np.float32)


@pytest.mark.parametrize("file", ["captions.json", "captions.jsonl"])
def test_either_file_is_read_and_each_caption_belongs_to_its_picture(tmp_path: Path, file: str):
    captions = {"ant.jpg": ["an ant", "a small ant"], "bee.jpg": ["bees"]}
    (tmp_path / "images").mkdir()
    for name in captions:
        (tmp_path / "images" / name).touch()
    rows = [json.dumps({"image": k, "captions": v}) for k, v in captions.items()]
    (tmp_path / file).write_text("\n".join(rows) if file.endswith("l") else json.dumps(captions))
    figures = measure.named(measure.predict("retrieval", Fake(), measure.read("retrieval", tmp_path)))
    assert (figures["mean"], figures["pictures"], figures["captions"]) == (100.0, 2, 3)
    assert len(measure.read("retrieval", tmp_path, limit=1).pictures) == 1
    with pytest.raises(BadRequest, match="2 pictures, 1 with captions"):
        retrieval.DataSet(["a.jpg", "b.jpg"], [["one"], []])


def _axes(*places: int) -> np.ndarray:
    return np.eye(3)[[*places]]


def test_recalls_of_a_language_and_their_paired_difference_by_hand():
    # Three pictures on the axes. A caption on its picture's axis has rank 0. On another axis it ties with the third
    # picture, and one is before its own: rank 1, a miss at 1 and a hit at 5.
    arrays = {"images": np.eye(3), "texts": _axes(0, 0, 1, 0), "owner": np.array([0, 0, 1, 2])}
    arrays |= {"texts de": _axes(1, 1), "owner de": np.array([0, 1])}  # picture 0: a miss; picture 1: a hit; 2: none
    samples = Samples({"pictures": 3}, arrays, {"languages": ("de",)})
    statistic = retrieval.score(samples, retrieval.Params())

    def figures(*rows: int) -> dict[tuple[str, str], float]:
        return {figure.key: figure.value for figure in statistic(np.array(rows))}

    all_pictures = figures(0, 1, 2)
    assert all_pictures["", "text_to_image_r1"] == 75.0  # without German: hits of 0, 0, 1
    assert all_pictures["de", "text_to_image_r1"] == 50.0
    assert all_pictures["de", "text_to_image_r5"] == 100.0
    # picture 0: 0 of 1 minus 2 of 2; picture 1: 1 minus 1; picture 2 has no German caption
    assert all_pictures["de", "text_to_image_r1 minus en"] == -50.0
    assert figures(0, 0, 1)["de", "text_to_image_r1 minus en"] == pytest.approx(-200 / 3)
    # a picture searches the captions of one language: both German ones have cosine 0 with picture 0, a tie. The English
    # caption of picture 2, with cosine 1, is no answer
    assert all_pictures["de", "image_to_text_r1"] == 100.0
    assert np.isnan(figures(2, 2, 2)["de", "text_to_image_r1"])


def test_captions_in_the_reference_language_are_the_reference():
    arrays = {"images": np.eye(3), "texts": _axes(1, 1, 2), "owner": np.arange(3)}  # picture 0 misses
    for language in ("de", "en"):
        arrays |= {f"texts {language}": _axes(0, 1), f"owner {language}": np.array([0, 1])}
    samples = Samples({"pictures": 3}, arrays, {"languages": ("de", "en")})
    gains = {
        reference: {
            f.key: f.value for f in retrieval.score(samples, retrieval.Params(reference=reference))(np.arange(3))
        }
        for reference in ("en", "fr")
    }
    assert gains["en"]["de", "text_to_image_r1 minus en"] == 0.0  # against captions.en.json
    assert ("en", "text_to_image_r1 minus en") not in gains["en"]
    assert gains["fr"]["de", "text_to_image_r1 minus fr"] == 50.0  # no French: against captions without a language


LANGUAGES = {
    "": {"ant.jpg": ["ant", "a"], "bee.jpg": ["bee"]},
    "de": {"bee.jpg": ["biene"]},
    "zh-Hans": {"ant.jpg": ["a"]},
}


def _write_languages(folder: Path, form: str, captions: dict[str, dict[str, list[str]]]) -> None:
    (folder / "images").mkdir()
    for name in ("ant.jpg", "bee.jpg"):
        (folder / "images" / name).touch()
    if form == "jsonl":
        rows = [
            {"image": name, "captions": [text]} | ({"lang": language} if language else {})
            for language, pictures in captions.items()
            for name, texts in pictures.items()
            for text in texts
        ]
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return
    for language, pictures in captions.items():
        (folder / f"captions{language and '.'}{language}.json").write_text(json.dumps(pictures))


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_languages_are_read_from_files_or_lines(tmp_path: Path, form: str):
    _write_languages(tmp_path, form, LANGUAGES)
    data = measure.read("retrieval", tmp_path)
    assert (data.captions, dict(data.translations)) == (
        [["ant", "a"], ["bee"]], {"de": [(), ["biene"]], "zh-Hans": [["a"], ()]}
    )  # fmt: skip
    figures = measure.named(measure.predict("retrieval", Fake(), data))
    assert (figures["captions"], figures["captions in de"], figures["de text_to_image_r1"]) == (3, 1, 100.0)
    limited = measure.named(measure.predict("retrieval", Fake(), measure.read("retrieval", tmp_path, limit=1)))
    assert "de text_to_image_r1" not in limited  # the only picture has no German caption


def test_lines_that_all_have_a_language_need_the_reference(tmp_path: Path):
    _write_languages(tmp_path, "jsonl", {"de": LANGUAGES[""], "fr": LANGUAGES["de"]})
    with pytest.raises(BadRequest, match="captions in de, fr; expected some in en, or without"):
        measure.read("retrieval", tmp_path)
    data = measure.read("retrieval", tmp_path, {"reference": "de"})
    assert (data.captions, [*data.translations]) == ([["ant", "a"], ["bee"]], ["fr"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.german.json", '{"ant.jpg": ["a"]}', "'german' is no BCP 47 tag"),
        ("captions.de.json", '{"cow.jpg": ["a"]}', "has 'cow.jpg', which captions.json has not"),
        ("captions.jsonl", '{"image": "a", "captions": ["x"], "lang": 7}', "line 1 cannot be read"),
        ("captions.jsonl", '{"image": "a", "captions": ["x"], "lang": "a tag"}', "lang is 'a tag', no BCP 47 tag"),
        ("captions.jsonl", '{"image": "a", "captions": []}', "'a' has no list of captions"),
    ],
)
def test_wrong_languages_are_named(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / "captions.json").write_text(json.dumps(LANGUAGES[""]))
    (tmp_path / name).write_text(content)
    with pytest.raises(BadRequest, match=message):
        measure.read("retrieval", tmp_path)
