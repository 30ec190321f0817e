"""Texts and pictures -> unit vectors in one space."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.features import Driver, picture, texts


@dataclass(frozen=True)
class EmbedRequest:
    """``inputs``: a `str` is a text, everything else a picture. The answer has the same order."""

    inputs: Sequence[str | Picture]


@dataclass(frozen=True)
class Embeddings:
    """``vectors`` float32 [N, D], unit rows; ``tokens``: the number of tokens of all texts."""

    vectors: Array
    tokens: int


def embed(bundle: Bundle, request: EmbedRequest) -> Flow[Embeddings]:
    """Raises `TaskNotServed`, `BadRequest` (no inputs) and the `InputError`s of pictures and texts."""
    bundle.require("embed")
    if isinstance(request.inputs, str):
        raise BadRequest(f"inputs is the text {request.inputs[:40]!r}; expected a list of texts and pictures")
    if not request.inputs:
        raise BadRequest("no inputs were given; expected at least one text or picture")
    vectors = np.empty((len(request.inputs), bundle.dim), np.float32)
    sentences = {i: value for i, value in enumerate(request.inputs) if isinstance(value, str)}
    tokens = 0
    if sentences:
        vectors[list(sentences)] = yield from texts(bundle, tuple(sentences.values()))
        tokens = sum(map(bundle.text().count, sentences.values()))
    for i, value in enumerate(request.inputs):
        if not isinstance(value, str):
            vectors[i] = (yield from picture(bundle, value))[0]
    return Embeddings(vectors, tokens)


def example(bundle: Bundle, picture: bytes) -> EmbedRequest:
    inputs: dict[str, str | Picture] = {"image": picture, "text": "a thing"}
    return EmbedRequest([value for role, value in inputs.items() if role in bundle.manifest.graphs])


def _options(options: ArgumentParser) -> None:
    options.add_argument("--text", action="append", default=[], help="a text to embed; may be given many times")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    groups = [options.text] if options.text or not options.pictures else []
    groups += [[picture] for picture in options.pictures]
    for answer in driver.map(embed(driver.bundle, EmbedRequest(group)) for group in groups):
        yield from ({"embedding": row.tolist()} for row in answer.vectors)


TASKS.register("embed")(
    Task(
        name="embed",
        summary="texts and pictures -> unit vectors",
        request=EmbedRequest,
        flow=embed,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess},
        any_role=True,
        check=one_space,
        command=Command(_options, _answers, lambda answer: " ".join(f"{x:.4f}" for x in answer["embedding"])),
    )
)
