"""Prefixes of vectors, by numpy."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.embedding import embedding_digest
from calmclip.models.bundle.store import Sealed, read
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.runner import Runner
from calmclip.models.tasks.embed import Boxed, EmbedRequest, embed
from calmclip.models.tasks.features import prefix

Png = Callable[..., bytes]


@pytest.fixture
def short(sealed: Path) -> Bundle:
    """The bundle of colours, whose manifest says that the first 2 of 3 numbers hold."""
    whole = read(sealed)
    return Bundle(Sealed(whole.directory, whole.manifest.model_copy(update={"dimensions": (2,)}), whole.digest))


def normalized(rows: Any) -> Any:
    numbers = np.array(rows, np.float64)
    return numbers / np.linalg.norm(numbers, axis=1, keepdims=True)


def test_a_prefix_is_a_unit_vector_of_the_first_numbers():
    rows = normalized(np.random.default_rng(0).normal(size=(40, 24))).astype(np.float32)
    for length in (1, 5, 23):
        short = prefix(rows, length)
        assert short.dtype == np.float32
        np.testing.assert_allclose(short, normalized(rows[:, :length]), atol=1e-6)
    assert prefix(rows, 24) is rows  # bit for bit: it is not normalized again
    assert prefix(rows, None) is rows


def test_every_input_of_a_runner_is_shortened(short: Bundle, png: Png):
    runner = Runner(short)
    whole = runner.embed(texts=["red green", "green"], images=[png((200, 100, 50))])
    answer = runner.embed(texts=["red green", "green"], images=[png((200, 100, 50))], dimensions=2)
    assert answer.shape == (3, 2)
    np.testing.assert_allclose(answer, normalized(whole[:, :2]), atol=1e-6)
    (row,) = runner.embed_many([png((200, 100, 50))], dimensions=2)
    np.testing.assert_array_equal(row, answer[2])
    np.testing.assert_array_equal(runner.embed(texts=["red"], dimensions=3), runner.embed(texts=["red"]))


def test_boxes_are_shortened(mapped: Bundle, png: Png):
    mapped.manifest = mapped.manifest.model_copy(update={"dimensions": (2,)})
    picture = png((200, 100, 50))
    patches = np.tile(normalized([[3, 4, 12]]).astype(np.float32), (1, 2, 2, 1))
    session = SimpleNamespace(run=lambda feeds: {"patches": patches})
    runner = Runner(mapped, sessions={"dense": session})  # type: ignore[dict-item]
    rows, _ = runner.embed_boxes(picture, [(0, 0, 4, 4)], dimensions=2)
    np.testing.assert_allclose(rows, [[0.6, 0.8]], atol=1e-6)
    answer = runner.run(embed(mapped, EmbedRequest([Boxed(picture, [(0, 0, 4, 4)])], dimensions=2)))
    np.testing.assert_allclose(answer.vectors, [[0.6, 0.8]], atol=1e-6)
    with pytest.raises(BadRequest, match="expected one of 2, 3"):
        runner.embed_boxes(picture, [(0, 0, 4, 4)], dimensions=1)


def test_another_length_is_refused_with_the_lengths(short: Bundle, sealed: Path):
    for length in (1, 4, 0, -2):
        says = f"dimensions is {length}; the vectors of 'colours' have 3; expected one of 2, 3"
        with pytest.raises(BadRequest, match=says):
            Runner(short).embed(texts=["red"], dimensions=length)
    with pytest.raises(BadRequest, match="have 3 and cannot be shortened, so leave it out"):
        Runner(Bundle(read(sealed))).embed(texts=["red"], dimensions=2)


def test_dimensions_leave_the_embedding_digest_as_it_is(short: Bundle, sealed: Path):
    assert short.embedding_digest == embedding_digest(read(sealed).manifest)


def test_the_verb_run_shortens(sealed: Path, capsys: pytest.CaptureFixture[str]):
    words = ["run", str(sealed), "embed", "--text", "red"]
    assert main([*words, "--dimensions", "3"]) == 0
    assert capsys.readouterr().out.split() == ["1.0000", "0.0000", "0.0000"]
    assert main([*words, "--dimensions", "2"]) == 2
    assert "cannot be shortened" in capsys.readouterr().err
