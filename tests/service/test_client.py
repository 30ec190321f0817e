"""Both clients against a real service, compared with `Runner` on the same bundle; errors from a scripted server."""

import asyncio
import base64
import inspect
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image

import calmclip.service.client
import calmclip.service.hub
from calmclip.models.preprocess.truncation import Truncation
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks import detect
from calmclip.models.tasks.attributes import Attributes
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
    ImportedBank,
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
            return [item async for item in client.items(*args, **kwargs)]
        return await getattr(client, name)(*args, **kwargs)


def _called(url: str, options: dict[str, Any], name: str, *args: Any, **kwargs: Any) -> Any:
    with Client(url, **options) as client:
        result = getattr(client, name)(*args, **kwargs)
        return list(result) if name == "items" else result


@pytest.fixture(params=["sync", "async"])
def asking(request: pytest.FixtureRequest) -> Callable[..., Ask]:
    """(url, options of the client) -> ask(method, arguments), with the sync or the async client."""

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
    answer = ask("classify", data, ["red", "blue", "yellow"], templates=["a {} thing"], top_k=2)
    want = runner.classify(data, ["red", "blue", "yellow"], templates=["a {} thing"], top_k=2)
    assert answer.model == "colours-int8"
    assert [(row.label, row.index) for row in answer.labels] == [(row.label, row.index) for row in want]
    numbers = [x for row in answer.labels for x in (row.score, row.cosine)]
    assert numbers == pytest.approx([x for row in want for x in (row.score, row.cosine)], abs=1e-6)


def test_classify_with_attributes_and_descriptions(ask, runner, picture):
    data, labels = picture("red", "red", "green", "green"), ["red", "blue"]
    values = {"place": ["yellow", "white"], "time": ["green", ""]}
    answer = ask("classify", data, labels, attributes=values, tau=2.0, with_labels=False)
    want = runner.classify(data, labels, attributes=Attributes(values, 2.0, with_labels=False))
    assert [row.score for row in answer.labels] == pytest.approx([row.score for row in want], abs=1e-6)
    assert {name: [*each] for name, each in answer.attributes.items()} == values
    shown = [(row.text, row.probability) for row in answer.composites]
    assert shown == [(text, pytest.approx(part, abs=1e-6)) for text, part in want.inferred.composites]
    described = {"descriptions": {"red": ["green", "a red thing"], "blue": ["blue"]}, "alpha": 0.25}
    answer, want = ask("classify", data, labels, **described), runner.classify(data, labels, **described)
    assert [row.score for row in answer.labels] == pytest.approx([row.score for row in want], abs=1e-6)
    assert (answer.attributes, answer.composites) == (None, None)


def test_embed_texts_first(ask, runner, picture):
    texts, images = ["a green thing", "yellow"], [picture("blue"), picture("white")]
    answer = ask("embed", texts=texts, images=images)
    assert answer.dim == 3
    assert np.array(answer.embeddings) == pytest.approx(runner.embed(texts=texts, images=images), abs=1e-6)


def test_enhance(ask, runner, picture):
    data = picture("red", "white", "white", "blue")
    with Image.open(io.BytesIO(ask("enhance", data, map_pixels=2000))) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(runner.enhance(data, map_pixels=2000)))


def test_embed_and_detect_take_boxes(ask, runner, picture):
    data, boxes = picture("red", "green", "blue", "yellow"), [[0, 0, 32, 24], (32, 24, 64, 48)]
    answer = ask("embed", texts=["red"], images=[data], boxes=boxes)
    assert np.array(answer.embeddings[1:]) == pytest.approx(runner.embed_boxes(data, boxes)[0], abs=1e-6)
    for where in ({"boxes": boxes}, {"grid": {"sizes": [0.5], "ratios": [1.0]}}):
        grid = detect.Grid(**where["grid"]) if "grid" in where else None
        want = runner.detect(data, ["red"], boxes=where.get("boxes"), grid=grid)
        got = ask("detect", data, ["red"], **where)
        assert [d.score for d in got.detections] == pytest.approx([d.score for d in want], abs=1e-6)
        assert got.suppression.candidates == want.candidates


def test_a_picture_is_a_path_bytes_or_a_file(ask, picture, tmp_path):
    path = tmp_path / "blue.png"
    path.write_bytes(picture("blue"))
    images = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())]
    assert ask("embed", images=images).embeddings == [[0, 0, 1]] * 4
    with pytest.raises(FileNotFoundError):
        ask("classify", tmp_path / "none.png", ["red"])


def test_detect(ask, runner, picture):
    data = picture("red", "green", "blue", "yellow")
    answer = ask("detect", data, ["red", "blue"], min_score=0.9, max_output=3)
    assert (answer.image.width, answer.image.height) == (64, 48)
    assert sorted(detection.label for detection in answer.detections) == ["blue", "red"]
    used = answer.suppression
    assert (used.min_score, used.max_output, used.kept, used.method) == (0.9, 3, 2, "gaussian")
    suppression = {"method": "hard", "iou_threshold": 0.5, "min_score": 0.3, "sigma": 0.7, "per_class": False}
    shown = [Example(picture("blue"), box=[0, 0, 10.0, 10], label="sea"), Example(picture("red"))]
    answer = ask("detect", data, ["green"], examples=[*shown, picture("green")], **suppression)
    want = runner.detect(
        data,
        ["green"],
        suppression=detect.Suppression(**suppression),
        examples=[detect.Example(picture("blue"), [0, 0, 10, 10], "sea"), picture("red"), picture("green")],
    )
    assert [(d.label, d.index) for d in answer.detections] == [(d.label, d.index) for d in want]
    boxes = [[d.box.x0, d.box.y0, d.box.x1, d.box.y1] for d in answer.detections]
    assert boxes == [pytest.approx(d.box.tolist(), abs=0.01) for d in want]
    assert [d.score for d in answer.detections] == pytest.approx([d.score for d in want], abs=1e-6)
    assert {name: getattr(answer.suppression, name) for name in suppression} == suppression


def test_rank(ask, runner, picture):
    images = [picture("blue"), picture("yellow"), picture("red")]
    answer = ask("rank", images, "red", top=2)
    want = runner.rank(images, "red", top=2)
    assert [(p.index, p.score) for p in answer.pictures] == [(p.index, pytest.approx(p.score, abs=1e-6)) for p in want]
    assert answer.scale == want.scale == "cosine"
    ask("put_classifier", "order", ["red", "blue"])
    assert [p.index for p in ask("rank", images, classifier="order", label="blue", top=1).pictures] == [0]
    ask("delete_classifier", "order")


def test_tag(ask, runner, picture):
    data = picture("red", "green", "blue", "yellow")
    answer = ask("tag", data, ["red", "blue"], templates=["a {}"], top=3)
    want = runner.tag(data, ["red", "blue"], templates=["a {}"], top=3)
    assert [(t.word, t.index) for t in answer.tags] == [(t.word, t.index) for t in want.picture]
    boxes = [[t.box.x0, t.box.y0, t.box.x1, t.box.y1] for t in answer.regions]
    assert boxes == [pytest.approx(t.box.tolist(), abs=0.01) for t in want.regions]
    assert [t.score for t in answer.regions] == pytest.approx([t.score for t in want.regions], abs=1e-6)
    assert (answer.caption, answer.captioned_by) == (want.caption, want.captioned_by)
    assert ask("tag", data, ["red"], regions=False).regions == []


def test_segment(ask, runner, picture):
    data, labels = picture("red", "green", "blue", "yellow"), ["red", "blue"]
    settings = {
        "background": ["green"],
        "threshold": 0.4,
        "independent": True,
        "method": "maskclip",
        "templates": ["a {}"],
    }
    answer = ask("segment", data, labels, params={"scale": 20.0}, **settings)
    want = [*runner.segment(data, labels, params={"scale": 20.0}, **settings)]
    assert [(s.label, s.index, s.area, s.png) for s in answer.segments] == [
        (s.label, s.index, s.area, None) for s in want
    ]
    assert [{"size": s.rle.size, "counts": s.rle.counts} for s in answer.segments] == [s.mask.rle() for s in want]
    numbers = [[s.score, *(part.score for part in s.boxes)] for s in answer.segments]
    assert numbers == [pytest.approx([s.score, *s.box_scores], abs=1e-6) for s in want]
    boxes = [[p.box.x0, p.box.y0, p.box.x1, p.box.y1] for s in answer.segments for p in s.boxes]
    assert boxes == [pytest.approx(box.tolist(), abs=0.01) for s in want for box in s.boxes]
    answer, want = (
        ask("segment", data, labels, background=[], format="png"),
        runner.segment(data, labels, background=()),
    )
    assert [(s.label, base64.b64decode(s.png)) for s in answer.segments] == [(s.label, s.mask.png()) for s in want]
    assert ask("segment_indexed", data, labels, background=[]) == want.indexed_png()


def test_anomaly(ask, runner, picture):
    data, states = picture("red", "red", "blue", "red"), {"normal": ["red {}"], "damaged": ["blue {}", "a {}"]}
    answer = ask("anomaly", data, "thing", threshold=0.25, **states)
    want = runner.anomaly(data, "thing", threshold=0.25, **states)
    assert (answer.score, answer.damaged) == (pytest.approx(want.score, abs=1e-6), want.is_damaged)
    assert (answer.method, answer.threshold, base64.b64decode(answer.heat)) == ("text", 0.25, want.png())


def test_explain(ask, runner, picture):
    data, caption = picture("red", "red", "blue", "green"), "a yellow thing beside a blue one"
    answer, want = ask("explain", data, caption, threshold=-0.01), runner.explain(data, caption, threshold=-0.01)
    assert [(w.text, w.start, w.end, w.flagged) for w in answer.words] == [
        (w.text, w.start, w.end, w.flagged) for w in want.words
    ]
    numbers = [x for w in answer.words for x in (w.contribution, w.margin)]
    assert numbers == pytest.approx([x for w in want.words for x in (w.contribution, w.margin)], abs=1e-6)
    scores = (answer.score, answer.clip_score, answer.f_score)
    assert scores == pytest.approx((want.score, want.clip_score, want.f_score), abs=1e-6)
    assert (answer.lowest, answer.method, answer.threshold) == (want.lowest, "leave_one_out", -0.01)
    assert answer.flagged == [w.text for w in want.flagged]
    with pytest.raises(Conflict, match="attribution"):
        ask("explain", data, caption, method="gradient")


def test_compress(ask, runner):
    texts = ["Blue. A thing. Red red red. Green green. A photo of a thing. Yellow.", "red"]
    answer, want = ask("compress", texts, budget=9), runner.compress(texts, 9)
    assert [(a.text, a.tokens, a.tokens_before, tuple(a.kept), a.sentences, a.cut) for a in answer] == [
        (w.text, w.tokens, w.tokens_before, w.kept, w.sentences, w.cut) for w in want
    ]
    assert [x for a in answer for x in (a.cosine, a.ratio)] == pytest.approx(
        [x for w in want for x in (w.cosine, w.ratio)], abs=1e-6
    )


def test_long_texts(ask, runner):
    text = "Red red. " * 4 + "Blue blue. " * 4
    for how in ({"truncate": "end"}, {"truncate": "compress"}, {"truncate": "chunk", "stride": 6, "pooling": "max"}):
        choice = Truncation(how["truncate"], how.get("stride"), how.get("pooling", "mean"))
        (row,) = ask("embed", texts=[text], **how).embeddings
        assert row == pytest.approx(runner.embed(texts=[text], truncate=choice)[0].tolist(), abs=1e-6)
    ask("create_collection", "long")
    ask("upsert", "long", [Item("a", text=text)], truncate="chunk")
    (hit,) = ask("search", "long", text, truncate="chunk")
    assert hit.score == pytest.approx(1, abs=1e-5)
    ask("delete_collection", "long")


def test_collections(ask, runner, picture):
    created = ask("create_collection", "photos", model="colours-int8")
    digest = runner.bundle.embedding_digest
    assert created == Collection("photos", "colours-int8", digest, 3, created.created, False, 0)
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
        Hit("b", 0.0, {"year": 2021, "tags": ["x"]}, ANY)
    ]

    assert ask("page", "photos", after="a", limit=1) == Page([StoredItem("b", {"year": 2021, "tags": ["x"]})], "b")
    assert ask("page", "photos", after="b") == Page([StoredItem("c", {})], None)
    for size in (1, 2, 3, 100):
        assert [item.id for item in ask("items", "photos", page_size=size)] == ["a", "b", "c"]

    assert ask("delete_items", "photos", ["a", "z"]) == Count(1, 2)
    assert ask("delete_collection", "photos") is None
    with pytest.raises(NotFound, match="'photos'") as refused:
        ask("collection", "photos")
    assert (refused.value.status, refused.value.slug) == (404, "collection-not-found")
    assert ask("create_collection", "photos").items == 0  # the name is free again
    ask("delete_collection", "photos")


def test_banks(ask, runner):
    """A collection as numpy reads it, under another name, and one of another program's vectors."""
    ask("create_collection", "photos", dimensions=3)
    ask("upsert", "photos", [Item("a", text="red"), Item("b", text="yellow", meta={"n": 1})])
    data = ask("export_bank", "photos")
    loaded = np.load(io.BytesIO(data))
    vectors = dict(zip(loaded["ids"].tolist(), loaded["vectors"], strict=True))
    np.testing.assert_allclose(vectors["b"], runner.embed(texts=["yellow"])[0], atol=1e-6)
    copy = ask("import_bank", "copy", data)
    digest = runner.bundle.embedding_digest
    assert copy == ImportedBank("copy", "colours-int8", digest, 3, copy.created, False, 2, 0)
    assert ask("search", "copy", "yellow", top_k=1) == [Hit("b", pytest.approx(1, abs=1e-5), {"n": 1}, ANY)]

    other = io.BytesIO()
    np.savez(other, ids=["x"], vectors=np.array([[3, 4]], np.float32), model="UniME", dim=2, normalized=False)
    with pytest.raises(Rejected, match="length 5"):
        ask("import_bank", "other", other.getvalue(), normalize=False)
    assert ask("import_bank", "other", other.getvalue()).scaled == 1
    assert ask("collection", "other").model == "UniME"
    assert ask("search", "other", vector=[4, 3]) == [Hit("x", pytest.approx(0.96, abs=1e-6), {})]
    assert ask("upsert", "other", [Item("y", vector=[0, 2])]) == Count(1, 2)
    with pytest.raises(Conflict, match="'UniME', which is no bundle") as refused:
        ask("search", "other", "a text")
    assert refused.value.slug == "collection-bundle-mismatch"
    with pytest.raises(Conflict) as refused:
        ask("import_bank", "other", data)
    assert refused.value.slug == "collection-exists"
    for name in ("photos", "copy", "other"):
        ask("delete_collection", name)


def test_classifiers(ask, runner, picture):
    registered = ask("put_classifier", "pets", ["red", "blue"], templates=["a {}"], descriptions={"red": ["red"]})
    described = {"red": ["red"]}
    assert registered == Classifier(
        "pets", 1, ["red", "blue"], ["a {}"], described, None, {}, 1.0, None, None, False, None
    )
    assert ask("classifier", "pets") == registered
    assert ask("classifiers") == [registered]
    (first, _) = ask("classify", picture("blue"), classifier="pets").labels
    assert first.label == "blue"
    known = [(picture("blue"), "red"), (picture("red"), "blue")]
    with pytest.raises(Conflict, match="there is a classifier 'pets' already") as refused:
        ask("fit_classifier", "pets", "prototype", known)
    assert refused.value.slug == "classifier-exists"
    fitted = ask("fit_classifier", "pets", "prototype", known, params={"scale": 9.0}, replace=True)
    assert (fitted.head, fitted.params, fitted.fitted) == ("prototype", {"scale": 9.0}, True)
    assert (fitted.report.method, fitted.report.pictures, fitted.report.before, fitted.skipped) == (
        "prototype", 2, None, 0
    )  # fmt: skip
    assert ask("classifier", "pets").report == fitted.report
    assert ask("classify", picture("blue"), classifier="pets").labels[0].label == "red"  # the fitted label
    assert ask("delete_classifier", "pets") is None
    assert ask("classifiers") == []
    registered = ask("put_classifier", "pets", ["red", "blue"], temperature=2.0, none_below=0.9)
    assert (registered.temperature, registered.none_below) == (2.0, 0.9)
    known = [(picture("blue"), "blue"), (picture("red"), "red")] * 50
    calibrated = ask("calibrate_classifier", "pets", known)
    assert (calibrated.version, calibrated.temperature == 2.0, calibrated.pictures) == (2, False, 100)
    # before: logits 10 and 0 at T = 2, all right
    assert calibrated.before.expected_calibration_error == pytest.approx(1 - 1 / (1 + math.exp(-5)), abs=2e-6)
    assert calibrated.after.negative_log_likelihood == pytest.approx(math.log(102 / 101), abs=1e-3)
    with pytest.raises(Rejected, match="2 pictures for 2 labels were given"):
        ask("calibrate_classifier", "pets", known[:2])
    assert ask("classify", picture("blue"), classifier="pets", temperature=50.0).none_of_these
    assert ask("classify", picture("blue"), ["red", "blue"]).none_of_these is None
    ask("delete_classifier", "pets")


USUAL = Suppression("gaussian", 0.5, 0.3, 0.15, 100, True)


def test_models(ask, runner):
    (model,) = ask("models")
    assert (model.name, model.tasks) == (
        "colours-int8",
        ["classify", "embed", "detect", "enhance", "anomaly", "compress", "explain", "rank", "segment", "tag"],
    )
    assert (model.digest, model.precision) == (runner.bundle.digest, "int8")
    assert (model.dim, model.labels, model.suppression) == (3, 0, USUAL)
    assert ("maskclip" in model.segmentation.methods, model.segmentation.threshold) == (True, 0.0)
    assert model.explanation.methods == ["leave_one_out"]
    files = ask("model", "colours-int8")
    assert files.digest == model.digest
    assert files.manifest["classifier"]["head"] == {"name": "cosine", "params": {"scale": 10.0}, "assets": {}}
    assert files.report == json.loads((runner.bundle.directory / "report.json").read_text())
    assert ask("ready") == Ready(True, ["colours-int8"], {}, {})


def test_models_name_the_defaults_of_a_detect_request(settings, serve, bundle_maker, tmp_path, asking):
    suppression = {"min_score": 0.25, "method": "hard"}
    for name, changes in (("plain", {}), ("own", {"suppression": suppression}), ("words", {"tasks": ["embed"]})):
        path = bundle_maker(tmp_path / "bundles", name).directory / "bundle.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": ["detect"]} | changes))
    with serve(settings(bundles_dir=tmp_path / "bundles", limits={"examples": 3})) as client:
        ask = asking(client.base_url)
        defaults = {model.name: (model.suppression, model.examples) for model in ask("models")}
        assert defaults == {"plain": (USUAL, 3), "own": (replace(USUAL, **suppression), 3), "words": (None, 0)}
        with pytest.raises(Conflict) as refused:
            ask("classify", b"", ["red"])
    assert (refused.value.slug, refused.value.known) == ("task-not-served", ["own", "plain", "words"])


def test_errors_carry_the_problem_of_the_service(ask, picture):
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
        ("classify", (7,)),
        ("classify", {"image": b"", "attributes": {"place": "sea"}}),
        ("classify", (io.StringIO("text"),)),
        ("detect", (b"", "red")),
        ("rank", (b"", "red")),
        ("tag", (b"", "red")),
        ("detect", {"image": b"", "examples": b""}),
        ("embed", {"texts": "red"}),
        ("embed", {"images": "cat.jpg"}),
        ("embed", {"images": io.BytesIO()}),
    ],
)
def test_an_impossible_argument_is_a_type_error(ask, method, args):
    with pytest.raises(TypeError, match="expected a"):
        ask(method, **args) if isinstance(args, dict) else ask(method, *args)


def test_a_service_that_is_still_loading(settings, serve, monkeypatch, asking):
    gate, read = threading.Event(), calmclip.service.hub.read
    monkeypatch.setattr(calmclip.service.hub, "read", lambda path: gate.wait(10) and read(path))
    with serve(settings(), ready=False) as client:
        try:
            ask = asking(client.base_url, retries=0)
            loading = ask("ready")
            assert (loading.ready, loading.loaded, loading.failed) == (False, [], {})
            with pytest.raises(Overloaded, match="still loading") as refused:
                ask("embed", texts=["red"])
            assert (refused.value.status, refused.value.slug, refused.value.retry_after) == (503, "overloaded", 1.0)
            ready = client.get("/v2/health/ready")
            assert (ready.status_code, ready.json()) == (400, {"ready": False})  # in the protocol 4xx means false
            loading = client.get("/v2/models/colours-int8.text/ready")
            assert (loading.status_code, loading.headers["retry-after"]) == (503, "1")
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
    """A server's URL, and a list of its answers; an answer leaves the list when it is sent."""
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
    """The seconds that a client would have waited; no time passes."""
    seconds_waited: list[float] = []

    async def slept(seconds: float) -> None:
        seconds_waited.append(seconds)

    # the client's modules only: the servers still sleep
    monkeypatch.setattr(calmclip.service.client, "time", SimpleNamespace(sleep=seconds_waited.append))
    monkeypatch.setattr(calmclip.service.client, "asyncio", SimpleNamespace(sleep=slept, to_thread=asyncio.to_thread))
    return seconds_waited


def test_a_full_service_is_asked_again_after_its_retry_after(asking, scripted, waits):
    url, script = scripted
    script += [full("3"), full("1"), GOOD]
    assert asking(url)("embed", texts=["x"]).embeddings == [[1.0]]
    assert [seconds for seconds in waits if seconds] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("options", "answer", "after"),
    [
        ({"retries": 0}, full("1"), 1.0),
        ({"longest_wait": 4}, full("5"), 5.0),
        ({}, full(None), None),
        ({}, full("soon"), None),
    ],
)
def test_a_long_or_unknown_wait_is_not_retried(asking, scripted, waits, options, answer, after):
    url, script = scripted
    script += [answer, GOOD]
    with pytest.raises(Overloaded) as refused:
        asking(url, **options)("embed", texts=["x"])
    assert (refused.value.detail, refused.value.retry_after) == ("full", after)
    assert (script, [seconds for seconds in waits if seconds]) == ([GOOD], [])


def test_the_number_of_retries_is_limited(asking, scripted, waits):
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
def test_an_answer_of_another_program(asking, scripted, body):
    url, script = scripted
    script += [(200, {}, body)]
    with pytest.raises(Unreadable, match="did not answer as calmclip does"):
        asking(url)("embed", texts=["x"])


def test_no_service_at_the_address(asking):
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9 does not answer") as refused:
        asking("http://127.0.0.1:9")("ready")
    assert isinstance(refused.value, ClientError)


def test_headers_go_with_every_request(client, asking):
    with pytest.raises(NotFound) as refused:
        asking(client.base_url, headers={"X-Request-Id": "mine"})("model", "none")
    assert refused.value.request_id == "mine"


def test_every_call_is_a_method_of_both_clients_with_the_same_docstring_and_parameters():
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


def test_every_endpoint_of_the_clients_has_a_call():
    """Pages, metrics and the compatible protocols have other clients."""
    called = set()
    for name, make in inspect.getmembers(Calls, inspect.isfunction):
        words = {
            "image": b"",
            "text": "t",
            "images": [],
            "items": [],
            "labels": [],
            "id": "ID",
            "ids": [],
            "bank": b"",
            "texts": [],
        }
        parameters = inspect.signature(make).parameters.values()
        needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        call = make(
            **{p.name: words.get(p.name, "NAME") for p in needed}, **({"text": "t"} if name == "search" else {})
        )
        called.add(f"{call.method} {call.path.replace('NAME', '{name}').replace('ID', '{id}')}")
    others = {"GET /problems/{slug}", "GET /metrics", "GET /healthz"}
    assert called == {endpoint.name for endpoint in registered() if "compatible" not in endpoint.tags} - others
