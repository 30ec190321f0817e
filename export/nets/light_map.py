"""CLIP-LIT's network for backlit pictures, also of RAVE: a picture -> the map of its light, by which it is divided.

Source: CLIP-LIT, Liang et al. 2023 (arXiv 2303.17569); RAVE, Gaintseva et al. 2024 (arXiv 2404.01889); pyramid pooling:
Zhao et al. 2017 (arXiv 1612.01105). All layers work at full size: a first convolution, six residual blocks, and after
the second block a pyramid that averages over 1, 2 x 2, 3 x 3 and 6 x 6 parts of the whole picture.

Graphs, for a strip of the picture's rows, float32:
    levels   pixels [1, 3, height, width] in [0, 1], rows [12, height], columns [width, 12] -> sums [1, F, 12, 12]
    enhance  pixels, levels [1, F, 12, 12] (the sums over all strips), rows [height, 12], columns [12, width]
             -> light_map [1, 1 or 3, height, width], at least 0
`rows` and `columns` average a part of the picture, or interpolate between parts: see `calmclip.models.tasks.enhance`.
So the pyramid sees the whole picture, and a graph needs memory for a strip alone. A border reflects the picture; no
tensor says so, and the authors' code has both kinds of border: it trains RAVE with zeros, and infers with reflection.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export import layouts
from calmclip.export.checkpoints import Weights, hub, read
from calmclip.export.checkpoints.locate import NoWeights, weight_files, weights_sha256
from calmclip.export.layouts import Layout, Rule
from calmclip.export.nets import NETS, Net, NetPlugin, Tower, float32
from calmclip.export.towers.modules import Module
from calmclip.models.bundle.manifest import Source
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.flow import Arrays
from calmclip.models.preprocess.image import decode
from calmclip.models.tasks.enhance import LEVELS, PARTS, level_feeds, map_feeds, scaled, strips

SLOPE = 0.2  # of the leaky activations
EXAMPLE_PIXELS = 96 * 96  # of a sample picture, on which torch and the graph are compared

LAYOUT = Layout(
    title="light map of CLIP-LIT and RAVE",
    keys=("cond1.weight", "cond_add1.weight", "PPM1.fuse.0.weight"),
    rules=(
        Rule("cond1.{p}", "net.first.{p}"),
        Rule("condx.{p}", "net.widen.{p}"),
        Rule("condy.{p}", "net.narrow.{p}"),
        Rule("cond_add1.{p}", "net.last.{p}"),
        Rule("ResidualBlock{e}.conv{i}.weight", "net.block{e}.conv{i}.weight"),
        Rule("PPM1.features.{i}.1.weight", "net.levels.{i}.0.weight"),
        Rule("PPM1.features.{i}.2.weight", "net.levels.{i}.1.weight"),
        Rule("PPM1.fuse.{i}.weight", "net.fuse.{i}.weight"),
    ),
)


class Reflected(nn.Conv2d):
    """3 x 3, at a border the reflected picture."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, padding=1, padding_mode="reflect", bias=bias)


class Residual(Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Reflected(width, width, bias=False), Reflected(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.conv2(F.leaky_relu(self.conv1(x), SLOPE)), SLOPE)


class LightMap(Module):
    """The whole network; `Levels` and `Enhance` are its two graphs."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        width, wide = len(state["first.weight"]), len(state["widen.weight"])
        pooled = len(state["levels.0.0.weight"])
        self.first, self.last = Reflected(3, width), Reflected(width, len(state["last.weight"]))
        self.widen, self.narrow = Reflected(width, wide), Reflected(wide, width)
        self.block1, self.block2 = Residual(width), Residual(width)
        self.block3, self.block4 = Residual(wide), Residual(wide)
        self.block5, self.block6 = Residual(width), Residual(width)
        self.levels = nn.ModuleList(nn.Sequential(nn.Conv2d(width, pooled, 1, bias=False), nn.PReLU()) for _ in LEVELS)
        merged = width + pooled * len(LEVELS)
        self.fuse = nn.Sequential(nn.Conv2d(merged, width, 3, padding=1, bias=False), nn.PReLU())

    def fold(self) -> None:
        """Nothing is folded."""

    def low(self, pixels: Tensor) -> Tensor:
        """The features that the pyramid reads, [1, F, height, width]."""
        return self.block2(self.block1(F.leaky_relu(self.first(pixels), SLOPE)))

    def high(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        x = self.widen(self.fuse(torch.cat([x, *parts], dim=1)))
        x = self.narrow(self.block4(self.block3(x)))
        return F.relu(self.last(self.block6(self.block5(x))))


class Levels(Module):
    def __init__(self, net: LightMap) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return rows @ self.net.low(pixels) @ columns


class Enhance(Module):
    def __init__(self, net: LightMap) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor, levels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        parts, first = [], 0
        for level, size in zip(self.net.levels, LEVELS, strict=True):
            of = slice(first, first + size)
            parts.append(rows[:, of] @ level(levels[:, :, of, of]) @ columns[of])
            first += size
        return self.net.high(self.net.low(pixels), parts)


def recognise(path: str) -> bool:
    try:
        weight_files(Path(path))
        return LAYOUT.fits(read(path))
    except (NoWeights, OSError, UnknownCheckpoint):
        return False


def load(path: str, weights: Weights = Weights()) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the tensor that is missing, unknown or of another shape, and `BadRequest` if the
    recipe has a section on weights."""
    if weights != Weights():
        raise BadRequest(f"{LAYOUT.title} has no setting; leave out the recipe's [weights]")
    checkpoint = read(path, weights)
    state = layouts.translate(LAYOUT, checkpoint)
    net = layouts.fill(LAYOUT, checkpoint, state, "net.", LightMap)
    width, channels = len(state["net.first.weight"]), len(state["net.last.weight"])
    pixels, levels = float32(1, 3, "height", "width"), float32(1, width, PARTS, PARTS)
    assert isinstance(net, LightMap)
    copy = deepcopy(net)  # export frees the weights of a tower once it is traced, and feeds it again
    return Net(
        name="light_map",
        source=Source(
            net="light_map",
            model=hub.name(checkpoint.path),
            weights=weights_sha256(checkpoint.path),
            license="not stated in the checkpoint",
            notes=LAYOUT.title,
        ),
        tasks=("enhance",),
        towers={
            "levels": Tower(
                Levels(net),
                {"pixels": pixels, "rows": float32(PARTS, "height"), "columns": float32("width", PARTS)},
                {"sums": levels},
                None,
                quantizer="search",
                feeds=partial(_feeds, "levels", copy),
                summary=_used,
                batch=False,
            ),
            "enhance": Tower(
                Enhance(net),
                {
                    "pixels": pixels,
                    "levels": levels,
                    "rows": float32("height", PARTS),
                    "columns": float32(PARTS, "width"),
                },
                {"light_map": float32(1, channels, "height", "width")},
                None,
                quantizer="search",
                feeds=partial(_feeds, "enhance", copy),
                batch=False,
            ),
        },
        files={},
    )


def _used(outputs: Arrays) -> Arrays:
    """The sums that `enhance` reads: rows and columns of one level. A row holds all parts of the picture."""
    sums, parts, first = outputs["sums"], [], 0
    for size in LEVELS:
        parts.append(sums[:, :, first : first + size, first : first + size].reshape(len(sums), -1))
        first += size
    return {"sums": np.concatenate(parts, axis=1)}


def _feeds(role: str, net: LightMap, pictures: Sequence[Path]) -> Iterator[Arrays]:
    """Small copies of the pictures, each as one strip; ``net`` makes the levels."""
    for path in pictures:
        pixels = scaled(decode(path.read_bytes()), EXAMPLE_PIXELS)
        (strip,) = strips(*pixels.shape[:2])
        feeds = level_feeds(pixels, strip)
        if role == "enhance":
            with torch.inference_mode():
                sums = Levels(net)(*(torch.from_numpy(array) for array in feeds.values()))
            feeds = map_feeds(pixels, strip, sums.numpy())
        yield feeds


NETS.register("light_map")(NetPlugin(recognise, load))
