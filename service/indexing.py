"""A folder of pictures -> a collection, through the HTTP routes: of a running service, or of one in this process.

An item's id is the picture's path in the folder; its content's hash lies in the metadata, so a second run
sends only what is new or has changed. Title and thumbnail lie there too, as the page writes and shows them.
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

import httpx
import orjson
from tqdm import tqdm

from calmclip.models.errors import BadRequest, CalmclipError, InputError
from calmclip.models.preprocess.image import decode
from calmclip.service.settings import Settings

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
AT_ONCE = 16  # pictures in a request, but not more than
BYTES_AT_ONCE = 16 << 20
REQUESTS_AT_ONCE = 2  # one is prepared while the other is answered
TRIES = 20  # when the service is full
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
    """A small upright JPEG, or None: the service says what is wrong with the picture.

    Even noise makes a data URL within the limit of an item's metadata, 16 KiB; photographs make 2 to 8 kB.
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
    """What was added, skipped and broken. ``key``: for the service at ``url``.

    Raises `BadRequest`, and `CalmclipError` with what the service said.
    """
    if not folder.is_dir():
        raise BadRequest(f"{folder} is not a folder")
    try:
        return asyncio.run(_index(folder, collection, model, _client(url, settings, key)))
    except ExceptionGroup as group:  # of the requests under way; the first one says what is the matter
        raise group.exceptions[0] from None


async def _index(
    folder: Path, collection: str, model: str | None, opening: AbstractAsyncContextManager[httpx.AsyncClient]
) -> dict[str, Any]:
    start = perf_counter()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    async with opening as client:
        service = _Service(client, f"/v1/collections/{collection}")
        made = await service.ask("PUT", "", {"model": model} if model else {})
        there = await service.hashes()
        result: dict[str, Any] = {"added": 0, "skipped": 0, "broken": []}
        with tqdm(total=len(paths), unit="picture", disable=None) as bar:
            slots = asyncio.Semaphore(REQUESTS_AT_ONCE)
            async with asyncio.TaskGroup() as group:
                for batch, known in _batches(folder, paths, there):
                    result["skipped"] += known
                    bar.update(known)
                    if batch:
                        await slots.acquire()
                        group.create_task(_send(service, batch, result, bar, slots))
        items = (await service.ask("GET", ""))["items"]
    seconds = round(perf_counter() - start, 1)
    result["broken"].sort(key=lambda one: one["id"])
    return {"collection": collection, "model": made["model"], **result, "items": items, "seconds": seconds}


async def _send(
    service: "_Service", batch: list[Picture], result: dict[str, Any], bar: "tqdm[Any]", slots: asyncio.Semaphore
) -> None:
    """All at once; one by one where something among them is refused, to find out which."""
    try:
        try:
            await service.add(batch)
            result["added"] += len(batch)
        except _Refused as refused:
            for one in batch if len(batch) > 1 else ():
                try:
                    await service.add([one])
                    result["added"] += 1
                except _Refused as why:
                    result["broken"].append({"id": one.id, "why": str(why)})
            if len(batch) == 1:
                result["broken"].append({"id": batch[0].id, "why": str(refused)})
        bar.update(len(batch))
    finally:
        slots.release()


def _batches(folder: Path, paths: list[Path], there: dict[str, str]) -> Iterator[tuple[list[Picture], int]]:
    """Pictures to send together, and how many were passed over since the last time."""
    batch: list[Picture] = []
    known = 0
    for path in paths:
        data = path.read_bytes()
        picture = Picture(path.relative_to(folder).as_posix(), data, hashlib.sha256(data).hexdigest())
        if there.get(picture.id) == picture.sha256:
            known += 1
            continue
        if batch and (len(batch) == AT_ONCE or sum(len(p.data) for p in batch) + len(data) > BYTES_AT_ONCE):
            yield batch, known
            batch, known = [], 0
        batch.append(picture)
    yield batch, known


class _Refused(Exception):
    """The service reads this input never."""


class _Service:
    """The routes of one collection."""

    def __init__(self, client: httpx.AsyncClient, path: str) -> None:
        self._client = client
        self._path = path

    async def add(self, pictures: list[Picture]) -> None:
        items = await asyncio.to_thread(lambda: [picture.item() for picture in pictures])  # decoding takes its time
        await self.ask("POST", "/items", {"items": items})

    async def hashes(self) -> dict[str, str]:
        """id -> hash of what the collection holds."""
        found: dict[str, str] = {}
        after = ""
        while True:
            page = await self.ask("GET", "/items", None, limit=500, **({"after": after} if after else {}))
            found |= {item["id"]: item["meta"].get("sha256", "") for item in page["items"]}
            if page["next"] is None:
                return found
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
                raise CalmclipError(
                    f"{self._client.base_url} does not answer: {error or type(error).__name__}"
                ) from None
            if answer.status_code != 503:
                break
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
        try:
            value: dict[str, Any] = orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            raise CalmclipError(f"{answer.url} answered {answer.status_code} and no JSON; is it calmclip?") from None
        if answer.is_success:
            return value
        detail = value.get("detail", answer.reason_phrase)
        if path == "/items" and method == "POST" and answer.status_code in (413, 415, 422, 504):
            raise _Refused(detail)
        raise CalmclipError(f"{answer.status_code} {detail}")


@asynccontextmanager
async def _client(url: str | None, settings: Settings | None, key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """Of the service at ``url``, or of an app in this process, with its own collections open."""
    if url is not None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(base_url=url, timeout=120, headers=headers) as client:
            yield client
        return
    from calmclip.service.app import create_app

    app = create_app((settings or Settings()).model_copy(update={"keys": None}))  # nobody else asks it
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://in-process", timeout=None) as client,
    ):
        yield client
