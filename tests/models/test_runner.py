"""The Python API over the hand-made bundle of conftest: files, sessions and tasks together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models import open_bundle
from models.errors import BadImage, BadRequest, BundleNotFound, TaskNotServed

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
