"""Learned queries that attend to the patches of a picture: GRAIN's decoder. Only the whole picture's query is used.

Source: Halbe et al. 2024, GRAIN (arXiv 2412.04429), after DETR, Carion et al. 2020 (arXiv 2005.12872): in each pre-norm
layer the queries attend to one another, then to the patches. The learned queries are added to the input of q.
Pixels float32 [B, 3, H, W] -> unit vectors float32 [B, D].
"""

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, count, part
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.modules import LayerNorm, Module, rows, unit
from calmclip.export.towers.transformer import Blocks, attend, linear


class QueryAttention(Module):
    """Attention with separate inputs for q, k and v. Only a folded one can run."""

    attends = 1  # Softmax ops in its graph

    def __init__(self, state: State, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = linear(state, "qkv", width, 3 * width), linear(state, "out", width, width)

    def fold(self) -> None:
        """Split q, with the scale of attention, k and v."""
        width = self.qkv.in_features
        scales = ((width // self.heads) ** -0.5, 1.0, 1.0)
        self.q, self.k, self.v = (rows(self.qkv, i * width, (i + 1) * width, scale) for i, scale in enumerate(scales))
        del self.qkv

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.out(attend(self.q(queries), self.k(keys), self.v(values), self.heads))


class Layer(Module):
    """``among``: attention to the other queries; ``at``: attention to the patches. Tensors have these names."""

    def __init__(self, state: State, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width) for _ in range(3))
        self.among, self.at = (QueryAttention(part(state, f"{name}."), width, heads) for name in ("among", "at"))
        self.up = linear(state, "up", width)
        self.down = linear(state, "down", self.up.out_features, width)

    def fold(self) -> None:
        self.among.fold()
        self.at.fold()

    def forward(self, x: Tensor, queries: Tensor, patches: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.among(normed + queries, normed + queries, normed)
        x = x + self.at(self.norm2(x) + queries, patches, patches)
        return x + self.down(self.up(self.norm3(x)).relu())


class QueriedTransformer(Module):
    """``vit.*``: a tower that projects its tokens to the queries' width. ``queries`` [Q, W]: the picture's is the last.

    ``projection`` turns the answer of that query into the vector.
    """

    def __init__(self, state: State, style: Style, heads: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(part(state, "vit."), style)
        self.queries = nn.Parameter(torch.empty(state["queries"].shape))
        width = self.queries.shape[1]
        self.norm_patches, self.norm_post = LayerNorm(width), LayerNorm(width)
        self.layers = Blocks(Layer(part(state, f"layers.{i}."), width, heads) for i in range(count(state, "layers.")))
        self.projection = linear(state, "projection", width, bias=False)

    def fold(self) -> None:
        self.vit.fold()
        self.layers.fold()

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.norm_patches(self.vit(pixels))
        queries = self.queries.expand(pixels.shape[0], -1, -1)
        x = torch.zeros_like(queries)
        for layer in self.layers:
            x = layer(x, queries, patches)
        return unit(self.projection(self.norm_post(x[:, -1])))
