"""POST /v1/embed and POST /v1/embeddings: texts, pictures, boxes and vectors of another model -> unit vectors."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.preprocess.vectors import Vector
from calmclip.models.tasks.embed import Boxed, Embeddings, EmbedRequest, embed
from calmclip.service.asked import Asked
from calmclip.service.dialects import OPENAI
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.many import Many, Part
from calmclip.service.routes import check_characters, check_count, task_route
from calmclip.service.schemas.embed import EmbedAnswer, EmbedBody, EmbeddingsAnswer, EmbeddingsBody

Input: TypeAlias = str | bytes | Boxed | Vector


def _inputs(asked: Asked[EmbedBody]) -> list[Part]:
    values = [item.part for item in asked.body.inputs]
    return [Part({"inputs": [value]}, _picture(value)) for value in values]


def _check_inputs(asked: Asked[EmbedBody]) -> None:
    _check_pictures(asked, [item.part for item in asked.body.inputs])


def _picture(item: Input) -> bytes | None:
    """The picture of an input, or that of its boxes."""
    value = item.image if isinstance(item, Boxed) else item
    return value if isinstance(value, bytes) else None


def _check_pictures(asked: Asked[Any], inputs: Sequence[Input]) -> None:
    """Raises `InputError`s for a picture, with the number of its input."""
    for index, item in enumerate(inputs):
        if (picture := _picture(item)) is not None:
            asked.check(picture, f"input {index}")


def _request(asked: Asked[Any], bundle: Bundle, inputs: Sequence[Input]) -> EmbedRequest:
    """Raises `InputError`s for the number of inputs, or for long texts."""
    check_count(asked, sum(len(item.boxes) if isinstance(item, Boxed) else 1 for item in inputs), "inputs")
    body = asked.body
    request = EmbedRequest(inputs, prompt=body.prompt_name, truncation=body.truncation, dimensions=body.dimensions)
    check_characters(asked, bundle, inputs, request.truncation)
    return request


def _used(asked: Asked[EmbedBody] | Asked[EmbeddingsBody], embeddings: Embeddings) -> None:
    """For traces and metrics. A request with results for each input is counted once for each."""
    if operation := asked.context.operation:
        operation.tokens = (operation.tokens or 0) + embeddings.tokens
        operation.dimensions = embeddings.vectors.shape[1]


@task_route(
    Endpoint(
        "POST",
        "/v1/embed",
        task="embed",
        operation="embeddings",
        scope="read",
        summary="Texts, pictures and boxes in pictures as vectors",
        description="Each box counts as an input, and has a vector in the place of its picture's. A `vector` is for a "
        "bundle that reads what another model made of a text.",
        body=EmbedBody,
        example={"inputs": [{"text": "a red bicycle"}, {"image": {"b64": PIXEL}}]},
        answer=EmbedAnswer,
        many=True,
        problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
    ),
    embed,
    EmbedAnswer.of,
    _used,
    many=Many[EmbedRequest](lambda body: body.partial, _inputs, _check_inputs),
)
def embed_inputs(asked: Asked[EmbedBody], bundle: Bundle) -> EmbedRequest:
    return _request(asked, bundle, [item.part for item in asked.body.inputs])


@task_route(
    Endpoint(
        "POST",
        "/v1/embeddings",
        task="embed",
        operation="embeddings",
        scope="read",
        summary="Texts and pictures as vectors, in OpenAI's format",
        description="A picture is a data URI in the list, or an https address if the service fetches pictures.",
        tags=("compatible",),
        dialect=OPENAI,
        body=EmbeddingsBody,
        example={"model": "mini-int8", "input": ["a red bicycle", f"data:image/png;base64,{PIXEL}"]},
        answer=EmbeddingsAnswer,
        problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
    ),
    embed,
    EmbeddingsAnswer.of,
    _used,
)
def create_embeddings(asked: Asked[EmbeddingsBody], bundle: Bundle) -> EmbedRequest:
    if (operation := asked.context.operation) and "encoding_format" in asked.body.model_fields_set:
        operation.formats = (asked.body.encoding_format,)
    _check_pictures(asked, asked.body.input)
    return _request(asked, bundle, asked.body.input)
