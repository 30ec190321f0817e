"""/v2: the Open Inference Protocol over the graphs of loaded bundles, see `calmclip.service.inference`."""

from functools import partial
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
LENGTH_TEXT, LENGTH_SCHEMA = "length of the JSON in bytes, if tensors follow it", {"type": "integer", "minimum": 0}
NOT_READY = 400  # the protocol: 200 means true, 4xx means false
MISSING = ("model-not-found", "overloaded")

_endpoint = partial(Endpoint, task=CATALOG, tags=("compatible",))

EXAMPLE = {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
                      {"name": "mask", "datatype": "INT64", "shape": [1, 2], "data": [1, 1]}]}  # fmt: skip


@_endpoint("GET", "/v2", scope="read", summary="The server, in the Open Inference Protocol", answer=ServerMetadata)
async def server(asked: Asked[None]) -> ServerMetadata:
    return ServerMetadata(name="calmclip", version=calmclip.__version__, extensions=inference.EXTENSIONS)


@_endpoint("GET", "/v2/health/live", scope="health", summary="The process is alive", answer=LiveAnswer)
async def live(asked: Asked[None]) -> LiveAnswer:
    return LiveAnswer(live=True)


@_endpoint(
    "GET",
    "/v2/health/ready",
    scope="health",
    summary="Bundles and collections are loaded",
    answer=ServerReady,
    responses={NOT_READY: {"model": ServerReady, "description": "Not ready"}},
)
async def ready(asked: Asked[None]) -> Response:
    is_ready = asked.parts.ready
    return asked.respond(ServerReady(ready=is_ready), 200 if is_ready else NOT_READY)


@_endpoint(
    "GET",
    "/v2/models/{name}",
    scope="read",
    summary="Inputs and outputs of a graph",
    description="Its name is BUNDLE.GRAPH, such as mini-int8.image.",
    answer=GraphMetadata,
    problems=MISSING,
)
async def describe(asked: Asked[None], name: str) -> GraphMetadata:
    loaded, role = inference.find(asked.parts.hub, name)
    asked.context.model = loaded.name
    return inference.metadata(name, loaded.bundle.graph(role))


@_endpoint(
    "GET",
    "/v2/models/{name}/ready",
    scope="read",
    summary="Whether a graph can be run",
    answer=GraphReady,
    problems=MISSING,
)
async def graph_ready(asked: Asked[None], name: str) -> GraphReady:
    inference.find(asked.parts.hub, name)
    return GraphReady(name=name, ready=True)


@_endpoint(
    "POST",
    "/v2/models/{name}/infer",
    task="infer",
    scope="read",
    summary="Run one graph on tensors",
    description="Supports the binary tensor data extension: tensors as bytes after the JSON, in both directions.",
    body=InferBody,
    example=EXAMPLE,
    kinds=(BYTES,),
    answer=InferAnswer,
    problems=(*MISSING, *INPUT, "text-too-long", "image-too-large"),
    responses={
        200: {
            "content": {BYTES: {"schema": BINARY}},
            "headers": {LENGTH: {"description": LENGTH_TEXT, "schema": LENGTH_SCHEMA}},
        }
    },
)
async def run(
    asked: Asked[bytes],
    name: str,
    length: Annotated[str | None, Header(alias=LENGTH, description=LENGTH_TEXT), WithJsonSchema(LENGTH_SCHEMA)] = None,
) -> Response:
    loaded, role = inference.find(asked.parts.hub, name)
    asked.context.model = loaded.name
    reply = await asked.run(loaded, inference.infer(loaded.bundle, role, asked.body, length, asked.limits.texts))
    asked.context.answered = perf_counter()
    if reply.json_bytes is None:
        return Response(reply.body, media_type=JSON)
    return Response(reply.body, headers={LENGTH: str(reply.json_bytes)}, media_type=BYTES)
