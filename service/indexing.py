"""A folder of pictures -> a collection, through the HTTP routes of a running service or of an app in this process.

An item's id is the picture's path in the folder. The metadata holds the hash of the file, so a second run sends only
new and changed pictures. It also holds a title and a thumbnail, in the format that the page writes and shows.
"""

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import orjson
from tqdm import tqdm

from calmclip.models.errors import BadRequest, CalmclipError, InputError
from calmclip.models.preprocess.image import decode
from calmclip.service.settings import Settings, from_environment

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BATCH_PICTURES = 16  # per request, and at most
BATCH_BYTES = 16 << 20
CONCURRENT_REQUESTS = 2  # one is prepared while the service answers the other
TRIES = 20  # of a request that is answered 503
THUMBNAIL = 128  # pixels a side


class Picture(NamedTuple):
    id: str
    data: bytes
    sha256: str

    def item(self) -> dict[str, Any]:
        name = self.id.rpartition("/")[2]
        small = thumbnail(self.data)
        meta = {"file": name, "title": name, "sha256": self.sha256}
        return {
            "id": self.id,
            "image": {"b64": _base64(self.data)},
            "meta": meta | ({"thumbnail": f"data:image/jpeg;base64,{_base64(small)}"} if small else {}),
        }


def thumbnail(data: bytes) -> bytes | None:
    """A small upright JPEG. None if the picture cannot be decoded; the service then reports the error.

    Its data URL fits an item's metadata (16 KiB) even if the picture is noise; photographs take 2 to 8 kB.
    """
    try:
        image = decode(data)
    except InputError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return file.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def index(
    folder: Path,
    collection: str,
    *,
    model: str | None = None,
    url: str | None = None,
    settings: Settings | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """The numbers of added and skipped pictures, and the broken ones. ``key``: for the service at ``url``.

    Raises `BadRequest`, and `CalmclipError` with the service's error.
    """
    if not folder.is_dir():
        raise BadRequest(f"{folder} is not a folder")
    try:
        return asyncio.run(_index(folder, collection, model, _client(url, settings, key)))
    except ExceptionGroup as group:  # one per concurrent request; the first explains enough
        raise group.exceptions[0] from None


async def _index(
    folder: Path, collection: str, model: str | None, connect: AbstractAsyncContextManager[httpx.AsyncClient]
) -> dict[str, Any]:
    start = perf_counter()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    async with connect as client:
        service = _Service(client, collection)
        created = await service.ask("PUT", "", {"model": model} if model else {})
        hashes = await service.hashes()
        result: dict[str, Any] = {"added": 0, "skipped": 0, "broken": []}
        with tqdm(total=len(paths), unit="picture", disable=None) as bar:
            slots = asyncio.Semaphore(CONCURRENT_REQUESTS)
            async with asyncio.TaskGroup() as group:
                for batch, unchanged in _batches(folder, paths, hashes):
                    result["skipped"] += unchanged
                    bar.update(unchanged)
                    if batch:
                        await slots.acquire()
                        group.create_task(_send(service, batch, result, bar, slots))
        items = (await service.ask("GET", ""))["items"]
    seconds = round(perf_counter() - start, 1)
    result["broken"].sort(key=lambda entry: entry["id"])
    return {"collection": collection, "model": created["model"], **result, "items": items, "seconds": seconds}


async def _send(
    service: "_Service", batch: list[Picture], result: dict[str, Any], bar: "tqdm[Any]", slots: asyncio.Semaphore
) -> None:
    try:
        await _add(service, batch, result)
        bar.update(len(batch))
    finally:
        slots.release()


async def _add(service: "_Service", batch: list[Picture], result: dict[str, Any]) -> None:
    """Add a batch. If the service refuses it, add its pictures one by one to find the broken ones."""
    try:
        await service.add(batch)
        result["added"] += len(batch)
    except _Refused as error:
        if len(batch) == 1:
            result["broken"].append({"id": batch[0].id, "why": str(error)})
        else:
            for picture in batch:
                await _add(service, [picture], result)


def _batches(folder: Path, paths: list[Path], hashes: dict[str, str]) -> Iterator[tuple[list[Picture], int]]:
    """Pictures for one request, and the number of unchanged pictures since the previous batch."""
    batch: list[Picture] = []
    unchanged = 0
    for path in paths:
        data = path.read_bytes()
        picture = Picture(path.relative_to(folder).as_posix(), data, hashlib.sha256(data).hexdigest())
        if hashes.get(picture.id) == picture.sha256:
            unchanged += 1
            continue
        if batch and (len(batch) == BATCH_PICTURES or sum(len(p.data) for p in batch) + len(data) > BATCH_BYTES):
            yield batch, unchanged
            batch, unchanged = [], 0
        batch.append(picture)
    yield batch, unchanged


class _Refused(Exception):
    """The service refused the input; to send it again is useless."""


class _Service:
    """The routes of one collection."""

    def __init__(self, client: httpx.AsyncClient, collection: str) -> None:
        self._client = client
        self._path = f"/v1/collections/{quote(collection, safe='')}"

    async def add(self, pictures: list[Picture]) -> None:
        items = await asyncio.to_thread(lambda: [picture.item() for picture in pictures])  # decodes, which takes time
        await self.ask("POST", "/items", {"items": items})

    async def hashes(self) -> dict[str, str]:
        """id -> hash of the file, for every item of the collection."""
        hashes: dict[str, str] = {}
        after = ""
        while True:
            page = await self.ask("GET", "/items", None, limit=500, **({"after": after} if after else {}))
            hashes |= {item["id"]: item["meta"].get("sha256", "") for item in page["items"]}
            if page["next"] is None:
                return hashes
            after = page["next"]

    async def ask(self, method: str, path: str, body: object = None, **query: Any) -> dict[str, Any]:
        content = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"content-type": "application/json"}
        for _ in range(TRIES):
            try:
                answer = await self._client.request(
                    method, self._path + path, content=content, headers=headers, params=query
                )
            except httpx.HTTPError as error:
                why = error or type(error).__name__
                raise CalmclipError(f"{self._client.base_url} does not answer: {why}") from None
            if answer.status_code != 503:
                break
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
        try:
            value: dict[str, Any] = orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            raise CalmclipError(
                f"{answer.url} answered {answer.status_code} without JSON; check that it is a calmclip service"
            ) from None
        if answer.is_success:
            return value
        detail = value.get("detail", answer.reason_phrase)
        if path == "/items" and method == "POST" and answer.status_code in (413, 415, 422, 504):
            raise _Refused(detail)
        raise CalmclipError(f"{answer.status_code} {detail}")


@asynccontextmanager
async def _client(url: str | None, settings: Settings | None, key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service at ``url``, or of an app in this process that opens the collections itself."""
    if url is not None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(base_url=url, timeout=120, headers=headers) as client:
            yield client
        return
    from calmclip.service.app import create_app

    app = create_app((settings or from_environment()).model_copy(update={"keys": None}))  # no other client reaches it
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://in-process", timeout=None) as client,
    ):
        yield client
