"""POST /v1/anomaly: picture -> how damaged it looks, a verdict, and where, as a heat map."""

from functools import partial

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.flow import Flow, Work
from calmclip.models.tasks.anomaly import AnomalyRequest, anomaly
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.openapi import PNG_FILE
from calmclip.service.schemas.anomaly import AnomalyAnswer, AnomalyBody


@Endpoint(
    "POST",
    "/v1/anomaly",
    task="anomaly",
    scope="read",
    summary="How damaged a picture looks, and where",
    description="The heat map has at most a byte for each pixel of the upright picture, before base64.",
    body=AnomalyBody,
    example={"image": {"b64": PIXEL}, "thing": "bottle", "damaged": ["broken {}", "{} with a scratch"]},
    answer=AnomalyAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, "classifier-not-found", "classifier-bundle-mismatch", "text-too-long"),
    responses=PNG_FILE,
)
async def find_anomaly(asked: Asked[AnomalyBody]) -> AnomalyAnswer | bytes:
    body = asked.body
    loaded = asked.bundle(body.model)
    phrases = {"normal": body.normal, "damaged": body.damaged}
    classifier = asked.parts.classifiers.for_request(body.classifier, (), body.templates, phrases)
    asked.check(body.image)
    request = AnomalyRequest(
        body.image,
        body.thing,
        body.normal,
        body.damaged,
        body.templates,
        classifier,
        body.method,
        body.threshold,
    )
    return await asked.run(loaded, _answered(loaded.bundle, request, body))


def _answered(bundle: Bundle, request: AnomalyRequest, body: AnomalyBody) -> Flow[AnomalyAnswer | bytes]:
    """The heat map becomes a file in a thread of the pool."""
    result = yield from anomaly(bundle, request)
    if body.format == "png":
        png: bytes = yield Work("postprocess", result.png)
        return png
    answer: AnomalyAnswer = yield Work("postprocess", partial(AnomalyAnswer.of, bundle, result))
    return answer
