"""The Python API over the hand-made bundle of conftest: files, sessions and tasks together."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calmclip import Suppression, models, open_bundle
from calmclip.models.errors import BadImage, BadRequest, BundleNotFound, TaskNotServed

ASSETS = Path(__file__).parents[2] / "export" / "samples"
Png = Callable[..., bytes]


def test_a_red_picture_is_red(sealed: Path, png: Png):
    # cosines 1, 0, 0; softmax of 2, 0, 0: e^2 / (e^2 + 2) = 0.7870
    ranking = open_bundle(sealed).classify(png("red"), ["green", "red", "blue"])
    assert [(r.label, r.index) for r in ranking] == [("red", 1), ("green", 0), ("blue", 2)]
    assert [r.score for r in ranking] == pytest.approx([0.7870, 0.1065, 0.1065], abs=1e-4)
    assert [r.cosine for r in ranking] == pytest.approx([1, 0, 0], abs=1e-6)


def test_pictures_and_texts_share_a_space(sealed: Path, png: Png, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png("blue"))
    vectors = open_bundle(sealed).embed(texts=["red green"], images=[png("yellow"), tmp_path / "a.png"])
    half = 0.5**0.5  # yellow is red and green
    assert vectors == pytest.approx(np.array([[half, half, 0], [half, half, 0], [0, 0, 1]]), abs=1e-6)
    assert vectors.dtype == np.float32


def test_detect_finds_a_box_in_the_original(detector: Path, png: Png):
    """The one region is the 8 x 8 letterbox; a 32 x 16 picture fills its upper half at a quarter of its size."""
    found = open_bundle(detector).detect(png("yellow", (32, 16)), ["blue", "red"])
    (only,) = found
    # yellow above and black below: cosine of (1, 1, 0) and red
    assert (only.label, only.index, found.candidates) == ("red", 1, 1)
    assert (only.score, only.raw_score) == pytest.approx((0.5**0.5, 0.5**0.5), abs=1e-6)
    assert only.box.tolist() == [0, 0, 32, 16]
    strict = Suppression(min_score=0.9)
    assert list(open_bundle(detector).detect(png("yellow"), ["red"], suppression=strict)) == []


def test_the_example_of_the_page_runs(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (Path(models.__file__).parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(detector, tmp_path / "models" / "bundles" / "mini-int8")
    shutil.copy(ASSETS / "cat.jpg", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("a cat", "red").replace("a dog", "blue").replace("a red bicycle", "red"), {})
    ranked, *_, last = capsys.readouterr().out.splitlines()
    assert ranked.startswith("red ")  # the cat is brown
    assert last.startswith("(2, 3) {'preprocess': ")


def test_raw_runs_one_graph(sealed: Path):
    answer = open_bundle(sealed).raw("text", {"ids": np.array([[4, 4]])})
    assert answer["text_embeds"].tolist() == [[0, 0, 1]]


def test_the_clock_times_what_ran_inside(sealed: Path, png: Png):
    runner = open_bundle(sealed, threads=1)
    with runner.clock() as clock:
        runner.classify(png("red"), ["red"])
    seen = dict(clock.stages)
    assert list(seen) == ["preprocess", "decode", "infer", "postprocess"]
    runner.classify(png("red"), ["red"])
    assert clock.stages == seen


def test_what_cannot_be_answered_is_said(sealed: Path, tmp_path: Path):
    runner = open_bundle(sealed)
    with pytest.raises(TaskNotServed, match="does not serve 'detect'; it serves classify, embed, raw"):
        runner.detect(b"", ["red"])
    with pytest.raises(BadImage, match="0 bytes"):
        runner.classify(b"", ["red"])
    with pytest.raises(BadRequest, match=r"absent\.jpg' cannot be read"):
        runner.classify(tmp_path / "absent.jpg", ["red"])
    with pytest.raises(BundleNotFound, match=r"holds no bundle\.json"):
        open_bundle(tmp_path)
