"""/v1/classifiers: register classifiers for use by classify and detect. Files are written in a thread."""

import asyncio
from functools import partial
from typing import Any

from calmclip.models.errors import BadRequest
from calmclip.models.labels import MIN_PER_LABEL, MIN_PICTURES
from calmclip.models.tasks.calibrate import CalibrateRequest, calibrate
from calmclip.models.tasks.fit import FitRequest, fit
from calmclip.service.asked import Asked
from calmclip.service.classifiers import Registered
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.routes import check_count
from calmclip.service.schemas import NewName
from calmclip.service.schemas.classifiers import (
    CalibrateBody,
    CalibratedAnswer,
    ClassifierAnswer,
    ClassifierBody,
    ClassifiersAnswer,
    FitBody,
)

MISSING = "classifier-not-found"
EXAMPLES = [{"image": {"b64": PIXEL}, "label": "cat"}, {"image": {"b64": PIXEL}, "label": "dog"}]
_endpoint = partial(Endpoint, task="classifiers", tags=("classifiers",))


@_endpoint("GET", "/v1/classifiers", scope="read", summary="All classifiers", answer=ClassifiersAnswer)
async def list_classifiers(asked: Asked[None]) -> ClassifiersAnswer:
    return ClassifiersAnswer(classifiers=[ClassifierAnswer.of(entry) for entry in asked.parts.classifiers.all()])


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
    request = CalibrateRequest(*_pictures(asked, registered), registered.classifier)
    fitted = await asked.run(loaded, calibrate(loaded.bundle, request))
    changed = await _change(asked, registered, temperature=fitted.temperature, family=loaded.bundle.family)
    return CalibratedAnswer.of_fit(changed, fitted)


@_endpoint(
    "POST",
    "/v1/classifiers/{name}/fit",
    summary="Fit its head to labelled pictures",
    description="Uses one bundle. The classifier then belongs to the bundle's family; with other bundles it is a 409.",
    body=FitBody,
    example={"head": "prototype", "items": EXAMPLES},
    answer=ClassifierAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, MISSING, "text-too-long"),
)
async def fit_classifier(asked: Asked[FitBody], name: str) -> ClassifierAnswer:
    body, registered = asked.body, asked.parts.classifiers.get(name)
    loaded = asked.bundle(body.model, "classify")
    request = FitRequest(*_pictures(asked, registered), registered.classifier, body.head, body.params)
    fitted = await asked.run(loaded, fit(loaded.bundle, request))
    changed = {key: getattr(fitted, key) for key in ("head", "params", "assets", "columns", "family")}
    return ClassifierAnswer.of(await _change(asked, registered, **changed, temperature=1.0))


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


def _pictures(asked: Asked[CalibrateBody] | Asked[FitBody], registered: Registered) -> tuple[list[bytes], list[int]]:
    """The pictures, and the position of each picture's label in the classifier. Raises `InputError`s."""
    items = asked.body.items
    check_count(asked, len(items), "items")
    positions = {label: index for index, label in enumerate(registered.classifier.labels)}
    for index, item in enumerate(items):
        if item.label not in positions:
            raise BadRequest(
                f"the label {item.label[:100]!r} of item {index} is not a label of classifier {registered.name!r}"
            )
        asked.check(item.image, f"item {index}")
    return [item.image for item in items], [positions[item.label] for item in items]


async def _change(asked: Asked[Any], registered: Registered, **changed: Any) -> Registered:
    return await asyncio.to_thread(asked.parts.classifiers.change, registered, **changed)
