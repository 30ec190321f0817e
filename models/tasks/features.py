"""Pictures, texts and labels -> vectors: the parts of flows that several tasks share.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4, for the mean over the sentences of a label.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadImage, BadRequest, CalmclipError, ImageTooLarge, InputError
from calmclip.models.flow import Array, Arrays, CacheGet, CachePut, Call, Flow, Together, Work
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.preprocess.placement import Frame
from calmclip.models.preprocess.slices import slices
from calmclip.models.preprocess.text import prompted
from calmclip.models.preprocess.truncation import Method, Truncation
from calmclip.models.tasks import embedding
from calmclip.models.tasks.compression import MOST_BUDGET, Compressed, compressed

T = TypeVar("T")
GROUP = 4  # pictures of one call, of requests with at least
GROUPED_FROM = 16  # pictures
LABELS = "labels of text"  # the cache's name for the vectors of all labels of a classifier


class Driver(Protocol):
    """`Runner`, as far as the commands of tasks use it. ``broken`` is told of each picture that has no answer."""

    bundle: Bundle

    def map(self, flows: Iterable[Flow[T]]) -> Iterator[T]: ...

    def broken(self, picture: Path, error: CalmclipError) -> None: ...


def each(driver: Driver, paths: Sequence[Path], flow: Callable[[Path], Flow[T]]) -> Iterator[tuple[Path, T]]:
    """Each picture with the answer of its flow, in order, as soon as it is there. A picture that is missing or broken
    is left out, and the driver is told; other errors end the iteration."""
    there = []
    for path in paths:
        if path.is_file():
            there.append(path)
        else:
            driver.broken(path, BadRequest(f"there is no file {path}"))
    for path, answer in zip(there, driver.map(_guarded(flow(path)) for path in there), strict=True):
        if isinstance(answer, InputError):
            driver.broken(path, answer)
        else:
            yield path, answer


def _guarded(flow: Flow[T]) -> Flow[T | InputError]:
    try:
        return (yield from flow)
    except (BadImage, ImageTooLarge) as error:
        return error


def prepared(bundle: Bundle, image: Picture, role: str = "image") -> Flow[tuple[Arrays, Frame]]:
    """-> the feeds of graph ``role`` for one picture, and the `Frame` that maps its boxes.

    Raises `BadImage`, `ImageTooLarge`.
    """
    picture = yield Work("decode", lambda: load(image, max_pixels=bundle.max_pixels))
    preparer = bundle.image(role)
    pixels, frame = yield Work("preprocess", lambda: preparer.prepare(picture))
    return {preparer.spec.input: pixels}, frame


def picture(bundle: Bundle, image: Picture) -> Flow[Array]:
    """-> float32 [1, D], the unit row of graph `image`. A driver merges the calls of many pictures."""
    feeds, _ = yield from prepared(bundle, image)
    return (yield from row_of(bundle, feeds))


def row_of(bundle: Bundle, feeds: Arrays) -> Flow[Array]:
    """The feeds of `prepared`, or of several of them -> float32 [N, D], the unit rows."""
    outputs = yield Call("image", feeds)
    row: Array = outputs[output_of(bundle, "image")]
    return row


def pictures(bundle: Bundle, images: Sequence[Picture]) -> Flow[Array]:
    """-> float32 [N, D], the unit rows of pictures, at least one. A driver may run them at once.

    Many pictures go in groups: a group is one step of a thread and one call, and a switch between threads takes longer
    than some pictures' decoding. Few go alone, so that each has a core.
    """
    graph = bundle.manifest.graphs.get("image")
    size = GROUP if graph and graph.batch and len(images) >= GROUPED_FROM else 1
    groups = [images[start : start + size] for start in range(0, len(images), size)]
    return np.concatenate((yield Together([_group(bundle, group) for group in groups])))


def _group(bundle: Bundle, images: Sequence[Picture]) -> Flow[Array]:
    """-> float32 [N, D]: the pictures are decoded one after another and run as one call."""
    rows = []
    for image in images:
        feeds, _ = yield from prepared(bundle, image)
        rows.append(feeds)
    merged = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if len(rows) > 1 else rows[0]
    return (yield from row_of(bundle, merged))


def texts(
    bundle: Bundle, sentences: Sequence[str], prompt: str | None = None, truncation: Truncation | None = None
) -> Flow[Array]:
    """-> float32 [N, D], the rows of graph `text`. A repeated text runs once, a cached one is not even tokenized.
    ``prompt``: a name of the bundle's prompts, which goes before each text; None: the bundle's default, if it has one.

    ``truncation``: of a text that is too long; None: the bundle's. The other texts run in slices of nearly one length,
    the shortest first, so that a long text pads none of the others (`preprocess.slices`). Between two slices the driver
    may answer other flows, or end this one. Time and memory grow with the tokens of the texts; a slice has a bounded
    number of them. Raises `TextTooLong`, `BadRequest`.
    """
    output, preparer = output_of(bundle, "text"), bundle.text()
    words, how = preparer.spec.prompt_text(prompt), truncation or preparer.truncation
    keys = {text: _row_key(preparer.spec, words, text) for text in sentences}
    cached = yield CacheGet("text", tuple(keys.values()))
    rows = {text: cached[key][output] for text, key in keys.items() if key in cached}
    if how.method != "none" and len(rows) < len(keys):
        cached = yield CacheGet(how.cached, tuple(key for text, key in keys.items() if text not in rows))
        rows |= {text: cached[key]["vectors"][0] for text, key in keys.items() if key in cached}
    read = preparer.fitting if how.method == "none" else preparer.checked
    tokens = {text: read(text, index, words) for index, text in enumerate(sentences) if text not in rows}
    fitting = {text: ids for text, ids in tokens.items() if len(ids) <= preparer.spec.context}
    ran = yield from _rows(bundle, [*fitting.values()], words, [keys[text] for text in fitting])
    rows |= zip(fitting, ran, strict=True)
    if longer := [text for text in tokens if text not in fitting]:
        for text, row in zip(longer, (yield from LONG[how.method](bundle, longer, prompt, how)), strict=True):
            yield CachePut(how.cached, keys[text], {"vectors": row[None]}, 1)
            rows[text] = row
    stacked: Array = np.stack([rows[text] for text in sentences])
    return stacked


def _row_key(spec: TextPreprocess, words: str, text: str) -> str:
    """The key of a row in the cache. With the length of the prompt in front, no other prompt and text have this key."""
    return f"{len(words)}:{words}{text}" if spec.prompts else text


def from_vectors(bundle: Bundle, rows: Sequence[ArrayLike], name: str = "vector {}") -> Flow[Array]:
    """-> float32 [N, D], the rows of graph `text` for vectors of another model, at least one; see `VectorPreparer`.

    ``name``: of a vector in an error, with a {} for its place. Raises `BadRequest`.
    """
    feeds = bundle.vectors().prepare(rows, name)
    outputs = yield Call("text", feeds)
    embedded: Array = outputs[output_of(bundle, "text")]
    return embedded


def _rows(bundle: Bundle, tokens: Sequence[Sequence[int]], words: str, keys: Sequence[str] = ()) -> Flow[list[Array]]:
    """The row of graph `text` for each row of ids, of which each begins with the prompt ``words``. ``keys``: of the
    cache."""
    preparer, output = bundle.text(), output_of(bundle, "text")
    rows: dict[int, Array] = {}
    for chosen in slices([preparer.spec.width(len(ids)) for ids in tokens]):
        names = tuple(keys[i] for i in chosen) if keys else None
        feeds = preparer.padded([tokens[i] for i in chosen], preparer.prompt_tokens(words))
        answer = yield Call("text", feeds, names)
        rows |= zip(chosen, answer[output], strict=True)
    return [rows[i] for i in range(len(tokens))]


def _cut(bundle: Bundle, long: Sequence[str], prompt: str | None, how: Truncation) -> Flow[list[Array]]:
    preparer = bundle.text()
    words = preparer.spec.prompt_text(prompt)
    return (yield from _rows(bundle, [preparer.cut(text, prompt=words) for text in long], words))


def _chunked(bundle: Bundle, long: Sequence[str], prompt: str | None, how: Truncation) -> Flow[list[Array]]:
    """The unit rows of the pooled windows of each text."""
    preparer = bundle.text()
    words = preparer.spec.prompt_text(prompt)
    windows = [preparer.windows(text, how.stride, words) for text in long]
    units = unit(np.stack((yield from _rows(bundle, [window for group in windows for window in group], words))))
    pooled, start = [], 0
    for group in windows:
        rows = units[start : start + len(group)]
        start += len(group)
        weights = [len(window) for window in group]
        pooled.append(np.average(rows, axis=0, weights=weights) if how.pooling == "mean" else rows.max(axis=0))
    return [*unit(np.stack(pooled))]


def _compressed(bundle: Bundle, long: Sequence[str], prompt: str | None, how: Truncation) -> Flow[list[Array]]:
    """The rows of the sentences that stand for each text."""
    context = min(bundle.text().spec.context, MOST_BUDGET)
    answers = yield Together([compression(bundle, text, context, prompt) for text in long])
    return [row for _, row in answers]


def compression(bundle: Bundle, text: str, budget: int, prompt: str | None = None) -> Flow[tuple[Compressed, Array]]:
    """-> ``text`` in at most ``budget`` tokens with those of the prompt, and its row float32 [D]; see `compressed`."""
    preparer = bundle.text()
    words = preparer.spec.prompt_text(prompt)

    def units(parts: Sequence[str]) -> Flow[Array]:
        return unit((yield from texts(bundle, parts, prompt, Truncation("chunk"))))

    return (yield from compressed(text, budget, lambda part: preparer.count(prompted(words, part)), units))


LONG: Mapping[Method, Callable[[Bundle, Sequence[str], str | None, Truncation], Flow[list[Array]]]] = {
    "end": _cut,
    "compress": _compressed,
    "chunk": _chunked,
}


def labels(bundle: Bundle, classifier: Classifier) -> Flow[Array]:
    """-> float32 [C, D] unit rows: per label the normalized mean of its sentences' unit vectors. A head with vectors of
    its own has them instead (`Head.vectors`), and no text is embedded. The `label_vectors` of a classifier stand in
    place of sentences.

    ``classifier`` is complete, see `Bundle.classifier_for`.
    """
    if classifier.head is not None and (kept := classifier.bound.vectors(classifier.labels)) is not None:
        return kept
    if classifier.label_vectors:
        return (yield from _kept(classifier.text_key, lambda: _vector_means(bundle, classifier)))
    vectors: Array = yield from means(
        bundle, classifier.text_key, lambda: [classifier.sentences(label) for label in classifier.labels]
    )
    return vectors


def means(bundle: Bundle, key: str, groups: Callable[[], Sequence[Sequence[str]]]) -> Flow[Array]:
    """-> float32 [G, D] unit rows: the normalized mean of the unit vectors of each group of sentences.

    Time and memory grow with the number of distinct sentences at first use; then the driver caches the matrix by
    ``key``, which stands for what ``groups`` makes, and the groups are not made again.
    """
    return (yield from _kept(key, lambda: _sentence_means(bundle, groups())))


def _kept(key: str, make: Callable[[], Flow[Array]]) -> Flow[Array]:
    """The matrix that the driver cached by ``key``; if there is none, ``make`` makes it."""
    vectors: Array
    if cached := (yield CacheGet(LABELS, (key,))):
        vectors = cached[key]["vectors"]
        return vectors
    vectors = yield from make()
    yield CachePut(LABELS, key, {"vectors": vectors}, len(vectors))
    return vectors


def _sentence_means(bundle: Bundle, sentences: Sequence[Sequence[str]]) -> Flow[Array]:
    distinct = tuple(dict.fromkeys(sentence for group in sentences for sentence in group))
    units = unit((yield from texts(bundle, distinct)))
    row = {sentence: index for index, sentence in enumerate(distinct)}
    return unit(_means(units, [[row[sentence] for sentence in group] for group in sentences]))


def _vector_means(bundle: Bundle, classifier: Classifier) -> Flow[Array]:
    groups = [classifier.label_vectors[label] for label in classifier.labels]
    rows = [row for group in groups for row in group]
    units = unit((yield from from_vectors(bundle, rows, "label vector {}")))
    ends = accumulate(map(len, groups))
    return unit(_means(units, [range(end - len(group), end) for group, end in zip(groups, ends, strict=True)]))


def unit(rows: Array) -> Array:
    """Rows divided by their Euclidean length; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    units: Array = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
    return units


def prefix(rows: Array, dimensions: int | None) -> Array:
    """The first ``dimensions`` components of unit rows [N, D], as unit rows; None: the rows.

    Source: Kusupati et al. 2022 (Matryoshka Representation Learning, arXiv 2205.13147), section 3.
    """
    return rows if dimensions in (None, rows.shape[-1]) else unit(rows[..., :dimensions])


def check_dimensions(bundle: Bundle, dimensions: int | None) -> None:
    """Raises `BadRequest` that lists the lengths, unless ``dimensions`` is one of `Bundle.dimensions`, or None."""
    if dimensions is None or dimensions in (lengths := bundle.dimensions):
        return
    said = f"dimensions is {dimensions}; the vectors of {bundle.name!r} have {bundle.dim}"
    if len(lengths) == 1:
        raise BadRequest(f"{said} and cannot be shortened, so leave it out")
    raise BadRequest(f"{said}; expected one of {', '.join(map(str, lengths))}")


def output_of(bundle: Bundle, role: str) -> str:
    """The name of the output that is the embedding."""
    return embedding(role, bundle.graph(role))[0]


def _means(rows: Array, groups: Sequence[Sequence[int]]) -> Array:
    """The mean of each group of rows; in one step if the groups have one size."""
    if len({len(group) for group in groups}) > 1:
        return np.stack([rows[[*group]].mean(axis=0) for group in groups])
    means: Array = rows[np.array(groups)].mean(axis=1)
    return means
