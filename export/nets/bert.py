"""BERT from Hugging Face directories: masked words, sentences as vectors, or hidden states.

Source: Devlin et al. 2018 (arXiv 1810.04805), in the names of transformers' `BertForMaskedLM` and `BertModel`;
sentences: Reimers and Gurevych 2019 (arXiv 1908.10084), in the files of the library sentence-transformers.

    config.json (model_type "bert") and      the graph
    cls.predictions.* among the tensors      mlm      ids, mask int64 [B, T] -> logits [B, T, V]; raw
    modules.json, with a pooling             text     ids, mask -> text_embeds [B, D], unit rows; embed, raw
    neither                                  hidden   ids, mask -> hidden [B, T, W], the last layer's; raw

Every token has the first type, as in a single text. The answer of a row does not depend on its padding; the answers at
padded positions mean nothing. The tokenizer's file has the ids of special words such as [MASK].
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmclip.export.checkpoints import Weights
from calmclip.export.checkpoints.files import read_json
from calmclip.export.checkpoints.locate import weight_files
from calmclip.export.checkpoints.weights import load_tensors
from calmclip.export.layouts import DROP, Layout, Rule
from calmclip.export.layouts.common import attention_gates, bert_text
from calmclip.export.nets import NETS, Net, NetPlugin, bucketed, float32, text_inputs
from calmclip.export.nets.common.single_tower import Opened, open_checkpoint, recognise
from calmclip.export.towers.bert import MaskedLM
from calmclip.models.errors import UnknownCheckpoint

_USUAL = {"num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_HEAD = (
    Rule("cls.predictions.transform.dense.{p}", "text.head.dense.{p}"),
    Rule("cls.predictions.transform.LayerNorm.{p}", "text.head.norm.{p}"),
    Rule("cls.predictions.bias", "text.words.bias"),
    Rule("cls.predictions.decoder.weight", "text.words.weight"),
    Rule("cls.predictions.decoder.bias", DROP),  # a copy of cls.predictions.bias
    Rule("cls.seq_relationship.{p}", DROP),  # next-sentence prediction
)


def _layout(prefix: str) -> Layout:
    rules = (
        *bert_text.rules(prefix),
        *attention_gates.rules(f"{prefix}encoder.layer.{{i}}.attention.self.alpha", "text.blocks.{i}"),
        *_HEAD,
    )
    old_names = tuple(  # of norms, in weights converted from the first BERT
        Rule(rule.theirs.replace("{p}", old), rule.ours.replace("{p}", new))
        for rule in rules
        if rule.theirs.endswith("LayerNorm.{p}")
        for old, new in (("gamma", "weight"), ("beta", "bias"))
    )
    return Layout(
        title="Hugging Face BERT",
        keys=(f"{prefix}embeddings.word_embeddings.weight", f"{prefix}encoder.layer.{{i}}.output.dense.weight"),
        model_type=("bert",),
        rules=(*rules, *old_names),
        required=bert_text.REQUIRED,
        after_read=attention_gates.stack_heads,
        before_write=attention_gates.unstack_heads,
    )


LAYOUTS = (_layout("bert."), _layout(""))


def load(path: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the file and the tensor or setting that is missing or not supported, and
    `BadRequest` if the recipe has a section on weights."""
    opened = open_checkpoint(LAYOUTS, path, weights, fold)
    config = opened.config(_USUAL, "text.blocks.")
    tokenizer = bert_text.read_tokenizer(opened.checkpoint).to_str().encode()
    if (opened.checkpoint.directory / "modules.json").is_file():
        return _sentences(opened, config, tokenizer)
    if "text.head.dense.weight" in opened.state:
        opened = replace(opened, state=tied(opened.checkpoint.path, opened.state, config))
        words = len(opened.state["text.tokens.weight"])
        return _net(opened, config, tokenizer, "mlm", {"logits": ("B", "T", words)}, module=MaskedLM)
    width = opened.state["text.tokens.weight"].shape[1]
    return _net(opened, config, tokenizer, "hidden", {"hidden": ("B", "T", width)}, pool="none")


def _sentences(opened: Opened, config: Mapping[str, Any], tokenizer: bytes) -> Net:
    folder = opened.checkpoint.directory
    encoder = {n: t for n, t in opened.state.items() if not n.startswith(("text.head.", "text.words."))}
    pool, state = modules(folder, encoder)
    file = folder / "sentence_bert_config.json"
    if file.is_file() and isinstance(context := read_json(file).get("max_seq_length"), int):
        config = {**config, "max_position_embeddings": context}
    layers = [state[name] for name in ("text.pooler.weight", "text.projection.weight") if name in state]
    dim = len(layers[-1]) if layers else state["text.tokens.weight"].shape[1]
    options = {"pool": pool, "pooler": "text.pooler.weight" in state}
    return _net(replace(opened, state=state), config, tokenizer, "text", {"text_embeds": ("B", dim)}, **options)


def _net(
    opened: Opened,
    config: Mapping[str, Any],
    tokenizer: bytes,
    role: str,
    outputs: Mapping[str, tuple[str | int, ...]],
    **options: Any,
) -> Net:
    """``options``: as in `bert_text.tower`."""
    context = config.get("max_position_embeddings", len(opened.state["text.positions"]))
    make, tokens = bert_text.tower(config, opened.state, bert_text.BERT, context, **options)
    embeds = role == "text"
    # a text that is too long for a sentence encoder is truncated, as in sentence-transformers
    tokens = bucketed(tokens.model_copy(update={"truncate": embeds}))
    opened.check_vocabulary(tokenizer, tokens.context)
    return opened.net(
        "bert",
        role,
        opened.fill("text.", make),
        text_inputs(tokens),
        {name: float32(*shape) for name, shape in outputs.items()},
        tokens,
        {"tokenizer.json": tokenizer},
        tasks=("embed", "raw") if embeds else ("raw",),
    )


def tied(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table of tokens also makes the logits, unless config.json says ``tie_word_embeddings`` false.

    Raises `UnknownCheckpoint` for a separate table that config.json does not mention.
    """
    tensors, table = dict(state), state.get("text.words.weight")
    if not config.get("tie_word_embeddings", True):
        if table is None:
            raise UnknownCheckpoint(f"{path}: tie_word_embeddings is false, but the logits have no table of their own")
        return tensors
    if table is not None and not torch.equal(tensors.pop("text.words.weight"), tensors["text.tokens.weight"]):
        raise UnknownCheckpoint(
            f"{path}: the logits have a table of their own, but config.json says it is that of the tokens; "
            "expected tie_word_embeddings false"
        )
    return tensors


def modules(folder: Path, state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The modules of ``modules.json`` that follow the encoder in sentence-transformers: -> the pool (`Style.pool`), and
    ``state`` with the tensors of the Dense layers.

    A Dense layer with a tanh may precede a Dense layer without. Raises `UnknownCheckpoint` with a module that is not
    supported.
    """
    file = folder / "modules.json"
    listed = _listed(file)
    pool, tensors = "", {name: tensor for name, tensor in state.items() if not name.startswith("text.pooler.")}
    for index, entry in enumerate(listed):
        kind, path = str(entry.get("type", "")).rpartition(".")[2], str(entry.get("path", ""))
        if kind == "Transformer" and index == 0 and path in ("", "."):
            continue
        if kind == "Normalize" and index == len(listed) - 1:
            continue  # our vectors always have length 1
        if kind == "Pooling" and index == 1:
            pool = _pool(folder / path / "config.json")
            continue
        if kind == "Dense" and pool and _add_dense(folder / path, tensors):
            continue
        raise UnknownCheckpoint(
            f"{file}: module {index} is {kind or '?'} in {path or '.'!r}; expected Transformer in "
            "the directory itself, Pooling, perhaps a Dense layer with tanh and one without, perhaps Normalize"
        )
    if not pool:
        raise UnknownCheckpoint(f"{file} names no Pooling; expected one after the Transformer")
    return pool, tensors


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownCheckpoint(f"{path} cannot be read: {error}") from None
    if not (isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)):
        raise UnknownCheckpoint(f"{path} is no list of modules")
    return listed


_POOLS = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}


def _pool(file: Path) -> str:
    modes = [name for name, value in read_json(file).items() if name.startswith("pooling_mode") and value]
    if len(modes) != 1 or modes[0] not in _POOLS:
        raise UnknownCheckpoint(
            f"{file} pools by {' and '.join(modes) or 'nothing'}; expected one of {', '.join(_POOLS)}"
        )
    return _POOLS[modes[0]]


def _add_dense(folder: Path, state: dict[str, Tensor]) -> bool:
    """Adds the tensors of a Dense layer to ``state``. False if the tower has no layer for it."""
    activation = str(read_json(folder / "config.json").get("activation_function", "")).rpartition(".")[2]
    target = {"Tanh": "text.pooler", "Identity": "text.projection"}.get(activation)
    if target is None or f"{target}.weight" in state or "text.projection.weight" in state:
        return False
    tensors = load_tensors(weight_files(folder))
    if "linear.weight" not in tensors:
        raise UnknownCheckpoint(f"{folder} lacks linear.weight; expected the weights of a Dense layer")
    state[f"{target}.weight"] = weight = tensors["linear.weight"].float()
    bias = tensors.get("linear.bias")
    if bias is not None or activation == "Tanh":
        state[f"{target}.bias"] = torch.zeros(len(weight)) if bias is None else bias.float()
    return True


NETS.register("bert")(NetPlugin(recognise("bert", *LAYOUTS), load, partial(load, fold=False)))
