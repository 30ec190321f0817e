"""Damaged collections: `Table.verify` refuses each and names what is wrong, or mends it. None opens as whole."""

import logging
import os
import shutil
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from calmclip.models.errors import CollectionDamaged, CollectionError
from calmclip.service.stores import Info, Row, lancedb, open_store

DIM = 64
INFO = Info("c", "m", "d", DIM, "", originals=True)
VECTORS = np.random.default_rng(0).normal(size=(2500, DIM)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
DELETED = {7, *range(2100, 2150)}
PRESENT = [i for i in range(2500) if i not in DELETED]


def rows(start, end, kind="text"):
    return [Row(f"{i:05}", VECTORS[i], {"n": i}, f"{kind} {i}") for i in range(start, end)]


@pytest.fixture(scope="module")
def small_indexes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lancedb, "INDEXED_FROM", 1000)
        patch.setattr(lancedb, "PARTITION", 512)
        patch.setattr(lancedb, "VERSION_AGE", timedelta(seconds=0))
        yield


@pytest.fixture(scope="module")
def whole(small_indexes, tmp_path_factory):
    """A table of two fragments, with deletion files, two indexes, and older versions. Copy it."""
    folder = tmp_path_factory.mktemp("whole")
    with closing(open_store(f"lancedb:{folder}")) as store:
        table = store.create(INFO)
        table.upsert(rows(0, 2000))
        table.compact()
        table.upsert(rows(2000, 2500))
        table.delete([f"{i:05}" for i in sorted(DELETED)])
        table.verify()
    return folder


@pytest.fixture(scope="module")
def other(small_indexes, tmp_path_factory):
    """A table of the same schema and sizes, with other rows."""
    folder = tmp_path_factory.mktemp("other")
    with closing(open_store(f"lancedb:{folder}")) as store:
        table = store.create(INFO)
        table.upsert(rows(0, 2000, "else"))
        table.compact()
        table.upsert([Row(row.id, -row.vector, row.meta, row.original) for row in rows(2000, 2500, "else")])
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "store")


def parts(folder, kind):
    """The files of the folder ``kind`` of the table, the oldest first."""
    return sorted((folder / "c.lance" / kind).rglob("*.*"), key=lambda path: path.stat().st_mtime_ns)


def refused(folder, read_only=False):
    """The reason why the collection does not open, or None after all rows, searches and writes were right."""
    with closing(open_store(f"lancedb:{folder}", read_only)) as store:
        try:
            table = store.open("c")
            table.verify()
        except CollectionDamaged as error:
            return str(error)
        check(table)
        if not read_only:
            table.upsert(rows(7, 8))
            table.compact()
            assert table.count() == len(PRESENT) + 1
    return None


def check(table):
    stored = {row.id: row for batch in table.rows() for row in batch}
    assert sorted(stored) == [hit.id for hit in table.page(None, 5000)] == [f"{i:05}" for i in PRESENT]
    assert table.count() == len(PRESENT)
    for i in (0, 1999, 2000, 2499):
        row = stored[f"{i:05}"]
        assert (row.vector.tolist(), row.meta, row.original) == (VECTORS[i].tolist(), {"n": i}, f"text {i}")
        nearest = PRESENT[int(np.argmax(VECTORS[PRESENT] @ VECTORS[i]))]
        assert table.search(VECTORS[i], 1)[0].id == f"{nearest:05}"
        assert len(table.row_numbers([row.id])) == 1


def missing(kind):
    return lambda folder, other: parts(folder, kind)[0].unlink()


def cut(kind, size):
    return lambda folder, other: os.truncate(parts(folder, kind)[0], size)


def foreign(folder, other):
    """The file of the same rows of another collection, under this one's name."""
    ours, theirs = (max(parts(place, "data"), key=lambda path: path.stat().st_size) for place in (folder, other))
    shutil.copy(theirs, ours)


def foreign_of_the_same_size(folder, other):
    """Only the checksum knows: the bytes of the first rows differ, size and footer do not."""
    path = parts(folder, "data")[0]
    data = bytearray(path.read_bytes())
    data[:256] = bytes(reversed(data[:256]))
    path.write_bytes(data)


def swapped(folder, other):
    first, second = parts(folder, "data")
    data = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(data)


def versions_alone(folder, other):
    for kind in ("data", "_deletions", "_indices", "_transactions"):
        shutil.rmtree(folder / "c.lance" / kind)


def data_alone(folder, other):
    for kind in ("_versions", "_deletions", "_indices", "_transactions"):
        shutil.rmtree(folder / "c.lance" / kind)


def newest(folder):
    return min((folder / "c.lance/_versions").glob("*.manifest"))  # Lance counts down


def older_manifests(folder, other):
    newest(folder).unlink()


def older_manifests_without_hint(folder, other):
    newest(folder).unlink()
    (folder / "c.lance/_versions/latest_version_hint.json").unlink()


def older_manifests_without_checksums(folder, other):
    newest(folder).unlink()
    (folder / "c.lance/_calmclip.json").unlink()


def newer_manifest(folder, other):
    """Data of an older backup under a newer manifest."""
    parts(folder, "data")[-1].unlink()


def flipped_manifest(folder, other):
    data = bytearray(newest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    newest(folder).write_bytes(data)


def no_table(folder, other):
    shutil.rmtree(folder / "c.lance")
    (folder / "c.lance").mkdir()
    (folder / "c.lance" / "notes.txt").write_text("x")


def a_file(folder, other):
    shutil.rmtree(folder / "c.lance")
    (folder / "c.lance").write_text("x")


def a_loop(folder, other):
    shutil.rmtree(folder / "c.lance")
    (folder / "c.lance").symlink_to("c.lance")


def a_looping_file(folder, other):
    path = parts(folder, "data")[0]
    path.unlink()
    path.symlink_to(path.name)


def unreadable(folder, other):
    """A folder in the place of a file: root may read every file, but not this."""
    path = parts(folder, "data")[0]
    path.unlink()
    path.mkdir()


def another_name(folder, other):
    shutil.rmtree(folder / "c.lance")
    with closing(open_store(f"lancedb:{folder}")) as store:
        store.create(Info("d", "m", "d", DIM, ""))
    (folder / "d.lance").rename(folder / "c.lance")


def another_table(folder, other):
    """A table of LanceDB that calmclip did not write."""
    import lancedb as engine

    shutil.rmtree(folder / "c.lance")
    engine.connect(folder).create_table("c", [{"id": "a"}])


REFUSED = [
    (missing("data"), r"data/\w+\.lance is missing"),
    *((cut("data", size), rf"data/\w+\.lance has {size} bytes; expected \d+") for size in (0, 1, 999, 100_000)),
    (foreign, r"data/\w+\.lance (has \d+ bytes; expected|is not the file that was written)"),
    (foreign_of_the_same_size, r"data/\w+\.lance is not the file that was written"),
    (swapped, r"data/\w+\.lance has \d+ bytes; expected"),
    (missing("_deletions"), r"_deletions/\S+ is missing"),
    *((cut("_deletions", size), r"_deletions/\S+ does not end as such a file does") for size in (0, 5, 300)),
    (versions_alone, r"data/\w+\.lance is missing"),
    (data_alone, "No such file or directory: c.lance/_versions"),
    (older_manifests, r"_versions/\d+\.manifest is missing; it belongs to the last write"),
    (older_manifests_without_hint, r"_versions/\d+\.manifest is missing; it belongs to the last write"),
    (older_manifests_without_checksums, r"_versions/\d+\.manifest is missing; it belongs to the last write"),
    (newer_manifest, r"data/\w+\.lance is missing"),
    (flipped_manifest, r"_versions/\d+\.manifest"),
    (lambda folder, other: os.truncate(newest(folder), 100), r"_versions/\d+\.manifest cannot be read: its last bytes"),
    (no_table, "No such file or directory: c.lance/_versions"),
    (a_file, "Not a directory: c.lance/_versions"),
    (a_loop, "Too many levels of symbolic links: c.lance/_versions"),
    (a_looping_file, r"data/\w+\.lance (is no file|cannot be read: Too many levels of symbolic links)"),
    (unreadable, r"data/\w+\.lance is no file"),
    (another_name, "it holds the collection 'd'; rename it to d.lance"),
    (another_table, "it is no table of calmclip"),
]


@pytest.mark.parametrize(("damage", "words"), REFUSED)
def test_a_damaged_collection_is_refused_and_the_others_open(folder, other, damage, words):
    with closing(open_store(f"lancedb:{folder}")) as store:
        store.create(Info("beside", "m", "d", DIM, ""))
    damage(folder, other)
    for read_only in (True, False):
        reason = refused(folder, read_only)
        assert reason, "it opened as whole"
        with pytest.raises(AssertionError, match=rf"c\.lance is damaged: {words}"):
            raise AssertionError(reason)
    with closing(open_store(f"lancedb:{folder}")) as store:
        assert store.names() == ["beside", "c"]
        store.open("beside").verify()
        store.drop("c")
        assert store.names() == ["beside"]
        table = store.create(INFO)
        table.upsert(rows(0, 10))
        table.verify()


def test_a_damaged_collection_can_be_replaced(folder, other):
    for damage in (missing("data"), a_file, older_manifests, lambda folder, _: os.truncate(newest(folder), 100)):
        damage(folder, other)
        assert refused(folder)
        with closing(open_store(f"lancedb:{folder}")) as store:
            table = store.replace(INFO, [rows(0, 2000), [row for row in rows(2000, 2500) if int(row.id) in PRESENT]])
            table.delete(["00007"])
            table.verify()
            check(table)


@pytest.mark.parametrize("size", [None, -1])
def test_whatever_file_is_lost_or_cut_off_the_answers_are_right_or_refused(whole, tmp_path, size):
    outcomes = {}
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        folder = shutil.copytree(whole, tmp_path / "store")
        if size is None:
            (folder / file).unlink()
        else:
            os.truncate(folder / file, (folder / file).stat().st_size + size)
        outcomes[str(file)] = refused(folder)
        shutil.rmtree(folder)
    kinds = {Path(file).parent.name for file, reason in outcomes.items() if reason}
    assert kinds == {"data", "_deletions", "_versions"}, outcomes
    assert sum(map(bool, outcomes.values())) == 5  # of each kind two, and the newest manifest


def test_a_damaged_index_is_built_again_from_the_rows(folder, caplog):
    for kind in ("page_data.lance", "page_lookup.lance", "auxiliary.idx", "index.idx"):
        path = max((folder / "c.lance/_indices").rglob(kind), key=lambda path: path.stat().st_mtime_ns)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert "opens it for writing builds the index again" in refused(folder, read_only=True)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            with closing(open_store(f"lancedb:{folder}")) as store:
                table = store.open("c")
                table.verify()
                check(table)
                assert {index.name.rstrip("0123456789") for index in table._table.list_indices()} == {"id", "near"}
        assert f"{kind} does not end as such a file does; its index is built again" in caplog.text


def test_stray_files_are_no_collections_and_leftovers_are_removed(folder):
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.lance").mkdir()
    (folder / "empty").mkdir()
    for leftover in (".built-1/c.lance", ".dropped-2/e.lance", ".replaced-3/c.lance"):
        (folder / leftover).mkdir(parents=True)
    with closing(open_store(f"lancedb:{folder}")) as store:
        assert store.names() == ["c"]
    assert refused(folder) is None
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".hidden.lance"]


def test_a_table_that_was_moved_away_and_not_replaced_comes_back(folder):
    (folder / ".replaced-1").mkdir()
    (folder / "c.lance").rename(folder / ".replaced-1/c.lance")
    assert refused(folder) is None


def test_a_store_for_reading_writes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with closing(open_store(f"lancedb:{folder}", read_only=True)) as store:
        table = store.open("c")
        table.verify()
        check(table)
        for write in (
            lambda: table.upsert(rows(0, 1)),
            lambda: table.delete(["00000"]),
            table.compact,
            lambda: store.create(INFO),
            lambda: store.replace(INFO, []),
            lambda: store.drop("c"),
        ):
            with pytest.raises(CollectionError, match="opened for reading"):
                write()
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path: before.get(path) for path in after} == after
