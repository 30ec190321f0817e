"""Texts and pictures -> unit vectors in one space."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Call, Flow, Work
from calmclip.models.preprocess.image import decode
from calmclip.models.tasks.texts import embed_texts, only_output


@dataclass(frozen=True)
class EmbedRequest:
    """``inputs``: a `str` is a text, `bytes` are a picture file. Answers keep their order."""

    inputs: Sequence[str | bytes]


@dataclass(frozen=True)
class Embeddings:
    """``vectors`` float32 [N, D], unit rows; ``tokens``: how many the text inputs had together."""

    vectors: Array
    tokens: int


def embed(bundle: Bundle, request: EmbedRequest) -> Flow[Embeddings]:
    bundle.require("embed")
    if not request.inputs:
        raise BadRequest("no inputs were given; expected at least one text or picture")
    vectors = np.empty((len(request.inputs), bundle.dim), np.float32)
    texts = [i for i, one in enumerate(request.inputs) if isinstance(one, str)]
    pictures = [i for i, one in enumerate(request.inputs) if not isinstance(one, str)]
    tokens = 0
    if texts:
        sentences = [str(request.inputs[i]) for i in texts]
        vectors[texts] = yield from embed_texts(bundle, sentences)
        tokens = sum(bundle.text().count(sentence) for sentence in sentences)
    for i in pictures:  # one at a time: a driver merges the calls of many requests anyway
        data = request.inputs[i]
        assert isinstance(data, bytes)
        picture = yield Work("decode", lambda data=data: decode(data, max_pixels=bundle.max_pixels))  # type: ignore[misc]
        preparer = bundle.image()
        pixels = yield Work("preprocess", lambda p=picture, q=preparer: q.prepare(p)[0])  # type: ignore[misc]
        found = yield Call("image", {preparer.spec.input: pixels})
        vectors[i] = found[only_output(bundle, "image")][0]
    return Embeddings(vectors, tokens)
