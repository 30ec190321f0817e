"""/v2: the Open Inference Protocol over the loaded bundles' graphs; see `calmclip.service.inference`."""

from time import perf_counter
from typing import Annotated

from fastapi import Header
from fastapi.responses import Response
from pydantic import WithJsonSchema

import calmclip
from calmclip.service import inference
from calmclip.service.asked import Asked
from calmclip.service.endpoints import CATALOG, INPUT, Endpoint
from calmclip.service.inference import (
    GraphMetadata,
    GraphReady,
    InferAnswer,
    InferBody,
    LiveAnswer,
    ServerMetadata,
    ServerReady,
)
from calmclip.service.openapi import BINARY, JSON

BYTES = "application/octet-stream"
LENGTH = "Inference-Header-Content-Length"
LENGTH_SAYS, LENGTH_IS = "bytes of the JSON, where more follows it", {"type": "integer", "minimum": 0}
NOT_READY = 400  # the protocol: 200 is true, 4xx is false
MISSING = ("model-not-found", "overloaded")

TAGS = ("compatible",)

EXAMPLE = {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
                      {"name": "mask", "datatype": "INT64", "shape": [1, 2], "data": [1, 1]}]}  # fmt: skip


@Endpoint(
    "GET",
    "/v2",
    task=CATALOG,
    scope="read",
    summary="The server, in the Open Inference Protocol",
    tags=TAGS,
    answer=ServerMetadata,
)
async def server(asked: Asked[None]) -> ServerMetadata:
    return ServerMetadata(name="calmclip", version=calmclip.__version__, extensions=inference.EXTENSIONS)


@Endpoint(
    "GET",
    "/v2/health/live",
    task=CATALOG,
    scope="health",
    summary="The process answers",
    tags=TAGS,
    answer=LiveAnswer,
)
async def live(asked: Asked[None]) -> LiveAnswer:
    return LiveAnswer(live=True)


@Endpoint(
    "GET",
    "/v2/health/ready",
    task=CATALOG,
    scope="health",
    summary="Bundles and collections are loaded",
    tags=TAGS,
    answer=ServerReady,
    responses={NOT_READY: {"model": ServerReady, "description": "Not ready"}},
)
async def ready(asked: Asked[None]) -> Response:
    yes = asked.parts.ready
    return asked.respond(ServerReady(ready=yes), 200 if yes else NOT_READY)


@Endpoint(
    "GET",
    "/v2/models/{name}",
    task=CATALOG,
    scope="read",
    summary="What a graph takes and answers",
    description="Its name is BUNDLE.GRAPH, such as mini-int8.image.",
    tags=TAGS,
    answer=GraphMetadata,
    problems=MISSING,
)
async def describe(asked: Asked[None], name: str) -> GraphMetadata:
    loaded, role = inference.find(asked.parts.hub, name)
    asked.own.model = loaded.name
    return inference.metadata(name, loaded.bundle.graph(role))


@Endpoint(
    "GET",
    "/v2/models/{name}/ready",
    task=CATALOG,
    scope="read",
    summary="A graph can be run",
    tags=TAGS,
    answer=GraphReady,
    problems=MISSING,
)
async def graph_ready(asked: Asked[None], name: str) -> GraphReady:
    inference.find(asked.parts.hub, name)
    return GraphReady(name=name, ready=True)


@Endpoint(
    "POST",
    "/v2/models/{name}/infer",
    task="infer",
    scope="read",
    summary="Run one graph on tensors",
    description="With the binary tensor data extension: bytes of tensors behind the JSON, in both directions.",
    tags=TAGS,
    body=InferBody,
    example=EXAMPLE,
    kinds=(BYTES,),
    answer=InferAnswer,
    problems=(*MISSING, *INPUT, "text-too-long", "image-too-large"),
    responses={
        200: {
            "content": {BYTES: {"schema": BINARY}},
            "headers": {LENGTH: {"description": LENGTH_SAYS, "schema": LENGTH_IS}},
        }
    },
)
async def run(
    asked: Asked[bytes],
    name: str,
    length: Annotated[str | None, Header(alias=LENGTH, description=LENGTH_SAYS), WithJsonSchema(LENGTH_IS)] = None,
) -> Response:
    loaded, role = inference.find(asked.parts.hub, name)
    asked.own.model = loaded.name
    reply = await asked.run(loaded, inference.infer(loaded.bundle, role, asked.body, length, asked.limits.texts))
    asked.own.answered = perf_counter()
    if reply.json_bytes is None:
        return Response(reply.body, media_type=JSON)
    return Response(reply.body, headers={LENGTH: str(reply.json_bytes)}, media_type=BYTES)
