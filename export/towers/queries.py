"""Learned queries that attend to the patches of a picture: GRAIN's decoder, for the picture and for its regions.

Source: Halbe et al. 2024, GRAIN (arXiv 2412.04429), after DETR, Carion et al. 2020 (arXiv 2005.12872): in each pre-norm
layer the queries attend to one another, then to the patches. The learned queries are added to the input of q. The last
query is the picture's, each other query a region's.
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
    """Pixels float32 [B, 3, S, S] -> unit vectors float32 [B, D].

    ``vit.*``: a tower that projects its tokens to the queries' width. ``queries`` [Q, W]. ``projection`` turns the
    answer of the picture's query into the vector, ``objects`` those of the regions; ``box.{i}.*`` gives their boxes.
    """

    def __init__(self, state: State, style: Style, heads: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(part(state, "vit."), style)
        self.queries = nn.Parameter(torch.empty(state["queries"].shape))
        width = self.queries.shape[1]
        self.norm_patches, self.norm_post = LayerNorm(width), LayerNorm(width)
        self.layers = Blocks(Layer(part(state, f"layers.{i}."), width, heads) for i in range(count(state, "layers.")))
        self.projection, self.objects = (linear(state, name, width, bias=False) for name in ("projection", "objects"))
        self.box = nn.ModuleList(linear(state, f"box.{i}", width) for i in range(count(state, "box.")))
        cells = round((state["vit.positions"].shape[0] - ("vit.cls" in state)) ** 0.5)
        self.side = float(cells * state["vit.patch.weight"].shape[-1])  # of the input, in pixels

    def fold(self) -> None:
        self.vit.fold()
        self.layers.fold()

    def answers(self, pixels: Tensor) -> Tensor:
        """[B, Q, W]: the answer of each query."""
        patches = self.norm_patches(self.vit(pixels))
        queries = self.queries.expand(pixels.shape[0], -1, -1)
        x = torch.zeros_like(queries)
        for layer in self.layers:
            x = layer(x, queries, patches)
        return self.norm_post(x)

    def vectors(self, answers: Tensor) -> Tensor:
        return unit(self.projection(answers[:, -1]))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vectors(self.answers(pixels))


class QueriedRegions(nn.Module):
    """Pixels float32 [B, 3, S, S] -> class_embeds [B, R, D] unit rows, boxes [B, R, 4] x0 y0 x1 y1 in pixels,
    objectness [B, R], image_embeds [B, D] unit rows. ``image`` keeps its weights.

    GRAIN trains its boxes and vectors, but no score of a region alone, so every region has objectness 1.
    """

    def __init__(self, image: QueriedTransformer) -> None:
        super().__init__()
        self.image = image

    def fold(self) -> None:
        self.image.fold()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        image = self.image
        answers = image.answers(pixels)
        regions = x = answers[:, :-1]
        for i, layer in enumerate(image.box):
            x = layer(x.relu() if i else x)
        centre, size = x.sigmoid().chunk(2, dim=-1)
        boxes = torch.cat((centre - size / 2, centre + size / 2), dim=-1) * image.side
        return unit(image.objects(regions)), boxes, torch.ones_like(boxes[..., 0]), image.vectors(answers)
