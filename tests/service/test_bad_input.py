"""Invalid requests: each gets a clear problem, no data is lost, and the service goes on."""

import base64
import io
import json
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from calmclip.service import server
from tests.asking import b64, dial, picture_head, raw


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(autouse=True)
def goes_on(client, picture):
    yield
    assert client.post("/v1/classify?labels=red", **raw(picture("red"))).status_code == 200
    assert client.get("/readyz").status_code == 200


def check(answer, status: int, slug: str, *words: str):
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert (problem["status"], problem["type"]) == (status, f"/problems/{slug}"), problem
    assert answer.status_code == status
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["instance"] == answer.request.url.path
    for word in words:
        assert word in problem["detail"], problem
    return problem


ROUTES = ["/v1/classify", "/v1/detect"]
JSON = "application/json"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("damage", "status", "slug", "word"),
    [
        ("empty", 415, "unsupported-image", "0 bytes"),
        ("text", 415, "unsupported-image", "send JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"),
        ("truncated", 415, "unsupported-image", "broken"),
        ("icon", 415, "unsupported-image", "JPEG, PNG, WebP"),
        ("bomb", 413, "image-too-large", "2500000000"),
        ("big", 413, "image-too-large", str(32 << 20)),
    ],
)
def test_invalid_pictures(client, picture, route, damage, status, slug, word):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(noise).save(jpeg, "JPEG")
    icon = io.BytesIO()
    Image.fromarray(noise).save(icon, "ICO")
    data = {
        "empty": b"",
        "text": b"hello",
        "truncated": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "icon": icon.getvalue(),
        "bomb": bomb(50_000, 50_000),
        "big": b"\xff\xd8" + b"\0" * (32 << 20),
    }[damage]
    check(client.post(f"{route}?labels=red", **raw(data, "image/jpeg")), status, slug, word)
    check(client.post(route, files={"image": data}, data={"labels": "red"}), status, slug, word)
    check(client.post(route, json={"image": b64(data), "labels": ["red"]}), status, slug, word)


def test_the_bytes_of_a_chunked_body_are_counted(client):
    def endless():
        while True:  # until the limit or the deadline
            yield b"\0" * (1 << 20)

    check(client.post("/v1/classify?labels=red", **raw(endless())), 413, "image-too-large")


def test_a_huge_body(client):
    text = b'{"inputs": [{"text": "' + b"a" * (65 << 20) + b'"}]}'
    check(client.post("/v1/embed", **raw(text, JSON)), 413, "body-too-large", "67108864")


@pytest.mark.parametrize("route", ROUTES)
def test_numbers_of_labels(client, picture, route):
    send = raw(picture("red"))
    check(client.post(route, **send), 422, "too-many-labels", "no labels")
    body = {"image": b64(picture("red")), "labels": [f"label {i}" for i in range(10_000)]}
    check(client.post(route, json=body), 422, "too-many-labels", "10000", "256")
    check(client.post(route, params={"labels": ["red", " "]}, **send), 422, "invalid-request", "label 1 is empty")
    form = {"labels": [str(i) for i in range(10_000)]}
    check(client.post(route, files={"image": picture("red")}, data=form), 422, "invalid-request", "Too many fields")


def test_an_empty_request(client):
    for body in (b"", b"[]", b"null", b'"x"', b"{", b"\xff\xfe", b"{}" + b"\0", b"[" * 100_000):
        check(client.post("/v1/classify", **raw(body, JSON)), 422, "invalid-request")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigma", "0"), ("sigma", "-1"), ("sigma", "nan"), ("sigma", "inf"), ("sigma", "1e400"), ("sigma", "x"),
        ("iou_threshold", "-0.1"), ("iou_threshold", "1.1"), ("min_score", "-1"), ("min_score", "NaN"),
        ("max_output", "0"), ("max_output", "99999999999999999999"), ("max_output", "1.5"), ("method", "softest"),
        ("per_class", "perhaps"), ("labels_", "red"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(client, picture, name, value):
    form = {"labels": "red", name: value}
    check(client.post("/v1/detect", files={"image": picture("red")}, data=form), 422, "invalid-request", name)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_with_numbers_that_are_not_finite(client, picture, number):
    text = f'{{"image": {json.dumps(b64(picture("red")))}, "labels": ["red"], "sigma": {number}}}'
    check(client.post("/v1/detect", **raw(text.encode(), JSON)), 422, "invalid-request")


@pytest.mark.parametrize(
    ("picture_", "word"),
    [
        ("/9j/", "b64"), (None, "image"), ({"b64": 3}, "b64"), ({"b64": "a*b="}, "base64"),
        ({"b64": "abcde"}, "base64"), ({"b64": "é"}, "base64"),
        ({"link": "http://example.org/a.jpg"}, "b64"), ({"b64": "", "x": 1}, "b64"),
        ({"b64": "data:image/png,abc"}, "expected data:image/…;base64,…"), ({"b64": "data:;base64"}, "base64"),
        ({"b64": "a=bc"}, "base64"),
    ],
)  # fmt: skip
def test_pictures_in_json(client, picture_, word):
    answer = client.post("/v1/classify", json={"image": picture_, "labels": ["red"]})
    problem = check(answer, 422, "invalid-request", word)
    assert problem["errors"][0]["where"] == ("image" if picture_ else "body")  # null: left out


def test_an_unknown_name_is_answered_with_the_nearest_name(client, picture):
    send = raw(picture("red"))
    answer = client.post("/v1/classify", params={"model": "colors-int8", "labels": "red"}, **send)
    problem = check(answer, 404, "model-not-found", "did you mean 'colours-int8'")
    assert problem["known"] == ["colours-int8"]
    check(client.get("/v1/models/colours-int"), 404, "model-not-found", "did you mean 'colours-int8'")
    client.put("/v1/collections/photos", json={})
    for call in (
        client.get("/v1/collections/fotos"),
        client.delete("/v1/collections/fotos"),
        client.post("/v1/collections/fotos/search", json={"query": {"text": "red"}}),
        client.post("/v1/collections/fotos/items", json={"items": [{"id": "a", "text": "red"}]}),
    ):
        check(call, 404, "collection-not-found", "did you mean 'photos'")
    client.put("/v1/classifiers/animals", json={"labels": ["cat"]})
    answer = client.post("/v1/classify", params={"classifier": "animal"}, **send)
    check(answer, 404, "classifier-not-found", "did you mean 'animals'")
    check(client.get("/v2/nothing"), 404, "not-found", "/v2/nothing")
    check(client.get("/problems/overlaoded"), 404, "not-found", "did you mean 'overloaded'")
    answer = client.get("/v1/classify")
    check(answer, 405, "method-not-allowed", "GET")
    assert answer.headers["allow"] == "POST"
    assert client.patch("/v1/collections/photos").headers["allow"] == "DELETE, GET, PUT"
    assert client.put("/v1/classifiers").headers["allow"] == "GET"
    assert client.post("/healthz").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-www-form-urlencoded", "imagejpeg"])
def test_wrong_content_types(client, picture, kind):
    answer = client.post("/v1/classify?labels=red", **raw(picture("red"), kind))
    check(answer, 415, "unsupported-media-type", "application/json", "image/*", "application/octet-stream")
    for send in (raw(b"red"), {"content": b"{}"}, raw(b"{}", "application/octet-stream")):
        check(client.put("/v1/classifiers/x", **send), 415, "unsupported-media-type", "application/json")


@pytest.mark.parametrize("kind", ["image/jpg", "image/x-anything", "application/octet-stream", "Image/GIF; q=1", ""])
def test_the_bytes_of_a_picture_count_and_not_its_content_type(client, picture, kind):
    headers = {"content-type": kind} if kind else {}
    answer = client.post("/v1/classify?labels=red&labels=blue", content=picture("red"), headers=headers)
    assert (answer.status_code, answer.json()["labels"][0]["label"]) == (200, "red")


def test_json_without_a_content_type_is_named(client):
    answer = client.post("/v1/classify", content=b' {"image": {"b64": ""}}')
    check(answer, 415, "unsupported-media-type", "looks like JSON", "application/json")


def test_spellings_of_base64(client, picture):
    data = picture("red")
    while not {b"-", b"_"} <= {*map(bytes, zip(base64.urlsafe_b64encode(data)))}:  # both letters that differ
        data += b"\xfb\xff"
    plain, safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    for text in (
        base64.encodebytes(data).decode(),
        plain.rstrip("="),
        safe,
        safe.rstrip("="),
        f"data:image/png;base64,{plain}",
        f"DATA:;charset=x;Base64,{safe}",
        "\r\n ".join([plain[:7], plain[7:]]),
    ):
        answer = client.post("/v1/classify", json={"image": {"b64": text}, "labels": ["red", "blue"]})
        assert (answer.status_code, answer.json()["labels"][0]["label"]) == (200, "red"), text


def test_texts(client):
    def embed(text: str):
        return client.post("/v1/embed", json={"inputs": [{"text": text}]})

    check(embed("red " * 13), 422, "text-too-long", "13 tokens", "12")
    check(embed(" \n"), 422, "invalid-request", "empty")
    assert embed("красный 赤 🎨 \u202e\0").status_code == 200
    lone = b'{"inputs": [{"text": "\\ud800"}]}'
    check(client.post("/v1/embed", **raw(lone, JSON)), 422, "invalid-request")
    check(client.post("/v1/embed", json={"inputs": []}), 422, "invalid-request", "inputs")
    check(client.post("/v1/embed", json={"inputs": [{}]}), 422, "invalid-request", "one of them")
    check(client.post("/v1/embed", json={"inputs": [{"text": "red"}] * 257}), 422, "invalid-request", "257", "256")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no boundary here",
        b"--b\r\n",
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nabc',
        b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--b--\r\n",
        b"--b\r\n\xff\xfe: \x00\r\n\r\n\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="labels"\r\n\r\n\xff\xfe\r\n--b--\r\n',
    ],
)
def test_broken_multipart(client, body):
    for kind in ("multipart/form-data; boundary=b", "multipart/form-data"):
        check(client.post("/v1/classify", **raw(body, kind)), 422, "invalid-request")


@pytest.mark.parametrize("charset", ["undefined", "none-such", "idna", "hex", "utf-16"])
def test_unusable_charsets(client, charset):
    body = b'--b\r\nContent-Disposition: form-data; name="labels"\r\n\r\n\xff..red\r\n--b--\r\n'
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    check(client.post("/v1/classify", **raw(body, kind)), 422, "invalid-request")


def test_a_field_in_the_query_of_a_request_with_fields_in_its_body_is_refused(client, picture):
    body = {"image": b64(picture("red")), "labels": ["red"]}
    form = {"files": {"image": picture("red")}, "data": {"labels": "red"}}
    for send in ({"json": body}, form):
        for route, name in (("classify", "top_k"), ("detect", "sigma"), ("classify", "labels")):
            answer = client.post(f"/v1/{route}?{name}=1", **send)
            check(answer, 422, "invalid-request", f"'{name}' is in the query", "put it into the body")
        check(client.post("/v1/classify?other=1", **send), 422, "invalid-request", "'other' of the query is unknown")
    check(client.post("/v1/embed?model=x", json={"inputs": [{"text": "red"}]}), 422, "invalid-request", "'model'")


def test_a_field_twice_and_both_sources_of_labels(client, picture):
    send = raw(picture("red"))
    answer = client.post("/v1/classify?labels=red&top_k=1&top_k=2", **send)
    check(answer, 422, "invalid-request", "top_k", "twice")
    check(client.post("/v1/classify?labels=red&classifier=x", **send), 404, "classifier-not-found", "'x'")
    check(client.post("/v1/classify?labels=red&top_k=0", **send), 422, "invalid-request", "top_k")
    check(client.post("/v1/classify?labels=red&templates=none", **send), 422, "invalid-request", "{}")


@pytest.mark.parametrize(
    "name", ["..", "..%2Fx", "%2e%2e", "a%2Fb", "A", "ünï", "-a", ".a", "a" * 65, "a b", "a'b", "a%00"]
)
def test_names_that_are_paths_or_invalid(client, name):
    for family in ("collections", "classifiers"):
        body = {"labels": ["red"]} if family == "classifiers" else {}
        answer = client.put(f"/v1/{family}/{name}", json=body)
        assert answer.status_code in (404, 405, 422), answer.text  # a slash makes another path, which no route has
        assert answer.headers["content-type"] == "application/problem+json"
        names = [known["name"] for known in client.get(f"/v1/{family}").json()[family.replace("-", "_")]]
        assert all(known.isascii() and "/" not in known and ".." not in known for known in names)


def test_items_and_searches(client, picture):
    client.put("/v1/collections/bad", json={})
    url = "/v1/collections/bad"
    item = {"id": "a", "text": "red"}

    def add(*items: object):
        return client.post(f"{url}/items", json={"items": items})

    assert add({**item, "id": "before"}).status_code == 200
    check(add(item, {**item, "text": "blue"}), 422, "invalid-request", "'a'", "twice")
    check(add(item, {"id": "b", "image": b64(b"nothing")}), 415, "unsupported-image", "item 'b'")
    check(add(item, {"id": "b", "image": b64(picture("red")[:60])}), 415, "unsupported-image")
    check(add({**item, "id": ""}), 422, "invalid-request", "id")
    check(add({**item, "id": "a\0"}), 422, "invalid-request", "NUL")
    check(add({**item, "meta": {"x": "y" * 20_000}}), 422, "invalid-request", "20", "16384")
    deep: object = 1
    for _ in range(300):
        deep = [deep]
    check(add({**item, "meta": {"x": deep}}), 422, "invalid-request", "nested")
    check(add({**item, "meta": [1]}), 422, "invalid-request", "meta")
    check(add(*[{**item, "id": str(i)} for i in range(257)]), 422, "invalid-request", "257")
    check(add(), 422, "invalid-request", "items")
    assert client.get(url).json()["items"] == 1  # no refused item was written

    def search(**body: object):
        return client.post(f"{url}/search", json={"query": {"text": "red"}, **body})

    check(search(top_k=0), 422, "invalid-request", "top_k")
    check(search(top_k=10**9), 422, "invalid-request", "top_k", "1000")
    check(search(query={}), 422, "invalid-request", "one of them")
    check(search(model="colors-int8"), 404, "model-not-found")
    gone = client.request("DELETE", f"{url}/items", json={"ids": ["x"] * 1001})
    check(gone, 422, "invalid-request", "1001", "1000")
    assert search(filter={"a": "x' OR 1 = 1 --"}).json()["hits"] == []
    assert search(filter={"a": {"gte": "'", "lt": 10**15}}).json()["hits"] == []
    most = {"in": [f"it's {i}" for i in range(969)]} | {op: 1 for op in ("gt", "gte", "lt", "lte")}
    assert search(filter={"a": most} | {f"f{i}": {"in": [1]} for i in range(31)}).json()["hits"] == []
    assert len(search().json()["hits"]) == 1
    check(client.get(f"{url}/items?limit=0"), 422, "invalid-request", "limit")
    check(client.get(f"{url}/items?limit=5000"), 422, "invalid-request", "limit", "1000")
    check(client.get(f"{url}/items?limit=x"), 422, "invalid-request", "limit")


def test_classifiers(client):
    def put(**body: object):
        return client.put("/v1/classifiers/bad", json=body)

    check(put(labels=[]), 422, "invalid-request", "labels")
    check(put(labels=["x"] * 2), 422, "invalid-request", "'x'", "twice")
    check(put(labels=[str(i) for i in range(10_000)]), 422, "too-many-labels", "10000")
    check(put(labels=["x", ""]), 422, "invalid-request", "label 1")
    check(put(labels=["x"], templates=["none"]), 422, "invalid-request", "{}")
    check(put(labels=["x", "y" * 1001]), 422, "invalid-request", "label 1 has 1001", "1000")
    check(put(labels=["x"], templates=["{}" + "y" * 1000]), 422, "invalid-request", "template 0 has 1002", "1000")
    check(put(labels=["y" * (1 << 25)]), 413, "body-too-large", str(1 << 25))
    check(client.put("/v1/collections/big", json={"model": "y" * (1 << 20)}), 413, "body-too-large", str(1 << 20))
    check(client.get("/v1/classifiers/bad"), 404, "classifier-not-found")


def test_the_connection_stays_open_unless_a_body_was_not_read(client):
    assert "connection" not in client.get("/nothing").headers
    assert client.post("/nothing", content=iter([b"x" * 100])).headers["connection"] == "close"  # in chunks
    assert client.post("/nothing", content=b"x" * (2 << 20)).headers["connection"] == "close"
    assert "connection" not in client.post("/v1/embed", json={}).headers


def test_an_unread_small_body_is_discarded_and_the_connection_goes_on(client):
    body = b"GET / HTTP/1.1\r\n" * 50_000  # close to the largest body, and not to be read as a request
    head = f"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
    with dial(client) as connection:
        for _ in range(2):
            connection.sendall(head + b"\r\n" + body + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while b'{"status":"ok"}' not in received:
                got = connection.recv(65536)
                assert got, received
                received += got
            assert (received.count(b"HTTP/1.1 404"), received.count(b"HTTP/1.1 200")) == (1, 1)
    for more in (b"", b"Connection: keep-alive\r\n"):  # a client that asks to close gets the whole answer
        request = head + b"Connection: close\r\n" + more + b"\r\n" + body
        with dial(client, request) as connection, connection.makefile("rb") as answer:
            assert b"404" in answer.read().partition(b"\r\n")[0]


def test_the_host_header_appears_in_no_redirect(client):
    """A redirect would use it with http://: behind a TLS proxy a client would send its key unencrypted."""
    answer = client.get("/v1/models/", headers={"host": "elsewhere.example"})
    check(answer, 404, "not-found")
    assert "location" not in answer.headers


@pytest.mark.parametrize(("target", "status"), [("POST /nothing", b" 404 "), ("GET /healthz", b" 200 ")])
def test_an_unread_body_after_expect_100_continue_closes_the_connection(client, target, status):
    """Else the next request of a client that sends no body would be read as the body."""
    head = f"{target} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 40\r\n\r\n"
    with dial(client, head.encode()) as connection, connection.makefile("rb") as answer:
        received = answer.read()
    assert status in received.partition(b"\r\n")[0]
    assert b"connection: close" in received
    assert b"100 Continue" not in received


@pytest.mark.parametrize("body", [0, 200_000])
def test_endless_headers_are_refused(client, body):
    size = server.HEAD_BYTES
    for head in (b"GET /", b"GET / HTTP/1.1\r\nX-Long: ", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (size // 6)):
        with dial(client) as connection:
            with suppress(OSError):  # the service may close while this client writes
                connection.sendall(head)
                for _ in range(2 * size // 1000):
                    connection.sendall(b"x" * 1000)
                    time.sleep(0.0005)
            with suppress(ConnectionResetError):
                assert b" 400 " in connection.recv(65536)
    request = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nX: %s\r\n\r\n"
    for length, status in ((size - 100, b" 404 "), (size, b" 400 ")):
        assert status in answered(client, request % (body, b"x" * length) + b"x" * body)


def test_a_client_that_disconnects_within_a_request(client, picture):
    body = picture("red")
    request = picture_head(len(body)) + body
    for sent in (30, len(request) - len(body), len(request) - len(body) // 2, len(request)):
        dial(client, request[:sent]).close()
    assert b"400" in answered(client, b"NONSENSE\r\n\r\n")


def answered(client, data: bytes) -> bytes:
    with dial(client, data) as connection:
        return connection.recv(65536)


@pytest.mark.parametrize(
    ("route", "body", "word"),
    [
        ("classify", b'{"image": {"b64": ""}, "labels": [' + b"1," * 500_000 + b"1]}", "labels.0"),
        ("embed", b'{"inputs": [' + b"1," * 500_000 + b"1]}", "inputs.0"),
        ("embed", b'{"inputs": [{' + b",".join(b'"%d": 1' % i for i in range(100_000)) + b"}]}", "100000"),
        ("embed", b'{"inputs": [' + b'{"text": "a"},' * 200_000 + b'{"text": "a"}]}', "10000"),
        ("classify", b"{" + b",".join(b'"%d": 1' % i for i in range(200_000)) + b"}", "200000"),
        ("classify", b'{"' + b"x" * 1_000_000 + b'": 1}', "no such field"),
    ],
)
def test_a_body_with_a_million_faults_gets_a_short_answer(client, route, body, word):
    answer = client.post(f"/v1/{route}", **raw(body, JSON))
    problem = check(answer, 422, "invalid-request", word)
    assert len(problem["errors"]) < 4
    assert len(answer.content) < 2000
