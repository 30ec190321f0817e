"""Texts and pictures -> unit vectors in one space."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.features import picture, texts

if TYPE_CHECKING:
    from calmclip.models.runner import Runner


@dataclass(frozen=True)
class EmbedRequest:
    """``inputs``: a `str` is a text, everything else a picture. Answers keep their order."""

    inputs: Sequence[str | Picture]


@dataclass(frozen=True)
class Embeddings:
    """``vectors`` float32 [N, D], unit rows; ``tokens``: how many the text inputs had together."""

    vectors: Array
    tokens: int


def embed(bundle: Bundle, request: EmbedRequest) -> Flow[Embeddings]:
    """Raises `TaskNotServed`, `BadRequest` (there are no inputs) and the `InputError`s of pictures and texts."""
    bundle.require("embed")
    if not request.inputs:
        raise BadRequest("no inputs were given; expected at least one text or picture")
    vectors = np.empty((len(request.inputs), bundle.dim), np.float32)
    said = {i: one for i, one in enumerate(request.inputs) if isinstance(one, str)}
    tokens = 0
    if said:
        vectors[list(said)] = yield from texts(bundle, tuple(said.values()))
        tokens = sum(map(bundle.text().count, said.values()))
    for i, one in enumerate(request.inputs):
        if not isinstance(one, str):
            vectors[i] = (yield from picture(bundle, one))[0]
    return Embeddings(vectors, tokens)


def example(bundle: Bundle, picture: bytes) -> EmbedRequest:
    inputs: dict[str, str | Picture] = {"image": picture, "text": "a thing"}
    return EmbedRequest([one for role, one in inputs.items() if role in bundle.manifest.graphs])


def _options(options: ArgumentParser) -> None:
    options.add_argument("--text", action="append", default=[], help="a text to embed; may be given many times")


def _answers(runner: "Runner", given: Namespace) -> Iterator[dict[str, Any]]:
    for row in runner.embed(texts=given.text, images=given.pictures):
        yield {"embedding": row.tolist()}


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
