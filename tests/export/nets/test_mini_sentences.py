"""Text vectors in numpy beside those of the torch tower in float64."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from calmclip.export.nets.mini import SHIPPED, minilm, parameters, sentences
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.nets.mini.towers import Heads, TextTower
from calmclip.export.nets.mini.weights import minilm_state, tokenizer_json

PHRASES = ("a cat", "the sky", "a man in a red jacket rides a horse along the beach", "grass", "x")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    head = parameters.read(SHIPPED, parameters.HEAD_SHAPES, "")
    return sentences.embed(parameters.text(head, parameters.minilm(minilm_state())), tokenizer_json(), PHRASES)


def test_the_vectors_are_those_of_the_module(vectors: np.ndarray):
    """In float64 both; what is left is the rounding to float32."""
    heads = Heads.load(SHIPPED)
    encoder = minilm.from_state(tensors(minilm_state()))
    tower = TextTower(encoder, heads.text_weight, heads.text_centre).double().eval()
    tokenizer = Tokenizer.from_str(tokenizer_json().decode())
    tokenizer.no_padding()
    with torch.inference_mode():
        expected = np.concatenate([tower(torch.tensor([tokenizer.encode(text).ids])).numpy() for text in PHRASES])
    assert (vectors.shape, vectors.dtype) == ((len(PHRASES), 384), np.float32)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-8)


def test_a_vector_does_not_depend_on_the_other_phrases(vectors: np.ndarray):
    """Texts of one length share products; "a cat" and "the sky" have one."""
    head = parameters.read(SHIPPED, parameters.HEAD_SHAPES, "")
    alone = sentences.embed(parameters.text(head, parameters.minilm(minilm_state())), tokenizer_json(), PHRASES[:1])
    np.testing.assert_allclose(alone[0], vectors[0], rtol=0, atol=1e-8)


def test_the_error_function():
    x = np.concatenate([np.linspace(-7, 7, 4001), [0.0, -0.0, 1e-300, np.pi / 1e6]])
    np.testing.assert_allclose(sentences.erf(x), [math.erf(value) for value in x], rtol=0, atol=1e-13)
