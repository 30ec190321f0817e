"""The one writer of a collection, over a table that only takes notes."""

import asyncio
import threading

import numpy as np
import pytest

import service.collections
from models.errors import BadRequest, CollectionNotFound, Overloaded
from service.collections import Collection
from service.metrics import Metrics
from service.settings import Settings
from service.stores import Info, Row


class Notes:
    """Remembers commits; `gate` holds them back."""

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
        self.commits.append(("upsert", [f"{row.id}={row.meta.get('v', '')}" for row in rows]))

    def delete(self, ids):
        self.commits.append(("delete", list(ids)))
        return len(ids)

    def count(self):
        return 7

    def compact(self):
        self.compacted += 1


def row(name: str, v: object = "") -> Row:
    return Row(name, np.zeros(2, np.float32), {"v": v})


def run(scenario, max_pending: int = 64):
    async def main():
        notes = Notes()
        collection = Collection(notes, Metrics(Settings()), max_pending)
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


def test_what_waits_is_written_together_and_the_later_write_wins():
    async def scenario(collection, notes):
        writes = [collection.upsert([row("a", 1), row("b", 1)]), collection.upsert([row("a", 2)])]
        tasks = await behind(collection, notes, *writes)
        notes.gate.set()
        assert await asyncio.gather(*tasks) == [1, 2, 1]

    assert run(scenario).commits == [("upsert", ["first="]), ("upsert", ["a=2", "b=1"])]


def test_a_delete_keeps_its_place():
    async def scenario(collection, notes):
        writes = [collection.upsert([row("a")]), collection.delete(["a", "a"]), collection.upsert([row("b")])]
        tasks = await behind(collection, notes, *writes)
        notes.gate.set()
        assert await asyncio.gather(*tasks) == [1, 1, 1, 1]

    assert [commit for commit, _ in run(scenario).commits] == ["upsert", "upsert", "delete", "upsert"]


def test_a_failed_commit_is_told_to_its_writers_and_the_next_succeeds():
    async def scenario(collection, notes):
        with pytest.raises(OSError, match="disk full"):
            await collection.upsert([row("bad")])
        assert await collection.upsert([row("good")]) == 1

    assert run(scenario).commits == [("upsert", ["good="])]


def test_bounds():
    async def scenario(collection, notes):
        with pytest.raises(BadRequest, match="'a' is given twice"):
            await collection.upsert([row("a"), row("a")])
        tasks = await behind(collection, notes, *[collection.upsert([row(str(i))]) for i in range(2)])
        with pytest.raises(Overloaded, match="2 writes wait"):
            await collection.upsert([row("more")])
        notes.gate.set()
        await asyncio.gather(*tasks)

    run(scenario, max_pending=2)


def test_close_writes_what_waits_and_takes_no_more():
    async def scenario(collection, notes):
        tasks = await behind(collection, notes, collection.upsert([row("waiting")]))
        closing = asyncio.create_task(collection.close())
        await asyncio.sleep(0.02)
        with pytest.raises(CollectionNotFound, match="being deleted"):
            await collection.upsert([row("late")])
        notes.gate.set()
        await asyncio.gather(closing, *tasks)

    assert run(scenario).commits[-1] == ("upsert", ["waiting="])


def test_compaction_after_many_commits_and_after_fewer_when_idle(monkeypatch):
    monkeypatch.setattr(service.collections, "COMPACT_AFTER", 4)
    monkeypatch.setattr(service.collections, "COMPACT_IDLE", (2, 0.05))

    async def scenario(collection, notes):
        for i in range(5):
            await collection.upsert([row(str(i))])
        assert notes.compacted == 1
        await asyncio.sleep(0.15)
        assert notes.compacted == 1  # one commit is too few
        await collection.upsert([row("x")])
        await asyncio.sleep(0.15)
        assert notes.compacted == 2
        assert await collection.upsert([row("y")]) == 1

    run(scenario)
