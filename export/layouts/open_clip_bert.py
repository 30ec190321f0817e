"""open_clip directories whose text tower is a Hugging Face BERT, RoBERTa or XLM-R; the image tower is open_clip's ViT.

Source: Ilharco et al., OpenCLIP (doi 10.5281/zenodo.5143773), its `HFTextEncoder`: padding masked, a pooler by name,
then no product, one or two. A config.json beside the weights is the text tower's own config. Without it heads are 64
wide, and one row of token types tells a RoBERTa from a BERT.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings, open_clip, rename
from calmclip.export.layouts.common import bert_text, openai_clip
from calmclip.models.errors import UnknownCheckpoint

POOLERS: dict[str, dict[str, Any]] = {
    "mean_pooler": {"pool": "mean"},
    "cls_pooler": {"pool": "first", "pooler": True},
    "cls_last_hidden_state_pooler": {"pool": "first"},
}
_OTHERS = ("mt5", "t5", "m2m", "nllb")


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Raises `UnknownCheckpoint` with the setting that is not supported."""
    config = open_clip.model_config(checkpoint)
    image = open_clip.image_parts(checkpoint, config, state)
    return Settings(**image, **text_parts(checkpoint, config, state))


def text_parts(checkpoint: Checkpoint, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `Settings` for texts, for any image tower."""
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
    kind = bert_text.KINDS.get(checkpoint.config.get("model_type", ""))
    text_config = checkpoint.config if kind else {}
    kind = kind or (bert_text.ROBERTA if len(state["text.types"]) == 1 else bert_text.BERT)
    context = text_cfg.get("context_length", 77)
    return bert_text.text_settings(checkpoint, text_config, state, kind, context, clean="whitespace", **POOLERS[pooler])


def refusal(checkpoint: Checkpoint) -> str | None:
    match checkpoint.configs.get(open_clip.CONFIG):
        case {"model_cfg": {"text_cfg": {"hf_model_name": str() as name}}}:
            if any(other in name.lower() for other in _OTHERS):
                return f"its text tower is {name}; expected a BERT, RoBERTa or XLM-R"
    return None


RULES = (
    *bert_text.rules("text.transformer."),
    *rename("text.proj", "text.projection", {"weight": "weight", "0.weight": "up.weight", "2.weight": "down.weight"}),
    *openai_clip.SCALARS,
)

LAYOUTS.register("open_clip_bert")(
    Layout(
        title="open_clip, its own ViT and a Hugging Face text tower of BERT's kind",
        keys=(
            "visual.conv1.weight", "visual.class_embedding", "text.transformer.embeddings.word_embeddings.weight",
        ),
        file=open_clip.CONFIG,
        rules=(*openai_clip.IMAGE, *RULES),
        required=(*openai_clip.IMAGE_REQUIRED, *bert_text.REQUIRED, "logit_scale"),
        settings=settings,
        refusal=refusal,
    )
)  # fmt: skip
