"""A request's body, in any of three formats -> one validated model, within limits.

    application/json       the model itself; a picture is {"b64": "..."}
    multipart/form-data    fields by name, a list by repeating its field; pictures are files
    image/jpeg|png|webp    the picture alone; the other fields are in the query

Bytes are counted as they arrive; reading stops at the limit.
"""

import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, get_args, get_origin

import orjson
from fastapi import Request
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from calmclip.models.errors import BadRequest, ImageTooLarge, InputError
from calmclip.models.labels import check_length
from calmclip.models.preprocess.image import count_pixels
from calmclip.service.errors import BodyTooLarge, InvalidRequest, WrongContentType, invalid, kind
from calmclip.service.parts import Service
from calmclip.service.request import Context
from calmclip.service.schemas import Body, PictureBody
from calmclip.service.schemas.detect import ExampleBody
from calmclip.service.schemas.embed import EmbedBody
from calmclip.service.settings import Limits

B = TypeVar("B", bound=Body)
PICTURES = ("image/jpeg", "image/png", "image/webp")


async def read_body(request: Request, model: type[B]) -> B:
    """The request's body as ``model``. Raises `InputError`s."""
    async with _reading(request) as (content_type, limits):
        try:
            return model.model_validate(await _fields(request, content_type, model, limits))
        except ValidationError as error:
            raise invalid(error) from None


async def read_bytes(request: Request, content_types: Sequence[str]) -> bytes:
    """The request's body, unparsed, in one of these content types or without a content type. Raises `InputError`s."""
    async with _reading(request) as (content_type, limits):
        if content_type and content_type not in content_types:
            raise WrongContentType(f"the content type is {content_type!r}; expected {', '.join(content_types)}")
        return await _read(request, limits.body_bytes, BodyTooLarge, "the body")


@asynccontextmanager
async def _reading(request: Request) -> AsyncIterator[tuple[str, Limits]]:
    """The content type and the limits. The body must arrive before the request's deadline."""
    context = Context.of(request)
    try:
        async with context.deadline():
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            yield content_type, Service.of(request).settings.limits
    finally:
        context.clock.add("read", context.clock.elapsed)  # includes routing


def check_picture(data: bytes, context: Context, limits: Limits, where: str = "") -> None:
    """Check size and header; nothing is decoded. ``where`` begins an error's message.

    Raises `InputError`s, and `Overloaded` if concurrent requests have too many pixels already.
    """
    with context.clock.stage("decode"):
        pixels = _pixels(data, limits, where)
    context.pictures.append((len(data), pixels))
    context.reserve_pixels(pixels)


def check_examples(examples: Sequence[ExampleBody], context: Context, limits: Limits) -> None:
    """Check the number of examples, and each label and picture. Raises what `check_picture` raises."""
    if len(examples) > limits.examples:
        raise BadRequest(f"{len(examples)} examples were given; at most {limits.examples} are read")
    for index, example in enumerate(examples):
        check_length(f"example {index}: its label", example.label or "")
        check_picture(example.image, context, limits, f"example {index}")


def _pixels(data: bytes, limits: Limits, where: str) -> int:
    try:
        if len(data) > limits.image_bytes:
            raise ImageTooLarge(
                f"the picture has {len(data)} bytes; at most {limits.image_bytes} are read. Scale it down."
            )
        return count_pixels(data, max_pixels=limits.image_pixels)
    except InputError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


def takes_raw_pictures(model: type[Body] | None) -> bool:
    """Whether a raw picture may be the body, so that the query holds the other fields."""
    return model is not None and issubclass(model, (PictureBody, EmbedBody))


def check_query(request: Request, names: Collection[str]) -> None:
    """Raises `InvalidRequest` unless each field of the query is one of ``names``, and there once.

    A misspelt field that is ignored would give a broader answer than the caller asked for.
    """
    counts = Counter(name for name, _ in request.query_params.multi_items())
    for name, count in counts.items():
        fault = "unknown" if name not in names else "given twice" if count > 1 else ""
        if fault:
            known = f"the query may have {', '.join(sorted(names))}" if names else "this request has none"
            message = f"the field {name[:100]!r} of the query is {fault}; {known}"
            raise InvalidRequest(message, [{"where": name[:100], "message": fault}])


async def _fields(request: Request, content_type: str, model: type[Body], limits: Limits) -> Mapping[str, Any]:
    takes_pictures = takes_raw_pictures(model)
    if takes_pictures and content_type in ("application/json", "multipart/form-data"):
        if misplaced := sorted({*request.query_params} & {*model.model_fields}):
            raise BadRequest(
                f"{misplaced[0]!r} is in the query, which is read only with a raw picture; put it into the body"
            )
        check_query(request, ())
    if content_type == "application/json":
        limit = min(limits.body_bytes, model.max_bytes or limits.body_bytes)
        value = _json(await _read(request, limit, BodyTooLarge, "the body"))
        await Service.of(request).fetcher.fill(value, Context.of(request).reserve_bytes)
        return value
    if takes_pictures and content_type == "multipart/form-data":
        return _shape(await _form(request, limits), model)
    if takes_pictures and content_type in PICTURES:
        picture = await _read(request, limits.image_bytes, ImageTooLarge, "the picture")
        return _shape([*request.query_params.multi_items(), ("image", picture)], model)
    expected = ["application/json", *(["multipart/form-data", *PICTURES] if takes_pictures else [])]
    raise WrongContentType(f"the content type is {content_type or 'not given'!r}; expected {', '.join(expected)}")


async def _stream(request: Request, limit: int, error: type[InputError], name: str) -> AsyncGenerator[bytes, None]:
    """The body's chunks. Raises ``error`` if Content-Length or the received bytes are above ``limit``."""
    message = f"{name} has more than {limit} bytes, the most that are read"
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise error(message)
    count = 0
    context = Context.of(request)
    async for chunk in request.stream():
        count += len(chunk)
        if not announced:  # else it is counted already
            context.reserve_bytes(len(chunk))
        if count > limit:
            raise error(message)
        yield chunk


async def _read(request: Request, limit: int, error: type[InputError], name: str) -> bytes:
    return b"".join([chunk async for chunk in _stream(request, limit, error, name)])


def _json(data: bytes) -> Mapping[str, Any]:
    """orjson keeps the last of two equal keys, and rounds integers beyond 64 bits. A second parser finds both: behind a
    gateway that reads the first key, the last one would pass unchecked. It costs 3 to 5 ms per megabyte.
    """
    try:
        value = orjson.loads(data)
        exact = _EXACT.decode(data.decode()) == value
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply; send fewer levels") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is {kind(value)}; expected an object")
    if not exact:
        raise InvalidRequest(
            "the body has an integer of more than 64 bits, which would be rounded; send it as a string"
        )
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequest(f"the body has the key {twice[:100]!r} twice in one object; expected each key once")
    return fields


_EXACT = json.JSONDecoder(object_pairs_hook=_object)


class _Parser(MultiPartParser):
    spool_max_size = 1 << 62  # parts stay in memory, within the body's limit, so no disk is needed


async def _form(request: Request, limits: Limits) -> list[tuple[str, Any]]:
    stream = _stream(request, limits.body_bytes, BodyTooLarge, "the body")
    parts = limits.texts + limits.labels + limits.templates + limits.examples + 16
    parser = _Parser(request.headers, stream, max_files=parts, max_fields=parts, max_part_size=limits.image_bytes)
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:  # the last two for an unknown charset
        raise BadRequest(f"the multipart body is broken: {getattr(error, 'message', error)}") from None
    try:
        return [(k, await v.read() if isinstance(v, UploadFile) else v) for k, v in form.multi_items()]
    finally:
        await form.close()


def _shape(pairs: list[tuple[str, Any]], model: type[Body]) -> dict[str, Any]:
    """Flat pairs -> the model's fields. A list field takes every pair of its name, another field exactly one.

    `EmbedBody` has nested inputs: each ``text`` and ``image`` pair becomes one input, in order.
    """
    if issubclass(model, EmbedBody):
        inputs = [{key: value} for key, value in pairs if key in ("text", "image")]
        other = [(key, value) for key, value in pairs if key not in ("text", "image")]
        return {**_shape(other, Body), "inputs": inputs}
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in model.model_fields and is_list(model.model_fields[key]):
            fields.setdefault(key, []).append(value)
        elif key in fields:
            raise BadRequest(f"the field {key!r} is given twice; expected one")
        else:
            fields[key] = value
    return fields


def is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is list or any(get_origin(a) is list for a in get_args(field.annotation))
