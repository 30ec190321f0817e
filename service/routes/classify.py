"""POST /v1/classify: picture + labels -> ranked labels."""

from calmclip.models.tasks.classify import ClassifyRequest, classify
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.schemas import ClassifyAnswer, ClassifyBody


@Endpoint(
    "POST",
    "/v1/classify",
    task="classify",
    scope="read",
    summary="Which labels fit a picture",
    body=ClassifyBody,
    example={"image": {"b64": PIXEL}, "labels": ["a cat", "a dog"], "top_k": 2},
    answer=ClassifyAnswer,
    problems=(
        *ENGINE,
        *INPUT,
        *PICTURE,
        "classifier-not-found",
        "classifier-bundle-mismatch",
        "too-many-labels",
        "text-too-long",
    ),
)
async def classify_picture(asked: Asked[ClassifyBody]) -> ClassifyAnswer:
    body, loaded = asked.body, asked.bundle(asked.body.model)
    classifier, labels, templates = asked.parts.classifiers.of_request(body.classifier, body.labels, body.templates)
    asked.check(body.image)
    wanted = ClassifyRequest(
        body.image, labels, templates, body.top_k, body.temperature, body.none_below, classifier
    )  # fmt: skip
    return ClassifyAnswer.of(loaded.name, await asked.run(loaded, classify(loaded.bundle, wanted)))
