"""embed over invented vectors: order, one call for all texts, one for each picture."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadImage, BadRequest
from calmclip.models.flow import Arrays, Call, drive
from calmclip.models.tasks.embed import Embeddings, EmbedRequest, embed

Png = Callable[..., bytes]


def run(bundle: Bundle, inputs: Sequence[str | bytes]) -> tuple[Embeddings, list[Call]]:
    """The n-th picture is [n, 0, 0], the n-th text [0, n, 0]."""
    calls: list[Call] = []

    def answer(call: Call) -> Arrays:
        calls.append(call)
        pictures = sum(c.graph == "image" for c in calls)
        if call.graph == "image":
            return {"image_embeds": np.array([[pictures, 0, 0]], np.float32)}
        return {"text_embeds": np.array([[0, n + 1, 0] for n in range(len(call.feeds["ids"]))], np.float32)}

    return drive(embed(bundle, EmbedRequest(inputs)), answer), calls


def test_answers_keep_the_order_of_the_inputs(bundle: Bundle, png: Png):
    embeddings, calls = run(bundle, [png("red"), "red", png("blue"), "green blue"])
    assert embeddings.vectors.tolist() == [[1, 0, 0], [0, 1, 0], [2, 0, 0], [0, 2, 0]]
    assert embeddings.vectors.dtype == np.float32
    assert embeddings.tokens == 3
    assert [(c.graph, c.keys) for c in calls] == [("text", ("red", "green blue")), ("image", None), ("image", None)]


def test_texts_alone_make_one_call_and_pictures_alone_none_for_text(bundle: Bundle, png: Png):
    texts, calls = run(bundle, ["red", "blue"])
    assert [c.graph for c in calls] == ["text"]
    assert calls[0].feeds["ids"].tolist() == [[2], [4]]
    assert texts.tokens == 2
    pictures, calls = run(bundle, [png("red")])
    assert [c.graph for c in calls] == ["image"]
    assert pictures.tokens == 0


def test_empty_and_invalid_inputs_are_refused(bundle: Bundle, png: Png):
    with pytest.raises(BadRequest, match="no inputs were given"):
        run(bundle, [])
    with pytest.raises(BadRequest, match="text 1 is empty"):
        run(bundle, ["red", "", png("red")])
    with pytest.raises(BadImage):
        run(bundle, ["red", b"no picture"])
