"""Dense maps of image towers: pixels float32 [B, 3, H, W] -> patches float32 [B, h, w, D], in the space of the tower's
vectors and not normalized, so that the mean over any part of the map is linear in the patches.

A transformer's last block gathers the whole picture in one token. Its value path keeps each patch apart: attention
answers the patch's own value instead of a mean of values (`METHODS`). A tower that pools a map of convolutions gives
its cells, each projected as the pooled vector is.

Source: MaskCLIP, Zhou et al. 2022 (arXiv 2112.01071), section 3.2; with residual and feed-forward as in CLIP-DINOiser,
Wysoczanska et al. 2024 (arXiv 2312.12359) and its code.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from calmclip.export.towers.image import AttentionPool, MeanPool, Trunk, VisionTransformer
from calmclip.export.towers.modules import Module, rows
from calmclip.export.towers.transformer import LastBlock

Grid = tuple[int, int]  # rows and columns of the map


def values(tower: "DenseTransformer", tokens: Tensor) -> Tensor:
    """Each token attends to itself alone."""
    return tower.value(tokens)


# name -> the answer of the last attention before its output layer, from the tokens [B, T, W] that attention reads
METHODS: Mapping[str, Callable[["DenseTransformer", Tensor], Tensor]] = {"values": values}


class DenseTransformer(Module):
    """The map of a `VisionTransformer`, whose modules it holds. ``bare``: without the residual and the feed-forward of
    the last block. Only a folded one can run."""

    def __init__(self, image: VisionTransformer, method: str, bare: bool, grid: Grid) -> None:
        super().__init__()
        self.image, self.method, self.bare, self.grid = image, METHODS[method], bare, grid

    def fold(self) -> None:
        """Split the last block's values from its keys."""
        self.image.fold()
        self.value = _values(self.last.kv)

    @property
    def last(self) -> LastBlock:
        return cast(LastBlock, self.image.blocks[-1])

    def forward(self, pixels: Tensor) -> Tensor:
        x, _ = self.image.blocks.before_last(self.image.tokens(pixels))
        tokens, attention = self.last.read(x), self.last.attn
        answers = self.method(self, tokens)
        if attention.gate is not None:
            heads = torch.unflatten(answers, -1, (attention.heads, -1)).transpose(1, 2)
            answers = (heads * attention.gate(tokens)).transpose(1, 2).flatten(-2)
        answers = attention.out(answers)
        x = self.image.norm_post(answers if self.bare else self.last.finish(x, answers))
        patches = x[:, -self.grid[0] * self.grid[1] :]  # the class token is the first
        return torch.unflatten(self.image.projection(patches), 1, self.grid)


class DensePooled(Module):
    """The map of a `VisionTransformer` whose pool is a learned query (SigLIP): each token's value takes the place of
    the pool's answer. ``bare``: without the feed-forward of the pool. Only a folded one can run."""

    def __init__(self, image: VisionTransformer, bare: bool, grid: Grid) -> None:
        super().__init__()
        self.image, self.bare, self.grid = image, bare, grid

    def fold(self) -> None:
        """Split the pool's values from its keys."""
        self.image.fold()
        self.value = _values(self.pool.kv)

    @property
    def pool(self) -> AttentionPool:
        return cast(AttentionPool, self.image.pool)

    def forward(self, pixels: Tensor) -> Tensor:
        x, last = self.image.blocks.before_last(self.image.tokens(pixels))
        x = self.pool.out(self.value(self.image.norm_post(last(x))))
        x = x if self.bare else x + self.pool.mlp(self.pool.norm(x))
        return torch.unflatten(self.image.projection(x), 1, self.grid)


class DenseTrunk(Module):
    """The map of a `Trunk`, whose modules it holds. ``pool``: the name of the module in ``image.trunk`` that makes a
    vector of the map. Only a folded one can run."""

    def __init__(self, image: Trunk, pool: str, grid: Grid) -> None:
        super().__init__()
        self.image, self.pool, self.grid = image, pool, grid

    def fold(self) -> None:
        """The cells take the place of the pool. What follows it works on rows, so on cells as on pictures."""
        cast(Any, self.image).fold()
        pool = self.image.trunk.get_submodule(self.pool)
        self.image.trunk.set_submodule(self.pool, ValueCells(pool) if isinstance(pool, MeanPool) else Cells(pool))

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.image.projection(self.image.trunk(pixels))  # [B h w, D]
        return torch.unflatten(cells, 0, (-1, *self.grid))


class Cells(Module):
    """A map [B, C, h, w] -> its cells as maps of one cell each, pooled: [B h w, C] or [B h w, C, 1, 1]."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        cells: Tensor = self.pool(x.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None])
        return cells


class ValueCells(Module):
    """A map [B, W, h, w] -> [B h w, D]: the answer of a folded `MeanPool` if it attended to one cell alone."""

    def __init__(self, pool: MeanPool) -> None:
        super().__init__()
        self.pool = pool
        self.value = _values(pool.kv)

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).transpose(1, 2) + self.pool.positions[1:]
        return self.pool.out(self.value(cells)).flatten(0, 1)


def _values(keys_and_values: nn.Linear) -> Module:
    width = keys_and_values.in_features
    return cast(Module, rows(keys_and_values, width, 2 * width))
