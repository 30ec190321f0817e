"""/v1/classifiers: classifiers registered once, named by classify and detect. Files are written in a thread."""

import asyncio
from collections.abc import Sequence

from calmclip.models.errors import BadRequest
from calmclip.models.tasks.calibrate import CalibrateRequest, calibrate
from calmclip.models.tasks.fit import FitRequest, fit
from calmclip.service.asked import Asked
from calmclip.service.classifiers import Registered
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.schemas import (
    CalibrateBody,
    ClassifierAnswer,
    ClassifierBody,
    ClassifiersAnswer,
    FitBody,
    KnownPicture,
    NewName,
)

MISSING = "classifier-not-found"
TAGS = ("classifiers",)
SHOWN = [{"image": {"b64": PIXEL}, "label": "cat"}, {"image": {"b64": PIXEL}, "label": "dog"}]


@Endpoint(
    "GET",
    "/v1/classifiers",
    task="classifiers",
    scope="read",
    summary="All classifiers",
    tags=TAGS,
    answer=ClassifiersAnswer,
)
async def list_classifiers(asked: Asked[None]) -> ClassifiersAnswer:
    return ClassifiersAnswer(classifiers=[ClassifierAnswer.of(one) for one in asked.parts.classifiers.all()])


@Endpoint(
    "PUT",
    "/v1/classifiers/{name}",
    task="classifiers",
    scope="write",
    summary="Register a classifier",
    description="A change counts the version up; the same content again does not.",
    tags=TAGS,
    body=ClassifierBody,
    example={"labels": ["cat", "dog"], "templates": ["a photo of a {}."]},
    answer=ClassifierAnswer,
    problems=(*INPUT, "too-many-labels", "overloaded"),
)
async def put_classifier(asked: Asked[ClassifierBody], name: NewName) -> ClassifierAnswer:
    new = asked.body.classifier()
    return ClassifierAnswer.of(await asyncio.to_thread(asked.parts.classifiers.put, name, new))


@Endpoint(
    "POST",
    "/v1/classifiers/{name}/calibrate",
    task="classifiers",
    scope="write",
    summary="Set its temperature by pictures whose labels are known",
    description="With one bundle, to whose family the temperature belongs: the scores of another stay as they are.",
    tags=TAGS,
    body=CalibrateBody,
    example={"items": SHOWN[:1]},
    answer=ClassifierAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, MISSING, "classifier-bundle-mismatch", "text-too-long"),
)
async def calibrate_classifier(asked: Asked[CalibrateBody], name: str) -> ClassifierAnswer:
    known = asked.parts.classifiers.get(name)
    loaded = asked.bundle(asked.body.model, "classify")
    truth = _truth(asked, known, asked.body.items)
    request = CalibrateRequest([item.image for item in asked.body.items], truth, known.classifier)
    temperature = await asked.run(loaded, calibrate(loaded.bundle, request))
    family = loaded.bundle.family
    change = asked.parts.classifiers.change
    return ClassifierAnswer.of(await asyncio.to_thread(change, known, temperature=temperature, family=family))


@Endpoint(
    "POST",
    "/v1/classifiers/{name}/fit",
    task="classifiers",
    scope="write",
    summary="Fit its head to pictures whose labels are known",
    description="With one bundle, to whose family the classifier then belongs; with others it is a 409.",
    tags=TAGS,
    body=FitBody,
    example={"head": "prototype", "items": SHOWN},
    answer=ClassifierAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, MISSING, "text-too-long"),
)
async def fit_classifier(asked: Asked[FitBody], name: str) -> ClassifierAnswer:
    body, known = asked.body, asked.parts.classifiers.get(name)
    loaded = asked.bundle(body.model, "classify")
    truth = _truth(asked, known, body.items)
    request = FitRequest([item.image for item in body.items], truth, known.classifier, body.head, body.params)
    new = await asked.run(loaded, fit(loaded.bundle, request))
    changed = {key: getattr(new, key) for key in ("head", "params", "assets", "columns", "family")}
    return ClassifierAnswer.of(
        await asyncio.to_thread(asked.parts.classifiers.change, known, **changed, temperature=1.0)
    )


@Endpoint(
    "GET",
    "/v1/classifiers/{name}",
    task="classifiers",
    scope="read",
    summary="One classifier",
    tags=TAGS,
    answer=ClassifierAnswer,
    problems=(MISSING,),
)
async def get_classifier(asked: Asked[None], name: str) -> ClassifierAnswer:
    return ClassifierAnswer.of(asked.parts.classifiers.get(name))


@Endpoint(
    "DELETE",
    "/v1/classifiers/{name}",
    task="classifiers",
    scope="write",
    summary="Forget a classifier",
    tags=TAGS,
    status=204,
    problems=(MISSING, "overloaded"),
)
async def delete_classifier(asked: Asked[None], name: str) -> None:
    await asyncio.to_thread(asked.parts.classifiers.delete, name)


def _truth(asked: Asked[CalibrateBody] | Asked[FitBody], known: Registered, items: Sequence[KnownPicture]) -> list[int]:
    """The place of each item's label among the classifier's. Raises `BadRequest` and what pictures are wrong with."""
    if len(items) > (most := asked.limits.texts):
        raise BadRequest(f"{len(items)} items were given; at most {most} are read at once")
    place = {label: index for index, label in enumerate(known.classifier.labels)}
    for index, item in enumerate(items):
        if item.label not in place:
            raise BadRequest(f"the label {item.label[:100]!r} of item {index} is not in classifier {known.name!r}")
        asked.check(item.image, f"item {index}")
    return [place[item.label] for item in items]
