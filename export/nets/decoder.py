"""Decoders of language models from Hugging Face directories, as embedders of texts.

Source: transformers' Llama, Qwen2, Qwen3, Mistral, Phi-3, Gemma, Gemma 2 and Gemma 3 (text), with or without the prefix
`model.` and a head for words, which is left out; pooling: sentence-transformers' modules, or E5-mistral (arXiv
2401.00368, the last token) and LLM2Vec (BehnamGhader et al. 2024, arXiv 2404.05961, the mean of tokens that see all).

Graph: text, ids, mask int64 [B, T] -> text_embeds [B, D], unit rows; embed, raw. If the tokens of a prompt are not
pooled, a third input ``pooled`` int64 [B, T] tells them. Without modules.json a causal model pools its last token and
another the mean of its tokens, unless the recipe states the pooling; the bundle's source says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tokenizers import Tokenizer, processors
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint, Weights, hugging_face
from calmclip.export.checkpoints.files import read_json
from calmclip.export.layouts import Layout
from calmclip.export.layouts.common import attention_gates, decoder_text
from calmclip.export.layouts.common.decoder_text import KINDS
from calmclip.export.nets import NETS, Net, NetPlugin, bucketed, float32, text_inputs
from calmclip.export.nets.common.sentence_modules import FILE, Modules, read_modules, read_prompts
from calmclip.export.nets.common.single_tower import Opened, open_checkpoint, recognise
from calmclip.export.towers.decoder import DENSE
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json+merges.txt")
_POOLS = ("last", "first", "mean", "weightedmean")


def _layout(prefix: str, four_norms: bool, fused: bool) -> Layout:
    return Layout(
        title="Hugging Face decoder",
        keys=(f"{prefix}embed_tokens.weight", f"{prefix}layers.{{i}}.mlp.down_proj.weight"),
        model_type=tuple(n for n, kind in KINDS.items() if (kind.four_norms, kind.fused) == (four_norms, fused)),
        rules=decoder_text.rules(prefix, four_norms, fused),
        required=decoder_text.REQUIRED,
        after_read=attention_gates.stack_heads,
        before_write=attention_gates.unstack_heads,
    )


LAYOUTS = tuple(
    _layout(prefix, *names) for prefix in ("model.", "") for names in ((False, False), (True, False), (False, True))
)


def load(path: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the file and the tensor or setting that is missing or not supported, and
    `BadRequest` for facts in the recipe's section on weights that contradict the checkpoint."""
    opened = open_checkpoint(LAYOUTS, path, weights, fold, facts=("pool", "attention"))
    config = opened.config(decoder_text.usual(opened.checkpoint.config), "text.blocks.")
    causal = decoder_text.is_causal(config) if weights.attention is None else weights.attention == "causal"
    modules, note = _modules(opened, weights, causal)
    dense = {f"text.dense.{i}.weight": layer.weight for i, layer in enumerate(modules.dense)}
    dense |= {f"text.dense.{i}.bias": layer.bias for i, layer in enumerate(modules.dense) if layer.bias is not None}
    opened = replace(opened, state={**opened.state, **dense})
    width = opened.state["text.tokens.weight"].shape[1]
    make, context = decoder_text.tower(
        config,
        width,
        modules.pool,  # type: ignore[arg-type]
        causal,
        tuple(layer.activation for layer in modules.dense),
    )
    tokens = bucketed(
        TextPreprocess(
            context=min(context, modules.context or context),
            pad_id=_pad_id(config, opened.state),
            mask="mask",
            truncate=True,
            **modules.prompting(),
        )
    )
    tokenizer = _tokenizer(opened.checkpoint)
    opened.check_vocabulary(tokenizer, tokens.context)
    dim = len(modules.dense[-1].weight) if modules.dense else width
    net = opened.net(
        "decoder",
        "text",
        opened.fill("text.", make),
        text_inputs(tokens),
        {"text_embeds": float32("B", dim)},
        tokens,
        {"tokenizer.json": tokenizer},
        tasks=("embed", "raw"),
    )
    seen = "causal" if causal else "bidirectional"
    notes = f"{net.source.notes}: {config['model_type']}, {seen} attention, pooling {modules.pool}{note}"
    return replace(net, source=net.source.model_copy(update={"notes": notes}))


def _modules(opened: Opened, weights: Weights, causal: bool) -> tuple[Modules, str]:
    """The pooling, and a note if nothing in the directory states it."""
    folder = opened.checkpoint.directory
    if (folder / FILE).is_file():
        if weights.pool:
            raise BadRequest(f"{folder / FILE} states the pooling; leave out pool {weights.pool!r}")
        return read_modules(folder, activations=tuple(DENSE), pools=_POOLS), ""
    prompts, prompt = read_prompts(folder)
    if weights.pool:
        return Modules(weights.pool, prompts=prompts, prompt=prompt), ", as the recipe states"
    modules = Modules("last" if causal else "mean", prompts=prompts, prompt=prompt)
    return modules, ", the default because no modules.json states it"


def _tokenizer(checkpoint: Checkpoint) -> bytes:
    """tokenizer.json, with the tokens that tokenizer_config.json adds at the ends, if that file does not add them."""
    content = hugging_face.tokenizer_json(checkpoint, TOKENIZERS)
    file, words = checkpoint.directory / "tokenizer_config.json", Tokenizer.from_str(content.decode())
    settings = read_json(file) if file.is_file() else {}
    template = ["$A"]
    for key, token, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        text = settings.get(token)
        text = text.get("content") if isinstance(text, dict) else text
        id_ = words.token_to_id(text) if settings.get(key) is True and isinstance(text, str) else None
        if isinstance(text, str) and id_ is not None and words.encode("a").ids[place : place or None][:1] != [id_]:
            template.insert(len(template) if place else 0, text)
    if template == ["$A"]:
        return content
    ids = [(text, words.token_to_id(text)) for text in template if text != "$A"]
    ends = processors.TemplateProcessing(single=" ".join(template), special_tokens=ids)
    words.post_processor = processors.Sequence([words.post_processor, ends]) if words.post_processor else ends
    return words.to_str().encode()


def _pad_id(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> int:
    """Any token: the mask hides it. Some configs have none, or one beyond the table."""
    pad = config.get("pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < len(state["text.tokens.weight"]) else 0


NETS.register("decoder")(NetPlugin(recognise(KINDS, *LAYOUTS), load, partial(load, fold=False)))
