"""Picture -> the words that fit it and its regions, and a caption made of them.

Source: the visual concept extractor of LightCap, Wang et al. 2022 (arXiv 2212.08985): words of a vocabulary by their
CLIP text vectors. Gaussian soft-NMS: Bodla et al. 2017 (arXiv 1704.04503); here near-synonyms compete as one word, and
an overlap is the part of the smaller box that both share: a part of a thing is not another thing.
Nothing is subtracted from a word that is near to many pictures: in `tests/bench/tag.py` this finds no more of the
labels.

A bundle may have a captioner, the graph `caption` [1 picture]. Its inputs: any of `image_embeds` float32 [1, D], the
picture's unit vector; `word_embeds` float32 [1, K, D], the unit vectors of the picture's tags, best first, K from 1 to
`top`; and other outputs of the graph `image` by their names. Its output: `ids` int64 [1, T], tokens of the tokenizer of
`text`; special tokens are left out of the caption. Without such a graph a template makes the caption.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from calmclip.models import vocabulary
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Call, Flow
from calmclip.models.labels import check_distinct, listed
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.features import Driver, each, labels, output_of, prepared, unit
from calmclip.models.tasks.regions import region_vectors

MAX_TOP = 100
CANDIDATES = 10  # words for each answer that soft-NMS chooses from; so many more than `top` are never kept
OF_REGION = 2  # words of one region among the candidates
SYNONYMS = 0.7  # the cosine of two words, less the mean of all, from which they count as one; see tests/bench/tag.py
SIGMA = 0.25  # of soft-NMS
IN_CAPTION = 3  # words
LOOK = {"regions", "dense"}  # graphs that give regions their vectors


@dataclass(frozen=True)
class TagRequest:
    """``words``: the words to choose from; none: the vocabulary, `models.vocabulary`. ``templates``, each with a
    ``{}``: sentences of a word, whose vectors are averaged; none: the word alone. ``top``: at most so many tags of the
    picture, and of all its regions together. ``regions``: whether to look at regions, if the bundle can."""

    image: Picture
    words: Sequence[str] = ()
    templates: Sequence[str] = ()
    top: int = 10
    regions: bool = True


@dataclass(frozen=True)
class Tag:
    """``cosine``: of the vectors of the word and of the picture or region. ``score``: the same after soft-NMS: times
    exp(-s^2 / 0.25) for each better tag of the word or a near-synonym, with the part s of the smaller of their boxes
    that both share."""

    word: str
    index: int  # in the words
    score: float
    cosine: float
    box: Array | None = None  # float32 [4] x0 y0 x1 y1 in pixels of the upright picture; None: the whole picture


@dataclass(frozen=True)
class Tags:
    """``picture``: tags of the whole picture; ``regions``: of its regions; each best first, cosines above 0 alone.
    ``captioned_by``: a template, or the bundle's graph `caption`."""

    picture: tuple[Tag, ...]
    regions: tuple[Tag, ...]
    caption: str
    captioned_by: Literal["template", "graph"]


def tag(bundle: Bundle, request: TagRequest) -> Flow[Tags]:
    """Raises `TaskNotServed`, `BadRequest` and the `InputError`s of pictures and texts."""
    words = _checked(bundle, request)
    feeds, _ = yield from prepared(bundle, request.image)
    vectors = yield from labels(bundle, words)
    outputs = yield Call("image", feeds)
    row = outputs[output_of(bundle, "image")]
    whole = _suppressed(words, vectors, row, None, CANDIDATES * request.top, request.top)
    parts: tuple[Tag, ...] = ()
    if request.regions and LOOK & bundle.manifest.graphs.keys():
        rows, boxes = yield from region_vectors(bundle, request.image)
        parts = _suppressed(words, vectors, rows, boxes, OF_REGION, request.top)
    if "caption" in bundle.manifest.graphs:
        embeds = {"image_embeds": row, "word_embeds": vectors[[t.index for t in whole]][None]}
        caption = yield from _written(bundle, {**outputs, **embeds})
        return Tags(whole, parts, caption, "graph")
    told = dict.fromkeys(t.word for t in (*whole[:1], *parts, *whole[1:]))
    return Tags(whole, parts, filled([*told][:IN_CAPTION]), "template")


def shared(bundle: Bundle, request: TagRequest) -> Flow[TagRequest]:
    """What many pictures share: embeds the words once, so that the driver's cache has them for each of the pictures.
    Its own ``image`` is not read. -> ``request``. Raises as `tag`."""
    yield from labels(bundle, _checked(bundle, request))
    return request


def _checked(bundle: Bundle, request: TagRequest) -> Classifier:
    """The words to choose from."""
    bundle.require("tag")
    if not 1 <= request.top <= MAX_TOP:
        raise BadRequest(f"top is {request.top}; expected 1 to {MAX_TOP}")
    return _words(tuple(listed("words", request.words)), tuple(listed("templates", request.templates)))


def filled(words: Sequence[str]) -> str:
    """The template caption: "a photo of a, b and c": the best word of the picture, then those of its regions."""
    if not words:
        return "a photo"
    *first, last = words
    return f"a photo of {', '.join(first)} and {last}" if first else f"a photo of {last}"


@lru_cache(4)
def _words(words: tuple[str, ...], templates: tuple[str, ...]) -> Classifier:
    check_distinct(words)
    return Classifier(words or vocabulary.words(), templates)


def _suppressed(
    words: Classifier, vectors: Array, rows: Array, boxes: Array | None, each: int, top: int
) -> tuple[Tag, ...]:
    """The ``top`` tags of the whole picture, ``boxes`` None, or of regions; ``each``: words of a row that compete."""
    cosines = rows @ vectors.T
    each = min(each, cosines.shape[1])
    columns = np.sort(np.argpartition(-cosines, each - 1, axis=1)[:, :each], axis=1)  # in the order of the words
    places = np.repeat(np.arange(len(rows)), each)
    index, raw = columns.ravel(), np.take_along_axis(cosines, columns, axis=1).ravel()
    likely = np.flatnonzero(raw > 0)
    index, raw, places = index[likely], raw[likely], places[likely]
    frames = np.zeros((len(raw), 4), np.float32) if boxes is None else boxes[places]
    chosen = unit(vectors[index] - vectors.mean(axis=0))  # in some models all texts are near to each other
    same = (index[:, None] == index) | (chosen @ chosen.T >= SYNONYMS)
    overlap = np.where(same, 1.0 if boxes is None else shares(frames), 0.0)
    kept = soft_nms(raw, overlap, top)
    return tuple(
        Tag(words.labels[index[i]], int(index[i]), score, float(raw[i]), None if boxes is None else frames[i])
        for i, score in kept
    )


def soft_nms(scores: Array, overlap: Array, top: int) -> list[tuple[int, float]]:
    """Gaussian soft-NMS: scores float [N] above 0 and their overlaps float [N, N] -> the ``top`` indices with their
    scores, best first; ties go to the lower index."""
    left = scores.astype(np.float64)
    kept = []
    for _ in range(min(top, len(left))):
        best = int(left.argmax())
        kept.append((best, float(left[best])))
        left = left * np.exp(-(overlap[best].astype(np.float64) ** 2) / SIGMA)
        left[best] = -1.0  # and it stays below 0
    return kept


def shares(boxes: Array) -> Array:
    """float32 [N, 4], x0 y0 x1 y1 -> float32 [N, N]: the part of the smaller box of two that both share."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    part: Array = shared / np.maximum(np.minimum(areas[:, None], areas[None]), 1e-9)
    return part


def _written(bundle: Bundle, known: Arrays) -> Flow[str]:
    """The caption of the graph `caption`; ``known``: all that it may read."""
    outputs = yield Call("caption", {name: known[name] for name in bundle.graph("caption").inputs})
    return bundle.text().decode(outputs["ids"][0].tolist())


def check(manifest: Manifest) -> None:
    one_space(manifest)
    if (graph := manifest.graphs.get("caption")) is None:
        return
    readable = {*manifest.graphs["image"].outputs, "image_embeds", "word_embeds"}
    if unknown := sorted(graph.inputs.keys() - readable):
        raise ValueError(f"`graphs.caption.inputs` has {unknown[0]!r}; a captioner may read {sorted(readable)}")
    if {name: tensor.dtype for name, tensor in graph.outputs.items()} != {"ids": "int64"}:
        raise ValueError(f"`graphs.caption.outputs` are {sorted(graph.outputs)}; expected 'ids' alone, int64 [1, T]")


def example(bundle: Bundle, picture: bytes) -> TagRequest:
    return TagRequest(picture, ["a thing"])  # the whole vocabulary takes seconds


def _options(options: ArgumentParser) -> None:
    options.add_argument("--word", action="append", default=[], help="may be given many times; else the vocabulary")
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; may be given many times")
    options.add_argument("--top", type=int, default=10, help="tags of the picture, and of its regions (default 10)")
    options.add_argument("--no-regions", action="store_true", help="look at the whole picture alone")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    request = TagRequest(b"", options.word, options.template, options.top, not options.no_regions)
    answers = each(driver, options.pictures, lambda path: tag(driver.bundle, replace(request, image=path)))
    for path, tags in answers:
        rows = [
            {"word": t.word, "score": t.score, "box": None if t.box is None else [round(float(x), 1) for x in t.box]}
            for t in (*tags.picture, *tags.regions)
        ]
        yield {"picture": str(path), "tag": rows, "caption": tags.caption, "captioned_by": tags.captioned_by}


def _line(answer: dict[str, Any]) -> str:
    rows = [
        f"  {row['score']:.3f}  {row['word']}  {' '.join(f'{x:7.1f}' for x in row['box'] or ())}".rstrip()
        for row in answer["tag"]
    ]
    return "\n".join([answer["picture"], f"  {answer['caption']} (by {answer['captioned_by']})", *rows])


TASKS.register("tag")(
    Task(
        name="tag",
        summary="picture -> words for it and its regions, and a caption made of them",
        request=TagRequest,
        flow=tag,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess},
        follows="classify",
        check=check,
        command=Command(_options, _answers, _line),
    )
)
