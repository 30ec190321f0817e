"""/v1/collections/{name}/originals: the texts and pictures that a collection keeps."""

from typing import Annotated

from fastapi import Path
from fastapi.responses import Response

from calmclip.models.errors import InputError, ItemNotFound
from calmclip.models.preprocess.formats import FORMATS, opened
from calmclip.service.asked import Asked
from calmclip.service.endpoints import Endpoint
from calmclip.service.openapi import BINARY
from calmclip.service.routes.collections import DAMAGED, MISSING, SHOWN, STORE, open_collection, timed
from calmclip.service.schemas.collections import PlainText
from calmclip.service.uploads import PICTURES

TEXT, UNKNOWN = "text/plain; charset=utf-8", "application/octet-stream"
# A browser that opens the file runs nothing in it, and takes it for nothing else. A cache asks before it shows it.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, no-cache",
}


@Endpoint(
    "GET",
    "/v1/collections/{name}/originals/{id}",
    rest=True,
    task="collections",
    scope="read",
    tags=("collections",),
    summary="The text or picture of one item",
    description="As it was sent, with the content type of its bytes. Only collections with `keep_originals` have it. "
    "The id is the rest of the path, percent-encoded; a slash in it may stay as it is.",
    responses={200: {"content": {kind: {"schema": BINARY} for kind in (*PICTURES, "text/plain", UNKNOWN)}}},
    problems=(MISSING, "item-not-found", DAMAGED, *STORE, "invalid-request"),
)
async def get_original(
    asked: Asked[None], name: str, id: Annotated[PlainText, Path(description="the item's id")]
) -> Response:
    collection, limits = await open_collection(asked, name), asked.limits
    if not collection.info.originals:
        raise ItemNotFound(
            f"the collection {name!r} keeps no originals, so there is none of {id[:SHOWN]!r}; create it anew with "
            '`"keep_originals": true`'
        )
    asked.context.reserve_bytes(limits.image_bytes)  # of a picture, at most; a text is shorter
    async with timed(asked, "search"):
        rows = await collection.get([id], originals=True)
    if not rows:
        raise ItemNotFound(f"the collection {name!r} has no item {id[:SHOWN]!r}; GET …/items lists its ids")
    original = rows[0].original
    if original is None:
        raise ItemNotFound(f"the item {id[:SHOWN]!r} was added as a vector, so it has no original")
    data = original if isinstance(original, bytes) else original.encode()
    answer = asked.respond(data, kind=TEXT if isinstance(original, str) else content_type(data))
    answer.headers.update(HEADERS)
    return answer


def content_type(data: bytes) -> str:
    """Of a picture that was decoded before; no pixel is read."""
    try:
        with opened(data) as image:
            name = image.format or ""
    except InputError:  # of a format whose plug-in is not there any more
        return UNKNOWN
    name = "JPEG" if name == "MPO" else name  # several JPEGs in one file, of a phone
    return FORMATS[name].content_types[0] if name in FORMATS else UNKNOWN
