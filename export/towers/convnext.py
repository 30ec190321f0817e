"""ConvNeXt: pixels float32 [B, 3, H, W] -> tokens float32 [B, N, D], the positions of the last map row by row.

Source: Liu et al. 2022 (arXiv 2201.03545), figure 4, with timm's head: a norm, then one product for every position. A
block is x + scale * down(gelu(up(norm(mix(x))))), where ``mix`` is a convolution of each channel by itself.

Maps are [B, h, w, C] outside of convolutions, so that norms and products need no transposition. Names (``?``:
optional):

    stem.*  norm_stem.*  stages.{i}.norm?.*  stages.{i}.down?.*
    stages.{i}.blocks.{j}.mix.*  .norm.*  .up.*  .down.*  .scale?
    norm_post.*  projection.*
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers import State, count, part
from calmclip.export.towers.modules import LayerNorm, Module, constant
from calmclip.export.towers.transformer import linear, projection

EPS = 1e-6  # timm's


class Convolution(nn.Conv2d):
    """A convolution of maps with channels last, [B, h, w, C] -> [B, h', w', C']."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        width, _, side, _ = state["mix.weight"].shape
        self.mix = Convolution(width, width, side, padding=side // 2, groups=width)
        self.norm = LayerNorm(width, eps=EPS)
        self.up = linear(state, "up", width)
        self.down = linear(state, "down", self.up.out_features, width)
        self.scale = nn.Parameter(state["scale"].new_empty(width)) if "scale" in state else None

    def fold(self) -> None:
        """The scale of the branch goes into its last product."""
        if self.scale is not None:
            self.down.weight = constant(self.down.weight * self.scale[:, None])
            self.down.bias = constant(self.down.bias * self.scale)
            self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(F.gelu(self.up(self.norm(self.mix(x)))))
        return x + (branch if self.scale is None else branch * self.scale)


class Stage(Module):
    """Blocks of one width; a stage with ``down`` halves the map before them."""

    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.norm, self.down = None, None
        if "down.weight" in state:
            outputs, _, step, _ = state["down.weight"].shape
            self.norm, self.down = LayerNorm(width, eps=EPS), Convolution(width, outputs, step, stride=step)
        self.blocks = nn.ModuleList(Block(part(state, f"blocks.{i}.")) for i in range(count(state, "blocks.")))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None and self.down is not None:
            x = self.down(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class ConvNeXt(Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        width, channels, step, _ = state["stem.weight"].shape
        self.stem = nn.Conv2d(channels, width, step, stride=step)
        self.norm_stem = LayerNorm(width, eps=EPS)
        self.stages = nn.ModuleList()
        for i in range(count(state, "stages.")):
            stage = part(state, f"stages.{i}.")
            self.stages.append(Stage(stage, width))
            width = stage["blocks.0.mix.weight"].shape[0]
        self.norm_post = LayerNorm(width, eps=EPS)
        self.projection = projection(state, width)

    def fold(self) -> None:
        for module in self.modules():
            if isinstance(module, Block):
                module.fold()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.norm_stem(self.stem(pixels).permute(0, 2, 3, 1))
        for stage in self.stages:
            x = stage(x)
        return self.projection(self.norm_post(x.flatten(1, 2)))


def stride(state: State) -> int:
    """Pixels of the input for each position of the last map, in a row or a column."""
    downs = [tensor for name, tensor in state.items() if name.endswith("down.weight") and tensor.ndim == 4]
    return math.prod(tensor.shape[-1] for tensor in (state["stem.weight"], *downs))
