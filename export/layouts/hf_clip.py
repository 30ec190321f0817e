"""Hugging Face CLIP directories: config.json (model_type "clip"), weights, the processor's config, tokenizer.

Source: Radford et al. 2021 (arXiv 2103.00020), in the names of transformers' `CLIPModel`: q, k and v apart, projections
[D, W] as ours, and a misspelled ``pre_layrnorm``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings, _attention, _hugging_face, _openai
from calmclip.export.towers import Style, count
from calmclip.export.towers.attention import KEYS, AttentionSpec
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import UnknownCheckpoint


def vision_rules(layers: str = "layers") -> tuple[Rule, ...]:
    return (
        Rule("vision_model.embeddings.class_embedding", "image.cls"),
        Rule("vision_model.embeddings.patch_embedding.{p}", "image.patch.{p}"),
        Rule("vision_model.embeddings.position_embedding.weight", "image.positions"),
        Rule("vision_model.embeddings.position_ids", DROP),
        Rule("vision_model.pre_layrnorm.{p}", "image.norm_pre.{p}"),
        *_hugging_face.blocks(f"vision_model.encoder.{layers}", "image"),
        Rule("vision_model.post_layernorm.{p}", "image.norm_post.{p}"),
        Rule("visual_projection.weight", "image.projection.weight"),
    )


VISION = vision_rules()
TEXT = (
    Rule("text_model.embeddings.token_embedding.weight", "text.tokens.weight"),
    Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
    Rule("text_model.embeddings.position_ids", DROP),
    *_hugging_face.blocks("text_model.encoder.layers", "text"),
    Rule("text_model.final_layer_norm.{p}", "text.norm_post.{p}"),
    Rule("text_projection.weight", "text.projection.weight"),
)
# of CLIPTextConfig and CLIPVisionConfig: what a config that was saved as a difference leaves out
_TEXT = {"num_attention_heads": 8, "layer_norm_eps": 1e-5, "eos_token_id": 49407, "num_hidden_layers": 12}
VISION_USUAL = {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "num_hidden_layers": 12}


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    vision = tower_config(checkpoint, "vision_config", state, "image.blocks.", VISION_USUAL)
    text = tower_config(checkpoint, "text_config", state, "text.blocks.", _TEXT)
    end = text["eos_token_id"]
    return Settings(
        image=partial(VisionTransformer, style=style(vision, pool="cls")),
        # 2 is what transformers' first configs said, whatever the vocabulary: the highest id is meant
        text=partial(TextTransformer, style=style(text, pool="eot", causal=True, end=None if end == 2 else end)),
        pixels=_hugging_face.image_preprocess(_hugging_face.processor(checkpoint), _openai.side(state)),
        tokens=TextPreprocess(context=state["text.positions"].shape[0], pad="longest", pad_id=0),
        tokenizer=_hugging_face.tokenizer_json(checkpoint),
        license=_hugging_face.license_of(checkpoint.directory),
    )


def style(config: Mapping[str, Any], **more: Any) -> Style:
    return Style(
        heads=config["num_attention_heads"],
        activation=_hugging_face.activation(dict(config)),  # type: ignore[arg-type]
        eps=config["layer_norm_eps"],
        attention=AttentionSpec.of(config),
        **more,
    )


def tower_config(
    checkpoint: Checkpoint, name: str, state: Mapping[str, Tensor], prefix: str, usual: Mapping[str, Any]
) -> dict[str, Any]:
    """A tower's part of config.json. Raises `UnknownCheckpoint` when it counts other layers than there are."""
    own = checkpoint.config.get(name) or {}
    if not isinstance(own, dict):
        raise UnknownCheckpoint(f"{checkpoint.directory / 'config.json'}: {name} is {own!r}; expected an object")
    found = {**usual, **own}
    says = {key for key in KEYS if checkpoint.config.get(key) is not None} - {
        "max_seq_length"
    }  # which alone is no word
    if stray := sorted(says - own.keys()):
        raise UnknownCheckpoint(
            f"{checkpoint.directory / 'config.json'} says {stray[0]}, but not in {name}; attention is each tower's own"
        )
    if not isinstance(heads := found["num_attention_heads"], int) or heads < 1:
        raise UnknownCheckpoint(
            f"{checkpoint.directory / 'config.json'}: {name}.num_attention_heads is {heads!r}; expected a number"
        )
    layers, there = found["num_hidden_layers"], count(state, prefix)
    if layers != there:
        raise UnknownCheckpoint(
            f"{checkpoint.directory / 'config.json'}: {name}.num_hidden_layers is {layers}; the weights hold {there}"
        )
    return found


LAYOUTS.register("hf_clip")(
    Layout(
        title="Hugging Face CLIP",
        keys=("vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight"),
        model_type=("clip",),
        rules=(
            *VISION,
            *TEXT,
            Rule("logit_scale", "logit_scale"),
            *_attention.rules("vision_model.encoder.layers.{i}.self_attn.alpha", "image.blocks.{i}"),
            *_attention.rules("text_model.encoder.layers.{i}.self_attn.alpha", "text.blocks.{i}"),
        ),
        needs=_openai.NEEDS,
        settings=settings,
        finish=_attention.stacked,
        begin=_attention.unstacked,
    )
)
