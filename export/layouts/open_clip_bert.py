"""open_clip directories whose text tower is a Hugging Face BERT, RoBERTa or XLM-R; the image tower is open_clip's ViT.

Source: Ilharco et al., OpenCLIP (doi 10.5281/zenodo.5143773), its `HFTextEncoder`: padding masked, a pooler by name,
nothing, one product or two behind it. The tower's own config is read from a config.json beside the weights where there
is one; else heads are 64 wide, and one row of token types tells a RoBERTa from a BERT.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, _bert, _openai, open_clip
from calmclip.export.towers.image import VisionTransformer
from calmclip.models.errors import UnknownCheckpoint

POOLERS: dict[str, dict[str, Any]] = {
    "mean_pooler": {"pool": "mean"},
    "cls_pooler": {"pool": "first", "pooler": True},
    "cls_last_hidden_state_pooler": {"pool": "first"},
}
_OTHERS = ("mt5", "t5", "m2m", "nllb")


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Raises `UnknownCheckpoint` naming the setting that is not supported."""
    config = open_clip.model_config(checkpoint)
    return Settings(
        image=partial(VisionTransformer, style=open_clip.vision_style(config, state)),
        pixels=open_clip.pixels(checkpoint, config, state),
        **text_parts(checkpoint, config, state),
    )


def text_parts(checkpoint: Checkpoint, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of `Settings` what texts need: ``text``, ``tokens`` and ``tokenizer``, whatever the image tower is."""
    open_clip.require_usual(config, "text_cfg")
    text_cfg = config["text_cfg"]
    pooler = text_cfg.get("hf_pooler_type") or "mean_pooler"
    if pooler not in POOLERS:
        raise UnknownCheckpoint(
            f"{open_clip.CONFIG}: text_cfg.hf_pooler_type is {pooler!r}; expected one of {', '.join(POOLERS)}"
        )
    for name in ("tokenizer_kwargs", "tokenizer_mode"):
        if text_cfg.get(name):
            raise UnknownCheckpoint(
                f"{open_clip.CONFIG}: text_cfg.{name} is {text_cfg[name]!r}, which is not supported"
            )
    kind = _bert.KINDS.get(checkpoint.config.get("model_type", ""))
    own = checkpoint.config if kind else {}
    kind = kind or (_bert.ROBERTA if len(state["text.types"]) == 1 else _bert.BERT)
    context = text_cfg.get("context_length", 77)
    text, tokens = _bert.tower(own, state, kind, context, clean="whitespace", **POOLERS[pooler])
    return {"text": text, "tokens": tokens, "tokenizer": _bert.tokenizer(checkpoint, state).to_str().encode()}


def refuses(checkpoint: Checkpoint) -> str | None:
    match checkpoint.configs.get(open_clip.CONFIG):
        case {"model_cfg": {"text_cfg": {"hf_model_name": str() as name}}}:
            if any(other in name.lower() for other in _OTHERS):
                return f"its text tower is {name}; of Hugging Face's, BERT, RoBERTa and XLM-R are supported"
    return None


RULES = (
    *_bert.rules("text.transformer."),
    Rule("text.proj.weight", "text.projection.weight"),
    Rule("text.proj.0.weight", "text.projection.up.weight"),
    Rule("text.proj.2.weight", "text.projection.down.weight"),
    *_openai.SCALARS,
)

LAYOUTS.register("open_clip_bert")(
    Layout(
        title="open_clip, its own ViT and a Hugging Face text tower of BERT's kind",
        keys=(
            "visual.conv1.weight", "visual.class_embedding", "text.transformer.embeddings.word_embeddings.weight",
        ),
        file=open_clip.CONFIG,
        rules=(*_openai.IMAGE, *RULES),
        needs=(*_openai.IMAGE_NEEDS, *_bert.NEEDS, "logit_scale"),
        settings=settings,
        refuses=refuses,
    )
)  # fmt: skip
