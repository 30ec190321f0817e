"""POST /v1/embed: texts and pictures -> unit vectors in one space."""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from calmclip.models.errors import BadRequest
from calmclip.models.tasks.embed import Embeddings, EmbedRequest, embed
from calmclip.service.context import Context, Service, context, service
from calmclip.service.hub import Loaded
from calmclip.service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from calmclip.service.routes import Straight, respond
from calmclip.service.schemas import EmbedAnswer, EmbedBody
from calmclip.service.uploads import check_picture, read_body

router = APIRouter(tags=["tasks"], route_class=Straight)

EXAMPLE = {"inputs": [{"text": "a red bicycle"}, {"image": {"b64": PIXEL}}]}


@router.post(
    "/v1/embed",
    summary="Texts and pictures as vectors",
    openapi_extra=takes(EmbedBody, EXAMPLE),
    responses=answers(EmbedAnswer, *ENGINE, *INPUT, *PICTURE, "text-too-long"),
)
async def embed_inputs(request: Request) -> Response:
    own, parts = context(request), service(request)
    body = await read_body(request, EmbedBody)
    loaded = parts.hub.get(body.model, "embed")
    own.model = loaded.name
    found = await vectors_of([one.value for one in body.inputs], loaded, own, parts)
    return respond(own, EmbedAnswer.of(loaded.name, found.vectors))


async def vectors_of(inputs: Sequence[str | bytes], loaded: Loaded, own: Context, parts: Service) -> Embeddings:
    """Raises what the inputs' number, or a picture or text among them, is wrong with."""
    limits = parts.settings.limits
    if len(inputs) > limits.texts:
        raise BadRequest(f"{len(inputs)} inputs were given; at most {limits.texts} are read at once")
    for index, one in enumerate(inputs):
        if isinstance(one, bytes):
            check_picture(one, own, limits, f"input {index}")
    return await parts.engine.answer(loaded, embed(loaded.bundle, EmbedRequest(inputs)), own)
