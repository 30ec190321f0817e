"""Triton's own client, `tritonclient.http`, against a live service: each of its methods.

The oracle is the client: what it packs, unpacks and raises. Vectors are those of the colours of conftest.py.
"""

import inspect
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from calmclip.service.statistics import Statistics

TEXT, IMAGE, REGIONS = "colours-int8.text", "colours-int8.image", "colours-int8.regions"
RED, GREEN, YELLOW = 1, 2, 4  # ids
HALF = 0.5**0.5
GRAPHS = {f"colours-int8.{role}" for role in ("dense", "image", "regions", "text")}


def opened(client: httpx.Client, **options: object) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}", **options)


@pytest.fixture(scope="module")
def sdk(client):
    with opened(client) as inner:
        yield inner


def given(name: str, datatype: str, array: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    return tensor.set_data_from_numpy(array, binary_data=binary)


def words(*rows: list[int], binary: bool = True) -> list[triton.InferInput]:
    ids = np.array(rows, np.int64)
    return [given("ids", "INT64", ids, binary=binary), given("mask", "INT64", np.ones_like(ids), binary=binary)]


def pixels(*colours: tuple[float, float, float], dtype: type = np.float32) -> np.ndarray:
    return np.array(colours, dtype)[:, :, None, None].repeat(8, 2).repeat(8, 3)


def test_health_and_metadata(sdk):
    assert sdk.is_server_live()
    assert sdk.is_server_ready()
    assert sdk.is_model_ready(TEXT)
    assert sdk.is_model_ready(TEXT, "1")
    assert not sdk.is_model_ready(TEXT, "2")
    assert not sdk.is_model_ready("colours-int8.detect")
    assert sdk.get_server_metadata()["name"] == "calmclip"
    metadata = sdk.get_model_metadata(TEXT)
    assert metadata["versions"] == ["1"]
    assert metadata == sdk.get_model_metadata(TEXT, "1")
    assert [each["name"] for each in metadata["inputs"]] == ["ids", "mask"]


def test_configuration(sdk):
    """Dimensions are without the batch's, as in Triton's `config.pbtxt`."""
    config = sdk.get_model_config(IMAGE)
    assert config["max_batch_size"] == 256
    assert config["input"] == [{"name": "pixels", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}]
    assert config["output"] == [{"name": "image_embeds", "data_type": "TYPE_FP32", "dims": [3]}]
    assert (config["backend"], config["default_model_filename"]) == ("onnxruntime", "image.onnx")
    assert config["dynamic_batching"] == {"preferred_batch_size": [8], "max_queue_delay_microseconds": 2000}
    assert config == sdk.get_model_config(IMAGE, "1")
    assert sdk.get_model_config(TEXT)["input"][0]["dims"] == [-1]


def test_the_repository(sdk, client):
    index = sdk.get_model_repository_index()
    assert {entry["name"] for entry in index} == GRAPHS
    assert {(entry["version"], entry["state"], entry["reason"]) for entry in index} == {("1", "READY", "")}
    assert client.post("/v2/repository/index", json={"ready": True}).json() == index


def test_a_bundle_that_does_not_load_is_in_the_index(settings, serve, bundles, tmp_path):
    shutil.copytree(bundles, tmp_path / "bundles")
    shutil.copytree(bundles / "colours-int8", tmp_path / "bundles" / "broken")
    (tmp_path / "bundles" / "broken" / "image.onnx").write_bytes(b"changed")
    with serve(settings(bundles_dir=tmp_path / "bundles"), ready=False) as client:
        while not (client.get("/readyz").json()["loaded"] and client.get("/readyz").json()["failed"]):
            time.sleep(0.01)
        with opened(client) as sdk:
            broken = {entry["name"]: entry for entry in sdk.get_model_repository_index()}["broken"]
            assert not sdk.is_server_ready()
        assert (broken["state"], "image.onnx" in broken["reason"]) == ("UNAVAILABLE", True)
        names = {entry["name"] for entry in client.post("/v2/repository/index", json={"ready": True}).json()}
        assert names == GRAPHS


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_infer_in_json_and_binary_compressed_both_ways(sdk, binary, coding):
    outputs = [triton.InferRequestedOutput("text_embeds", binary_data=binary)]
    how = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    result = sdk.infer(TEXT, words([RED, 0], [YELLOW, 0], binary=binary), outputs=outputs, request_id="42", **how)
    assert result.as_numpy("text_embeds") == pytest.approx(np.array([[1, 0, 0], [HALF, HALF, 0]]))
    assert result.get_response()["id"] == "42"
    assert result.get_output("text_embeds")["datatype"] == "FP32"
    again = sdk.infer(TEXT, words([RED, 0], [YELLOW, 0]), model_version="1", **how)  # all outputs, binary
    assert (again.as_numpy("text_embeds") == result.as_numpy("text_embeds")).all()


def test_the_answer_is_compressed_on_the_wire(client):
    ones = np.zeros((8, 3, 8, 8), np.float32)
    body, length = triton.InferenceServerClient.generate_request_body([given("pixels", "FP32", ones)])
    sent = {"content": body, "headers": {"inference-header-content-length": str(length), "accept-encoding": "gzip"}}
    answer = client.post("/v2/models/colours-int8.dense/infer", **sent)
    assert answer.headers["content-encoding"] == "gzip"
    assert int(answer.headers["content-length"]) < len(answer.content) / 5
    length = int(answer.headers["inference-header-content-length"])
    result = triton.InferenceServerClient.parse_response_body(answer.content, header_length=length)
    assert (result.as_numpy("patches") == 0).all()
    sent["headers"]["accept-encoding"] = "gzip, deflate"  # what libraries send by themselves
    assert "content-encoding" not in client.post("/v2/models/colours-int8.dense/infer", **sent).headers


@pytest.mark.parametrize("binary", [True, False])
def test_fp16_in_and_out(sdk, binary):
    """The oracle is numpy's float16. An 8-bit picture's values fit exactly into it."""
    half = pixels((0.25, 0.5, 1.0), (1.0, 0.0, 0.5), dtype=np.float16)
    exact = half[:, :, 0, 0].astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    if binary:
        tensor = given("pixels", "FP16", half)
    else:  # the client refuses FP16 in JSON; other clients send numbers
        tensor = triton.InferInput("pixels", list(half.shape), "FP16")
        tensor._data = half.ravel().tolist()
    full = sdk.infer(IMAGE, [tensor]).as_numpy("image_embeds")
    assert (full.dtype, full) == (np.float32, pytest.approx(exact, abs=1e-6))
    outputs = [triton.InferRequestedOutput("image_embeds", binary_data=binary)]
    result = sdk.infer(IMAGE, [tensor], outputs=outputs, parameters={"output_datatype": "FP16"})
    assert result.get_output("image_embeds")["datatype"] == "FP16"
    assert (result.as_numpy("image_embeds") == full.astype(np.float16)).all()
    assert result.as_numpy("image_embeds").dtype == np.float16


def test_fp16_is_not_for_integers_and_not_beyond_its_range(sdk, client):
    with pytest.raises(InferenceServerException, match="input 'ids' is float16; expected int64"):
        sdk.infer(TEXT, [given("ids", "FP16", np.ones((1, 1), np.float16)), words([1])[1]])
    with pytest.raises(InferenceServerException, match="out of the range of FP16"):
        sdk.infer(
            "colours-int8.dense",
            [given("pixels", "FP32", np.full((1, 3, 8, 8), 1e6, np.float32))],
            parameters={"output_datatype": "FP16"},
        )


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_texts_as_bytes(sdk, client, binary, shape):
    """The service tokenizes them; the oracle is /v1/embed."""
    texts = ["a red thing", "Yellow"]
    array = np.array([text.encode() for text in texts], object).reshape(shape)
    result = sdk.infer(TEXT, [given("text", "BYTES", array, binary=binary)])
    wanted = client.post("/v1/embed", json={"inputs": [{"text": text} for text in texts]}).json()["embeddings"]
    assert result.as_numpy("text_embeds") == pytest.approx(np.array(wanted), abs=1e-6)


def test_pictures_as_bytes(sdk, picture):
    """The service decodes and resizes them."""
    files = np.array([picture("red"), picture("blue", kind="JPEG")], object)
    result = sdk.infer(IMAGE, [given("picture", "BYTES", files)])
    assert result.as_numpy("image_embeds") == pytest.approx(np.array([[1, 0, 0], [0, 0, 1]]), abs=0.02)
    quarters = np.array([picture("red", "green", "blue", "white", size=(64, 64))], object)
    result = sdk.infer(REGIONS, [given("picture", "BYTES", quarters)], outputs=[triton.InferRequestedOutput("boxes")])
    assert result.as_numpy("boxes").shape == (1, 4, 4)
    assert result.as_numpy("class_embeds") is None


def element(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    ("graph", "name", "shape", "data", "says"),
    [
        (TEXT, "text", [1], element(b"red")[:-1], "has 0 complete elements"),
        (TEXT, "text", [2], element(b"red"), "has 1 complete elements and 0 bytes after them; its `shape` is [2]"),
        (TEXT, "text", [1], element(b"red") + b"xx", "has 1 complete elements and 2 bytes after them"),
        (TEXT, "text", [1], b"\xff\xff\xff\xff", "has 0 complete elements"),
        (TEXT, "text", [0], b"", "holds nothing"),
        (TEXT, "text", [1], element(b"\xff"), "is not UTF-8"),
        (TEXT, "text", [1], element(b""), "text 0 is empty"),
        (TEXT, "text", [1], element(b"red " * 20), "has 20 tokens"),
        (TEXT, "text", [257], element(b"red") * 257, "has 257 rows; at most 256"),
        (TEXT, "picture", [1], element(b"red"), "takes BYTES as the input 'text' alone; the inputs ['picture']"),
        (IMAGE, "picture", [2], element(b"no") * 2, "picture 0: "),
        (IMAGE, "text", [1], element(b"red"), "takes BYTES as the input 'picture' alone"),
    ],
)
def test_invalid_bytes(client, graph, name, shape, data, says):
    tensor = {"name": name, "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = client.post(
        f"/v2/models/{graph}/infer", content=head + data, headers={"inference-header-content-length": str(len(head))}
    )
    assert answer.status_code in (415, 422), answer.text
    assert says in answer.json()["error"], answer.text


def test_pictures_in_json_and_other_types_are_refused(client):
    for graph, name, data, says in (
        (IMAGE, "picture", ["x"], "send files as binary data"),
        (TEXT, "text", [1], "must be BYTES"),
        (TEXT, "text", [["a"], ["b", "c"]], "must be BYTES"),
        (TEXT, "text", ["\ud800"], "not JSON"),
    ):
        tensor = {"name": name, "datatype": "BYTES", "shape": [1], "data": data}
        answer = client.post(f"/v2/models/{graph}/infer", content=json.dumps({"inputs": [tensor]}))
        assert (answer.status_code, says in answer.json()["error"]) == (422, True), answer.text


def test_a_picture_as_bytes_counts_its_pixels(settings, serve, picture):
    with serve(settings(limits={"image_pixels": 5000})) as client, opened(client) as sdk:
        with pytest.raises(InferenceServerException, match=r"picture 0: .*5100.*at most 5000") as raised:
            sdk.infer(IMAGE, [given("picture", "BYTES", np.array([picture("red", size=(100, 51))], object))])
        assert raised.value.status() == "413"


def test_many_requests_at_once_asynchronously(client):
    """Merged in batches; each gets its own rows."""
    with opened(client, concurrency=8) as sdk:
        rows = [[RED], [GREEN], [YELLOW]] * 12
        waiting = [sdk.async_infer(TEXT, words(row), request_compression_algorithm="gzip") for row in rows]
        got = np.concatenate([each.get_result().as_numpy("text_embeds") for each in waiting])
    assert got == pytest.approx(np.array([[1, 0, 0], [0, 1, 0], [HALF, HALF, 0]] * 12))


def test_a_client_for_each_of_several_threads(client):
    def ask(row: list[int]) -> np.ndarray:
        with opened(client) as sdk:
            return sdk.infer(TEXT, words(row)).as_numpy("text_embeds")[0]

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(ask, [[RED], [GREEN]] * 6))
    assert np.array(got) == pytest.approx(np.array([[1, 0, 0], [0, 1, 0]] * 6))


def test_statistics_are_real(settings, serve, monkeypatch):
    """Three rows in one request, two in the next; then a request that the graph refuses."""
    with serve(settings()) as client, opened(client) as sdk:

        def stats() -> dict:
            (each,) = sdk.get_inference_statistics(TEXT)["model_stats"]
            return each

        none = stats()
        assert (none["inference_count"], none["execution_count"], none["last_inference"]) == (0, 0, 0)
        before = time.time()
        sdk.infer(TEXT, words([RED], [GREEN], [RED]))
        sdk.infer(TEXT, words([RED], [GREEN]))
        client.post("/v1/embed", json={"inputs": [{"text": "blue"}]})  # all tasks count
        some = stats()
        assert some == stats()
        assert (some["name"], some["version"]) == (TEXT, "1")
        assert (some["inference_count"], some["execution_count"]) == (6, 3)
        assert before - 1 <= some["last_inference"] / 1000 <= time.time() + 1
        assert {each["batch_size"]: each["compute_infer"]["count"] for each in some["batch_stats"]} == {
            1: 1,
            2: 1,
            3: 1,
        }
        spent = some["inference_stats"]
        assert [spent[name]["count"] for name in ("success", "fail", "queue", "compute_infer")] == [3, 0, 3, 3]
        assert 0 < spent["compute_infer"]["ns"] <= spent["success"]["ns"] < 20e9
        assert sum(each["compute_infer"]["ns"] for each in some["batch_stats"]) == spent["compute_infer"]["ns"]
        every = sdk.get_inference_statistics()["model_stats"]
        assert {each["name"] for each in every} == GRAPHS
        assert some in every
        assert sdk.get_inference_statistics(TEXT, "1")["model_stats"] == [some]
        with pytest.raises(InferenceServerException):
            sdk.infer(TEXT, words([99]))  # refused before the graph, so no call of it
        assert stats()["inference_stats"]["fail"]["count"] == 0


def test_statistics_by_hand():
    statistics = Statistics()
    statistics.ran(2, 0.5, 0.25, 0.125)
    statistics.ran(2, 1.5)
    statistics.ran(1, 1.0)
    statistics.answered(3.0, 0.5)
    statistics.broke(2.0)
    assert (statistics.rows, statistics.runs) == (5, 3)
    compute = statistics.compute
    assert [(s.count, s.ns) for s in (compute.input, compute.infer, compute.output)] == [
        (3, 250_000_000),
        (3, 3_000_000_000),
        (3, 125_000_000),
    ]
    assert [(n, c.infer.count, c.infer.ns) for n, c in statistics.sizes.items()] == [
        (2, 2, 2_000_000_000),
        (1, 1, 1_000_000_000),
    ]
    assert (statistics.calls.ns, statistics.queue.ns, statistics.failed.ns) == (3 * 10**9, 5 * 10**8, 2 * 10**9)


NOT_SUPPORTED = {
    "load_model": (TEXT,),
    "unload_model": (TEXT,),
    "update_trace_settings": (TEXT, {"trace_level": "OFF"}),
    "get_trace_settings": (TEXT,),
    "update_log_settings": ({"log_info": False},),
    "get_log_settings": (),
    "get_system_shared_memory_status": (),
    "register_system_shared_memory": ("a", "/a", 16),
    "unregister_system_shared_memory": ("a",),
    "get_cuda_shared_memory_status": ("a",),
    "register_cuda_shared_memory": ("a", b"handle", 0, 16),
    "unregister_cuda_shared_memory": (),
}


@pytest.mark.parametrize("method", NOT_SUPPORTED)
def test_what_is_not_supported_says_what_to_do(sdk, method):
    with pytest.raises(InferenceServerException) as raised:
        getattr(sdk, method)(*NOT_SUPPORTED[method])
    assert raised.value.status() == "400"
    assert "is not supported: " in raised.value.message()


@pytest.mark.parametrize(
    ("infer", "says"),
    [
        ({"priority": 1}, "parameters.priority"),
        ({"timeout": 1000}, "parameters.timeout"),
        ({"sequence_id": 7}, "parameters.sequence_id"),
        ({"parameters": {"mine": 1}}, "parameters.mine"),
        ({"outputs": [triton.InferRequestedOutput("text_embeds", class_count=2)]}, "classification"),
        ({"model_version": "2"}, "the version '1' alone; '2' was asked for"),
    ],
)
def test_parameters_that_are_not_supported_are_errors_of_the_client(sdk, infer, says):
    with pytest.raises(InferenceServerException, match=says):
        sdk.infer(TEXT, words([RED]), **infer)


def test_an_unknown_path_has_the_protocols_error_too(client):
    answer = client.get("/v2/nothing")
    assert (answer.status_code, answer.json()["error"]) == (404, answer.json()["detail"])
    assert "error" not in client.get("/v1/nothing").json()


def test_every_method_of_the_client_is_called_above():
    """So that the methods of a new version do not stay unknown."""
    members = inspect.getmembers(triton.InferenceServerClient, inspect.isfunction)
    public = {name for name, _ in members if not name.startswith("_")} - {"close", "plugin"}
    public -= {"register_plugin", "unregister_plugin"}  # of the client alone
    text = Path(__file__).read_text(encoding="utf-8")
    called = {name for name in public if f"sdk.{name}(" in text or f"InferenceServerClient.{name}(" in text}
    assert called | NOT_SUPPORTED.keys() == public
