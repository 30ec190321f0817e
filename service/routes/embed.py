"""POST /v1/embed: texts and pictures -> unit vectors in one space."""

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from models.errors import BadRequest
from models.tasks.embed import EmbedRequest, embed
from service.context import Own, Parts, task
from service.openapi import ENGINE, INPUT, PICTURE, answers, takes
from service.routes import admitted, respond
from service.schemas import EmbedAnswer, EmbedBody
from service.uploads import body_of, check_picture

router = APIRouter(tags=["tasks"], dependencies=[Depends(task("embed")), Depends(admitted)])

EXAMPLE = {"inputs": [{"text": "a red bicycle"}, {"image": {"b64": "/9j/4AAQSkZJRg=="}}]}


@router.post(
    "/v1/embed",
    summary="Texts and pictures as vectors",
    openapi_extra=takes(EmbedBody, EXAMPLE),
    responses=answers(EmbedAnswer, *ENGINE, *INPUT, *PICTURE, "text-too-long"),
)
async def embed_inputs(body: Annotated[EmbedBody, Depends(body_of(EmbedBody))], own: Own, parts: Parts) -> Response:
    limits = parts.settings.limits
    loaded = parts.hub.get(body.model, "embed")
    own.model = loaded.name
    if len(body.inputs) > limits.texts:
        raise BadRequest(f"{len(body.inputs)} inputs were given; at most {limits.texts} are read at once")
    for index, one in enumerate(body.inputs):
        if one.image is not None:
            check_picture(one.image, own, limits, f"input {index}")
    flow = embed(loaded.bundle, EmbedRequest([one.value for one in body.inputs]))
    found = await parts.engine.answer(loaded, flow, own)
    return respond(own, EmbedAnswer.of(loaded.name, found.vectors))
