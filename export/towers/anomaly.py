"""The tower of AnomalyCLIP: pixels float32 [B, 3, H, W] -> a map of damage float32 [B, h, w] and a score float32 [B].

A second path runs beside the last blocks (DPAM): each adds softmax(v v^T s) v of what the block's attention reads,
through the block's output layer and without a feed-forward; the plain path feeds it. Patches are read from the second
path behind chosen blocks; the class token from the plain path, without the last norm. The two text vectors are
constants: damaged is a softmax over both, which is the sigmoid of the difference of their logits.

Source: AnomalyCLIP, Zhou et al. 2024 (arXiv 2310.18961), sections 3.3 and 3.4, and its code; v-v attention: Li et al.
2023 (arXiv 2304.05653).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calmclip.export.towers.dense import ClassToken, Positions, Step, joined
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.modules import Module, unit

TEMPERATURE = 0.07
VALUES = 2  # of `dense.Heads`


class AnomalyTower(Module):
    """``positions``: to the grid of the map. ``sides`` [2, D]: unit vectors of normal and damaged. ``blocks``: how many
    of the last ones have the second path. ``layers``: the blocks, from 1, behind which the map is read; the map is the
    mean over them. Only a folded one can run."""

    def __init__(
        self, image: VisionTransformer, positions: Positions, sides: Tensor, blocks: int, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.tower, self.grid = ClassToken(image, positions), positions.new
        self.blocks, self.layers = blocks, tuple(layers)
        self.along = nn.Parameter((sides[1] - sides[0]) / TEMPERATURE, requires_grad=False)

    def fold(self) -> None:
        self.tower.fold()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """-> map [B, h, w], score [B], both from 0 to 1."""
        x = self.tower.tokens(pixels)
        layers, maps, beside = self.tower.layers(), [], x
        for number, layer in enumerate(layers, 1):
            step = Step(layer, x)
            beside = beside + self.second(step) if number > len(layers) - self.blocks else step.after
            if number in self.layers:
                maps.append(self.damaged(self.tower.project(beside[:, -self.grid[0] * self.grid[1] :], bare=False)))
            if number < len(layers):
                x = step.after
        whole = self.tower.image.projection(class_token(step).flatten(1))
        return torch.unflatten(torch.stack(maps).mean(0), 1, self.grid), self.damaged(whole)

    def second(self, step: Step) -> Tensor:
        """What the second path adds: each patch attends to those of a like value."""
        heads = step.heads
        return step.layer.out(joined(step.layer.alike(heads, VALUES) @ heads.v), step.tokens)

    def damaged(self, rows: Tensor) -> Tensor:
        """[..., D] -> [...]: the softmax's part of damaged."""
        return torch.sigmoid(unit(rows) @ self.along)


def class_token(step: Step) -> Tensor:
    """[B, 1, W]: `Step.after` of the first token alone."""
    layer, heads = step.layer, step.heads
    x = step.x[:, :1] + layer.out(layer.mix(heads._replace(q=heads.q[:, :, :1])), step.tokens[:, :1])
    return x + layer.forward(layer.middle(x))
