"""`Classifier`: labels, their sentences, and the head that scores pictures against them, as one value.

A bundle has at most one, its default. A service registers any number. A request names one, or has its own labels and
templates; the bundle's default supplies the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, TypeVar

from calmclip.models.errors import BadRequest, ClassifierMismatch, TaskNotServed
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import BoundHead
from calmclip.models.labels import check_label_vectors, check_none_below, check_temperature, check_texts, listed

T = TypeVar("T")


def fill(template: str, label: str) -> str:
    """``template`` with its ``{}`` replaced. Not by `str.format`: a label may hold braces."""
    return template.replace("{}", label)


@dataclass(frozen=True)
class Classifier:
    """``templates`` (with a ``{}`` each) make the sentences of a label; the label's vector is the mean of their unit
    vectors. ``descriptions`` (label -> sentences) replace the templates for their labels.

    ``head`` names a plug-in of the family heads; ``params`` and ``assets`` are the head's own; ``columns``: the labels
    of its columns, None: ``labels``. ``temperature`` divides the logits: above 1 the scores are less confident (Guo et
    al. 2017, arXiv 1706.04599). ``none_below``: if every score is lower, none of the labels fits (Ming et al. 2022,
    arXiv 2211.13445); None: no such test.

    ``family``: the bundles that it was fitted or calibrated for; None: any bundle. The float and the INT8 bundle of one
    export have the same family.

    Raises `BadRequest` as `check_texts`, and for a temperature or threshold out of range.
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
    label_vectors: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_texts(self.labels, self.templates, self.descriptions)
        check_label_vectors(self.labels, self.label_vectors)
        check_temperature(self.temperature)
        check_none_below(self.none_below)

    def with_defaults(self, default: "Classifier") -> "Classifier":
        """Labels, templates and head, where this classifier has none, come from ``default``, the bundle's."""
        if default is self:
            return self
        filled: dict[str, Any] = {}
        if not self.labels:
            filled |= {"labels": default.labels, "descriptions": {**default.descriptions, **self.descriptions}}
        if not self.templates and default.templates:
            filled["templates"] = default.templates
        if self.head is None and default.head is not None:
            filled |= {"head": default.head, "params": default.params, "assets": default.assets}
            filled["columns"] = default.columns or default.labels
        return replace(self, **filled)._bound_as(default if "head" in filled else self) if filled else self

    def for_request(
        self,
        labels: Sequence[str] = (),
        templates: Sequence[str] = (),
        descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> "Classifier":
        """With the labels, templates and descriptions of a request, if it has some. Its templates replace the
        descriptions of the classifier, and its own descriptions are added last. The head keeps its columns, so it finds
        each requested label by name. Raises `BadRequest`."""
        labels, templates = listed("labels", labels), listed("templates", templates)
        if not labels and not templates and not descriptions:
            return self
        changed: dict[str, Any] = {"columns": self.columns or self.labels}
        if labels:
            changed |= {"labels": tuple(labels), "descriptions": _of(labels, self.descriptions)}
            changed["label_vectors"] = _of(labels, self.label_vectors)
            if self.label_vectors and not changed["label_vectors"]:
                raise BadRequest(
                    f"none of the {len(labels)} labels has label vectors; expected labels of the classifier"
                )
        if self.label_vectors and (templates or descriptions):
            given = "templates" if templates else "descriptions"
            raise BadRequest(f"the classifier has label vectors in place of sentences; leave out `{given}`")
        if templates:
            changed |= {"templates": tuple(templates), "descriptions": {}}
        if descriptions:
            changed["descriptions"] = {**changed.get("descriptions", self.descriptions), **_lines(descriptions)}
        return replace(self, **changed)._bound_as(self)

    def without_descriptions(self) -> "Classifier":
        """The same labels, which their templates alone describe."""
        return replace(self, columns=self.columns or self.labels, descriptions={})._bound_as(self)

    def _bound_as(self, other: "Classifier") -> "Classifier":
        """Share the bound head of ``other``, which is the same: binding takes time."""
        if "bound" in other.__dict__:
            self.__dict__["bound"] = other.bound
        return self

    @cached_property
    def bound(self) -> BoundHead:
        """The head, ready to score. Raises `BadRequest` as `BoundHead`; `TaskNotServed` if there is no head."""
        if self.head is None:
            raise TaskNotServed("the bundle has no head, so it scores no labels")
        return BoundHead(self.head, self.params, self.assets, self.columns or self.labels)

    @cached_property
    def text_key(self) -> str:
        """A fingerprint of what a label's vector is made of: labels, templates, descriptions, label vectors."""
        texts = repr((self.labels, self.templates, sorted(self.descriptions.items())))
        digest = blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=16)
        for label in self.labels if self.label_vectors else ():
            rows = self.label_vectors[label]
            digest.update(repr(rows.shape).encode() + rows.tobytes())
        return digest.hexdigest()

    def sentences(self, label: str) -> tuple[str, ...]:
        """The sentences of ``label``, at least one."""
        return self.descriptions.get(label) or tuple(fill(template, label) for template in self.templates) or (label,)

    def temperature_for(self, family: str) -> float:
        """1 for another family of bundles: a temperature holds only for the family that it was calibrated on."""
        return self.temperature if self.family in (None, family) else 1.0

    def require_family(self, family: str, bundle: str) -> None:
        """Raises `ClassifierMismatch` if the head was fitted to vectors of another family."""
        if self.assets and self.family not in (None, family):
            raise ClassifierMismatch(
                f"the classifier was fitted to vectors of the family {str(self.family)[:12]}…; bundle "
                f"{bundle!r} is of the family {family[:12]}…. Use a bundle of that family, or fit it again"
            )

    def require_sentences(self, field: str) -> None:
        """Raises `BadRequest`, which names the ``field`` of the request, for a head with arrays of its own: it scores
        pictures against these, so other sentences for a label do not change its scores."""
        if self.label_vectors:
            raise BadRequest(
                f"the classifier has label vectors in place of sentences; {field} needs sentences. Leave out `{field}`"
            )
        if self.assets:
            raise BadRequest(
                f"the head {self.head!r} scores pictures by arrays of its own; {field} needs a head that compares them "
                f"with sentences, such as 'cosine' or 'sigmoid'. Leave out `{field}`, or use another classifier"
            )


def _of(labels: Sequence[str], values: Mapping[str, T]) -> dict[str, T]:
    return {label: values[label] for label in labels if label in values}


def _lines(descriptions: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Raises `BadRequest` if the descriptions of a label are no list of texts."""
    return {
        label: tuple(listed(f"the list of descriptions of {label!r}", lines)) for label, lines in descriptions.items()
    }
