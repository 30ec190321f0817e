"""POST /v1/tag: picture -> words that fit it and its regions, and a caption."""

from calmclip.models import vocabulary
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.labels import check_length
from calmclip.models.tasks.tag import TagRequest, shared, tag
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.many import many_pictures
from calmclip.service.routes import task_route
from calmclip.service.schemas.tag import TagBody, TagsAnswer


@task_route(
    Endpoint(
        "POST",
        "/v1/tag",
        task="tag",
        scope="read",
        summary="Words that fit a picture and its regions",
        description="The first request with a set of words embeds each: seconds for the vocabulary. Their vectors "
        "are then cached.",
        body=TagBody,
        example={"image": {"b64": PIXEL}, "words": ["sky", "grass", "running"], "top": 2},
        answer=TagsAnswer,
        many=True,
        problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
    ),
    tag,
    TagsAnswer.of,
    many=many_pictures(shared),
)
def tag_picture(asked: Asked[TagBody], bundle: Bundle) -> TagRequest:
    body, most = asked.body, asked.limits.words
    sentences = len(body.words or vocabulary.words()) * max(1, len(body.templates))
    if sentences > most:
        raise BadRequest(f"the words in all templates make {sentences} sentences; at most {most} are read at once")
    for kind, texts in (("word", body.words), ("template", body.templates)):
        for index, text in enumerate(texts):
            check_length(f"{kind} {index}", text)
    return TagRequest(body.picture, body.words, body.templates, body.top, body.regions)
