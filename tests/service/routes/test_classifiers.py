"""Classifiers: registered, versioned, kept, and used by name."""

import math

import pytest

from tests.asking import b64, raw

REDS = [("red", "red"), ("red", "red"), ("red", "red"), ("red", "blue")]
OPEN = {"templates": [], "descriptions": {}, "head": None, "params": {}, "family": None, "fitted": False}


def items(picture, *pairs: tuple[str, str]) -> list[dict[str, object]]:
    """Pictures of a colour each, and what their labels are said to be."""
    return [{"image": b64(picture(colour)), "label": label} for colour, label in pairs]


def test_classify_and_detect_name_a_set(client, picture):
    client.put("/v1/classifiers/named", json={"labels": ["blue", "green"], "templates": ["red {}"]})
    ask = {"params": {"classifier": "named"}, **raw(picture("green"))}
    labels = client.post("/v1/classify", **ask).json()["labels"]
    # templates hold: "red green" = (1, 1, 0) / sqrt 2 against (0, 1, 0)
    assert [(one["label"], one["cosine"]) for one in labels] == [
        ("green", pytest.approx(0.5**0.5, abs=1e-6)),
        ("blue", pytest.approx(0, abs=1e-6)),
    ]
    ask["params"]["templates"] = "{}"  # the request's own templates win
    assert client.post("/v1/classify", **ask).json()["labels"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    ask["params"] = {"classifier": "named", "min_score": 0.7}
    assert {one["label"] for one in client.post("/v1/detect", **ask).json()["detections"]} == {"green"}
    assert client.delete("/v1/classifiers/named").status_code == 204


def test_a_set_may_have_a_temperature_and_say_that_none_fits(client, picture):
    """Red against red and blue: cosines 1 and 0, logits 10 and 0 at scale 10, so the best is 1 / (1 + exp(-10 / T))."""

    def sure(temperature: float) -> float:
        return 1 / (1 + math.exp(-10 / temperature))

    body = {"labels": ["red", "blue"], "temperature": 5.0, "none_below": 0.9}
    for _ in range(2):  # the same again is no change
        assert client.put("/v1/classifiers/warm", json=body).json() == {"name": "warm", "version": 1, **OPEN, **body}
    ask = raw(picture("red"))

    def best(**asked: object) -> tuple[float, bool | None]:
        answer = client.post("/v1/classify", params=asked, **ask).json()
        return answer["labels"][0]["score"], answer["none_of_these"]

    assert best(labels=["red", "blue"]) == (pytest.approx(sure(1), abs=1e-6), None)
    assert best(classifier="warm") == (pytest.approx(sure(5), abs=1e-6), True)  # 0.881
    assert best(classifier="warm", none_below=0.85) == (pytest.approx(sure(5), abs=1e-6), False)
    assert best(classifier="warm", temperature=2) == (pytest.approx(sure(2), abs=1e-6), False)  # 0.993
    assert client.put("/v1/classifiers/warm", json={**body, "temperature": 4.0}).json()["version"] == 2
    for wrong in ({"temperature": 0}, {"temperature": 1000}, {"none_below": 0}, {"none_below": 2}):
        assert client.put("/v1/classifiers/x", json={**body, **wrong}).status_code == 422
        assert client.post("/v1/classify", params={"labels": "red", **wrong}, **ask).status_code == 422


def test_a_set_is_calibrated_by_pictures_whose_labels_are_known(client, picture):
    """Four red ones, one of them called blue: logits 10 and 0. With N = 4 the targets are 5/6 and 1/6, in the mean
    (3 * 5/6 + 1/6) / 4 = 2/3 for red, and 1 / (1 + exp(-10 / T)) = 2/3 at T = 10 / ln 2 = 14.43."""
    client.put("/v1/classifiers/sure", json={"labels": ["red", "blue"]})
    body = {"items": items(picture, *REDS)}
    answer = client.post("/v1/classifiers/sure/calibrate", json=body).json()
    assert answer["temperature"] == pytest.approx(10 / math.log(2), rel=0.025)
    assert answer["version"] == 2
    assert client.get("/v1/classifiers/sure").json() == answer
    found = client.post("/v1/classify?classifier=sure", **raw(picture("red"))).json()["labels"]
    assert found[0]["score"] == pytest.approx(2 / 3, abs=0.006)
    # all told right: sure, but not without end. Targets 5/6: T = 10 / ln 5
    body = {"items": items(picture, *REDS[:1] * 4)}
    right = client.post("/v1/classifiers/sure/calibrate", json=body).json()
    assert right["temperature"] == pytest.approx(10 / math.log(5), rel=0.025)


def test_a_temperature_found_for_one_bundle_is_used_with_no_other(settings, serve, bundle_maker, tmp_path, picture):
    """Scores as in the test above: with the bundle it was found for at T = 14.43, with another at T = 1."""
    folder = tmp_path / "two"
    digests = {name: bundle_maker(folder, name, note=name).digest for name in ("colours-int8", "others-int8")}
    with serve(settings(bundles_dir=folder)) as client:

        def best(model: str, **more: object) -> tuple[float, float]:
            params = {"classifier": "sure", "model": model, **more}
            answer = client.post("/v1/classify", params=params, **raw(picture("red"))).json()
            return answer["temperature"], answer["labels"][0]["score"]

        def sure(temperature: float) -> tuple[object, object]:
            return pytest.approx(temperature), pytest.approx(1 / (1 + math.exp(-10 / temperature)), abs=1e-6)

        labels = {"labels": ["red", "blue"]}
        client.put("/v1/classifiers/sure", json={**labels, "temperature": 5.0})
        assert best("others-int8") == best("colours-int8") == sure(5)  # somebody chose it, for both
        for model in ("others-int8", "colours-int8"):
            body = {"items": items(picture, *REDS), "model": model}
            made = client.post("/v1/classifiers/sure/calibrate", json=body).json()
            assert made["family"] == digests[model]
        assert best("colours-int8") == sure(made["temperature"])
        assert best("others-int8") == sure(1)
        assert best("others-int8", temperature=3) == sure(3)
    with serve(settings(bundles_dir=folder)) as client:  # it is on disk
        assert client.get("/v1/classifiers/sure").json() == made
        again = client.put("/v1/classifiers/sure", json={**labels, "temperature": made["temperature"]}).json()
        assert again["family"] is None
        assert again["version"] == made["version"] + 1


@pytest.mark.parametrize(
    ("name", "pairs", "status", "word"),
    [("pair", [("green", "green")], 422, "'green' of item 0"), ("one", [("red", "red")], 422, "at least 2"),
     ("pair", [], 422, "items"), ("nobody", [("red", "red")], 404, "nobody")],
)  # fmt: skip
def test_what_cannot_be_calibrated(client, picture, name, pairs, status, word):
    client.put("/v1/classifiers/pair", json={"labels": ["red", "blue"]})
    client.put("/v1/classifiers/one", json={"labels": ["red"]})
    answer = client.post(f"/v1/classifiers/{name}/calibrate", json={"items": items(picture, *pairs)})
    assert (answer.status_code, word in answer.json()["detail"]) == (status, True)


def test_labels_beside_a_classifier_are_some_of_its_own_in_any_order(client, picture):
    client.put("/v1/classifiers/three", json={"labels": ["red", "green", "blue"], "descriptions": {"blue": ["a red"]}})
    params = {"classifier": "three", "labels": ["blue", "green"]}
    found = client.post("/v1/classify", params=params, **raw(picture("red"))).json()["labels"]
    assert [(one["label"], one["index"]) for one in found] == [("blue", 0), ("green", 1)]  # which is said to be red


@pytest.fixture
def shown(picture):
    """Pictures whose labels are said to be what they are not, so that no text would find them."""
    return items(picture, ("red", "sea"), ("red", "sea"), ("blue", "fire"), ("green", "sand"))


def test_a_head_is_fitted_to_pictures_and_knows_its_labels_by_name(settings, serve, picture, shown):
    """Prototypes are the axes: a yellow picture, (1, 1, 0) / sqrt 2, lies between sea (red) and sand (green)."""
    with serve(settings()) as client:
        client.put("/v1/classifiers/odd", json={"labels": ["fire", "sea", "sand"]})
        body = {"head": "prototype", "params": {"scale": 4.0}, "items": shown}
        made = client.post("/v1/classifiers/odd/fit", json=body).json()
        family = client.get("/v1/models").json()["models"][0]["family"]
        assert (made["version"], made["head"], made["fitted"], made["family"]) == (2, "prototype", True, family)
        ask = raw(picture("yellow"))

        def ranked(**params: object) -> list[tuple[str, float]]:
            answer = client.post("/v1/classify", params={"classifier": "odd", **params}, **ask)
            assert answer.status_code == 200, answer.text
            return [(one["label"], one["score"]) for one in answer.json()["labels"]]

        near = math.exp(4 * 0.5**0.5)
        most, least = (pytest.approx(part / (2 * near + 1), abs=1e-6) for part in (near, 1))
        assert ranked() == [("sea", most), ("sand", most), ("fire", least)]
        assert ranked(labels=["fire", "sand"]) == [
            ("sand", pytest.approx(near / (near + 1), abs=1e-6)), ("fire", pytest.approx(1 / (near + 1), abs=1e-6)),
        ]  # fmt: skip
        wrong = client.post("/v1/classify", params={"classifier": "odd", "labels": ["sea", "rocket"]}, **ask)
        assert (wrong.status_code, "not made for the label 'rocket'" in wrong.json()["detail"]) == (422, True)
        found = client.post("/v1/detect", params={"classifier": "odd", "min_score": 0.9}, **ask)
        assert found.status_code == 200  # whose labels and templates are looked for
    with serve(settings()) as again:  # it is on disk
        assert again.get("/v1/classifiers/odd").json() == made
        assert again.post("/v1/classify", params={"classifier": "odd"}, **ask).json()["labels"][0]["label"] == "sea"


def test_a_fitted_classifier_is_asked_with_its_family_alone(settings, serve, bundle_maker, tmp_path, picture, shown):
    folder = tmp_path / "two"
    for name, family in (("colours-int8", "a" * 64), ("colours-float", "a" * 64), ("others-int8", "b" * 64)):
        bundle_maker(folder, name, note=name, family=family)
    with serve(settings(bundles_dir=folder)) as client:
        client.put("/v1/classifiers/odd", json={"labels": ["fire", "sea", "sand"]})
        body = {"head": "prototype", "items": shown, "model": "colours-int8"}
        assert client.post("/v1/classifiers/odd/fit", json=body).status_code == 200
        for model, status in (("colours-int8", 200), ("colours-float", 200), ("others-int8", 409)):
            answer = client.post("/v1/classify", params={"classifier": "odd", "model": model}, **raw(picture("red")))
            assert answer.status_code == status, answer.text
        assert answer.json()["type"] == "/problems/classifier-bundle-mismatch"
        assert "Ask with a bundle of that family, or fit it anew" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"head": "cosine"}, 422, "the head 'cosine' has nothing to fit; those that do: prototype"),
        ({"head": "prototipe"}, 422, "did you mean 'prototype'?"),
        ({"params": {"scale": 0}}, 422, "head 'prototype': params {'scale': 0}: scale: "),
        ({"params": {"warm": 1}}, 422, "warm: unknown key"),
        ({"items": []}, 422, "items"),
    ],
)
def test_what_cannot_be_fitted(client, shown, change, status, says):
    client.put("/v1/classifiers/odd", json={"labels": ["fire", "sea", "sand"]})
    answer = client.post("/v1/classifiers/odd/fit", json={"head": "prototype", "items": shown} | change)
    assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text
    without = client.post("/v1/classifiers/odd/fit", json={"head": "prototype", "items": shown[:2]})
    assert "no picture is of 'fire'; expected at least one of each label" in without.json()["detail"]
    assert client.get("/v1/classifiers/odd").json()["head"] is None
