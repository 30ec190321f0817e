"""The text cache: a text is embedded once, and rows of different texts are never confused."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from calmclip.models.flow import Call
from calmclip.models.runtime.session import Session
from calmclip.models.tasks import features
from calmclip.service.admission import Admission
from calmclip.service.batching import Batcher
from calmclip.service.engine import Engine
from calmclip.service.request import Context
from tests.asking import b64, metric, raw

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
        # two cached texts around a new, longer text: order and rows stay
        assert embed(client, "blue", "a photo of a green thing", "red") == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
        assert (metric(client, hit), metric(client, miss)) == (2, 3)
        # classify uses the same cache: its prompt for "green thing" is this sentence
        send = raw(picture("green"))
        answer = client.post("/v1/classify", params={"labels": "green thing"}, **send)
        assert answer.status_code == 200
        assert (metric(client, hit), metric(client, miss)) == (3, 3)
        assert "infer" in answer.headers["server-timing"]  # the picture's
        assert client.post("/v1/detect", params={"labels": "green thing"}, **send).status_code == 200
        assert (metric(client, hit), metric(client, miss)) == (4, 3)  # detect uses it too


def test_cached_sentences_take_no_step_of_the_event_loop(settings, serve, picture, monkeypatch):
    steps = []
    advance = Engine._advance
    monkeypatch.setattr(Engine, "_advance", lambda *args: steps.append(1) or advance(*args))
    with serve(settings()) as client:
        answers = []
        for _ in range(2):
            answers.append(client.post("/v1/classify?labels=red", **raw(picture("green"))).json())
            steps.append(0)
    # step 1: up to the call of the text graph; step 2: the remaining steps. Then the text is cached
    assert steps == [1, 1, 0, 1, 0]
    assert answers[0] == answers[1]


def test_only_concurrent_requests_use_the_queue(settings, serve, picture, monkeypatch):
    queued = []
    run = Batcher.run
    monkeypatch.setattr(Batcher, "run", lambda self, *a, **how: queued.append(self.name) or run(self, *a, **how))
    send = {**raw(picture("green")), "params": {"labels": "red"}}
    batches = 'calmclip_batch_size_count{graph="image",model="colours-int8"}'
    infers = 'calmclip_stage_duration_seconds_count{graph="image",model="colours-int8",stage="infer",task="classify"}'
    with serve(settings()) as client:
        client.post("/v1/classify", **send)  # the text is cached from now on
        queued.clear()
        alone = client.post("/v1/classify", **send)
        assert not queued
        with monkeypatch.context() as others:
            others.setattr(Admission, "pending", 2)
            concurrent = client.post("/v1/classify", **send)
        assert [name.rpartition(".")[2] for name in queued] == ["image"]
        assert alone.json() == concurrent.json()
        assert metric(client, batches) == metric(client, infers) == 3
    for answer in (alone, concurrent):
        assert {"queue", "infer"} <= {entry.partition(";")[0] for entry in answer.headers["server-timing"].split(", ")}


@pytest.mark.parametrize("state", [{"deadline_s": 0.0}, {"deadline_s": 9.0, "status": 499}])
def test_a_call_without_a_waiting_client_is_not_run(settings, state):
    engine = Engine(settings(), None)
    context = Context("r", **state)
    assert engine._run_here(context, None, Call("image", {})) is None  # no bundle, so a run would fail
    engine.close()


def pictures(picture, *colours: str) -> dict[str, list[dict[str, object]]]:
    return {"inputs": [{"image": b64(picture(colour))} for colour in colours]}


def test_pictures_of_one_request_share_runs(settings, serve, picture, monkeypatch):
    """40 pictures, and a graph that takes 5 ms: while it runs, others are decoded and wait, at most 8 for one run."""
    sizes, run = [], Session.run

    def slow(self, feeds):
        sizes.append(len(feeds["pixels"]))
        time.sleep(0.005)
        return run(self, feeds)

    with serve(settings(batch={"max_size": 8})) as client:
        monkeypatch.setattr(Session, "run", slow)
        colours = [["red", "green", "blue"][i % 3] for i in range(40)]
        answer = client.post("/v1/embed", json=pictures(picture, *colours))
    assert answer.json()["embeddings"] == [np.eye(3)[i % 3].tolist() for i in range(40)]
    assert (sum(sizes), max(sizes) <= 8, len(sizes) < 20) == (40, True, True)
    stages = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"])}
    total = stages.pop("total")
    assert min(total, 5 * len(sizes)) <= sum(stages.values()) <= total + 1


def test_a_broken_picture_among_others_ends_its_request_alone(settings, serve, picture):
    with serve(settings()) as client:
        body, whole = pictures(picture, *["red"] * 9), picture("blue")
        body["inputs"][5] = {"image": b64(whole[: len(whole) // 2])}
        answer = client.post("/v1/embed", json=body)
        assert (answer.status_code, answer.json()["type"]) == (415, "/problems/unsupported-image")
        assert client.post("/v1/embed", json=pictures(picture, "red")).json()["embeddings"] == [[1, 0, 0]]


def test_a_late_request_starts_no_further_picture(settings, serve, picture, monkeypatch):
    runs, run = [], Session.run

    def slow(self, feeds):
        runs.append(len(feeds["pixels"]))
        time.sleep(0.1)
        return run(self, feeds)

    with serve(settings(batch={"max_size": 2})) as client:
        monkeypatch.setattr(Session, "run", slow)
        late = {"X-Request-Deadline-Ms": "250"}
        answer = client.post("/v1/embed", json=pictures(picture, *["red"] * 60), headers=late)
        assert (answer.status_code, answer.json()["type"]) == (504, "/problems/deadline-exceeded")
    assert sum(runs) < 20  # the service has ended


def test_times_of_parts_add_up_to_the_time_of_the_request():
    """Two parts ran beside each other for 1 s: .6 s and .2 s of work, and waits of .4 s and .8 s."""
    context = Context("r", 60.0)
    now = time.perf_counter()
    parts = [context.part(), context.part()]
    for part, worked, waited in zip(parts, (0.6, 0.2), (0.4, 0.8), strict=True):
        assert part.left_s == pytest.approx(context.left_s, abs=0.01)
        part.clock.add("decode", worked / 4)
        part.spent("infer", "image", worked * 3 / 4, now)
        part.spent("queue", "image", waited, now)
    context.join(parts, now - 1)
    assert context.clock.stages == pytest.approx({"decode": 0.2, "infer": 0.6, "queue": 0.2}, abs=0.01)
    assert context.graphs == pytest.approx({("infer", "image"): 0.6, ("queue", "image"): 0.2}, abs=0.01)
    late = Context("r", 60.0)
    late.join(parts, time.perf_counter() - 0.4)  # .8 s of work by two threads in .4 s, and no wait
    assert late.clock.stages == pytest.approx({"decode": 0.1, "infer": 0.3, "queue": 0.0}, abs=0.01)


def test_without_a_cache_answers_are_the_same(settings, serve):
    with serve(settings(text_cache=0)) as client:
        for _ in range(2):
            assert embed(client, "red", "blue") == [[1, 0, 0], [0, 0, 1]]
        assert metric(client, 'calmclip_text_cache_total{model="colours-int8",outcome="miss"}') == 4


def test_many_texts_are_split_into_batches(settings, serve):
    colours = ["red", "green", "blue"]
    texts = [f"{'photo ' * (i % 7)}{colours[i % 3]}" for i in range(100)]
    with serve(settings(batch={"max_size": 8})) as client:
        assert embed(client, *texts) == [np.eye(3)[i % 3].tolist() for i in range(100)]


@pytest.fixture
def runs(monkeypatch):
    """The shapes of the ids of each run of a text graph."""
    shapes = []
    run = Session.run

    def noted(self, feeds):
        if "ids" in feeds:
            shapes.append(feeds["ids"].shape)
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", noted)
    return shapes


def test_a_long_text_pads_no_other_text_of_its_request(settings, serve, picture, runs):
    """60 texts of one word and one of 12 are 72 tokens; padded to one width they were 61 x 12 = 732."""
    long = "red " * 12
    texts = [f"red{' ' * i}" for i in range(30)] + [long] + [f"blue{' ' * i}" for i in range(30)]
    with serve(settings(batch={"max_size": 8})) as client:
        runs.clear()  # without the warm-up's
        assert embed(client, *texts) == [[1, 0, 0]] * 31 + [[0, 0, 1]] * 30
        assert runs == [(8, 1)] * 7 + [(4, 1), (1, 12)]
        runs.clear()
        assert embed(client, "green", long, "yellow")[0] == [0, 1, 0]  # the long text is cached
        assert runs == [(2, 1)]
        runs.clear()
        labels = ["red", *(f"green{' ' * i}" for i in range(19)), "blue " * 11]
        answer = client.post("/v1/classify", params={"labels": labels, "templates": "{}"}, **raw(picture("red")))
        assert answer.json()["labels"][0]["label"] == "red"
        assert runs == [(8, 1), (8, 1), (2, 1), (1, 11)]  # "red" and "green" are cached


def test_slices_of_several_requests_share_runs(settings, serve, runs):
    with serve(settings(batch={"max_size": 64, "max_wait_ms": 500})) as client, ThreadPoolExecutor(4) as pool:
        runs.clear()
        asks = [pool.submit(embed, client, *[f"red{' ' * (40 * i + j)}" for j in range(9)], f"{'a ' * 11}{i}")
                for i in range(4)]  # fmt: skip
        assert all(ask.result()[0] == [1, 0, 0] for ask in asks)
    assert sum(rows * width for rows, width in runs) == 4 * (9 + 12)
    assert len(runs) < 8  # two slices of each request, some of them merged


def test_a_late_request_runs_no_further_slice(settings, serve, monkeypatch):
    """Two slices; the first takes longer than the request has."""
    shapes, run = [], Session.run

    def slow(self, feeds):
        shapes.append(feeds["ids"].shape)
        time.sleep(0.4)
        return run(self, feeds)

    with serve(settings()) as client:
        monkeypatch.setattr(Session, "run", slow)
        body = {"inputs": [{"text": f"red{' ' * i}"} for i in range(8)] + [{"text": "red " * 12}]}
        answer = client.post("/v1/embed", json=body, headers={"X-Request-Deadline-Ms": "200"})
        assert answer.status_code == 504
    assert shapes == [(8, 1)]  # the service has ended


def test_cached_label_vectors_are_not_computed_again(settings, serve, picture, monkeypatch):
    counts = []
    monkeypatch.setattr(features, "unit", lambda rows, unit=features.unit: counts.append(len(rows)) or unit(rows))
    with serve(settings()) as client:
        counts.clear()  # without the warm-up's
        answers = [client.post("/v1/classify", params=params, **raw(picture("green"))).json() for params in LABELLED]
        counted = [metric(client, f'{CACHE}{{model="colours-int8",outcome="{kind}"}}') for kind in ("hit", "miss")]
    # two sentences, then two labels; the same request again; the labels in reverse order; one label, two templates
    assert counts == [2, 2, 2, 2, 2, 1]
    assert answers[0] == answers[1]
    assert [row["label"] for row in answers[2]["labels"]] == ["green", "red"]
    assert answers[2]["labels"][0]["index"] == 1
    assert counted == [4, 4]
