"""The part of a flow that classify and detect share: labels -> one unit vector each."""

from collections.abc import Sequence

import numpy as np

from models.bundle.bundle import Bundle
from models.errors import BadRequest, TooManyLabels
from models.flow import Array, Call, Flow
from models.prompts import fill


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


def embed_labels(bundle: Bundle, labels: Sequence[str], templates: Sequence[str] = ()) -> Flow[Array]:
    """-> float32 [C, D] unit rows: per label the mean of its sentences' unit vectors, made unit again.

    ``templates``, each with a ``{}``, replace the bundle's own prompts.
    """
    for template in templates:
        if "{}" not in template:
            raise BadRequest(f"the template {template!r} has no '{{}}' where the label belongs")
    sentences = [[fill(t, label) for t in templates] if templates else list(bundle.prompts(label)) for label in labels]
    flat = [sentence for group in sentences for sentence in group]
    distinct = list(dict.fromkeys(flat))
    found = yield Call("text", bundle.text().prepare(distinct), keys=tuple(distinct))
    units = unit(found[only_output(bundle, "text")])
    row = {sentence: index for index, sentence in enumerate(distinct)}
    means = [units[[row[s] for s in group]].mean(axis=0) for group in sentences]
    return unit(np.stack(means))


def only_output(bundle: Bundle, role: str) -> str:
    """The name of the graph's one output."""
    (name,) = bundle.graph(role).outputs
    return name
