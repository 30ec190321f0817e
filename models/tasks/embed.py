"""Texts, pictures and boxes in pictures -> unit vectors in one space."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.features import Driver, pictures, texts
from calmclip.models.tasks.regions import Boxes, check_dense, region_vectors


@dataclass(frozen=True)
class Boxed:
    """A picture of which boxes are embedded: ``boxes`` [N, 4], x0 y0 x1 y1 in pixels of the upright picture."""

    image: Picture
    boxes: Boxes


@dataclass(frozen=True)
class EmbedRequest:
    """``inputs``: a `str` is a text, a `Boxed` one input for each of its boxes, everything else a picture. The answer
    has the same order."""

    inputs: Sequence[str | Picture | Boxed]


@dataclass(frozen=True)
class Embeddings:
    """``vectors`` float32 [N, D], unit rows; ``tokens``: the number of tokens of all texts."""

    vectors: Array
    tokens: int


def embed(bundle: Bundle, request: EmbedRequest) -> Flow[Embeddings]:
    """Raises `TaskNotServed` (also for boxes without a graph for them), `BadRequest` (no inputs, impossible boxes) and
    the `InputError`s of pictures and texts."""
    bundle.require("embed")
    if isinstance(request.inputs, str):
        raise BadRequest(f"inputs is the text {request.inputs[:40]!r}; expected a list of texts and pictures")
    if not request.inputs:
        raise BadRequest("no inputs were given; expected at least one text or picture")
    *starts, count = accumulate(map(_rows, request.inputs), initial=0)
    vectors = np.empty((count, bundle.dim), np.float32)
    sentences = {i: value for i, value in zip(starts, request.inputs, strict=True) if isinstance(value, str)}
    tokens = 0
    if sentences:
        vectors[list(sentences)] = yield from texts(bundle, tuple(sentences.values()))
        tokens = sum(map(bundle.text().count, sentences.values()))
    placed = [*zip(starts, request.inputs, strict=True)]
    images = {i: value for i, value in placed if not isinstance(value, str | Boxed)}
    if images:
        vectors[list(images)] = yield from pictures(bundle, tuple(images.values()))
    for i, value in placed:
        if isinstance(value, Boxed):
            vectors[i : i + len(value.boxes)], _ = yield from region_vectors(bundle, value.image, value.boxes)
    return Embeddings(vectors, tokens)


def _rows(value: str | Picture | Boxed) -> int:
    return len(value.boxes) if isinstance(value, Boxed) else 1


def check(manifest: Manifest) -> None:
    one_space(manifest)
    check_dense(manifest)


def example(bundle: Bundle, picture: bytes) -> EmbedRequest:
    inputs: dict[str, Any] = {"image": picture, "text": "a thing", "dense": Boxed(picture, [(0.0, 0.0, 1.0, 1.0)])}
    return EmbedRequest([value for role, value in inputs.items() if role in bundle.manifest.graphs])


def _options(options: ArgumentParser) -> None:
    options.add_argument("--text", action="append", default=[], help="a text to embed; may be given many times")
    words = "a box in pixels, embedded instead of the whole picture; may be given many times"
    sides = ("X0", "Y0", "X1", "Y1")
    options.add_argument("--box", action="append", nargs=4, type=float, default=[], metavar=sides, help=words)


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    groups: list[list[Any]] = [options.text] if options.text or not options.pictures else []
    groups += [[Boxed(picture, options.box) if options.box else picture] for picture in options.pictures]
    for answer in driver.map(embed(driver.bundle, EmbedRequest(group)) for group in groups):
        yield from ({"embedding": row.tolist()} for row in answer.vectors)


TASKS.register("embed")(
    Task(
        name="embed",
        summary="texts, pictures and boxes -> unit vectors",
        request=EmbedRequest,
        flow=embed,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess},
        any_role=True,
        check=check,
        command=Command(_options, _answers, lambda answer: " ".join(f"{x:.4f}" for x in answer["embedding"])),
    )
)
