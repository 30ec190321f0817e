"""POST /v1/classify: picture + labels -> ranked labels."""

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from models.tasks.classify import ClassifyRequest, classify
from service.context import Own, Parts
from service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from service.routes import respond
from service.schemas import ClassifyAnswer, ClassifyBody
from service.uploads import body_of, check_picture

router = APIRouter(tags=["tasks"])

EXAMPLE = {"image": {"b64": PIXEL}, "labels": ["a cat", "a dog"], "top_k": 2}


@router.post(
    "/v1/classify",
    summary="Which labels fit a picture",
    openapi_extra=takes(ClassifyBody, EXAMPLE),
    responses=answers(
        ClassifyAnswer, *ENGINE, *INPUT, *PICTURE, "label-set-not-found", "too-many-labels", "text-too-long"
    ),
)
async def classify_picture(
    body: Annotated[ClassifyBody, Depends(body_of(ClassifyBody))], own: Own, parts: Parts
) -> Response:
    loaded = parts.hub.get(body.model, "classify")
    own.model = loaded.name
    asked = parts.labels.resolve(body.labels, body.label_set, body.templates)
    check_picture(body.image, own, parts.settings.limits)
    temperature = asked.temperature_for(loaded.digest) if body.temperature is None else body.temperature
    request = ClassifyRequest(
        body.image,
        asked.labels,
        asked.templates,
        body.top_k,
        temperature,
        asked.none_below if body.none_below is None else body.none_below,
    )
    flow = classify(loaded.bundle, request)
    return respond(own, ClassifyAnswer.of(loaded.name, temperature, await parts.engine.answer(loaded, flow, own)))
