"""Pictures whose labels are known -> a classifier whose head is fitted to them.

What is fitted and how is the head's, see `calmclip.models.heads.Head.fit`; here pictures become vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel, explain
from calmclip.models.classifier import Classifier, check_distinct, require_labels
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.heads import HEADS, Examples, Head, named
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.features import picture


@dataclass(frozen=True)
class FitRequest:
    """``truth``: for each picture the place of its label among the classifier's. ``head``: one that can be fitted."""

    images: Sequence[Picture]
    truth: Sequence[int]
    classifier: Classifier
    head: str
    params: Mapping[str, Any] = field(default_factory=dict)


def fit(bundle: Bundle, request: FitRequest) -> Flow[Classifier]:
    """The classifier with the fitted head; it belongs to the bundle's family.

    Raises what `fit_vectors` raises, before a picture is looked at, and the `InputError`s of pictures and texts.
    """
    head, params, classifier = prepare(bundle, request.classifier, request.head, request.params, len(request.images))
    rows = []
    for image in request.images:
        rows.append((yield from picture(bundle, image)))
    return (yield from _fitted(bundle, classifier, request.head, head, params, np.concatenate(rows), request.truth))


def fit_vectors(
    bundle: Bundle, classifier: Classifier, name: str, given: Mapping[str, Any], image: Array, truth: Sequence[int]
) -> Flow[Classifier]:
    """The same of vectors that are there already: image float32 [N, D], unit rows.

    Raises `BadRequest` for a head that does not exist or is not fitted, params that are not its own, fewer than two
    labels, no pictures; and what the head's `fit` raises.
    """
    head, params, classifier = prepare(bundle, classifier, name, given, len(image))
    return (yield from _fitted(bundle, classifier, name, head, params, image, truth))


def prepare(
    bundle: Bundle, classifier: Classifier, name: str, given: Mapping[str, Any], count: int
) -> tuple[Head[Any], FrozenModel, Classifier]:
    """The head, its checked params, and the classifier without a head, complete. Raises as `fit_vectors`."""
    bundle.require("classify")
    head = named(name)
    if head.fit is None:
        able = [other for other in HEADS.names() if HEADS.get(other).fit]
        raise BadRequest(f"the head {name!r} has nothing to fit; those that do: {', '.join(able) or 'none'}")
    try:
        params = head.params.model_validate(dict(given))
    except ValidationError as error:
        raise BadRequest(f"head {name!r}: params {dict(given)}: {explain(error)}") from None
    own = replace(classifier, head=None, params={}, assets={}, columns=None).over(bundle.classifier)
    require_labels(own.labels)
    check_distinct(own.labels)
    if len(own.labels) < 2 or not count:
        raise BadRequest(
            f"there are {len(own.labels)} labels and {count} pictures; expected at least 2 labels, and pictures of them"
        )
    return head, params, own


def _fitted(
    bundle: Bundle,
    classifier: Classifier,
    name: str,
    head: Head[Any],
    params: FrozenModel,
    image: Array,
    truth: Sequence[int],
) -> Flow[Classifier]:
    assert head.fit is not None
    text = yield from label_vectors(bundle, classifier)
    assets = dict(head.fit(Examples(image, np.asarray(truth, np.int64), classifier.labels, text), params))
    family = bundle.family
    found = replace(
        classifier, head=name, params=params.model_dump(), assets=assets, columns=None, family=family
    )  # fmt: skip
    _ = found.bound  # what it cannot use is said now
    return found
