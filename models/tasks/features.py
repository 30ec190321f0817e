"""Pictures, texts and labels -> vectors: the parts that flows of several tasks share.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4, for the mean over the sentences of a label.
"""

from collections.abc import Sequence

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.flow import Array, Arrays, Call, Flow, Keep, Recall, Work
from calmclip.models.preprocess.image import Frame, Picture, load
from calmclip.models.tasks import embedding

LABELS = "labels of text"  # where their finished vectors are kept
CHUNK = 64  # texts of one call: enough to fill a core, and a short one is not padded to the longest of thousands


def prepared(bundle: Bundle, image: Picture, role: str = "image") -> Flow[tuple[Arrays, Frame]]:
    """-> the feeds of graph ``role`` for one picture, and the `Frame` that maps boxes and maps back.

    Raises `BadImage`, `ImageTooLarge`.
    """
    picture = yield Work("decode", lambda: load(image, max_pixels=bundle.max_pixels))
    preparer = bundle.image(role)
    pixels, frame = yield Work("preprocess", lambda: preparer.prepare(picture))
    return {preparer.spec.input: pixels}, frame


def picture(bundle: Bundle, image: Picture) -> Flow[Array]:
    """-> float32 [1, D], the unit row of graph `image`. One picture a call: a driver merges the calls of many."""
    feeds, _ = yield from prepared(bundle, image)
    found = yield Call("image", feeds)
    row: Array = found[output_of(bundle, "image")]
    return row


def texts(bundle: Bundle, sentences: Sequence[str]) -> Flow[Array]:
    """-> float32 [N, D], the rows of graph `text`. Texts that the driver remembers are not tokenized again.

    More than `CHUNK` of them are run in groups of like length. Raises `TextTooLong`, `BadRequest`.
    """
    keys = tuple(sentences)
    output = output_of(bundle, "text")
    if (found := (yield Recall("text", keys))) is not None:
        known: Array = found[output]
        return known
    preparer = bundle.text()
    if len(keys) <= CHUNK:
        found = yield Call("text", preparer.prepare(keys), keys)
        rows: Array = found[output]
        return rows
    order = np.argsort([preparer.length(text, index) for index, text in enumerate(keys)], kind="stable")
    many = np.empty((len(keys), bundle.dim), np.float32)
    for start in range(0, len(keys), CHUNK):
        chosen = order[start : start + CHUNK]
        group = tuple(keys[i] for i in chosen)
        found = yield Call("text", preparer.prepare(group), group)
        many[chosen] = found[output]
    return many


def labels(bundle: Bundle, classifier: Classifier) -> Flow[Array]:
    """-> float32 [C, D] unit rows: per label the mean of its sentences' unit vectors, made unit again.

    ``classifier`` is a complete one, see `Classifier.over`. Time and memory grow with the number of distinct sentences
    at first use; afterwards the driver remembers the matrix by `Classifier.text_key`.
    """
    if found := (yield Recall(LABELS, (classifier.text_key,))):
        known: Array = found["vectors"][0]
        return known
    groups = [classifier.sentences(label) for label in classifier.labels]
    distinct = tuple(dict.fromkeys(sentence for group in groups for sentence in group))
    units = unit((yield from texts(bundle, distinct)))
    row = {sentence: index for index, sentence in enumerate(distinct)}
    vectors = unit(_means(units, [[row[sentence] for sentence in group] for group in groups]))
    yield Keep(LABELS, classifier.text_key, {"vectors": vectors}, len(vectors))
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
    """Of each group of rows; all at once where, as nearly always, there are as many in each."""
    if len({len(group) for group in groups}) > 1:
        return np.stack([rows[[*group]].mean(axis=0) for group in groups])
    means: Array = rows[np.array(groups)].mean(axis=1)
    return means
