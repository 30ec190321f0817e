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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from calmclip.export.checkpoints import Weights
from calmclip.export.layouts import DROP, Layout, Rule
from calmclip.export.layouts.common import attention_gates, bert_text
from calmclip.export.nets import NETS, Net, NetPlugin, bucketed, float32, text_inputs
from calmclip.export.nets.common.sentence_modules import FILE, Dense, read_modules
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
    if (opened.checkpoint.directory / FILE).is_file():
        return _sentences(opened, config, tokenizer)
    if "text.head.dense.weight" in opened.state:
        opened = replace(opened, state=tied(opened.checkpoint.path, opened.state, config))
        words = len(opened.state["text.tokens.weight"])
        return _net(opened, config, tokenizer, "mlm", {"logits": ("B", "T", words)}, module=MaskedLM)
    width = opened.state["text.tokens.weight"].shape[1]
    return _net(opened, config, tokenizer, "hidden", {"hidden": ("B", "T", width)}, pool="none")


def _sentences(opened: Opened, config: Mapping[str, Any], tokenizer: bytes) -> Net:
    folder = opened.checkpoint.directory
    modules = read_modules(folder, activations=("Tanh", "Identity"), pools=("first", "mean"))
    # the encoder's own pooler is not used; a layer of modules.json has our name of it
    rules = (replace(rule, ours=DROP) if rule.ours.startswith("text.pooler.") else rule for rule in opened.layout.rules)
    opened = replace(opened, layout=replace(opened.layout, rules=tuple(rules)))
    encoder = {n: t for n, t in opened.state.items() if not n.startswith(("text.head.", "text.words."))}
    if not modules.include_prompt and modules.pool != "mean":
        raise UnknownCheckpoint(
            f"{folder / FILE}: include_prompt is false with the pooling of one token; expected mean"
        )
    state = with_dense(folder, encoder, modules.dense)
    if modules.context:
        config = {**config, "max_position_embeddings": modules.context}
    layers = [state[name] for name in ("text.pooler.weight", "text.projection.weight") if name in state]
    dim = len(layers[-1]) if layers else state["text.tokens.weight"].shape[1]
    options = {"pool": modules.pool, "pooler": "text.pooler.weight" in state}
    outputs = {"text_embeds": ("B", dim)}
    return _net(replace(opened, state=state), config, tokenizer, "text", outputs, modules.prompting(), **options)


def _net(
    opened: Opened,
    config: Mapping[str, Any],
    tokenizer: bytes,
    role: str,
    outputs: Mapping[str, tuple[str | int, ...]],
    prompting: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Net:
    """``prompting``: fields of `TextPreprocess`; ``options``: as in `bert_text.tower`."""
    context = config.get("max_position_embeddings", len(opened.state["text.positions"]))
    make, tokens = bert_text.tower(config, opened.state, bert_text.BERT, context, **options)
    embeds = role == "text"
    # a text that is too long for a sentence encoder is truncated, as in sentence-transformers
    tokens = bucketed(tokens.model_copy(update={"truncate": embeds, **prompting}))
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


def with_dense(path: Path, state: Mapping[str, Tensor], dense: Sequence[Dense]) -> dict[str, Tensor]:
    """``state`` with the layers after the pooling: the pooler is one with a tanh, the projection one without.

    Raises `UnknownCheckpoint` for more layers, or in another order.
    """
    kinds = [layer.activation for layer in dense]
    if kinds not in ([], ["Tanh"], ["Identity"], ["Tanh", "Identity"]):
        raise UnknownCheckpoint(
            f"{path / FILE} has Dense layers with {', '.join(kinds)}; expected at most one with Tanh, then one with "
            "Identity"
        )
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("text.pooler.")}
    for layer in dense:
        name = {"Tanh": "text.pooler", "Identity": "text.projection"}[layer.activation]
        tensors[f"{name}.weight"] = layer.weight
        if layer.bias is not None or layer.activation == "Tanh":
            tensors[f"{name}.bias"] = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return tensors


NETS.register("bert")(NetPlugin(recognise(("bert",), *LAYOUTS), load, partial(load, fold=False)))
