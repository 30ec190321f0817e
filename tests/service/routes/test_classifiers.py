"""Classifiers: registered, versioned, stored, and used by name."""

import math

import pytest

from tests.asking import b64, raw

REDS = [("red", "red")] * 75 + [("red", "blue")] * 25
# 1 / (1 + exp(-10 / T)) = the mean target (75 * 101 / 102 + 25 * 1 / 102) / 100 = 76 / 102
WARM = 10 / math.log(76 / 26)
OPEN = {"templates": [], "descriptions": {}, "head": None, "params": {}, "family": None, "fitted": False}


def items(picture, *pairs: tuple[str, str]) -> list[dict[str, object]]:
    """(colour, label) -> an item with a picture of the colour."""
    return [{"image": b64(picture(colour)), "label": label} for colour, label in pairs]


def test_classify_and_detect_name_a_classifier(client, picture):
    client.put("/v1/classifiers/named", json={"labels": ["blue", "green"], "templates": ["red {}"]})
    ask = {"params": {"classifier": "named"}, **raw(picture("green"))}
    labels = client.post("/v1/classify", **ask).json()["labels"]
    # the classifier's template applies: "red green" = (1, 1, 0) / sqrt 2 against (0, 1, 0)
    assert [(row["label"], row["cosine"]) for row in labels] == [
        ("green", pytest.approx(0.5**0.5, abs=1e-6)),
        ("blue", pytest.approx(0, abs=1e-6)),
    ]
    ask["params"]["templates"] = "{}"  # the request's templates win
    assert client.post("/v1/classify", **ask).json()["labels"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    ask["params"] = {"classifier": "named", "min_score": 0.7}
    assert {row["label"] for row in client.post("/v1/detect", **ask).json()["detections"]} == {"green"}
    assert client.delete("/v1/classifiers/named").status_code == 204


def test_a_classifier_may_have_a_temperature_and_a_threshold_for_none_of_these(client, picture):
    """Red against red and blue: cosines 1 and 0, logits 10 and 0 at scale 10, so the best is 1 / (1 + exp(-10 / T))."""

    def sure(temperature: float) -> float:
        return 1 / (1 + math.exp(-10 / temperature))

    body = {"labels": ["red", "blue"], "temperature": 5.0, "none_below": 0.9}
    for _ in range(2):  # the same body again changes nothing
        assert client.put("/v1/classifiers/warm", json=body).json() == {"name": "warm", "version": 1, **OPEN, **body}
    ask = raw(picture("red"))

    def best(**query: object) -> tuple[float, bool | None]:
        answer = client.post("/v1/classify", params=query, **ask).json()
        return answer["labels"][0]["score"], answer["none_of_these"]

    assert best(labels=["red", "blue"]) == (pytest.approx(sure(1), abs=1e-6), None)
    assert best(classifier="warm") == (pytest.approx(sure(5), abs=1e-6), True)  # 0.881
    assert best(classifier="warm", none_below=0.85) == (pytest.approx(sure(5), abs=1e-6), False)
    assert best(classifier="warm", temperature=2) == (pytest.approx(sure(2), abs=1e-6), False)  # 0.993
    assert client.put("/v1/classifiers/warm", json={**body, "temperature": 4.0}).json()["version"] == 2
    for wrong in ({"temperature": 0}, {"temperature": 1000}, {"none_below": 0}, {"none_below": 2}):
        assert client.put("/v1/classifiers/x", json={**body, **wrong}).status_code == 422
        assert client.post("/v1/classify", params={"labels": "red", **wrong}, **ask).status_code == 422


def test_a_classifier_is_calibrated_on_labelled_pictures(client, picture):
    """100 red pictures, 25 of them labelled blue: logits 10 and 0. At T = 1 the score of red is 0.99995, and 75 % are
    right: a calibration error of .25, and a likelihood of 10 * .25. At the fitted T the score is 76 / 102."""
    client.put("/v1/classifiers/sure", json={"labels": ["red", "blue"]})
    body = {"items": items(picture, *REDS)}
    answer = client.post("/v1/classifiers/sure/calibrate", json=body).json()
    assert answer["temperature"] == pytest.approx(WARM, rel=0.012)  # half a step of the search
    assert (answer["version"], answer["pictures"]) == (2, 100)
    sure = 1 / (1 + math.exp(-10))
    assert answer["before"] == pytest.approx(
        {"expected_calibration_error": sure - 0.75, "negative_log_likelihood": 0.25 * 10 - math.log(sure)}, abs=2e-6
    )
    score = 1 / (1 + math.exp(-10 / answer["temperature"]))
    likelihood = -0.75 * math.log(score) - 0.25 * math.log(1 - score)
    assert answer["after"] == pytest.approx(
        {"expected_calibration_error": abs(score - 0.75), "negative_log_likelihood": likelihood}, abs=2e-6
    )
    stored = client.get("/v1/classifiers/sure").json()
    assert stored == {key: answer[key] for key in stored}
    ranked = client.post("/v1/classify?classifier=sure", **raw(picture("red"))).json()["labels"]
    assert ranked[0]["score"] == pytest.approx(76 / 102, abs=0.003)
    # all labels are right, and the temperature stays finite: targets 101 / 102, so T = 10 / ln 101
    body = {"items": items(picture, *[("red", "red")] * 98, *[("blue", "blue")] * 2)}
    right = client.post("/v1/classifiers/sure/calibrate", json=body).json()
    assert right["temperature"] == pytest.approx(10 / math.log(101), rel=0.012)
    assert right["before"]["expected_calibration_error"] > 20 * right["after"]["expected_calibration_error"]


def test_a_calibrated_temperature_is_used_with_its_bundle_only(settings, serve, bundle_maker, tmp_path, picture):
    """Scores as in the test above: T = 9.3 with the calibrated bundle, T = 1 with another bundle."""
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
        assert best("others-int8") == best("colours-int8") == sure(5)  # a request set it, so it holds for both
        for model in ("others-int8", "colours-int8"):
            body = {"items": items(picture, *REDS), "model": model}
            calibrated = client.post("/v1/classifiers/sure/calibrate", json=body).json()
            assert calibrated["family"] == digests[model]
        assert best("colours-int8") == sure(calibrated["temperature"])
        assert best("others-int8") == sure(1)
        assert best("others-int8", temperature=3) == sure(3)
    with serve(settings(bundles_dir=folder)) as client:  # it is on disk
        stored = client.get("/v1/classifiers/sure").json()
        assert stored == {key: calibrated[key] for key in stored}
        again = client.put("/v1/classifiers/sure", json={**labels, "temperature": calibrated["temperature"]}).json()
        assert again["family"] is None
        assert again["version"] == calibrated["version"] + 1


@pytest.mark.parametrize(
    ("name", "pairs", "status", "says"),
    [
        ("pair", [("green", "green")], 422, "'green' of item 0"),
        ("one", [("red", "red")], 422, "there are 1 labels; expected at least 2"),
        ("pair", [], 422, "items"),
        ("nobody", [("red", "red")], 404, "nobody"),
        ("pair", [("red", "red")], 422, "1 pictures for 2 labels were given; 'red' has 1, 'blue' has 0; a temperature "
         "needs at least 100 pictures in all and 2 of each label. Send more"),
        ("pair", [("red", "red")] * 120 + [("red", "blue")], 422, "121 pictures for 2 labels were given; 'blue' has"),
        ("pair", [("red", "red"), ("red", "blue")] * 49, 422, "98 pictures for 2 labels were given; a temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated(client, picture, name, pairs, status, says):
    client.put("/v1/classifiers/pair", json={"labels": ["red", "blue"]})
    client.put("/v1/classifiers/one", json={"labels": ["red"]})
    answer = client.post(f"/v1/classifiers/{name}/calibrate", json={"items": items(picture, *pairs)})
    assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text
    assert client.get("/v1/classifiers/pair").json()["temperature"] == 1


def test_labels_of_a_request_select_labels_of_the_classifier_in_any_order(client, picture):
    client.put("/v1/classifiers/three", json={"labels": ["red", "green", "blue"], "descriptions": {"blue": ["a red"]}})
    params = {"classifier": "three", "labels": ["blue", "green"]}
    ranked = client.post("/v1/classify", params=params, **raw(picture("red"))).json()["labels"]
    # the description of blue says red
    assert [(row["label"], row["index"]) for row in ranked] == [("blue", 0), ("green", 1)]


@pytest.fixture
def shown(picture):
    """Pictures with labels that have nothing to do with their colours, so text vectors cannot match them."""
    return items(picture, ("red", "sea"), ("red", "sea"), ("blue", "fire"), ("green", "sand"))


def test_a_fitted_head_finds_its_labels_by_name(settings, serve, picture, shown):
    """Prototypes are the axes: a yellow picture, (1, 1, 0) / sqrt 2, lies between sea (red) and sand (green)."""
    with serve(settings()) as client:
        client.put("/v1/classifiers/odd", json={"labels": ["fire", "sea", "sand"]})
        body = {"head": "prototype", "params": {"scale": 4.0}, "items": shown}
        fitted = client.post("/v1/classifiers/odd/fit", json=body).json()
        family = client.get("/v1/models").json()["models"][0]["family"]
        assert (fitted["version"], fitted["head"], fitted["fitted"], fitted["family"]) == (2, "prototype", True, family)
        ask = raw(picture("yellow"))

        def ranked(**params: object) -> list[tuple[str, float]]:
            answer = client.post("/v1/classify", params={"classifier": "odd", **params}, **ask)
            assert answer.status_code == 200, answer.text
            return [(row["label"], row["score"]) for row in answer.json()["labels"]]

        near = math.exp(4 * 0.5**0.5)
        most, least = (pytest.approx(part / (2 * near + 1), abs=1e-6) for part in (near, 1))
        assert ranked() == [("sea", most), ("sand", most), ("fire", least)]
        assert ranked(labels=["fire", "sand"]) == [
            ("sand", pytest.approx(near / (near + 1), abs=1e-6)), ("fire", pytest.approx(1 / (near + 1), abs=1e-6)),
        ]  # fmt: skip
        wrong = client.post("/v1/classify", params={"classifier": "odd", "labels": ["sea", "rocket"]}, **ask)
        assert (wrong.status_code, "does not know the label 'rocket'" in wrong.json()["detail"]) == (422, True)
        detected = client.post("/v1/detect", params={"classifier": "odd", "min_score": 0.9}, **ask)
        assert detected.status_code == 200  # detect uses its labels and templates
    with serve(settings()) as again:  # it is on disk
        assert again.get("/v1/classifiers/odd").json() == fitted
        assert again.post("/v1/classify", params={"classifier": "odd"}, **ask).json()["labels"][0]["label"] == "sea"


def test_a_fitted_classifier_serves_its_family_only(settings, serve, bundle_maker, tmp_path, picture, shown):
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
        assert "Use a bundle of that family, or fit it again" in answer.json()["detail"]


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
    says = "the label 'fire' has no picture, nor have 1 others; expected at least one for each of the 3 labels"
    assert says in without.json()["detail"]
    assert client.get("/v1/classifiers/odd").json()["head"] is None
