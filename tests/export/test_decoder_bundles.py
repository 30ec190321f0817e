"""Bundles of decoders, as a user exports and runs them. The oracle is transformers, its tokenizer included."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file

from calmclip.export import parity, rewrites, trace
from calmclip.export.nets.decoder import load
from calmclip.export.quantizers import QUANTIZERS
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.ops.library import Library
from calmclip.models.runner import Runner, open_bundle
from tests.tiny_layouts.decoders import (
    KINDS,
    LENGTHS,
    decoder,
    edited,
    padded,
    reference,
    sentence_modules,
    states,
)

pytestmark = pytest.mark.slow
PROMPTS = {"query": "a red photo of ", "document": ""}
TEXTS = ("two dogs.", "green cat", "a photo of two blue cats, a dog and a green dog.", "blue")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint with sentence-transformers' files, and of its two bundles."""
    folder = tmp_path_factory.mktemp("decoders")
    directory = edited(decoder(folder / "tiny", "qwen3"), is_causal=False)
    sentence_modules(directory, "mean", {"Tanh": 40, "Identity": 24}, include_prompt=False, prompts=PROMPTS, context=64)
    assert main(["export", str(directory), "--out", str(folder), "--preset", "dynamic", "--keep-float"]) == 0
    return folder


def runner(folder: Path, name: str) -> Runner:
    return open_bundle(folder / name)


@torch.no_grad()
def pooled(directory: Path, texts: Sequence[str], prompt: str) -> np.ndarray:
    """sentence-transformers: prompt and text are one text; the tokens of the prompt alone, without the one that ends a
    text, are not pooled."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(directory), reference(directory)
    left_out = len(tokenizer(prompt).input_ids) - 1 if prompt else 0
    rows = []
    for text in texts:
        ids = tokenizer(prompt + text, return_tensors="pt").input_ids
        row = model(ids).last_hidden_state[0, left_out:].mean(dim=0)
        first, second = (load_file(directory / f"{place}_Dense/model.safetensors")["linear.weight"] for place in (2, 3))
        row = second @ torch.tanh(first @ row)
        rows.append(torch.nn.functional.normalize(row, dim=0).numpy())
    return np.stack(rows)


def test_the_float_bundle_answers_as_sentence_transformers_does(exported: Path):
    embedder = runner(exported, "tiny-float")
    for name, prompt in PROMPTS.items():
        vectors = embedder.embed(texts=TEXTS, prompt_name=name)
        assert vectors == pytest.approx(pooled(exported / "tiny", TEXTS, prompt), abs=1e-4)
        for text, vector in zip(TEXTS, vectors, strict=True):
            assert runner(exported, "tiny-float").embed(texts=[text], prompt_name=name)[0] == pytest.approx(
                vector, abs=1e-6
            )
    assert embedder.embed(texts=TEXTS) == pytest.approx(embedder.embed(texts=TEXTS, prompt_name="document"), abs=1e-6)
    with pytest.raises(BadRequest, match="prompt_name is 'passage'; expected one of document, query"):
        embedder.embed(texts=TEXTS, prompt_name="passage")
    long = embedder.embed(texts=["dog " * 200], prompt_name="query")
    assert long == pytest.approx(embedder.embed(texts=["dog " * 300], prompt_name="query"), abs=1e-6)  # both are cut


def test_the_int8_bundle_answers_nearly_as_the_float_one(exported: Path):
    name = next(path.name for path in exported.iterdir() if path.name in ("tiny-int8", "tiny-mixed"))
    texts = [*TEXTS, "red", "a cat of two cats", "dogs, cats", "photo!"]
    for prompt in PROMPTS:
        sides = [runner(exported, each).embed(texts=texts, prompt_name=prompt) for each in (name, "tiny-float")]
        cosines = (sides[0] * sides[1]).sum(axis=1)
        assert cosines.min() >= 0.99
        assert cosines.min() < 0.9999999  # INT8 rounds


_RUN = """
import sys
from calmclip.export.report import peak_rss_mb
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.enable_cpu_mem_arena, options.intra_op_num_threads = False, 1
options.register_custom_ops_library(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options)
ids = np.random.default_rng(0).integers(3, 500, (1, 8192))
vector = session.run(None, {"ids": ids, "mask": np.ones_like(ids)})[0]
assert np.isfinite(vector).all()
print(peak_rss_mb())
"""


def test_8192_tokens_need_less_than_2_gib(tmp_path: Path, library: Library):
    """Sixteen heads, whose logits alone would be 4 GiB, and two masks, for layers with and without a window."""
    changes = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 8192}
    tower = load(str(decoder(tmp_path / "gemma3", "gemma3_text", **changes))).towers["text"]
    applied = rewrites.apply(trace.to_onnx(tower), rewrites.swaps())
    assert applied.ops()["RotaryAttention"] == 3
    onnx.save(applied.model, tmp_path / "text.onnx")
    command = [sys.executable, "-c", _RUN, str(tmp_path / "text.onnx"), str(library.path)]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < (2 << 30) / 1e6


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_8_bits_answers_nearly_as_transformers(kind: str, tmp_path: Path):
    """Also in graphs with our ops, whose library or functions run."""
    directory = decoder(tmp_path / kind, kind, num_hidden_layers=2, layer_types=None)
    plain = trace.to_onnx(load(str(directory)).towers["text"])
    ids, mask = padded("right")
    hidden, feeds = states(directory, ids, mask), {"ids": ids.numpy(), "mask": mask.numpy()}
    want = torch.nn.functional.normalize(hidden[range(3), [tokens - 1 for tokens in LENGTHS]], dim=-1).numpy()
    for name, most in (("none", 1e-4), ("dynamic", None), ("rows", None)):
        quantizer = QUANTIZERS.get(name)
        applied = rewrites.apply(quantizer.quantize(plain, {}, quantizer.params()), rewrites.swaps())
        assert applied.ops().get("RotaryAttention") == 2
        vectors = parity.onnx_run(applied.model)(feeds)["text_embeds"]
        if most is not None:
            assert vectors == pytest.approx(want, abs=most)
        assert (vectors * want).sum(axis=1).min() >= 0.99, name
