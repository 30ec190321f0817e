"""All steps of nets other than CLIP: transformers writes a directory, one command exports it, `calmclip check` accepts
it, and a real server answers `raw` and `embed` over HTTP as transformers does."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from calmclip.models.cli import main
from tests import tiny
from tests.test_walk import serving
from tests.tiny_layouts.decoders import decoder, reference, sentence_modules

TEXTS = ["a photo of a cat.", "two red dogs"]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sentences(tmp_path_factory.mktemp("checkpoints") / "sentences", "mean_tokens", {"Identity": 16})


def sealed(checkpoint: Path, out: Path) -> Path:
    assert main(["export", str(checkpoint), "--out", str(out), "--keep-float"]) == 0
    for bundle in out.iterdir():
        assert main(["check", bundle.name, "--bundles", str(out)]) == 0
        assert main(["show", bundle.name, "--bundles", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def server(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(sealed(sentences, tmp_path_factory.mktemp("bundles")), tmp_path_factory.mktemp("data")) as client:
        yield client


def infer(client: httpx.Client, graph: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The output of ``graph`` by the Open Inference Protocol, with numbers in JSON."""
    kinds = {"int64": "INT64", "float32": "FP32"}
    inputs = [
        {"name": name, "datatype": kinds[array.dtype.name], "shape": [*array.shape], "data": array.flatten().tolist()}
        for name, array in feeds.items()
    ]
    answer = client.post(f"/v2/models/{graph}/infer", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


@torch.no_grad()
def test_a_sentence_encoder_embeds_over_http_as_its_modules_do(server: httpx.Client, sentences: Path):
    encoder = transformers.BertModel.from_pretrained(sentences).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(sentences)(TEXTS, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    weights = mask[..., None].float()
    mean = (encoder(ids, attention_mask=mask).last_hidden_state * weights).sum(1) / weights.sum(1)
    layer = load_file(sentences / "2_Dense" / "model.safetensors")
    want = torch.nn.functional.normalize(mean @ layer["linear.weight"].T + layer["linear.bias"], dim=-1).numpy()
    models = {model["name"]: model for model in server.get("/v1/models").json()["models"]}
    assert {name.partition("-")[0] for name in models} == {"sentences"}
    for name in models:
        body = {"model": name, "inputs": [{"text": text} for text in TEXTS]}
        answer = server.post("/v1/embed", json=body)
        assert answer.status_code == 200, answer.text
        embedded = np.array(answer.json()["embeddings"])
        raw = infer(server, f"{name}.text", {"ids": ids.numpy(), "mask": mask.numpy()})
        for vectors in (embedded, raw):
            if name == "sentences-float":
                assert vectors == pytest.approx(want, abs=1e-4)
            assert (vectors * want).sum(-1).min() >= 0.999
    refused = server.post("/v1/classify", json={"image": {"b64": ""}, "labels": ["a"]})
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/task-not-served")


@pytest.mark.slow
@torch.no_grad()
def test_words_and_classes_over_http_are_those_of_transformers(tmp_path: Path, photographs: dict[str, Path]):
    for name, make in (("bert", tiny.bert), ("opt", tiny.opt), ("vit", tiny.vit)):
        sealed(make(tmp_path / name), tmp_path / "bundles" / name)
    folder = tmp_path / "all"
    folder.mkdir()
    for bundle in (tmp_path / "bundles").glob("*/*"):
        bundle.rename(folder / bundle.name)
    row = np.array([[598, 1, 2, 6, 599], [598, 7, 599, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    real, ids = torch.from_numpy(mask).bool(), torch.from_numpy(row)
    pixels = transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "vit")(
        Image.open(photographs["cat"]).convert("RGB"), return_tensors="np"
    )["pixel_values"]
    models = {
        "bert": transformers.BertForMaskedLM, "opt": transformers.OPTForCausalLM,
        "vit": transformers.ViTForImageClassification,
    }  # fmt: skip
    loaded = {name: kind.from_pretrained(tmp_path / name).eval() for name, kind in models.items()}
    with serving(folder, tmp_path / "data") as server:
        for graph, feeds, want in (
            ("bert-float.mlm", {"ids": row, "mask": mask}, loaded["bert"](ids, attention_mask=torch.from_numpy(mask))),
            ("opt-float.lm", {"ids": row}, loaded["opt"](ids)),
            ("vit-float.logits", {"pixels": pixels.astype(np.float32)}, loaded["vit"](torch.from_numpy(pixels))),
        ):
            answer, logits = infer(server, graph, feeds), want.logits
            if answer.ndim == 3:
                answer, logits = answer[real.numpy()], logits[real]
            assert answer == pytest.approx(logits.numpy(), abs=1e-4)
        refused = server.post(
            "/v2/models/opt-float.lm/infer",
            json={"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 1], "data": [600]}]},
        )
        assert (refused.status_code, "ids outside of the vocabulary" in refused.text) == (422, True)
        assert json.loads((folder / "vit-float" / "labels.json").read_bytes())[2] == "naïve café"


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_embeds_searches_and_shortens_over_http(tmp_path: Path):
    """Prompts by name and role, long texts, and a bank. The oracle is transformers on prompt and text as one text."""
    directory = sentence_modules(
        decoder(tmp_path / "qwen", "qwen3"), prompts={"query": "a photo of ", "document": ""}, context=24
    )
    model, tokenizer = reference(directory), transformers.AutoTokenizer.from_pretrained(directory)

    def vector(text: str) -> np.ndarray:
        last = model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(last, dim=0).numpy()

    with serving(sealed(directory, tmp_path / "bundles"), tmp_path / "data") as server:

        def post(path: str, **body: object) -> httpx.Response:
            return server.post(f"/v1/{path}", json=body)

        for name, prompt in ((None, ""), ("query", "a photo of "), ("document", "")):
            named = {} if name is None else {"prompt_name": name}
            answer = post("embed", model="qwen-float", inputs=[{"text": text} for text in TEXTS], **named)
            want = np.array([vector(prompt + text) for text in TEXTS])
            assert np.array(answer.json()["embeddings"]) == pytest.approx(want, abs=1e-4)
        unknown = post("embed", model="qwen-float", inputs=[{"text": "a"}], prompt_name="querry")
        assert (unknown.status_code, sorted(unknown.json()["known"])) == (422, ["document", "query"])

        assert server.put("/v1/collections/texts", json={"model": "qwen-float"}).status_code == 201
        items = [{"id": text, "text": text} for text in (*TEXTS, "green", "blue cats")]
        assert post("collections/texts/items", items=items).status_code == 200
        hits = post("collections/texts/search", query={"text": "a dog"}, top_k=4).json()["hits"]
        scores = {item["id"]: float(vector("a photo of a dog") @ vector(item["id"])) for item in items}
        assert [hit["id"] for hit in hits] == sorted(scores, key=scores.__getitem__, reverse=True)
        with np.load(io.BytesIO(server.get("/v1/collections/texts/bank").content)) as bank:
            order = [*bank["ids"]]
            assert bank["vectors"] == pytest.approx(np.array([vector(text) for text in order]), abs=1e-4)

        long = "two red dogs. a green cat. a photo of a blue dog. two cats and two dogs, all of them red and blue!"
        refused = post("embed", model="qwen-float", inputs=[{"text": long}], truncate="none")
        assert (refused.status_code, refused.json()["type"]) == (422, "/problems/text-too-long")
        (short,) = post("compress", model="qwen-float", texts=[long], budget=16).json()["texts"]
        assert len(tokenizer(short["text"]).input_ids) == short["tokens"] <= 16
        assert short["text"] != long
        assert short["text"].split(". ")[0].rstrip(".") in long
