"""POST /v1/embeddings: what /v1/embed does, asked and answered in OpenAI's words."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from calmclip.models.errors import BadRequest
from calmclip.service.context import context, service
from calmclip.service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from calmclip.service.routes import Straight, respond
from calmclip.service.routes.embed import vectors_of
from calmclip.service.schemas import EmbeddingsAnswer, EmbeddingsBody
from calmclip.service.uploads import read_body

router = APIRouter(tags=["compatible"], route_class=Straight)

EXAMPLE = {"model": "mini-int8", "input": ["a red bicycle", f"data:image/png;base64,{PIXEL}"]}


@router.post(
    "/v1/embeddings",
    summary="Texts and pictures as vectors, in OpenAI's shape",
    description="Pictures are data URIs among the texts, or https addresses where the service fetches pictures.",
    openapi_extra=takes(EmbeddingsBody, EXAMPLE),
    responses=answers(EmbeddingsAnswer, *ENGINE, *INPUT, *PICTURE, "text-too-long"),
)
async def create_embeddings(request: Request) -> Response:
    own, parts = context(request), service(request)
    body = await read_body(request, EmbeddingsBody)
    loaded = parts.hub.get(body.model, "embed")
    own.model = loaded.name
    if body.dimensions not in (None, dim := loaded.bundle.dim):
        raise BadRequest(
            f"dimensions is {body.dimensions}; vectors of {loaded.name!r} have {dim} and cannot be cut short, "
            "so leave it out"
        )
    found = await vectors_of(body.input, loaded, own, parts)
    return respond(own, EmbeddingsAnswer.of(loaded.name, found, body.encoding_format))
