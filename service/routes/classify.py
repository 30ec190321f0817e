"""POST /v1/classify: picture + labels -> ranked labels."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from calmclip.models.tasks.classify import ClassifyRequest, classify
from calmclip.service.context import context, service
from calmclip.service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from calmclip.service.routes import Straight, respond
from calmclip.service.schemas import ClassifyAnswer, ClassifyBody
from calmclip.service.uploads import check_picture, read_body

router = APIRouter(tags=["tasks"], route_class=Straight)

EXAMPLE = {"image": {"b64": PIXEL}, "labels": ["a cat", "a dog"], "top_k": 2}


@router.post(
    "/v1/classify",
    summary="Which labels fit a picture",
    openapi_extra=takes(ClassifyBody, EXAMPLE),
    responses=answers(
        ClassifyAnswer, *ENGINE, *INPUT, *PICTURE, "label-set-not-found", "too-many-labels", "text-too-long"
    ),
)
async def classify_picture(request: Request) -> Response:
    own, parts = context(request), service(request)
    body = await read_body(request, ClassifyBody)
    loaded = parts.hub.get(body.model, "classify")
    own.model = loaded.name
    asked = parts.labels.resolve(body.labels, body.label_set, body.templates)
    check_picture(body.image, own, parts.settings.limits)
    temperature = asked.temperature_for(loaded.digest) if body.temperature is None else body.temperature
    wanted = ClassifyRequest(
        body.image,
        asked.labels,
        asked.templates,
        body.top_k,
        temperature,
        asked.none_below if body.none_below is None else body.none_below,
    )
    flow = classify(loaded.bundle, wanted)
    return respond(own, ClassifyAnswer.of(loaded.name, temperature, await parts.engine.answer(loaded, flow, own)))
