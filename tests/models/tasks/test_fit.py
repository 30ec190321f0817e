"""The fit of a head from pictures: what it asks of them, crops, validation, and the report."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, ExtraMissing
from calmclip.models.heads import linear_probe
from calmclip.models.preprocess.image import load
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks import fit as module
from calmclip.models.tasks.fit import FitRequest, fit, fit_vectors, prepare

Png = Callable[..., bytes]
SEA_FIRE = Classifier(("sea", "fire"))
COLOURS = ["blue", "navy", "red", "maroon"]  # the labels' own words are not in the texts' vocabulary
TRUTH = [0, 0, 1, 1]


@pytest.fixture
def runner(sealed: Path) -> Runner:
    return open_bundle(sealed)


def test_a_fit_reports_what_it_did(runner: Runner, png: Png):
    request = FitRequest([png(colour) for colour in COLOURS], TRUTH, SEA_FIRE, "gda", {"alpha": 2.0})
    fitted = runner.run(fit(runner.bundle, request))
    report = fitted.report
    assert (report.method, report.pictures, report.labels) == ("gda", 4, 2)
    assert (report.measured, report.after) == ("2-fold cross-validation", 1.0)
    assert report.params == fitted.classifier.params == {"scale": 2.0, "alpha": 2.0, "shrinkage": 1.0}
    assert 0 < report.seconds < 60
    assert (fitted.classifier.family, fitted.classifier.head) == (runner.bundle.family, "gda")
    assert runner.classify(png("navy"), classifier=fitted.classifier).labels[0].label == "sea"


def test_vectors_pictures_and_the_runner_fit_the_same(runner: Runner, png: Png, monkeypatch: pytest.MonkeyPatch):
    pictures = [png(colour) for colour in COLOURS]
    words, captions = ["red", "green", "blue"], ["blue", "blue", "red", "red"]
    image, spoken = runner.embed(images=pictures), runner.embed(texts=captions)
    validation = [png("blue")], [0]
    by_vectors = runner.run(
        fit_vectors(
            runner.bundle, SEA_FIRE, "caps", {}, image, TRUTH, spoken, (runner.embed(images=validation[0]), [0])
        )
    )
    by_pictures = runner.run(
        fit(runner.bundle, FitRequest(pictures, TRUTH, SEA_FIRE, "caps", {}, captions, validation))
    )
    names = [SEA_FIRE.labels[i] for i in TRUTH]
    classifier, report = runner.fit(
        pictures, names, "caps", labels=["sea", "fire"], captions=captions, validation=([png("blue")], ["sea"])
    )
    for other in (by_pictures.classifier, classifier):
        assert other.params == by_vectors.classifier.params
        for key, array in by_vectors.classifier.assets.items():
            assert other.assets[key] == pytest.approx(array, abs=1e-6)
    assert (report.measured, report.after) == ("validation", 1.0)
    keys = 0.75 * image + 0.25 * spoken
    mixed, _ = runner.fit(pictures, names, "caps", captions=captions, delta=0.25)
    assert mixed.assets["keys"] == pytest.approx(keys, abs=1e-6)
    _, report = runner.fit(pictures, names, "direction", words=words)
    assert report.notes == ("words nearest to 'sea': blue, green, red", "words nearest to 'fire': red, green, blue")
    monkeypatch.setattr(module, "vocabulary", lambda: ("green", "blue"))
    _, report = runner.fit(pictures, names, "direction")
    assert report.notes == ("words nearest to 'sea': blue, green", "words nearest to 'fire': green, blue")


def test_unlabelled_pictures_need_no_labelled_one(runner: Runner, png: Png):
    unlabelled = [png(colour) for colour in ("red", "maroon", "blue", "navy", "crimson")]
    classifier, report = runner.fit([], [], "gda", labels=["red", "blue"], unlabelled=unlabelled)
    assert (report.pictures, report.before, report.after) == (0, None, None)
    assert report.measured == "nothing: no label has two pictures"
    assert report.notes == ("5 pictures without a label were used, by expectation maximization",)
    assert runner.classify(png("crimson"), classifier=classifier).labels[0].label == "red"


def test_crops_are_parts_of_their_picture(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """A picture whose pixel at x, y has the colour x, y: a crop shows where it is from."""
    side = np.arange(100, dtype=np.uint8)
    pixels = np.stack([np.tile(side, (80, 1)), np.tile(side[:80, None], (1, 100)), np.zeros((80, 100), np.uint8)], 2)
    crops: list[np.ndarray] = []
    plain = module._crop

    def spy(image: Image.Image, draw: np.random.Generator) -> Image.Image:
        crops.append(np.asarray(plain(image, draw)))
        return Image.fromarray(crops[-1])

    monkeypatch.setattr(module, "_crop", spy)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    pictures = [file.getvalue(), pixels[:, ::-1].copy()]
    runner.fit(pictures, ["sea", "fire"], "prototype", augment=20)
    assert len(crops) == 40
    flipped = 0
    for crop in crops[:20]:
        height, width = crop.shape[:2]
        assert 0.5 <= width * height / 8000 <= 1.0 or abs(width * height / 8000 - 0.5) < 0.02  # whole pixels
        assert width / height == pytest.approx(1.25, rel=0.03)
        left, top = crop[:, :, 0].min(), crop[:, :, 1].min()
        part = pixels[top : top + height, left : left + width]
        mirrored = crop[0, 0, 0] > crop[0, -1, 0]
        flipped += mirrored
        assert (crop == (part[:, ::-1] if mirrored else part)).all()
    assert 3 <= flipped <= 17
    again, first = crops.copy(), crops[:20]
    crops.clear()
    runner.fit(pictures, ["sea", "fire"], "prototype", augment=20)
    assert all((a == b).all() for a, b in zip(again, crops, strict=True))  # the same crops in each fit
    assert not all(a.shape == b.shape for a, b in zip(first, crops[20:], strict=True))  # others for each picture
    assert load(file.getvalue()).size == (100, 80)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"captions": ["a"] * 4}, "the head 'gda' reads no captions; those that do: caps"),
        ({"words": ["a"]}, "the head 'gda' reads no words; those that do: direction"),
        ({"head": "tip", "unlabelled": [b""]}, "the head 'tip' reads no unlabelled; those that do: gda"),
        ({"head": "caps", "captions": ["a"]}, "1 captions were given for 4 pictures; expected one for each, or none"),
        ({"head": "direction", "classifier": Classifier(("a", "b", "c"))}, "'direction' takes 2 labels; 3 were given"),
        ({"head": "tip", "classifier": Classifier(("a", "b", "c"))}, "the label 'c' has no picture; expected at least"),
        ({"augment": 51}, "augment is 51; expected 0 to 50 crops"),
        ({"augment": -1}, "augment is -1; expected"),
        ({"truth": [0, 1]}, "4 pictures have 2 labels"),
        ({"validation": ([], [])}, "the validation has no picture; send some, or leave it out"),
        ({"params": {"alpha": -1}}, "head 'gda': params {'alpha': -1}: alpha: "),
        ({"classifier": Classifier(("a",))}, "there are 1 labels and 4 pictures"),
        ({"images": [], "truth": []}, "there are 2 labels and 0 pictures"),
    ],
)
def test_what_a_fit_cannot_use_is_refused(bundle: Bundle, change: dict[str, Any], says: str):
    asked = {"images": [b""] * 4, "truth": TRUTH, "classifier": SEA_FIRE, "head": "gda"} | change
    with pytest.raises(BadRequest, match=says):
        prepare(bundle, FitRequest(**asked))


def test_a_fit_without_its_package_is_refused_before_a_picture(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_probe, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match="scikit-learn"):
        prepare(bundle, FitRequest([b""] * 4, TRUTH, SEA_FIRE, "linear_probe"))


def test_a_head_that_was_not_fitted_cannot_score(runner: Runner, png: Png):
    rows = np.eye(2, 3, dtype=np.float32)
    bare = Classifier(("a", "b"), head="gda", assets={"weight": rows, "bias": rows[0, :2]}, params={"alpha": 1.0})
    with pytest.raises(BadRequest, match="head 'gda': scale is null, which only a fit replaces; send a number, or fit"):
        runner.classify(png("red"), classifier=bare)
