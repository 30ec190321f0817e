"""Models, probes, the page."""

import shutil


def test_models(client):
    (model,) = client.get("/v1/models").json()["models"]
    assert (model["name"], model["tasks"], model["precision"], model["dim"], model["labels"]) == (
        "colours-int8", ["classify", "embed", "detect"], "int8", 3, 0,
    )  # fmt: skip
    one = client.get("/v1/models/colours-int8").json()
    assert one["digest"] == model["digest"]
    assert one["manifest"]["head"] == {"name": "cosine", "params": {"scale": 10.0}, "assets": {}}
    assert one["report"] == {"measured": "nothing"}


def test_probes(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "loaded": ["colours-int8"], "failed": {}}


def test_int8_is_the_default_before_float_and_the_load_order_before_that(settings, serve, bundle_maker, tmp_path):
    bundles = tmp_path / "bundles"
    bundle_maker(bundles, "colours-float")
    bundle_maker(bundles, "colours-int8")

    def default(**changes: object) -> str:
        with serve(settings(bundles_dir=bundles, **changes)) as client:
            return client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).json()["model"]

    assert default() == "colours-int8"
    assert default(load="colours-float,colours-int8") == "colours-float"


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
