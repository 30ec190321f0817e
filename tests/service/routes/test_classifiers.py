"""Classifiers: registered, versioned, stored, and used by name."""

import math
import shutil
from functools import partial

import pytest

from calmclip.models.cli import main
from tests.asking import b64, raw

REDS = [("red", "red")] * 75 + [("red", "blue")] * 25
# 1 / (1 + exp(-10 / T)) = the mean target (75 * 101 / 102 + 25 * 1 / 102) / 100 = 76 / 102
WARM = 10 / math.log(76 / 26)
OPEN = {"templates": [], "descriptions": {}, "head": None, "params": {}, "family": None, "fitted": False,
        "report": None, "vector_dim": None}  # fmt: skip


def items(picture, *pairs: tuple[str, str]) -> list[dict[str, object]]:
    """(colour, label) -> an item with a picture of the colour."""
    return [{"image": b64(picture(colour)), "label": label} for colour, label in pairs]


def test_the_list_names_the_methods_of_a_fit(client):
    methods = {method.pop("name"): method for method in client.get("/v1/classifiers").json()["methods"]}
    assert methods["prototype"] == {"labels": None, "names": [], "task": "classify", "reads": []}
    assert methods["memory"] == {"labels": 2, "names": ["normal", "damaged"], "task": "anomaly", "reads": []}
    assert "cosine" not in methods  # it has nothing to fit


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
        body = {"method": "prototype", "params": {"scale": 4.0}, "items": shown, "labels": ["fire", "sea", "sand"]}
        fitted = client.post("/v1/classifiers/odd/fit", json=body).json()
        family = client.get("/v1/models").json()["models"][0]["family"]
        assert (fitted["version"], fitted["head"], fitted["fitted"], fitted["family"]) == (1, "prototype", True, family)
        assert fitted.pop("skipped") == 0
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
        body = {"method": "prototype", "items": shown, "model": "colours-int8"}
        assert client.post("/v1/classifiers/odd/fit", json=body).status_code == 200
        for model, status in (("colours-int8", 200), ("colours-float", 200), ("others-int8", 409)):
            answer = client.post("/v1/classify", params={"classifier": "odd", "model": model}, **raw(picture("red")))
            assert answer.status_code == status, answer.text
        assert answer.json()["type"] == "/problems/classifier-bundle-mismatch"
        assert "Use a bundle of that family, or fit it again" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"method": "cosine"}, 422, "the head 'cosine' has nothing to fit; those that do: caps, direction, gda, "),
        ({"method": "prototipe"}, 422, "did you mean 'prototype'?"),
        ({"params": {"scale": 0}}, 422, "head 'prototype': params {'scale': 0}: scale: "),
        ({"params": {"warm": 1}}, 422, "warm: unknown key"),
        ({"items": []}, 422, "expected pictures (`items`, `unlabelled`) or a `collection`, one of them"),
        ({"collection": "photos", "label": "kind"}, 422, "expected pictures (`items`, `unlabelled`) or a `collection`"),
        ({"items": [], "collection": "photos"}, 422, "expected `collection` and `label` together"),
        ({"items": [], "collection": "photos", "label": "kind", "augment": 1}, 422, "`augment` needs pictures"),
        ({"items": [], "collection": "nothere", "label": "kind"}, 404, "nothere"),
        ({"labels": ["fire", "sea"]}, 422, "the label 'sand' of item 3 is none of the 2 labels"),
        ({"labels": ["fire", "sea", "sand", "ice"]}, 422, "the label 'ice' has no picture; expected at least one"),
        ({"labels": [f"{i}" for i in range(257)]}, 422, "257 labels were given; at most 256"),
        ({"templates": ["no place"]}, 422, "has no '{}' where the label belongs"),
        ({"augment": 51}, 422, "augment"),
        ({"words": ["x"] * 5001}, 422, "5001 words were given; at most 5000"),
        ({"words": ["x"]}, 422, "the head 'prototype' reads no words"),
        ({"model": "nobody"}, 404, "nobody"),
    ],
)
def test_what_cannot_be_fitted(client, shown, change, status, says):
    answer = client.post("/v1/classifiers/wrong/fit", json={"method": "prototype", "items": shown} | change)
    assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text
    assert client.get("/v1/classifiers/wrong").status_code == 404


METHODS = {  # -> what it needs beside pictures
    "gda": {},
    "tip": {},
    "caps": {"captions": True},
    "softmax_regression": {},
    "direction": {"words": ["red", "green", "blue"]},
    "linear_probe": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_fitted_stored_and_used(client, picture, method):
    """Pictures of two colours, three of each, whose labels are the other colour: zero-shot is always wrong."""
    needs = METHODS[method]
    shown = items(picture, *[("red", "blue"), ("blue", "red")] * 3)
    if "captions" in needs:
        shown = [{**item, "caption": f"a {item['label']} thing"} for item in shown]
    body = {
        "method": method,
        "items": shown,
        "replace": True,
        **({"words": needs["words"]} if "words" in needs else {}),
    }
    answer = client.post(f"/v1/classifiers/{method}/fit", json=body)
    assert answer.status_code == 200, answer.text
    report = answer.json()["report"]
    assert (report["method"], report["before"]) == (method, 0.0)
    assert None not in report["params"].values()
    ranked = client.post("/v1/classify", params={"classifier": method}, **raw(picture("red"))).json()["labels"]
    assert ranked[0]["label"] == "blue"
    assert report["after"] == 1.0


def test_pictures_without_a_label_may_do(client, picture):
    """Expectation maximization of `gda` begins with zero-shot, which is right about these."""
    shown = [b64(picture(colour)) for colour in ("red", "blue", "red", "blue")]
    body = {"method": "gda", "unlabelled": shown, "labels": ["red", "blue"]}
    answer = client.post("/v1/classifiers/unlabelled/fit", json=body)
    assert (answer.status_code, answer.json().get("report", {}).get("pictures")) == (200, 0), answer.text
    ranked = client.post("/v1/classify", params={"classifier": "unlabelled"}, **raw(picture("blue"))).json()["labels"]
    assert ranked[0]["label"] == "blue"
    without = client.post("/v1/classifiers/unlabelled2/fit", json={**body, "labels": []})
    assert (without.status_code, without.json()["type"]) == (422, "/problems/too-many-labels")


def test_a_caption_of_a_form_follows_its_picture(client, picture):
    parts = [("method", (None, "caps"))]
    for colour, label in (("red", "blue"), ("blue", "red")):
        parts += [(label, picture(colour)), ("caption", (None, f"a {label} thing"))]
    answer = client.post("/v1/classifiers/said/fit", files=parts)
    assert (answer.status_code, answer.json().get("labels")) == (200, ["blue", "red"]), answer.text
    answer = client.post("/v1/classifiers/said2/fit", files=[*parts, ("caption", (None, "another"))])
    assert (answer.status_code, "does not follow a picture" in answer.json()["detail"]) == (422, True)


def test_a_method_whose_package_is_missing_is_named(client, shown, monkeypatch):
    monkeypatch.setattr("calmclip.models.heads.linear_probe.find_spec", lambda name: None)
    answer = client.post("/v1/classifiers/wrong/fit", json={"method": "linear_probe", "items": shown})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/extra-missing")
    assert "'scikit-learn'" in answer.json()["detail"]
    assert "eval" in answer.json()["detail"]


def test_items_of_a_fit_are_checked(client, shown):
    post = partial(client.post, "/v1/classifiers/wrong/fit")
    one_caption = [{**shown[0], "caption": "the sea"}, *shown[1:]]
    answer = post(json={"method": "prototype", "items": one_caption})
    assert (answer.status_code, "item 1 has no caption" in answer.json()["detail"]) == (422, True)
    broken = [*shown[:3], {"image": {"b64": "aGVsbG8="}, "label": "sand"}]
    answer = post(json={"method": "prototype", "items": broken})
    assert (answer.status_code, "item 3: " in answer.json()["detail"]) == (415, True)
    answer = post(json={"method": "prototype", "items": shown * 65})
    assert (answer.status_code, "260 items were given; at most 256" in answer.json()["detail"]) == (422, True)
    answer = client.post("/v1/classifiers/No!/fit", json={"method": "prototype", "items": shown})
    assert (answer.status_code, "is not a name for a classifier" in answer.json()["detail"]) == (422, True)


def test_a_name_in_use_is_replaced_only_on_request(client, picture, shown):
    """The second fit swaps two labels of the first, and its version counts on."""
    post = partial(client.post, "/v1/classifiers/taken/fit")
    body = {"method": "prototype", "items": shown}
    assert post(json=body).json()["version"] == 1
    again = post(json=body)
    assert (again.status_code, again.json()["type"]) == (409, "/problems/classifier-exists")
    assert "of version 1; choose another name, or ask for `replace`" in again.json()["detail"]
    swapped = [{**item, "label": {"sea": "fire", "fire": "sea"}.get(item["label"], "sand")} for item in shown]
    answer = post(json={**body, "items": swapped, "replace": True}).json()
    assert (answer["version"], answer["labels"]) == (2, ["fire", "sea", "sand"])
    ask = {"params": {"classifier": "taken"}, **raw(picture("red"))}
    assert client.post("/v1/classify", **ask).json()["labels"][0]["label"] == "fire"


def test_a_form_has_the_labels_as_names_of_its_files(client, picture):
    """A label may be called like a field: files are pictures, texts are fields."""
    post = partial(client.post, "/v1/classifiers/form/fit")
    files = [
        ("sea", picture("red")),
        ("method", picture("blue")),
        ("sea", picture("yellow")),
        ("räv", picture("green")),
    ]
    data = {"method": "prototype", "params": '{"scale": 4.0}', "templates": ["a {}", "{}"], "replace": "true"}
    answer = post(files=files, data=data)
    assert answer.status_code == 200, answer.text
    fitted = answer.json()
    assert (fitted["labels"], fitted["templates"]) == (["sea", "method", "räv"], ["a {}", "{}"])
    assert (fitted["params"], fitted["report"]["pictures"]) == ({"scale": 4.0}, 4)
    ranked = client.post("/v1/classify", params={"classifier": "form"}, **raw(picture("red"))).json()["labels"]
    # sea is the unit mean of (1, 0, 0) and (1, 1, 0) / sqrt 2; its cosine with red is cos 22.5 degrees
    near, far, none = math.exp(4 * math.cos(math.pi / 8)), math.exp(0), math.exp(0)
    assert ranked[0]["score"] == pytest.approx(near / (near + far + none), abs=1e-6)
    assert post(files=files[:2], data=data | {"labels": ["method", "sea"]}).json()["labels"] == ["method", "sea"]


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ([("method", "prototype"), ("params", "{")], 422, "the field 'params' is not JSON"),
        ([("method", "prototype"), ("methods", "x")], 422, "methods"),
        ([("method", "prototype"), ("method", "prototype")], 422, "the field 'method' is given twice"),
        ([("caption", "the sea"), ("method", "prototype")], 422, "does not follow a picture"),
        ([("method", "prototype")], 422, "expected pictures (`items`, `unlabelled`) or a"),
    ],
)
def test_what_a_form_cannot_have(client, picture, fields, status, says):
    files = [(name, (None, text)) for name, text in fields]
    files += [("sea", picture("red"))] if "expected" not in says else []
    answer = client.post("/v1/classifiers/form2/fit", files=files)
    assert (answer.status_code, says in answer.text) == (status, True), answer.text
    raw_picture = client.post("/v1/classifiers/form2/fit", **raw(picture("red")))
    assert (raw_picture.status_code, raw_picture.json()["type"]) == (415, "/problems/unsupported-media-type")


@pytest.fixture
def photos(client, picture):
    """A collection of four items with a text under `kind`, and three without; the ids are not in their order."""
    kinds = {"d": ("red", "sea"), "c": ("red", "sea"), "a": ("blue", "fire"), "b": ("green", "sand")}
    others = {"x": {"kind": 7}, "y": {"other": "sea"}, "z": {"kind": ["sea"]}}
    stored = [
        {"id": id_, "image": b64(picture(colour)), "meta": {"kind": kind}} for id_, (colour, kind) in kinds.items()
    ]
    stored += [{"id": id_, "text": "white", "meta": meta} for id_, meta in others.items()]
    client.put("/v1/collections/photos", json={})
    assert client.post("/v1/collections/photos/items", json={"items": stored}).status_code == 200
    yield {"method": "prototype", "collection": "photos", "label": "kind", "params": {"scale": 4.0}, "replace": True}
    client.delete("/v1/collections/photos")


def test_a_collection_fits_as_its_pictures_do(client, picture, shown, photos):
    answer = client.post("/v1/classifiers/stored/fit", json=photos)
    assert answer.status_code == 200, answer.text
    fitted = answer.json()
    assert (fitted["labels"], fitted["skipped"], fitted["report"]["pictures"]) == (["fire", "sand", "sea"], 3, 4)
    assert fitted["report"]["notes"][-1].startswith("3 items of the collection have no label of these under 'kind'")
    body = {"method": "prototype", "items": shown, "params": {"scale": 4.0}, "labels": fitted["labels"]}
    client.post("/v1/classifiers/sent/fit", json=body)
    ranked = [
        client.post("/v1/classify", params={"classifier": name}, **raw(picture("yellow"))).json()["labels"]
        for name in ("stored", "sent")
    ]
    assert ranked[0] == ranked[1]
    two = client.post("/v1/classifiers/stored/fit", json={**photos, "labels": ["sea", "fire"]}).json()
    assert (two["labels"], two["skipped"], two["report"]["pictures"]) == (["sea", "fire"], 4, 3)


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"label": "year"}, 422, "no labels were given"),
        ({"labels": ["sea", "ice"]}, 422, "the label 'ice' has no picture"),
        ({"model": "nobody"}, 404, "nobody"),
    ],
)
def test_what_a_collection_cannot_fit(client, photos, change, status, says):
    answer = client.post("/v1/classifiers/wrong/fit", json=photos | change)
    assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text


def test_a_collection_fits_only_what_its_bundle_embeds(settings, serve, bundle_maker, tmp_path, picture, shown):
    """`others` subtracts a mean from each picture, so that it embeds differently."""
    folder = tmp_path / "two"
    bundle_maker(folder, "colours-int8")
    with serve(settings(bundles_dir=folder, limits={"fit_items": 3})) as client:
        client.put("/v1/collections/photos", json={})
        stored = [
            {"id": str(i), "image": item["image"], "meta": {"kind": item["label"]}} for i, item in enumerate(shown)
        ]
        client.post("/v1/collections/photos/items", json={"items": stored})
        body = {"method": "prototype", "collection": "photos", "label": "kind"}
        answer = client.post("/v1/classifiers/odd/fit", json=body)
        assert (answer.status_code, "more than 3 items with a text under 'kind'" in answer.text) == (422, True)
        client.request("DELETE", "/v1/collections/photos/items", json={"ids": ["3"]})
        assert client.post("/v1/classifiers/odd/fit", json=body).json()["labels"] == ["fire", "sea"]
    shutil.rmtree(folder)
    bundle_maker(folder, "others-int8", mean=(0.1, 0, 0))
    with serve(settings(bundles_dir=folder)) as client:
        answer = client.post("/v1/classifiers/odd/fit", json={**body, "replace": True})
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/collection-bundle-mismatch")
        assert client.get("/v1/classifiers/odd").json()["version"] == 1


def test_two_services_over_one_folder_see_a_fit_at_once(settings, serve, picture, shown, tmp_path):
    """As replicas do: one fits, the other answers; `calibrate` keeps the arrays and the report."""
    with serve(settings()) as first, serve(settings(store=f"lancedb:{tmp_path / 'own'}")) as second:
        ask = {"params": {"classifier": "odd"}, **raw(picture("red"))}
        for version, method in enumerate(["prototype"] * 3, start=1):
            body = {"method": method, "items": shown, "replace": True}
            fitted = (first, second)[version % 2].post("/v1/classifiers/odd/fit", json=body).json()
            del fitted["skipped"]
            assert fitted["version"] == version
            for service in (first, second):
                assert service.get("/v1/classifiers/odd").json() == fitted
                assert service.post("/v1/classify", **ask).json()["labels"][0]["label"] == "sea"
        known = items(picture, *[("red", "sea"), ("blue", "fire"), ("green", "sand")] * 34)
        calibrated = second.post("/v1/classifiers/odd/calibrate", json={"items": known}).json()
        assert calibrated["temperature"] != 1
        seen = first.get("/v1/classifiers/odd").json()
        assert seen == fitted | {"version": 4, "temperature": calibrated["temperature"]}


def test_a_service_serves_at_once_what_the_command_line_fits(settings, serve, bundles, picture, tmp_path):
    for colour, label in (("red", "sea"), ("blue", "fire")):
        (tmp_path / "shown" / label).mkdir(parents=True)
        (tmp_path / "shown" / label / "a.png").write_bytes(picture(colour))
    with serve(settings()) as client:
        assert client.get("/v1/classifiers").json()["classifiers"] == []
        options = {"bundle": bundles / "colours-int8", "pictures": tmp_path / "shown", "method": "prototype",
                   "out": tmp_path / "data" / "classifiers"}  # fmt: skip
        assert (
            main(["fit", "odd", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
        )
        ranked = client.post("/v1/classify", params={"classifier": "odd"}, **raw(picture("red"))).json()["labels"]
        assert [row["label"] for row in ranked] == ["sea", "fire"]
        (stored,) = client.get("/v1/classifiers").json()["classifiers"]
        assert (stored["report"]["method"], stored["report"]["pictures"]) == ("prototype", 2)
