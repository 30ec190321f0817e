"""PostgreSQL: damaged collections, replacements beside writers, and pg_dump beside a writer."""

import logging
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from calmclip.models.errors import CalmclipError, CollectionDamaged, Overloaded
from calmclip.service.stores import Condition, Info, Row, open_store

DIM = 8
INFO = Info("c", "m", "d", DIM, "", originals=True)
AXES = np.eye(DIM, dtype=np.float32)


def rows(count, turn=0):
    return [Row(f"{i:03}", AXES[i % DIM], {"n": turn}, f"text {i}") for i in range(count)]


@pytest.fixture
def url(postgres):
    """A database with one collection of 100 rows."""
    url = postgres.database()
    with closing(open_store(f"pgvector:{url}")) as store:
        store.create(INFO).upsert(rows(100))
    return url


@pytest.fixture
def sql(postgres, url):
    return lambda statement: postgres.psql(statement, url.rpartition("/")[2])


def whole(url, read_only=False, name="c"):
    """The rows of the collection, after all kinds of reads were right."""
    with closing(open_store(f"pgvector:{url}", read_only)) as store:
        table = store.open(name)
        table.verify()
        stored = [row for batch in table.rows() for row in batch]
        assert len(stored) == table.count() == len(table.page(None, 1000))
        assert all(row.original == f"text {int(row.id)}" for row in stored)
        assert table.search(AXES[3], 1)[0].score == pytest.approx(1)
        assert len(table.search(AXES[3], 1000, [Condition("n", "gte", 0)])) == len(stored)
    return stored


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("DROP TABLE calmclip_c1", "the table is missing, and calmclip_collections has an entry for it"),
        (
            "UPDATE calmclip_collections SET dim = 9 WHERE name = 'c'",
            r"the column vector is vector\(8\) NOT NULL; expected vector\(9\)",
        ),
        ("ALTER TABLE calmclip_c1 DROP COLUMN meta", "the column meta is missing; expected jsonb NOT NULL"),
        ("ALTER TABLE calmclip_c1 DROP COLUMN picture", "the column picture is missing; expected bytea"),
        ("ALTER TABLE calmclip_c1 ALTER text TYPE bytea USING NULL", "the column text is bytea; expected text"),
        ("ALTER TABLE calmclip_c1 ALTER meta DROP NOT NULL", "the column meta is jsonb; expected jsonb NOT NULL"),
        ('ALTER TABLE calmclip_c1 ALTER id TYPE text COLLATE "en-x-icu"', "the column id is text NOT NULL; expected"),
        ("ALTER TABLE calmclip_c1 DROP CONSTRAINT calmclip_c1_pkey", "no valid primary key, which a restore adds last"),
    ],
)
def test_a_damaged_table_is_refused_dropped_and_replaced(url, sql, damage, words):
    with closing(open_store(f"pgvector:{url}")) as store:
        store.create(Info("beside", "m", "d", DIM, "", originals=True)).upsert(rows(10))
    sql(damage)
    for read_only in (True, False):
        with pytest.raises(CollectionDamaged, match=f"the table calmclip_c1 of 'c' is damaged: .*{words}"):
            whole(url, read_only)
    assert len(whole(url, name="beside")) == 10
    with closing(open_store(f"pgvector:{url}")) as store:
        store.replace(INFO, [rows(20)]).verify()
        assert len(whole(url)) == 20
        number = sql("SELECT number FROM calmclip_collections WHERE name = 'c'")
        sql(f"DROP TABLE calmclip_c{number}")
        store.drop("c")
        assert store.names() == ["beside"]


def test_missing_data_files_of_the_server_are_damage(url, sql, postgres):
    sql("CHECKPOINT")
    (postgres.folder / "data" / sql("SELECT pg_relation_filepath('calmclip_c1')")).unlink()
    try:
        with pytest.raises(CollectionDamaged, match="could not open file"):
            whole(url)
    finally:  # pages of the file that are still to be written fail every later checkpoint of the server
        postgres.psql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")
    postgres.psql("CHECKPOINT")


@pytest.mark.parametrize("index", ["calmclip_c1_near", "calmclip_c1_meta"])
def test_a_lost_or_invalid_index_is_built_again(url, sql, index, caplog):
    for damage in (
        f"DROP INDEX {index}",
        f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass",
    ):
        sql(damage)
        assert len(whole(url, read_only=True)) == 100  # the answers do not need it
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(whole(url)) == 100
        assert f"the index {index} is missing or invalid; it is built" in caplog.text
        assert sql(f"SELECT indisvalid FROM pg_index WHERE indexrelid = '{index}'::regclass") == "t"


def test_a_table_without_an_entry_is_told_and_its_number_is_not_given_again(url, sql, caplog):
    sql("DELETE FROM calmclip_collections")
    sql("ALTER SEQUENCE calmclip_collections_number_seq RESTART")
    with caplog.at_level(logging.WARNING), closing(open_store(f"pgvector:{url}")) as store:
        assert store.names() == []
        store.create(INFO).upsert(rows(5))
        assert store.open("c").count() == 5
    assert "the table calmclip_c1 belongs to no collection" in caplog.text
    assert sql("SELECT count(*) FROM calmclip_c1") == "100"


def test_a_write_beside_a_replacement_is_in_it_or_fails(url):
    """The rows of the new table are read from the old one behind the lock."""
    acknowledged = []
    errors = []
    stop = threading.Event()

    def write(number, store):
        for turn in range(10_000):
            if stop.is_set():
                return
            id_ = f"{number}{turn:05}"
            try:
                store.open("c").upsert([Row(id_, AXES[0], {"n": 0}, f"text {int(id_)}")])
            except Overloaded:  # its table was replaced while it waited
                continue
            except CalmclipError as error:
                errors.append(error)
            acknowledged.append(id_)

    with closing(open_store(f"pgvector:{url}")) as store, closing(open_store(f"pgvector:{url}")) as other:
        writers = [threading.Thread(target=write, args=(i, other)) for i in range(1, 4)]
        for writer in writers:
            writer.start()
        for turn in range(4):
            old = store.open("c")
            before = len(acknowledged)
            while len(acknowledged) < before + 20:
                time.sleep(0.01)
            store.replace(Info("c", f"m{turn}", "d", DIM, "", originals=True), old.rows())
        stop.set()
        for writer in writers:
            writer.join()
    assert not errors
    assert {row.id for row in whole(url)} >= set(acknowledged)


def test_a_replacement_waits_for_readers_and_lets_new_ones_pass(url):
    with closing(open_store(f"pgvector:{url}")) as store:
        table = store.open("c")
        reading = table.rows()
        next(reading)  # holds the old table
        replacing = threading.Thread(target=lambda: store.replace(INFO, [rows(20)]))
        replacing.start()
        slowest = 0.0
        for _ in range(30):
            start = time.monotonic()
            assert table.count() == 100
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.05)
        assert replacing.is_alive()
        assert slowest < 3  # without a limit the reader would wait for `reading`
        reading.close()
        replacing.join(20)
        assert store.open("c").count() == 20


def test_a_dump_beside_a_writer_restores_one_state(url, postgres, caplog):
    """pg_dump and pg_restore of the server. Each commit replaces all rows."""
    stop = threading.Event()

    def write(table):
        for turn in range(1, 10_000):
            if stop.is_set():
                return
            table.upsert(rows(100, turn))

    archive = postgres.folder / "archive"
    name = url.rpartition("/")[2]
    with closing(open_store(f"pgvector:{url}")) as store:
        writer = threading.Thread(target=write, args=(store.open("c"),))
        writer.start()
        try:
            postgres.run("pg_dump", "-Fc", "-f", str(archive), name)
        finally:
            stop.set()
            writer.join()
    postgres.psql("CREATE DATABASE restored OWNER keeper")
    postgres.run("pg_restore", "--exit-on-error", "-d", "restored", str(archive))
    copy = postgres.url("restored")
    stored = whole(copy)
    assert len(stored) == 100
    assert len({row.meta["n"] for row in stored}) == 1
    with closing(open_store(f"pgvector:{copy}")) as store:  # numbers go on
        store.create(Info("new", "m", "d", DIM, "")).upsert(rows(3))
        store.open("c").upsert(rows(100, -1))

    postgres.psql("CREATE DATABASE half OWNER keeper")
    postgres.run("pg_restore", "--section=pre-data", "--section=data", "-d", "half", str(archive))
    with pytest.raises(CollectionDamaged, match="no valid primary key, which a restore adds last"):
        whole(postgres.url("half"))
    postgres.psql("CREATE DATABASE schema OWNER keeper")
    postgres.run("pg_restore", "--schema-only", "-d", "schema", str(archive))
    caplog.clear()
    with closing(open_store(f"pgvector:{postgres.url('schema')}")) as store:
        assert store.names() == []
    assert "the table calmclip_c1 belongs to no collection" in caplog.text
