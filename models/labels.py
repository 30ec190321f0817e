"""Rules for the labels, templates and descriptions of a classifier, and for its two numbers.

Each ``check_*`` raises `BadRequest`, unless it names another error. The manifest and the service's schemas read the
types; the service passes its limits to `check_sizes`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from calmclip.models.errors import BadRequest, TooManyLabels
from calmclip.models.flow import Array

MAX_CHARACTERS = 1000  # of a label, template or description; no text tower reads more
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
# A temperature is fitted to so many pictures (figures of tests/bench/temperatures.py). With 100 its logarithm deviates
# by .05 to .2, and its median is at most 1.12 times too large; with 10 by .14 to .36, and 1.2 to 2.7 times. It divides
# every score, so every label has a say: 2 pictures, because a request of 256 pictures should do for 128 labels.
MIN_PICTURES, MIN_PER_LABEL = 100, 2

Template = Annotated[str, Field(pattern=r"\{\}")]
Temperature = Annotated[
    float,
    Field(
        ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, description="divides the logits; above 1 the scores are less confident"
    ),
]
NoneBelow = Annotated[float, Field(gt=0, le=1, description="if every score is lower, none of the labels fits")]


def require_labels(labels: Sequence[str]) -> None:
    """Raises `TooManyLabels` if there are none."""
    if not labels:
        raise TooManyLabels("no labels were given; expected at least one, for example 'a cat'")


def listed(name: str, texts: Iterable[str]) -> list[str]:
    """``texts`` as a list. A text where a list of texts belongs is an error, and so is an entry that is no text."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise BadRequest(f"{name} is {_shown(texts)}; expected a list of texts")
    entries = list(texts)
    for index, text in enumerate(entries):
        if not isinstance(text, str):
            raise BadRequest(f"{name} has {_shown(text)} at {index}; expected texts alone")
    return entries


def _shown(value: object) -> str:
    """A value in an error: a text with its start, else its type."""
    return f"the text {value[:40]!r}" if isinstance(value, str) else f"a value of the type {type(value).__name__}"


def check_texts(labels: Sequence[str], templates: Sequence[str], descriptions: Mapping[str, Sequence[str]]) -> None:
    """Labels and sentences are not empty, templates hold a ``{}`` for the label, descriptions are of labels.

    Without labels, which the bundle then has, descriptions may be of any label.
    """
    listed("labels", labels)
    listed("templates", templates)
    for index, label in enumerate(labels):
        if not label.strip():
            raise BadRequest(f"label {index} is empty; expected some words")
    for template in templates:
        if "{}" not in template:
            raise BadRequest(f"the template {template[:200]!r} has no '{{}}' where the label belongs")
    for label, sentences in descriptions.items():
        if labels and label not in labels:
            raise BadRequest(f"there are descriptions of {label[:200]!r}, which is none of the {len(labels)} labels")
        if isinstance(sentences, str) or not sentences or not all(sentence.strip() for sentence in sentences):
            raise BadRequest(f"the descriptions of {label[:200]!r} are {sentences!r}; expected a list of sentences")


def check_label_vectors(labels: Sequence[str], vectors: Mapping[str, Array]) -> None:
    """There are none, or for each label some rows [N, d] of finite numbers, all of one d."""
    if not vectors:
        return
    if stray := [label for label in vectors if label not in labels]:
        raise BadRequest(f"there are label vectors of {stray[0][:200]!r}, which is none of the {len(labels)} labels")
    if bare := [label for label in labels if label not in vectors]:
        raise BadRequest(f"the label {bare[0][:200]!r} has no label vectors; expected some for each label, or for none")
    first = vectors[labels[0]]
    for label in labels:
        rows, name = vectors[label], f"the label vectors of {label[:200]!r}"
        if rows.ndim != 2 or not rows.size:
            raise BadRequest(f"{name} have the shape {list(rows.shape)}; expected at least one row of numbers")
        if not np.isfinite(rows).all():
            raise BadRequest(f"{name} hold NaN or infinity; expected finite numbers of float32")
        if rows.shape[1] != first.shape[-1]:
            raise BadRequest(
                f"{name} have {rows.shape[1]} numbers, those of {labels[0][:200]!r} {first.shape[-1]}; expected as many"
            )


def check_distinct(labels: Sequence[str]) -> None:
    """A repeated label is an error, because each label of a stored classifier is one column of its head."""
    label, times = Counter(labels).most_common(1)[0] if labels else ("", 1)
    if times > 1:
        raise BadRequest(f"the label {label!r} is given twice; expected each once")


def check_sizes(
    labels: Sequence[str],
    templates: Sequence[str],
    descriptions: Mapping[str, Sequence[str]],
    *,
    max_labels: int,
    max_templates: int,
) -> None:
    """Limits on numbers and on lengths; ``max_templates`` also limits the descriptions of one label.

    No labels are allowed: the caller's classifier or the bundle may have some. Raises `TooManyLabels`, `BadRequest`.
    """
    if len(labels) > max_labels:
        raise TooManyLabels(f"{len(labels)} labels were given; at most {max_labels} are read at once")
    if len(templates) > max_templates:
        raise BadRequest(f"{len(templates)} templates were given; at most {max_templates} are read at once")
    for label, sentences in descriptions.items():
        if len(sentences) > max_templates:
            raise BadRequest(
                f"{len(sentences)} descriptions of {label[:200]!r} were given; at most {max_templates} are read"
            )
    described = (("description", sentences) for sentences in descriptions.values())
    for kind, texts in (("label", labels), ("template", templates), *described):
        for index, text in enumerate(texts):
            check_length(f"{kind} {index}", text)


def check_length(name: str, text: str) -> None:
    """``name`` begins the message."""
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"{name} has {len(text)} characters; at most {MAX_CHARACTERS} are read")


def check_temperature(temperature: float) -> None:
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise BadRequest(f"temperature is {temperature}; expected {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")


def check_none_below(none_below: float | None) -> None:
    if none_below is not None and not 0 < none_below <= 1:
        raise BadRequest(f"none_below is {none_below}; expected over 0, at most 1")
