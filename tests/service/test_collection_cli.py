"""`calmclip collection`: vectors are those of the hand-made bundle, files are read with pyarrow alone."""

import base64
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calmclip.models.cli import main
from calmclip.service.stores import open_store
from tests.asking import until

RED, BLUE, MEAN = (1, 0, 0), (0, 0, 1), (0.5, 0.25, 0)


def unit(*values: float) -> list[float]:
    return [float(value) for value in np.array(values) / np.linalg.norm(values)]


@pytest.fixture(params=["lancedb", "pgvector"])
def store(request, tmp_path) -> str:
    if request.param == "pgvector":
        return f"pgvector:{request.getfixturevalue('postgres').database()}"
    return f"lancedb:{tmp_path / 'store'}"


@pytest.fixture
def cli(store, tmp_path, capsys):
    """`calmclip collection VERB …` over the store; -> exit status and output."""

    def run(*words: object) -> tuple[int, str]:
        flags = ["--store", store, "--bundles", str(tmp_path / "bundles")]
        status = main(["collection", *flags, *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def items(picture, folder: Path | None = None) -> list[dict[str, object]]:
    """A red picture and a blue one; in ``folder`` their files, named by their ids."""
    entries: list[dict[str, object]] = []
    for name in ("red", "blue"):
        data = picture(name, size=(8, 8))
        if folder:
            (folder / "sub").mkdir(parents=True, exist_ok=True)
            (folder / "sub" / f"{name}.png").write_bytes(data)
        image = {"b64": base64.b64encode(data).decode()}
        entries.append({"id": f"sub/{name}.png", "image": image, "meta": {"name": name, "big": 2**53}})
    return entries


def fill(settings, serve, store, tmp_path, entries, **body: object) -> None:
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        assert client.put("/v1/collections/c", json=body).status_code == 201
        assert client.post("/v1/collections/c/items", json={"items": entries}).status_code == 200


def exported(cli, tmp_path) -> dict[str, dict[str, object]]:
    """id -> the row of the exported file."""
    status, output = cli("export", "c", tmp_path / "c.parquet", "--replace")
    assert status == 0, output
    return {row["id"]: row for row in pq.read_table(tmp_path / "c.parquet").to_pylist()}


@pytest.mark.parametrize("source", ["originals", "folder"])
def test_a_changed_bundle_is_told_and_re_embed_is_the_way_out(
    cli, store, settings, serve, bundle_maker, picture, tmp_path, source
):
    bundle_maker(tmp_path / "bundles")
    folder = tmp_path / "pictures"
    entries = items(picture, folder)
    if source == "originals":
        entries.append({"id": "text", "text": "a red thing", "meta": {}})
    fill(settings, serve, store, tmp_path, entries, keep_originals=source == "originals")
    before = exported(cli, tmp_path)
    assert before["sub/red.png"]["vector"] == pytest.approx(unit(*RED), abs=1e-6)
    kept = picture("red", size=(8, 8)) if source == "originals" else None
    assert before["sub/red.png"]["picture"] == kept
    assert json.loads(before["sub/red.png"]["meta"]) == {"name": "red", "big": 2**53}
    if source == "originals":
        assert before["text"]["text"] == "a red thing"

    bundle_maker(tmp_path / "bundles", note="exported again", replace=True)  # what embeds is the same
    search = {"query": {"text": "red"}, "top_k": 1}
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        assert client.get("/readyz").json()["degraded"] == {}
        assert client.post("/v1/collections/c/search", json=search).json()["hits"][0]["score"] == 1

    bundle_maker(tmp_path / "bundles", mean=MEAN, replace=True)
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        until(lambda: "collection c" in client.get("/readyz").json()["degraded"])
        ready = client.get("/readyz")
        assert ready.status_code == 200
        reason = ready.json()["degraded"]["collection c"]
        assert "'colours-int8'" in reason
        assert "calmclip collection re-embed c" in reason
        assert "calmclip_collections_unbound 1.0" in client.get("/metrics").text
        answer = client.post("/v1/collections/c/search", json=search)
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/collection-bundle-mismatch")
        assert "calmclip collection re-embed c" in answer.json()["detail"]
        assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 200
    assert "none of its embedding" in cli("list")[1]

    flags = [] if source == "originals" else ["--folder", folder]
    status, output = cli("re-embed", "c", *flags)
    assert status == 0, output
    after = exported(cli, tmp_path)
    assert after.keys() == before.keys()
    assert after["sub/red.png"]["vector"] == pytest.approx(unit(0.5, -0.25, 0), abs=1e-6)
    assert after["sub/blue.png"]["vector"] == pytest.approx(unit(-0.5, -0.25, 1), abs=1e-6)
    assert {i: (row["meta"], row["picture"], row["text"]) for i, row in after.items()} == {
        i: (row["meta"], row["picture"], row["text"]) for i, row in before.items()
    }
    if source == "originals":
        assert after["text"]["vector"] == pytest.approx(unit(*RED), abs=1e-6)
    assert "already" in cli("re-embed", "c", *flags)[1]
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        until(lambda: client.get("/v1/collections").status_code == 200)
        assert client.get("/readyz").json()["degraded"] == {}
        assert "calmclip_collections_unbound 0.0" in client.get("/metrics").text
        image = {"b64": base64.b64encode(picture("blue", size=(8, 8))).decode()}
        best = client.post("/v1/collections/c/search", json={"query": {"image": image}}).json()["hits"][0]
        assert (best["id"], best["score"]) == ("sub/blue.png", 1)


def test_re_embed_changes_nothing_if_a_source_is_missing_and_follows_changed_files(
    cli, store, settings, serve, bundle_maker, picture, tmp_path
):
    bundle_maker(tmp_path / "bundles")
    folder = tmp_path / "pictures"
    entries = items(picture, folder)
    for entry in entries:
        entry["meta"] = {"sha256": "0" * 64, "owner": "a"}  # of an older file
    outside = [{"id": id_, "text": "red"} for id_ in ("../outside.png", "/outside.png", "gone.png")]
    (tmp_path / "outside.png").write_bytes(picture("red"))
    fill(settings, serve, store, tmp_path, [*entries, *outside])
    before = exported(cli, tmp_path)
    bundle_maker(tmp_path / "bundles", mean=MEAN, replace=True)
    for flags, reason in (
        ((), "5 of 5 items have no source, because the collection keeps no originals"),
        (("--folder", folder), "3 of 5 items have no file in"),
        (("--folder", folder, "--model", "nothing"), "there is no bundle 'nothing'"),
    ):
        status, output = cli("re-embed", "c", *flags)
        assert (status, reason in output) == (2, True), output
    assert "nothing would be left" in cli("re-embed", "c", "--drop")[1]
    (folder / "sub" / "blue.png").write_bytes(b"no picture")
    status, output = cli("re-embed", "c", "--folder", folder, "--drop")
    assert status == 2
    assert "'sub/blue.png'" in output
    assert exported(cli, tmp_path) == before

    (folder / "sub" / "blue.png").write_bytes(picture("white", size=(8, 8)))
    status, output = cli("re-embed", "c", "--folder", folder, "--drop")
    assert status == 0, output
    assert "left out gone.png" in output
    after = exported(cli, tmp_path)
    assert after.keys() == {"sub/red.png", "sub/blue.png"}
    assert after["sub/blue.png"]["vector"] == pytest.approx(unit(0.5, 0.75, 1), abs=1e-6)
    meta = json.loads(after["sub/blue.png"]["meta"])
    assert (meta["owner"], meta["title"]) == ("a", "blue.png")
    assert meta["sha256"] != "0" * 64


def test_re_embed_reads_a_long_original_as_it_is_told(cli, store, settings, serve, bundle_maker, tmp_path):
    """24 tokens, of a context of 12, of which the first half is red."""
    bundle_maker(tmp_path / "bundles")
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        client.put("/v1/collections/c", json={"keep_originals": True})
        item = {"id": "long", "text": "red " * 12 + "blue " * 12}
        assert client.post("/v1/collections/c/items", json={"items": [item], "truncate": "chunk"}).status_code == 200
    assert exported(cli, tmp_path)["long"]["vector"] == pytest.approx(unit(1, 0, 1), abs=1e-6)
    bundle_maker(tmp_path / "bundles", mean=MEAN, replace=True)
    status, output = cli("re-embed", "c")
    assert (status, "has 24 tokens" in output) == (2, True)
    assert cli("re-embed", "c", "--truncate", "end")[0] == 0
    assert exported(cli, tmp_path)["long"]["vector"] == pytest.approx(unit(11, 0, 1), abs=1e-6)


def test_export_import_list_and_remove(cli, store, settings, serve, bundle_maker, picture, tmp_path, monkeypatch):
    bundle_maker(tmp_path / "bundles")
    fill(settings, serve, store, tmp_path, items(picture), keep_originals=True)
    before = exported(cli, tmp_path)
    status, output = cli("export", "c", tmp_path / "c.parquet")
    assert (status, "exists" in output) == (2, True)
    assert cli("import", tmp_path / "c.parquet")[0] == 2  # the collection exists
    assert cli("import", tmp_path / "c.parquet", "--name", "x/../y")[0] == 2
    assert cli("import", tmp_path / "c.parquet", "--name", "copy")[0] == 0
    assert cli("remove", "c")[0] == 0
    assert "did you mean 'copy'" in cli("remove", "cop")[1]
    assert cli("import", tmp_path / "c.parquet")[0] == 0
    assert exported(cli, tmp_path) == before
    assert cli("import", tmp_path / "c.parquet", "--replace")[0] == 0
    assert exported(cli, tmp_path) == before
    output = cli("list")[1]
    assert [line.split()[0] for line in output.splitlines()] == ["c", "copy"]
    assert output.count("bundle: colours-int8") == 2
    with closing(open_store(store, read_only=True)) as opened, monkeypatch.context() as patch:
        names = type(opened).names
        patch.setattr(type(opened), "names", lambda self: ["b", *names(self)])  # "b" is deleted before it is opened
        assert cli("list") == (0, output)
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        listed = client.get("/v1/collections").json()["collections"]
        assert [(entry["name"], entry["items"], entry["originals"]) for entry in listed] == [
            ("c", 2, True),
            ("copy", 2, True),
        ]
        hits = client.post("/v1/collections/copy/search", json={"query": {"text": "blue"}}).json()["hits"]
        assert hits[0]["id"] == "sub/blue.png"


def damaged(table: pa.Table, **columns: list[object]) -> pa.Table:
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    return table


@pytest.mark.parametrize("store", ["lancedb"], indirect=True)
def test_a_file_that_is_not_whole_is_refused_and_nothing_is_imported(
    cli, store, settings, serve, bundle_maker, picture, tmp_path
):
    bundle_maker(tmp_path / "bundles")
    fill(settings, serve, store, tmp_path, items(picture), keep_originals=True)
    exported(cli, tmp_path)
    whole, table = (tmp_path / "c.parquet").read_bytes(), pq.read_table(tmp_path / "c.parquet")
    file = tmp_path / "damaged.parquet"
    nan, head = float("nan"), json.loads(table.schema.metadata[b"calmclip"])
    wrong = {
        "no file of 'calmclip collection export'": table.replace_schema_metadata({}),
        "format 2": table.replace_schema_metadata({b"calmclip": json.dumps({**head, "format": 2})}),
        "has the columns": table.drop_columns(["meta"]),
        "length nan": damaged(table, vector=[[nan, 0, 0], [1, 0, 0]]),
        "length 2": damaged(table, vector=[[1, 0, 0], [2, 0, 0]]),
        "twice": damaged(table, id=["a", "a"]),
        "without NUL": damaged(table, id=["a\0", "b"]),
        "it is a list; expected an object": damaged(table, meta=["{}", "[1]"]),
        "more than 64 bits": damaged(table, meta=["{}", f'{{"a": {2**70}}}']),
        "'a' twice": damaged(table, meta=["{}", '{"a": 1, "a": 2}']),
    }
    for reason, content in wrong.items():
        pq.write_table(content, file)
        status, output = cli("import", file, "--name", "new")
        assert (status, reason in output) == (2, True), output
    for length in range(0, len(whole), len(whole) // 40):
        file.write_bytes(whole[:length])
        assert cli("import", file, "--name", "new")[0] == 2, length
    with closing(open_store(store, read_only=True)) as opened:
        assert opened.names() == ["c"]


def test_a_bank_goes_in_and_out_of_a_store(cli, store, settings, serve, bundle_maker, picture, tmp_path):
    bundle_maker(tmp_path / "bundles")
    fill(settings, serve, store, tmp_path, items(picture), keep_originals=True)
    status, output = cli("export", "c", tmp_path / "photos.npz")
    assert (status, "2 items of c (a bank holds no originals)" in output) == (0, True), output
    rows = exported(cli, tmp_path)
    with np.load(tmp_path / "photos.npz", allow_pickle=False) as loaded:
        vectors = dict(zip(loaded["ids"].tolist(), loaded["vectors"], strict=True))
        metas = dict(zip(loaded["ids"].tolist(), map(json.loads, loaded["meta"].tolist()), strict=True))
    assert vectors.keys() == rows.keys()
    for id_, row in rows.items():
        np.testing.assert_array_equal(vectors[id_], np.array(row["vector"], np.float32))
        assert metas[id_] == json.loads(row["meta"])
    assert "exists" in cli("export", "c", tmp_path / "photos.npz")[1]
    assert cli("import", tmp_path / "photos.npz")[0] == 0  # as the collection `photos`
    assert cli("export", "photos", tmp_path / "again.npz")[0] == 0
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "photos.npz").read_bytes()

    foreign = tmp_path / "uni.npz"
    np.savez(foreign, ids=["a"], vectors=np.array([[3, 4]], np.float32), model="UniME", dim=2, normalized=False)
    status, output = cli("import", foreign, "--no-normalize")
    assert (status, "length 5" in output) == (2, True), output
    status, output = cli("import", foreign)
    assert (status, "1 of whose vectors were no unit vectors" in output) == (0, True), output
    assert cli("import", foreign, "--name", "x/../y")[0] == 2
    assert "its vectors are UniME's" in cli("list")[1]
    assert cli("export", "uni", tmp_path / "uni.parquet")[0] == 0
    assert cli("import", tmp_path / "uni.parquet", "--name", "more")[0] == 0
    assert "there is no bundle 'UniME'" in cli("re-embed", "uni")[1]
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        for name in ("uni", "more"):
            search = {"query": {"vector": [0.6, 0.8]}}
            (hit,) = client.post(f"/v1/collections/{name}/search", json=search).json()["hits"]
            assert (hit["id"], hit["score"]) == ("a", pytest.approx(1, abs=1e-6))
        hits = client.post("/v1/collections/photos/search", json={"query": {"text": "blue"}}).json()["hits"]
        assert hits[0]["id"] == "sub/blue.png"
        assert client.get("/readyz").json()["degraded"] == {}


@pytest.mark.parametrize("store", ["lancedb"], indirect=True)
def test_re_embed_keeps_the_length_of_a_shortened_collection(
    cli, store, settings, serve, bundle_maker, picture, tmp_path
):
    bundle_maker(tmp_path / "bundles", dimensions=(2,))
    white = [{"id": "white", "text": "white"}, {"id": "red", "text": "red"}]
    fill(settings, serve, store, tmp_path, white, keep_originals=True, dimensions=2)
    assert exported(cli, tmp_path)["white"]["vector"] == pytest.approx(unit(1, 1), abs=1e-6)
    assert "already" in cli("re-embed", "c")[1]
    status, output = cli("re-embed", "c", "--dimensions", "1")
    assert (status, "expected one of 2, 3" in output) == (2, True), output
    bundle_maker(tmp_path / "bundles", mean=MEAN, dimensions=(2,), replace=True)
    status, output = cli("re-embed", "c")
    assert (status, "2 numbers of 3" in output) == (0, True), output
    assert exported(cli, tmp_path)["white"]["vector"] == pytest.approx(unit(1, 1), abs=1e-6)
    assert cli("re-embed", "c", "--dimensions", "3")[0] == 0
    assert exported(cli, tmp_path)["white"]["vector"] == pytest.approx(unit(1, 1, 1), abs=1e-6)


@pytest.fixture(params=["store", "service"])
def reached(request, cli, store, settings, serve, bundle_maker, tmp_path, capsys):
    """A function: words of a verb of `calmclip collection`, or of another verb -> status, JSON or None, errors. It
    reaches the store itself, or a running service over it by --url."""
    bundle_maker(tmp_path / "bundles")

    def run(*words: object, verb: str = "collection") -> tuple[int, dict | None, str]:
        # --url stands before the verb's verb, --json after it
        place = url if request.param == "service" else ["--store", store]
        status = main([verb, *place, "--bundles", str(tmp_path / "bundles"), *map(str, words), "--json"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if captured.out else None, captured.err

    url: list[str] = []
    if request.param == "store":
        yield run
        return
    with serve(settings(store=store, bundles_dir=tmp_path / "bundles")) as client:
        url += ["--url", str(client.base_url)]
        yield run


@pytest.mark.parametrize("store", ["lancedb"], indirect=True)
def test_every_verb_answers_alike_for_a_store_and_a_service(reached, tmp_path, picture):
    status, made, _ = reached("create", "c", "--keep-originals", "--model", "colours-int8")
    assert (status, made["collection"]["items"], made["collection"]["dim"]) == (0, 0, 3)
    assert reached("create", "c", "--no-keep-originals")[0] == 2
    assert "'a/b' is not a name" in reached("create", "a/b")[2]

    bank = tmp_path / "photos.npz"
    digest = made["collection"]["digest"]
    vectors = np.array([RED, BLUE, unit(1, 0, 1)], np.float32)
    meta = [json.dumps({"title": title}) for title in ("a red one", "a blue one", "both")]
    ids = ["blau/1", "rot 1", "zwei"]
    np.savez(bank, ids=ids, vectors=vectors, meta=meta, model="colours-int8", dim=3, normalized=True, digest=digest)
    assert reached("import", bank)[1]["items"] == 3
    assert "photos" in reached("import", bank)[2]  # exists
    status, shown, _ = reached("show", "photos")
    assert (status, shown["collection"]["items"], shown["collection"]["model"]) == (0, 3, "colours-int8")
    assert reached("show", "photo")[0] == 2
    listed = reached("list")[1]["collections"]
    assert [(entry["name"], entry["items"], entry["bundle"]) for entry in listed] == [
        ("c", 0, "colours-int8"),
        ("photos", 3, "colours-int8"),
    ]

    first = reached("items", "photos", "--limit", 2)[1]
    assert [item["id"] for item in first["items"]] == ids[:2]
    assert first["items"][0]["meta"] == {"title": "a red one"}
    rest = reached("items", "photos", "--limit", 2, "--after", first["next"])[1]
    assert ([item["id"] for item in rest["items"]], rest["next"]) == (["zwei"], None)

    def found(*words: object) -> list[tuple[str, float]]:
        status, answer, error = reached(*words, "--min-relevance", 0, verb="search")
        assert status == 0, error
        return [(hit["id"], round(hit["score"], 4)) for hit in answer["hits"]]

    (tmp_path / "blue.png").write_bytes(picture("blue"))
    half, less = round(0.5**0.5, 4), round((1 + 1.25**2) ** -0.5, 4)  # (1, 0, -1.25), a text to leave out weighs 1.25
    assert found("photos", "red", "--top-k", 2) == [("blau/1", 1.0), ("zwei", half)]
    assert found("photos", "--image", tmp_path / "blue.png") == [("rot 1", 1.0), ("zwei", half), ("blau/1", 0.0)]
    assert found("photos", "--id", "rot 1", "--top-k", 2)[0] == ("zwei", half)
    assert found("photos", "red", "--image", tmp_path / "blue.png", "--top-k", 1) == [("zwei", 1.0)]
    assert found("photos", "red", "--without", "blue", "--top-k", 1) == [("blau/1", less)]
    assert found("photos", "red", "--filter", '{"title": "both"}') == [("zwei", half)]
    for words, says in (
        (("photos",), "there is no query"),
        (("photos", "red", "--filter", "{"), "--filter is not JSON"),
        (("photos", "red", "--filter", "[]"), "no JSON object"),
        (("photos", "--image", tmp_path / "none.png"), "none.png does not exist"),
        (("phots", "red"), "'phots'"),
        (("photos", "--id", "none"), "'none'"),
    ):
        status, _, error = reached(*words, verb="search")
        assert (status, says in error) == (2, True), error

    assert reached("delete-items", "photos", "zwei", "none")[1]["removed"] == 1
    assert reached("export", "photos", tmp_path / "again.npz")[1]["items"] == 2
    assert "exists" in reached("export", "photos", tmp_path / "again.npz")[2]
    with np.load(tmp_path / "again.npz") as again:
        assert again["ids"].tolist() == ids[:2]
        np.testing.assert_array_equal(again["vectors"], vectors[:2])
    assert reached("remove", "photos")[0] == 0
    assert reached("show", "photos")[0] == 2


@pytest.mark.parametrize("store", ["lancedb"], indirect=True)
def test_what_needs_the_store_itself_says_so(cli, tmp_path, capsys):
    (tmp_path / "x.parquet").touch()
    for words, says in (
        (["re-embed", "c"], "works on a store"),
        (["export", "c", str(tmp_path / "c.parquet")], "travels as .npz alone"),
        (["import", str(tmp_path / "x.parquet")], "travels as .npz alone"),
        (["import", str(tmp_path / "x.npz"), "--replace"], "replaces no collection"),
        (["list"], "does not answer"),
    ):
        assert main(["collection", *words, "--url", "http://127.0.0.1:9"]) == 2  # after the verb, too
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["collection", "--store", "lancedb:x", "list", "--url", "http://127.0.0.1:9"])
    assert usage.value.code == 2
