"""The names of OpenAI's CLIP, which most research code keeps, and CLIP's own preprocessing.

Source: Radford et al. 2021 (arXiv 2103.00020) and its published code. Projections are [W, D] there, [D, W] here.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import DROP, Rule, Settings, rename
from calmclip.export.layouts.common.clip_bpe import CLEAN, tokenizer_json
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_WIDTH = 64
_BLOCK = {  # as `torch.nn.MultiheadAttention` names them
    "ln_1.{p}": "norm1.{p}",
    "attn.in_proj_{p}": "attn.qkv.{p}",
    "attn.out_proj.{p}": "attn.out.{p}",
    "ln_2.{p}": "norm2.{p}",
    "mlp.c_fc.{p}": "mlp.up.{p}",
    "mlp.c_proj.{p}": "mlp.down.{p}",
}


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


IMAGE = (
    Rule("visual.class_embedding", "image.cls"),
    Rule("visual.positional_embedding", "image.positions"),
    Rule("visual.conv1.weight", "image.patch.weight"),
    Rule("visual.conv1.bias", "image.patch.bias"),
    Rule("visual.ln_pre.{p}", "image.norm_pre.{p}"),
    *rename("visual.transformer.resblocks.{i}", "image.blocks.{i}", _BLOCK),
    Rule("visual.ln_post.{p}", "image.norm_post.{p}"),
    Rule("visual.proj", "image.projection.weight", transposed),
)


def text(prefix: str = "") -> tuple[Rule, ...]:
    return (
        Rule(f"{prefix}token_embedding.weight", "text.tokens.weight"),
        Rule(f"{prefix}positional_embedding", "text.positions"),
        *rename(f"{prefix}transformer.resblocks.{{i}}", "text.blocks.{i}", _BLOCK),
        Rule(f"{prefix}ln_final.{{p}}", "text.norm_post.{p}"),
        Rule(f"{prefix}text_projection", "text.projection.weight", transposed),
        Rule(f"{prefix}text_projection.{{p}}", "text.projection.{p}"),
        Rule(f"{prefix}attn_mask", DROP),
    )


LOGIT_SCALE = Rule("logit_scale", "logit_scale", torch.Tensor.squeeze)
MARKS = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's archives keep as tensors
DROP_MARKS = tuple(Rule(name, DROP) for name in MARKS)
SCALARS = (LOGIT_SCALE, Rule("logit_bias", "logit_bias", torch.Tensor.squeeze), *DROP_MARKS)
IMAGE_REQUIRED = (
    "image.patch.weight",
    "image.cls",
    "image.positions",
    "image.norm_pre.weight",
    "image.norm_post.weight",
    "image.projection.weight",
)
TEXT_REQUIRED = (
    "text.tokens.weight",
    "text.positions",
    "text.norm_post.weight",
    "text.projection.weight",
    "logit_scale",
)
REQUIRED = (*IMAGE_REQUIRED, *TEXT_REQUIRED)


def square(patches: int) -> int | None:
    """The side of a square of so many patches; None if they make no square."""
    side = round(max(patches, 0) ** 0.5)
    return side if side and side**2 == patches else None


def side(state: Mapping[str, Tensor]) -> int:
    """The side of the square input in pixels. Raises `UnknownCheckpoint` if the patches make no square."""
    patches = state["image.positions"].shape[0] - ("image.cls" in state)
    if (cells := square(patches)) is None:
        raise UnknownCheckpoint(f"the image tower's table of positions has {patches} patches; expected a square")
    return cells * state["image.patch.weight"].shape[-1]


def heads(width: int, tower: str) -> int:
    """The number of attention heads, each 64 wide. Raises `UnknownCheckpoint` if they do not divide the width."""
    if width % HEAD_WIDTH:
        raise UnknownCheckpoint(
            f"the {tower} tower is {width} wide; expected a multiple of {HEAD_WIDTH}, a head's width"
        )
    return width // HEAD_WIDTH


def image_tower(state: Mapping[str, Tensor], activation: str, **options: Any) -> Callable[..., nn.Module]:
    """OpenAI's ViT, pooled at the class token."""
    number = heads(state["image.patch.weight"].shape[0], "image")
    style = Style(heads=number, activation=activation, pool="cls", **options)  # type: ignore[arg-type]
    return partial(VisionTransformer, style=style)


def text_tower(state: Mapping[str, Tensor], activation: str, **options: Any) -> Callable[..., nn.Module]:
    """OpenAI's text tower: causal, pooled at the highest id."""
    number = heads(state["text.positions"].shape[1], "text")
    style = Style(heads=number, activation=activation, pool="eot", causal=True, **options)  # type: ignore[arg-type]
    return partial(TextTransformer, style=style)


def text_settings(state: Mapping[str, Tensor], activation: str, **options: Any) -> dict[str, Any]:
    """The fields of `Settings` for texts: OpenAI's tower and tokenizer."""
    return {
        "text": text_tower(state, activation, **options),
        "tokens": TextPreprocess(context=state["text.positions"].shape[0], pad="longest", pad_id=0, clean=CLEAN),
        "tokenizer": tokenizer_json(),
    }


def settings(state: Mapping[str, Tensor], activation: str, **options: Any) -> Settings:
    """OpenAI's ViT and text tower. ``options``: fields of `Style` for both."""
    return Settings(
        image=image_tower(state, activation, **options),
        pixels=pixels(side(state)),
        **text_settings(state, activation, **options),
    )


def quick_gelu_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Of layouts whose activation is QuickGELU unless the recipe says another."""
    return settings(state, checkpoint.facts.activation or "quick_gelu")


def pixels(side: int) -> ImagePreprocess:
    """Short side to ``side``, bicubic, centre crop, OpenAI's mean and std."""
    return ImagePreprocess(
        size=(side, side), resize="shortest", shortest=side, crop_offset="round", resample="bicubic", mean=MEAN, std=STD
    )
