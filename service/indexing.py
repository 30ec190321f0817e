"""A folder of pictures -> a collection, through the HTTP routes of a running service or of an app in this process.

An item's id is the picture's path in the folder. The metadata holds the hash of the file, so a second run sends only
new and changed pictures. It also holds a title and a thumbnail, in the format that the page writes and shows. The
service makes the thumbnail from the pixels that it decodes for the vector. Memory: the files of at most three requests.
"""

import asyncio
import base64
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import orjson
from tqdm import tqdm

from calmclip.models.errors import BadRequest, CalmclipError
from calmclip.models.files import check_name
from calmclip.models.preprocess.image import SUFFIXES
from calmclip.service.local import URL, handing, transport
from calmclip.service.settings import Settings, from_environment

FIRST_PICTURES, MOST_PICTURES = 16, 256  # per request
REQUEST_S = 2.0  # that a request should take: a commit then costs little, and no deadline is near
BATCH_BYTES = 16 << 20  # of the pictures of one request
CONCURRENT_REQUESTS = 2  # one is prepared while the service answers the other
DELETED = 500  # items per request
TRIES = 20  # of a request that is answered 503


class Picture(NamedTuple):
    id: str
    data: bytes
    sha256: str

    @property
    def meta(self) -> dict[str, Any]:
        """All but the thumbnail."""
        name = self.id.rpartition("/")[2]
        return {"file": name, "title": name, "sha256": self.sha256}


class Pace:
    """How many pictures the next request has. A store is slow with many small commits, and a large bundle must answer
    before the service's deadline."""

    def __init__(self) -> None:
        self.pictures = FIRST_PICTURES

    def took(self, pictures: int, seconds: float) -> None:
        """A request of so many pictures was answered."""
        if seconds > 2 * REQUEST_S:
            self.pictures = max(1, min(self.pictures, pictures) // 2)
        elif seconds < REQUEST_S / 2 and pictures >= self.pictures:
            self.pictures = min(MOST_PICTURES, 2 * self.pictures)


class Listed(NamedTuple):
    """``pictures``: files to index, in order. ``others``: suffix -> number of other files. ``ids``: of all files."""

    pictures: list[Path]
    others: dict[str, int]
    ids: set[str]


def files(folder: Path) -> Listed:
    """All files of the folder and its folders. Time grows with their number; none is opened."""
    pictures, others, ids = list[Path](), Counter[str](), set[str]()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        ids.add(path.relative_to(folder).as_posix())
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            pictures.append(path)
        else:
            others[suffix or path.name] += 1
    return Listed(pictures, dict(others.most_common()), ids)


def index(
    folder: Path,
    collection: str,
    *,
    model: str | None = None,
    url: str | None = None,
    settings: Settings | None = None,
    key: str | None = None,
    prune: bool = False,
    prune_all: bool = False,
) -> dict[str, Any]:
    """The numbers of added, skipped and pruned pictures, the broken ones, and the files passed over, by suffix.
    ``key``: for the service at ``url``. ``prune``: remove the items whose file is gone, of those that were indexed;
    all of them only with ``prune_all``.

    Raises `BadRequest`, and `CalmclipError` with the service's error.
    """
    if not folder.is_dir():
        raise BadRequest(f"{folder} is not a folder")
    check_name("collection", collection)
    listed = files(folder)
    if prune and not listed.pictures:
        raise BadRequest(f"{folder} has no picture, so every item would be removed; is the disk mounted?")
    try:
        connect = _remote(url, collection, key) if url is not None else _local(settings, collection, model)
        return asyncio.run(_index(folder, listed, collection, model, connect, (prune, prune_all)))
    except ExceptionGroup as group:  # one per concurrent request; the first explains enough
        raise group.exceptions[0] from None


async def _index(
    folder: Path,
    listed: Listed,
    collection: str,
    model: str | None,
    connect: AbstractAsyncContextManager["_Service"],
    prune: tuple[bool, bool],
) -> dict[str, Any]:
    start = perf_counter()
    async with connect as service:
        created = await service.ask("PUT", "", {"model": model} if model else {})
        hashes = await service.hashes()
        gone = _gone(folder, listed, hashes, prune[1]) if prune[0] else []
        result: dict[str, Any] = {"added": 0, "skipped": 0, "pruned": 0, "broken": [], "passed_over": listed.others}
        pace = Pace()
        batches = _batches(folder, listed.pictures, hashes, pace)
        with tqdm(total=len(listed.pictures), unit="picture", disable=None) as bar:
            slots = asyncio.Semaphore(CONCURRENT_REQUESTS)
            async with asyncio.TaskGroup() as group:
                while (batch := await asyncio.to_thread(next, batches, None)) is not None:
                    pictures, unchanged = batch
                    result["skipped"] += unchanged
                    bar.update(unchanged)
                    if pictures:
                        await slots.acquire()
                        group.create_task(_send(service, pictures, result, bar, slots, pace))
        for start_ in range(0, len(gone), DELETED):
            answer = await service.ask("DELETE", "/items", {"ids": gone[start_ : start_ + DELETED]})
            result["pruned"] += answer["count"]
        items = (await service.ask("GET", ""))["items"]
    seconds = round(perf_counter() - start, 1)
    result["broken"].sort(key=lambda entry: entry["id"])
    return {"collection": collection, "model": created["model"], **result, "items": items, "seconds": seconds}


def _gone(folder: Path, listed: Listed, hashes: Mapping[str, str], prune_all: bool) -> list[str]:
    """The ids of indexed items without a file. Raises `BadRequest` for all of them without ``prune_all``."""
    indexed = [id_ for id_, sha256 in hashes.items() if sha256]  # the others came from elsewhere
    gone = [id_ for id_ in indexed if id_ not in listed.ids]
    if gone and len(gone) == len(indexed) and not prune_all:
        raise BadRequest(
            f"none of the {len(gone)} indexed items has its file in {folder}, such as {gone[0]!r}; is it the folder "
            "that was indexed? --yes removes them all"
        )
    return gone


async def _send(
    service: "_Service",
    batch: list[Picture],
    result: dict[str, Any],
    bar: "tqdm[Any]",
    slots: asyncio.Semaphore,
    pace: Pace,
) -> None:
    start = perf_counter()
    try:
        await _add(service, batch, result)
        bar.update(len(batch))
        pace.took(len(batch), perf_counter() - start)
    finally:
        slots.release()


async def _add(service: "_Service", batch: list[Picture], result: dict[str, Any]) -> None:
    """Add a batch. If the service refuses it, add its halves, down to the broken pictures."""
    try:
        await service.add(batch)
        result["added"] += len(batch)
    except _Refused as error:
        if len(batch) == 1:
            id_ = batch[0].id
            result["broken"].append({"id": id_, "why": str(error).removeprefix(f"item {id_!r}: ")})
        else:
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                await _add(service, half, result)


def _batches(
    folder: Path, paths: list[Path], hashes: Mapping[str, str], pace: Pace
) -> Iterator[tuple[list[Picture], int]]:
    """Pictures for one request, and the number of unchanged pictures since the previous batch."""
    batch: list[Picture] = []
    size = unchanged = 0
    for path in paths:
        data = path.read_bytes()
        picture = Picture(path.relative_to(folder).as_posix(), data, hashlib.sha256(data).hexdigest())
        if hashes.get(picture.id) == picture.sha256:
            unchanged += 1
            continue
        if batch and (len(batch) >= pace.pictures or size + len(data) > BATCH_BYTES):
            yield batch, unchanged
            batch, size, unchanged = [], 0, 0
        batch.append(picture)
        size += len(data)
    yield batch, unchanged


class _Refused(Exception):
    """The service refused the input; to send it again is useless."""


class _Service:
    """The routes of one collection. ``local``: they are in this process and take fields as they are."""

    def __init__(self, client: httpx.AsyncClient, collection: str, local: bool = False) -> None:
        self._client = client
        self._path = f"/v1/collections/{quote(collection, safe='')}"
        self._local = local

    async def add(self, pictures: list[Picture]) -> None:
        items = [{"id": picture.id, "image": picture.data, "meta": picture.meta} for picture in pictures]
        await self.ask("POST", "/items", {"items": items, "thumbnails": True})

    async def hashes(self) -> dict[str, str]:
        """id -> hash of the file, for every item of the collection; "" if it came from elsewhere."""
        hashes: dict[str, str] = {}
        after = ""
        while True:
            rest = {"after": after} if after else {}
            page = await self.ask("GET", "/items", None, limit=500, fields="sha256", **rest)  # without thumbnails
            hashes |= {item["id"]: str(item["meta"].get("sha256", "")) for item in page["items"]}
            if page["next"] is None:
                return hashes
            after = page["next"]

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, **query: Any) -> dict[str, Any]:
        content = None if body is None or self._local else await asyncio.to_thread(_json, body)
        headers = {"content-type": "application/json"} if content else {}
        for _ in range(TRIES):
            try:
                with handing(body) if body is not None and self._local else nullcontext():
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


def _json(body: Mapping[str, Any]) -> bytes:
    """Pictures, which are bytes, as base64."""
    return orjson.dumps(body, default=lambda data: {"b64": base64.b64encode(data).decode()})


@asynccontextmanager
async def _remote(url: str, collection: str, key: str | None) -> AsyncIterator[_Service]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, timeout=120, headers=headers) as client:
        yield _Service(client, collection)


@asynccontextmanager
async def _local(settings: Settings | None, collection: str, model: str | None) -> AsyncIterator[_Service]:
    """Of an app in this process that opens the collections itself."""
    async with (
        transport(settings or from_environment(), model=model) as reached,
        httpx.AsyncClient(transport=reached, base_url=URL, timeout=None) as client,
    ):
        yield _Service(client, collection, local=True)
