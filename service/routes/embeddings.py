"""POST /v1/embeddings: what /v1/embed does, asked and answered in OpenAI's words."""

from calmclip.models.errors import BadRequest
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.routes.embed import vectors_of
from calmclip.service.schemas import EmbeddingsAnswer, EmbeddingsBody


@Endpoint(
    "POST",
    "/v1/embeddings",
    task="embed",
    scope="read",
    summary="Texts and pictures as vectors, in OpenAI's shape",
    description="Pictures are data URIs among the texts, or https addresses where the service fetches pictures.",
    tags=("compatible",),
    body=EmbeddingsBody,
    example={"model": "mini-int8", "input": ["a red bicycle", f"data:image/png;base64,{PIXEL}"]},
    answer=EmbeddingsAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
)
async def create_embeddings(asked: Asked[EmbeddingsBody]) -> EmbeddingsAnswer:
    body, loaded = asked.body, asked.bundle(asked.body.model)
    if body.dimensions not in (None, dim := loaded.bundle.dim):
        raise BadRequest(
            f"dimensions is {body.dimensions}; vectors of {loaded.name!r} have {dim} and cannot be cut short, "
            "so leave it out"
        )
    found = await vectors_of(body.input, loaded, asked)
    return EmbeddingsAnswer.of(loaded.name, found, body.encoding_format)
