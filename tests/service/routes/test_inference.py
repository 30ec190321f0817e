"""The Open Inference Protocol over the colours of tests/service/conftest.py; bytes are packed by `struct`.

Requests and answers are those of the specification and of the binary tensor data extension, field by field.
"""

import json
import math
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

TEXT = "/v2/models/colours-int8.text"
IMAGE = "/v2/models/colours-int8.image"
LENGTH = "inference-header-content-length"
RED, GREEN, YELLOW = 1, 2, 4  # ids
HALF = 0.5**0.5


def tensor(name: str, datatype: str, shape: list[int], **more: object) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": shape, **more}


def words(*rows: list[int]) -> list[dict[str, object]]:
    """ids and mask, flat like the specification's examples."""
    flat = [token for row in rows for token in row]
    shape = [len(rows), len(rows[0])]
    return [tensor("ids", "INT64", shape, data=flat), tensor("mask", "INT64", shape, data=[1] * len(flat))]


def pixels(*colours: tuple[float, float, float]) -> np.ndarray:
    return np.array(colours, np.float32)[:, :, None, None].repeat(8, 2).repeat(8, 3)


def behind(body: dict[str, object], *data: bytes) -> dict[str, object]:
    """A request with tensors behind its JSON."""
    head = json.dumps(body).encode()
    return {"content": head + b"".join(data), "headers": {LENGTH: str(len(head))}}


def test_server(client):
    metadata = client.get("/v2").json()
    assert metadata.keys() == {"name", "version", "extensions"}
    assert metadata["extensions"] == ["binary_tensor_data", "model_configuration", "statistics"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


def test_metadata(client):
    assert client.get(TEXT).json() == {
        "name": "colours-int8.text",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [tensor("ids", "INT64", [-1, -1]), tensor("mask", "INT64", [-1, -1])],
        "outputs": [tensor("text_embeds", "FP32", [-1, 3])],
    }
    assert client.get(f"{TEXT}/ready").json() == {"name": "colours-int8.text", "ready": True}


@pytest.mark.parametrize("name", ["colours-int8", "colours-int8.detect", "gpt"])
@pytest.mark.parametrize("tail", ["", "/ready"])
def test_a_graph_that_is_not_served(client, name, tail):
    answer = client.get(f"/v2/models/{name}{tail}")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/model-not-found")
    assert answer.json()["known"] == [f"colours-int8.{role}" for role in ("dense", "image", "regions", "text")]


def test_a_raw_bundle_opens_all_its_graphs(settings, serve, bundle_maker, tmp_path):
    path = bundle_maker(tmp_path / "bundles").directory / "bundle.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"tasks": ["raw"]}))
    with serve(settings(bundles_dir=tmp_path / "bundles")) as client:
        (scores,) = (t for t in client.get("/v2/models/colours-int8.detect").json()["outputs"] if t["name"] == "scores")
        assert scores == tensor("scores", "FP32", [-1])
        sent = {"class_embeds": [1, 1, 3], "boxes": [1, 1, 4], "objectness": [1, 1], "text_embeds": [300, 3]}
        sent |= {key: [1] for key in ("iou_threshold", "sigma", "min_score")}
        inputs = [tensor(n, "FP32", shape, data=[1] * math.prod(shape)) for n, shape in sent.items()]
        inputs += [tensor(n, "INT64", [1], data=[1]) for n in ("method", "per_class", "max_output")]
        answer = client.post(
            "/v2/models/colours-int8.detect/infer", json={"inputs": inputs}
        )  # no batch axis, so 300 texts are allowed
        assert {output["name"]: output["data"] for output in answer.json()["outputs"]}["candidates"] == [300]


def test_json_in_json_out(client):
    answer = client.post(f"{TEXT}/infer", json={"id": "42", "inputs": words([RED, 0], [YELLOW, 0])})
    assert answer.headers["content-type"] == "application/json"
    assert LENGTH not in answer.headers
    body = answer.json()
    (output,) = body.pop("outputs")
    assert body == {"model_name": "colours-int8.text", "id": "42"}
    assert output.pop("data") == pytest.approx([1, 0, 0, HALF, HALF, 0])
    assert output == tensor("text_embeds", "FP32", [2, 3])


def test_nested_data_is_the_same(client):
    nested = [
        tensor("ids", "INT64", [2, 2], data=[[RED, GREEN], [GREEN, GREEN]]),
        tensor("mask", "INT64", [2, 2], data=[[1, 1], [1, 1]]),
    ]
    flat = client.post(f"{TEXT}/infer", json={"inputs": words([RED, GREEN], [GREEN, GREEN])}).json()
    assert client.post(f"{TEXT}/infer", json={"inputs": nested}).json() == flat
    assert flat["outputs"][0]["data"] == pytest.approx([HALF, HALF, 0, 0, 1, 0])


def test_bytes_in_bytes_out(client):
    shape = [1, 2]
    inputs = [tensor(name, "INT64", shape, parameters={"binary_data_size": 16}) for name in ("ids", "mask")]
    body = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    answer = client.post(f"{TEXT}/infer", **behind(body, struct.pack("<2q", RED, YELLOW), struct.pack("<2q", 0, 1)))
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[LENGTH])
    assert json.loads(answer.content[:length])["outputs"] == [
        tensor("text_embeds", "FP32", [1, 3], parameters={"binary_data_size": 12})
    ]
    assert struct.unpack("<3f", answer.content[length:]) == pytest.approx((HALF, HALF, 0))


def test_bytes_beside_json_and_an_output_that_overrides_the_request(client):
    ids, mask = words([GREEN])
    mask = tensor("mask", "INT64", [1, 1], parameters={"binary_data_size": 8})
    outputs = [{"name": "text_embeds", "parameters": {"binary_data": False}}]
    body = {"inputs": [mask, ids], "outputs": outputs, "parameters": {"binary_data_output": True}}
    answer = client.post(f"{TEXT}/infer", **behind(body, struct.pack("<q", 1)))
    assert answer.json()["outputs"][0]["data"] == [0, 1, 0]


def test_outputs_have_the_requested_order_and_form(client):
    data = pixels((0, 0, 1)).ravel().tolist()
    inputs = [tensor("pixels", "FP32", [1, 3, 8, 8], data=data)]
    outputs = [{"name": "boxes"}, {"name": "class_embeds", "parameters": {"binary_data": True}}]
    answer = client.post("/v2/models/colours-int8.regions/infer", json={"inputs": inputs, "outputs": outputs})
    length = int(answer.headers[LENGTH])
    boxes, embeds = json.loads(answer.content[:length])["outputs"]
    assert (boxes["name"], boxes["shape"], boxes["data"][4:8]) == ("boxes", [1, 4, 4], [4, 0, 8, 4])
    assert (embeds["name"], embeds["parameters"]) == ("class_embeds", {"binary_data_size": 48})
    assert np.frombuffer(answer.content[length:], "<f4").reshape(4, 3) == pytest.approx(np.array([[0, 0, 1]] * 4))


def test_a_faulty_request_does_not_fail_the_requests_that_are_merged_with_it(client):
    def ask(word: int):
        return client.post(f"{TEXT}/infer", json={"inputs": words([word])})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [RED, 99, GREEN, -1] * 10))
    assert [answer.status_code for answer in answers] == [200, 422, 200, 422] * 10


def of(datatype: str, shape: list[int], **more: object) -> dict[str, object]:
    return {"inputs": [tensor("pixels", datatype, shape, **more)]}


ONE = [1, 3, 8, 8]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "inputs: Field required"),
        ({"inputs": []}, r"takes the inputs ['pixels']; [] were given"),
        (of("FP64", ONE, data=[]), "inputs.0.datatype"),
        (of("INT64", ONE, data=[0] * 192), "input 'pixels' is int64; expected float32"),
        (of("FP32", [1, 3, 4, 16], data=[0] * 192), "has shape [1, 3, 4, 16]; expected ['B', 3, 8, 8]"),
        (of("FP32", [0, 3, 8, 8], data=[]), "it holds nothing"),
        (of("FP32", [192], data=[0] * 192), "has shape [192]; expected ['B', 3, 8, 8]"),
        (of("FP32", [-1, 3, 8, 8], data=[0] * 192), "inputs.0.shape.0"),
        (of("FP32", ONE, data=[0] * 191), "has shape [191]; its `shape` is [1, 3, 8, 8]"),
        (of("FP32", ONE, data=[[0] * 96] * 2), "has shape [2, 96]; its `shape` is [1, 3, 8, 8]"),
        (
            of("FP32", ONE, data=json.loads("[" * 200 + "0" + "]" * 200)),
            "has shape [1, 1, 1, 1, 1, 1, 1, 1]; its `shape` is",
        ),
        (of("FP32", ONE, data=[[0], [0, 0]]), "in rows of equal length"),
        (of("FP32", ONE, data=[0, [0]]), "in rows of equal length"),
        (of("FP32", ONE, data=["0" * 100_000] * 192), "must be FP32"),
        (of("FP32", ONE, data=["0"] * 192), "must be FP32"),
        (of("FP32", ONE, data=[None] * 192), "must be FP32"),
        (of("FP32", ONE, data=[True] * 192), "must be FP32"),
        (of("FP32", ONE, data=[1e39] * 192), "numbers out of the range of FP32"),
        (of("INT8", ONE, data=[1.5] * 192), "must be INT8"),
        (of("INT8", ONE, data=[128] * 192), "numbers out of the range of INT8"),
        (of("UINT8", ONE, data=[-1] * 192), "numbers out of the range of UINT8"),
        (of("INT64", ONE, data=[2**63] * 192), "numbers out of the range of INT64"),
        (of("BOOL", ONE, data=[1] * 192), "must be BOOL"),
        (of("FP32", ONE), "needs `data` or the parameter `binary_data_size`"),
        (of("FP32", ONE, data=[0], parameters={"binary_data_size": 0}), "one of them"),
        (of("FP32", ONE, data=[0] * 192, parameters={"shared_memory_region": "a"}), "shared_memory_region"),
        ({"inputs": [*of("FP32", ONE, data=[0] * 192)["inputs"]] * 2}, "'pixels' is given twice"),
        ({"inputs": [tensor("x", "FP32", ONE, data=[0] * 192)]}, "takes the inputs ['pixels']; ['x'] were given"),
        ({**of("FP32", ONE, data=[0] * 192), "outputs": [{"name": "y"}]}, "outputs asks for 'y'"),
        ({**of("FP32", ONE, data=[0] * 192), "parameters": {"priority": 1}}, "parameters.priority"),
        (of("FP32", [257, 3, 8, 8], data=[0] * 192 * 257), "has 257 rows; at most 256"),
    ],
)
def test_an_invalid_request_is_a_problem_with_the_protocols_error(client, body, says):
    answer = client.post(f"{IMAGE}/infer", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json"), answer.text
    assert says in answer.json()["detail"]
    assert answer.json()["error"] == answer.json()["detail"]


@pytest.mark.parametrize(
    ("datatype", "shape", "size", "data", "says"),
    [
        ("FP32", ONE, 768, b"", "`binary_data_size` is 768, and the body has 0 of them"),
        ("FP32", ONE, 768, bytes(767), "`binary_data_size` is 768, and the body has 767 of them"),
        ("FP32", ONE, 764, bytes(764), "768 bytes; `binary_data_size` is 764"),
        ("FP32", ONE, 768, bytes(769), "1 bytes follow the last input"),
        ("FP32", ONE, -1, b"", "inputs.0.parameters.binary_data_size"),
        ("BOOL", [2], 2, b"\x01\x02", "bytes other than 0 and 1"),
    ],
)
def test_invalid_bytes(client, datatype, shape, size, data, says):
    body = of(datatype, shape, parameters={"binary_data_size": size})
    answer = client.post(f"{IMAGE}/infer", **behind(body, data))
    assert (answer.status_code, says in answer.json()["detail"]) == (422, True), answer.text


@pytest.mark.parametrize("length", ["", "-1", "x", "100", "²", "9" * 5000, "0" * 5000])
def test_an_invalid_length_of_the_json(client, length):
    answer = client.post(f"{IMAGE}/infer", content=b'{"inputs": []}', headers={LENGTH: length.encode()})
    assert answer.status_code == 422
    assert "Inference-Header-Content-Length is " in answer.json()["detail"]


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"[" * 5000])
def test_a_body_that_is_not_json(client, content):
    answer = client.post(f"{IMAGE}/infer", content=content)
    assert (answer.status_code, "not JSON" in answer.json()["detail"]) == (422, True)


def test_limits_of_bodies_and_kinds(settings, serve):
    with serve(settings(limits={"body_bytes": 1024})) as client:
        answer = client.post(f"{IMAGE}/infer", content=b" " * 1025)
        assert (answer.status_code, answer.json()["type"]) == (413, "/problems/body-too-large")
        answer = client.post(f"{IMAGE}/infer", content=b"{}", headers={"content-type": "text/plain"})
        assert (answer.status_code, answer.json()["type"]) == (415, "/problems/unsupported-media-type")
