"""/v2: the Open Inference Protocol over the loaded bundles' graphs; see `calmclip.service.inference`."""

from time import perf_counter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header
from fastapi.responses import Response
from pydantic import WithJsonSchema

import calmclip
from calmclip.service import inference
from calmclip.service.context import Own, Parts
from calmclip.service.inference import (
    GraphMetadata,
    GraphReady,
    InferAnswer,
    InferBody,
    LiveAnswer,
    ServerMetadata,
    ServerReady,
)
from calmclip.service.openapi import BINARY, INPUT, answers, takes
from calmclip.service.routes import catalog, respond
from calmclip.service.uploads import bytes_of

JSON, BYTES = "application/json", "application/octet-stream"
LENGTH = "Inference-Header-Content-Length"
LENGTH_SAYS, LENGTH_IS = "bytes of the JSON, where more follows it", {"type": "integer", "minimum": 0}
NOT_READY = 400  # the protocol: 200 is true, 4xx is false
MISSING = ("model-not-found", "overloaded")

router = APIRouter(prefix="/v2", tags=["compatible"])

EXAMPLE = {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
                      {"name": "mask", "datatype": "INT64", "shape": [1, 2], "data": [1, 1]}]}  # fmt: skip


@router.get("", summary="The server, in the Open Inference Protocol", responses=answers(ServerMetadata))
async def server(own: Own) -> Response:
    return respond(own, ServerMetadata(name="calmclip", version=calmclip.__version__, extensions=inference.EXTENSIONS))


@router.get("/health/live", summary="The process answers", responses=answers(LiveAnswer))
async def live(own: Own) -> Response:
    return respond(own, LiveAnswer(live=True))


@router.get(
    "/health/ready",
    summary="Bundles and collections are loaded",
    responses=answers(ServerReady) | {NOT_READY: {"model": ServerReady, "description": "Not ready"}},
)
async def ready(own: Own, parts: Parts) -> Response:
    yes = (await catalog.readyz(own, parts)).status_code == 200
    return respond(own, ServerReady(ready=yes), 200 if yes else NOT_READY)


@router.get(
    "/models/{name}",
    summary="What a graph takes and answers",
    description="Its name is BUNDLE.GRAPH, such as mini-int8.image.",
    responses=answers(GraphMetadata, *MISSING),
)
async def describe(name: str, own: Own, parts: Parts) -> Response:
    loaded, role = inference.find(parts.hub, name)
    own.model = loaded.name
    return respond(own, inference.metadata(name, loaded.bundle.graph(role)))


@router.get("/models/{name}/ready", summary="A graph can be run", responses=answers(GraphReady, *MISSING))
async def graph_ready(name: str, own: Own, parts: Parts) -> Response:
    inference.find(parts.hub, name)
    return respond(own, GraphReady(name=name, ready=True))


def _takes() -> dict[str, Any]:
    extra = takes(InferBody, EXAMPLE)
    extra["requestBody"]["content"][BYTES] = {"schema": BINARY}
    return extra


def _answers(*slugs: str) -> dict[int | str, dict[str, Any]]:
    found = answers(InferAnswer, *slugs)
    length = {LENGTH: {"description": LENGTH_SAYS, "schema": LENGTH_IS}}
    found[200] |= {"content": {BYTES: {"schema": BINARY}}, "headers": length}
    return found


@router.post(
    "/models/{name}/infer",
    summary="Run one graph on tensors",
    description="With the binary tensor data extension: bytes of tensors behind the JSON, in both directions.",
    openapi_extra=_takes(),
    responses=_answers(*MISSING, *INPUT, "text-too-long", "image-too-large"),
)
async def run(
    name: str,
    body: Annotated[bytes, Depends(bytes_of(JSON, BYTES))],
    own: Own,
    parts: Parts,
    length: Annotated[str | None, Header(alias=LENGTH, description=LENGTH_SAYS), WithJsonSchema(LENGTH_IS)] = None,
) -> Response:
    loaded, role = inference.find(parts.hub, name)
    own.model = loaded.name
    flow = inference.infer(loaded.bundle, role, body, length, parts.settings.limits.texts)
    reply = await parts.engine.answer(loaded, flow, own)
    own.answered = perf_counter()
    if reply.json_bytes is None:
        return Response(reply.body, media_type=JSON)
    return Response(reply.body, headers={LENGTH: str(reply.json_bytes)}, media_type=BYTES)
