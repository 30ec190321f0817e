"""LLM2CLIP and ProCLIP: a CLIP image tower, and an adaptor over vectors of a language model in place of a text tower.

Source: Huang et al. 2024, LLM2CLIP (arXiv 2411.04997); Hu et al. 2025, ProCLIP. The image tower is OpenAI's, EVA02 in
the names of its authors (Sun et al. 2023, arXiv 2303.15389), SigLIP's, or another that timm builds. Without an
open_clip_config.json the activation of OpenAI's tower is a fact of the recipe, and EVA02's sizes are those of its
tensors: heads are 64 wide, and rotary positions are those of a grid of 16 x 16.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.files import require_package
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings, open_clip, open_clip_timm, openai, rename
from calmclip.export.layouts.common import adaptor, openai_clip, timm_models
from calmclip.export.towers import count
from calmclip.models.errors import BadRequest, UnknownCheckpoint

EVA = (
    *rename(
        "visual",
        "image.trunk",
        {
            "cls_token": "cls_token",
            "pos_embed": "pos_embed",
            "patch_embed.proj.{p}": "patch_embed.proj.{p}",
            "norm.{p}": "norm.{p}",
            "head.{p}": "head.{p}",
        },
    ),
    *rename(
        "visual.blocks.{i}",
        "image.trunk.blocks.{i}",
        {
            "norm1.{p}": "norm1.{p}",
            "attn.q_proj.weight": "attn.q_proj.weight",
            "attn.k_proj.weight": "attn.k_proj.weight",
            "attn.v_proj.weight": "attn.v_proj.weight",
            "attn.q_bias": "attn.q_proj.bias",
            "attn.v_bias": "attn.v_proj.bias",
            "attn.inner_attn_ln.{p}": "attn.norm.{p}",
            "attn.proj.{p}": "attn.proj.{p}",
            "norm2.{p}": "norm2.{p}",
            "mlp.w1.{p}": "mlp.fc1_g.{p}",
            "mlp.w2.{p}": "mlp.fc1_x.{p}",
            "mlp.ffn_ln.{p}": "mlp.norm.{p}",
            "mlp.w3.{p}": "mlp.fc2.{p}",
        },
    ),
    Rule("visual.rope.{rest}", DROP),  # computed from the grid
    Rule("visual.blocks.{i}.attn.rope.{rest}", DROP),
)
_GRID = 16
_has_outside = partial(adaptor.has_adaptor, adaptor.OUTSIDE)


def of_openai(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    if open_clip.CONFIG not in checkpoint.configs:
        image = openai_clip.image_tower(state, openai.activation(checkpoint))
        pixels = openai_clip.pixels(openai_clip.side(state))
        return Settings(image, pixels=pixels, **adaptor.text_parts(checkpoint, state))
    if checkpoint.facts.activation:
        raise BadRequest(f"{checkpoint.path}: its {open_clip.CONFIG} states the activation; leave it out")
    config = open_clip.model_config(checkpoint)
    return Settings(**open_clip.image_parts(checkpoint, config, state), **adaptor.text_parts(checkpoint, state, config))


def of_eva(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    patch = state["image.trunk.patch_embed.proj.weight"].shape[-1]
    cells = openai_clip.square(state["image.trunk.pos_embed"].shape[1] - 1)
    if cells is None:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: the positions of visual.pos_embed make no square and a class token"
        )
    has_config = open_clip.CONFIG in checkpoint.configs
    config = open_clip.model_config(checkpoint) if has_config else None
    side = cells * patch
    pixels = open_clip.image_preprocess(checkpoint, side) if has_config else openai_clip.pixels(side)
    return Settings(partial(_eva, side=side), pixels=pixels, **adaptor.text_parts(checkpoint, state, config))


def _eva(tensors: Mapping[str, Tensor], side: int) -> nn.Module:
    """EVA02 with the depth and the widths of its tensors."""
    timm = require_package("timm", "EVA02's image tower")
    width, _, patch, _ = tensors["trunk.patch_embed.proj.weight"].shape
    hidden = len(tensors["trunk.blocks.0.mlp.fc1_g.weight"])
    trunk = timm.create_model(
        "eva02_base_patch16_clip_224",
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=count(tensors, "trunk.blocks."),
        num_heads=openai_clip.heads(width, "image"),
        mlp_ratio=(hidden + 0.5) / width,  # timm rounds the product down
        ref_feat_shape=(_GRID, _GRID),
        num_classes=len(tensors["trunk.head.weight"]),
    )
    return timm_models.TimmTrunk(tensors, trunk)


def of_timm(
    make: Callable[[Mapping[str, Any]], Callable[[Mapping[str, Tensor]], nn.Module]],
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
) -> Settings:
    """``make``: open_clip's config -> the function that builds the image tower."""
    config = open_clip.model_config(checkpoint)
    pixels = open_clip.image_preprocess(checkpoint, config["vision_cfg"].get("image_size", 224))
    return Settings(make(config), pixels=pixels, **adaptor.text_parts(checkpoint, state, config))


NAMES = ("llm2clip", "llm2clip_eva", "llm2clip_inside", "llm2clip_eva_inside")
# of its training code, with the language model outside or inside
for _end, _words, _prefix in (("", "", adaptor.OUTSIDE), ("_inside", ", its language model inside", adaptor.INSIDE)):
    LAYOUTS.register(f"llm2clip{_end}")(
        Layout(
            title=f"LLM2CLIP, OpenAI's ViT{_words}",
            keys=("visual.conv1.weight", "visual.class_embedding"),
            condition=partial(adaptor.has_adaptor, _prefix),
            rules=(*openai_clip.IMAGE, *adaptor.rules(_prefix), *openai_clip.SCALARS),
            required=(*openai_clip.IMAGE_REQUIRED, *adaptor.REQUIRED),
            facts=("activation", "text_model"),
            settings=of_openai,
        )
    )
    LAYOUTS.register(f"llm2clip_eva{_end}")(
        Layout(
            title=f"LLM2CLIP, EVA02{_words}",
            keys=("visual.pos_embed", "visual.cls_token"),
            condition=partial(adaptor.has_adaptor, _prefix),
            rules=(*EVA, *adaptor.rules(_prefix), *openai_clip.SCALARS),
            required=(
                "image.trunk.patch_embed.proj.weight", "image.trunk.pos_embed", "image.trunk.head.weight",
                "image.trunk.blocks.0.mlp.fc1_g.weight", *adaptor.REQUIRED,
            ),
            facts=("text_model",),
            settings=of_eva,
        )
    )  # fmt: skip
LAYOUTS.register("llm2clip_siglip")(
    Layout(
        title="LLM2CLIP, SigLIP's ViT of timm",
        keys=("visual.trunk.patch_embed.proj.weight", "visual.trunk.attn_pool.latent"),
        file=open_clip.CONFIG,
        condition=lambda checkpoint: _has_outside(checkpoint) and open_clip_timm.is_siglip(checkpoint),
        rules=(*open_clip_timm.SIGLIP, *adaptor.rules(adaptor.OUTSIDE), *openai_clip.SCALARS),
        required=(
            "image.patch.weight", "image.positions", "image.pool.probe", "image.norm_post.weight", *adaptor.REQUIRED,
        ),
        facts=("text_model",),
        settings=partial(of_timm, open_clip_timm.siglip_tower),
    )
)  # fmt: skip
LAYOUTS.register("llm2clip_timm")(
    Layout(
        title="LLM2CLIP, an image tower of timm's",
        keys=("logit_scale", "visual.trunk.{rest}"),
        file=open_clip.CONFIG,
        condition=lambda checkpoint: _has_outside(checkpoint) and not open_clip_timm.is_siglip(checkpoint),
        rules=(*open_clip_timm.TRUNK, *adaptor.rules(adaptor.OUTSIDE), *openai_clip.SCALARS),
        required=adaptor.REQUIRED,
        facts=("text_model",),
        settings=partial(of_timm, open_clip_timm.trunk_tower),
    )
)
