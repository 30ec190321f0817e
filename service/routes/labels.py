"""/v1/label-sets: labels registered once, named by classify and detect. Files are written in a thread."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from calmclip.models.errors import BadRequest
from calmclip.models.tasks.calibrate import CalibrateRequest, calibrate
from calmclip.service.context import Own, Parts
from calmclip.service.labels import LabelSet
from calmclip.service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from calmclip.service.routes import respond
from calmclip.service.schemas import CalibrateBody, LabelSetAnswer, LabelSetBody, LabelSetsAnswer, NewName
from calmclip.service.uploads import body_of, check_picture

router = APIRouter(tags=["label sets"])
MISSING = "label-set-not-found"


@router.get("/v1/label-sets", summary="All label sets", responses=answers(LabelSetsAnswer))
async def list_label_sets(own: Own, parts: Parts) -> Response:
    return respond(own, LabelSetsAnswer(label_sets=[_shape(one) for one in parts.labels.all()]))


@router.put(
    "/v1/label-sets/{name}",
    summary="Register labels",
    description="A change counts the version up; the same content again does not.",
    openapi_extra=takes(LabelSetBody, {"labels": ["cat", "dog"], "templates": ["a photo of a {}."]}),
    responses=answers(LabelSetAnswer, *INPUT, "too-many-labels", "overloaded"),
)
async def put_label_set(
    name: NewName, body: Annotated[LabelSetBody, Depends(body_of(LabelSetBody))], own: Own, parts: Parts
) -> Response:
    put = asyncio.to_thread(parts.labels.put, name, body.labels, body.templates, body.temperature, body.none_below)
    return respond(own, _shape(await put))


@router.post(
    "/v1/label-sets/{name}/calibrate",
    summary="Set its temperature by pictures whose labels are known",
    description="With one bundle, to which the temperature belongs: the scores of another stay as they are.",
    openapi_extra=takes(CalibrateBody, {"items": [{"image": {"b64": PIXEL}, "label": "cat"}]}),
    responses=answers(LabelSetAnswer, *ENGINE, *INPUT, *PICTURE, MISSING, "text-too-long"),
)
async def calibrate_label_set(
    name: str, body: Annotated[CalibrateBody, Depends(body_of(CalibrateBody))], own: Own, parts: Parts
) -> Response:
    known, limits = parts.labels.get(name), parts.settings.limits
    loaded = parts.hub.get(body.model, "classify")
    own.model = loaded.name
    if len(body.items) > limits.texts:
        raise BadRequest(f"{len(body.items)} items were given; at most {limits.texts} are read at once")
    for index, item in enumerate(body.items):
        if item.label not in known.labels:
            raise BadRequest(f"the label {item.label[:100]!r} of item {index} is not in label set {name!r}")
        check_picture(item.image, own, limits, f"item {index}")
    truth = [known.labels.index(item.label) for item in body.items]
    request = CalibrateRequest([item.image for item in body.items], truth, known.labels, known.templates)
    temperature = await parts.engine.answer(loaded, calibrate(loaded.bundle, request), own)
    return respond(own, _shape(await asyncio.to_thread(parts.labels.calibrate, known, temperature, loaded.digest)))


@router.get("/v1/label-sets/{name}", summary="One label set", responses=answers(LabelSetAnswer, MISSING))
async def get_label_set(name: str, own: Own, parts: Parts) -> Response:
    return respond(own, _shape(parts.labels.get(name)))


@router.delete(
    "/v1/label-sets/{name}",
    summary="Forget a label set",
    status_code=204,
    responses=answers(None, MISSING, "overloaded", status=204),
)
async def delete_label_set(name: str, parts: Parts) -> Response:
    await asyncio.to_thread(parts.labels.delete, name)
    return Response(status_code=204)


def _shape(one: LabelSet) -> LabelSetAnswer:
    return LabelSetAnswer(**{**vars(one), "labels": list(one.labels), "templates": list(one.templates)})
