"""Hugging Face CLIP directories: config.json (model_type "clip"), weights, the processor's config, tokenizer.

Source: Radford et al. 2021 (arXiv 2103.00020), in the names of transformers' `CLIPModel`: q, k and v apart, projections
[D, W] as ours, and a misspelled ``pre_layrnorm``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint, hugging_face
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings, concatenate, rename
from calmclip.export.layouts.common import attention_gates, openai_clip
from calmclip.export.towers import Style, count
from calmclip.export.towers.attention import KEYS, AttentionSpec
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

_BLOCK = {
    "layer_norm1.{p}": "norm1.{p}",
    "self_attn.out_proj.{p}": "attn.out.{p}",
    "layer_norm2.{p}": "norm2.{p}",
    "mlp.fc1.{p}": "mlp.up.{p}",
    "mlp.fc2.{p}": "mlp.down.{p}",
}


def blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The blocks of `CLIPModel`, also of SigLIP and OWL-ViT, numbered after ``theirs``."""
    return (
        *rename(f"{theirs}.{{i}}", f"{ours}.blocks.{{i}}", _BLOCK),
        *concatenate(f"{theirs}.{{i}}.self_attn.*_proj.{{p}}", f"{ours}.blocks.{{i}}.attn.qkv.{{p}}", "qkv"),
    )


def vision_rules(layers: str = "layers") -> tuple[Rule, ...]:
    return (
        Rule("vision_model.embeddings.class_embedding", "image.cls"),
        Rule("vision_model.embeddings.patch_embedding.{p}", "image.patch.{p}"),
        Rule("vision_model.embeddings.position_embedding.weight", "image.positions"),
        Rule("vision_model.embeddings.position_ids", DROP),
        Rule("vision_model.pre_layrnorm.{p}", "image.norm_pre.{p}"),
        *blocks(f"vision_model.encoder.{layers}", "image"),
        Rule("vision_model.post_layernorm.{p}", "image.norm_post.{p}"),
        Rule("visual_projection.weight", "image.projection.weight"),
    )


VISION = vision_rules()
TEXT_MODEL = (
    Rule("text_model.embeddings.token_embedding.weight", "text.tokens.weight"),
    Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
    Rule("text_model.embeddings.position_ids", DROP),
    *blocks("text_model.encoder.layers", "text"),
    Rule("text_model.final_layer_norm.{p}", "text.norm_post.{p}"),
)
TEXT = (*TEXT_MODEL, Rule("text_projection.weight", "text.projection.weight"))
# defaults of CLIPTextConfig and CLIPVisionConfig, which a config saved as a difference leaves out
_TEXT = {"num_attention_heads": 8, "layer_norm_eps": 1e-5, "eos_token_id": 49407, "num_hidden_layers": 12}
_VISION = {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "num_hidden_layers": 12}


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    image = image_settings(checkpoint, state)
    text = tower_config(checkpoint, "text_config", state, "text.blocks.", _TEXT)
    end = text["eos_token_id"]
    return Settings(
        **image,
        # the first configs of transformers say 2 for every vocabulary, and mean the highest id
        text=partial(TextTransformer, style=style(text, pool="eot", causal=True, end=None if end == 2 else end)),
        tokens=TextPreprocess(context=state["text.positions"].shape[0], pad="longest", pad_id=0),
        tokenizer=hugging_face.tokenizer_json(checkpoint),
    )


def image_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `Settings` for pictures, and the licence."""
    config = tower_config(checkpoint, "vision_config", state, "image.blocks.", _VISION)
    return {
        "image": partial(VisionTransformer, style=style(config, pool="cls")),
        "pixels": hugging_face.image_preprocess(hugging_face.processor(checkpoint), openai_clip.side(state)),
        "license": hugging_face.license_of(checkpoint.directory),
    }


def style(config: Mapping[str, Any], **options: Any) -> Style:
    return Style(
        heads=config["num_attention_heads"],
        activation=hugging_face.activation(dict(config)),  # type: ignore[arg-type]
        eps=config["layer_norm_eps"],
        attention=AttentionSpec.of(config),
        **options,
    )


def tower_config(
    checkpoint: Checkpoint, name: str, state: Mapping[str, Tensor], prefix: str, usual: Mapping[str, Any]
) -> dict[str, Any]:
    """A tower's part of config.json. Raises `UnknownCheckpoint` if it counts other layers than the weights have."""
    file = checkpoint.directory / "config.json"
    given = checkpoint.config.get(name) or {}
    if not isinstance(given, dict):
        raise UnknownCheckpoint(f"{file}: {name} is {given!r}; expected an object")
    config = {**usual, **given}
    # max_seq_length alone says nothing of attention
    shared = {key for key in KEYS if checkpoint.config.get(key) is not None} - {"max_seq_length"}
    if stray := sorted(shared - given.keys()):
        raise UnknownCheckpoint(f"{file} says {stray[0]}, but not in {name}; attention is each tower's own")
    if not isinstance(heads := config["num_attention_heads"], int) or heads < 1:
        raise UnknownCheckpoint(f"{file}: {name}.num_attention_heads is {heads!r}; expected a number")
    layers, blocks = config["num_hidden_layers"], count(state, prefix)
    if layers != blocks:
        raise UnknownCheckpoint(f"{file}: {name}.num_hidden_layers is {layers}; the weights hold {blocks}")
    return config


LAYOUTS.register("hf_clip")(
    Layout(
        title="Hugging Face CLIP",
        keys=("vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight"),
        model_type=("clip",),
        rules=(
            *VISION,
            *TEXT,
            Rule("logit_scale", "logit_scale"),
            *attention_gates.rules("vision_model.encoder.layers.{i}.self_attn.alpha", "image.blocks.{i}"),
            *attention_gates.rules("text_model.encoder.layers.{i}.self_attn.alpha", "text.blocks.{i}"),
        ),
        required=openai_clip.REQUIRED,
        settings=settings,
        after_read=attention_gates.stack_heads,
        before_write=attention_gates.unstack_heads,
    )
)
