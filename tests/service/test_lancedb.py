"""LanceDB: the recall of its vector index through writes and compactions; one writer, readers and copies beside it."""

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress

import numpy as np
import pytest

from calmclip.models.errors import CalmclipError, CollectionDamaged, ExtraMissing, StoreFull, StoreLocked
from calmclip.service.stores import Condition, Info, Row, lancedb, open_store

DIM = 128
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(60, DIM))
VECTORS = (CENTRES[RNG.integers(0, 60, 12_000)] + RNG.normal(size=(12_000, DIM))).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(lancedb, "INDEXED_FROM", 1000)
    monkeypatch.setattr(lancedb, "PARTITION", 512)
    return open_store(f"lancedb:{tmp_path}").create(Info("c", "m", "d", DIM, ""))


def write(table, start, end):
    table.upsert([Row(f"{i:05}", VECTORS[i], {"even": i % 2 == 0}) for i in range(start, end)])


def recall(table, present, where=()):
    hits = 0
    for query in VECTORS[-40:]:
        cosines = VECTORS[present].astype(np.float64) @ query
        nearest = table.search(query, 10, where)
        hits += len({hit.id for hit in nearest} & {f"{present[i]:05}" for i in np.argsort(-cosines)[:10]})
        assert [hit.score for hit in nearest] == pytest.approx(
            [float(VECTORS[int(hit.id)] @ query) for hit in nearest], abs=1e-5
        )
    return hits / 400


def near(table):
    return [index.name for index in table._table.list_indices() if index.columns == ["vector"]]


def test_an_index_is_built_kept_and_rebuilt(table):
    write(table, 0, 900)
    table.compact()
    assert near(table) == []
    write(table, 900, 2000)
    table.compact()
    assert near(table) == ["near2000"]
    assert recall(table, np.arange(2000)) >= 0.99
    write(table, 2000, 3900)
    assert recall(table, np.arange(3900)) >= 0.99  # rows that are newer than the index are searched too
    table.compact()
    assert near(table) == ["near2000"]
    assert recall(table, np.arange(3900)) >= 0.99
    write(table, 3900, 11_000)
    table.compact()
    assert near(table) == ["near11000"]
    table.compact()
    assert recall(table, np.arange(11_000)) >= 0.99
    table.delete([f"{i:05}" for i in range(5000)])
    assert recall(table, np.arange(5000, 11_000)) >= 0.99
    even = np.arange(5000, 11_000, 2)
    assert recall(table, even, [Condition("even", "in", (True,))]) >= 0.99
    table.compact()
    assert recall(table, np.arange(5000, 11_000)) >= 0.99


ALL = 300  # rows of a commit
WRITER = """
import sys, numpy as np
from datetime import timedelta
from calmclip.service.stores import Info, Row, lancedb, open_store
lancedb.VERSION_AGE = lancedb.CLOCK_MARGIN = timedelta(seconds=float(sys.argv[2]))
axes = np.eye(4, dtype=np.float32)
table = open_store(sys.argv[1]).create(Info("c", "m", "d", 4, "", originals=True))
for turn in range(100_000):
    table.upsert([Row(f"{i:03}", axes[i % 4], {"n": turn}, "x" * 1000) for i in range(300)])
    if turn % 3 == 2:
        table.compact()
    print(turn, flush=True)
"""

READER = """
import sys
from calmclip.service.stores import open_store
table = open_store(sys.argv[1], read_only=True).open("c")
print("reads", flush=True)
while True:
    assert len([row for batch in table.rows() for row in batch]) == 1
"""


@contextmanager
def writer(folder, keeps=120.0):
    """A process that replaces all rows with each commit, and compacts; older versions stay for ``keeps`` seconds."""
    command = [sys.executable, "-W", "ignore", "-c", WRITER, f"lancedb:{folder}", str(keeps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(8):
                assert process.stdout.readline()
            drain = threading.Thread(target=process.stdout.read)
            drain.start()
            yield process
            assert process.poll() is None, "the writer failed"
        finally:
            process.kill()
    drain.join()


def one_turn(rows):
    """The rows are those of one commit."""
    assert len({row.id for row in rows}) == len(rows) == ALL
    (turn,) = {row.meta["n"] for row in rows}
    return turn


def test_one_process_writes_and_a_second_is_told_which_one(tmp_path):
    url = f"lancedb:{tmp_path}"
    with writer(tmp_path) as process:
        with pytest.raises(StoreLocked, match=rf"process {process.pid} writes to {tmp_path}.*--url.*pgvector"):
            open_store(url)
        with closing(open_store(url, read_only=True)) as store:
            assert store.names() == ["c"]
    with closing(open_store(url)) as store:  # the lock of a killed process is free
        assert store.open("c").count() == ALL
        with pytest.raises(StoreLocked, match=f"process {os.getpid()} "):
            open_store(url)
    open_store(url).close()


def test_a_reader_beside_a_writing_process_sees_whole_commits(tmp_path):
    """The writer removes older versions after half a second; the reader takes longer for its rows."""
    with writer(tmp_path, keeps=0.5) as process, closing(open_store(f"lancedb:{tmp_path}", read_only=True)) as store:
        table = store.open("c")
        turns = []
        for _ in range(4):
            rows = []
            for batch in table.rows():
                if not rows:  # the rest is read after the clean-up
                    turns.append(max(hit.meta["n"] for hit in table.page(None, 5)))
                    while max(hit.meta["n"] for hit in table.page(None, 5)) < turns[-1] + 12:
                        one_turn(table.page(None, 1000))
                        assert len(table.search(np.eye(4, dtype=np.float32)[0], 10)) == 10
                        assert process.poll() is None, "the writer failed"
                rows += batch
            assert one_turn(rows) <= turns[-1]
            table.verify()
        assert turns == sorted(set(turns))
    assert not [*tmp_path.glob("calmclip-rows-*")]


def test_readers_that_end_during_a_compaction_do_not_stop_it(tmp_path):
    """Without a new try, about 4 compactions of 100 fail: LanceDB has listed the tag that the reader removes."""
    with closing(open_store(f"lancedb:{tmp_path}")) as store:
        table = store.create(Info("c", "m", "d", 4, ""))
        table.upsert([Row("a", np.eye(4, dtype=np.float32)[0], {})])
        reader = [sys.executable, "-W", "ignore", "-c", READER, f"lancedb:{tmp_path}"]
        with subprocess.Popen(reader, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "reads\n"
                for _ in range(200):
                    table.compact()
                assert process.poll() is None, "the reader failed"
            finally:
                process.kill()


def test_the_tag_of_a_killed_reader_is_removed(tmp_path, monkeypatch):
    reader = """
import sys
from calmclip.service.stores import open_store
rows = open_store(sys.argv[1], read_only=True).open("c").rows()
next(rows)
print("reads", flush=True)
sys.stdin.read()
"""
    url = f"lancedb:{tmp_path}"
    with closing(open_store(url)) as store:
        table = store.create(Info("c", "m", "d", 4, ""))
        table.upsert([Row("a", np.eye(4, dtype=np.float32)[0])])
        others = {"a-backup", "z-backup"}  # before and behind ours
        for tag in others:
            table._table.tags.create(tag, table._table.version)
        command = [sys.executable, "-c", reader, url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "reads\n"
            table.compact()
            tags = table._table.tags.list().keys() - others
            assert len(tags) == len([*tmp_path.glob("calmclip-rows-*")]) == 1, tags
            process.kill()
        table.compact()
        assert table._table.tags.list().keys() == others
        assert not [*tmp_path.glob("calmclip-rows-*")]


def version(table):
    """The number of commits: Lance names a version 2^64 - 1 minus its number."""
    return 2**64 - 1 - min(int(path.stem) for path in (table / "_versions").glob("*.manifest"))


def copied(table, place, order):
    """Copy a table's files in this order of folders, as ``cp -rn`` does; a file may vanish while it is copied."""
    for part in order:
        for path in sorted((table / part).rglob("*")) if (table / part).is_dir() else [table / part]:
            target = place / table.name / path.relative_to(table)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    shutil.copy(path, target)
                except FileNotFoundError:
                    target.unlink(missing_ok=True)


def opened(place):
    with closing(open_store(f"lancedb:{place}")) as store:
        table = store.open("c")
        table.verify()
        return one_turn([row for batch in table.rows() for row in batch])


SAFE = ("_calmclip.json", "_versions/latest_version_hint.json", "_versions", ".")  # as docs/operating.md has it


def test_a_copy_of_the_files_beside_a_writer_is_whole_or_refused(tmp_path):
    table = tmp_path / "store/c.lance"
    with writer(tmp_path / "store", keeps=0.0):
        for turn in range(6):
            copied(table, tmp_path / f"any{turn}", [("data", "."), ("_deletions", "_versions", "."), (".",)][turn % 3])
        for turn in range(2):
            copied(table, tmp_path / f"early{turn}", ["data"])
            seen = version(table)
            while version(table) < seen + 4:  # one commit may only delete
                time.sleep(0.01)
            copied(table, tmp_path / f"early{turn}", ["_versions", "_deletions", "_calmclip.json"])
    for turn in range(6):
        with suppress(CollectionDamaged):
            opened(tmp_path / f"any{turn}")
    for turn in range(2):
        with pytest.raises(CollectionDamaged, match="is missing"):
            opened(tmp_path / f"early{turn}")


def test_a_copy_in_the_documented_order_is_whole(tmp_path):
    with writer(tmp_path / "store"):
        for turn in range(6):
            copied(tmp_path / "store/c.lance", tmp_path / f"copy{turn}", SAFE)
    turns = [opened(tmp_path / f"copy{turn}") for turn in range(6)]
    assert turns == sorted(turns)


FULL = """
import resource, signal, sys, numpy as np
from pathlib import Path
from calmclip.models.errors import StoreFull
from calmclip.service.stores import Info, Row, open_store
store = open_store(sys.argv[1])
table = store.create(Info("c", "m", "d", 4, "", originals=True))
rng, axes = np.random.default_rng(0), np.eye(4, dtype=np.float32)
def rows(turn, size):
    return [Row(f"{turn}-{i}", axes[i], {"n": turn}, rng.bytes(size)) for i in range(4)]
table.upsert(rows(0, 1000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
for attempt in (lambda: table.upsert(rows(1, 100_000)), lambda: store.replace(table.info, [rows(2, 100_000)])):
    try:
        attempt()
    except StoreFull as error:
        print(error, flush=True)
table.verify()
assert {row.id for batch in table.rows() for row in batch} == {f"0-{i}" for i in range(4)}
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
table.upsert(rows(3, 100_000))
table.compact()
table.verify()
assert table.count() == 8
assert store.open("c").count() == 8
"""


def test_a_write_without_room_loses_nothing_and_later_writes_work(tmp_path):
    """A limit on the size of files stands for a full disk: the kernel refuses the same writes with another number."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, f"lancedb:{tmp_path}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = f"File too large: the collections in {tmp_path} have no room; make some and try again"
    assert done.stdout.splitlines() == [said, said]
    assert issubclass(StoreFull, CalmclipError)


LAZY = """
import sys
from calmclip.service.stores import Info, open_store
store = open_store(sys.argv[1])
assert store.names() == []
assert not {"lancedb", "pyarrow"} & sys.modules.keys()
store.create(Info("c", "m", "d", 8, ""))
assert "lancedb" in sys.modules and store.names() == ["c"]
"""


def test_the_engine_is_imported_with_the_first_table(tmp_path):
    command = [sys.executable, "-c", LAZY, f"lancedb:{tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_engine_that_is_not_installed_is_named_at_the_opening(tmp_path, monkeypatch):
    monkeypatch.setattr(lancedb, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"the store lancedb needs 'lancedb', .*\[service\]"):
        open_store(f"lancedb:{tmp_path}")
