"""The attributes of a picture, such as its background, are inferred; then each label is scored beside them.

Source: An et al. 2023 (arXiv 2308.01313), PerceptionCLIP. With the logits f of labels y, attribute values
z and a picture x:

    P(z|x) = sum_y exp(f(y, z; x) / tau), divided by its sum over z     `with_labels`
    P(z|x) = exp(f(z; x) / tau), divided by its sum over z              without labels
    P(y|x) = sum_z P(z|x) P(y|x, z)                                     P(y|x, z): the scores of the head

Several attributes are one composite attribute, the Cartesian product of their values. A calibrated temperature divides
f before all of this.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import product
from math import prod
from types import MappingProxyType

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier, fill
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.labels import check_length, listed
from calmclip.models.tasks.features import means

ANYTHING = "object"  # stands for the label in the sentences of an attribute alone, as in the paper
MAX_ATTRIBUTES, MAX_VALUES = 8, 1000
MIN_TAU = 0.01
MAX_SHOWN = 64  # the answer has the distribution over composites if there are at most so many


@dataclass(frozen=True)
class Attributes:
    """``values``: name -> values, such as {"background": ["on land", "on water"]}. The value "" adds nothing to a
    sentence. ``tau``: a larger value makes the inferred distribution flatter; infinity weighs all values equally.
    ``with_labels``: whether the labels enter the inference.

    Raises `BadRequest` for no attribute or more than `MAX_ATTRIBUTES`; for an attribute without a name, without
    values, or with more than `MAX_VALUES`; for a value that is blank or given twice; for tau below `MIN_TAU`.
    """

    values: Mapping[str, Sequence[str]]
    tau: float = 1.0
    with_labels: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise BadRequest(f"attributes is of the type {type(self.values).__name__}; expected names and values")
        if not 1 <= len(self.values) <= MAX_ATTRIBUTES:
            raise BadRequest(f"{len(self.values)} attributes were given; expected 1 to {MAX_ATTRIBUTES}")
        checked = {name: _checked(name, values) for name, values in self.values.items()}
        object.__setattr__(self, "values", MappingProxyType(checked))
        if not self.tau >= MIN_TAU:
            raise BadRequest(f"tau is {self.tau}; expected at least {MIN_TAU}")

    @property
    def count(self) -> int:
        """How many composites there are. They are not made for this."""
        return prod(map(len, self.values.values()))

    @cached_property
    def composites(self) -> tuple[tuple[str, ...], ...]:
        """Every choice of a value for each attribute; the last attribute changes first."""
        return tuple(product(*self.values.values()))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What each composite adds to a sentence."""
        return tuple(", ".join(filter(None, values)) for values in self.composites)

    def key(self, classifier: Classifier) -> str:
        """A fingerprint of the input of `vectors`."""
        texts = repr((classifier.text_key, self.texts, self.with_labels))
        return blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Inferred:
    """What the attributes of a picture probably are. ``marginals``: attribute -> value -> probability. ``composites``:
    each text with its probability, best first; None if there are more than `MAX_SHOWN`."""

    marginals: Mapping[str, Mapping[str, float]]
    composites: tuple[tuple[str, float], ...] | None = None


def check_sentences(classifier: Classifier, attributes: Attributes, most: int) -> None:
    """Raises `BadRequest` if the sentences of all labels with all composites are more than ``most``."""
    counts = {label: len(lines) for label, lines in classifier.descriptions.items()}
    sentences = sum(counts.get(label, max(len(classifier.templates), 1)) for label in classifier.labels)
    if (total := sentences * attributes.count) > most:
        raise BadRequest(
            f"{sentences} sentences of {len(classifier.labels)} labels, each with {attributes.count} attribute values, "
            f"are {total}; at most {most} are read at once. Send fewer values, labels or templates"
        )


def attributed(sentence: str, text: str) -> str:
    """ "a photo of a cat." and "on land" -> "a photo of a cat, on land." The empty text changes nothing."""
    if not text:
        return sentence
    body = sentence.removesuffix(".")
    return f"{body}, {text}{sentence[len(body) :]}"


def vectors(bundle: Bundle, classifier: Classifier, attributes: Attributes) -> Flow[Array]:
    """-> float32 [Z, C, D] unit rows: each label in each composite; without labels [Z, C + 1, D], `ANYTHING` last.

    Time and memory grow with Z x C and the number of templates at first use; then the driver caches the rows.
    """

    def groups() -> list[list[str]]:
        plain = [classifier.sentences(label) for label in classifier.labels]
        if not attributes.with_labels:
            plain.append(tuple(fill(template, ANYTHING) for template in classifier.templates) or (ANYTHING,))
        return [[attributed(sentence, text) for sentence in group] for text in attributes.texts for group in plain]

    rows = yield from means(bundle, attributes.key(classifier), groups)
    return rows.reshape(len(attributes.texts), -1, rows.shape[1])


def mixed(
    classifier: Classifier, attributes: Attributes, image: Array, text: Array, temperature: float
) -> tuple[Array, Array, Inferred]:
    """``image`` float32 [1, D] and ``text`` of `vectors` -> scores float64 [C], cosines float64 [C], attributes.

    The cosine of a label is the mean over the composites, weighted by P(z|x).
    """
    head, count = classifier.bound, len(classifier.labels)
    flat = text.reshape(-1, text.shape[2])
    labels = (*classifier.labels, ANYTHING)[: text.shape[1]] * len(text)
    logits = (head.logits(image, head.columns(labels, flat)) / np.float32(temperature)).reshape(text.shape[:2])
    tempered = logits.astype(np.float64) / attributes.tau
    evidence = _log_sum_exp(tempered) if attributes.with_labels else tempered[:, -1]
    weights = np.exp(evidence - _log_sum_exp(evidence))
    scores = weights @ head.scores(np.ascontiguousarray(logits[:, :count])).astype(np.float64)
    cosines = weights @ (image @ flat.T).reshape(text.shape[:2])[:, :count].astype(np.float64)
    return scores, cosines, inferred(attributes, weights)


def inferred(attributes: Attributes, weights: Array) -> Inferred:
    """``weights`` float64 [Z]: P(z|x) of the composites."""
    names, sizes = [*attributes.values], [*map(len, attributes.values.values())]
    grid = weights.reshape(sizes)
    axes = {name: tuple(other for other in range(len(names)) if other != axis) for axis, name in enumerate(names)}
    marginals = {
        name: dict(zip(attributes.values[name], grid.sum(axis=axes[name]).tolist(), strict=True)) for name in names
    }
    if attributes.count > MAX_SHOWN:
        return Inferred(marginals)
    order = np.argsort(-weights, kind="stable").tolist()
    return Inferred(marginals, tuple((attributes.texts[z], float(weights[z])) for z in order))


def _log_sum_exp(values: Array) -> Array:
    """Float64, over the last axis, with the maximum subtracted: plain powers overflow above 709."""
    highest = values.max(axis=-1, keepdims=True)
    total: Array = highest[..., 0] + np.log(np.exp(values - highest).sum(axis=-1))
    return total


def _checked(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """Raises `BadRequest`."""
    if not isinstance(name, str) or not name.strip():
        raise BadRequest(f"an attribute has the name {name!r}; expected some words")
    shown = f"the attribute {name[:200]!r}"
    texts = listed(shown, values)
    if not 1 <= len(texts) <= MAX_VALUES:
        raise BadRequest(f"{shown} has {len(texts)} values; expected 1 to {MAX_VALUES}, such as 'on land'")
    for index, text in enumerate(texts):
        check_length(f"{shown}: value {index}", text)
        if text and not text.strip():
            raise BadRequest(f"{shown}: value {index} is blank; expected some words, or '' for the sentence alone")
    value, times = Counter(texts).most_common(1)[0]
    if times > 1:
        raise BadRequest(f"{shown} has the value {value!r} twice; expected each once")
    return tuple(texts)
