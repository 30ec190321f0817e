"""Learned queries that look at the patches of a picture: GRAIN's decoder, of which the picture's own query is served.

Source: Halbe et al. 2024, GRAIN (arXiv 2412.04429), after DETR, Carion et al. 2020 (arXiv 2005.12872): pre-norm layers,
in each the queries attend to one another, then to the patches; the queries' names are added to what asks.
Pixels float32 [B, 3, H, W] -> unit vectors float32 [B, D].
"""

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, count, part
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.transformer import attend, linear, rows, unit


class Asked(nn.Module):
    """Attention whose queries and keys may come from elsewhere than its values; heads share the width."""

    attends = 1  # Softmax ops in its graph

    def __init__(self, state: State, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = linear(state, "qkv", width, 3 * width), linear(state, "out", width, width)

    def fold(self) -> None:
        """q, with the scale of attention, k and v apart."""
        width = self.qkv.in_features
        self.q, self.k, self.v = (rows(self.qkv, i * width, (i + 1) * width) for i in range(3))
        with torch.no_grad():
            for values in (self.q.weight, self.q.bias):
                values.mul_((width // self.heads) ** -0.5)
        del self.qkv

    def forward(self, asks: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.out(attend(self.q(asks), self.k(keys), self.v(values), self.heads, None))


class Layer(nn.Module):
    def __init__(self, state: State, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.among, self.at = (Asked(part(state, f"{name}."), width, heads) for name in ("among", "at"))
        self.up = linear(state, "up", width)
        self.down = linear(state, "down", self.up.out_features, width)

    def forward(self, x: Tensor, names: Tensor, patches: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.among(normed + names, normed + names, normed)
        x = x + self.at(self.norm2(x) + names, patches, patches)
        return x + self.down(self.up(self.norm3(x)).relu())


class QueriedTransformer(nn.Module):
    """``vit.*``: a tower whose tokens are projected to the queries' width; ``queries`` [Q, W], the picture's the last.

    ``projection`` makes the vector of that query.
    """

    def __init__(self, state: State, style: Style, heads: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(part(state, "vit."), style)
        names = state["queries"]
        self.queries = nn.Parameter(torch.empty(names.shape))
        width = names.shape[1]
        self.norm_patches, self.norm_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            Layer(part(state, f"layers.{i}."), width, heads) for i in range(count(state, "layers."))
        )
        self.projection = linear(state, "projection", width, bias=False)

    def fold(self) -> None:
        self.vit.fold()
        for layer in self.layers:
            layer.among.fold()
            layer.at.fold()

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.norm_patches(self.vit(pixels))
        names = self.queries.expand(pixels.shape[0], -1, -1)
        x = torch.zeros_like(names)
        for layer in self.layers:
            x = layer(x, names, patches)
        return unit(self.projection(self.norm_post(x[:, -1])))
