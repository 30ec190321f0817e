"""POST /v1/detect: picture + labels and examples -> boxes in pixels of the original picture."""

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.detect import DetectRequest, default_suppression, detect, shared
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.many import many_pictures
from calmclip.service.routes import task_route
from calmclip.service.schemas.detect import DetectAnswer, DetectBody
from calmclip.service.uploads import check_examples


@task_route(
    Endpoint(
        "POST",
        "/v1/detect",
        task="detect",
        scope="read",
        summary="Find labels, or the objects of example pictures, in a picture",
        body=DetectBody,
        example={"image": {"b64": PIXEL}, "labels": ["car", "bicycle"], "method": "gaussian", "sigma": 0.5},
        answer=DetectAnswer,
        many=True,
        problems=(*ENGINE, *INPUT, *PICTURE, "classifier-not-found", "too-many-labels", "text-too-long"),
    ),
    detect,
    DetectAnswer.of,
    lambda asked, detected: asked.parts.metrics.detected(
        asked.context.model, len(detected.detections), detected.candidates
    ),
    many_pictures(shared),
)
def detect_boxes(asked: Asked[DetectBody], bundle: Bundle) -> DetectRequest:
    body = asked.body
    classifier = asked.parts.classifiers.for_request(body.classifier, body.labels, body.templates)
    check_examples(body.examples, asked.context, asked.limits)
    suppression = body.suppression(default_suppression(bundle))
    examples, grid = body.task_examples(), body.task_grid()
    return DetectRequest(body.picture, body.labels, body.templates, suppression, examples, classifier, body.boxes, grid)
