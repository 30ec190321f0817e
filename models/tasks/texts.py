"""The part of a flow that classify and detect share: labels -> one unit vector each."""

from collections.abc import Sequence

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest, TooManyLabels
from calmclip.models.flow import Array, Call, Flow, Keep, Recall
from calmclip.models.prompts import fill

LABELS = "labels of text"  # where their finished vectors are kept


def unit(rows: Array) -> Array:
    """Rows divided by their Euclidean length; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    units: Array = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
    return units


def choose(bundle: Bundle, labels: Sequence[str]) -> tuple[str, ...]:
    """The caller's labels, or the bundle's own where there are none. Raises `TooManyLabels`, `BadRequest`."""
    if isinstance(labels, str):
        raise BadRequest(f"labels is the text {labels[:40]!r}; expected a list of texts")
    chosen = tuple(labels) or bundle.labels
    if not chosen:
        raise TooManyLabels("no labels were given; expected at least one, for example 'a cat'")
    for index, label in enumerate(chosen):
        if not label.strip():
            raise BadRequest(f"label {index} is empty; expected some words")
    return chosen


def embed_texts(bundle: Bundle, texts: Sequence[str]) -> Flow[Array]:
    """-> float32 [N, D], the text graph's rows. Texts that the driver remembers are not tokenized again."""
    keys = tuple(texts)
    found = yield Recall("text", keys)
    if found is None:
        found = yield Call("text", bundle.text().prepare(keys), keys)
    rows: Array = found[only_output(bundle, "text")]
    return rows


def embed_labels(bundle: Bundle, labels: Sequence[str], templates: Sequence[str] = ()) -> Flow[Array]:
    """-> float32 [C, D] unit rows: per label the mean of its sentences' unit vectors, made unit again.

    ``templates``, each with a ``{}``, replace the bundle's own prompts.
    """
    for template in templates:
        if "{}" not in template:
            raise BadRequest(f"the template {template!r} has no '{{}}' where the label belongs")
    key = repr((tuple(labels), tuple(templates)))
    if found := (yield Recall(LABELS, (key,))):
        known: Array = found["vectors"][0]
        return known
    vectors = yield from _embed_labels(bundle, labels, templates)
    yield Keep(LABELS, key, {"vectors": vectors}, len(vectors))
    return vectors


def _embed_labels(bundle: Bundle, labels: Sequence[str], templates: Sequence[str]) -> Flow[Array]:
    sentences = [[fill(t, label) for t in templates] if templates else list(bundle.prompts(label)) for label in labels]
    distinct = tuple(dict.fromkeys(sentence for group in sentences for sentence in group))
    units = unit((yield from embed_texts(bundle, distinct)))
    row = {sentence: index for index, sentence in enumerate(distinct)}
    return unit(_means(units, [[row[sentence] for sentence in group] for group in sentences]))


def _means(rows: Array, groups: Sequence[Sequence[int]]) -> Array:
    """Of each group of rows; all at once where, as nearly always, there are as many in each."""
    if len({len(group) for group in groups}) > 1:
        return np.stack([rows[[*group]].mean(axis=0) for group in groups])
    means: Array = rows[np.array(groups)].mean(axis=1)
    return means


def only_output(bundle: Bundle, role: str) -> str:
    """The name of the graph's one output."""
    (name,) = bundle.graph(role).outputs
    return name
