"""SLIP's names: timm's ViT and OpenAI's text tower, as LaCLIP (CC3M, CC12M, RedCaps), A-CLIP and GRAIN keep them.

Source: Mu et al. 2021, SLIP (arXiv 2112.12750); Fan et al. 2023, LaCLIP (arXiv 2305.20088): norms of q and k over each
head, eps 1e-6; Yang et al. 2023, A-CLIP (arXiv 2212.08653): its averaged copies and heads of the loss are left out.
ImageNet's mean and std; GELU in the image tower, QuickGELU in the text tower.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings, _openai
from calmclip.export.layouts._clip_bpe import tokenizer_json
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer

EPS = 1e-6  # timm's
_HEADS = {384: 12}  # of a ViT-S, as MoCo v3 and SLIP have it; 64 wide otherwise
IMAGE = (
    Rule("visual.cls_token", "image.cls", torch.Tensor.flatten),
    Rule("visual.pos_embed", "image.positions", partial(torch.flatten, end_dim=-2)),
    Rule("visual.patch_embed.proj.{p}", "image.patch.{p}"),
    *(
        Rule(f"visual.blocks.{{i}}.{theirs}.{{p}}", f"image.blocks.{{i}}.{ours}.{{p}}")
        for theirs, ours in {
            "norm1": "norm1",
            "attn.qkv": "attn.qkv",
            "attn.q_norm": "attn.q_norm",
            "attn.k_norm": "attn.k_norm",
            "attn.proj": "attn.out",
            "norm2": "norm2",
            "mlp.fc1": "mlp.up",
            "mlp.fc2": "mlp.down",
        }.items()
    ),
    Rule("visual.norm.{p}", "image.norm_post.{p}"),
    Rule("image_projection", "image.projection.weight", _openai.transposed),
)
A_CLIP = tuple(
    Rule(name, DROP)
    for name in (
        "visual_ema.{rest}", "transformer_e.{rest}", "image_projection_e", "text_projection_e", "image_mlp.{rest}",
        "im_proj_byol{rest}", "im_pred_byol{rest}",
    )
)  # fmt: skip
NEEDS = tuple(name for name in _openai.NEEDS if name != "image.norm_pre.weight")


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """torchvision's default resizing is bilinear, and LaCLIP and A-CLIP leave it at that."""
    width = state["image.patch.weight"].shape[0]
    norm = state.get("image.blocks.0.attn.q_norm.weight")
    heads = width // norm.shape[0] if norm is not None else _HEADS.get(width) or _openai.heads(width, "image")
    image = Style(heads=heads, activation="gelu", pool="cls", eps=EPS, qk_eps=EPS)
    pixels = _openai.pixels(_openai.side(state))
    return Settings(
        image=partial(VisionTransformer, style=image),
        text=_openai.text_tower(state, checkpoint.given.activation or "quick_gelu"),
        pixels=pixels.model_copy(
            update={"resample": "bilinear", "mean": _openai.IMAGENET_MEAN, "std": _openai.IMAGENET_STD}
        ),
        tokens=_openai.tokens(state),
        tokenizer=tokenizer_json(),
    )


LAYOUTS.register("slip")(
    Layout(
        title="SLIP-style (LaCLIP, A-CLIP)",
        keys=("visual.cls_token", "visual.patch_embed.proj.weight", "image_projection", "token_embedding.weight"),
        without=("decoder.query_embed.weight",),
        rules=(*IMAGE, *_openai.text(), _openai.LOGIT_SCALE, *A_CLIP),
        needs=NEEDS,
        asks=("activation",),
        settings=settings,
    )
)
