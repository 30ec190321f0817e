"""`Classifier`: labels, the sentences that stand for them, and the head that scores pictures against them, as one
value.

A bundle carries at most one, as its default; a service registers any number; a request may name one, or say its own
labels and templates. Whatever it leaves open is the bundle's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

from calmclip.models.errors import BadRequest, ClassifierMismatch, TaskNotServed, TooManyLabels
from calmclip.models.flow import Arrays
from calmclip.models.heads import BoundHead

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0


def fill(template: str, label: str) -> str:
    """``template`` with its ``{}`` replaced. Not `str.format`: a label may hold braces, a template no code."""
    return template.replace("{}", label)


@dataclass(frozen=True)
class Classifier:
    """What pictures are told apart by.

    ``templates``, each with a ``{}``, make the sentences of a label, whose unit vectors are averaged; ``descriptions``
    (label -> sentences) take their place for the labels that have some. ``head`` names a plug-in of the family heads,
    ``params`` and ``assets`` are its own; ``columns``: the labels that its columns are, None: ``labels``.
    ``temperature`` divides the logits: over 1 the scores are less sure of themselves (Guo et al. 2017, arXiv
    1706.04599). ``none_below``: with no score of at least that, none of the labels fits (Ming et al. 2022, arXiv
    2211.13445); None: that is not asked.

    ``family``: of the bundles that it was made for, where it was fitted or calibrated; None: for any. Float and INT8
    bundles of one export are of one family.

    Raises `BadRequest`: a label or sentence that is empty, a template without ``{}``, a description of what is no
    label, a temperature or threshold out of range.
    """

    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    assets: Arrays = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    temperature: float = 1.0
    none_below: float | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        check_lists(self.labels, self.templates)
        check_labels(self.labels)
        check_templates(self.templates)
        check_descriptions(self.descriptions, self.labels)
        check_temperature(self.temperature)
        check_none_below(self.none_below)

    def over(self, default: "Classifier") -> "Classifier":
        """Complete: what this one leaves open is ``default``'s, which is a bundle's own."""
        if default is self:
            return self
        filled: dict[str, Any] = {}
        if not self.labels:
            filled |= {"labels": default.labels, "descriptions": {**default.descriptions, **self.descriptions}}
        if not self.templates and default.templates:
            filled["templates"] = default.templates
        if self.head is None and default.head is not None:
            own = {"head": default.head, "params": default.params, "assets": default.assets}
            filled |= own | {"columns": default.columns or default.labels}
        return replace(self, **filled)._bound_as(default if "head" in filled else self) if filled else self

    def asked(self, labels: Sequence[str] = (), templates: Sequence[str] = ()) -> "Classifier":
        """For one request, whose labels and templates win. The head keeps its columns, so one with columns of its own
        finds each label that is asked for by name. Raises `BadRequest`."""
        if not labels and not templates:
            return self
        check_lists(labels, templates)
        changed: dict[str, Any] = {"columns": self.columns or self.labels}
        if labels:
            chosen = tuple(labels)
            kept = {label: self.descriptions[label] for label in chosen if label in self.descriptions}
            changed |= {"labels": chosen, "descriptions": kept}
        if templates:
            changed |= {"templates": tuple(templates), "descriptions": {}}
        return replace(self, **changed)._bound_as(self)

    def _bound_as(self, other: "Classifier") -> "Classifier":
        """With the head that ``other`` has bound, for it is the same: to bind it for each request takes time."""
        if "bound" in other.__dict__:
            self.__dict__["bound"] = other.bound
        return self

    @cached_property
    def bound(self) -> BoundHead:
        """The head, ready to score. Raises `BadRequest`, see `BoundHead`; `TaskNotServed` where there is no head."""
        if self.head is None:
            raise TaskNotServed("the bundle has no head, so it scores no labels")
        return BoundHead(self.head, self.params, self.assets, self.columns or self.labels)

    @cached_property
    def text_key(self) -> str:
        """Stands for what decides the vectors of the labels: they, their templates and descriptions."""
        said = repr((self.labels, self.templates, sorted(self.descriptions.items())))
        return blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def sentences(self, label: str) -> tuple[str, ...]:
        """At least one."""
        return self.descriptions.get(label) or tuple(fill(template, label) for template in self.templates) or (label,)

    def temperature_for(self, family: str) -> float:
        """What was found for one family of bundles says nothing of another, whose scores stay as they are."""
        return self.temperature if self.family in (None, family) else 1.0

    def require_family(self, family: str, bundle: str) -> None:
        """Raises `ClassifierMismatch` where its head was fitted to vectors of other bundles."""
        if self.assets and self.family not in (None, family):
            raise ClassifierMismatch(
                f"the classifier was fitted to vectors of the family {str(self.family)[:12]}…; bundle "
                f"{bundle!r} is of the family {family[:12]}…. Ask with a bundle of that family, or fit it anew"
            )


def check_lists(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Raises `BadRequest` for a text where a list of texts belongs."""
    for name, given in (("labels", labels), ("templates", templates)):
        if isinstance(given, str):
            raise BadRequest(f"{name} is the text {given[:40]!r}; expected a list of texts")


def check_labels(labels: Sequence[str]) -> None:
    """Raises `BadRequest` for an empty label."""
    for index, label in enumerate(labels):
        if not label.strip():
            raise BadRequest(f"label {index} is empty; expected some words")


def check_distinct(labels: Sequence[str]) -> None:
    """Raises `BadRequest` for a label that is given twice: of a classifier that is kept, each is a column of its
    own."""
    if len({*labels}) < len(labels):
        seen: set[str] = set()
        repeated = next(label for label in labels if label in seen or seen.add(label))  # type: ignore[func-returns-value]
        raise BadRequest(f"the label {repeated!r} is given twice; expected each once")


def check_templates(templates: Sequence[str]) -> None:
    """Raises `BadRequest` for a template without a place for the label."""
    for template in templates:
        if "{}" not in template:
            raise BadRequest(f"the template {template[:200]!r} has no '{{}}' where the label belongs")


def check_descriptions(descriptions: Mapping[str, Sequence[str]], labels: Sequence[str]) -> None:
    """Raises `BadRequest` for descriptions of what is no label, or without words."""
    for label, sentences in descriptions.items():
        if labels and label not in labels:
            raise BadRequest(f"there are descriptions of {label[:200]!r}, which is none of the {len(labels)} labels")
        if isinstance(sentences, str) or not sentences or not all(sentence.strip() for sentence in sentences):
            raise BadRequest(f"the descriptions of {label[:200]!r} are {sentences!r}; expected a list of sentences")


def check_temperature(temperature: float) -> None:
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise BadRequest(f"temperature is {temperature}; expected {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")


def check_none_below(none_below: float | None) -> None:
    if none_below is not None and not 0 < none_below <= 1:
        raise BadRequest(f"none_below is {none_below}; expected over 0, at most 1")


def require_labels(labels: Sequence[str]) -> None:
    """Raises `TooManyLabels` where there are none."""
    if not labels:
        raise TooManyLabels("no labels were given; expected at least one, for example 'a cat'")
