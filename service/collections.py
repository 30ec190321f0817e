"""`Collections`: the named collections of a store. Each `Collection` has one writer.

Writes go through a queue. Waiting writes share a commit, because a store is slow with many small commits. A write is
answered when it is on disk. Reads have their own threads, so searches and writes do not wait for each other.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias, TypeVar

from calmclip.models.errors import (
    BadRequest,
    CalmclipError,
    CollectionError,
    CollectionMismatch,
    CollectionNotFound,
    InputError,
    Overloaded,
    StoreUnavailable,
    suggestion,
)
from calmclip.models.flow import Array
from calmclip.service.files import check_name
from calmclip.service.hub import Loaded
from calmclip.service.metrics import Metrics
from calmclip.service.quantized import QuantizedTable
from calmclip.service.settings import Settings
from calmclip.service.stores import Condition, ExclusiveTable, Info, Match, Row, Store, Table, open_store, redacted

T = TypeVar("T")
log = logging.getLogger("calmclip")

MAX_COMMIT_ROWS = 2048
COMPACT_AFTER = 64  # commits
COMPACT_IDLE = 8, 2.0  # commits that suffice if no write came for so many seconds
RETRY_S = 3.0  # between attempts to open a store that does not answer


@dataclass(frozen=True)
class _Write:
    rows: Sequence[Row]  # to upsert, or
    ids: Sequence[str]  # to delete
    done: "asyncio.Future[int]"


_Queue: TypeAlias = "asyncio.Queue[_Write]"


class Collection:
    """One open collection. ``readers``: the threads that read it."""

    def __init__(self, table: Table, metrics: Metrics, max_pending: int, readers: Executor) -> None:
        self.table = table
        self.info = table.info
        self._metrics = metrics
        self._readers = readers
        self._queue: _Queue = asyncio.Queue(max_pending)
        self._deferred: _Write | None = None  # taken from the queue, but not for the current commit
        self._uncompacted = 0  # commits since the last compaction
        self._closed = False
        self._writer: asyncio.Task[None] | None = None

    async def upsert(self, rows: Sequence[Row]) -> int:
        """The number of rows written. Raises `BadRequest` for a repeated id, `Overloaded`."""
        ids: set[str] = set()
        for row in rows:
            if row.id in ids:
                raise BadRequest(f"the id {row.id!r} is given twice; expected each once")
            ids.add(row.id)
        return await self._write(rows, ())

    async def delete(self, ids: Sequence[str]) -> int:
        """The number of rows deleted."""
        return await self._write((), tuple(dict.fromkeys(ids)))

    async def search(self, vector: Array, top_k: int, where: Sequence[Condition]) -> list[Match]:
        return await self._read(lambda: self.table.search(vector, top_k, where))

    async def page(self, after: str | None, limit: int) -> list[Match]:
        return await self._read(lambda: self.table.page(after, limit))

    async def count(self) -> int:
        return await self._read(self.table.count)

    def require(self, model: str, digest: str) -> None:
        """Raises `CollectionMismatch` unless this bundle filled the collection."""
        if digest != self.info.digest:
            raise CollectionMismatch(
                f"collection {self.info.name!r} holds vectors of {self.info.model!r} "
                f"(digest {self.info.digest[:12]}…); {model!r} has digest {digest[:12]}…, "
                "and its vectors cannot be compared with them"
            )

    async def close(self) -> None:
        """Writes that wait are written first."""
        self._closed = True
        if self._writer:
            await self._queue.join()
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)

    async def _read(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    async def _write(self, rows: Sequence[Row], ids: Sequence[str]) -> int:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise CollectionNotFound(f"collection {self.info.name!r} is being deleted")
        if self._writer is None:
            self._writer = loop.create_task(self._work(), name=f"writer-{self.info.name}")
        write = _Write(rows, ids, loop.create_future())
        try:
            self._queue.put_nowait(write)
        except asyncio.QueueFull:
            raise Overloaded(
                f"{self._queue.maxsize} writes already wait for collection {self.info.name!r}; try again in a second",
                reason="writes",
            ) from None
        return await write.done

    async def _work(self) -> None:
        while True:
            batch = [self._deferred or await self._next()]
            self._deferred = None
            while batch[0].rows and not self._queue.empty():
                write = self._queue.get_nowait()
                if not write.rows or sum(len(w.rows) for w in batch) + len(write.rows) > MAX_COMMIT_ROWS:
                    self._deferred = write
                    break
                batch.append(write)
            awaited = [write for write in batch if not write.done.done()]  # the callers of the others have left
            try:
                if awaited:
                    await self._write_batch(awaited)
            finally:
                for _ in batch:
                    self._queue.task_done()
            self._uncompacted += bool(awaited)
            if self._uncompacted >= COMPACT_AFTER:
                await self._compact()

    async def _write_batch(self, batch: Sequence[_Write]) -> None:
        """Commit the batch and answer its callers. If a write is invalid, commit each write alone, once."""
        try:
            counts = await asyncio.to_thread(self._commit, batch)
        except Exception as error:
            if len(batch) > 1 and isinstance(error, InputError):
                for write in batch:
                    await self._write_batch([write])
                return
            for write in batch:
                if not write.done.done():
                    write.done.set_exception(error)
        else:
            for write, count in zip(batch, counts, strict=True):
                if not write.done.done():
                    write.done.set_result(count)

    async def _next(self) -> _Write:
        commits, seconds = COMPACT_IDLE
        try:
            async with asyncio.timeout(seconds if self._uncompacted >= commits else None):
                return await self._queue.get()
        except TimeoutError:
            await self._compact()
            return await self._queue.get()

    def _commit(self, batch: Sequence[_Write]) -> list[int]:
        first = batch[0]
        if first.ids:
            counts = [self.table.delete(first.ids)]
        else:
            latest = {row.id: row for write in batch for row in write.rows}  # the later write wins
            self.table.upsert(list(latest.values()))
            counts = [len(write.rows) for write in batch]
        self._metrics.committed(self.info.name, self.table.count())
        return counts

    async def _compact(self) -> None:
        self._uncompacted = 0
        try:
            await asyncio.to_thread(self.table.compact)
        except Exception:  # the writes stay; the next compaction tries again
            log.exception("compaction of collection %s failed", self.info.name)


class Collections:
    """The collections of one store. If the store is shared, it is asked each time which collections exist."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._url = settings.store_url
        self._max_pending = settings.queue.max_pending
        self._max_collections = settings.limits.collections
        self._copy_bytes = settings.copy_bytes
        self._readers = ThreadPoolExecutor(settings.cores, thread_name_prefix="read")
        self._metrics = metrics
        self._store: Store | None = None
        self._open: dict[str, Collection] = {}
        self._lock = asyncio.Lock()
        self._retrying: asyncio.Task[None] | None = None
        self.failed: dict[str, str] = {}

    async def load(self) -> None:
        """Open the store and its collections. This imports the engine's library, in a thread.

        A collection that does not open is logged and added to `failed`; the others are served. A store that does not
        answer is tried again until it answers.
        """
        try:
            await self._load()
        except StoreUnavailable as error:
            self._fail(error)
            self._retrying = asyncio.create_task(self._retry(), name="store-retry")
        except Exception as error:
            self._fail(error)

    @property
    def loading(self) -> bool:
        return self._store is None and "collections" not in self.failed

    async def all(self) -> list[Collection]:
        """Sorted by name. Raises `Overloaded` while they are being opened."""
        store = self._ready()
        if store.shared:
            for name in {*await self._read(store.names), *self._open}:
                with suppress(CollectionNotFound):
                    await self.get(name)
        return [self._open[name] for name in sorted(self._open)]

    async def get(self, name: str) -> Collection:
        """Raises `CollectionNotFound`."""
        store = self._ready()
        if not store.shared:
            return self._known(name)
        with suppress(CollectionNotFound):
            table = await self._read(lambda: store.open(name))
            if name in self._open and self._open[name].table == table:
                return self._open[name]
        async with self._lock:
            return await self._current(store, name)

    async def create(self, name: str, loaded: Loaded) -> tuple[Collection, bool]:
        """The collection, and whether it is new.

        Raises `CollectionMismatch` if another bundle filled it or it does not open, `BadRequest` if there are too many
        collections. A client that hangs up does not cancel it: the store's thread would go on and leave an unknown
        table.
        """
        check_name("collection", name)
        return await asyncio.shield(self._create(self._ready(), name, loaded))

    async def drop(self, name: str) -> None:
        """Delete a collection, also one that does not open. A client that hangs up does not cancel it.

        Raises `CollectionNotFound`.
        """
        await asyncio.shield(self._drop(self._ready(), name))

    async def close(self) -> None:
        if self._retrying:
            self._retrying.cancel()
            await asyncio.gather(self._retrying, return_exceptions=True)
        async with self._lock:  # waits for a running `create` or `drop`
            for collection in self._open.values():
                await collection.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._store:
            await asyncio.to_thread(self._store.close)

    async def _load(self) -> None:
        store = await asyncio.to_thread(open_store, self._url)
        for name in await asyncio.to_thread(store.names):
            try:
                collection = await self._collection(store, await asyncio.to_thread(store.open, name))
                self._metrics.items(name, await collection.count())
                self._open[name] = collection
            except Exception as error:
                log.exception("collection %s does not open", name)
                self.failed[_entry(name)] = str(error) or repr(error)
        self._store = store

    async def _retry(self) -> None:
        while self._store is None:
            await asyncio.sleep(RETRY_S)
            try:
                await self._load()
                del self.failed["collections"]
                log.info("the store %s is open", redacted(self._url))
            except StoreUnavailable as error:
                self.failed["collections"] = str(error)
            except Exception as error:
                self._fail(error)
                return

    def _fail(self, error: Exception) -> None:
        """Log a stack trace only for errors that are not calmclip's: those say everything in their message."""
        log.error(
            "the store %s does not open: %s", redacted(self._url), error, exc_info=not isinstance(error, CalmclipError)
        )
        self.failed["collections"] = f"{redacted(self._url)} does not open: {error}"

    def _known(self, name: str) -> Collection:
        try:
            return self._open[name]
        except KeyError:
            known = sorted(self._open)
            raise CollectionNotFound(
                f"there is no collection {name!r}; {suggestion(name, known)}", known=known
            ) from None

    async def _current(self, store: Store, name: str) -> Collection:
        """The shared store's collection of this name. Another service may have created or replaced it."""
        try:
            table = await self._read(lambda: store.open(name))
        except CollectionNotFound:
            if closed := self._open.pop(name, None):
                await closed.close()
                self._metrics.items(name, None)
            return self._known(name)
        if name not in self._open or self._open[name].table != table:
            if closed := self._open.pop(name, None):
                await closed.close()
            self._open[name] = await self._collection(store, table)
        return self._open[name]

    async def _create(self, store: Store, name: str, loaded: Loaded) -> tuple[Collection, bool]:
        async with self._lock:
            if broken := self.failed.get(_entry(name)):
                raise CollectionMismatch(
                    f"the collection {name!r} exists and does not open ({broken}); delete it, or choose another name"
                )
            if store.shared:
                with suppress(CollectionNotFound):
                    await self._current(store, name)
            if name in self._open:
                self._open[name].require(loaded.name, loaded.digest)
                return self._open[name], False
            if len(self._open) >= self._max_collections:
                raise BadRequest(f"there are {len(self._open)} collections, which is the limit; delete one first")
            created = datetime.now(UTC).isoformat(timespec="seconds")
            info = Info(name, loaded.name, loaded.digest, loaded.bundle.dim, created)
            table = await asyncio.to_thread(store.create, info)
            self._open[name] = await self._collection(store, table)
            self._open[name].require(loaded.name, loaded.digest)  # another service may have created it first
            self._metrics.committed(name, 0)
            return self._open[name], True

    async def _drop(self, store: Store, name: str) -> None:
        async with self._lock:
            if _entry(name) not in self.failed:
                collection = await self._current(store, name) if store.shared else self._known(name)
                del self._open[name]
                await collection.close()
            try:
                await asyncio.to_thread(store.drop, name)
            except Exception as error:
                self.failed[_entry(name)] = f"the deletion failed: {error}"
                raise
            self.failed.pop(_entry(name), None)
            self._metrics.items(name, None)

    async def _read(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    async def _collection(self, store: Store, table: Table) -> Collection:
        if self._copy_bytes and not store.shared and isinstance(table, ExclusiveTable):
            table = await asyncio.to_thread(QuantizedTable, table, self._copy_bytes)
        return Collection(table, self._metrics, self._max_pending, self._readers)

    def _ready(self) -> Store:
        if self._store is None:
            if self._retrying and not self._retrying.done():
                raise StoreUnavailable(f"the store {redacted(self._url)} does not answer; try again in a few seconds")
            if "collections" in self.failed:
                raise CollectionError(f"the store {redacted(self._url)} did not open")
            raise Overloaded("the collections are still being opened; try again in a second", reason="loading")
        return self._store


def _entry(name: str) -> str:
    """The key of a collection in `failed`."""
    return f"collection {name}"
