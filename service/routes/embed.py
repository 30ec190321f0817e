"""POST /v1/embed and POST /v1/embeddings: texts, pictures, boxes and vectors of another model -> unit vectors."""

from collections.abc import Sequence
from typing import Any

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.preprocess.vectors import Vector
from calmclip.models.tasks.embed import Boxed, EmbedRequest, embed
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.routes import check_characters, check_count, task_route
from calmclip.service.schemas.embed import EmbedAnswer, EmbedBody, EmbeddingsAnswer, EmbeddingsBody


@task_route(
    Endpoint(
        "POST",
        "/v1/embed",
        task="embed",
        scope="read",
        summary="Texts, pictures and boxes in pictures as vectors",
        description="Each box counts as an input, and has a vector in the place of its picture's. A `vector` is for a "
        "bundle that reads what another model made of a text.",
        body=EmbedBody,
        example={"inputs": [{"text": "a red bicycle"}, {"image": {"b64": PIXEL}}]},
        answer=EmbedAnswer,
        problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
    ),
    embed,
    EmbedAnswer.of,
)
def embed_inputs(asked: Asked[EmbedBody], bundle: Bundle) -> EmbedRequest:
    return _request(asked, bundle, [item.part for item in asked.body.inputs])


@task_route(
    Endpoint(
        "POST",
        "/v1/embeddings",
        task="embed",
        scope="read",
        summary="Texts and pictures as vectors, in OpenAI's format",
        description="A picture is a data URI in the list, or an https address if the service fetches pictures.",
        tags=("compatible",),
        body=EmbeddingsBody,
        example={"model": "mini-int8", "input": ["a red bicycle", f"data:image/png;base64,{PIXEL}"]},
        answer=EmbeddingsAnswer,
        problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
    ),
    embed,
    EmbeddingsAnswer.of,
)
def create_embeddings(asked: Asked[EmbeddingsBody], bundle: Bundle) -> EmbedRequest:
    return _request(asked, bundle, asked.body.input)


def _request(asked: Asked[Any], bundle: Bundle, inputs: Sequence[str | bytes | Boxed | Vector]) -> EmbedRequest:
    """Raises `InputError`s for the number of inputs, for long texts, or for a picture among them."""
    check_count(asked, sum(len(item.boxes) if isinstance(item, Boxed) else 1 for item in inputs), "inputs")
    for index, item in enumerate(inputs):
        picture = item.image if isinstance(item, Boxed) else item
        if isinstance(picture, bytes):
            asked.check(picture, f"input {index}")
    body = asked.body
    request = EmbedRequest(inputs, prompt=body.prompt_name, truncation=body.truncation, dimensions=body.dimensions)
    check_characters(asked, bundle, inputs, request.truncation)
    return request
