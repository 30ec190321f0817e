"""NanoDet-g, the box network: pixels -> for every cell of three grids the logits of 80 names, a box and a feature.

Source: RangiLyu 2021, NanoDet (github.com/RangiLyu/nanodet, Apache-2.0), its form NanoDet-g: a CSP backbone (Wang et
al. 2019, arXiv 1911.11929), a path aggregation without weights (Liu et al. 2018, arXiv 1803.01534), and a head that
predicts the distances to a box's sides as distributions (Li et al. 2020, arXiv 2006.04388). Trained by its authors on
COCO train2017; BatchNorms are folded. NOTICE lists what we changed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.nets.mini import parameters
from calmclip.export.nets.mini.facts import STRIDES
from calmclip.models.flow import Array

NAMES = 80
BINS = 11  # of a distance's distribution, in strides
WIDTH, MIDDLE, DEEP = 128, 256, 512  # channels of a cell's feature, and of the maps at strides 16 and 32
SLOPE = 0.1
STAGES = ((32, 1, 1), (64, 2, 2), (128, 2, 2), (256, 3, 2))  # channels, pairs, stride; a stage gives twice the channels
# Published for B, G, R of 0 to 255. Our graphs read (x - 127) / 128 of R, G, B, so the first convolution absorbs both.
MEAN, STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)


class Conv(nn.Module):
    """Convolution and LeakyReLU. Projections are linear: ``leaky=False``."""

    def __init__(self, inside: int, outside: int, kernel: int = 3, stride: int = 1, *, leaky: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2)
        self.leaky = leaky

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return F.leaky_relu(y, SLOPE) if self.leaky else y


class Stage(nn.Module):
    """[B, C, h, w] -> [B, 2 C, h / stride, w / stride]: the first convolution's result beside that of the pairs."""

    def __init__(self, channels: int, pairs: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.first = Conv(channels, channels, stride=stride)
        self.pairs = nn.ModuleList(nn.ModuleList([Conv(channels, half), Conv(half, half)]) for _ in range(pairs))
        self.last = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        start = x = self.first(x)
        for pair in self.pairs:
            outer, inner = pair.children()
            half = outer(x)
            x = torch.cat([inner(half), half], 1)
        return torch.cat([self.last(x), start], 1)


class NanoDet(nn.Module):
    """float32 [B, 3, H, W], RGB, (x - 127) / 128, sides multiples of 32 -> `forward`'s eight tensors.

    N is the number of cells: those of stride 8 first, each grid row by row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, STAGES[0][0], stride=2, leaky=False)
        self.stages = nn.ModuleList(Stage(*settings) for settings in STAGES)
        self.lateral = nn.ModuleList(Conv(width, WIDTH, 1, leaky=False) for width in (WIDTH, MIDDLE, DEEP))
        self.tower = nn.ModuleList(Conv(WIDTH, WIDTH) for _ in STRIDES)
        # Products, no convolutions: the 8-bit graph then keeps their results in float, and the chances are finer.
        self.out = nn.ModuleList(nn.Linear(WIDTH, NAMES + 4 * BINS) for _ in STRIDES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """-> logits [B, N, 80], bins [B, N, 44], features [B, N, 128], map16 [B, 256, H/16, W/16], map32
        [B, 512, H/32, W/32]; and what masks are made of: map8, neck8 [B, 128, H/8, W/8], neck16 [B, 128, H/16, W/16].
        """
        x = F.max_pool2d(self.stem(pixels), 3, 2, 1)
        x = F.leaky_relu(x, SLOPE)  # behind the pool, where there is a quarter of the numbers: it keeps their order
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        lateral8, lateral16, lateral32 = (conv(x) for conv, x in zip(self.lateral, maps[1:], strict=True))
        path16 = lateral16 + twice(lateral32)
        path8 = lateral8 + twice(path16)
        neck16 = path16 + F.avg_pool2d(path8, 2)
        neck32 = lateral32 + F.avg_pool2d(neck16, 2)
        features = [rows(conv(x)) for conv, x in zip(self.tower, (path8, neck16, neck32), strict=True)]
        cells = torch.cat([linear(x) for linear, x in zip(self.out, features, strict=True)], 1)
        logits, bins = torch.split(cells, [NAMES, 4 * BINS], -1)
        return logits, bins, torch.cat(features, 1), maps[2], maps[3], maps[1], path8, neck16


def twice(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, 2 h, 2 w], bilinear."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def rows(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def grid() -> Tensor:
    """float32 [N, 3]: see `parameters.cells`."""
    return torch.from_numpy(parameters.cells())


def decode(bins: Tensor, cells: Tensor) -> Tensor:
    """bins [..., N, 44], cells [..., N, 3] of `grid` -> boxes [..., N, 4] in pixels, by each side's mean distance."""
    reach = torch.arange(BINS, dtype=bins.dtype)
    distance = (torch.unflatten(bins, -1, (4, BINS)).softmax(-1) * reach).sum(-1) * cells[..., 2:]
    return torch.cat((cells[..., :2] - distance[..., :2], cells[..., :2] + distance[..., 2:]), -1)


def normalized(state: Mapping[str, Array]) -> dict[str, Tensor]:
    """The published tensors with the pixels' normalization in the first convolution, float32, computed in float64.

    It reads x' = (x - 127) / 128 in R, G, B, and was trained on (x - mean) / std in B, G, R. So its weight becomes
    W' = W 128 / std with the channels turned, and its bias b + sum W (127 - mean) / std. A border of zeros means grey
    127 then; before, it meant the mean.
    """
    tensors = {name: torch.as_tensor(array).double() for name, array in state.items()}
    mean, std = (torch.tensor(numbers, dtype=torch.float64).reshape(3, 1, 1) for numbers in (MEAN, STD))
    weight = tensors["stem.conv.weight"]
    tensors["stem.conv.bias"] = tensors["stem.conv.bias"] + (weight * (127 - mean) / std).sum((1, 2, 3))
    tensors["stem.conv.weight"] = (weight * 128 / std).flip(1)
    for name in [name for name in tensors if name.startswith("out.")]:  # convolutions of one place
        tensor = tensors.pop(name)
        tensors[name.replace(".conv.", ".")] = tensor.flatten(1) if tensor.ndim > 1 else tensor
    return {name: tensor.float() for name, tensor in tensors.items()}
