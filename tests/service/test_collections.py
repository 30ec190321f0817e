"""The writer of a collection over a table that notes its commits, and all collections over a store of such tables."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import calmclip.service.collections
from calmclip.models.errors import (
    BadRequest,
    CollectionDamaged,
    CollectionExists,
    CollectionMismatch,
    CollectionNotFound,
    Overloaded,
    StoreUnavailable,
)
from calmclip.service.collections import Collection, Collections
from calmclip.service.exchange import File
from calmclip.service.metrics import Metrics
from calmclip.service.settings import Settings, Slo
from calmclip.service.stores import Info, Row


class Notes:
    """A table that notes commits; `gate` holds them back."""

    info = Info("c", "m", "d", 2, "")

    def __init__(self) -> None:
        self.commits: list[tuple[str, list[str]]] = []
        self.compacted = 0
        self.gate = threading.Event()
        self.gate.set()

    def upsert(self, rows):
        self.gate.wait(5)
        if any(row.id == "bad" for row in rows):
            raise OSError("disk full")
        if any(row.id == "odd" for row in rows):
            raise BadRequest("the metadata holds a NUL")
        self.commits.append(("upsert", [f"{row.id}={row.meta.get('v', '')}" for row in rows]))

    def delete(self, ids):
        self.commits.append(("delete", list(ids)))
        return len(ids)

    def count(self):
        return 7

    def compact(self):
        self.compacted += 1

    def verify(self):
        """It is whole."""


def row(name: str, v: object = "") -> Row:
    return Row(name, np.zeros(2, np.float32), {"v": v})


def run(scenario, max_pending: int = 64):
    async def main():
        notes = Notes()
        with ThreadPoolExecutor(1) as readers:
            collection = Collection(notes, Metrics(Slo()), max_pending, readers)
            await scenario(collection, notes)
            notes.gate.set()
            await collection.close()
        return notes

    return asyncio.run(main())


async def behind(collection, notes, *writes):
    notes.gate.clear()
    first = asyncio.create_task(collection.upsert([row("first")]))
    await asyncio.sleep(0.02)
    tasks = [asyncio.create_task(write) for write in writes]
    await asyncio.sleep(0.02)
    return [first, *tasks]


def test_waiting_writes_are_merged_and_the_later_write_wins():
    async def scenario(collection, notes):
        writes = [collection.upsert([row("a", 1), row("b", 1)]), collection.upsert([row("a", 2)])]
        tasks = await behind(collection, notes, *writes)
        notes.gate.set()
        assert await asyncio.gather(*tasks) == [1, 2, 1]

    assert run(scenario).commits == [("upsert", ["first="]), ("upsert", ["a=2", "b=1"])]


def test_a_delete_keeps_its_position_among_the_writes():
    async def scenario(collection, notes):
        writes = [collection.upsert([row("a")]), collection.delete(["a", "a"]), collection.upsert([row("b")])]
        tasks = await behind(collection, notes, *writes)
        notes.gate.set()
        assert await asyncio.gather(*tasks) == [1, 1, 1, 1]

    assert [commit for commit, _ in run(scenario).commits] == ["upsert", "upsert", "delete", "upsert"]


def test_a_failed_commit_raises_for_its_writers_and_the_next_succeeds():
    async def scenario(collection, notes):
        with pytest.raises(OSError, match="disk full"):
            await collection.upsert([row("bad")])
        assert await collection.upsert([row("good")]) == 1

    assert run(scenario).commits == [("upsert", ["good="])]


@pytest.mark.parametrize(
    ("wrong", "outcomes", "commits"),
    [
        ("odd", [1, 1, BadRequest, 2], [["first="], ["a=1"], ["a=2", "b="]]),
        ("bad", [1, OSError, OSError, OSError], [["first="]]),  # no single write causes a full disk, so all writes fail
    ],
)
def test_an_invalid_write_does_not_fail_the_writes_merged_with_it(wrong, outcomes, commits):
    async def scenario(collection, notes):
        writes = [[row("a", 1)], [row(wrong)], [row("a", 2), row("b")]]
        tasks = await behind(collection, notes, *map(collection.upsert, writes))
        notes.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) if isinstance(result, Exception) else result for result in results] == outcomes

    assert run(scenario).commits == [("upsert", ids) for ids in commits]


def test_bounds():
    async def scenario(collection, notes):
        with pytest.raises(BadRequest, match="'a' is given twice"):
            await collection.upsert([row("a"), row("a")])
        tasks = await behind(collection, notes, *[collection.upsert([row(str(i))]) for i in range(2)])
        with pytest.raises(Overloaded, match="2 writes already wait"):
            await collection.upsert([row("more")])
        notes.gate.set()
        await asyncio.gather(*tasks)

    run(scenario, max_pending=2)


def test_close_commits_waiting_writes_and_refuses_new_writes():
    async def scenario(collection, notes):
        tasks = await behind(collection, notes, collection.upsert([row("waiting")]))
        closing = asyncio.create_task(collection.close())
        await asyncio.sleep(0.02)
        with pytest.raises(CollectionNotFound, match="being deleted"):
            await collection.upsert([row("late")])
        notes.gate.set()
        await asyncio.gather(closing, *tasks)

    assert run(scenario).commits[-1] == ("upsert", ["waiting="])


def test_a_cancelled_write_is_not_committed():
    async def scenario(collection, notes):
        writes = [collection.upsert([row("late")]), collection.delete(["late"]), collection.upsert([row("kept")])]
        first, late, too_late, last = await behind(collection, notes, *writes)
        late.cancel()
        too_late.cancel()
        await asyncio.sleep(0.02)
        notes.gate.set()
        assert await asyncio.gather(first, last) == [1, 1]

    assert run(scenario).commits == [("upsert", ["first="]), ("upsert", ["kept="])]


def test_compaction_after_many_commits_and_after_fewer_when_idle(monkeypatch):
    monkeypatch.setattr(calmclip.service.collections, "COMPACT_AFTER", 4)
    monkeypatch.setattr(calmclip.service.collections, "COMPACT_IDLE", (2, 0.05))

    async def scenario(collection, notes):
        for i in range(5):
            await collection.upsert([row(str(i))])
        assert notes.compacted == 1
        await asyncio.sleep(0.15)
        assert notes.compacted == 1  # a single commit is below the threshold
        await collection.upsert([row("x")])
        await asyncio.sleep(0.15)
        assert notes.compacted == 2
        assert await collection.upsert([row("y")]) == 1

    run(scenario)


class Shelf:
    """A store of `Notes`; `gate` holds back `create`, `replace` and `drop`."""

    shared = False

    def __init__(self, *names: str) -> None:
        self.tables = {name: Notes() for name in names}
        self.broken: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def names(self):
        return sorted(self.tables)

    def open(self, name):
        if name in self.broken:
            raise ValueError("no table")
        return self.tables[name]

    def create(self, info):
        self.gate.wait(5)
        assert info.name not in self.tables
        self.tables[info.name] = Notes()
        return self.tables[info.name]

    def replace(self, info, rows):
        self.gate.wait(5)
        time.sleep(0.05)
        assert list(rows)
        self.tables[info.name] = Notes()
        return self.tables[info.name]

    def drop(self, name):
        self.gate.wait(5)
        if name == "stuck":
            raise OSError("read-only")
        del self.tables[name]

    def close(self):
        self.closed, self.kept = True, sorted(self.tables)


BUNDLE = SimpleNamespace(name="m", embedding_digest="d", bundle=SimpleNamespace(dim=2))


def shelf(monkeypatch, scenario, store: Shelf, **limits: int):
    monkeypatch.setattr(calmclip.service.collections, "open_store", lambda url, read_only: store)

    async def main():
        collections = Collections(Settings(threads=1, limits=limits), Metrics(Slo()))
        try:
            await asyncio.wait_for(scenario(collections), 4)
        finally:
            for gated in (store, *store.tables.values()):
                gated.gate.set()
            await collections.close()

    asyncio.run(main())


async def hang_up(coroutine):
    """Starts the coroutine and cancels it, like a client that disconnects."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_collection_exists_if_its_creator_disconnected(monkeypatch):
    store = Shelf()

    async def scenario(collections):
        await collections.load()
        store.gate.clear()
        await hang_up(collections.create("a", BUNDLE))
        store.gate.set()
        assert (await collections.create("a", BUNDLE))[1] is False
        assert [collection.table for collection in await collections.all()] == [store.tables["a"]]

    shelf(monkeypatch, scenario, store)


def bank_of(name: str, *rows: Row) -> File:
    return File(Info(name, "UniME", "", 2, ""), iter([list(rows)]))


def test_the_name_of_a_bank_is_taken_while_it_is_read_and_free_if_it_fails(monkeypatch):
    store = Shelf()

    def broken():
        yield [row("x")]
        raise BadRequest("row 2 is no unit vector")

    async def scenario(collections):
        await collections.load()
        store.gate.clear()
        await hang_up(collections.add(bank_of("a", row("x"))))
        with pytest.raises(CollectionExists):
            await collections.add(bank_of("a", row("y")))
        with pytest.raises(CollectionExists):
            await collections.create("a", BUNDLE)
        with pytest.raises(BadRequest, match="there are 1 collections, which is the limit"):
            await collections.create("b", BUNDLE)
        store.gate.set()
        added = None
        while added is None:  # the caller of the bank has left
            await asyncio.sleep(0.01)
            with contextlib.suppress(CollectionNotFound):
                added = await collections.get("a")
        assert added.table is store.tables["a"]
        await collections.drop("a")
        with pytest.raises(BadRequest, match="row 2"):
            await collections.add(File(Info("b", "UniME", "", 2, ""), broken()))
        assert store.names() == []
        assert (await collections.create("b", BUNDLE))[1] is True

    shelf(monkeypatch, scenario, store, collections=1)


def test_a_service_that_ends_waits_for_the_bank_that_it_reads(monkeypatch):
    store = Shelf()

    async def scenario(collections):
        await collections.load()
        store.gate.clear()
        await hang_up(collections.add(bank_of("a", row("x"))))

    shelf(monkeypatch, scenario, store)
    assert store.kept == ["a"]


def test_a_collection_is_deleted_if_its_deleter_disconnected(monkeypatch):
    store = Shelf("a")
    old = store.tables["a"]

    async def scenario(collections):
        await collections.load()
        write, *_ = await behind(await collections.get("a"), old)
        await hang_up(collections.drop("a"))  # while the deletion waits for the write
        old.gate.set()
        assert await write == 1
        assert (await collections.create("a", BUNDLE))[1] is True
        assert store.tables["a"] is not old

    shelf(monkeypatch, scenario, store)


def test_a_collection_that_does_not_open_keeps_its_name_until_deleted(monkeypatch):
    store = Shelf("bad", "good")
    store.broken = {"bad"}

    async def scenario(collections):
        await collections.load()
        assert collections.failed == {"collection bad": "no table"}
        with pytest.raises(CollectionMismatch, match="does not open"):
            await collections.create("bad", BUNDLE)
        await collections.drop("bad")
        assert (collections.failed, store.names()) == ({}, ["good"])
        assert (await collections.create("bad", BUNDLE))[1] is True

    shelf(monkeypatch, scenario, store)


def test_a_collection_that_cannot_be_counted_is_not_open(monkeypatch):
    store = Shelf("bad")
    monkeypatch.setattr(store.tables["bad"], "count", lambda: 1 / 0)

    async def scenario(collections):
        await collections.load()
        assert list(collections.failed) == ["collection bad"]
        assert await collections.all() == []

    shelf(monkeypatch, scenario, store)


def test_what_is_damaged_is_shut_alone_and_tried_again_and_what_appears_is_served(monkeypatch):
    store = Shelf("bad", "good", "torn")
    store.broken = {"bad"}

    def torn():
        raise CollectionDamaged("a file is missing")

    monkeypatch.setattr(store.tables["torn"], "verify", torn)

    async def scenario(collections):
        await collections.load()
        damage = {"collection bad": "no table", "collection torn": "a file is missing"}
        assert collections.failed == collections.degraded == damage
        assert (await collections.get("good")).table is store.tables["good"]
        with pytest.raises(CollectionDamaged, match="'torn' does not open: a file is missing"):
            await collections.get("torn")
        await collections.refresh()
        assert collections.failed == damage
        store.broken.clear()
        store.tables["late"] = Notes()
        monkeypatch.undo()
        await collections.refresh()
        assert collections.failed == {}
        tables = [collection.table for collection in await collections.all()]
        assert tables == [store.tables[name] for name in ("bad", "good", "late", "torn")]

    shelf(monkeypatch, scenario, store)


def test_a_store_that_stops_to_answer_is_told_until_it_answers(monkeypatch):
    store = Shelf("a")
    monkeypatch.setattr(calmclip.service.collections, "OPEN_WAIT_S", 0)

    def away():
        raise StoreUnavailable("it does not answer")

    async def scenario(collections):
        loading = asyncio.create_task(collections.load())
        await asyncio.sleep(0)
        assert "is being opened" in collections.degraded["collections"]
        assert not collections.delays_ready  # tasks that need no store are served
        await loading
        assert collections.degraded == {}
        monkeypatch.setattr(store, "names", away)
        await collections.refresh()
        assert collections.degraded == {"collections": "it does not answer"}
        monkeypatch.undo()
        await collections.refresh()
        assert collections.degraded == {}

    shelf(monkeypatch, scenario, store)


def test_a_store_that_is_lost_while_it_opens_is_closed_and_opened_again(monkeypatch):
    store, answers = Shelf("a"), [StoreUnavailable("it does not answer")]
    monkeypatch.setattr(calmclip.service.collections, "RETRY_S", 0.01)

    def names():
        if answers:
            raise answers.pop()
        assert store.closed  # it was opened anew
        return ["a"]

    monkeypatch.setattr(store, "names", names)

    async def scenario(collections):
        await collections.load()
        assert "it does not answer" in collections.degraded["collections"]
        while collections.degraded:
            await asyncio.sleep(0.01)
        assert (await collections.get("a")).table is store.tables["a"]

    shelf(monkeypatch, scenario, store)


def test_a_collection_without_its_bundle_is_unbound_with_the_way_out(monkeypatch):
    async def scenario(collections):
        await collections.load()
        assert collections.unbound({"other", "d"}) == {}
        (reason,) = collections.unbound({"other"}).values()
        assert "no loaded bundle embeds the same" in reason
        assert "calmclip collection re-embed c" in reason

    shelf(monkeypatch, scenario, Shelf("c"))


def test_a_failed_deletion_may_be_repeated(monkeypatch):
    store = Shelf("stuck")

    async def scenario(collections):
        await collections.load()
        for _ in range(2):
            with pytest.raises(OSError, match="read-only"):
                await collections.drop("stuck")
            assert collections.failed == {"collection stuck": "the deletion failed: read-only"}

    shelf(monkeypatch, scenario, store)


def test_no_collection_is_listed_before_all_are_open(monkeypatch):
    async def scenario(collections):
        collections.failed["collection bad"] = "it does not open; the others were not opened yet"
        for ask in (collections.all(), collections.get("a")):
            with pytest.raises(Overloaded, match="still being opened"):
                await ask

    shelf(monkeypatch, scenario, Shelf("a"))


def test_slow_searches_leave_threads_for_writes(monkeypatch):
    store = Shelf("a")
    notes = store.tables["a"]
    held = threading.Event()
    monkeypatch.setattr(notes, "search", lambda *_: held.wait(5) and [], raising=False)

    async def scenario(collections):
        await collections.load()
        collection = await collections.get("a")
        searches = [asyncio.create_task(collection.search(np.zeros(2, np.float32), 1, ())) for _ in range(64)]
        await asyncio.sleep(0.02)
        try:
            assert await asyncio.wait_for(collection.upsert([row("x")]), 2) == 1
        finally:
            held.set()
        assert await asyncio.gather(*searches) == [[]] * 64

    shelf(monkeypatch, scenario, store)


def test_no_more_collections_than_allowed(monkeypatch):
    async def scenario(collections):
        await collections.load()
        with pytest.raises(BadRequest, match="1 collections, which is the limit"):
            await collections.create("b", BUNDLE)
        await collections.drop("a")
        assert (await collections.create("b", BUNDLE))[1] is True

    shelf(monkeypatch, scenario, Shelf("a"), collections=1)


class Labelled(Notes):
    """Three batches of two rows; ``read`` counts the batches, and each waits for the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.closed = 0, False

    def rows(self, originals=True):
        assert not originals
        try:
            for batch in range(3):
                self.read += 1
                self.gate.wait(5)
                yield [Row(f"{batch}{i}", np.eye(2, dtype=np.float32)[i], {"kind": ["a", 7][i]}) for i in range(2)]
        finally:
            self.closed = True


def test_items_with_a_label_are_read_and_the_others_are_counted():
    async def main():
        with ThreadPoolExecutor(1) as readers:
            collection = Collection(table := Labelled(), Metrics(Slo()), 64, readers)
            labelled = await collection.labelled("kind", 3)
            assert (labelled.vectors.tolist(), labelled.labels, labelled.others) == ([[1, 0]] * 3, ["a"] * 3, 3)
            empty = await collection.labelled("year", 3)
            assert (empty.vectors.shape, empty.labels, empty.others) == ((0, 2), [], 6)
            with pytest.raises(
                BadRequest, match="more than 2 items with a text under 'kind', the most that a fit reads"
            ):
                await collection.labelled("kind", 2)
            assert table.closed

    asyncio.run(main())


def test_a_fit_that_is_given_up_reads_no_further_batch():
    async def main():
        with ThreadPoolExecutor(1) as readers:
            collection = Collection(table := Labelled(), Metrics(Slo()), 64, readers)
            table.gate.clear()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await collection.labelled("kind", 3)
            table.gate.set()
        assert (table.read, table.closed) == (1, True)

    asyncio.run(main())
