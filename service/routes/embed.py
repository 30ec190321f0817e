"""POST /v1/embed: texts and pictures -> unit vectors in one space."""

from collections.abc import Sequence
from typing import Any

from calmclip.models.errors import BadRequest
from calmclip.models.tasks.embed import Embeddings, EmbedRequest, embed
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.hub import Loaded
from calmclip.service.schemas import EmbedAnswer, EmbedBody


@Endpoint(
    "POST",
    "/v1/embed",
    task="embed",
    scope="read",
    summary="Texts and pictures as vectors",
    body=EmbedBody,
    example={"inputs": [{"text": "a red bicycle"}, {"image": {"b64": PIXEL}}]},
    answer=EmbedAnswer,
    problems=(*ENGINE, *INPUT, *PICTURE, "text-too-long"),
)
async def embed_inputs(asked: Asked[EmbedBody]) -> EmbedAnswer:
    loaded = asked.bundle(asked.body.model)
    found = await vectors_of([one.value for one in asked.body.inputs], loaded, asked)
    return EmbedAnswer.of(loaded.name, found.vectors)


async def vectors_of(inputs: Sequence[str | bytes], loaded: Loaded, asked: Asked[Any]) -> Embeddings:
    """Raises what the inputs' number, or a picture or text among them, is wrong with."""
    if len(inputs) > (most := asked.limits.texts):
        raise BadRequest(f"{len(inputs)} inputs were given; at most {most} are read at once")
    for index, one in enumerate(inputs):
        if isinstance(one, bytes):
            asked.check(one, f"input {index}")
    return await asked.run(loaded, embed(loaded.bundle, EmbedRequest(inputs)))
