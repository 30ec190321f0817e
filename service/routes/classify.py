"""POST /v1/classify: picture + labels -> ranked labels."""

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.classify import ClassifyRequest, classify
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.routes import task_route
from calmclip.service.schemas.classify import ClassifyAnswer, ClassifyBody

CLASSIFIER = ("classifier-not-found", "classifier-bundle-mismatch")


@task_route(
    Endpoint(
        "POST",
        "/v1/classify",
        task="classify",
        scope="read",
        summary="Rank labels for a picture",
        body=ClassifyBody,
        example={"image": {"b64": PIXEL}, "labels": ["a cat", "a dog"], "top_k": 2},
        answer=ClassifyAnswer,
        problems=(*ENGINE, *INPUT, *PICTURE, *CLASSIFIER, "too-many-labels", "text-too-long"),
    ),
    classify,
    ClassifyAnswer.of,
)
def classify_picture(asked: Asked[ClassifyBody], bundle: Bundle) -> ClassifyRequest:
    body = asked.body
    classifier = asked.parts.classifiers.for_request(body.classifier, body.labels, body.templates)
    asked.check(body.image)
    return ClassifyRequest(
        body.image, body.labels, body.templates, body.top_k, body.temperature, body.none_below, classifier
    )
