"""Many pictures in one request. The oracles are a single request for the same picture, and answers known by hand: the
vector of a picture is its mean colour (tests/service/conftest.py)."""

import asyncio
import json
import logging
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest

import calmclip.service.hub
from calmclip.models.flow import Work
from calmclip.service.asked import Asked
from calmclip.service.client import AsyncClient, Calls, Client, DeadlineExceeded, Rejected
from calmclip.service.engine import Engine
from calmclip.service.metrics import Metrics
from calmclip.service.request import Context
from tests.asking import b64, metric, until
from tests.otlp import collecting
from tests.otlp import told as attributes

LINES = {"accept": "application/x-ndjson"}
SHOWN = ("red", "green", "blue", "yellow")
LABELS = ["red", "green", "blue"]
BROKEN = b64(b"no picture")


@pytest.fixture
def graphs(monkeypatch):
    """``graphs.rows``: rows that each graph has run for requests. After ``graphs.free`` runs of a graph with pixels,
    the next waits for ``graphs.go``."""
    seen = SimpleNamespace(rows=Counter(), runs=0, free=math.inf, go=threading.Event())

    class Counting(calmclip.service.hub.Session):
        def run(self, feeds):
            if threading.current_thread().name.startswith(("infer", "step")):  # no warm-up
                (kind,) = {"pixels", "ids", "boxes"} & {*feeds}
                seen.rows[kind] += len(feeds[kind])
                seen.runs += kind == "pixels"
                if kind == "pixels" and seen.runs > seen.free:
                    assert seen.go.wait(20)
            return super().run(feeds)

    monkeypatch.setattr(calmclip.service.hub, "Session", Counting)
    yield seen
    seen.go.set()


@pytest.fixture
def shown(picture):
    return [b64(picture(colour)) for colour in SHOWN]


def lines(answer: httpx.Response) -> list[dict]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def by_index(results: list[dict]) -> list[dict]:
    return sorted(results, key=lambda result: result["index"])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("classify", {"labels": LABELS, "top_k": 2}),
        ("classify", {"labels": LABELS, "attributes": {"place": ["blue", "yellow"]}, "tau": 2}),
        ("classify", {"labels": LABELS, "descriptions": {label: [label] for label in LABELS}, "alpha": 0.5}),
        ("detect", {"labels": LABELS, "min_score": 0.5}),
        ("detect", {"labels": ["red"], "grid": {}}),
        ("tag", {"words": ["red", "green", "thing"]}),
    ],
)
def test_each_picture_has_the_answer_of_a_single_request(client, shown, path, fields):
    want = [client.post(f"/v1/{path}", json={"image": image, **fields}) for image in shown]
    assert {answer.status_code for answer in want} == {200}, want[0].text
    expected = [{"index": index, "answer": answer.json()} for index, answer in enumerate(want)]
    answer = client.post(f"/v1/{path}", json={"images": shown, **fields})
    assert answer.json() == {"model": "colours-int8", "results": expected}
    assert by_index(lines(client.post(f"/v1/{path}", json={"images": shown, **fields}, headers=LINES))) == expected


def test_answers_known_by_hand(client, shown, picture):
    answer = client.post("/v1/classify", json={"images": shown[:3], "labels": LABELS, "top_k": 1}).json()
    assert [result["answer"]["labels"][0]["label"] for result in answer["results"]] == LABELS
    inputs = [{"text": "blue"}, {"image": shown[3]}, {"image": shown[0], "boxes": [[0, 0, 9, 9], [9, 9, 20, 20]]}]
    answer = client.post("/v1/embed", json={"inputs": inputs, "partial": True}).json()
    half = pytest.approx(math.sqrt(0.5), abs=1e-6)
    vectors = [[[0, 0, 1]], [[half, half, 0]], [[1, 0, 0], [1, 0, 0]]]
    assert [result["answer"]["embeddings"] for result in answer["results"]] == vectors
    files = [("image", picture(colour)) for colour in SHOWN]
    form = client.post("/v1/classify", files=files, data={"labels": LABELS, "top_k": 1}).json()
    assert [result["answer"]["labels"][0]["label"] for result in form["results"][:3]] == LABELS
    single = client.post("/v1/classify", files=files[:1], data={"labels": LABELS, "top_k": 1}).json()
    assert single["labels"][0]["label"] == "red"
    (line,) = lines(
        client.post("/v1/classify?labels=red", content=picture("red"), headers={"content-type": "image/png", **LINES})
    )
    assert line == {
        "index": 0,
        "answer": client.post("/v1/classify", json={"image": shown[0], "labels": ["red"]}).json(),
    }


def test_a_broken_picture_has_its_own_problem_and_spoils_no_other(client, shown, picture):
    broken = [BROKEN, {"b64": "?"}, 5, {"url": "https://x.example.org/a.png"}, b64(picture("red")[:-40])]
    given = [broken[0], shown[0], *broken[1:], shown[1]]
    body = {"images": given, "labels": LABELS, "top_k": 1}
    before = metric(client, 'calmclip_pictures_rejected_total{reason="unsupported-image"}')
    for answer in (client.post("/v1/classify", json=body), client.post("/v1/classify", json=body, headers=LINES)):
        assert answer.status_code == 200
        results = by_index(lines(answer) if "ndjson" in answer.headers["content-type"] else answer.json()["results"])
        assert [result["index"] for result in results] == list(range(len(given)))
        assert [r["answer"]["labels"][0]["label"] for r in results if "answer" in r] == ["red", "green"]
        statuses = [r["problem"]["status"] for r in results if "problem" in r]
        assert statuses == [415, 422, 422, 422, 415]
        assert "base64" in results[2]["problem"]["detail"]
    assert metric(client, 'calmclip_pictures_rejected_total{reason="unsupported-image"}') == before + 4
    inputs = {"inputs": [{"image": BROKEN}, {"text": "red"}, {"text": "red " * 50}]}
    results = client.post("/v1/embed", json={**inputs, "partial": True}).json()["results"]
    assert [result.get("problem", {}).get("type") for result in results] == [
        "/problems/unsupported-image", None, "/problems/text-too-long",
    ]  # fmt: skip
    assert client.post("/v1/embed", json=inputs).status_code == 415


def test_an_endpoint_without_many_pictures_has_no_such_field(client, shown):
    for path in ("segment", "anomaly", "enhance", "explain"):
        answer = client.post(f"/v1/{path}", json={"images": shown})
        assert (answer.status_code, "images" in answer.text) == (422, True)


@pytest.mark.parametrize("headers", [{}, LINES])
def test_without_an_answer_it_is_the_problem_of_the_first(client, headers):
    body = {"images": [{"b64": "?"}, BROKEN], "labels": LABELS}
    answer = client.post("/v1/classify", json=body, headers=headers)
    document = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert document["type"] == "/problems/invalid-request"
    assert [result["problem"]["status"] for result in document["results"]] == [422, 415]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"image": BROKEN}, "expected `image`, for one picture, or `images`, for a list"),
        ({"images": None}, "expected `image`, for one picture, or `images`, for a list"),
        ({"images": []}, "images"),
        ({"images": [BROKEN] * 5}, "5 pictures were given; at most 4 are read at once"),
        ({"labels": [" "]}, "is empty"),
    ],
)
def test_a_fault_of_the_request_is_one_problem_for_all(settings, serve, shown, changed, says):
    with serve(settings(limits={"pictures": 4})) as client:
        answer = client.post("/v1/classify", json={"images": shown, "labels": LABELS, **changed})
        assert (answer.status_code, "results" in answer.json()) == (422, False)
        assert says in answer.json()["detail"]


@pytest.mark.parametrize("size", [0, 16384])
def test_labels_and_examples_are_embedded_once_for_all_pictures(settings, serve, graphs, shown, size):
    """Also without a cache."""
    with serve(settings(text_cache=size)) as client:
        assert client.post("/v1/classify", json={"images": shown, "labels": LABELS}).status_code == 200
        assert graphs.rows == {"ids": len(LABELS), "pixels": len(shown)}
        graphs.rows.clear()
        body = {"images": shown, "labels": ["white"], "examples": [{"image": shown[0]}, {"image": shown[1]}]}
        assert client.post("/v1/detect", json=body).status_code == 200
        assert (graphs.rows["ids"], graphs.rows["pixels"]) == (1, len(shown) + 2)
        graphs.rows.clear()
        assert client.post("/v1/classify", json={"images": [BROKEN], "labels": ["yellow"]}).status_code == 415
        assert not graphs.rows  # nothing is embedded for broken pictures alone


def test_calls_of_the_pictures_are_merged(settings, serve, graphs, shown):
    """While the second run is held up, all other calls arrive; then they run as one."""
    graphs.free = 1
    depth = 'calmclip_queue_depth{graph="image",model="colours-int8"}'
    with serve(settings(batch={"max_size": 16})) as client, ThreadPoolExecutor(1) as pool:
        body = {"images": shown * 3, "labels": LABELS}
        answer = pool.submit(client.post, "/v1/classify", json=body)
        until(lambda: graphs.rows["pixels"] + metric(client, depth) == 12)
        graphs.go.set()
        assert answer.result().status_code == 200
        assert graphs.rows["pixels"] == 12
        assert graphs.runs <= 3


@pytest.mark.parametrize("headers", [{}, LINES])
def test_a_deadline_half_way_leaves_what_is_done(settings, serve, graphs, shown, headers, caplog):
    graphs.free = 1
    with serve(settings(deadline_ms=2500, batch={"max_size": 1})) as client:
        answer = client.post("/v1/classify", json={"images": shown, "labels": LABELS}, headers=headers)
        assert answer.status_code == 200
        results = lines(answer) if headers else answer.json()["results"]
        assert sorted(result["index"] for result in results) == [0, 1, 2, 3]
        (done,) = [result for result in results if "answer" in result]
        late = [result["problem"] for result in results if "problem" in result]
        assert [(problem["status"], problem["type"]) for problem in late] == [(504, "/problems/deadline-exceeded")] * 3
        assert done["answer"]["labels"][0]["label"] == (*LABELS, "red")[done["index"]]
        if headers:
            assert results[0] is done
        ok = 'calmclip_requests_total{model="colours-int8",outcome="ok",task="classify"}'
        assert metric(client, ok) == 1
        graphs.go.set()


def test_a_streamed_answer_is_measured_and_logged_to_its_end(settings, serve, shown, caplog, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with (
        collecting() as collector,
        serve(settings(otlp_endpoint=collector.url)) as client,
        caplog.at_level(logging.INFO, "calmclip.access"),
    ):
        answer = client.post("/v1/classify", json={"images": shown * 4, "labels": LABELS}, headers=LINES)
        assert len(lines(answer)) == 16
        assert "content-encoding" not in answer.headers
        timing = dict(entry.split(";dur=") for entry in answer.headers["server-timing"].split(", "))
        assert {"read", "decode", "preprocess", "infer", "total"} <= timing.keys()
        text = client.get("/metrics").text
    (fields,) = [record.fields for record in caplog.records if getattr(record, "fields", {}).get("task") == "classify"]
    assert (fields["status"], fields["problem"]) == (200, "")
    assert {"read", "decode", "preprocess", "queue", "infer", "postprocess", "serialize"} <= fields["stages_ms"].keys()
    assert sum(fields["stages_ms"].values()) <= fields["ms"] * 1.01 + 1
    assert fields["ms"] >= float(timing["total"])
    assert (
        'calmclip_stage_duration_seconds_count{graph="image",model="colours-int8",stage="infer",task="classify"}'
        in text
    )
    assert "calmclip_picture_pixels_count 16.0" in text
    (span,) = collector.server_spans().values()
    assert attributes(span)["http.response.status_code"] == 200
    children = [each for each in collector.spans if each.parent_span_id == span.span_id]
    assert {"decode", "infer", "serialize"} <= {each.name for each in children}
    assert all(each.end_time_unix_nano <= span.end_time_unix_nano + 1e6 for each in children)


def test_a_client_that_leaves_ends_a_stream(settings, serve, graphs, shown, caplog):
    graphs.free = 1
    with serve(settings(batch={"max_size": 1})) as client, caplog.at_level(logging.INFO, "calmclip.access"):
        body = {"images": shown * 5, "labels": LABELS}
        plain = httpx.Client(base_url=client.base_url, timeout=20, trust_env=False)
        with plain, plain.stream("POST", "/v1/classify", json=body, headers=LINES) as answer:
            rows = answer.iter_lines()
            assert "answer" in json.loads(next(rows))
            assert metric(client, "calmclip_requests_pending") == 1
            assert metric(client, "calmclip_pending_pixels") == 2 * 64 * 48  # those in memory at once, of 20
        cancelled = 'calmclip_requests_total{model="colours-int8",outcome="cancelled",task="classify"}'
        until(lambda: metric(client, cancelled) == 1)
        for held in ("requests_pending", "pending_bytes", "pending_pixels"):
            assert metric(client, f"calmclip_{held}") == 0
        graphs.go.set()
        depth = 'calmclip_queue_depth{graph="image",model="colours-int8"}'
        until(lambda: metric(client, depth) == 0)
        assert client.post("/v1/classify", json={"image": shown[0], "labels": LABELS}).status_code == 200
        assert graphs.runs == 3  # the first, that which ran as the client left, and the last
    assert 499 in [record.fields["status"] for record in caplog.records if getattr(record, "fields", None)]


def test_no_picture_begins_while_the_client_takes_no_line(settings):
    """Otherwise a slow client would fill the memory with answers."""
    begun, taken = [], []

    def flow(index):
        yield Work("decode", lambda: begun.append(index))
        return index

    async def watch() -> None:
        engine = Engine(settings(), Metrics(settings().slo))
        go = asyncio.Event()

        async def give(index: int, outcome: object, part: Context) -> None:
            await go.wait()
            taken.append((index, outcome))

        loaded = SimpleNamespace(lease=nullcontext, batchers={}, digest="", name="")
        running = asyncio.create_task(engine.each(loaded, [flow(i) for i in range(40)], Context("x", 20.0), give))
        while len(begun) < engine.at_once:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert len(begun) == engine.at_once == 16
        go.set()
        await running
        engine.close()

    asyncio.run(watch())
    assert sorted(taken) == [(i, i) for i in range(40)]


def test_a_full_queue_makes_the_pictures_wait(settings, serve, graphs, shown):
    """Four requests with two pictures at a time each, and four places: three calls wait for a place."""
    graphs.free = 0
    depth = 'calmclip_queue_depth{graph="image",model="colours-int8"}'
    with serve(settings(queue={"max_pending": 4}, batch={"max_size": 1})) as client, ThreadPoolExecutor(4) as pool:
        body = {"images": shown, "labels": LABELS}
        answers = [pool.submit(client.post, "/v1/classify", json=body) for _ in range(4)]
        until(lambda: metric(client, depth) == 4)
        graphs.go.set()
        results = [result for answer in answers for result in answer.result().json()["results"]]
        assert ["answer" in result for result in results] == [True] * 16


def test_pixels_are_admitted_for_the_pictures_that_are_in_memory_at_once(settings, serve, graphs, shown):
    graphs.free = 0
    area = 64 * 48
    limits = {"queue": {"max_pixels": 3 * area}, "batch": {"max_size": 1}}
    with serve(settings(**limits)) as client, ThreadPoolExecutor(1) as pool:
        body = {"images": shown, "labels": LABELS}
        first = pool.submit(client.post, "/v1/classify", json=body)
        until(lambda: metric(client, "calmclip_pending_pixels") == 2 * area)
        refused = client.post("/v1/classify", json=body)
        assert (refused.status_code, refused.json()["type"]) == (503, "/problems/overloaded")
        assert "results" not in refused.json()
        graphs.go.set()
        assert first.result().status_code == 200
        assert client.post("/v1/classify", json=body).status_code == 200


def test_a_tasks_throughput_counts_pictures(settings, serve, graphs, shown):
    graphs.free = 0
    pending = 'calmclip_task_requests_pending{task="classify"}'
    with serve(settings()) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/classify", json={"images": shown, "labels": LABELS})
        until(lambda: metric(client, pending) == 4)
        assert metric(client, "calmclip_requests_pending") == 1
        graphs.go.set()
        assert first.result().status_code == 200
        assert metric(client, pending) == 0


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("application/x-ndjson", True),
        ("application/json, application/x-ndjson", True),
        ("application/x-ndjson;q=0.5, */*;q=0.1", True),
        ("application/json, application/x-ndjson;q=0.9", False),
        ("application/x-ndjson;q=0", False),
        ("application/x-ndjson;q=nan", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_lines_are_for_clients_that_ask_for_them(accept, wanted):
    asked = SimpleNamespace(request=SimpleNamespace(headers={"accept": accept}))
    assert Asked.streams.fget(asked) is wanted


def test_both_clients(client, shown, picture):
    pictures = [picture("red"), b"no picture", picture("blue")]

    def told(results):
        return [(r.index, r.answer and r.answer.labels[0].label, r.problem and r.problem.status) for r in results]

    want = [(0, "red", None), (1, None, 415), (2, "blue", None)]
    call = Calls.classify_many(pictures, LABELS, top_k=1)
    with Client(str(client.base_url)) as sync:
        results = sync.classify_many(pictures, LABELS, top_k=1)
        assert told(results) == want
        assert results[0].get() == results[0].answer
        with pytest.raises(Rejected, match="no picture"):
            results[1].get()
        assert told(sorted(sync.lines(call), key=lambda r: r.index)) == want
        assert told(sync.lines(Calls.classify_many(pictures[1:2], LABELS))) == [(0, None, 415)]
        assert told(sync.classify_many(pictures[1:2], LABELS)) == [(0, None, 415)]
        boxes = sync.detect_many(pictures[:1], LABELS)[0].get().detections
        assert {each.label for each in boxes} == {"red"}
        assert sync.tag_many(pictures[:1], LABELS)[0].get().tags[0].word == "red"
        vectors = sync.embed_many(texts=["red"], images=pictures[1:])
        assert [r.answer and r.answer.embeddings for r in vectors] == [[[1, 0, 0]], None, [[0, 0, 1]]]
        with pytest.raises(Rejected, match="top_k"):
            list(sync.lines(Calls.classify_many(pictures, LABELS, top_k=0)))

    async def other():
        async with AsyncClient(str(client.base_url)) as waiting:
            return [result async for result in waiting.lines(call)], await waiting.classify_many(pictures, LABELS)

    streamed, whole = asyncio.run(other())
    assert told(sorted(streamed, key=lambda r: r.index)) == told(whole) == want


def test_a_late_picture_is_a_problem_of_the_client(client):
    row = {"index": 0, "problem": {"status": 504, "type": "/problems/deadline-exceeded"}}
    (result,) = Calls.classify_many([b""]).read({"results": [row]})
    assert isinstance(result.problem, DeadlineExceeded)
