"""The names of OpenAI's CLIP, which most research code keeps, and CLIP's own preprocessing.

Source: Radford et al. 2021 (arXiv 2103.00020) and its published code; projections there are [W, D], ours [D, W].
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calmclip.export.layouts import DROP, Rule
from calmclip.export.layouts._clip_bpe import CLEAN
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_WIDTH = 64


def blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Residual blocks as `torch.nn.MultiheadAttention` names them, numbered behind ``theirs``."""
    names = {
        "ln_1.{p}": "norm1.{p}",
        "attn.in_proj_{p}": "attn.qkv.{p}",
        "attn.out_proj.{p}": "attn.out.{p}",
        "ln_2.{p}": "norm2.{p}",
        "mlp.c_fc.{p}": "mlp.up.{p}",
        "mlp.c_proj.{p}": "mlp.down.{p}",
    }
    return tuple(Rule(f"{theirs}.{{i}}.{one}", f"{ours}.blocks.{{i}}.{other}") for one, other in names.items())


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


IMAGE = (
    Rule("visual.class_embedding", "image.cls"),
    Rule("visual.positional_embedding", "image.positions"),
    Rule("visual.conv1.weight", "image.patch.weight"),
    Rule("visual.conv1.bias", "image.patch.bias"),
    Rule("visual.ln_pre.{p}", "image.norm_pre.{p}"),
    *blocks("visual.transformer.resblocks", "image"),
    Rule("visual.ln_post.{p}", "image.norm_post.{p}"),
    Rule("visual.proj", "image.projection.weight", transposed),
)


def text(prefix: str = "") -> tuple[Rule, ...]:
    return (
        Rule(f"{prefix}token_embedding.weight", "text.tokens.weight"),
        Rule(f"{prefix}positional_embedding", "text.positions"),
        *blocks(f"{prefix}transformer.resblocks", "text"),
        Rule(f"{prefix}ln_final.{{p}}", "text.norm_post.{p}"),
        Rule(f"{prefix}text_projection", "text.projection.weight", transposed),
        Rule(f"{prefix}text_projection.{{p}}", "text.projection.{p}"),
        Rule(f"{prefix}attn_mask", DROP),
    )


LOGIT_SCALE = Rule("logit_scale", "logit_scale", torch.Tensor.squeeze)
MARKS = tuple(Rule(name, DROP) for name in ("input_resolution", "context_length", "vocab_size"))
SCALARS = (LOGIT_SCALE, Rule("logit_bias", "logit_bias", torch.Tensor.squeeze), *MARKS)
IMAGE_NEEDS = (
    "image.patch.weight",
    "image.cls",
    "image.positions",
    "image.norm_pre.weight",
    "image.norm_post.weight",
    "image.projection.weight",
)
NEEDS = (
    *IMAGE_NEEDS,
    "text.tokens.weight",
    "text.positions",
    "text.norm_post.weight",
    "text.projection.weight",
    "logit_scale",
)


def side(state: Mapping[str, Tensor]) -> int:
    """Pixels of a square picture's side, by the patches and their positions. Raises `UnknownCheckpoint`: no square."""
    tokens = state["image.positions"].shape[0] - ("image.cls" in state)
    if tokens < 1 or (cells := round(tokens**0.5)) ** 2 != tokens:
        raise UnknownCheckpoint(f"the picture's table of positions is for {tokens} patches; expected those of a square")
    return cells * state["image.patch.weight"].shape[-1]


def heads(width: int, tower: str) -> int:
    """Attention heads, 64 wide. Raises `UnknownCheckpoint` for a width that has none."""
    if width % HEAD_WIDTH:
        raise UnknownCheckpoint(
            f"the {tower} tower is {width} wide; expected a multiple of {HEAD_WIDTH}, a head's width"
        )
    return width // HEAD_WIDTH


def image_tower(state: Mapping[str, Tensor], activation: str, **more: Any) -> Callable[..., nn.Module]:
    """OpenAI's ViT: pooled at the class token."""
    wide = heads(state["image.patch.weight"].shape[0], "image")
    style = Style(heads=wide, activation=activation, pool="cls", **more)  # type: ignore[arg-type]
    return partial(VisionTransformer, style=style)


def text_tower(state: Mapping[str, Tensor], activation: str, **more: Any) -> Callable[..., nn.Module]:
    """OpenAI's text tower: causal, pooled at the highest id."""
    wide = heads(state["text.positions"].shape[1], "text")
    style = Style(heads=wide, activation=activation, pool="eot", causal=True, **more)  # type: ignore[arg-type]
    return partial(TextTransformer, style=style)


def tokens(state: Mapping[str, Tensor]) -> TextPreprocess:
    return TextPreprocess(context=state["text.positions"].shape[0], pad="longest", pad_id=0, clean=CLEAN)


def pixels(side: int) -> ImagePreprocess:
    """Short side to ``side``, bicubic, centre crop, OpenAI's mean and std."""
    return ImagePreprocess(
        size=(side, side), resize="shortest", shortest=side, crop_offset="round", resample="bicubic", mean=MEAN, std=STD
    )
