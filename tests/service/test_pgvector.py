"""PostgreSQL: absent, misconfigured, stopped during requests, shared. No log, metric or answer shows the password."""

import logging
import re
from contextlib import closing

import numpy as np
import psycopg
import pytest

from calmclip.models.errors import BadRequest, CollectionError, CollectionNotFound, Overloaded, StoreUnavailable
from calmclip.service import collections
from calmclip.service.stores import Condition, Group, Info, Row, open_store, pgvector, redacted
from tests.asking import until


@pytest.fixture
def quick(monkeypatch):
    """Short waits and retries."""
    monkeypatch.setattr(collections, "RETRY_S", 0.2)
    monkeypatch.setattr("calmclip.service.stores.pgvector.WAIT_S", 0.3)


def put(client, *items, name="c"):
    assert client.put(f"/v1/collections/{name}", json={}).status_code in (200, 201)
    return client.post(f"/v1/collections/{name}/items", json={"items": [{"id": i, "text": t} for i, t in items]})


def find(client, text, name="c"):
    answer = client.post(f"/v1/collections/{name}/search", json={"query": {"text": text}, "top_k": 1})
    return [hit["id"] for hit in answer.json()["hits"]] if answer.status_code == 200 else answer.status_code


def sentence(url, error):
    with pytest.raises(error) as caught:
        open_store(f"pgvector:{url}")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_error_is_a_sentence_without_the_password(postgres):
    host, away = f"127.0.0.1:{postgres.port}", "postgresql://keeper:hush-w@127.0.0.1:9/d"
    assert "expected pgvector:postgresql://" in sentence("data/collections", BadRequest)
    for url, error, words in [
        (f"{away}?password=hush-w", StoreUnavailable, "d at 127.0.0.1:9 does not answer"),
        (postgres.url("nowhere"), StoreUnavailable, f'nowhere at {host} does not answer: .*"nowhere" does not exist'),
        (postgres.url("postgres", "hush-no"), StoreUnavailable, f"postgres at {host} .*authentication failed"),
        (f"postgresql://keeper:hush-w@{host}/d?hush-w=1", BadRequest, "libpq cannot read"),
        (f"postgresql://keeper:x@hush-w@{host}/d", BadRequest, "more than one @"),
        (f"postgresql://keeper:x/hush-w@{host}/d", BadRequest, "more than one @"),
        (f"postgresql://keeper:x?hush-w@{host}/d", BadRequest, "more than one @"),
        (f"postgresql://keeper:hush%zz@{host}/d", BadRequest, "libpq cannot read"),
        (f"postgresql://keeper:hush-w@{host}x/d", StoreUnavailable, "does not answer: .*invalid integer value"),
    ]:
        message = sentence(url, error)
        assert re.search(words, message), message
        assert "hush" not in message


def test_a_url_is_shown_without_its_secrets():
    for secret in ("a:b", "a:b@c", "a:b/c", "a:b?c", "a:b#c"):
        assert redacted(f"pgvector:postgresql://{secret}@h:1/d?password=x") == "pgvector:postgresql://h:1/d"
    assert redacted("lancedb:data/collections") == "lancedb:data/collections"


def test_a_missing_extension_is_created_or_its_command_is_named(postgres):
    postgres.psql("CREATE DATABASE bare OWNER keeper")
    message = sentence(postgres.url("bare"), CollectionError)
    assert "bare at 127.0.0.1" in message
    assert "let a superuser run CREATE EXTENSION vector" in message
    postgres.psql("ALTER ROLE keeper SUPERUSER")
    try:
        open_store(f"pgvector:{postgres.url('bare')}").close()
    finally:
        postgres.psql("ALTER ROLE keeper NOSUPERUSER")
    assert postgres.psql("SELECT extname FROM pg_extension WHERE extname = 'vector'", "bare") == "vector"


def test_a_lost_server_is_503_until_it_returns(postgres, settings, serve, quick, caplog, capfd):
    url = f"pgvector:{postgres.database()}"
    with caplog.at_level(logging.DEBUG), serve(settings(store=url)) as client:
        assert put(client, ("r", "red"), ("g", "green")).status_code == 200
        postgres.stop("immediate")
        try:
            for answer in (
                client.post("/v1/collections/c/search", json={"query": {"text": "red"}}),
                client.post("/v1/collections/c/items", json={"items": [{"id": "b", "text": "blue"}]}),
                client.get("/v1/collections"),
                client.put("/v1/collections/d", json={}),
            ):
                assert (answer.status_code, answer.json()["type"]) == (503, "/problems/store-unavailable")
                assert int(answer.headers["retry-after"]) >= 1
                assert "hush" not in answer.text
            assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 200
        finally:
            postgres.start()
        until(lambda: find(client, "red") == ["r"])
        assert put(client, ("b", "blue")).json()["items"] == 3
        public = client.get("/metrics").text + client.get("/readyz").text
    assert "hush" not in public + caplog.text + "".join(capfd.readouterr())


def test_connections_that_die_are_replaced_before_they_are_used(postgres, settings, serve):
    with serve(settings(store=f"pgvector:{postgres.database()}")) as client:
        put(client, ("r", "red"))
        for _ in range(3):
            postgres.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'keeper'")
            assert find(client, "red") == ["r"]


def test_the_service_waits_for_a_server_that_starts_later(postgres, settings, serve, quick, caplog):
    url = f"pgvector:{postgres.database()}"
    postgres.stop()
    try:
        with caplog.at_level(logging.INFO), serve(settings(store=url), ready=False) as client:
            until(lambda: "does not answer" in client.get("/readyz").json().get("degraded", {}).get("collections", ""))
            until(lambda: client.get("/readyz").status_code == 200)  # the bundles have loaded
            ready = client.get("/readyz")
            assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 200
            answer = client.get("/v1/collections")
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/store-unavailable")
            postgres.start()
            until(lambda: client.get("/readyz").json()["degraded"] == {})
            assert put(client, ("r", "red")).status_code == 200
            assert "hush" not in ready.text + answer.text + caplog.text
    finally:
        if not postgres.running():
            postgres.start()


def test_services_with_a_common_store_see_all_collections_at_once(postgres, settings, serve, bundle_maker, tmp_path):
    store = f"pgvector:{postgres.database()}"
    bundle_maker(tmp_path / "other", mean=(0.5, 0, 0))
    with serve(settings(store=store)) as first, serve(settings(store=store)) as second:
        assert put(first, ("r", "red")).status_code == 200
        assert find(second, "red") == ["r"]
        assert put(second, ("g", "green")).json()["items"] == 2
        assert find(first, "green") == ["g"]
        assert second.delete("/v1/collections/c").status_code == 204
        assert find(first, "red") == 404
        assert first.get("/v1/collections").json()["collections"] == []
        assert put(second, ("x", "red")).status_code == 200  # another collection of the same name
        assert find(first, "red") == ["x"]
        with serve(settings(store=store, bundles_dir=tmp_path / "other")) as third:
            assert third.put("/v1/collections/c", json={}).status_code == 409
            assert find(third, "red") == 409


def test_a_table_that_another_service_drops_meanwhile_is_not_found(postgres):
    """The table is dropped between the list of collections and the statement that needs the table."""
    with closing(open_store(f"pgvector:{postgres.database()}")) as store:
        table = store.create(Info("c", "m", "d", 2, ""))
        store.drop("c")
        vector = np.array([1, 0], np.float32)
        for use in (
            lambda: table.search(vector, 1),
            lambda: table.upsert([Row("a", vector, {})]),
            lambda: table.delete(["a"]),
            lambda: table.page(None, 1),
            table.count,
        ):
            with pytest.raises(CollectionNotFound, match="'c' was deleted by another service"):
                use()
        store.replace(Info("c", "m", "e", 2, ""), [])
        with pytest.raises(Overloaded, match="just replaced; try again"):
            table.upsert([Row("a", vector, {})])


def test_a_filter_by_value_is_answered_by_the_index_of_the_metadata(postgres):
    """Of 4 000 rows the index gives the ten that match. PostgreSQL's statistics show that it reads no other rows."""
    vectors = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    url = postgres.database()
    with closing(open_store(f"pgvector:{url}")) as store:
        table = store.create(Info("c", "m", "d", 64, ""))
        table.upsert([Row(f"{i:04}", vector, {"kind": f"k{i % 400}", "n": i}) for i, vector in enumerate(vectors)])
        kind = Condition("kind", "in", ("k7", "no such"))
        wanted = sorted(range(7, 4000, 400), key=lambda i: -float(vectors[i] @ vectors[0]))  # in numpy

        def reads() -> str:
            hits = table.search(vectors[0], 100, [kind, Condition("n", "gte", 400)])
            assert [hit.id for hit in hits] == [f"{i:04}" for i in wanted if i >= 400]
            columns = "idx_scan > 0, (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'calmclip_c1')"
            query = f"SELECT {columns} FROM pg_stat_user_indexes WHERE indexrelname = 'calmclip_c1_meta'"
            return postgres.psql(query, url.rpartition("/")[2])

        postgres.psql("ANALYZE calmclip_c1", url.rpartition("/")[2])
        before = reads().split("|")[1]
        until(lambda: reads() == f"t|{before}")  # PostgreSQL reports statistics with a delay


def test_values_that_postgresql_cannot_store_are_a_client_error(postgres, settings, serve):
    with serve(settings(store=f"pgvector:{postgres.database()}")) as client:
        put(client, ("r", "red"))
        items = [{"id": "good", "text": "red"}, {"id": "bad", "text": "red", "meta": {"a": "x\0y"}}]
        answer = client.post("/v1/collections/c/items", json={"items": items})
        assert answer.status_code == 422
        assert "NUL" in answer.json()["detail"]
        assert client.get("/v1/collections/c").json()["items"] == 1  # neither item was stored
        body = {"query": {"text": "red"}, "filter": {"a": {"gt": "x\0y"}}}
        assert client.post("/v1/collections/c/search", json=body).status_code == 422
        big = [{"id": "big", "text": "red", "meta": {"n": 1e300, "small": 5e-324, "i": 2**64 - 1}}]
        assert client.post("/v1/collections/c/items", json={"items": big}).status_code == 200
        (item,) = client.get("/v1/collections/c/items", params={"limit": 1}).json()["items"]
        assert item["meta"] == {"n": 1e300, "small": 5e-324, "i": 2**64 - 1}


def test_the_index_of_the_metadata_answers_equality_and_has_also_in_groups(postgres):
    """By PostgreSQL's plan, on a table that is large enough for an index to pay."""
    same, has, part = (
        Condition("a", "in", ("x7",)),
        Condition("tags", "has", "t7"),
        Condition("a", "contains", "x"),
    )
    rows = [Row(str(i), np.eye(3, dtype=np.float32)[i % 3], {"a": f"x{i}", "tags": [f"t{i}"]}) for i in range(3000)]
    url = postgres.database()
    with closing(open_store(f"pgvector:{url}")) as store, psycopg.connect(url) as connection:
        table = store.replace(Info("c", "m", "d", 3, ""), [rows])
        either = Group("or", ((same,), (has, part)))
        for parts, scans in [([same], 1), ([has], 1), ([has, part], 1), ([either], 2), ([part], 0),
                             ([Group("or", ((same,), (part,)))], 0)]:  # fmt: skip
            where, values = pgvector._where(parts)
            plan = str(connection.execute(f"EXPLAIN SELECT id FROM {table._name}{where}", values).fetchall())
            assert plan.count("Index Scan on calmclip_c1_meta") == scans, (parts, plan)
        assert {hit.id for hit in table.search(rows[0].vector, 9, [either])} == {"7"}
