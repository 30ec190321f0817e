"""POST /v1/explain: picture + caption -> how much each word of the caption fits, and the words that do not."""

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.labels import check_length
from calmclip.models.tasks.explain import ExplainRequest, explain
from calmclip.models.tasks.words import words
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.routes import task_route
from calmclip.service.schemas.explain import ExplainAnswer, ExplainBody


@task_route(
    Endpoint(
        "POST",
        "/v1/explain",
        task="explain",
        scope="read",
        summary="How much each word of a caption fits a picture",
        description="By default the caption is embedded once more without each of its words, in one batch.",
        body=ExplainBody,
        example={"image": {"b64": PIXEL}, "caption": "a black cat on a red sofa", "threshold": -0.05},
        answer=ExplainAnswer,
        problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
    ),
    explain,
    ExplainAnswer.of,
)
def explain_caption(asked: Asked[ExplainBody], bundle: Bundle) -> ExplainRequest:
    body, most = asked.body, asked.limits.caption_words
    check_length("the caption", body.caption)
    if (count := len(words(body.caption))) > most:
        raise BadRequest(f"the caption has {count} words; at most {most} are explained. Shorten it")
    asked.check(body.image)
    return ExplainRequest(body.image, body.caption, body.method, body.threshold)
