"""The vectors are the normalized colours of tests/service/conftest.py."""

import numpy as np
import pytest

from tests.asking import b64, raw


def test_texts_and_pictures_keep_their_order(client, picture):
    inputs = [
        {"image": b64(picture("blue"))},
        {"text": "red"},
        {"image": b64(picture("white"))},
        {"text": "a yellow thing"},
    ]
    answer = client.post("/v1/embed", json={"inputs": inputs}).json()
    wanted = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]], float)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert answer["dim"] == 3
    assert answer["normalized"] is True
    assert np.array(answer["embeddings"]) == pytest.approx(wanted, abs=1e-6)


def test_multipart_parts_are_inputs_in_their_order(client, picture):
    parts = [("text", (None, "green")), ("image", ("b.png", picture("blue"))), ("model", (None, "colours-int8"))]
    answer = client.post("/v1/embed", files=parts).json()
    assert np.array(answer["embeddings"]) == pytest.approx(np.array([[0, 1, 0], [0, 0, 1]]), abs=1e-6)


def test_a_raw_picture_is_one_input(client, picture):
    answer = client.post("/v1/embed", **raw(picture("green"))).json()
    assert answer["embeddings"] == [[0, 1, 0]]
