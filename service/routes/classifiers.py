"""/v1/classifiers: register classifiers for use by classify and detect. Files are written in a thread."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.heads import named
from calmclip.models.labels import MIN_PER_LABEL, MIN_PICTURES, require_labels
from calmclip.models.tasks.calibrate import CalibrateRequest, calibrate
from calmclip.models.tasks.fit import FitRequest, Fitted, fit, fit_vectors
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.routes import check_count
from calmclip.service.routes.collections import bundle_of, open_collection, timed
from calmclip.service.schemas import NewName
from calmclip.service.schemas.classifiers import (
    CalibrateBody,
    CalibratedAnswer,
    ClassifierAnswer,
    ClassifierBody,
    ClassifiersAnswer,
    FitBody,
    FittedAnswer,
    KnownPicture,
)

MISSING = "classifier-not-found"
EXAMPLES = [{"image": {"b64": PIXEL}, "label": "cat"}, {"image": {"b64": PIXEL}, "label": "dog"}]
_endpoint = partial(Endpoint, task="classifiers", tags=("classifiers",))


@_endpoint(
    "GET",
    "/v1/classifiers",
    scope="read",
    summary="All classifiers, and the methods of a fit",
    answer=ClassifiersAnswer,
)
async def list_classifiers(asked: Asked[None]) -> ClassifiersAnswer:
    return ClassifiersAnswer.of(asked.parts.classifiers.all())


@_endpoint(
    "PUT",
    "/v1/classifiers/{name}",
    summary="Register a classifier",
    description="A change increments the version; the same content again does not.",
    body=ClassifierBody,
    example={"labels": ["cat", "dog"], "templates": ["a photo of a {}."]},
    answer=ClassifierAnswer,
    problems=(*INPUT, "too-many-labels", "overloaded"),
)
async def put_classifier(asked: Asked[ClassifierBody], name: NewName) -> ClassifierAnswer:
    new = asked.body.classifier()
    return ClassifierAnswer.of(await asyncio.to_thread(asked.parts.classifiers.put, name, new))


@_endpoint(
    "POST",
    "/v1/classifiers/{name}/calibrate",
    summary="Set its temperature from labelled pictures",
    description=f"Uses one bundle. The temperature applies to the bundle's family; scores of others do not change. It "
    f"takes at least {MIN_PICTURES} pictures in all and {MIN_PER_LABEL} of each label.",
    body=CalibrateBody,
    example={"items": EXAMPLES * (MIN_PICTURES // len(EXAMPLES))},
    answer=CalibratedAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, MISSING, "classifier-bundle-mismatch", "text-too-long"),
)
async def calibrate_classifier(asked: Asked[CalibrateBody], name: str) -> CalibratedAnswer:
    registered = asked.parts.classifiers.get(name)
    loaded = asked.bundle(asked.body.model, "classify")
    classifier = registered.classifier
    request = CalibrateRequest(*_pictures(asked, asked.body.items, classifier.labels), classifier)
    fitted = await asked.run(loaded, calibrate(loaded.bundle, request))
    change = partial(asked.parts.classifiers.change, registered)
    changed = await asyncio.to_thread(change, temperature=fitted.temperature, family=loaded.bundle.family)
    return CalibratedAnswer.of_fit(changed, fitted)


@_endpoint(
    "POST",
    "/v1/classifiers/{name}/fit",
    summary="Fit a classifier to labelled pictures or to a collection",
    description="Makes the classifier under this name. Uses one bundle; the classifier belongs to its family, and with "
    "other bundles it is a 409. In a form every file is a picture, and the name of its field is its label.",
    body=FitBody,
    example={"method": "prototype", "items": EXAMPLES, "replace": True},
    answer=FittedAnswer,
    problems=(
        *ENGINE, *INPUT, *PICTURE, "too-many-labels", "text-too-long", "extra-missing", "classifier-exists",
        "store-unavailable", "collection-not-found", "collection-damaged", "collection-bundle-mismatch",
    ),
)  # fmt: skip
async def fit_classifier(asked: Asked[FitBody], name: NewName) -> FittedAnswer:
    body, classifiers = asked.body, asked.parts.classifiers
    if not body.replace:  # known before the pictures are read, and again when the classifier is written
        classifiers.require_free(name)
    if len(body.words) > (most := asked.limits.words):
        raise BadRequest(f"{len(body.words)} words were given; at most {most} are read at once")
    fitted, skipped = await (_of_collection if body.collection else _of_pictures)(asked)
    store = partial(classifiers.store, name, fitted.classifier, fitted.report, replace=body.replace)
    return FittedAnswer.of_fit(await asyncio.to_thread(store), skipped)


@_endpoint(
    "GET",
    "/v1/classifiers/{name}",
    scope="read",
    summary="One classifier",
    answer=ClassifierAnswer,
    problems=(MISSING,),
)
async def get_classifier(asked: Asked[None], name: str) -> ClassifierAnswer:
    return ClassifierAnswer.of(asked.parts.classifiers.get(name))


@_endpoint(
    "DELETE", "/v1/classifiers/{name}", summary="Delete a classifier", status=204, problems=(MISSING, "overloaded")
)
async def delete_classifier(asked: Asked[None], name: str) -> None:
    await asyncio.to_thread(asked.parts.classifiers.delete, name)


async def _of_pictures(asked: Asked[FitBody]) -> tuple[Fitted, int]:
    """-> what was fitted, and 0 items that were left out."""
    body = asked.body
    head = named(body.method)
    loaded = asked.bundle(body.model, head.fit.task if head.fit else "classify")
    classifier = _classifier(asked, body.labels or [*dict.fromkeys(item.label for item in body.items)])
    captions = [item.caption for item in body.items]
    if any(captions) and None in captions:
        raise BadRequest(f"item {captions.index(None)} has no caption; expected one for each item, or none")
    check_count(asked, len(body.unlabelled), "pictures without a label")
    for index, image in enumerate(body.unlabelled):
        asked.check(image, f"picture {index} without a label")
    request = FitRequest(
        *_pictures(asked, body.items, classifier.labels),
        classifier,
        body.method,
        body.params,
        captions=[caption for caption in captions if caption is not None],
        validation=_pictures(asked, body.validation, classifier.labels, "validation") if body.validation else None,
        augment=body.augment,
        unlabelled=body.unlabelled,
        words=body.words,
    )
    return await asked.run(loaded, fit(loaded.bundle, request)), 0


async def _of_collection(asked: Asked[FitBody]) -> tuple[Fitted, int]:
    """-> what was fitted, and the number of items that were left out."""
    body = asked.body
    assert body.collection is not None
    assert body.label is not None
    collection = await open_collection(asked, body.collection)
    loaded = bundle_of(collection, asked, body.model)
    if (dim := collection.info.dim) < loaded.bundle.dim:
        raise BadRequest(
            f"the collection {body.collection!r} holds the first {dim} of {loaded.bundle.dim} numbers; a classifier "
            "needs all of them, so fit it to a collection without `dimensions`, or to pictures"
        )
    async with timed(asked, "search"):
        labelled = await collection.labelled(body.label, asked.limits.fit_items)
    classifier = _classifier(asked, body.labels or sorted(set(labelled.labels)))
    positions = {label: index for index, label in enumerate(classifier.labels)}
    rows = [row for row, label in enumerate(labelled.labels) if label in positions]
    skipped = labelled.others + len(labelled.labels) - len(rows)
    truth = [positions[labelled.labels[row]] for row in rows]
    fitted = await asked.run(
        loaded,
        fit_vectors(
            loaded.bundle, classifier, body.method, body.params, labelled.vectors[rows], truth, words=body.words
        ),
    )
    if not skipped:
        return fitted, 0
    note = f"{skipped} items of the collection have no label of these under {body.label!r} and were left out"
    return replace(fitted, report=replace(fitted.report, notes=(*fitted.report.notes, note))), skipped


def _classifier(asked: Asked[FitBody], labels: Sequence[str]) -> Classifier:
    """Raises `TooManyLabels`, `BadRequest`."""
    body = asked.body
    require_labels(labels)
    asked.parts.classifiers.check_sizes(labels, body.templates, body.descriptions)
    descriptions = {label: tuple(lines) for label, lines in body.descriptions.items()}
    return Classifier(tuple(labels), tuple(body.templates), descriptions)


def _pictures(
    asked: Asked[Any], items: Sequence[KnownPicture], labels: Sequence[str], name: str = "item"
) -> tuple[list[bytes], list[int]]:
    """The pictures, and the position of each picture's label in ``labels``. Raises `InputError`s."""
    check_count(asked, len(items), f"{name}s")
    positions = {label: index for index, label in enumerate(labels)}
    for index, item in enumerate(items):
        if item.label not in positions:
            raise BadRequest(f"the label {item.label[:100]!r} of {name} {index} is none of the {len(labels)} labels")
        asked.check(item.image, f"{name} {index}")
    return [item.image for item in items], [positions[item.label] for item in items]
