"""Texts, pictures, boxes in pictures, and vectors of another model -> unit vectors in one space."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import (
    DOCUMENT,
    QUERY,
    ImagePreprocess,
    Manifest,
    TextPreprocess,
    VectorPreprocess,
    unknown_prompt,
)
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.preprocess.text import prompted
from calmclip.models.preprocess.truncation import METHODS, POOLINGS, Truncation
from calmclip.models.preprocess.vectors import Vector
from calmclip.models.tasks import TASKS, Command, Task, embedding, one_space
from calmclip.models.tasks.features import Driver, check_dimensions, each, from_vectors, pictures, prefix, texts
from calmclip.models.tasks.regions import Boxes, check_dense, region_vectors
from calmclip.models.vector_files import read_vectors


@dataclass(frozen=True)
class Boxed:
    """A picture of which boxes are embedded: ``boxes`` [N, 4], x0 y0 x1 y1 in pixels of the upright picture."""

    image: Picture
    boxes: Boxes


@dataclass(frozen=True)
class EmbedRequest:
    """``inputs``: a `str` is a text, a `Vector` stands in place of one, a `Boxed` is one input for each of its boxes,
    everything else a picture. The answer has the same order. ``prompt``: a name of the bundle's prompts, which goes
    before every text; None: the default. ``truncation``: of a text that is too long; None: the bundle's.
    ``dimensions``: the length of the vectors, one of `Bundle.dimensions`; None: all they have."""

    inputs: Sequence[str | Picture | Boxed | Vector]
    prompt: str | None = None
    truncation: Truncation | None = None
    dimensions: int | None = None


@dataclass(frozen=True)
class Embeddings:
    """``vectors`` float32 [N, D], unit rows; ``tokens``: the number of tokens of all texts."""

    vectors: Array
    tokens: int


def embed(bundle: Bundle, request: EmbedRequest) -> Flow[Embeddings]:
    """Raises `TaskNotServed` (also for boxes without a graph for them), `BadRequest` (no inputs, impossible boxes, an
    unknown prompt, a length that the bundle does not have) and the `InputError`s of pictures and texts."""
    bundle.require("embed")
    check_dimensions(bundle, request.dimensions)
    if isinstance(request.inputs, str):
        raise BadRequest(f"inputs is the text {request.inputs[:40]!r}; expected a list of texts and pictures")
    if not request.inputs:
        raise BadRequest("no inputs were given; expected at least one text or picture")
    *starts, count = accumulate(map(_rows, request.inputs), initial=0)
    vectors = np.empty((count, bundle.dim), np.float32)
    sentences = {i: value for i, value in zip(starts, request.inputs, strict=True) if isinstance(value, str)}
    tokens = 0
    spec = _text_spec(bundle)
    if spec is None and request.prompt is not None:
        raise unknown_prompt(request.prompt, ())
    words = "" if spec is None else spec.prompt_text(request.prompt)
    if sentences:
        written = tuple(sentences.values())
        vectors[list(sentences)] = yield from texts(bundle, written, request.prompt, request.truncation)
        tokens = sum(bundle.text().count(prompted(words, sentence)) for sentence in written)
    placed = [*zip(starts, request.inputs, strict=True)]
    given = {i: value.numbers for i, value in placed if isinstance(value, Vector)}
    if given:
        vectors[list(given)] = yield from from_vectors(bundle, tuple(given.values()))
    images = {i: value for i, value in placed if not isinstance(value, str | Boxed | Vector)}
    if images:
        vectors[list(images)] = yield from pictures(bundle, tuple(images.values()))
    for i, value in placed:
        if isinstance(value, Boxed):
            vectors[i : i + len(value.boxes)], _ = yield from region_vectors(bundle, value.image, value.boxes)
    return Embeddings(prefix(vectors, request.dimensions), tokens)


def query_prompt(bundle: Bundle) -> str | None:
    """The name of the prompt for texts that are searched for."""
    return _prompt_for(bundle, QUERY)


def document_prompt(bundle: Bundle) -> str | None:
    """The name of the prompt for texts that are searched."""
    return _prompt_for(bundle, DOCUMENT)


def _prompt_for(bundle: Bundle, names: Sequence[str]) -> str | None:
    spec = _text_spec(bundle)
    return None if spec is None else spec.prompt_for(names)


def _text_spec(bundle: Bundle) -> TextPreprocess | None:
    graph = bundle.manifest.graphs.get("text")
    spec = graph.preprocess if graph else None
    return spec if isinstance(spec, TextPreprocess) else None


def _rows(value: str | Picture | Boxed | Vector) -> int:
    return len(value.boxes) if isinstance(value, Boxed) else 1


def check(manifest: Manifest) -> None:
    one_space(manifest)
    dims = [embedding(role, manifest.graphs[role])[1] for role in ("image", "text") if role in manifest.graphs]
    if manifest.dimensions and manifest.dimensions[-1] >= min(dims):
        raise ValueError(f"`dimensions` has {manifest.dimensions[-1]}; expected less than {min(dims)}, the vectors'")
    check_dense(manifest)


def example(bundle: Bundle, picture: bytes) -> EmbedRequest:
    spec = bundle.manifest.graphs["text"].preprocess if "text" in bundle.manifest.graphs else None
    text = Vector(np.ones(spec.dim)) if isinstance(spec, VectorPreprocess) else "a thing"
    inputs: dict[str, Any] = {"image": picture, "text": text, "dense": Boxed(picture, [(0.0, 0.0, 1.0, 1.0)])}
    return EmbedRequest([value for role, value in inputs.items() if role in bundle.manifest.graphs])


def _options(options: ArgumentParser) -> None:
    options.add_argument("--text", action="append", default=[], help="a text to embed; may be given many times")
    options.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help=".npy or .npz [N, d] of the model that the bundle names, in place of texts",
    )
    options.add_argument("--prompt-name", metavar="NAME", help="the bundle's prompt that goes before each text")
    options.add_argument("--truncate", choices=METHODS, help="of a text that is too long; default: the bundle's")
    options.add_argument("--stride", type=int, help="chunk: tokens between the starts of two windows")
    options.add_argument("--pooling", choices=POOLINGS, default="mean", help="chunk: of the windows; default: mean")
    words = "a box in pixels, embedded instead of the whole picture; may be given many times"
    sides = ("X0", "Y0", "X1", "Y1")
    options.add_argument("--box", action="append", nargs=4, type=float, default=[], metavar=sides, help=words)
    shorter = "shorten the vectors to a prefix that holds, by the bundle's manifest"
    options.add_argument("--dimensions", type=int, metavar="N", help=shorter)


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    texts = [*options.text, *(map(Vector, read_vectors(options.vectors)) if options.vectors else ())]
    alone = (options.truncate, options.stride, options.pooling) == (None, None, "mean")
    how = None if alone else Truncation(options.truncate or "none", options.stride, options.pooling)
    settings = {"prompt": options.prompt_name, "truncation": how, "dimensions": options.dimensions}
    if texts or not options.pictures:
        (answer,) = driver.map([embed(driver.bundle, EmbedRequest(texts, **settings))])
        yield from ({"embedding": row.tolist()} for row in answer.vectors)

    def of(path: Path) -> Flow[Embeddings]:
        return embed(driver.bundle, EmbedRequest([Boxed(path, options.box) if options.box else path], **settings))

    for path, answer in each(driver, options.pictures, of):
        yield from ({"picture": str(path), "embedding": row.tolist()} for row in answer.vectors)


TASKS.register("embed")(
    Task(
        name="embed",
        summary="texts, pictures and boxes -> unit vectors",
        request=EmbedRequest,
        flow=embed,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess | VectorPreprocess},
        any_role=True,
        check=check,
        command=Command(_options, _answers, lambda answer: " ".join(f"{x:.4f}" for x in answer["embedding"])),
    )
)
