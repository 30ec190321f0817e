"""POST /v1/classify: picture + labels -> ranked labels."""

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.tasks.attributes import check_sentences
from calmclip.models.tasks.classify import ClassifyRequest, classify, shared
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.many import many_pictures
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
        many=True,
        problems=(*ENGINE, *INPUT, *PICTURE, *CLASSIFIER, "too-many-labels", "text-too-long"),
    ),
    classify,
    ClassifyAnswer.of,
    many=many_pictures(shared),
)
def classify_picture(asked: Asked[ClassifyBody], bundle: Bundle) -> ClassifyRequest:
    body, limits = asked.body, asked.limits
    labels, templates, descriptions = body.labels, body.templates, body.descriptions
    classifier = asked.parts.classifiers.for_request(body.classifier, labels, templates, descriptions)
    if body.label_vectors:
        if classifier:
            raise BadRequest("the request has `label_vectors` and a `classifier`; expected one of them")
        classifier = asked.parts.classifiers.of_vectors(body.label_vectors)
    attributes = body.inference()
    if attributes:
        complete = bundle.classifier_for(classifier, labels, templates, descriptions)
        check_sentences(complete, attributes, limits.labels * limits.templates)
    numbers = (body.top_k, body.temperature, body.none_below)
    composed = (attributes, descriptions, body.alpha)
    return ClassifyRequest(body.picture, labels, templates, *numbers, classifier, *composed)
