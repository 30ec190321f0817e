"""Compressed bodies: packed by Python's gzip and zlib, read by every shape of body, bounded after unpacking."""

import gzip
import json
import random
import zlib

import httpx
import pytest

from calmclip.models.errors import BadRequest
from calmclip.service import codings
from calmclip.service.codings import Inflater, pack, wanted
from tests.asking import raw

PACKS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}
LIMIT = 1 << 20
GZIP = gzip.compress(b"{}", mtime=0)  # the same in each process, because tests are named by it


@pytest.fixture(scope="module")
def small(serve, bundles, tmp_path_factory):
    """A service with small limits."""
    from calmclip.service.settings import Settings

    data = tmp_path_factory.mktemp("data")
    limits = {"body_bytes": LIMIT, "image_bytes": LIMIT // 2}
    with serve(Settings(bundles_dir=bundles, data_dir=data, threads=1, limits=limits)) as client:
        yield client


def send(client: httpx.Client, path: str, body: bytes, kind: str, coding: str, *, chunks: int = 0):
    """``chunks``: so many chunks without Content-Length."""
    size = -(-len(body) // max(chunks, 1))
    content = (body[i : i + size] for i in range(0, len(body), size)) if chunks else body
    return client.post(path, content=content, headers={"content-type": kind, "content-encoding": coding})


@pytest.mark.parametrize("coding", PACKS)
@pytest.mark.parametrize("chunks", [0, 7])
def test_every_shape_of_body_may_be_compressed(small, picture, coding, chunks):
    data, pack_ = picture("red"), PACKS[coding]
    body = pack_(json.dumps({"inputs": [{"text": "red"}]}).encode())
    answer = send(small, "/v1/embed", body, "application/json", coding, chunks=chunks)
    assert answer.json()["embeddings"] == [[1, 0, 0]], answer.text
    answer = send(small, "/v1/classify?labels=red", pack_(data), "image/png", coding, chunks=chunks)
    assert answer.json()["labels"][0]["label"] == "red", answer.text
    form = httpx.Request("POST", "http://x", data={"labels": "red"}, files={"image": ("a.png", data)})
    answer = send(small, "/v1/classify", pack_(form.read()), form.headers["content-type"], coding, chunks=chunks)
    assert answer.json()["labels"][0]["label"] == "red", answer.text
    head = json.dumps(
        {"inputs": [{"name": n, "datatype": "INT64", "shape": [1, 1], "data": [1]} for n in ("ids", "mask")]}
    )
    answer = send(small, "/v2/models/colours-int8.text/infer", pack_(head.encode()), "", coding, chunks=chunks)
    assert answer.json()["outputs"][0]["data"] == [1, 0, 0], answer.text


def test_several_members_of_gzip_are_one_body(small):
    body = b"".join(map(gzip.compress, (b'{"inputs": [{"te', b"", b'xt": "red"}]}')))
    assert send(small, "/v1/embed", body, "application/json", "GZIP").json()["embeddings"] == [[1, 0, 0]]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("chunks", [0, 3])
def test_a_bomb_ends_at_the_limit(small, coding, chunks):
    """A body that unpacks to a thousand times its size. The largest that fits is read: its JSON is blank."""
    for path, kind, limit, slug in (
        ("/v1/embed", "application/json", LIMIT, "body-too-large"),
        ("/v1/classify?labels=red", "image/png", LIMIT // 2, "image-too-large"),
    ):
        bomb = PACKS[coding](b" " * (limit + 1))
        assert len(bomb) < limit // 500
        answer = send(small, path, bomb, kind, coding, chunks=chunks)
        assert (answer.status_code, answer.json()["type"]) == (413, f"/problems/{slug}"), answer.text
        assert f"unpacks to more than {limit} bytes" in answer.json()["detail"]
        fits = send(small, path, PACKS[coding](b" " * limit), kind, coding, chunks=chunks)
        assert fits.status_code in (415, 422), fits.text
    part = b"--x\r\ncontent-disposition: form-data; name=labels\r\n\r\n" + b" " * (LIMIT // 2 - 100) + b"\r\n"
    form = PACKS[coding](part * 3)
    answer = send(small, "/v1/classify", form, "multipart/form-data; boundary=x", coding, chunks=chunks)
    assert answer.status_code == 413


def test_unpacked_bytes_count_in_admission(settings, serve):
    """A request alone may hold any number of bytes; beside it, what unpacks to too much is turned away."""
    body = gzip.compress(json.dumps({"inputs": [{"text": "red"}], "prompt_name": "x" * 3000}).encode())
    with serve(settings(queue={"max_bytes": 2000})) as client:
        admission = client_admission(client)
        assert send(client, "/v1/embed", body, "application/json", "gzip").status_code == 422
        admission.bytes += 1000  # of another request
        answer = send(client, "/v1/embed", body, "application/json", "gzip")
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/overloaded")
        admission.bytes -= 1000
        assert admission.bytes == 0


def client_admission(client):
    """The admission of the app that this process serves."""
    import gc

    from calmclip.service.admission import Admission

    return next(gate for gate in gc.get_objects() if isinstance(gate, Admission) and gate.max_bytes == 2000)


@pytest.mark.parametrize(
    ("coding", "body", "status", "says"),
    [
        ("gzip", b'{"inputs": []}', 422, "says gzip, and the body is not: "),
        ("gzip", GZIP[:-1], 422, "it ends too early"),
        ("gzip", GZIP[:-8] + bytes(8), 422, "incorrect data check"),
        ("gzip", GZIP + b"more", 422, "incorrect header check"),
        ("gzip", b"", 422, "it ends too early"),
        ("deflate", zlib.compress(b"{}") + b"more", 422, "4 bytes or more follow its end"),
        ("deflate", GZIP, 422, "says deflate, and the body is not"),
        ("br", b"{}", 415, "is 'br'; expected one of gzip, deflate, or no compression"),
        ("gzip, gzip", b"{}", 415, "is 'gzip, gzip'; expected one of"),
        ("é" * 50, b"{}", 415, "expected one of gzip"),
    ],
)
def test_a_body_that_cannot_be_unpacked(small, coding, body, status, says):
    answer = small.post(
        "/v1/embed",
        content=body,
        headers=[(b"content-encoding", coding.encode()), (b"content-type", b"application/json")],
    )
    assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text
    assert answer.headers.get("accept-encoding") == ("gzip, deflate" if status == 415 else None)


def test_a_compressed_body_without_the_header_says_so(small):
    """It was a message about surrogates."""
    answer = small.post("/v1/embed", **raw(gzip.compress(b"{}"), "application/json"))
    assert answer.status_code == 422
    assert "compressed" in answer.json()["detail"], answer.text


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_pieces_are_small_and_all_there_is(coding):
    rng = random.Random(1)
    data = rng.randbytes(3 * codings.PIECE) + bytes(40 * codings.PIECE)
    packed = PACKS[coding](data)
    for size in (1 << 12, len(packed)):
        inflater = Inflater(coding)
        pieces = [p for at in range(0, len(packed), size) for p in inflater.feed(packed[at : at + size])]
        inflater.end()
        assert b"".join(pieces) == data
        assert max(map(len, pieces)) <= codings.PIECE
    with pytest.raises(BadRequest, match="too early"):
        Inflater(coding).end()


@pytest.mark.parametrize(
    ("header", "coding"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("GZIP;q=0.5", "gzip"), ("gzip; q=0", ""), ("gzip;q=0.000", ""),
     ("gzip, deflate", ""), ("gzip, deflate, br, zstd", ""), ("*", ""), ("identity", ""), ("", ""), ("br", "")],
)  # fmt: skip
def test_an_answer_is_compressed_only_if_one_coding_is_named(header, coding):
    assert wanted({"accept-encoding": header}) == coding
    assert wanted({}) == ""


def test_packed_answers_unpack_by_python():
    assert gzip.decompress(pack(b"a" * 1000, "gzip")) == zlib.decompress(pack(b"a" * 1000, "deflate")) == b"a" * 1000
