"""UniME and VladVA for texts: a decoder that pools its last token, LoRA, learnt rows, and a prompt around the text.

The oracle is transformers with peft, on the ids of the tokenizer. Weights are random and tiny; the systems' own are
larger, and of VladVA there are none.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from calmclip.export import pipeline
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.cli import main
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.runner import open_bundle
from tests import tiny, tuned
from tests.tiny_layouts import decoders

# UniME's template: the chat of its base, with the question behind the text (arXiv 2504.17432, section 3)
PROMPT = "<|user|>\n{}\nsummary above sentence in one word: <|end|>\n<|assistant|>\n"
TEXTS = ["a photo of a red cat", "two dogs", "green", "a blue photo of two green cats"]
MODULES = {"Phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "Llama": ["q_proj", "v_proj", "down_proj"]}


def base(kind: str, directory: Path) -> Path:
    decoders.decoder(directory, kind.lower(), head=True, max_position_embeddings=160)
    prompts = {"prompts": {"sentence": PROMPT}, "default_prompt_name": "sentence"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return directory


def adapter(kind: str, checkpoint: Path, directory: Path) -> Path:
    """Over the class with the head for words, as both systems train it."""
    return tuned.lora(checkpoint, directory, f"{kind}ForCausalLM", target_modules=MODULES[kind], use_rslora=True)


def rows_file(file: Path) -> Path:
    save_file({"rows": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, file)
    return file


def reference(kind: str, checkpoint: Path, lora: Path, rows: Path | None) -> np.ndarray:
    """The last hidden state of the last token of each text, unit rows."""
    import transformers
    from safetensors.torch import load_file

    model: Any = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(checkpoint)
    model = peft.PeftModel.from_pretrained(model, lora).eval()
    vectors = []
    for text in TEXTS:
        ids = tiny.tokenizer().encode(PROMPT.replace("{}", text)).ids
        with torch.inference_mode():
            words = model.get_input_embeddings()(torch.tensor(ids))
            if rows:
                words = torch.cat([words[:1], load_file(rows)["rows"], words[1:]])
            hidden = model(inputs_embeds=words[None], output_hidden_states=True).hidden_states[-1]
        vectors.append(F.normalize(hidden[0, -1], dim=0).numpy())
    return np.stack(vectors)


def loaded(checkpoint: Path, lora: Path, rows: Path | None) -> Net:
    adapters = [Adapt(name="lora", params={"checkpoint": str(lora)})]
    adapters += [Adapt(name="prefix", params={"checkpoint": str(rows)})] if rows else []
    return pipeline.load("decoder", str(checkpoint), Weights(), adapters)


@pytest.mark.parametrize(("kind", "with_rows"), [("Phi3", False), ("Llama", True)])
def test_the_last_word_of_the_prompt_is_the_vector_of_the_text(kind: str, with_rows: bool, tmp_path: Path):
    checkpoint = base(kind, tmp_path / "base")
    lora, rows = (
        adapter(kind, checkpoint, tmp_path / "lora"),
        rows_file(tmp_path / "rows.safetensors") if with_rows else None,
    )
    net = loaded(checkpoint, lora, rows)
    text = net.towers["text"]
    assert isinstance(text.preprocess, TextPreprocess)
    (tmp_path / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
    feeds = TextPreparer(text.preprocess, tmp_path).prepare(TEXTS, text.preprocess.prompt_text())
    with torch.inference_mode():
        vectors = text.module(*(torch.from_numpy(feeds[name]) for name in text.inputs)).numpy()
    wanted = reference(kind, checkpoint, lora, rows)
    assert np.allclose(vectors, wanted, atol=1e-5)
    assert not np.allclose(wanted[0], wanted[1], atol=1e-2)


@pytest.mark.slow
def test_an_export_with_both_adapters_serves_the_texts(tmp_path: Path):
    checkpoint = base("Llama", tmp_path / "base")
    lora, rows = adapter("Llama", checkpoint, tmp_path / "lora"), rows_file(tmp_path / "rows.safetensors")
    arguments = ["export", str(checkpoint), "--out", str(tmp_path), "--name", "vladva", "--lora", str(lora)]
    assert main([*arguments, "--prefix", str(rows), "--keep-float"]) == 0
    wanted = reference("Llama", checkpoint, lora, rows)
    (int8,) = (path for path in tmp_path.iterdir() if path.name in ("vladva-int8", "vladva-mixed"))
    for directory, least in ((tmp_path / "vladva-float", 0.999999), (int8, 0.99)):
        vectors = open_bundle(directory).embed(texts=TEXTS)
        assert (vectors * wanted).sum(axis=1).min() >= least
        manifest = open_bundle(directory).bundle.manifest
        assert manifest.graphs["text"].preprocess.context == 157
        assert "LoRA lora over base; 3 learnt rows of rows.safetensors behind" in manifest.source.notes
