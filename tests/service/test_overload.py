"""Too many requests, missed deadlines, and clients that disconnect."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import calmclip.service.hub
from tests.asking import dial, metric, picture_head, raw, until


@pytest.fixture
def slow(monkeypatch):
    """Every run of the image graph for a request takes ``slow.seconds``; ``slow.runs`` counts them."""

    class Slow(calmclip.service.hub.Session):
        seconds = 0.0
        runs = 0
        running = threading.Event()

        def run(self, feeds):
            if "pixels" in feeds and threading.current_thread().name.startswith(("infer", "step")):  # no warm-up
                Slow.runs += 1
                Slow.running.set()
                time.sleep(Slow.seconds)
            return super().run(feeds)

    monkeypatch.setattr(calmclip.service.hub, "Session", Slow)
    return Slow


def ask(client, picture, **headers: str):
    return client.post("/v1/classify?labels=red", **raw(picture, **headers))


def test_a_hundred_at_once_are_answered_or_shed(settings, serve, slow, picture):
    slow.seconds = 0.02
    with serve(settings(queue={"max_pending": 4}, batch={"max_size": 1})) as client:
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda _: ask(client, picture("red")), range(100)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 503}
        for answer in answers:
            if answer.status_code == 503:
                assert answer.json()["type"] == "/problems/overloaded"
                assert int(answer.headers["retry-after"]) >= 1
        assert ask(client, picture("red")).status_code == 200
        assert metric(client, 'calmclip_rejected_total{reason="overloaded"}') == statuses.count(503)
        assert metric(client, "calmclip_requests_pending") == 0


def test_a_full_service_refuses_a_request_before_it_reads_the_body(settings, serve, slow, picture):
    slow.seconds = 0.5
    with serve(settings(queue={"max_pending": 1})) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, picture("red"))
        assert slow.running.wait(5)
        with dial(client, picture_head(5_000_000)) as connection:
            assert b" 503 " in connection.recv(4096)
        for route, body in (("classifiers", {"labels": ["red"]}), ("collections", {})):
            answer = client.put(f"/v1/{route}/x", json=body)
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/overloaded")
        assert not waiting.done()
        assert waiting.result().status_code == 200


def test_slow_bodies_do_not_lower_the_throughput(settings, serve, picture):
    """Else two such clients would shed all other requests: the wait behind them would seem too long."""
    with serve(settings(deadline_ms=3000)) as client:
        assert ask(client, picture("red")).status_code == 200
        with dial(client, picture_head(5000)):
            until(lambda: metric(client, "calmclip_requests_pending") == 1)
            time.sleep(2)
            assert ask(client, picture("red")).status_code == 200


def test_a_missed_deadline_is_504_and_waiting_calls_are_dropped(settings, serve, slow, picture):
    slow.seconds = 0.4
    with serve(settings(deadline_ms=150, batch={"max_size": 1})) as client:
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: ask(client, picture("red")), range(2)))
        assert [answer.status_code for answer in answers] == [504, 504]
        assert answers[0].json()["type"] == "/problems/deadline-exceeded"
        assert "150 ms" in answers[0].json()["detail"]
        time.sleep(0.5)
        assert slow.runs == 1  # the second call was in the queue, and its client had its answer
        slow.seconds = 0
        assert ask(client, picture("red")).status_code == 200
        assert metric(client, 'calmclip_requests_total{model="colours-int8",outcome="deadline",task="classify"}') == 2


def test_a_disconnect_releases_the_reservation_and_drops_the_work(settings, serve, slow, picture):
    slow.seconds = 0.3
    with serve(settings(batch={"max_size": 1})) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, picture("red"))
        assert slow.running.wait(5)
        body = picture("blue")
        with dial(client, picture_head(len(body)) + body):
            until(lambda: metric(client, "calmclip_pending_pixels") == 2 * 64 * 48)
            assert metric(client, "calmclip_requests_pending") == 2
            assert metric(client, "calmclip_pending_bytes") == len(body) + len(picture("red"))
        assert first.result().status_code == 200
        cancelled = 'calmclip_requests_total{model="colours-int8",outcome="cancelled",task="classify"}'
        until(lambda: metric(client, cancelled) == 1)
        for held in ("requests_pending", "pending_bytes", "pending_pixels"):
            assert metric(client, f"calmclip_{held}") == 0
        time.sleep(0.05)
        assert slow.runs == 1


def test_calls_of_many_clients_are_merged_and_each_gets_its_answer(settings, serve, slow, picture):
    slow.seconds = 0.05
    colours = ["red", "green", "blue"] * 5
    with serve(settings(batch={"max_size": 8, "max_wait_ms": 50})) as client:

        def best(colour: str) -> str:
            answer = client.post("/v1/classify?labels=red&labels=green&labels=blue", **raw(picture(colour)))
            return answer.json()["labels"][0]["label"]

        with ThreadPoolExecutor(15) as pool:
            assert list(pool.map(best, colours)) == colours
        assert slow.runs < len(colours)


@pytest.mark.parametrize("header", ["", "0", "-1", "soon", "nan", "inf", "1e3", "1,5", "0.0"])
def test_an_invalid_deadline_is_400(client, picture, header):
    answer = ask(client, picture("red"), **{"x-request-deadline-ms": header})
    assert (answer.status_code, answer.json()["type"]) == (400, "/problems/invalid-header")
    assert f"X-Request-Deadline-Ms is {header!r}; expected" in answer.json()["detail"]
    assert client.get("/v1/models", headers=[("x-request-deadline-ms", "100")] * 2).status_code == 400


@pytest.mark.parametrize(("service", "header", "detail"), [(10_000, "150.5", "150 ms"), (150, "9999", "150 ms")])
def test_the_shorter_deadline_applies(settings, serve, slow, picture, service, header, detail):
    slow.seconds = 0.4
    with serve(settings(deadline_ms=service)) as client:
        answer = ask(client, picture("red"), **{"x-request-deadline-ms": header})
        assert (answer.status_code, answer.json()["type"]) == (504, "/problems/deadline-exceeded")
        assert detail in answer.json()["detail"]


def test_a_computed_answer_past_its_deadline_is_504(client):
    assert client.get("/v1/models", headers={"x-request-deadline-ms": "0.000001"}).status_code == 504


def test_too_many_pixels_or_bytes_at_once_are_shed(settings, serve, slow, picture):
    small = {"max_pixels": 64 * 48 + 1, "max_bytes": 100_000}
    slow.seconds = 0.5
    with serve(settings(queue=small)) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, picture("red"))
        assert slow.running.wait(5)
        pixels = ask(client, picture("blue"))
        assert (pixels.status_code, "3072 pixels" in pixels.json()["detail"]) == (503, True)
        chunked = client.post("/v1/embed", **raw(iter([b"x" * 200_000])))
        assert (chunked.status_code, "bytes" in chunked.json()["detail"]) == (503, True)
        with dial(client, picture_head(100_000)) as connection:
            assert b" 503 " in connection.recv(4096)
        assert not waiting.done()
        assert waiting.result().status_code == 200
        for reason, count in (("pixels", 1), ("bytes", 2), ("requests", 0)):
            assert metric(client, f'calmclip_shed_duration_seconds_count{{reason="{reason}"}}') == count
        assert metric(client, "calmclip_picture_pixels_sum") == 2 * 64 * 48


def test_runs_have_a_release_reason(settings, serve, picture):
    with serve(settings()) as client:
        assert ask(client, picture("red")).status_code == 200
        run = 'calmclip_batch_releases_total{graph="image",model="colours-int8",reason="%s"}'
        assert [metric(client, run % reason) for reason in ("idle", "full", "timeout", "drain")] == [1, 0, 0, 0]
