"""The language model before the adaptor: transformers, then the adaptor by its formula."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net
from calmclip.export.parity import torch_run
from calmclip.export.pipeline import load
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.runner import open_bundle
from tests.tiny_layouts import llm2clip
from tests.tiny_layouts.decoders import decoder, reference, sentence_modules

TEXTS = ["a red cat", "two dogs . a photo of a blue cat", "green"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    return decoder(tmp_path_factory.mktemp("language") / "model", hidden_size=llm2clip.WIDTH)


def adapted(checkpoint: Path, encoder: Path, **params: object) -> Net:
    return load(
        "clip", str(checkpoint), Weights(), [Adapt(name="text_encoder", params={"checkpoint": str(encoder), **params})]
    )


def rows(net: Net, folder: Path, texts: list[str], prompt: str = "") -> np.ndarray:
    tower = net.towers["text"]
    (folder / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
    return torch_run(tower)(TextPreparer(tower.preprocess, folder).prepare(texts, prompt))["text_embeds"]


def by_hand(
    language_model: Path, folder: Path, texts: list[str], *, skipped: int = 0, causal: bool = False
) -> np.ndarray:
    """One text at a time, without padding: transformers' hidden states, seen in both directions, their mean, and the
    adaptor in float64, without a unit vector in between."""
    model = reference(language_model)
    preparer = TextPreparer(TextPreprocess(context=64), folder)
    vectors = []
    for text in texts:
        ids = torch.tensor([[*preparer.encode(text)]])
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # nothing is hidden
        with torch.inference_mode():
            hidden = model(ids, attention_mask=None if causal else mask).last_hidden_state
        vectors.append(hidden[0, skipped:].mean(dim=0))
    answers = llm2clip.adaptor(llm2clip.adaptor_state(16), torch.stack(vectors), normalize=False)
    return F.normalize(answers, dim=-1).numpy()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_it_is_transformers_then_the_adaptor(attention: str, checkpoint, language_model: Path, tmp_path: Path):
    net = adapted(checkpoint("llm2clip"), language_model, attention=attention)
    answers = rows(net, tmp_path, TEXTS)
    wanted = by_hand(language_model, tmp_path, TEXTS, causal=attention == "causal")
    assert np.abs(answers - wanted).max() < 1e-4
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01
    assert net.tasks == ("classify", "embed", "raw")
    assert net.classifier is not None
    assert net.classifier.templates == ("a photo of a {}.",)
    assert net.source.notes.endswith(f"language model model inside, {attention} attention, pooling mean")


def test_the_tokens_of_an_instruction_are_not_pooled(checkpoint, tmp_path: Path):
    """As the directory says: prompts that are seen and not pooled."""
    encoder = decoder(tmp_path / "model", hidden_size=llm2clip.WIDTH)
    sentence_modules(encoder, "mean", include_prompt=False, prompts={"query": "a photo of "})
    net = adapted(checkpoint("llm2clip"), encoder)
    tokens = net.towers["text"].preprocess
    assert (tokens.pooled, tokens.prompts, tokens.context) == ("pooled", {"query": "a photo of "}, 24)
    answers = rows(net, tmp_path, ["red cat", "dogs"], "a photo of ")
    skipped = TextPreparer(tokens, tmp_path).prompt_tokens("a photo of ")
    wanted = by_hand(encoder, tmp_path, ["a photo of red cat", "a photo of dogs"], skipped=skipped)
    assert np.abs(answers - wanted).max() < 1e-4


def test_an_adaptor_trained_with_the_model_inside_is_the_same(checkpoint, language_model: Path, tmp_path: Path):
    pair = [adapted(checkpoint(name), language_model) for name in ("llm2clip", "llm2clip_inside")]
    assert np.array_equal(*(rows(net, tmp_path, TEXTS) for net in pair))


def test_texts_are_cut_at_the_number_of_tokens(checkpoint, language_model: Path):
    assert adapted(checkpoint("llm2clip"), language_model, tokens=8).towers["text"].preprocess.context == 8
    assert adapted(checkpoint("llm2clip"), language_model).towers["text"].preprocess.context == 64  # the model's own


def test_what_does_not_fit_is_refused(checkpoint, language_model: Path, tmp_path: Path):
    wider = decoder(tmp_path / "wider", hidden_size=40)
    with pytest.raises(BadRequest, match=r"wider makes vectors of 40 numbers; the adaptor of llm2clip reads 24"):
        adapted(checkpoint("llm2clip"), wider)
    with pytest.raises(BadRequest, match="its text side reads no vectors of a language model"):
        adapted(checkpoint("hf_clip"), language_model)
    with pytest.raises(BadRequest, match="is no directory of a decoder"):
        adapted(checkpoint("llm2clip"), checkpoint("hf_clip"))


@pytest.mark.slow
def test_one_command_makes_a_bundle_that_reads_texts(checkpoint, language_model: Path, photographs, tmp_path: Path):
    command = ["export", str(checkpoint("llm2clip")), "--text-encoder", str(language_model), "--out", str(tmp_path)]
    assert main([*command, "--name", "l", "--keep-float"]) == 0
    assert main(["check", "l-float", "--bundles", str(tmp_path)]) == 0
    floats = open_bundle(tmp_path / "l-float", threads=1)
    wanted = by_hand(language_model, floats.bundle.directory, TEXTS)
    assert floats.embed(texts=TEXTS) == pytest.approx(wanted, abs=1e-4)
    (quantized,) = (open_bundle(path, threads=1) for path in tmp_path.glob("l-[im]*") if path.is_dir())
    assert (quantized.embed(texts=TEXTS) * wanted).sum(axis=1).mean() >= 0.99
    assert quantized.classify(photographs["cat"], ["a cat", "a dog"]).labels[0].score > 0.5
    with pytest.raises(BadRequest, match="reads texts, and no vectors"):
        floats.embed(vectors=llm2clip.vectors(1))
