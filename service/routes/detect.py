"""POST /v1/detect: picture + labels and examples -> boxes in pixels of the original picture."""

from calmclip.models.tasks.detect import DetectRequest, default_suppression, detect
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.schemas import DetectAnswer, DetectBody
from calmclip.service.uploads import check_examples


@Endpoint(
    "POST",
    "/v1/detect",
    task="detect",
    scope="read",
    summary="Where labels, or what examples show, are in a picture",
    body=DetectBody,
    example={"image": {"b64": PIXEL}, "labels": ["car", "bicycle"], "method": "gaussian", "sigma": 0.5},
    answer=DetectAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, "classifier-not-found", "too-many-labels", "text-too-long"),
)
async def detect_boxes(asked: Asked[DetectBody]) -> DetectAnswer:
    body, loaded = asked.body, asked.bundle(asked.body.model)
    classifier, labels, templates = asked.parts.classifiers.of_request(body.classifier, body.labels, body.templates)
    asked.check(body.image)
    check_examples(body.examples, asked.own, asked.limits)
    suppression = body.suppression(default_suppression(loaded.bundle))
    wanted = DetectRequest(body.image, labels, templates, suppression, body.shown(), classifier)
    return DetectAnswer.of(loaded.name, await asked.run(loaded, detect(loaded.bundle, wanted)), suppression)
