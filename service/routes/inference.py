"""/v2: the Open Inference Protocol over the graphs of loaded bundles, see `calmclip.service.inference`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from inspect import Parameter, Signature, signature
from time import perf_counter
from typing import Annotated, Any

from fastapi import Header
from fastapi.responses import Response
from pydantic import WithJsonSchema

import calmclip
from calmclip.models.errors import BundleNotFound
from calmclip.service import codings, inference
from calmclip.service.asked import Asked
from calmclip.service.dialects import INFERENCE
from calmclip.service.endpoints import CATALOG, INPUT, PICTURE, Endpoint, registered
from calmclip.service.errors import NotSupported
from calmclip.service.inference import (
    Given,
    GraphConfig,
    GraphMetadata,
    GraphReady,
    GraphStats,
    IndexBody,
    IndexEntry,
    InferAnswer,
    InferBody,
    LiveAnswer,
    Reply,
    ServerMetadata,
    ServerReady,
    StatsAnswer,
)
from calmclip.service.openapi import BINARY, JSON
from calmclip.service.routes import check_characters
from calmclip.service.strict_json import parse
from calmclip.service.uploads import validated

BYTES = "application/octet-stream"
LENGTH = "Inference-Header-Content-Length"
LENGTH_TEXT, LENGTH_SCHEMA = "length of the JSON in bytes, if tensors follow it", {"type": "integer", "minimum": 0}
NOT_READY = 400  # the protocol: 200 means true, 4xx means false
MISSING = ("model-not-found", "overloaded")

_endpoint = partial(Endpoint, task=CATALOG, tags=("compatible",), dialect=INFERENCE)

EXAMPLE = {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
                      {"name": "mask", "datatype": "INT64", "shape": [1, 2], "data": [1, 1]}]}  # fmt: skip


@_endpoint("GET", "/v2", scope="read", summary="The server, in the Open Inference Protocol", answer=ServerMetadata)
async def describe_server(asked: Asked[None]) -> ServerMetadata:
    return ServerMetadata(name="calmclip", version=calmclip.__version__, extensions=inference.EXTENSIONS)


@_endpoint("GET", "/v2/health/live", scope="health", summary="The process is alive", answer=LiveAnswer)
async def server_live(asked: Asked[None]) -> LiveAnswer:
    return LiveAnswer(live=True)


@_endpoint(
    "GET",
    "/v2/health/ready",
    scope="health",
    summary="Bundles and collections are loaded",
    answer=ServerReady,
    responses={NOT_READY: {"model": ServerReady, "description": "Not ready"}},
)
async def server_ready(asked: Asked[None]) -> Response:
    is_ready = asked.parts.ready
    return asked.respond(ServerReady(ready=is_ready), 200 if is_ready else NOT_READY)


@_endpoint(
    "GET",
    "/v2/models/{name}",
    scope="read",
    summary="Inputs and outputs of a graph",
    description="Its name is BUNDLE.GRAPH, such as mini-int8.image. A graph with preprocessing takes texts or files of "
    "pictures too, see the datatype BYTES.",
    answer=GraphMetadata,
    problems=MISSING,
)
async def describe_graph(asked: Asked[None], name: str) -> GraphMetadata:
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
    "GET",
    "/v2/models/{name}/config",
    scope="read",
    summary="What Triton's model configuration says of a graph",
    answer=GraphConfig,
    problems=MISSING,
)
async def describe_config(asked: Asked[None], name: str) -> GraphConfig:
    loaded, role = inference.find(asked.parts.hub, name)
    asked.context.model = loaded.name
    return inference.config(name, loaded.bundle.graph(role), asked.parts.settings)


STATS = "Counts and times in Triton's format, since the bundle was loaded, of the calls of all tasks."


@_endpoint(
    "GET",
    "/v2/models/{name}/stats",
    scope="read",
    summary="Statistics of a graph",
    description=STATS,
    answer=StatsAnswer,
    problems=MISSING,
)
async def graph_statistics(asked: Asked[None], name: str) -> StatsAnswer:
    loaded, role = inference.find(asked.parts.hub, name)
    asked.context.model = loaded.name
    return StatsAnswer(model_stats=[GraphStats.of(name, loaded.batchers[role].statistics)])


@_endpoint(
    "GET", "/v2/models/stats", scope="read", summary="Statistics of all graphs", description=STATS, answer=StatsAnswer
)
async def statistics(asked: Asked[None]) -> StatsAnswer:
    graphs = inference.served(asked.parts.hub)
    return StatsAnswer(
        model_stats=[GraphStats.of(name, loaded.batchers[role].statistics) for name, (loaded, role) in graphs.items()]
    )


@_endpoint(
    "POST",
    "/v2/repository/index",
    scope="read",
    summary="The graphs that can be run, and bundles that did not load",
    description="The body may be empty.",
    body=IndexBody,
    example={"ready": True},
    optional=True,
    kinds=(BYTES,),
    answer=list[IndexEntry],
    problems=("overloaded", *INPUT),
)
async def repository_index(asked: Asked[bytes]) -> Response:
    body = validated(IndexBody, parse(asked.body)) if asked.body else IndexBody(ready=False)
    return asked.respond(inference.index(asked.parts.hub, ready=body.ready))


@_endpoint(
    "POST",
    "/v2/models/{name}/infer",
    task="infer",
    scope="read",
    summary="Run one graph on tensors",
    description="Supports the binary tensor data extension: tensors as bytes after the JSON, in both directions. The "
    "answer is compressed if `Accept-Encoding` names gzip or deflate alone.",
    body=InferBody,
    example=EXAMPLE,
    kinds=(BYTES,),
    answer=InferAnswer,
    problems=(*MISSING, *INPUT, *PICTURE, "text-too-long"),
    responses={
        200: {
            "content": {BYTES: {"schema": BINARY}},
            "headers": {LENGTH: {"description": LENGTH_TEXT, "schema": LENGTH_SCHEMA}},
        }
    },
)
async def infer(
    asked: Asked[bytes],
    name: str,
    length: Annotated[str | None, Header(alias=LENGTH, description=LENGTH_TEXT), WithJsonSchema(LENGTH_SCHEMA)] = None,
) -> Response:
    loaded, role = inference.find(asked.parts.hub, name)
    asked.context.model = loaded.name
    reply = await asked.run(loaded, inference.infer(loaded.bundle, role, asked.body, length, asked.limits.texts))
    if isinstance(reply, Given):
        for index, picture in enumerate(reply.values if reply.kind == "picture" else ()):
            asked.check(picture, f"picture {index}")
        if texts := reply.texts:
            check_characters(asked, loaded.bundle, texts, loaded.bundle.text(role).truncation)
        reply = await asked.run(loaded, inference.infer_given(loaded.bundle, role, reply))
    return await _sent(asked, reply)


async def _sent(asked: Asked[Any], reply: Reply) -> Response:
    """The answer, compressed if that was asked for: in a thread, because a large one takes long."""
    headers = {} if reply.json_bytes is None else {LENGTH: str(reply.json_bytes)}
    body = reply.body
    if coding := codings.wanted(asked.request.headers):
        headers["Content-Encoding"] = coding
        body = await asked.parts.engine.thread(_packed, asked.context, asked, body, coding)
    asked.context.answered = perf_counter()
    return Response(body, headers=headers, media_type=JSON if reply.json_bytes is None else BYTES)


def _packed(asked: Asked[Any], body: bytes, coding: str) -> bytes:
    with asked.context.clock.stage("serialize"):
        return codings.pack(body, coding)


def unlisted() -> list[Endpoint]:
    """What Triton's clients ask for beside the endpoints of the family: the same graphs under a version, and parts of
    the protocol that are not served, which say so."""
    return [*_versions(), *_not_supported()]


def _versions() -> Iterator[Endpoint]:
    prefix = "/v2/models/{name}"
    for endpoint in registered():
        if endpoint.path.startswith(prefix):
            tail = endpoint.path.removeprefix(prefix)
            yield replace(
                endpoint, path=f"{prefix}/versions/{{version}}{tail}", handler=_of_version(endpoint), listed=False
            )


def _of_version(endpoint: Endpoint) -> Any:
    """The handler of ``endpoint`` for a path that also names a version."""
    handler = endpoint.handler
    assert handler

    async def of_version(asked: Asked[Any], version: str, **more: Any) -> Any:
        if version != inference.VERSION:
            raise BundleNotFound(
                f"a graph has the version {inference.VERSION!r} alone; {version[:40]!r} was asked for",
                known=[inference.VERSION],
            )
        return await handler(asked, **more)

    inner = [*signature(handler, eval_str=True).parameters.values()]
    version = Parameter("version", Parameter.KEYWORD_ONLY, annotation=str)
    of_version.__signature__ = Signature([*inner, version])  # type: ignore[attr-defined]  # `serve` reads it
    return of_version


def _not_supported() -> Iterator[Endpoint]:
    for (method, path), instead in inference.UNSUPPORTED.items():
        yield _endpoint(method, path, scope="read", listed=False, handler=_refusal(instead))


def _refusal(instead: str) -> Any:
    async def not_supported(asked: Asked[None]) -> None:
        raise NotSupported(f"{asked.request.method} {asked.request.url.path} is not supported: {instead}")

    return not_supported
