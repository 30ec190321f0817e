"""Pictures, texts and labels -> vectors: the parts of flows that several tasks share.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4, for the mean over the sentences of a label.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.flow import Array, Arrays, CacheGet, CachePut, Call, Flow, Together, Work
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.preprocess.placement import Frame
from calmclip.models.preprocess.slices import slices
from calmclip.models.tasks import embedding

T = TypeVar("T")
LABELS = "labels of text"  # the cache's name for the vectors of all labels of a classifier


class Driver(Protocol):
    """`Runner`, as far as the commands of tasks use it."""

    bundle: Bundle

    def map(self, flows: Iterable[Flow[T]]) -> Iterator[T]: ...


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
    """The feeds of `prepared` -> float32 [1, D], the unit row."""
    outputs = yield Call("image", feeds)
    row: Array = outputs[output_of(bundle, "image")]
    return row


def pictures(bundle: Bundle, images: Sequence[Picture]) -> Flow[Array]:
    """-> float32 [N, D], the unit rows of pictures, at least one. A driver may run them at once."""
    return np.concatenate((yield Together([picture(bundle, image) for image in images])))


def texts(bundle: Bundle, sentences: Sequence[str]) -> Flow[Array]:
    """-> float32 [N, D], the rows of graph `text`. A repeated text runs once, a cached one is not even tokenized.

    The other texts run in slices of nearly one length, the shortest first, so that a long text pads none of the others
    (`preprocess.slices`). Between two slices the driver may answer other flows, or end this one. Time and memory grow
    with the tokens of the texts; a slice has a bounded number of them. Raises `TextTooLong`, `BadRequest`.
    """
    output = output_of(bundle, "text")
    cached = yield CacheGet("text", tuple(dict.fromkeys(sentences)))
    rows = {text: outputs[output] for text, outputs in cached.items()}
    preparer = bundle.text()
    tokens = {text: preparer.tokens(text, index) for index, text in enumerate(sentences) if text not in rows}
    waiting = [*tokens]
    for chosen in slices([preparer.spec.width(len(ids)) for ids in tokens.values()]):
        keys = tuple(waiting[i] for i in chosen)
        answer = yield Call("text", preparer.padded([tokens[key] for key in keys]), keys)
        rows |= zip(keys, answer[output], strict=True)
    stacked: Array = np.stack([rows[text] for text in sentences])
    return stacked


def labels(bundle: Bundle, classifier: Classifier) -> Flow[Array]:
    """-> float32 [C, D] unit rows: per label the normalized mean of its sentences' unit vectors. A head with vectors of
    its own has them instead (`Head.vectors`), and no text is embedded.

    ``classifier`` is complete, see `Bundle.classifier_for`.
    """
    if classifier.head is not None and (kept := classifier.bound.vectors(classifier.labels)) is not None:
        return kept
    vectors: Array = yield from means(
        bundle, classifier.text_key, lambda: [classifier.sentences(label) for label in classifier.labels]
    )
    return vectors


def means(bundle: Bundle, key: str, groups: Callable[[], Sequence[Sequence[str]]]) -> Flow[Array]:
    """-> float32 [G, D] unit rows: the normalized mean of the unit vectors of each group of sentences.

    Time and memory grow with the number of distinct sentences at first use; then the driver caches the matrix by
    ``key``, which stands for what ``groups`` makes, and the groups are not made again.
    """
    vectors: Array
    if cached := (yield CacheGet(LABELS, (key,))):
        vectors = cached[key]["vectors"]
        return vectors
    sentences = groups()
    distinct = tuple(dict.fromkeys(sentence for group in sentences for sentence in group))
    units = unit((yield from texts(bundle, distinct)))
    row = {sentence: index for index, sentence in enumerate(distinct)}
    vectors = unit(_means(units, [[row[sentence] for sentence in group] for group in sentences]))
    yield CachePut(LABELS, key, {"vectors": vectors}, len(vectors))
    return vectors


def unit(rows: Array) -> Array:
    """Rows divided by their Euclidean length; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    units: Array = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
    return units


def output_of(bundle: Bundle, role: str) -> str:
    """The name of the output that is the embedding."""
    return embedding(role, bundle.graph(role))[0]


def _means(rows: Array, groups: Sequence[Sequence[int]]) -> Array:
    """The mean of each group of rows; in one step if the groups have one size."""
    if len({len(group) for group in groups}) > 1:
        return np.stack([rows[[*group]].mean(axis=0) for group in groups])
    means: Array = rows[np.array(groups)].mean(axis=1)
    return means
