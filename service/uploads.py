"""A request's body, in any of three formats -> one validated model, within limits.

    application/json       the model itself; a picture is {"b64": "..."}
    multipart/form-data    fields by name, a list by repeating its field; pictures are files
    image/*                the picture alone; the other fields are in the query

A picture may also have application/octet-stream or no content type: its bytes choose the format, never the content
type. Any of them may be compressed (`Content-Encoding: gzip` or `deflate`). Bytes are counted as they arrive, and as
they are unpacked; reading stops at the limit.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from calmclip.models.errors import BadRequest, ImageTooLarge, InputError
from calmclip.models.labels import check_length
from calmclip.models.preprocess.image import FORMATS, count_pixels
from calmclip.service.codings import Inflater, coding_of
from calmclip.service.errors import BodyTooLarge, InvalidRequest, WrongContentType, invalid
from calmclip.service.parts import Service
from calmclip.service.request import Context
from calmclip.service.schemas import Body, PicturesBody
from calmclip.service.schemas.detect import ExampleBody
from calmclip.service.settings import Limits
from calmclip.service.strict_json import parse

B = TypeVar("B", bound=Body)
HANDED = "calmclip.fields"  # in the ASGI scope: the body's fields, of a caller in this process; pictures as bytes
OCTETS = "application/octet-stream"
PICTURES = (*(format.content_types[0] for format in FORMATS.values()), OCTETS)  # of the specification; others are read


async def read_body(request: Request, model: type[B]) -> B:
    """The request's body as ``model``. Raises `InputError`s."""
    async with _reading(request) as (content_type, limits):
        return validated(model, await _fields(request, content_type, model, limits))


def validated(model: type[B], value: Mapping[str, Any]) -> B:
    """Raises `InvalidRequest`."""
    try:
        return model.model_validate(value)
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


def check_picture(data: bytes, context: Context, limits: Limits, where: str = "", *, whole: bool = False) -> None:
    """Check size and header; nothing is decoded. ``where`` begins an error's message. ``whole``: the task decodes a
    JPEG at its full size, see `preprocess.image.decode`.

    Raises `InputError`s, and `Overloaded` if concurrent requests have too many pixels already.
    """
    with context.clock.stage("decode"):
        pixels = _pixels(data, limits, where, whole)
    context.pictures.append((len(data), pixels))
    context.reserve_pixels(pixels)


def check_examples(examples: Sequence[ExampleBody], context: Context, limits: Limits) -> None:
    """Check the number of examples, and each label and picture. Raises what `check_picture` raises."""
    if len(examples) > limits.examples:
        raise BadRequest(f"{len(examples)} examples were given; at most {limits.examples} are read")
    for index, example in enumerate(examples):
        check_length(f"example {index}: its label", example.label or "")
        check_picture(example.image, context, limits, f"example {index}")


def _pixels(data: bytes, limits: Limits, where: str, whole: bool) -> int:
    try:
        if len(data) > limits.image_bytes:
            raise ImageTooLarge(
                f"the picture has {len(data)} bytes; at most {limits.image_bytes} are read. Scale it down."
            )
        return count_pixels(data, max_pixels=limits.image_pixels, whole=whole)
    except InputError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


def check_query(request: Request, names: Collection[str], repeated: Collection[str] = ()) -> None:
    """Raises `InvalidRequest` unless each field of the query is one of ``names``, and there once, or is ``repeated``.

    A misspelt field that is ignored would give a broader answer than the caller asked for.
    """
    counts = Counter(name for name, _ in request.query_params.multi_items())
    for name, count in counts.items():
        fault = "unknown" if name not in names else "given twice" if count > 1 and name not in repeated else ""
        if fault:
            known = f"the query may have {', '.join(sorted(names))}" if names else "this request has none"
            message = f"the field {name[:100]!r} of the query is {fault}; {known}"
            raise InvalidRequest(message, [{"where": name[:100], "message": fault}])


async def _fields(request: Request, content_type: str, model: type[Body], limits: Limits) -> Mapping[str, Any]:
    if HANDED in request.scope:
        handed: Mapping[str, Any] = request.scope[HANDED]
        return handed
    if model.raw and content_type in ("application/json", "multipart/form-data"):
        if misplaced := sorted({*request.query_params} & {*model.model_fields}):
            raise BadRequest(
                f"{misplaced[0]!r} is in the query, which is read only with a raw picture; put it into the body"
            )
        check_query(request, ())
    if content_type == "application/json":
        limit = min(limits.body_bytes, model.max_bytes or limits.body_bytes)
        value = parse(await _read(request, limit, BodyTooLarge, "the body"))
        await Service.of(request).fetcher.fill(
            value, Context.of(request).reserve_bytes, apart=issubclass(model, PicturesBody)
        )
        return value
    if model.form and content_type == "multipart/form-data":
        return model.of_pairs(await _form(request, limits))
    if model.raw and (content_type.startswith("image/") or content_type in ("", OCTETS)):
        picture = await _read(request, limits.image_bytes, ImageTooLarge, "the picture")
        if not content_type and picture[:64].lstrip()[:1] == b"{":
            raise WrongContentType("the body looks like JSON and has no content type; send it as application/json")
        return model.of_pairs([*request.query_params.multi_items(), ("image", picture)])
    forms = ["multipart/form-data"] if model.form else []
    pictures = ["for a picture alone, image/* (such as image/jpeg)", OCTETS, "or none"] if model.raw else []
    expected = ", ".join(["application/json", *forms, *pictures])
    raise WrongContentType(f"the content type is {content_type or 'not given'!r}; expected {expected}")


async def _stream(request: Request, limit: int, error: type[InputError], name: str) -> AsyncGenerator[bytes, None]:
    """The body's chunks, unpacked. Raises ``error`` if Content-Length, or the received or unpacked bytes are above
    ``limit``; `BadRequest` for a body that cannot be unpacked, `WrongCoding`."""
    message = f"{name} has more than {limit} bytes, the most that are read"
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise error(message)
    coding = coding_of(request.headers)
    inflater = Inflater(coding) if coding else None
    received = unpacked = 0
    context = Context.of(request)
    async for chunk in request.stream():
        received += len(chunk)
        if not announced:  # else it is counted already
            context.reserve_bytes(len(chunk))
        if received > limit:
            raise error(message)
        if inflater is None:
            yield chunk
            continue
        for piece in inflater.feed(chunk):
            unpacked += len(piece)
            if unpacked > limit:
                raise error(f"{name} unpacks to more than {limit} bytes, the most that are read")
            context.reserve_bytes(len(piece))
            yield piece
            await asyncio.sleep(0)  # other requests go on between the pieces
    if inflater:
        inflater.end()


async def _read(request: Request, limit: int, error: type[InputError], name: str) -> bytes:
    return b"".join([chunk async for chunk in _stream(request, limit, error, name)])


class _Parser(MultiPartParser):
    spool_max_size = 1 << 62  # parts stay in memory, within the body's limit, so no disk is needed


async def _form(request: Request, limits: Limits) -> list[tuple[str, Any]]:
    stream = _stream(request, limits.body_bytes, BodyTooLarge, "the body")
    parts = limits.texts + limits.labels + limits.templates + limits.examples + limits.words + 16
    parser = _Parser(request.headers, stream, max_files=parts, max_fields=parts, max_part_size=limits.image_bytes)
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:  # the last two for an unknown charset
        raise BadRequest(f"the multipart body is broken: {getattr(error, 'message', error)}") from None
    try:
        return [(k, await v.read() if isinstance(v, UploadFile) else v) for k, v in form.multi_items()]
    finally:
        await form.close()
