"""OPT out of Hugging Face directories: which word comes next.

Source: Zhang et al. 2022 (arXiv 2205.01068), in the names of transformers' `OPTForCausalLM`; norms before the blocks,
as every published size but 350m has them.
Graph: lm, ids int64 [B, T] -> logits [B, T, V]; raw. It is causal: what stands behind a token changes nothing for it,
so rows that are padded on the right need no mask, and what stands at padded places means nothing.
"""

from dataclasses import replace
from functools import partial

from calmclip.export.checkpoints import Weights
from calmclip.export.layouts import Layout, Rule, _attention, _hugging_face
from calmclip.export.layouts._hugging_face import ACTIVATIONS
from calmclip.export.nets import NETS, Net, NetPlugin, Tower, bucketed, reads
from calmclip.export.nets._hugging_face import RAW, opened, promises, recognise
from calmclip.export.nets.bert import tied
from calmclip.export.towers import Style
from calmclip.export.towers.attention import AttentionSpec
from calmclip.export.towers.text import CausalLM
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

OFFSET = 2  # rows of the table of positions before that of the first token
_USUAL = {"num_attention_heads": 12, "num_hidden_layers": 12, "activation_function": "relu", "pad_token_id": 1}
_ONLY = {"do_layer_norm_before": True, "_remove_final_layer_norm": False}


def _named(prefix: str) -> Layout:
    block = f"{prefix}layers.{{i}}"
    names = {
        "self_attn_layer_norm.{p}": "norm1.{p}",
        "self_attn.out_proj.{p}": "attn.out.{p}",
        "final_layer_norm.{p}": "norm2.{p}",
        "fc1.{p}": "mlp.up.{p}",
        "fc2.{p}": "mlp.down.{p}",
    }
    return Layout(
        title="Hugging Face OPT",
        keys=(f"{prefix}embed_tokens.weight", f"{block}.fc1.weight"),
        model_type=("opt",),
        rules=(
            Rule(f"{prefix}embed_tokens.weight", "text.tokens.weight"),
            Rule(f"{prefix}embed_positions.weight", "text.positions"),
            *(Rule(f"{block}.{one}", f"text.blocks.{{i}}.{other}") for one, other in names.items()),
            *(
                Rule(f"{block}.self_attn.{name}_proj.{{p}}", "text.blocks.{i}.attn.qkv.{p}", piece=piece)
                for piece, name in enumerate("qkv")
            ),
            *_attention.rules(f"{block}.self_attn.alpha", "text.blocks.{i}"),
            Rule(f"{prefix}final_layer_norm.{{p}}", "text.norm_post.{p}"),
            Rule("lm_head.weight", "text.words.weight"),
        ),
        needs=("text.tokens.weight", "text.positions", "text.norm_post.weight"),
        finish=_attention.stacked,
        begin=_attention.unstacked,
        refuses=lambda found: _other(found.config),
    )


def _other(config: dict[str, object]) -> str | None:
    """Why an OPT is not of this kind."""
    said = [f"{name} is {config[name]}" for name, usual in _ONLY.items() if config.get(name, usual) != usual]
    wide, inner = (config.get(name) for name in ("hidden_size", "word_embed_proj_dim"))
    if inner is not None and inner != wide:
        said.append(f"word_embed_proj_dim is {inner} and hidden_size {wide}")
    if not said:
        return None
    return f"config.json: {', '.join(said)}, as in OPT-350m; only OPT with its norms before the blocks is read"


LAYOUTS = (_named("model.decoder."), _named("decoder."))


def load(checkpoint: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` naming the file and the tensor or setting that is missing or not supported, and
    `BadRequest` where the recipe says something of weights."""
    found = opened(LAYOUTS, checkpoint, weights, fold)
    config = found.config(_USUAL, "text.blocks.")
    found = replace(found, state=tied(found.checkpoint.path, found.state, config))
    act = config["activation_function"]
    if act not in ACTIVATIONS:
        raise UnknownCheckpoint(
            f"config.json: activation_function is {act!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    words, rows = len(found.state["text.tokens.weight"]), len(found.state["text.positions"]) - OFFSET
    context = min(config.get("max_position_embeddings", rows), rows)
    style = Style(heads=config["num_attention_heads"], activation=ACTIVATIONS[act], attention=AttentionSpec.of(config))  # type: ignore[arg-type]
    tokens = bucketed(TextPreprocess(context=context, pad="longest", pad_id=config["pad_token_id"]))
    tokenizer = _hugging_face.tokenizer_json(found.checkpoint)
    found.suit(tokenizer, context)
    module = found.fill("text.", partial(CausalLM, style=style, offset=OFFSET))
    return Net(
        name="opt",
        source=found.source("opt"),
        tasks=RAW,
        towers={
            "lm": Tower(
                module,
                reads(tokens),
                {"logits": Spec(dtype="float32", shape=("B", "T", words))},
                tokens,
                quantizer="search",
                promises=promises(module),
                prefix="text.",
            )
        },
        files={"tokenizer.json": tokenizer},
        layout=found.layout,
        folded=fold,
    )


NETS.register("opt")(NetPlugin(recognise("opt", *LAYOUTS), load, partial(load, fold=False)))
