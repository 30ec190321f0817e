"""Label sets: registered, versioned, kept, and used by name."""

import base64
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

PLAIN = {"temperature": 1.0, "none_below": None, "calibrated_for": None}


def test_versions_count_changes(client):
    url = "/v1/label-sets/colours"
    first = client.put(url, json={"labels": ["red", "blue"]}).json()
    assert first == {"name": "colours", "version": 1, "labels": ["red", "blue"], "templates": [], **PLAIN}
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


def test_a_set_may_have_a_temperature_and_say_that_none_fits(client, picture):
    """Red against red and blue: cosines 1 and 0, logits 10 and 0 at scale 10, so the best is 1 / (1 + exp(-10 / T))."""

    def sure(temperature: float) -> float:
        return 1 / (1 + math.exp(-10 / temperature))

    body = {"labels": ["red", "blue"], "temperature": 5.0, "none_below": 0.9}
    assert client.put("/v1/label-sets/warm", json=body).json() == {
        "name": "warm",
        "version": 1,
        "templates": [],
        "calibrated_for": None,
        **body,
    }
    assert client.put("/v1/label-sets/warm", json=body).json()["version"] == 1
    ask = {"content": picture("red"), "headers": {"content-type": "image/png"}}

    def best(**asked: object) -> tuple[float, bool | None]:
        answer = client.post("/v1/classify", params=asked, **ask).json()
        return answer["labels"][0]["score"], answer["none_of_these"]

    assert best(labels=["red", "blue"]) == (pytest.approx(sure(1), abs=1e-6), None)
    assert best(label_set="warm") == (pytest.approx(sure(5), abs=1e-6), True)  # 0.881
    assert best(label_set="warm", none_below=0.85) == (pytest.approx(sure(5), abs=1e-6), False)
    assert best(label_set="warm", temperature=2) == (pytest.approx(sure(2), abs=1e-6), False)  # 0.993
    assert client.put("/v1/label-sets/warm", json={**body, "temperature": 4.0}).json()["version"] == 2
    for wrong in ({"temperature": 0}, {"temperature": 1000}, {"none_below": 0}, {"none_below": 2}):
        assert client.put("/v1/label-sets/x", json={**body, **wrong}).status_code == 422
        assert client.post("/v1/classify", params={"labels": "red", **wrong}, **ask).status_code == 422


def test_a_set_written_before_there_were_temperatures_is_read(settings, serve, tmp_path):
    folder = tmp_path / "data" / "label-sets"
    folder.mkdir(parents=True)
    (folder / "old.json").write_text('{"name": "old", "version": 3, "labels": ["red"], "templates": []}')
    with serve(settings()) as client:
        assert client.get("/v1/label-sets/old").json() == {
            "name": "old", "version": 3, "labels": ["red"], "templates": [], **PLAIN,
        }  # fmt: skip


def test_a_set_is_calibrated_by_pictures_whose_labels_are_known(client, picture):
    """Four red ones, one of them called blue: logits 10 and 0. With N = 4 the targets are 5/6 and 1/6, in the mean
    (3 * 5/6 + 1/6) / 4 = 2/3 for red, and 1 / (1 + exp(-10 / T)) = 2/3 at T = 10 / ln 2 = 14.43."""
    image = {"b64": base64.b64encode(picture("red")).decode()}
    client.put("/v1/label-sets/sure", json={"labels": ["red", "blue"]})
    items = [{"image": image, "label": label} for label in ("red", "red", "red", "blue")]
    answer = client.post("/v1/label-sets/sure/calibrate", json={"items": items}).json()
    assert answer["temperature"] == pytest.approx(10 / math.log(2), rel=0.025)
    assert answer["version"] == 2
    assert client.get("/v1/label-sets/sure").json() == answer
    ask = {"params": {"label_set": "sure"}, "content": picture("red"), "headers": {"content-type": "image/png"}}
    assert client.post("/v1/classify", **ask).json()["labels"][0]["score"] == pytest.approx(2 / 3, abs=0.006)
    # all told right: sure, but not without end. Targets 5/6: T = 10 / ln 5
    right = client.post("/v1/label-sets/sure/calibrate", json={"items": items[:1] * 4}).json()
    assert right["temperature"] == pytest.approx(10 / math.log(5), rel=0.025)


def test_a_temperature_found_for_one_bundle_is_used_with_no_other(settings, serve, bundle_maker, tmp_path, picture):
    """Scores as in the test above: with the bundle it was found for at T = 14.43, with another at T = 1."""
    folder = tmp_path / "two"
    digests = {name: bundle_maker(folder, name, note=name).digest for name in ("colours-int8", "others-int8")}
    items = [{"image": {"b64": base64.b64encode(picture("red")).decode()}, "label": label}
             for label in ("red", "red", "red", "blue")]  # fmt: skip
    with serve(settings(bundles_dir=folder)) as client:

        def best(model: str, **more: object) -> tuple[float, float]:
            params = {"label_set": "sure", "model": model, **more}
            send = {"content": picture("red"), "headers": {"content-type": "image/png"}}
            answer = client.post("/v1/classify", params=params, **send).json()
            return answer["temperature"], answer["labels"][0]["score"]

        def sure(temperature: float) -> tuple[object, object]:
            return pytest.approx(temperature), pytest.approx(1 / (1 + math.exp(-10 / temperature)), abs=1e-6)

        labels = {"labels": ["red", "blue"]}
        client.put("/v1/label-sets/sure", json={**labels, "temperature": 5.0})
        assert best("others-int8") == best("colours-int8") == sure(5)  # somebody chose it, for both
        for model in ("others-int8", "colours-int8"):
            body = {"items": items, "model": model}
            made = client.post("/v1/label-sets/sure/calibrate", json=body).json()
            assert made["calibrated_for"] == digests[model]
        assert best("colours-int8") == sure(made["temperature"])
        assert best("others-int8") == sure(1)
        assert best("others-int8", temperature=3) == sure(3)
    with serve(settings(bundles_dir=folder)) as client:  # it is on disk
        assert client.get("/v1/label-sets/sure").json() == made
        again = client.put("/v1/label-sets/sure", json={**labels, "temperature": made["temperature"]}).json()
        assert again["calibrated_for"] is None
        assert again["version"] == made["version"] + 1


@pytest.mark.parametrize(
    ("name", "items", "status", "word"),
    [("pair", [("green", "green")], 422, "'green' of item 0"), ("one", [("red", "red")], 422, "at least 2"),
     ("pair", [], 422, "items"), ("nobody", [("red", "red")], 404, "nobody")],
)  # fmt: skip
def test_what_cannot_be_calibrated(client, picture, name, items, status, word):
    client.put("/v1/label-sets/pair", json={"labels": ["red", "blue"]})
    client.put("/v1/label-sets/one", json={"labels": ["red"]})
    body = {"items": [{"image": {"b64": base64.b64encode(picture(c)).decode()}, "label": label} for c, label in items]}
    answer = client.post(f"/v1/label-sets/{name}/calibrate", json=body)
    assert (answer.status_code, word in answer.json()["detail"]) == (status, True)
