"""POST /v1/rank: pictures + an instruction, or a label of a classifier -> the pictures in order."""

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.labels import check_length
from calmclip.models.tasks.rank import RankRequest, rank
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.routes import check_count, task_route
from calmclip.service.schemas.rank import RankAnswer, RankBody

CLASSIFIER = ("classifier-not-found", "classifier-bundle-mismatch", "too-many-labels")


@task_route(
    Endpoint(
        "POST",
        "/v1/rank",
        task="rank",
        scope="read",
        summary="Order pictures by an instruction or a classifier",
        description="A score depends on its picture alone, so answers of several requests can be merged.",
        body=RankBody,
        example={"images": [{"b64": PIXEL}, {"b64": PIXEL}], "instruction": "a sunny beach", "top": 1},
        answer=RankAnswer,
        problems=(*ENGINE, *INPUT, *PICTURE, *CLASSIFIER, "text-too-long"),
    ),
    rank,
    RankAnswer.of,
)
def rank_pictures(asked: Asked[RankBody], bundle: Bundle) -> RankRequest:
    body = asked.body
    check_count(asked, len(body.images), "pictures")
    check_length("the instruction", body.instruction or "")
    classifier = asked.parts.classifiers.for_request(body.classifier, (), ())
    for index, image in enumerate(body.images):
        asked.check(image, f"picture {index}")
    return RankRequest(body.images, body.instruction, classifier, body.label, body.top)
