"""SLIP's names: timm's ViT and OpenAI's text tower, as LaCLIP (CC3M, CC12M, RedCaps), A-CLIP and GRAIN keep them.

Source: Mu et al. 2021, SLIP (arXiv 2112.12750); Fan et al. 2023, LaCLIP (arXiv 2305.20088): norms of q and k over each
head, eps 1e-6; Yang et al. 2023, A-CLIP (arXiv 2212.08653): its averaged copies and the heads of its loss are left out.
ImageNet's mean and std; GELU in the image tower, QuickGELU in the text tower.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings, rename
from calmclip.export.layouts.common import openai_clip, timm_models
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer

EPS = 1e-6  # timm's
_HEADS = {384: 12}  # width -> heads of a ViT-S, as in MoCo v3 and SLIP; other heads are 64 wide
IMAGE = (
    Rule("visual.cls_token", "image.cls", torch.Tensor.flatten),
    Rule("visual.pos_embed", "image.positions", partial(torch.flatten, end_dim=-2)),
    Rule("visual.patch_embed.proj.{p}", "image.patch.{p}"),
    *rename(
        "visual.blocks.{i}",
        "image.blocks.{i}",
        {**timm_models.BLOCK, "attn.q_norm.{p}": "attn.q_norm.{p}", "attn.k_norm.{p}": "attn.k_norm.{p}"},
    ),
    Rule("visual.norm.{p}", "image.norm_post.{p}"),
    Rule("image_projection", "image.projection.weight", openai_clip.transposed),
)
A_CLIP = tuple(
    Rule(name, DROP)
    for name in (
        "visual_ema.{rest}", "transformer_e.{rest}", "image_projection_e", "text_projection_e", "image_mlp.{rest}",
        "im_proj_byol{rest}", "im_pred_byol{rest}",
    )
)  # fmt: skip


def image_style(state: Mapping[str, Tensor]) -> Style:
    width = state["image.patch.weight"].shape[0]
    norm = state.get("image.blocks.0.attn.q_norm.weight")
    heads = width // norm.shape[0] if norm is not None else _HEADS.get(width) or openai_clip.heads(width, "image")
    return Style(heads=heads, activation="gelu", pool="cls", eps=EPS, qk_eps=EPS)


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Pictures are resized bilinearly: LaCLIP and A-CLIP keep torchvision's default."""
    pixels = openai_clip.pixels(openai_clip.side(state))
    return Settings(
        image=partial(VisionTransformer, style=image_style(state)),
        pixels=pixels.model_copy(
            update={"resample": "bilinear", "mean": openai_clip.IMAGENET_MEAN, "std": openai_clip.IMAGENET_STD}
        ),
        **openai_clip.text_settings(state, checkpoint.facts.activation or "quick_gelu"),
    )


LAYOUTS.register("slip")(
    Layout(
        title="SLIP-style (LaCLIP, A-CLIP)",
        keys=("visual.cls_token", "visual.patch_embed.proj.weight", "image_projection", "token_embedding.weight"),
        without=("decoder.query_embed.weight",),
        rules=(*IMAGE, *openai_clip.text(), openai_clip.LOGIT_SCALE, *A_CLIP),
        required=tuple(name for name in openai_clip.REQUIRED if name != "image.norm_pre.weight"),
        facts=("activation",),
        settings=settings,
    )
)
