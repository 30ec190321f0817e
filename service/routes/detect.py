"""POST /v1/detect: picture + labels and examples -> boxes in pixels of the original picture."""

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from models.tasks.detect import DetectRequest, default_suppression, detect
from service.context import Own, Parts
from service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from service.routes import respond
from service.schemas import DetectAnswer, DetectBody
from service.uploads import body_of, check_examples, check_picture

router = APIRouter(tags=["tasks"])

EXAMPLE = {"image": {"b64": PIXEL}, "labels": ["car", "bicycle"], "method": "gaussian", "sigma": 0.5}


@router.post(
    "/v1/detect",
    summary="Where labels, or what examples show, are in a picture",
    openapi_extra=takes(DetectBody, EXAMPLE),
    responses=answers(
        DetectAnswer, *ENGINE, *INPUT, *PICTURE, "label-set-not-found", "too-many-labels", "text-too-long"
    ),
)
async def detect_boxes(body: Annotated[DetectBody, Depends(body_of(DetectBody))], own: Own, parts: Parts) -> Response:
    loaded = parts.hub.get(body.model, "detect")
    own.model = loaded.name
    asked = parts.labels.resolve(body.labels, body.label_set, body.templates)
    check_picture(body.image, own, parts.settings.limits)
    check_examples(body.examples, own, parts.settings.limits)
    suppression = body.suppression(default_suppression(loaded.bundle))
    flow = detect(loaded.bundle, DetectRequest(body.image, asked.labels, asked.templates, suppression, body.shown()))
    return respond(own, DetectAnswer.of(loaded.name, await parts.engine.answer(loaded, flow, own), suppression))
