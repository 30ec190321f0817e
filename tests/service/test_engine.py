"""The text cache: what was embedded is not embedded again, and rows of others are never mixed up."""

import numpy as np
import pytest

from calmclip.models.flow import Call
from calmclip.models.tasks import features
from calmclip.service.admission import Admission
from calmclip.service.batching import Batcher
from calmclip.service.engine import Engine
from calmclip.service.request import Context
from tests.asking import metric, raw

CACHE = "calmclip_text_cache_total"
LABELLED = [
    {"labels": ["green", "red"]},
    {"labels": ["green", "red"]},
    {"labels": ["red", "green"]},
    {"labels": "red", "templates": ["a {}", "one {}"]},
]


def embed(client, *texts: str) -> list[list[float]]:
    return client.post("/v1/embed", json={"inputs": [{"text": text} for text in texts]}).json()["embeddings"]


def test_sentences_are_embedded_once(settings, serve, picture):
    with serve(settings()) as client:
        hit = 'calmclip_text_cache_total{model="colours-int8",outcome="hit"}'
        miss = 'calmclip_text_cache_total{model="colours-int8",outcome="miss"}'
        assert embed(client, "red", "blue") == [[1, 0, 0], [0, 0, 1]]
        assert (metric(client, hit), metric(client, miss)) == (0, 2)
        # two known ones around a new, longer one: their order and rows hold
        assert embed(client, "blue", "a photo of a green thing", "red") == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
        assert (metric(client, hit), metric(client, miss)) == (2, 3)
        # classify shares it: its prompt for "green thing" is the very sentence
        send = raw(picture("green"))
        answer = client.post("/v1/classify", params={"labels": "green thing"}, **send)
        assert answer.status_code == 200
        assert (metric(client, hit), metric(client, miss)) == (3, 3)
        assert "infer" in answer.headers["server-timing"]  # the picture's
        assert client.post("/v1/detect", params={"labels": "green thing"}, **send).status_code == 200
        assert (metric(client, hit), metric(client, miss)) == (4, 3)  # and so does detect


def test_known_sentences_do_not_go_by_the_event_loop(settings, serve, picture, monkeypatch):
    steps = []
    advance = Engine._advance
    monkeypatch.setattr(Engine, "_advance", lambda *given: steps.append(1) or advance(*given))
    with serve(settings()) as client:
        answers = []
        for _ in range(2):
            answers.append(client.post("/v1/classify?labels=red", **raw(picture("green"))).json())
            steps.append(0)
    # to the text's call, to the end; then the text is known
    assert steps == [1, 1, 0, 1, 0]
    assert answers[0] == answers[1]


def test_alone_a_request_runs_its_graph_itself_and_in_company_by_the_queue(settings, serve, picture, monkeypatch):
    queued = []
    run = Batcher.run
    monkeypatch.setattr(Batcher, "run", lambda self, *a, **how: queued.append(self.name) or run(self, *a, **how))
    send = {**raw(picture("green")), "params": {"labels": "red"}}
    batches = 'calmclip_batch_size_count{graph="image",model="colours-int8"}'
    infers = 'calmclip_stage_duration_seconds_count{graph="image",model="colours-int8",stage="infer",task="classify"}'
    with serve(settings()) as client:
        client.post("/v1/classify", **send)  # the text is known from now on
        queued.clear()
        alone = client.post("/v1/classify", **send)
        assert not queued
        with monkeypatch.context() as others:
            others.setattr(Admission, "pending", 2)
            company = client.post("/v1/classify", **send)
        assert [name.rpartition(".")[2] for name in queued] == ["image"]
        assert alone.json() == company.json()
        assert metric(client, batches) == metric(client, infers) == 3
    for answer in (alone, company):
        assert {"queue", "infer"} <= {one.partition(";")[0] for one in answer.headers["server-timing"].split(", ")}


@pytest.mark.parametrize("left", [{"deadline_s": 0.0}, {"deadline_s": 9.0, "status": 499}])
def test_what_nobody_waits_for_any_more_is_not_run(settings, left):
    engine = Engine(settings(), None)
    own = Context("r", **left)
    assert engine._here(own, None, Call("image", {})) is None  # no bundle, so a run would fail
    engine.close()


def test_without_a_cache_answers_are_the_same(settings, serve):
    with serve(settings(text_cache=0)) as client:
        for _ in range(2):
            assert embed(client, "red", "blue") == [[1, 0, 0], [0, 0, 1]]
        assert metric(client, 'calmclip_text_cache_total{model="colours-int8",outcome="miss"}') == 4


def test_many_texts_go_in_pieces(settings, serve):
    colours = ["red", "green", "blue"]
    texts = [f"{'photo ' * (i % 7)}{colours[i % 3]}" for i in range(100)]
    with serve(settings(batch={"max_size": 8})) as client:
        assert embed(client, *texts) == [np.eye(3)[i % 3].tolist() for i in range(100)]


def test_labels_seen_before_are_not_made_again(settings, serve, picture, monkeypatch):
    made = []
    monkeypatch.setattr(features, "unit", lambda rows, unit=features.unit: made.append(len(rows)) or unit(rows))
    with serve(settings()) as client:
        made.clear()  # of what it warmed up with
        answers = [client.post("/v1/classify", params=one, **raw(picture("green"))).json() for one in LABELLED]
        counted = [metric(client, f'{CACHE}{{model="colours-int8",outcome="{one}"}}') for one in ("hit", "miss")]
    # two sentences to two labels; the same again; the other way round, of known sentences; one label of two templates
    assert made == [2, 2, 2, 2, 2, 1]
    assert answers[0] == answers[1]
    assert [one["label"] for one in answers[2]["labels"]] == ["green", "red"]
    assert answers[2]["labels"][0]["index"] == 1
    assert counted == [4, 4]
