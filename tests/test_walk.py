"""All steps on a tiny random net: torch -> ONNX -> INT8 -> bundle -> a real server -> HTTP.

The oracle is transformers on the checkpoint, which shares no step with the answer.
"""

import base64
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from calmclip.models.preprocess.image import decode
from calmclip.models.runner import open_bundle
from calmclip.service.client import Client
from tests import process
from tests.asking import b64

LABELS = ["a cat", "two dogs", "red", "a photo of a cup", "green green"]


@pytest.fixture(scope="module")
def server(tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tiny_bundles, tmp_path_factory.mktemp("data")) as client:
        yield client


@contextmanager
def serving(bundles: Path, data: Path) -> Iterator[httpx.Client]:
    """A client of a server that ends with status 0 after SIGTERM."""
    with process.serving(bundles, data, "--threads", "1") as (running, client, _):
        yield client
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0


@pytest.fixture(scope="module")
def oracle(tiny_hf_clip: Path):
    """(pictures, texts) -> unit vectors of both, and the logit scale, by transformers from the checkpoint."""
    model = transformers.CLIPModel.from_pretrained(tiny_hf_clip).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tiny_hf_clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_hf_clip)

    def unit(output: object) -> np.ndarray:
        return torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1).numpy()

    def embed(pictures: list[Path], texts: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
        with torch.no_grad():
            pixels = processor([Image.open(p).convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]
            images = unit(model.get_image_features(pixel_values=pixels))
            ids = [tokenizer([t], return_tensors="pt", return_token_type_ids=False) for t in texts]
            words = np.concatenate([unit(model.get_text_features(**tokens)) for tokens in ids])
        return images, words, float(model.logit_scale.detach().exp())

    return embed


def test_classify_over_http_agrees_with_the_checkpoint(server: httpx.Client, oracle, photographs):
    images, texts, scale = oracle([photographs["cat"]], [f"a photo of a {label}." for label in LABELS])
    logits = scale * images.astype(np.float64) @ texts.T
    want = (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[0]
    for model, tolerance in (("tiny-float", 1e-4), ("tiny-int8", 0.15)):
        files = {"image": photographs["cat"].read_bytes()}
        answer = server.post("/v1/classify", files=files, data={"labels": LABELS, "model": model})
        assert answer.status_code == 200, answer.text
        rows = answer.json()["labels"]
        assert sorted(row["index"] for row in rows) == list(range(len(LABELS)))
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert {row["label"]: row["score"] for row in rows} == pytest.approx(
            dict(zip(LABELS, want, strict=True)), abs=tolerance
        )


def test_vectors_over_http_agree_with_the_checkpoint(server: httpx.Client, oracle, photographs):
    images, texts, _ = oracle([photographs["rocket"]], ["two dogs"])
    inputs = [{"text": "two dogs"}, {"image": b64(photographs["rocket"].read_bytes())}]
    for model, least in (("tiny-float", 1 - 1e-6), ("tiny-int8", 0.97)):
        answer = server.post("/v1/embed", json={"model": model, "inputs": inputs})
        vectors = np.array(answer.json()["embeddings"])
        assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-3)
        assert vectors[0] @ texts[0] > least
        assert vectors[1] @ images[0] > least


def test_all_protocols_of_the_service_give_the_vectors_of_the_runner(
    server: httpx.Client, tiny_bundles: Path, photographs
):
    """The client, OpenAI's embeddings, and the Open Inference Protocol as JSON and as bytes run one graph."""
    runner = open_bundle(tiny_bundles / "tiny-int8")
    picture = photographs["cat"]
    want = runner.embed(texts=["two dogs"], images=[picture])

    with Client(str(server.base_url)) as client:
        answer = client.embed(texts=["two dogs"], images=[picture], model="tiny-int8")
        assert np.array(answer.embeddings) == pytest.approx(want, abs=1e-6)
        ranked = client.classify(picture, LABELS, model="tiny-int8").labels
        assert [row.label for row in ranked] == [row.label for row in runner.classify(picture, LABELS)]

    uri = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    body = {"model": "tiny-int8", "input": ["two dogs", uri], "encoding_format": "base64"}
    data = server.post("/v1/embeddings", json=body).json()["data"]
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data]
    assert np.stack(rows) == pytest.approx(want, abs=1e-6)

    pixels = runner.bundle.image().prepare(decode(picture.read_bytes()))[0]
    tensor = {"name": "pixels", "datatype": "FP32", "shape": list(pixels.shape)}
    head = {"inputs": [tensor | {"parameters": {"binary_data_size": pixels.nbytes}}]}
    head["parameters"] = {"binary_data_output": True}
    text, data = json.dumps(head).encode(), pixels.astype("<f4").tobytes()
    path, length = "/v2/models/tiny-int8.image/infer", "Inference-Header-Content-Length"
    answer = server.post(path, content=text + data, headers={length: str(len(text))})
    vector = np.frombuffer(answer.content[int(answer.headers[length]) :], "<f4")
    assert vector == pytest.approx(want[1], abs=1e-6)
    answer = server.post(path, json={"inputs": [tensor | {"data": pixels.tolist()}]}).json()
    assert answer["outputs"][0]["data"] == pytest.approx(want[1], abs=1e-6)
