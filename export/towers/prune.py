"""Fewer patches from a block on: those that the class token attends to most.

Source: A-CLIP, Yang et al. 2023 (arXiv 2212.08653), whose mask of training does this: attention of the class token,
mean over heads, pooled to 7 x 7 cells, of which ``int(keep * 49) + 1`` stay. As in EViT, Liang et al. 2022
(arXiv 2202.07800), they stay for the rest of the tower.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from calmclip.export.towers.modules import Module, first, rows
from calmclip.export.towers.transformer import Attention, Block, Blocks, split_heads

CELLS = 7  # the least number of cells on a side, if the grid has as many patches

Grid = tuple[int, int]  # rows and columns


def cell_side(grid: Grid) -> int:
    """Patches on a cell's side: the largest square that divides the grid and leaves `CELLS` on each side."""
    sides = range(1, min(grid) + 1)
    return max(side for side in sides if side == 1 or not any(n % side or n // side < CELLS for n in grid))


def kept_cells(keep: float, cells: int) -> int:
    """How many of ``cells`` stay. ``keep``: their share, 0 to 1."""
    return min(int(keep * cells) + 1, cells)


class Pruning(Module):
    """Block ``after`` is the last that reads all tokens, counted from 1; the next ones read the class token and the
    patches of ``kept`` cells, chosen in each row by the attention of that block. Only a folded one can run."""

    members: Tensor

    def __init__(self, grid: Grid, kept: int, after: int) -> None:
        super().__init__()
        side = self.side = cell_side(grid)
        self.grid, self.kept, self.after = grid, kept, after
        patches = torch.arange(grid[0] * grid[1]).reshape(grid[0] // side, side, grid[1] // side, side)
        tokens = 1 + patches.transpose(1, 2).flatten(2).flatten(0, 1)  # [cells, patches of a cell]
        self.register_buffer("members", tokens, persistent=False)

    @property
    def cells(self) -> int:
        return len(self.members)

    @property
    def tokens(self) -> int:
        """How many stay."""
        return 1 + self.kept * self.side**2

    def fold(self, blocks: Blocks) -> None:
        """Copy what computes q and k, because the fused operators of attention take theirs without other readers."""
        attention = cast(Block, blocks[self.after - 1]).attn
        width = attention.out.in_features
        self.q, self.k = rows(attention.qkv, 0, width), rows(attention.qkv, width, 2 * width)

    def before_last(self, blocks: Blocks, x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        """As `Blocks.before_last`, with the tokens that stay."""
        block: Any
        *others, last = blocks
        for number, block in enumerate(others, 1):
            read = block.read(x)
            x = block.finish(x, block.attn(read))
            if number == self.after:
                x = self(x, self.scores(block.attn, read))
        return x, last

    def scores(self, attention: Attention, read: Tensor) -> Tensor:
        """The attention of the class token to each cell, [B, cells], from the input of attention [B, T, W]."""
        q, k = attention.normed(self.q(first(read)), self.k(read))
        q, k = split_heads(q, attention.heads), split_heads(k, attention.heads)
        patches = attention.softmax(q @ k.transpose(-1, -2)).mean(dim=1)[:, 0, 1:]
        cells = [n // self.side for n in self.grid]
        return torch.unflatten(patches, 1, (cells[0], self.side, cells[1], self.side)).mean(dim=(2, 4)).flatten(1)

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        """x [B, T, W] -> [B, `tokens`, W]. One Gather of rows: the class token, then cell by cell."""
        batch, length, _ = x.shape
        best = scores.topk(self.kept, dim=1).indices
        patches = self.members.index_select(0, best.flatten()).reshape(batch, -1)
        tokens = torch.cat([torch.zeros_like(best[:, :1]), patches], dim=1)
        offsets = torch.arange(batch, device=x.device)[:, None] * length
        return x.flatten(0, 1).index_select(0, (tokens + offsets).flatten()).reshape(batch, self.tokens, -1)
