"""The names of OpenAI's ResNets. open_clip builds the convolutions, and batch norms are folded; the pool is ours.

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4: three stem convolutions, blurred strides, and attention
pooling: the query is the mean of all positions; keys and values are the positions and the mean.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from calmclip.export.checkpoints.files import require_package
from calmclip.export.layouts import DROP, Rule, Settings, concatenate
from calmclip.export.layouts.common import openai_clip
from calmclip.export.towers import State, count
from calmclip.export.towers.image import MeanPool, Trunk
from calmclip.models.errors import UnknownCheckpoint

STRIDE = 32  # pixels of a cell of the last map


def _convolution(theirs: str, ours: str, conv: str, norm: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.{conv}.weight", f"{ours}.{conv}.weight"),
        Rule(f"{theirs}.{norm}.{{b}}", f"{ours}.{norm}.{{b}}"),
        Rule(f"{theirs}.{norm}.num_batches_tracked", DROP),
    )


IMAGE = (
    *_convolution("visual", "image.trunk", "conv{e}", "bn{e}"),
    *_convolution("visual.layer{e}.{i}", "image.trunk.layer{e}.{i}", "conv1", "bn1"),
    *_convolution("visual.layer{e}.{i}", "image.trunk.layer{e}.{i}", "conv2", "bn2"),
    *_convolution("visual.layer{e}.{i}", "image.trunk.layer{e}.{i}", "conv3", "bn3"),
    *_convolution("visual.layer{e}.{i}.downsample", "image.trunk.layer{e}.{i}.downsample", "0", "1"),
    Rule("visual.attnpool.positional_embedding", "image.trunk.attnpool.positions"),
    *concatenate("visual.attnpool.*_proj.{p}", "image.trunk.attnpool.qkv.{p}", "qkv"),
    Rule("visual.attnpool.c_proj.{p}", "image.trunk.attnpool.out.{p}"),
)
REQUIRED = (
    "image.trunk.conv1.weight",
    *(f"image.trunk.layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4)),
    "image.trunk.attnpool.positions",
    "image.trunk.attnpool.out.weight",
    *openai_clip.TEXT_REQUIRED,
)


def side(state: Mapping[str, Tensor]) -> int:
    """The side of the square input in pixels. Raises `UnknownCheckpoint` if the pool's positions make no square."""
    positions = state["image.trunk.attnpool.positions"].shape[0] - 1
    if (cells := openai_clip.square(positions)) is None:
        raise UnknownCheckpoint(f"visual.attnpool.positional_embedding has {positions} cells; expected a square")
    return cells * STRIDE


def image_tower(state: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], nn.Module]:
    number = openai_clip.heads(state["image.trunk.attnpool.positions"].shape[1], "image")
    return partial(_trunk, side=side(state), heads=number)


def _trunk(state: State, side: int, heads: int) -> nn.Module:
    build = require_package("open_clip.modified_resnet", "a CLIP with a ResNet").ModifiedResNet
    layers = [count(state, f"trunk.layer{stage}.") for stage in (1, 2, 3, 4)]
    with torch.device("meta"):
        trunk = build(layers, 1, heads, side, state["trunk.layer1.0.conv1.weight"].shape[0])
        trunk.attnpool = MeanPool(state, "trunk.attnpool.", heads)
        for part in trunk.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.num_batches_tracked, part.track_running_stats = None, False  # used in training alone
        return Trunk(state, trunk)


def settings(state: Mapping[str, Tensor], activation: str) -> Settings:
    """OpenAI's ResNet and text tower. ``activation``: of the text tower."""
    return Settings(
        image=image_tower(state), pixels=openai_clip.pixels(side(state)), **openai_clip.text_settings(state, activation)
    )
