"""GRAIN: SLIP's names, and beside them a decoder: its last query gives the picture's vector, the others regions.

Source: Halbe et al. 2024, GRAIN (arXiv 2412.04429). A training file keeps the CLIP as ``backbone_state_dict`` and the
decoder as ``state_dict``; here the names of the decoder begin with ``decoder.``. Its training uses neither
``image_projection`` nor the classes of regions.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.weights import DECODER
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings, rename, slip
from calmclip.export.layouts.common import openai_clip
from calmclip.export.towers.queries import QueriedRegions, QueriedTransformer

HEADS = 8  # of the decoder
RULES = (
    *(
        replace(rule, ours=rule.ours.replace("image.", "image.vit.", 1))
        for rule in slip.IMAGE
        if rule.ours != "image.projection.weight"
    ),
    Rule("image_projection", DROP),
    Rule(f"{DECODER}proj.weight", "image.vit.projection.weight"),
    Rule(f"{DECODER}query_embed.weight", "image.queries"),
    Rule(f"{DECODER}img_proj", "image.projection.weight", openai_clip.transposed),
    Rule(f"{DECODER}obj_proj", "image.objects.weight", openai_clip.transposed),
    Rule(f"{DECODER}bbox_embed.layers.{{i}}.{{p}}", "image.box.{i}.{p}"),
    Rule(f"{DECODER}transformer.pre_norm.{{p}}", "image.norm_patches.{p}"),
    Rule(f"{DECODER}transformer.decoder.norm.{{p}}", "image.norm_post.{p}"),
    *rename(
        f"{DECODER}transformer.decoder.layers.{{i}}",
        "image.layers.{i}",
        {
            "self_attn.in_proj_{p}": "among.qkv.{p}",
            "self_attn.out_proj.{p}": "among.out.{p}",
            "multihead_attn.in_proj_{p}": "at.qkv.{p}",
            "multihead_attn.out_proj.{p}": "at.out.{p}",
            "linear1.{p}": "up.{p}",
            "linear2.{p}": "down.{p}",
            "norm{e}.{p}": "norm{e}.{p}",
        },
    ),
    *(
        Rule(f"{DECODER}{name}", DROP)
        for name in (
            "class_embed.{p}", "pos_embed", "temporal_embed", "query_index.weight", "cls_embed.weight",
            "self_attn.{rest}",
        )
    ),
)  # fmt: skip


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Its own transform resizes pictures to a square, bicubically."""
    vit = {name.replace("image.vit.", "image."): tensor for name, tensor in state.items()}
    clip = slip.settings(checkpoint, vit)
    return replace(
        clip,
        pixels=clip.pixels.model_copy(update={"resize": "exact", "shortest": None, "resample": "bicubic"}),
        image=partial(QueriedTransformer, style=replace(slip.image_style(vit), pool="none"), heads=HEADS),
        regions=QueriedRegions,
    )


LAYOUTS.register("grain")(
    Layout(
        title="GRAIN",
        keys=("visual.cls_token", "token_embedding.weight", f"{DECODER}query_embed.weight", f"{DECODER}img_proj"),
        rules=(*RULES, *openai_clip.text(), openai_clip.LOGIT_SCALE),
        required=(
            "image.queries", "image.projection.weight", "image.objects.weight", "image.box.0.weight",
            "text.positions", "text.projection.weight", "logit_scale",
        ),
        settings=settings,
        note="a region has no score of its own: its objectness is 1",
    )
)  # fmt: skip
