"""`Collections`: the named collections of a store. Each `Collection` has one writer.

Writes go through a queue. Waiting writes share a commit, because a store is slow with many small commits. A write is
answered when it is on disk. Reads have their own threads, so searches and writes do not wait for each other.
"""

import asyncio
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from threading import Event
from time import monotonic
from typing import TypeAlias, TypeVar

import numpy as np

from calmclip.models.errors import (
    BadRequest,
    CalmclipError,
    CollectionDamaged,
    CollectionError,
    CollectionExists,
    CollectionMismatch,
    CollectionNotFound,
    InputError,
    Overloaded,
    StoreUnavailable,
    suggestion,
)
from calmclip.models.files import check_name
from calmclip.models.flow import Array
from calmclip.models.tasks.features import check_dimensions
from calmclip.service import bank
from calmclip.service.exchange import File
from calmclip.service.hub import Loaded
from calmclip.service.metrics import Metrics
from calmclip.service.quantized import QuantizedTable
from calmclip.service.settings import Settings
from calmclip.service.stores import ExclusiveTable, Info, Match, Row, Store, Table, Where, open_store, redacted

T = TypeVar("T")
log = logging.getLogger("calmclip")

MAX_COMMIT_ROWS = 2048
COMPACT_AFTER = 64  # commits
COMPACT_IDLE = 8, 2.0  # commits that suffice if no write came for so many seconds
RETRY_S = 3.0  # between attempts to open a store that does not answer
TEND_S = 15.0  # between looks at the store: which collections exist, and which open by now
OPEN_WAIT_S = 10.0  # a start waits so long for the store; then the tasks that need none are served


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
        self.writes = 0  # rows that were written or deleted since it was opened
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

    async def search(self, vector: Array, top_k: int, where: Where) -> list[Match]:
        return await self._read(lambda: self.table.search(vector, top_k, where))

    async def page(self, after: str | None, limit: int, vectors: bool = False) -> list[Match]:
        return await self._read(lambda: self.table.page(after, limit, vectors))

    async def get(self, ids: Sequence[str], originals: bool = False) -> list[Row]:
        """The items of these ids that exist, in any order."""
        return await self._read(lambda: self.table.get(ids, originals))

    async def count(self) -> int:
        return await self._read(self.table.count)

    async def labelled(self, field: str, most: int) -> "Labelled":
        """The items whose metadata has a text under ``field``. Raises `BadRequest` for more than ``most``.

        It reads every item once; if its caller is cancelled, it stops after the current batch.
        """
        given_up = Event()
        try:
            return await self._read(lambda: _labelled(self.table, field, most, given_up))
        except asyncio.CancelledError:
            given_up.set()
            raise

    def require(self, model: str, digest: str | None) -> None:
        """Raises `CollectionMismatch` unless the bundle ``model`` embeds as the bundle that filled the collection.

        ``digest``: the bundle's `Bundle.embedding_digest`.
        """
        if self.info.foreign:
            raise CollectionMismatch(
                f"{model!r} does not fill the collection {self.info.name!r}: {unloaded(self.info)}"
            )
        if digest != self.info.digest:
            raise CollectionMismatch(
                f"collection {self.info.name!r} holds vectors of {self.info.model!r} "
                f"(embedding {self.info.digest[:12]}…); {model!r} embeds differently (embedding {str(digest)[:12]}…), "
                f"so its vectors cannot be compared with them. {way_out(self.info)}"
            )

    @property
    def closed(self) -> bool:
        """Whether it was deleted, or the service shuts down."""
        return self._closed

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
        self.writes += sum(counts)
        self._metrics.committed(self.info.name, self.table.count())
        return counts

    async def _compact(self) -> None:
        self._uncompacted = 0
        try:
            await asyncio.to_thread(self.table.compact)
        except Exception:  # the writes stay; the next compaction tries again
            log.exception("compaction of collection %s failed", self.info.name)


@dataclass(frozen=True)
class Labelled:
    """``vectors`` float32 [N, dim]; ``labels``: the text of each. ``others``: the number of items without a text."""

    vectors: Array
    labels: list[str]
    others: int


def _labelled(table: Table, field: str, most: int, given_up: Event) -> Labelled:
    vectors, labels, others = [np.empty((0, table.info.dim), np.float32)], list[str](), 0
    with closing(table.rows(originals=False)) as batches:  # type: ignore[type-var]  # it is a generator
        for batch in batches:
            if given_up.is_set():
                break
            chosen = [(row.vector, row.meta[field]) for row in batch if isinstance(row.meta.get(field), str)]
            others += len(batch) - len(chosen)
            if len(labels) + len(chosen) > most:
                raise BadRequest(
                    f"the collection {table.info.name!r} has more than {most} items with a text under {field[:100]!r}, "
                    "the most that a fit reads; fit to a smaller collection"
                )
            vectors += [vector[None] for vector, _ in chosen]
            labels += [label for _, label in chosen]
    return Labelled(np.concatenate(vectors), labels, others)


def unloaded(info: Info) -> str:
    """Why a collection is not served whose bundle is not loaded."""
    if info.foreign:
        return (
            f"it holds vectors of {info.model!r}, which is no bundle, so no text or picture can be embedded for it. "
            f"Send a `vector` of {info.dim} numbers that {info.model!r} made"
        )
    return (
        f"it holds vectors of {info.model!r} (embedding {info.digest[:12]}…), and no loaded bundle embeds the same. "
        f"{way_out(info)}"
    )


def way_out(info: Info) -> str:
    """What an operator can do about a collection whose bundle is not loaded."""
    return f"Load the bundle that filled it, or run 'calmclip collection re-embed {info.name}'"


class Collections:
    """The collections of one store. If the store is shared, it is asked each time which collections exist.

    ``failed``: why the store, or a collection, does not open; the other collections are served.
    """

    def __init__(self, settings: Settings, metrics: Metrics, read_only: bool = False) -> None:
        self._url = settings.store_url
        self._read_only = read_only
        self._max_pending = settings.queue.max_pending
        self._max_collections = settings.limits.collections
        self._copy_bytes = settings.copy_bytes
        self._keep_originals = settings.keep_originals
        self._readers = ThreadPoolExecutor(settings.cores, thread_name_prefix="read")
        self._metrics = metrics
        self._store: Store | None = None
        self._opening: asyncio.Task[Store] | None = None
        self._open: dict[str, Collection] = {}
        self._filling: set[str] = set()  # names of collections that `add` is filling,
        self._adding: set[asyncio.Task[Collection]] = set()  # and its tasks
        self._lock = asyncio.Lock()
        self._retrying: asyncio.Task[None] | None = None
        self._opening_since: float | None = None
        self.failed: dict[str, str] = {}

    async def load(self) -> None:
        """Open the store and its collections. If there are any, this imports the engine's library, in a thread.

        A collection that does not open is logged and added to `failed`; the others are served. A store that does not
        answer is tried again until it answers.
        """
        self._opening_since = monotonic()
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

    @property
    def delays_ready(self) -> bool:
        """Whether the service should not be ready yet: the store is being opened, for at most `OPEN_WAIT_S`."""
        since = self._opening_since
        return self.loading and (since is None or monotonic() < since + OPEN_WAIT_S)

    @property
    def degraded(self) -> dict[str, str]:
        """`failed`, and the store as long as it is being opened."""
        opening = {"collections": f"{redacted(self._url)} is being opened"} if self.loading else {}
        return {**opening, **self.failed}

    def unbound(self, embeddings: Container[str | None]) -> dict[str, str]:
        """Collection -> reason, for the collections whose embedding is none of ``embeddings``, the loaded ones."""
        infos = [collection.info for collection in self._open.values()]
        bound = [info for info in infos if not info.foreign]
        return {_entry(info.name): unloaded(info) for info in bound if info.digest not in embeddings}

    async def tend(self) -> None:
        """Until it is cancelled, every `TEND_S`: `refresh`."""
        while True:
            await asyncio.sleep(TEND_S)
            try:
                await self.refresh()
            except Exception:  # the next round tries again
                log.exception("the store %s cannot be checked", redacted(self._url))

    async def refresh(self) -> None:
        """Open the collections that appeared in the store, and try again those that did not open.

        `failed` says meanwhile whether the store answers.
        """
        if self._store is None:
            return
        try:
            names = await self._read(self._store.names)
        except StoreUnavailable as error:
            self.failed["collections"] = str(error)
            return
        self.failed.pop("collections", None)
        for name in {name for name in names if self._store.shared or name not in self._open}:
            with suppress(CollectionNotFound, CollectionDamaged):
                async with self._lock:
                    await self._current(self._store, name)
        for entry in self.failed.keys() - {_entry(name) for name in names}:
            del self.failed[entry]

    async def all(self) -> list[Collection]:
        """Sorted by name. Raises `Overloaded` while they are being opened."""
        store = self._ready()
        if store.shared:
            for name in {*await self._read(store.names), *self._open}:
                with suppress(CollectionNotFound, CollectionDamaged):
                    await self.get(name)
        return [self._open[name] for name in sorted(self._open)]

    async def get(self, name: str) -> Collection:
        """Raises `CollectionNotFound`."""
        store = self._ready()
        if reason := self.failed.get(_entry(name)):
            raise CollectionDamaged(f"the collection {name!r} does not open: {reason}")
        if not store.shared:
            return self._known(name)
        with suppress(CollectionNotFound):
            table = await self._read(lambda: store.open(name))
            if name in self._open and self._open[name].table == table:
                return self._open[name]
        async with self._lock:
            return await self._current(store, name)

    async def create(
        self, name: str, loaded: Loaded, originals: bool | None = None, dimensions: int | None = None
    ) -> tuple[Collection, bool]:
        """The collection, and whether it is new. ``originals``: whether it keeps what is embedded; None: the setting.
        ``dimensions``: the length of its vectors, one of `Bundle.dimensions`; None: all that the bundle makes.

        Raises `CollectionMismatch` if another bundle filled it, it does not open, or it exists and has other originals
        or another length; `BadRequest` for a length that the bundle does not have, and if there are too many
        collections. A client that hangs up does not cancel it: the
        store's thread would go on and leave an unknown table.
        """
        check_name("collection", name)
        check_dimensions(loaded.bundle, dimensions)
        return await asyncio.shield(self._create(self._ready(), name, loaded, originals, dimensions))

    async def add(self, file: File) -> Collection:
        """A new collection of the rows of ``file``, which appears with all of them or not at all.

        Raises `CollectionExists`; `BadRequest` if there are too many collections, and what the rows raise. A client
        that hangs up does not cancel it.
        """
        check_name("collection", file.info.name)
        adding = asyncio.create_task(self._add(self._ready(), file), name=f"bank-{file.info.name}")
        self._adding.add(adding)
        adding.add_done_callback(self._adding.discard)
        return await asyncio.shield(adding)

    async def bank(self, collection: Collection, most: int) -> bytes:
        """The collection as a bank (`service.bank`). Raises `BadRequest` for more than ``most`` bytes of vectors, ids
        and metadata."""

        def packed() -> bytes:
            file = BytesIO()
            bank.pack(collection.table, file, most=most)
            return file.getvalue()

        return await self._read(packed)

    async def drop(self, name: str) -> None:
        """Delete a collection, also one that does not open. A client that hangs up does not cancel it.

        Raises `CollectionNotFound`.
        """
        await asyncio.shield(self._drop(self._ready(), name))

    async def close(self) -> None:
        if self._retrying:
            self._retrying.cancel()
            await asyncio.gather(self._retrying, return_exceptions=True)
        await asyncio.gather(*self._adding, return_exceptions=True)  # the folder's lock is theirs until then
        async with self._lock:  # waits for a running `create` or `drop`
            for collection in self._open.values():
                await collection.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._opening:
            with suppress(Exception):  # it did not open
                await asyncio.to_thread((await self._opening).close)

    async def _load(self) -> None:
        self._opening = asyncio.create_task(
            asyncio.to_thread(open_store, self._url, self._read_only), name="store-open"
        )
        store = await asyncio.shield(self._opening)  # `close` waits for it: an open store holds its folder's lock
        try:
            for name in await asyncio.to_thread(store.names):
                with suppress(CollectionDamaged, CollectionNotFound):  # another service may delete it meanwhile
                    await self._adopt(store, name, await self._opened(store, name))
        except Exception:  # `_retry` opens it again
            self._opening = None
            await asyncio.to_thread(store.close)
            raise
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
        """The store's collection of this name, as it is now. Another service may have created or replaced it."""
        try:
            table = await self._opened(store, name)
        except CollectionNotFound:
            if closed := self._open.pop(name, None):
                await closed.close()
                self._metrics.items(name, None)
            return self._known(name)
        if name not in self._open or self._open[name].table != table:
            await self._adopt(store, name, table)
        return self._open[name]

    async def _opened(self, store: Store, name: str) -> Table:
        """Raises `CollectionNotFound`, `CollectionDamaged`."""
        with self._reported(name):
            return await self._read(lambda: store.open(name))

    async def _adopt(self, store: Store, name: str, table: Table) -> Collection:
        """Prove that the collection is whole, and serve it from now on. Raises `CollectionDamaged`."""
        if closed := self._open.pop(name, None):
            await closed.close()
        with self._reported(name):
            await self._read(table.verify)
            collection = await self._collection(store, table)
            self._metrics.items(name, await collection.count())
        self._open[name] = collection
        self.failed.pop(_entry(name), None)
        return collection

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """An error is the reason why this collection is shut: it goes to `failed` and, once, to the log.

        Raises `CollectionDamaged` for it, but `CollectionNotFound` and `StoreUnavailable` as they are.
        """
        try:
            yield
        except (CollectionNotFound, StoreUnavailable):
            raise
        except Exception as error:
            reason = str(error) or repr(error)
            if self.failed.get(_entry(name)) != reason:
                log.error(
                    "collection %s does not open: %s", name, reason, exc_info=not isinstance(error, CalmclipError)
                )
            self.failed[_entry(name)] = reason
            raise CollectionDamaged(f"the collection {name!r} does not open: {reason}") from error

    async def _add(self, store: Store, file: File) -> Collection:
        name = file.info.name
        async with self._lock:
            await self._look(store, name)
            if name in self._open:
                raise CollectionExists(f"there is a collection {name!r} already; delete it, or choose another name")
            self._require_room()
            self._filling.add(name)
        try:
            await asyncio.to_thread(store.replace, file.info, file.rows)
            async with self._lock:
                return await self._current(store, name)
        finally:
            self._filling.discard(name)

    async def _look(self, store: Store, name: str) -> None:
        """Before a collection is created, which another service may have done. Raises `CollectionMismatch` for a name
        whose collection does not open, `CollectionExists` for one that `add` is filling."""
        if broken := self.failed.get(_entry(name)):
            raise CollectionMismatch(
                f"the collection {name!r} exists and does not open ({broken}); delete it, or choose another name"
            )
        if name in self._filling:
            raise CollectionExists(f"the collection {name!r} is being filled from a bank; try again when it is done")
        if store.shared:
            with suppress(CollectionNotFound):
                await self._current(store, name)

    def _require_room(self) -> None:
        """Raises `BadRequest` at the limit."""
        if (count := len({*self._open, *self._filling})) >= self._max_collections:
            raise BadRequest(f"there are {count} collections, which is the limit; delete one first")

    async def _create(
        self, store: Store, name: str, loaded: Loaded, originals: bool | None, dimensions: int | None
    ) -> tuple[Collection, bool]:
        async with self._lock:
            await self._look(store, name)
            if name in self._open:
                _require(self._open[name], loaded, originals, dimensions)
                return self._open[name], False
            self._require_room()
            created = datetime.now(UTC).isoformat(timespec="seconds")
            keeps = self._keep_originals if originals is None else originals
            assert loaded.embedding_digest, "a collection needs a bundle that embeds"
            dim = dimensions or loaded.bundle.dim
            info = Info(name, loaded.name, loaded.embedding_digest, dim, created, keeps)
            table = await asyncio.to_thread(store.create, info)
            self._open[name] = await self._collection(store, table)
            _require(self._open[name], loaded, originals, dimensions)  # another service may have created it first
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
                raise StoreUnavailable(f"{self.failed['collections']}; try again in a few seconds")
            if "collections" in self.failed:
                raise CollectionError(f"the store {redacted(self._url)} did not open")
            raise Overloaded("the collections are still being opened; try again in a second", reason="loading")
        return self._store


def _require(collection: Collection, loaded: Loaded, originals: bool | None, dimensions: int | None) -> None:
    """Raises `CollectionMismatch` unless the collection is as the caller wants to create it."""
    collection.require(loaded.name, loaded.embedding_digest)
    if dimensions not in (None, dim := collection.info.dim):
        raise CollectionMismatch(
            f"the collection {collection.info.name!r} exists and its vectors have {dim} numbers, not {dimensions}. "
            "Leave `dimensions` out, or choose another name"
        )
    if originals not in (None, collection.info.originals):
        keeps = "keeps" if collection.info.originals else "does not keep"
        raise CollectionMismatch(
            f"the collection {collection.info.name!r} exists and {keeps} originals; expected the reverse. Leave "
            "`keep_originals` out, or choose another name"
        )


def _entry(name: str) -> str:
    """The key of a collection in `failed`."""
    return f"collection {name}"
