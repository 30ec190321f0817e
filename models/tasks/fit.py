"""Labelled pictures -> a classifier with a head that is fitted to them (`calmclip.models.heads.Head.fit`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.heads import HEADS, Examples, Head, named, params_of
from calmclip.models.labels import check_distinct
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.features import picture


@dataclass(frozen=True)
class FitRequest:
    """``truth``: for each picture the index of its label in the classifier's labels. ``head``: a head with `fit`."""

    images: Sequence[Picture]
    truth: Sequence[int]
    classifier: Classifier
    head: str
    params: Mapping[str, Any] = field(default_factory=dict)


def fit(bundle: Bundle, request: FitRequest) -> Flow[Classifier]:
    """The classifier with the fitted head; it has the bundle's family.

    Raises as `fit_vectors` before it decodes a picture, and the `InputError`s of pictures and texts.
    """
    prepare(bundle, request.classifier, request.head, request.params, request.truth)
    rows = []
    for image in request.images:
        rows.append((yield from picture(bundle, image)))
    image = np.concatenate(rows)
    return (yield from fit_vectors(bundle, request.classifier, request.head, request.params, image, request.truth))


def fit_vectors(
    bundle: Bundle, classifier: Classifier, name: str, params: Mapping[str, Any], image: Array, truth: Sequence[int]
) -> Flow[Classifier]:
    """As `fit`, from picture vectors: image float32 [N, D], unit rows.

    Raises `BadRequest` for a head that does not exist or has no `fit`, for wrong params, fewer than two labels, or a
    label without a picture; and what the head's `fit` raises.
    """
    head, checked, classifier = prepare(bundle, classifier, name, params, truth)
    assert head.fit is not None  # `prepare` checks it
    text = yield from label_vectors(bundle, classifier)
    assets = dict(head.fit(Examples(image, np.asarray(truth, np.int64), classifier.labels, text), checked))
    fitted = replace(
        classifier, head=name, params=checked.model_dump(), assets=assets, columns=None, family=bundle.family
    )
    _ = fitted.bound  # raises now if the assets do not fit
    return fitted


def prepare(
    bundle: Bundle, classifier: Classifier, name: str, params: Mapping[str, Any], truth: Sequence[int]
) -> tuple[Head[Any], FrozenModel, Classifier]:
    """The head, its checked params, and the complete classifier with the bundle's head. Raises as `fit_vectors`."""
    bundle.require("classify")
    head = named(name)
    if head.fit is None:
        able = [other for other in HEADS.names() if HEADS.get(other).fit]
        raise BadRequest(f"the head {name!r} has nothing to fit; those that do: {', '.join(able) or 'none'}")
    checked = params_of(name, params)
    complete = bundle.classifier_for(replace(classifier, head=None, params={}, assets={}, columns=None))
    labels = complete.labels
    check_distinct(labels)
    if len(labels) < 2 or not len(truth):
        raise BadRequest(
            f"there are {len(labels)} labels and {len(truth)} pictures; "
            "expected at least 2 labels, and pictures of them"
        )
    shown = set(truth)
    if lacking := [label for index, label in enumerate(labels) if index not in shown]:
        others = f", nor have {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise BadRequest(
            f"the label {lacking[0]!r} has no picture{others}; "
            f"expected at least one for each of the {len(labels)} labels"
        )
    return head, checked, complete
