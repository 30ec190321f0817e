"""The oracle is transformers; for sentences, the documentation of sentence-transformers' modules."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from calmclip.export.nets.bert import load
from calmclip.models.errors import UnknownCheckpoint
from tests import tiny
from tests.tiny import changed

IDS = torch.tensor([[598, 3, 6, 7, 599], [598, 1, 599, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def renamed(checkpoint: Path, to: Path, name: Callable[[str], str], more: Mapping[str, Tensor] | None = None) -> Path:
    """A copy with other tensor names, and with ``more`` tensors."""
    shutil.copytree(checkpoint, to)
    state = load_file(to / "model.safetensors")
    save_file({name(key): tensor for key, tensor in state.items()} | dict(more or {}), to / "model.safetensors")
    return to


@torch.no_grad()
def answers(directory: Path) -> Tensor:
    """The outputs for `IDS`, without the padding."""
    (tower,) = load(str(directory)).towers.values()
    outputs = tower.module(IDS, MASK)
    return outputs[MASK.bool()] if outputs.ndim == 3 else outputs


def test_a_bare_encoder_returns_its_last_states(tmp_path: Path):
    directory = tiny.bert(tmp_path / "bare", "BertModel")
    net = load(str(directory))
    assert (net.tasks, [*net.towers]) == (("raw",), ["hidden"])
    reference = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        want = reference(IDS, attention_mask=MASK).last_hidden_state[MASK.bool()]
    assert torch.allclose(answers(directory), want, atol=1e-5)


def test_names_without_prefix_and_names_of_the_first_bert_are_read(tiny_bert: Path, tmp_path: Path):
    want = answers(tiny_bert)
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    assert torch.equal(answers(renamed(tiny_bert, tmp_path / "old", old)), want)
    assert torch.equal(answers(renamed(tiny_bert, tmp_path / "bare", lambda name: name.removeprefix("bert."))), want)


def test_logits_use_the_token_table_unless_config_unties_them(tiny_bert: Path, tmp_path: Path):
    table = load_file(tiny_bert / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    same = renamed(tiny_bert, tmp_path / "same", str, {"cls.predictions.decoder.weight": table.clone()})
    assert torch.equal(answers(same), answers(tiny_bert))
    other = renamed(tiny_bert, tmp_path / "other", str, {"cls.predictions.decoder.weight": table.flip(0)})
    with pytest.raises(UnknownCheckpoint, match=r"table of their own, but config\.json says it is that of the tokens"):
        load(str(other))
    untied = changed(other, tmp_path / "untied", tie_word_embeddings=False)
    reference = transformers.BertForMaskedLM.from_pretrained(tiny_bert).eval()
    reference.cls.predictions.decoder.weight = torch.nn.Parameter(table.flip(0))
    with torch.no_grad():
        want = reference(IDS, attention_mask=MASK).logits[MASK.bool()]
    assert torch.allclose(answers(untied), want, atol=1e-5)
    with pytest.raises(UnknownCheckpoint, match="tie_word_embeddings is false, but the logits have no table"):
        load(str(changed(tiny_bert, tmp_path / "changed", tie_word_embeddings=False)))


@pytest.mark.parametrize("pool", ["cls_token", "mean_tokens"])
@pytest.mark.parametrize("dense", [{}, {"Tanh": 48}, {"Identity": 16}, {"Tanh": 48, "Identity": 16}])
def test_a_sentence_is_pooled_passes_its_dense_layers_and_is_normalized(
    pool: str, dense: dict[str, int], tmp_path: Path
):
    directory = tiny.sentences(tmp_path / "sentences", pool, dense)
    net = load(str(directory))
    assert (net.tasks, [*net.towers]) == (("embed", "raw"), ["text"])
    assert net.towers["text"].preprocess.context == 24
    encoder = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        states, weight = encoder(IDS, attention_mask=MASK).last_hidden_state, MASK[..., None].float()
        rows = states[:, 0] if pool == "cls_token" else (states * weight).sum(1) / weight.sum(1)
        for place, act in enumerate(dense, 2):
            layer = load_file(directory / f"{place}_Dense" / "model.safetensors")
            rows = rows @ layer["linear.weight"].T + layer["linear.bias"]
            rows = torch.tanh(rows) if act == "Tanh" else rows
        want = rows / rows.norm(dim=-1, keepdim=True)
    assert torch.allclose(answers(directory), want, atol=1e-5)


def test_dense_layers_in_another_order_are_refused(tmp_path: Path):
    directory = tiny.sentences(tmp_path / "sentences", "mean_tokens", {"Identity": 48, "Tanh": 16})
    with pytest.raises(UnknownCheckpoint, match="Dense layers with Identity, Tanh; expected at most one with Tanh"):
        load(str(directory))


def test_the_tokens_of_a_prompt_are_left_out_of_the_mean(tmp_path: Path):
    directory = tiny.sentences(tmp_path / "sentences", "mean_tokens", {})
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    prompts = {"prompts": {"query": "a red ", "document": None}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    tower = load(str(directory)).towers["text"]
    assert (tower.preprocess.prompts, tower.preprocess.prompt) == ({"query": "a red "}, "query")
    assert [*tower.inputs] == ["ids", "mask", "pooled"]
    encoder = transformers.BertModel.from_pretrained(directory).eval()
    pooled = MASK * torch.tensor([0, 0, 1, 1, 1])
    with torch.no_grad():
        states = encoder(IDS, attention_mask=MASK).last_hidden_state
        rows = (states * pooled[..., None]).sum(1) / pooled.sum(1, keepdim=True)
        assert torch.allclose(tower.module(IDS, MASK, pooled), rows / rows.norm(dim=-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            "pools by max_tokens; expected one of cls",
        ),
        ("1_Pooling/config.json", {}, "pools by nothing"),
        ("modules.json", [{"type": "a.Transformer", "path": "0_Transformer"}], "module 0 is Transformer in '0_Trans"),
        ("modules.json", [{"type": "a.Transformer", "path": ""}], "names no Pooling"),
        ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.CNN", "path": "1_CNN"}], "1 is CNN in"),
        ("modules.json", {}, "is no list of modules"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.ReLU"}, "2_Dense: activation_function is ReLU"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pools by lasttoken; expected one of cls"),
        ("1_Pooling/config.json", {"pooling_mode": "cls", "include_prompt": False}, "include_prompt is false with"),
        ("config_sentence_transformers.json", {"prompts": 1}, "expected texts by name"),
    ],
)
def test_unsupported_modules_are_named(file: str, content: object, message: str, tmp_path: Path):
    directory = tiny.sentences(tmp_path / "sentences", "mean_tokens", {"Tanh": 48})
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(UnknownCheckpoint, match=message):
        load(str(directory))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3; the weights hold 2"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a number"),
        ({"num_attention_heads": 3}, "3 heads do not divide the width 32"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"alpha": 4}, "alpha without max_seq_length"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(config: dict, message: str, tiny_bert: Path, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match=message):
        load(str(changed(tiny_bert, tmp_path / "changed", **config)))


def test_missing_tensors_are_named_as_the_checkpoint_names_them(tiny_bert: Path, tmp_path: Path):
    lost = "bert.encoder.layer.1.attention.self.key.weight"
    copy = renamed(tiny_bert, tmp_path / "changed", lambda name: "lost" if name == lost else name)
    with pytest.raises(
        UnknownCheckpoint, match="1 tensors are not of the layout 'Hugging Face BERT', for example lost"
    ):
        load(str(copy))
    state = load_file(copy / "model.safetensors")
    del state["lost"]
    save_file(state, copy / "model.safetensors")
    with pytest.raises(UnknownCheckpoint, match=f"lacks 1 tensors, for example {lost}"):
        load(str(copy))
