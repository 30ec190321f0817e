"""BERT out of Hugging Face directories: masked words, sentences as vectors, or hidden states.

Source: Devlin et al. 2018 (arXiv 1810.04805), in the names of transformers' `BertForMaskedLM` and `BertModel`;
sentences: Reimers and Gurevych 2019 (arXiv 1908.10084), in the files of the library sentence-transformers.

    config.json (model_type "bert") and      the graph
    cls.predictions.* among the tensors      mlm      ids, mask int64 [B, T] -> logits [B, T, V]; raw
    modules.json, with a pooling             text     ids, mask -> text_embeds [B, D], unit rows; embed, raw
    neither                                  hidden   ids, mask -> hidden [B, T, W], the last layer's; raw

Every token is of the first type, as in a text alone. A row's answer does not depend on how far it is padded, but what
stands at padded places means nothing. Words beside those of the tokenizer, such as [MASK], have their ids in its file.
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
from calmclip.export.checkpoints.weights import load_tensors, weight_files
from calmclip.export.layouts import DROP, Layout, Rule, _attention, _bert
from calmclip.export.nets import NETS, Net, NetPlugin, Tower, bucketed, reads
from calmclip.export.nets._hugging_face import RAW, Opened, opened, promises, recognise
from calmclip.export.towers.bert import MaskedLM
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.errors import UnknownCheckpoint

_USUAL = {"num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_HEAD = (
    Rule("cls.predictions.transform.dense.{p}", "text.head.dense.{p}"),
    Rule("cls.predictions.transform.LayerNorm.{p}", "text.head.norm.{p}"),
    Rule("cls.predictions.bias", "text.words.bias"),
    Rule("cls.predictions.decoder.weight", "text.words.weight"),
    Rule("cls.predictions.decoder.bias", DROP),  # the same once more
    Rule("cls.seq_relationship.{p}", DROP),  # does a sentence follow another
)


def _named(prefix: str) -> Layout:
    rules = (
        *_bert.rules(prefix),
        *_attention.rules(f"{prefix}encoder.layer.{{i}}.attention.self.alpha", "text.blocks.{i}"),
        *_HEAD,
    )
    old = (("gamma", "weight"), ("beta", "bias"))  # of norms, in weights converted from the first BERT
    norms = [rule for rule in rules if rule.theirs.endswith("LayerNorm.{p}")]
    return Layout(
        title="Hugging Face BERT",
        keys=(f"{prefix}embeddings.word_embeddings.weight", f"{prefix}encoder.layer.{{i}}.output.dense.weight"),
        model_type=("bert",),
        rules=(
            *rules,
            *(
                Rule(rule.theirs.replace("{p}", one), rule.ours.replace("{p}", other))
                for rule in norms
                for one, other in old
            ),
        ),
        needs=_bert.NEEDS,
        finish=_attention.stacked,
        begin=_attention.unstacked,
    )


LAYOUTS = (_named("bert."), _named(""))


def load(checkpoint: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` naming the file and the tensor or setting that is missing or not supported, and
    `BadRequest` where the recipe says something of weights."""
    found = opened(LAYOUTS, checkpoint, weights, fold)
    config = found.config(_USUAL, "text.blocks.")
    tokenizer = _bert.tokenizer(found.checkpoint, found.state).to_str().encode()
    if (found.checkpoint.directory / "modules.json").is_file():
        return _sentences(found, config, tokenizer)
    if "text.head.dense.weight" in found.state:
        return _words(found, config, tokenizer)
    return _hidden(found, config, tokenizer)


def _words(found: Opened, config: Mapping[str, Any], tokenizer: bytes) -> Net:
    state = tied(found.checkpoint.path, found.state, config)
    words = len(state["text.tokens.weight"])
    return _net(found, config, tokenizer, state, "mlm", {"logits": ("B", "T", words)}, made=MaskedLM)


def _hidden(found: Opened, config: Mapping[str, Any], tokenizer: bytes) -> Net:
    width = found.state["text.tokens.weight"].shape[1]
    return _net(found, config, tokenizer, found.state, "hidden", {"hidden": ("B", "T", width)}, pool="none")


def _sentences(found: Opened, config: Mapping[str, Any], tokenizer: bytes) -> Net:
    folder = found.checkpoint.directory
    given = {name: tensor for name, tensor in found.state.items() if not name.startswith(("text.head.", "text.words."))}
    pool, state = modules(folder, given)
    own = folder / "sentence_bert_config.json"
    said = read_json(own) if own.is_file() else {}
    if isinstance(context := said.get("max_seq_length"), int):
        config = {**config, "max_position_embeddings": context}
    width = state["text.tokens.weight"].shape[1]
    ends = [state[name] for name in ("text.pooler.weight", "text.projection.weight") if name in state]
    dim = len(ends[-1]) if ends else width
    return _net(
        found, config, tokenizer, state, "text", {"text_embeds": ("B", dim)},
        pool=pool, pooler="text.pooler.weight" in state,
    )  # fmt: skip


def _net(
    found: Opened,
    config: Mapping[str, Any],
    tokenizer: bytes,
    state: Mapping[str, Tensor],
    role: str,
    outputs: Mapping[str, tuple[str | int, ...]],
    **more: Any,
) -> Net:
    """``more``: of `_bert.tower`."""
    found = replace(found, state=state)
    context = config.get("max_position_embeddings", len(state["text.positions"]))
    make, tokens = _bert.tower(config, state, _bert.BERT, context, **more)
    embeds = role == "text"
    # what reads sentences cuts those that are too long, as sentence-transformers does
    tokens = bucketed(tokens.model_copy(update={"truncate": embeds}))
    found.suit(tokenizer, tokens.context)
    module = found.fill("text.", make)
    return Net(
        name="bert",
        source=found.source("bert"),
        tasks=("embed", "raw") if embeds else RAW,
        towers={
            role: Tower(
                module,
                reads(tokens),
                {name: Spec(dtype="float32", shape=shape) for name, shape in outputs.items()},
                tokens,
                quantizer="search",
                promises=promises(module),
                prefix="text.",
            )
        },
        files={"tokenizer.json": tokenizer},
        layout=found.layout,
        folded=found.fold,
    )


def tied(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits are those of the table of tokens, unless config.json says they are not (``tie_word_embeddings``).

    Raises `UnknownCheckpoint` for a table of their own that it does not speak of.
    """
    found, own = dict(state), state.get("text.words.weight")
    if not config.get("tie_word_embeddings", True):
        if own is None:
            raise UnknownCheckpoint(f"{path}: tie_word_embeddings is false, but the logits have no table of their own")
        return found
    if own is not None and not torch.equal(found.pop("text.words.weight"), found["text.tokens.weight"]):
        raise UnknownCheckpoint(
            f"{path}: the logits have a table of their own, but config.json says it is that of the tokens; "
            "expected tie_word_embeddings false"
        )
    return found


def modules(folder: Path, state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """What sentence-transformers does behind the encoder, by ``modules.json``: -> the pool (`Style.pool`), and the
    tensors with those of its Dense layers.

    A Dense layer with a tanh is ours before the last without one. Raises `UnknownCheckpoint` naming what it has and we
    do not.
    """
    listed = _listed(folder / "modules.json")
    pool, found = "", {name: tensor for name, tensor in state.items() if not name.startswith("text.pooler.")}
    for place, one in enumerate(listed):
        kind, path = str(one.get("type", "")).rpartition(".")[2], str(one.get("path", ""))
        if kind == "Transformer" and place == 0 and path in ("", "."):
            continue
        if kind == "Normalize" and place == len(listed) - 1:
            continue  # vectors are always of length 1
        if kind == "Pooling" and place == 1:
            pool = _pool(folder / path / "config.json")
            continue
        if kind == "Dense" and pool:
            target = _dense(folder / path, found)
            if target:
                continue
        raise UnknownCheckpoint(
            f"{folder / 'modules.json'}: module {place} is {kind or '?'} in {path or '.'!r}; expected Transformer in "
            "the directory itself, Pooling, perhaps a Dense layer with tanh and one without, perhaps Normalize"
        )
    if not pool:
        raise UnknownCheckpoint(f"{folder / 'modules.json'} names no Pooling; expected one behind the Transformer")
    return pool, found


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownCheckpoint(f"{path} cannot be read: {error}") from None
    if not (isinstance(listed, list) and all(isinstance(one, dict) for one in listed)):
        raise UnknownCheckpoint(f"{path} is no list of modules")
    return listed


_POOLS = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}


def _pool(file: Path) -> str:
    on = [name for name, value in read_json(file).items() if name.startswith("pooling_mode") and value]
    if len(on) != 1 or on[0] not in _POOLS:
        raise UnknownCheckpoint(f"{file} pools by {' and '.join(on) or 'nothing'}; expected one of {', '.join(_POOLS)}")
    return _POOLS[on[0]]


def _dense(folder: Path, state: dict[str, Tensor]) -> str | None:
    """Into ``state``; -> which of our layers it became, None where there is no place for it."""
    act = str(read_json(folder / "config.json").get("activation_function", "")).rpartition(".")[2]
    target = {"Tanh": "text.pooler", "Identity": "text.projection"}.get(act)
    if target is None or f"{target}.weight" in state or "text.projection.weight" in state:
        return None
    tensors = load_tensors(weight_files(folder))
    if "linear.weight" not in tensors:
        raise UnknownCheckpoint(f"{folder} lacks linear.weight; expected the weights of a Dense layer")
    state[f"{target}.weight"] = weight = tensors["linear.weight"].float()
    bias = tensors.get("linear.bias")
    if bias is not None or act == "Tanh":
        state[f"{target}.bias"] = torch.zeros(len(weight)) if bias is None else bias.float()
    return target


NETS.register("bert")(NetPlugin(recognise("bert", *LAYOUTS), load, partial(load, fold=False)))
