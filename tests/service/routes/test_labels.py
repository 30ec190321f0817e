"""Label sets: registered, versioned, kept, and used by name."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest


def test_versions_count_changes(client):
    url = "/v1/label-sets/colours"
    first = client.put(url, json={"labels": ["red", "blue"]}).json()
    assert first == {"name": "colours", "version": 1, "labels": ["red", "blue"], "templates": []}
    assert client.put(url, json={"labels": ["red", "blue"]}).json()["version"] == 1
    second = client.put(url, json={"labels": ["red", "blue"], "templates": ["a {}"]}).json()
    assert second["version"] == 2
    assert client.get(url).json() == second
    assert second in client.get("/v1/label-sets").json()["label_sets"]
    assert client.delete(url).status_code == 204
    assert client.get(url).status_code == 404


def test_classify_and_detect_name_a_set(client, picture):
    client.put("/v1/label-sets/named", json={"labels": ["blue", "green"], "templates": ["red {}"]})
    ask = {"params": {"label_set": "named"}, "content": picture("green"), "headers": {"content-type": "image/png"}}
    labels = client.post("/v1/classify", **ask).json()["labels"]
    # templates hold: "red green" = (1, 1, 0) / sqrt 2 against (0, 1, 0)
    assert [(one["label"], one["cosine"]) for one in labels] == [
        ("green", pytest.approx(0.5**0.5, abs=1e-6)),
        ("blue", pytest.approx(0, abs=1e-6)),
    ]
    ask["params"]["templates"] = "{}"  # the request's own templates win
    assert client.post("/v1/classify", **ask).json()["labels"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    ask["params"] = {"label_set": "named", "min_score": 0.7}
    assert {one["label"] for one in client.post("/v1/detect", **ask).json()["detections"]} == {"green"}


def test_a_set_is_on_disk_and_back_after_a_restart(settings, serve, tmp_path):
    with serve(settings()) as client:
        client.put("/v1/label-sets/kept", json={"labels": ["röd", "blå"]})
        client.put("/v1/label-sets/kept", json={"labels": ["röd", "grön"]})
    files = list((tmp_path / "data" / "label-sets").iterdir())
    assert [file.name for file in files] == ["kept.json"]
    assert json.loads(files[0].read_text())["labels"] == ["röd", "grön"]
    with serve(settings()) as client:
        assert client.get("/v1/label-sets/kept").json()["version"] == 2


def test_changes_at_the_same_time_are_all_counted(client):
    def put(i: int) -> int:
        return client.put("/v1/label-sets/crowd", json={"labels": [f"label {i}"]}).json()["version"]

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(put, range(24))) == list(range(1, 25))
