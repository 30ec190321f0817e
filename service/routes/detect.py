"""POST /v1/detect: picture + labels and examples -> boxes in pixels of the original picture."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from calmclip.models.tasks.detect import DetectRequest, default_suppression, detect
from calmclip.service.context import context, service
from calmclip.service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from calmclip.service.routes import Straight, respond
from calmclip.service.schemas import DetectAnswer, DetectBody
from calmclip.service.uploads import check_examples, check_picture, read_body

router = APIRouter(tags=["tasks"], route_class=Straight)

EXAMPLE = {"image": {"b64": PIXEL}, "labels": ["car", "bicycle"], "method": "gaussian", "sigma": 0.5}


@router.post(
    "/v1/detect",
    summary="Where labels, or what examples show, are in a picture",
    openapi_extra=takes(DetectBody, EXAMPLE),
    responses=answers(
        DetectAnswer, *ENGINE, *INPUT, *PICTURE, "label-set-not-found", "too-many-labels", "text-too-long"
    ),
)
async def detect_boxes(request: Request) -> Response:
    own, parts = context(request), service(request)
    body = await read_body(request, DetectBody)
    loaded = parts.hub.get(body.model, "detect")
    own.model = loaded.name
    asked = parts.labels.resolve(body.labels, body.label_set, body.templates)
    check_picture(body.image, own, parts.settings.limits)
    check_examples(body.examples, own, parts.settings.limits)
    suppression = body.suppression(default_suppression(loaded.bundle))
    flow = detect(loaded.bundle, DetectRequest(body.image, asked.labels, asked.templates, suppression, body.shown()))
    return respond(own, DetectAnswer.of(loaded.name, await parts.engine.answer(loaded, flow, own), suppression))
