"""OPT from Hugging Face directories: which word comes next.

Source: Zhang et al. 2022 (arXiv 2205.01068), in the names of transformers' `OPTForCausalLM`. Norms precede the blocks,
as in every published size but 350m.
Graph: lm, ids int64 [B, T] -> logits [B, T, V]; raw. It is causal, so rows that are padded on the right need no mask.
The logits at padded positions mean nothing.

With ``attn_gate_type`` conditional_per_head the graph also takes mask int64 [B, T]. Such a gate averages over all
tokens of the text, as in the paper's code, so a logit then depends on the tokens after it: it scores whole texts, and
is not the probability of a next word. The bundle's source says so.
"""

from dataclasses import replace
from functools import partial

from calmclip.export.checkpoints import Checkpoint, Weights, hugging_face
from calmclip.export.checkpoints.hugging_face import ACTIVATIONS
from calmclip.export.layouts import Layout, Rule, concatenate, rename
from calmclip.export.layouts.common import attention_gates
from calmclip.export.nets import NETS, Net, NetPlugin, bucketed, float32, text_inputs
from calmclip.export.nets.bert import tied
from calmclip.export.nets.common.single_tower import open_checkpoint, recognise
from calmclip.export.towers import Style
from calmclip.export.towers.attention import AttentionSpec
from calmclip.export.towers.text import CausalLM
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

OFFSET = 2  # rows of the table of positions before that of the first token
_USUAL = {"num_attention_heads": 12, "num_hidden_layers": 12, "activation_function": "relu", "pad_token_id": 1}
_FUTURE = "its gates average over the whole text, so a logit depends on the tokens after it"
_SUPPORTED = {"do_layer_norm_before": True, "_remove_final_layer_norm": False}
_BLOCK = {
    "self_attn_layer_norm.{p}": "norm1.{p}",
    "self_attn.out_proj.{p}": "attn.out.{p}",
    "final_layer_norm.{p}": "norm2.{p}",
    "fc1.{p}": "mlp.up.{p}",
    "fc2.{p}": "mlp.down.{p}",
}


def _layout(prefix: str) -> Layout:
    block = f"{prefix}layers.{{i}}"
    return Layout(
        title="Hugging Face OPT",
        keys=(f"{prefix}embed_tokens.weight", f"{block}.fc1.weight"),
        model_type=("opt",),
        rules=(
            Rule(f"{prefix}embed_tokens.weight", "text.tokens.weight"),
            Rule(f"{prefix}embed_positions.weight", "text.positions"),
            *rename(block, "text.blocks.{i}", _BLOCK),
            *concatenate(f"{block}.self_attn.*_proj.{{p}}", "text.blocks.{i}.attn.qkv.{p}", "qkv"),
            *attention_gates.rules(f"{block}.self_attn.alpha", "text.blocks.{i}"),
            Rule(f"{prefix}final_layer_norm.{{p}}", "text.norm_post.{p}"),
            Rule("lm_head.weight", "text.words.weight"),
        ),
        required=("text.tokens.weight", "text.positions", "text.norm_post.weight"),
        after_read=attention_gates.stack_heads,
        before_write=attention_gates.unstack_heads,
        refusal=_refusal,
    )


def _refusal(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.config
    odd = [f"{name} is {config[name]}" for name, usual in _SUPPORTED.items() if config.get(name, usual) != usual]
    width, projected = (config.get(name) for name in ("hidden_size", "word_embed_proj_dim"))
    if projected is not None and projected != width:
        odd.append(f"word_embed_proj_dim is {projected} and hidden_size {width}")
    if not odd:
        return None
    return f"config.json: {', '.join(odd)}, as in OPT-350m; only OPT with its norms before the blocks is supported"


LAYOUTS = (_layout("model.decoder."), _layout("decoder."))


def load(path: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the file and the tensor or setting that is missing or not supported, and
    `BadRequest` if the recipe has a section on weights."""
    opened = open_checkpoint(LAYOUTS, path, weights, fold)
    config = opened.config(_USUAL, "text.blocks.")
    opened = replace(opened, state=tied(opened.checkpoint.path, opened.state, config))
    activation = config["activation_function"]
    if activation not in ACTIVATIONS:
        raise UnknownCheckpoint(
            f"config.json: activation_function is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    words, rows = len(opened.state["text.tokens.weight"]), len(opened.state["text.positions"]) - OFFSET
    context = min(config.get("max_position_embeddings", rows), rows)
    style = Style(
        heads=config["num_attention_heads"],
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        attention=AttentionSpec.of(config),
    )
    mask = "mask" if style.attention.gate_mean else None
    tokens = bucketed(TextPreprocess(context=context, pad="longest", pad_id=config["pad_token_id"], mask=mask))
    tokenizer = hugging_face.tokenizer_json(opened.checkpoint)
    opened.check_vocabulary(tokenizer, context)
    module = opened.fill("text.", partial(CausalLM, style=style, offset=OFFSET))
    outputs, files = {"logits": float32("B", "T", words)}, {"tokenizer.json": tokenizer}
    net = opened.net("opt", "lm", module, text_inputs(tokens), outputs, tokens, files)
    if not style.attention.gate_mean:
        return net
    return replace(net, source=net.source.model_copy(update={"notes": f"{net.source.notes}; {_FUTURE}"}))


NETS.register("opt")(NetPlugin(recognise(("opt",), *LAYOUTS), load, partial(load, fold=False)))
