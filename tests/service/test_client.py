"""Both clients against a real service, held against `Runner` on the same bundle; refusals against a scripted server."""

import asyncio
import inspect
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import calmclip.service.client
import calmclip.service.hub
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks import detect
from calmclip.service.client import (
    AsyncClient,
    Calls,
    Classifier,
    Client,
    ClientError,
    Collection,
    Conflict,
    Count,
    DeadlineExceeded,
    Example,
    Failed,
    Forbidden,
    Hit,
    Item,
    NotFound,
    Overloaded,
    Page,
    Problem,
    Ready,
    Rejected,
    StoredItem,
    Suppression,
    Unauthorized,
    Unreachable,
    Unreadable,
)
from calmclip.service.endpoints import registered
from tests.asking import until

Ask = Callable[..., Any]


async def _awaited(url: str, options: dict[str, Any], name: str, *args: Any, **kwargs: Any) -> Any:
    async with AsyncClient(url, **options) as client:
        if name == "items":
            return [one async for one in client.items(*args, **kwargs)]
        return await getattr(client, name)(*args, **kwargs)


def _called(url: str, options: dict[str, Any], name: str, *args: Any, **kwargs: Any) -> Any:
    with Client(url, **options) as client:
        found = getattr(client, name)(*args, **kwargs)
        return list(found) if name == "items" else found


@pytest.fixture(params=["sync", "async"])
def asking(request: pytest.FixtureRequest) -> Callable[..., Ask]:
    """(url, options of the client) -> ask(method, arguments), in the one world or the other."""

    def bind(url: object, **options: Any) -> Ask:
        if request.param == "sync":
            return lambda *args, **kwargs: _called(str(url), options, *args, **kwargs)
        return lambda *args, **kwargs: asyncio.run(_awaited(str(url), options, *args, **kwargs))

    return bind


@pytest.fixture
def ask(client, asking) -> Ask:
    return asking(client.base_url)


@pytest.fixture(scope="module")
def runner(bundles) -> Runner:
    return open_bundle(bundles / "colours-int8")


def test_classify(ask, runner, picture):
    data = picture("red", "red", "green", "green")
    found = ask("classify", data, ["red", "blue", "yellow"], templates=["a {} thing"], top_k=2)
    want = runner.classify(data, ["red", "blue", "yellow"], templates=["a {} thing"], top_k=2)
    assert found.model == "colours-int8"
    assert [(one.label, one.index) for one in found.labels] == [(one.label, one.index) for one in want]
    numbers = [x for one in found.labels for x in (one.score, one.cosine)]
    assert numbers == pytest.approx([x for one in want for x in (one.score, one.cosine)], abs=1e-6)


def test_embed_texts_first(ask, runner, picture):
    texts, images = ["a green thing", "yellow"], [picture("blue"), picture("white")]
    found = ask("embed", texts=texts, images=images)
    assert found.dim == 3
    assert np.array(found.embeddings) == pytest.approx(runner.embed(texts=texts, images=images), abs=1e-6)


def test_a_picture_is_a_path_bytes_or_a_file(ask, picture, tmp_path):
    path = tmp_path / "blue.png"
    path.write_bytes(picture("blue"))
    images = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())]
    assert ask("embed", images=images).embeddings == [[0, 0, 1]] * 4
    with pytest.raises(FileNotFoundError):
        ask("classify", tmp_path / "none.png", ["red"])


def test_detect(ask, runner, picture):
    data = picture("red", "green", "blue", "yellow")
    found = ask("detect", data, ["red", "blue"], min_score=0.9, max_output=3)
    assert (found.image.width, found.image.height) == (64, 48)
    assert sorted(one.label for one in found.detections) == ["blue", "red"]
    used = found.suppression
    assert (used.min_score, used.max_output, used.kept, used.method) == (0.9, 3, 2, "gaussian")
    asked = {"method": "hard", "iou_threshold": 0.5, "min_score": 0.3, "sigma": 0.7, "per_class": False}
    shown = [Example(picture("blue"), box=[0, 0, 10.0, 10], label="sea"), Example(picture("red"))]
    found = ask("detect", data, ["green"], examples=[*shown, picture("green")], **asked)
    want = runner.detect(
        data,
        ["green"],
        suppression=detect.Suppression(**asked),
        examples=[detect.Example(picture("blue"), [0, 0, 10, 10], "sea"), picture("red"), picture("green")],
    )
    assert [(one.label, one.index) for one in found.detections] == [(one.label, one.index) for one in want]
    boxes = [[one.box.x0, one.box.y0, one.box.x1, one.box.y1] for one in found.detections]
    assert boxes == [pytest.approx(one.box.tolist(), abs=0.01) for one in want]
    assert [one.score for one in found.detections] == pytest.approx([one.score for one in want], abs=1e-6)
    assert {name: getattr(found.suppression, name) for name in asked} == asked


def test_collections(ask, runner, picture):
    made = ask("create_collection", "photos", model="colours-int8")
    assert made == Collection("photos", "colours-int8", runner.bundle.digest, 3, made.created, 0)
    items = [
        Item("a", text="red", meta={"year": 2020}),
        Item("b", image=picture("green"), meta={"year": 2021, "tags": ["x"]}),
        Item("c", text="a blue thing"),
    ]
    assert ask("upsert", "photos", items) == Count(3, 3)
    assert ask("collection", "photos").items == 3
    assert ask("collections") == [ask("collection", "photos")]

    want = runner.embed(texts=["yellow"])[0] @ runner.embed(texts=["red"])[0]
    first, second = ask("search", "photos", "yellow", top_k=2)
    assert {first.id, second.id} == {"a", "b"}
    assert first.score == pytest.approx(want, abs=1e-5)
    assert ask("search", "photos", image=picture("red"), filter={"year": {"gte": 2021}}, top_k=1) == [
        Hit("b", 0.0, {"year": 2021, "tags": ["x"]})
    ]

    assert ask("page", "photos", after="a", limit=1) == Page([StoredItem("b", {"year": 2021, "tags": ["x"]})], "b")
    assert ask("page", "photos", after="b") == Page([StoredItem("c", {})], None)
    for at_once in (1, 2, 3, 100):
        assert [one.id for one in ask("items", "photos", at_once=at_once)] == ["a", "b", "c"]

    assert ask("delete_items", "photos", ["a", "z"]) == Count(1, 2)
    assert ask("delete_collection", "photos") is None
    with pytest.raises(NotFound, match="'photos'") as refused:
        ask("collection", "photos")
    assert (refused.value.status, refused.value.slug) == (404, "collection-not-found")
    assert ask("create_collection", "photos").items == 0  # its name is free
    ask("delete_collection", "photos")


def test_classifiers(ask, runner, picture):
    made = ask("put_classifier", "pets", ["red", "blue"], templates=["a {}"], descriptions={"red": ["red"]})
    said = {"red": ["red"]}
    assert made == Classifier("pets", 1, ["red", "blue"], ["a {}"], said, None, {}, 1.0, None, None, False)
    assert ask("classifier", "pets") == made
    assert ask("classifiers") == [made]
    (first, _) = ask("classify", picture("blue"), classifier="pets").labels
    assert first.label == "blue"
    known = [(picture("blue"), "red"), (picture("red"), "blue")]
    fitted = ask("fit_classifier", "pets", known, "prototype", {"scale": 9.0})
    assert (fitted.head, fitted.params, fitted.fitted) == ("prototype", {"scale": 9.0}, True)
    assert ask("classify", picture("blue"), classifier="pets").labels[0].label == "red"  # as it was told
    assert ask("delete_classifier", "pets") is None
    assert ask("classifiers") == []
    made = ask("put_classifier", "pets", ["red", "blue"], temperature=2.0, none_below=0.9)
    assert (made.temperature, made.none_below) == (2.0, 0.9)
    calibrated = ask("calibrate_classifier", "pets", [(picture("blue"), "blue"), (picture("red"), "red")])
    assert (calibrated.version, calibrated.temperature == 2.0) == (2, False)
    assert ask("classify", picture("blue"), classifier="pets", temperature=50.0).none_of_these
    assert ask("classify", picture("blue"), ["red", "blue"]).none_of_these is None
    ask("delete_classifier", "pets")


USUAL = Suppression("gaussian", 0.5, 0.3, 0.15, 100, True)


def test_models(ask, runner):
    (one,) = ask("models")
    assert (one.name, one.digest, one.tasks) == ("colours-int8", runner.bundle.digest, ["classify", "embed", "detect"])
    assert (one.precision, one.dim, one.labels, one.suppression) == ("int8", 3, 0, USUAL)
    files = ask("model", "colours-int8")
    assert files.digest == one.digest
    assert files.manifest["classifier"]["head"] == {"name": "cosine", "params": {"scale": 10.0}, "assets": {}}
    assert files.report == json.loads((runner.bundle.directory / "report.json").read_text())
    assert ask("ready") == Ready(True, ["colours-int8"], {})


def test_models_say_what_a_detect_request_that_says_nothing_asks_for(settings, serve, bundle_maker, tmp_path, asking):
    own = {"min_score": 0.25, "method": "hard"}
    for name, changes in (("plain", {}), ("own", {"suppression": own}), ("words", {"tasks": ["embed"]})):
        path = bundle_maker(tmp_path / "bundles", name).directory / "bundle.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": ["detect"]} | changes))
    with serve(settings(bundles_dir=tmp_path / "bundles", limits={"examples": 3})) as client:
        ask = asking(client.base_url)
        found = {one.name: (one.suppression, one.examples) for one in ask("models")}
        assert found == {"plain": (USUAL, 3), "own": (replace(USUAL, **own), 3), "words": (None, 0)}
        with pytest.raises(Conflict) as refused:
            ask("classify", b"", ["red"])
    assert (refused.value.slug, refused.value.known) == ("task-not-served", ["own", "plain", "words"])


def test_refusals_say_what_the_service_said(ask, picture):
    with pytest.raises(Rejected, match="422 no labels were given") as refused:
        ask("classify", picture("red"), [])
    assert (refused.value.slug, refused.value.title) == ("too-many-labels", "Too few or too many labels")
    assert refused.value.request_id
    with pytest.raises(Rejected) as refused:
        ask("classify", b"no picture", ["red"])
    assert (refused.value.status, refused.value.slug) == (415, "unsupported-image")
    with pytest.raises(Rejected) as refused:
        ask("classify", picture("red"), ["red"], top_k=0)
    assert refused.value.errors[0]["where"] == "top_k"
    with pytest.raises(NotFound) as refused:
        ask("embed", texts=["red"], model="colours-int9")
    assert refused.value.known == ["colours-int8"]


def test_a_name_cannot_leave_its_path(ask):
    with pytest.raises(NotFound) as refused:
        ask("collection", "../models")
    assert refused.value.slug == "not-found"  # a slash in a name: %2F


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("classify", (b"", "red")),
        ("delete_items", ("photos", "a")),
        ("search", ("photos",)),
        ("upsert", ("photos", [Item("a")])),
        ("upsert", ("photos", [Item("a", "red", b"")])),
    ],
)
def test_what_can_only_be_a_mistake_is_a_type_error(ask, method, args):
    with pytest.raises(TypeError, match="expected a"):
        ask(method, *args)


def test_a_service_that_is_still_loading(settings, serve, monkeypatch, asking):
    gate, read = threading.Event(), calmclip.service.hub.read
    monkeypatch.setattr(calmclip.service.hub, "read", lambda path: gate.wait(10) and read(path))
    with serve(settings(), ready=False) as client:
        try:
            ask = asking(client.base_url, retries=0)
            assert ask("ready") == Ready(False, [], {})
            with pytest.raises(Overloaded, match="still loading") as refused:
                ask("embed", texts=["red"])
            assert (refused.value.status, refused.value.slug, refused.value.retry_after) == (503, "overloaded", 1.0)
            ready = client.get("/v2/health/ready")
            assert (ready.status_code, ready.json()) == (400, {"ready": False})  # the protocol: 4xx is false
            one = client.get("/v2/models/colours-int8.text/ready")
            assert (one.status_code, one.headers["retry-after"]) == (503, "1")
            assert client.get("/v2/health/live").status_code == client.get("/healthz").status_code == 200
            assert client.get("/readyz").status_code == 503
        finally:
            gate.set()
        until(lambda: client.get("/readyz").status_code == 200)
        assert ask("embed", texts=["red"]).embeddings == [[1, 0, 0]]


GOOD = (200, {}, b'{"model": "m", "dim": 1, "embeddings": [[1.0]], "news": 1}')


def full(wait: str | None) -> tuple[int, dict[str, str], bytes]:
    return 503, {} if wait is None else {"Retry-After": wait}, b'{"type": "/problems/overloaded", "detail": "full"}'


@pytest.fixture
def scripted() -> Iterator[tuple[str, list[tuple[int, dict[str, str], bytes]]]]:
    """A server's URL, and the answers that it gives in turn; what is left of them was not asked for."""
    script: list[tuple[int, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, headers, body = script.pop(0)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", script
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a client waited; none pass."""
    found: list[float] = []

    async def slept(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(calmclip.service.client, "time", SimpleNamespace(sleep=found.append))  # the servers sleep on
    monkeypatch.setattr(calmclip.service.client, "asyncio", SimpleNamespace(sleep=slept, to_thread=asyncio.to_thread))
    return found


def test_a_full_service_is_asked_again_when_it_said(asking, scripted, waits):
    url, script = scripted
    script += [full("3"), full("1"), GOOD]
    assert asking(url)("embed", texts=["x"]).embeddings == [[1.0]]
    assert [one for one in waits if one] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("options", "answer", "after"),
    [
        ({"retries": 0}, full("1"), 1.0),
        ({"longest_wait": 4}, full("5"), 5.0),
        ({}, full(None), None),
        ({}, full("soon"), None),
    ],
)
def test_and_not_when_it_would_be_too_long_or_nobody_knows(asking, scripted, waits, options, answer, after):
    url, script = scripted
    script += [answer, GOOD]
    with pytest.raises(Overloaded) as refused:
        asking(url, **options)("embed", texts=["x"])
    assert (refused.value.detail, refused.value.retry_after) == ("full", after)
    assert (script, [one for one in waits if one]) == ([GOOD], [])


def test_retries_come_to_an_end(asking, scripted, waits):
    url, script = scripted
    script += [full("1")] * 4
    with pytest.raises(Overloaded):
        asking(url, retries=2)("embed", texts=["x"])
    assert len(script) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "slug"),
    [
        ((504, {}, b'{"type": "/problems/deadline-exceeded"}'), DeadlineExceeded, "deadline-exceeded"),
        ((500, {}, b'{"type": "/problems/internal"}'), Failed, "internal"),
        ((502, {}, b"<html>Bad gateway</html>"), Failed, ""),
        ((400, {}, b"[]"), Rejected, ""),
        ((401, {}, b'{"type": "/problems/unauthorized"}'), Unauthorized, "unauthorized"),
        ((403, {}, b'{"type": "/problems/forbidden"}'), Forbidden, "forbidden"),
    ],
)
def test_other_refusals(asking, scripted, answer, kind, slug):
    url, script = scripted
    script += [answer]
    with pytest.raises(Problem) as refused:
        asking(url)("embed", texts=["x"])
    assert (type(refused.value), refused.value.status, refused.value.slug) == (kind, answer[0], slug)
    assert str(answer[0]) in str(refused.value)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"model": "m"}', b"\xff"])
def test_an_answer_of_somebody_else(asking, scripted, body):
    url, script = scripted
    script += [(200, {}, body)]
    with pytest.raises(Unreadable, match="not calmclip's"):
        asking(url)("embed", texts=["x"])


def test_nobody_there(asking):
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9 does not answer") as refused:
        asking("http://127.0.0.1:9")("ready")
    assert isinstance(refused.value, ClientError)


def test_headers_go_with_every_request(client, asking):
    with pytest.raises(NotFound) as refused:
        asking(client.base_url, headers={"X-Request-Id": "mine"})("model", "none")
    assert refused.value.request_id == "mine"


def test_every_call_is_a_method_of_both_clients_that_says_what_it_takes():
    calls = {name: value for name, value in vars(Calls).items() if isinstance(value, staticmethod)}
    assert len(calls) > 15
    for name in calls:
        make = getattr(Calls, name)
        assert make.__doc__
        for kind in (Client, AsyncClient):
            method = getattr(kind, name)
            assert (method.__name__, method.__doc__) == (name, make.__doc__)
            assert list(inspect.signature(method).parameters) == ["self", *inspect.signature(make).parameters]
            assert inspect.iscoroutinefunction(method) == (kind is AsyncClient)


def test_every_endpoint_a_client_is_for_has_a_call():
    """Pages, metrics and the other protocols have clients of their own."""
    asked = set()
    for name, make in inspect.getmembers(Calls, inspect.isfunction):
        words = {"image": b"", "text": "t", "items": [], "labels": [], "ids": []}
        needed = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
        call = make(
            **{p.name: words.get(p.name, "NAME") for p in needed}, **({"text": "t"} if name == "search" else {})
        )
        asked.add(f"{call.method} {call.path.replace('NAME', '{name}')}")
    others = {"GET /problems/{slug}", "GET /metrics", "GET /healthz"}
    assert asked == {one.name for one in registered() if "compatible" not in one.tags} - others
