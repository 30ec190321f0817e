"""A request's body, in any of its shapes -> one validated model, within limits.

    application/json       the model itself; a picture is {"b64": "..."}
    multipart/form-data    fields by name, a list by repeating its field; pictures are files
    image/jpeg|png|webp    the picture alone, the other fields in the query

Bytes are counted as they come in; nothing is kept of a body that is too large.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, get_args, get_origin

import orjson
from fastapi import Request
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from calmclip.models.errors import BadRequest, ImageTooLarge, InputError
from calmclip.models.preprocess.image import inspect
from calmclip.service.classifiers import MAX_CHARACTERS
from calmclip.service.parts import service
from calmclip.service.problems import BodyTooLarge, InvalidRequest, WrongContentType, invalid
from calmclip.service.request import Context, context
from calmclip.service.schemas import Body, EmbedBody, ExampleBody, PictureBody
from calmclip.service.settings import Limits

B = TypeVar("B", bound=Body)
PICTURES = ("image/jpeg", "image/png", "image/webp")


async def read_body(request: Request, model: type[B]) -> B:
    """The request's body as ``model``. Raises `InputError`s; the time so far counts as `read`."""
    async with _reading(request) as (kind, limits):
        try:
            return model.model_validate(await _fields(request, kind, model, limits))
        except ValidationError as error:
            raise invalid(error, "the request does not fit") from None


async def read_bytes(request: Request, kinds: Sequence[str]) -> bytes:
    """The request's body as it is, of one of these content types or of none that it names. Raises as `read_body`."""
    async with _reading(request) as (kind, limits):
        if kind and kind not in kinds:
            raise WrongContentType(f"the content type is {kind!r}; expected {', '.join(kinds)}")
        return await _whole(request, limits.body_bytes, BodyTooLarge, "the body")


@asynccontextmanager
async def _reading(request: Request) -> AsyncIterator[tuple[str, Limits]]:
    """The content type, and what may be read in the request's time; the time so far counts as `read`."""
    own = context(request)
    try:
        async with own.deadline():
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            yield kind, service(request).settings.limits
    finally:
        own.clock.add("read", own.clock.elapsed)  # with routing, which comes before


def check_picture(data: bytes, own: Context, limits: Limits, where: str = "") -> None:
    """Bytes and header, before anything is decoded; ``where`` begins the message.

    Raises `InputError`s; `Overloaded` where more pixels are under way than may be.
    """
    with own.clock.stage("decode"):
        pixels = _check_picture(data, limits, where)
    own.pictures.append((len(data), pixels))
    if own.place:
        own.place.more_pixels(pixels)


def check_examples(examples: Sequence[ExampleBody], own: Context, limits: Limits) -> None:
    """Their number and names, then each picture as `check_picture` does. Raises `InputError`s."""
    if len(examples) > limits.examples:
        raise BadRequest(f"{len(examples)} examples were given; at most {limits.examples} are looked at")
    for index, one in enumerate(examples):
        if one.label and len(one.label) > MAX_CHARACTERS:
            count = len(one.label)
            raise BadRequest(f"example {index}: its label has {count} characters; at most {MAX_CHARACTERS} are read")
        check_picture(one.image, own, limits, f"example {index}")


def _check_picture(data: bytes, limits: Limits, where: str) -> int:
    try:
        if len(data) > limits.image_bytes:
            raise ImageTooLarge(
                f"the picture has {len(data)} bytes; at most {limits.image_bytes} are read. Scale it down."
            )
        return inspect(data, max_pixels=limits.image_pixels).pixels
    except InputError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


async def _fields(request: Request, kind: str, model: type[Body], limits: Limits) -> Mapping[str, Any]:
    pictured = issubclass(model, (PictureBody, EmbedBody))
    stray = sorted({*request.query_params} & {*model.model_fields})
    if pictured and stray and kind in ("application/json", "multipart/form-data"):
        raise BadRequest(
            f"{stray[0]!r} is in the query, which is read beside a raw picture alone; put it into the body"
        )
    if kind == "application/json":
        limit = min(limits.body_bytes, model.max_bytes or limits.body_bytes)
        value = _json(await _whole(request, limit, BodyTooLarge, "the body"))
        place = context(request).place
        await service(request).fetcher.fill(value, place.more_bytes if place else lambda count: None)
        return value
    if pictured and kind == "multipart/form-data":
        return _shape(await _form(request, limits), model)
    if pictured and kind in PICTURES:
        picture = await _whole(request, limits.image_bytes, ImageTooLarge, "the picture")
        return _shape([*request.query_params.multi_items(), ("image", picture)], model)
    wanted = ["application/json", *(["multipart/form-data", *PICTURES] if pictured else [])]
    raise WrongContentType(f"the content type is {kind or 'not given'!r}; expected {', '.join(wanted)}")


async def _stream(request: Request, limit: int, error: type[InputError], what: str) -> AsyncGenerator[bytes, None]:
    """The body's chunks; stops with ``error`` at the first byte over ``limit``, announced or real."""
    message = f"{what} has more than {limit} bytes, the most that are read"
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise error(message)
    count = 0
    place = context(request).place
    async for chunk in request.stream():
        count += len(chunk)
        if place and not announced:  # else it is counted already
            place.more_bytes(len(chunk))
        if count > limit:
            raise error(message)
        yield chunk


async def _whole(request: Request, limit: int, error: type[InputError], what: str) -> bytes:
    return b"".join([chunk async for chunk in _stream(request, limit, error, what)])


def _json(data: bytes) -> Mapping[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is a JSON {type(value).__name__}; expected an object")
    return value


class _Parser(MultiPartParser):
    spool_max_size = 1 << 62  # parts stay in memory, bounded by the body's limit; a read-only disk is no matter


async def _form(request: Request, limits: Limits) -> list[tuple[str, Any]]:
    stream = _stream(request, limits.body_bytes, BodyTooLarge, "the body")
    most = limits.texts + limits.labels + limits.templates + limits.examples + 16
    parser = _Parser(request.headers, stream, max_files=most, max_fields=most, max_part_size=limits.image_bytes)
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:  # the two of them also for a charset that is none
        raise BadRequest(f"the multipart body is broken: {getattr(error, 'message', error)}") from None
    try:
        return [(k, await v.read() if isinstance(v, UploadFile) else v) for k, v in form.multi_items()]
    finally:
        await form.close()


def _shape(pairs: list[tuple[str, Any]], model: type[Body]) -> dict[str, Any]:
    """Flat pairs -> the model's fields: a list takes them all, anything else exactly one.

    `EmbedBody` has no flat form of its own: each ``text`` and ``image``, in order, is one of its inputs.
    """
    if issubclass(model, EmbedBody):
        inputs = [{key: value} for key, value in pairs if key in ("text", "image")]
        rest = [(key, value) for key, value in pairs if key not in ("text", "image")]
        return {**_shape(rest, Body), "inputs": inputs}
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
