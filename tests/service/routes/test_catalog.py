"""Models, probes, the page."""

import json
import shutil

import lancedb
import pytest

from calmclip.models.errors import BadRequest
from calmclip.models.runner import open_bundle
from calmclip.service.app import create_app


def test_the_default_bundle_is_int8_before_float_unless_a_load_order_is_set(settings, serve, bundle_maker, tmp_path):
    bundles = tmp_path / "bundles"
    bundle_maker(bundles, "colours-float")
    bundle_maker(bundles, "colours-int8")

    def default(**changes: object) -> str:
        with serve(settings(bundles_dir=bundles, **changes)) as client:
            return client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).json()["model"]

    assert default() == "colours-int8"
    assert default(load="colours-float,colours-int8") == "colours-float"


def test_models_name_what_embeds(settings, serve, bundle_maker, tmp_path):
    """Another note makes another bundle of the same vectors; a bundle that does not embed has no such digest."""
    for name, note in (("colours-int8", "one"), ("others-int8", "another"), ("words-int8", "")):
        path = bundle_maker(tmp_path / "bundles", name, note=note).directory / "bundle.json"
        if name == "words-int8":
            path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": ["classify"]}))
    with serve(settings(bundles_dir=tmp_path / "bundles")) as client:
        models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    digests = [models[name]["embedding_digest"] for name in ("colours-int8", "others-int8", "words-int8")]
    assert digests[0] == digests[1] == open_bundle(tmp_path / "bundles" / "colours-int8").bundle.embedding_digest
    assert digests[2] is None
    assert models["colours-int8"]["digest"] != models["others-int8"]["digest"]


def test_a_broken_bundle_is_named_and_the_others_serve(settings, serve, bundles, tmp_path):
    mixed = tmp_path / "bundles"
    shutil.copytree(bundles, mixed)
    shutil.copytree(bundles / "colours-int8", mixed / "broken")
    (mixed / "broken" / "image.onnx").write_bytes(b"changed")
    with serve(settings(bundles_dir=mixed), ready=False) as client:
        while not (answer := client.get("/readyz")).json()["failed"] or not answer.json()["loaded"]:
            pass
        assert answer.status_code == 503
        assert "image.onnx" in answer.json()["failed"]["broken"]
        assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 200


def until_loaded(client):
    """The answer of `/readyz` after all bundles and collections were opened or failed to open."""
    while not client.get("/readyz").json()["loaded"] or client.get("/v1/collections").status_code == 503:
        pass
    return client.get("/readyz")


def test_a_foreign_table_is_named_and_the_collections_serve(settings, serve, tmp_path):
    with serve(settings()) as client:
        client.put("/v1/collections/mine", json={})
    lancedb.connect(tmp_path / "data" / "collections").create_table("foreign", [{"a": 1}])
    with serve(settings(), ready=False) as client:
        answer = until_loaded(client)
        assert answer.status_code == 200
        assert list(answer.json()["degraded"]) == ["collection foreign"]
        assert 'calmclip_failed{kind="collections"} 1.0' in client.get("/metrics").text
        damaged = client.get("/v1/collections/foreign")
        assert (damaged.status_code, damaged.json()["type"]) == (500, "/problems/collection-damaged")
        assert [collection["name"] for collection in client.get("/v1/collections").json()["collections"]] == ["mine"]


def test_a_store_that_does_not_open_does_not_stop_the_tasks(settings, serve, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with serve(settings(store=f"lancedb:{tmp_path / 'file'}"), ready=False) as client:
        answer = until_loaded(client)
        assert (answer.status_code, list(answer.json()["degraded"])) == (200, ["collections"])
        assert client.put("/v1/collections/c", json={}).status_code == 500
        assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 200


def test_a_damaged_classifier_stops_the_start(settings, tmp_path):
    (tmp_path / "data" / "classifiers").mkdir(parents=True)
    (tmp_path / "data" / "classifiers" / "x.json").write_text("{")
    with pytest.raises(BadRequest, match=r"x\.json is not a classifier"):
        create_app(settings())


def test_without_bundles_the_service_lives_but_is_not_ready(settings, serve, tmp_path):
    with serve(settings(bundles_dir=tmp_path / "none"), ready=False) as client:
        while client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 503:
            pass
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        answer = client.post("/v1/embed", json={"inputs": [{"text": "red"}]})
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/task-not-served")


def test_the_page_and_its_policy(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/app.js").headers["content-type"].startswith(("text/javascript", "application/javascript"))
    assert client.get("/%2e%2e/app.py").status_code == 404


@pytest.mark.parametrize("ranges", ["bytes=abc", "bytes=0-3", "bytes=9999999-", "x"])
@pytest.mark.parametrize("path", ["/", "/app.js"])
def test_the_page_ignores_ranges(client, path, ranges):
    answer = client.get(path, headers={"range": ranges})
    assert answer.status_code == 200
    assert answer.content == client.get(path).content


@pytest.mark.parametrize("path", ["/", "/style.css", "/healthz", "/readyz"])
def test_head_is_get_without_the_body(client, path):
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))
    assert head.headers["content-type"] == got.headers["content-type"]
