"""EfficientNet-Lite2, the image backbone: pixels -> feature maps at strides 16 and 32.

Source: Tan & Le 2019 (arXiv 1905.11946), table 1, at width 1.1 and depth 1.2; the "lite" form has ReLU6, no
squeeze-and-excitation, and leaves stem, head and the first and last stage unscaled. Trained by its authors in
TensorFlow, hence SAME padding and a BatchNorm epsilon of 1e-3.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from calmclip.export.nets.mini import parameters
from calmclip.export.nets.mini.facts import CLASSES, WIDTH32

# kernel, stride of the first block, expansion, channels, blocks
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 3),
    (5, 2, 6, 48, 3),
    (3, 2, 6, 88, 4),
    (5, 1, 6, 120, 4),
    (5, 2, 6, 208, 5),
    (3, 1, 6, 352, 1),
)
STEM = 32
FIRST_OF_STRIDE_32 = 15  # the block whose input is the stride-16 map


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: an odd pixel is added at the bottom and on the right."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        bottom, right = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        padded = F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2)) if bottom + right else x
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU6. Projections are linear: ``relu=False``."""

    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int = 1, *, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = SameConv(inside, outside, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outside, eps=1e-3)
        self.relu: nn.Module = nn.ReLU6() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.norm(self.conv(x)))
        return y


class Block(nn.Module):
    """Inverted residual: expand 1x1, depthwise, project 1x1; added to the input if the shapes agree."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand: nn.Module = Unit(inside, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = Unit(wide, wide, kernel, stride, groups=wide)
        self.project = Unit(wide, outside, 1, relu=False)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Backbone(nn.Module):
    """float32 [B, 3, H, W] -> map16 [B, 120, H/16, W/16] and map32 [B, 1280, H/32, W/32], sizes rounded up.

    Pixels are (x - 127) / 128. map32 is the output of the last ReLU6; ``classifier`` (1000 ImageNet classes) reads its
    mean over H and W.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, STEM, 3, 2)
        blocks, inside = [], STEM
        for kernel, stride, expansion, outside, count in STAGES:
            for index in range(count):
                blocks.append(Block(inside, outside, kernel, 1 if index else stride, expansion))
                inside = outside
        self.blocks = nn.ModuleList(blocks)
        self.head = Unit(inside, WIDTH32, 1)
        self.classifier = nn.Linear(WIDTH32, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = map16 = self.stem(pixels)
        for index, block in enumerate(self.blocks):
            if index == FIRST_OF_STRIDE_32:
                map16 = x
            x = block(x)
        return map16, self.head(x)


def from_state(state: Mapping[str, Tensor]) -> Backbone:
    """The backbone with the published weights, in the names of efficientnet_pytorch. Every key must be known."""
    backbone = Backbone()
    backbone.load_state_dict({parameters.renamed(name): value for name, value in state.items()}, strict=True)
    return backbone.eval().requires_grad_(False)


def fold(backbone: Backbone) -> Backbone:
    """BatchNorms folded into their convolutions, in place and in float64."""
    backbone.double()
    for unit in [module for module in backbone.modules() if isinstance(module, Unit)]:
        if isinstance(unit.norm, nn.BatchNorm2d):
            unit.conv, unit.norm = fuse_conv_bn_eval(unit.conv, unit.norm), nn.Identity()
            silence(unit.conv)
    return backbone.float().requires_grad_(False)


def silence(conv: nn.Conv2d) -> None:
    """Weights that are negligible beside their bias become 0, in place.

    A few channels of every stage are dead: weights of 1e-7 with a bias of -1. Their int32 bias would overflow, so the
    quantizer widens their scale, which then depends on the layer's input. With weights of 0, equal layers of two graphs
    get equal bytes.
    """
    assert conv.bias is not None
    largest = conv.weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    conv.weight *= largest > 2e-6 * conv.bias.abs().reshape(largest.shape)


def frozen(state: Mapping[str, Tensor]) -> Backbone:
    """`from_state`, folded. It is exported, and the heads were trained on its outputs."""
    with torch.no_grad():
        return fold(from_state(state))
