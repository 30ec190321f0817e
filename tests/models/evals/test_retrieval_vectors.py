"""Retrieval by a bundle that reads vectors of a language model in place of captions, in two languages."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calmclip.models.errors import BadRequest
from calmclip.models.evals import measure
from calmclip.models.runner import Runner, open_bundle
from tests.vectors import BLUE, MODEL, RED, YELLOW, seal_bundle


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    return open_bundle(seal_bundle(tmp_path_factory.mktemp("vectors")).directory, threads=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A red and a blue picture; the German caption of the red one has the vector of a blue thing."""
    (tmp_path / "images").mkdir()
    for name, colour in (("red.png", (255, 0, 0)), ("blue.png", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / name)
    (tmp_path / "captions.json").write_text(json.dumps({"red.png": ["red", "sunny"], "blue.png": ["blue"]}))
    (tmp_path / "captions.de.json").write_text(json.dumps({"red.png": ["rot"], "blue.png": ["blau"]}))
    texts = ["blau", "sunny", "red", "unused", "rot", "blue"]  # in any order
    rows = [BLUE, YELLOW, RED, RED, BLUE, BLUE]
    np.savez(tmp_path / "vectors.npz", texts=np.array(texts), vectors=np.array(rows))
    return tmp_path


def test_captions_are_found_by_their_vectors(runner: Runner, folder: Path):
    figures = measure.named(measure.predict("retrieval", runner, measure.read("retrieval", folder)))
    assert (figures["text_to_image_r1"], figures["image_to_text_r1"]) == (100.0, 100.0)
    assert (figures["de text_to_image_r1"], figures["captions in de"]) == (50.0, 2)


def test_a_caption_without_a_vector_is_named(runner: Runner, folder: Path):
    np.savez(folder / "vectors.npz", texts=np.array(["red", "blue"]), vectors=np.array([RED, BLUE]))
    says = rf"reads vectors of {MODEL} with 4 numbers, and 3 of 5 captions have none, such as 'sunny'; .*vectors\.npz"
    with pytest.raises(BadRequest, match=says):
        measure.predict("retrieval", runner, measure.read("retrieval", folder))
    (folder / "vectors.npz").unlink()
    with pytest.raises(BadRequest, match="5 of 5 captions have none"):
        measure.predict("retrieval", runner, measure.read("retrieval", folder))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"vectors": np.ones((1, 4))}, r"holds the arrays \['vectors'\]; expected texts"),
        ({"texts": np.ones(1), "vectors": np.ones((1, 4))}, "expected texts"),
        ({"texts": np.array(["a", "b"]), "vectors": np.ones((1, 4))}, r"texts \[2\] and vectors \[1, 4\]"),
        ({"texts": np.array(["a"]), "vectors": np.array([["x"]])}, "expected rows of numbers"),
    ],
)
def test_a_file_of_another_kind_is_refused(arrays, says: str, folder: Path):
    np.savez(folder / "vectors.npz", **arrays)
    with pytest.raises(BadRequest, match=says):
        measure.read("retrieval", folder)
