"""The names of OpenAI's ResNets: open_clip builds the convolutions, batch norms folded; the pool is ours.

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4: three stem convolutions, blurred strides, and attention
pooling: the mean of all places asks, the places and the mean answer.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from calmclip.export.checkpoints.files import require_package
from calmclip.export.layouts import DROP, Rule
from calmclip.export.layouts._openai import heads
from calmclip.export.towers import State, count
from calmclip.export.towers.image import MeanPool, Trunk
from calmclip.models.errors import UnknownCheckpoint

STRIDE = 32  # pixels of a place of the last map


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
    *(
        Rule(f"visual.attnpool.{name}_proj.{{p}}", "image.trunk.attnpool.qkv.{p}", piece=piece)
        for piece, name in enumerate("qkv")
    ),
    Rule("visual.attnpool.c_proj.{p}", "image.trunk.attnpool.out.{p}"),
)
NEEDS = (
    "image.trunk.conv1.weight",
    *(f"image.trunk.layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4)),
    "image.trunk.attnpool.positions",
    "image.trunk.attnpool.out.weight",
    "text.tokens.weight",
    "text.positions",
    "text.norm_post.weight",
    "text.projection.weight",
    "logit_scale",
)


def side(state: Mapping[str, Tensor]) -> int:
    """Pixels of a picture's side. Raises `UnknownCheckpoint` where the pool's places make no square."""
    places = state["image.trunk.attnpool.positions"].shape[0] - 1
    if places < 1 or (cells := round(places**0.5)) ** 2 != places:
        raise UnknownCheckpoint(f"visual.attnpool.positional_embedding is for {places} places; expected a square")
    return cells * STRIDE


def image_tower(state: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], nn.Module]:
    wide = heads(state["image.trunk.attnpool.positions"].shape[1], "image")
    return partial(_trunk, side=side(state), heads=wide)


def _trunk(state: State, side: int, heads: int) -> nn.Module:
    build = require_package("open_clip.modified_resnet", "a CLIP with a ResNet").ModifiedResNet
    layers = [count(state, f"trunk.layer{stage}.") for stage in (1, 2, 3, 4)]
    with torch.device("meta"):
        trunk = build(layers, 1, heads, side, state["trunk.layer1.0.conv1.weight"].shape[0])
        trunk.attnpool = MeanPool(state, "trunk.attnpool.", heads)
        for part in trunk.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.num_batches_tracked, part.track_running_stats = None, False  # of training
        return Trunk(state, trunk)
