"""Vectors in place of texts over HTTP, beside a bundle that reads texts. The answers are those of `tests.vectors`."""

import copy

import numpy as np
import pytest

from calmclip.service.client import Client, Item, Rejected
from calmclip.service.settings import Settings
from tests.asking import b64
from tests.vectors import BLUE, DIM, MODEL, RED, SCALE, YELLOW, seal_bundle, softmax

HALF = 0.5**0.5
BUNDLE = "words-int8"


@pytest.fixture(scope="module")
def client(serve, bundle_maker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    seal_bundle(folder / "bundles", BUNDLE)
    bundle_maker(folder / "bundles", "colours-int8")
    with serve(Settings(bundles_dir=folder / "bundles", data_dir=folder / "data", threads=1)) as client:
        yield client


@pytest.fixture
def ask(client):
    with Client(str(client.base_url)) as typed:
        yield typed


def embed(client, *inputs: dict[str, object], model: str = BUNDLE):
    return client.post("/v1/embed", json={"model": model, "inputs": list(inputs)})


def test_embed_answers_pictures_and_vectors_in_their_order(client, picture):
    answer = embed(client, {"vector": [0, 0, 2, 5]}, {"image": b64(picture("red"))}, {"vector": list(YELLOW)})
    assert answer.status_code == 200, answer.text
    assert np.array(answer.json()["embeddings"]) == pytest.approx(
        np.array([[0, 0, 1], [1, 0, 0], [HALF, HALF, 0]]), abs=1e-6
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"vector": [1.0, 2.0]}, f"vector 1 has 2 numbers; this bundle reads vectors of {MODEL} with {DIM} numbers"),
        ({"vector": [0, 0, 0, 0]}, "vector 1 has the length 0 and no direction"),
        ({"vector": [1e300, 0, 0, 1]}, "vector 1: number 0 is 1e+300; expected finite numbers of float32"),
        ({"text": "red"}, f"reads no texts, but vectors of {MODEL} with {DIM} numbers: send a `vector`"),
        ({"vector": []}, "inputs.1.vector"),
        ({"vector": [1, "2", 3, 4]}, "inputs.1.vector.1"),
        ({"vector": [1, None, 3, 4]}, "inputs.1.vector.1"),
        ({"vector": [True, 2, 3, 4]}, "inputs.1.vector.0"),
        ({"vector": list(RED), "text": "red"}, "expected `text`, `image` or `vector`, one of them"),
        ({"vector": list(RED), "boxes": [[0.0, 0.0, 1.0, 1.0]]}, "`boxes` belong to an `image`"),
        ({}, "expected `text`, `image` or `vector`, one of them"),
    ],
)
def test_each_fault_has_its_own_error(given: dict[str, object], says: str, client):
    answer = embed(client, {"vector": list(RED)}, given)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request"), answer.text
    assert says in answer.text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_what_is_no_json_number_is_refused(number: str, client):
    body = f'{{"model": "{BUNDLE}", "inputs": [{{"vector": [{number}, 0, 0, 0]}}]}}'
    answer = client.post("/v1/embed", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text


def test_more_vectors_than_the_limit_are_refused(client):
    answer = embed(client, *[{"vector": list(RED)}] * 257)
    assert answer.status_code == 422
    assert "257 inputs were given; at most 256 are read at once" in answer.text


def test_a_bundle_of_texts_refuses_a_vector(client):
    answer = embed(client, {"vector": list(RED)}, model="colours-int8")
    assert answer.status_code == 422
    assert "bundle 'colours-int8' reads texts, and no vectors of another model" in answer.json()["detail"]


def test_a_collection_is_filled_and_searched_by_vectors(client, ask, picture):
    assert client.put("/v1/collections/words", json={"model": BUNDLE, "keep_originals": True}).status_code == 201
    items = [Item("red", image=picture("red")), Item("blue", vector=BLUE), Item("yellow", vector=YELLOW, meta={"n": 3})]
    assert ask.upsert("words", items).count == 3
    hits = ask.search("words", vector=RED)
    assert [(hit.id, hit.meta) for hit in hits] == [("red", {}), ("yellow", {"n": 3}), ("blue", {})]
    assert [hit.score for hit in hits] == pytest.approx([1, HALF, 0], abs=1e-6)
    assert [hit.id for hit in ask.search("words", image=picture("blue"), top_k=1)] == ["blue"]
    with pytest.raises(Rejected, match="vector 0 has 3 numbers"):
        ask.search("words", vector=[1, 2, 3])
    with pytest.raises(Rejected, match="vector 1 has 1 numbers"):
        ask.upsert("words", [Item("a", vector=RED), Item("b", vector=[1])])
    assert ask.collection("words").items == 3
    with pytest.raises(Rejected, match="reads no texts"):
        ask.search("words", "red")


def scores(answer) -> dict[str, float]:
    return {row.label: row.score for row in answer.labels}


def test_classify_with_label_vectors(client, ask, picture):
    given = {"a red thing": [RED], "sky": [BLUE], "sun": [YELLOW, YELLOW]}
    wanted = dict(zip(given, softmax(SCALE, 0, SCALE * HALF), strict=True))
    answer = ask.classify(picture("red"), label_vectors=given, model=BUNDLE)
    assert scores(answer) == pytest.approx(wanted, abs=1e-6)
    assert answer.labels[0].label == "a red thing"
    chosen = ask.classify(picture("red"), ["sun", "sky"], label_vectors=given, model=BUNDLE)
    assert scores(chosen) == pytest.approx(dict(zip(("sun", "sky"), softmax(SCALE * HALF, 0), strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"label_vectors": {"a": [[1.0, 2.0]]}}, "label vector 0 has 2 numbers"),
        ({"label_vectors": {"a": [list(RED)], "b": [[0, 0, 0, 0]]}}, "label vector 1 has the length 0"),
        ({"label_vectors": {"a": [list(RED)], "b": [list(RED)[:3]]}}, "those of 'a' 4; expected as many"),
        ({"label_vectors": {"a": []}}, "the label vectors of 'a' have no numbers"),
        ({"label_vectors": {"a": list(RED)}}, "'a' has no list of vectors; expected one, such as [[0.1, 0.2]]"),
        ({"label_vectors": {"a": [["x"]]}}, "'a' has no list of vectors"),
        ({"label_vectors": {"a": [[1e300, 0, 0, 0]]}}, "label vectors of 'a', 0: number 0 is 1e+300"),
        ({"label_vectors": {"a": [list(RED)] * 33}}, "33 label vectors of 'a' were given; at most 32 are read"),
        ({"label_vectors": {"a": [list(RED)]}, "labels": ["b"]}, "none of the 1 labels has label vectors"),
        ({"label_vectors": {"a": [list(RED)]}, "templates": ["a {}"]}, "leave out `templates`"),
        ({"label_vectors": {"a": [list(RED)]}, "attributes": {"t": ["x", "y"]}}, "Leave out `attributes`"),
        ({"label_vectors": {"a": [list(RED)]}, "alpha": 0.5}, "alpha"),
        ({"labels": ["a", "b"]}, f"reads no texts, but vectors of {MODEL}"),
        ({"label_vectors": {"": [list(RED)]}}, "label 0 is empty"),
        ({"label_vectors": {"a": [list(RED)]}, "model": "colours-int8"}, "reads texts, and no vectors"),
    ],
)
def test_label_vectors_that_do_not_fit_have_an_error(given: dict[str, object], says: str, client, picture):
    answer = client.post("/v1/classify", json={"model": BUNDLE, "image": b64(picture("red")), **given})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request"), answer.text
    assert says in answer.text


def test_too_many_labels_with_vectors_are_refused(client, picture):
    body = {"model": BUNDLE, "image": b64(picture("red")), "label_vectors": {str(i): [list(RED)] for i in range(257)}}
    answer = client.post("/v1/classify", json=body)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/too-many-labels")


def test_a_registered_classifier_keeps_the_vectors(client, ask, picture):
    given = {"red": [RED], "blue": [BLUE]}
    registered = ask.put_classifier("paints", label_vectors=given, temperature=2.0)
    assert (registered.labels, registered.vector_dim, registered.version) == (["red", "blue"], DIM, 1)
    assert ask.put_classifier("paints", ["red", "blue"], label_vectors=given, temperature=2.0).version == 1
    assert scores(ask.classify(picture("red"), classifier="paints", model=BUNDLE)) == pytest.approx(
        dict(zip(given, softmax(SCALE / 2, 0), strict=True)), abs=1e-6
    )
    with pytest.raises(Rejected, match="reads texts, and no vectors"):
        ask.classify(picture("red"), classifier="paints", model="colours-int8")
    with pytest.raises(Rejected, match="`label_vectors` and a `classifier`; expected one"):
        ask.classify(picture("red"), classifier="paints", label_vectors=given, model=BUNDLE)
    changed = copy.deepcopy(given) | {"blue": [YELLOW]}
    assert ask.put_classifier("paints", label_vectors=changed, temperature=2.0).version == 2
    assert scores(ask.classify(picture("red"), classifier="paints", model=BUNDLE)) == pytest.approx(
        dict(zip(given, softmax(SCALE / 2, SCALE / 2 * HALF), strict=True)), abs=1e-6
    )
    ask.delete_classifier("paints")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "expected `labels`, or `label_vectors`"),
        ({"labels": ["a"], "label_vectors": {"b": [[1]]}}, "label vectors of 'b', which is none of the 1 labels"),
        ({"labels": ["a", "b"], "label_vectors": {"a": [[1]]}}, "the label 'b' has no label vectors"),
        ({"label_vectors": {"a": [[1]]}, "templates": ["a {}"]}, "`label_vectors` stand in place of sentences"),
        ({"label_vectors": {"a": [[1]]}, "descriptions": {"a": ["x"]}}, "`label_vectors` stand in place of sentences"),
        ({"label_vectors": {"a": [[1]] * 33}}, "33 label vectors of 'a' were given; at most 32 are read"),
    ],
)
def test_a_classifier_whose_vectors_do_not_fit_is_refused(body: dict[str, object], says: str, client):
    answer = client.put("/v1/classifiers/bad", json=body)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request"), answer.text
    assert says in answer.text
