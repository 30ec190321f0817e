"""GRAIN: SLIP's names, and beside them a decoder whose last query is the picture's vector.

Source: Halbe et al. 2024, GRAIN (arXiv 2412.04429). A training file keeps the CLIP as ``backbone_state_dict`` and the
decoder as ``state_dict``; here the latter's names begin with ``decoder.``. Its region queries are computed, for the
picture's query sees them; their boxes and vectors are left out. ``image_projection`` is not of its training.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.weights import DECODER
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings, _openai, slip
from calmclip.export.towers.queries import QueriedTransformer

HEADS = 8  # of the decoder
_LAYER = f"{DECODER}transformer.decoder.layers.{{i}}"
RULES = (
    *(
        replace(rule, ours=rule.ours.replace("image.", "image.vit.", 1))
        for rule in slip.IMAGE
        if rule.ours != "image.projection.weight"
    ),
    Rule("image_projection", DROP),
    Rule(f"{DECODER}proj.weight", "image.vit.projection.weight"),
    Rule(f"{DECODER}query_embed.weight", "image.queries"),
    Rule(f"{DECODER}img_proj", "image.projection.weight", _openai.transposed),
    Rule(f"{DECODER}transformer.pre_norm.{{p}}", "image.norm_patches.{p}"),
    Rule(f"{DECODER}transformer.decoder.norm.{{p}}", "image.norm_post.{p}"),
    *(
        Rule(f"{_LAYER}.{theirs}", f"image.layers.{{i}}.{ours}")
        for theirs, ours in {
            "self_attn.in_proj_{p}": "among.qkv.{p}",
            "self_attn.out_proj.{p}": "among.out.{p}",
            "multihead_attn.in_proj_{p}": "at.qkv.{p}",
            "multihead_attn.out_proj.{p}": "at.out.{p}",
            "linear1.{p}": "up.{p}",
            "linear2.{p}": "down.{p}",
            "norm1.{p}": "norm1.{p}",
            "norm2.{p}": "norm2.{p}",
            "norm3.{p}": "norm3.{p}",
        }.items()
    ),
    *(
        Rule(f"{DECODER}{name}", DROP)
        for name in (
            "obj_proj", "class_embed.{p}", "bbox_embed.{rest}", "pos_embed", "temporal_embed", "query_index.weight",
            "cls_embed.weight", "self_attn.{rest}",
        )
    ),
)  # fmt: skip


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Pictures are squashed to a square, bicubically, as its own transform says."""
    found = slip.settings(checkpoint, {name.replace("image.vit.", "image."): tensor for name, tensor in state.items()})
    pixels = found.pixels.model_copy(update={"resize": "exact", "shortest": None, "resample": "bicubic"})
    style = replace(found.image.keywords["style"], pool="none")  # type: ignore[attr-defined]
    return replace(found, pixels=pixels, image=partial(QueriedTransformer, style=style, heads=HEADS))


LAYOUTS.register("grain")(
    Layout(
        title="GRAIN",
        keys=("visual.cls_token", "token_embedding.weight", f"{DECODER}query_embed.weight", f"{DECODER}img_proj"),
        rules=(*RULES, *_openai.text(), _openai.LOGIT_SCALE),
        needs=("image.queries", "image.projection.weight", "text.positions", "text.projection.weight", "logit_scale"),
        settings=settings,
        note="the picture's query is served, its regions are not",
    )
)
