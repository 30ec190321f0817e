"""Image towers: pixels float32 [B, 3, H, W] -> unit vectors float32 [B, D], or logits of classes [B, C].

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); CLIP's form: Radford et al. 2021; the attention pooling of SigLIP:
Zhai et al. 2023 (arXiv 2303.15343) after Zhai et al. 2022 (arXiv 2106.04560).
"""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from calmclip.export.towers import State, Style, fold, part
from calmclip.export.towers.modules import LayerNorm, Module, constant, first, rows, unit
from calmclip.export.towers.prune import Pruning
from calmclip.export.towers.transformer import MLP, attend, blocks, linear, norm, projection


class VisionTransformer(Module):
    """Patches, an optional class token, and blocks. `Style.pool` reduces the tokens; the result is projected.

    ``pruning``: which patches the last blocks read; None: all.
    """

    folded = False

    def __init__(self, state: State, style: Style) -> None:
        super().__init__()
        self.style = style
        width, channels, *_ = state["patch.weight"].shape
        size = (state["patch.weight"].shape[2], state["patch.weight"].shape[3])
        self.patch = nn.Conv2d(channels, width, size, stride=size, bias="patch.bias" in state)
        self.cls = nn.Parameter(torch.empty(width)) if "cls" in state else None
        self.positions = nn.Parameter(torch.empty(state["positions"].shape[0], width))
        self.norm_pre = norm(state, "norm_pre", width, style.eps)
        self.blocks = blocks(part(state, "blocks."), style, width, one_token=style.pool == "cls")
        self.norm_post = norm(state, "norm_post", width, style.eps)
        self.pool = AttentionPool(part(state, "pool."), style, width) if style.pool == "map" else None
        self.projection = projection(state, width)
        self.pruning: Pruning | None = None

    def fold(self) -> None:
        """Fold the class token's position into the token, and the bias of the patches into their positions."""
        self.folded = True
        self.blocks.fold()
        if self.pruning is not None:
            self.pruning.fold(self.blocks)
        if self.pool is not None:
            self.pool.fold()
        positions: Tensor = self.positions
        if self.cls is not None:
            self.cls, positions = constant((self.cls + positions[0])[None, None]), positions[1:]
        if self.patch.bias is not None:
            positions, self.patch.bias = positions + self.patch.bias, None
        self.positions = constant(positions.clone())

    def tokens(self, pixels: Tensor) -> Tensor:
        """[B, N, W]: the input of the first block, class token first."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = x + self.positions if self.folded else x
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
        return self.norm_pre(x if self.folded else x + self.positions)

    def projected(self, pixels: Tensor) -> Tensor:
        """[B, D], or without pooling [B, N, D]."""
        x, last = self._before_last(self.tokens(pixels))
        x = self.norm_post(last(x))
        match self.style.pool:
            case "cls":
                x = x.flatten(1)
            case "mean":
                x = x.mean(dim=1)
            case "map":
                assert self.pool is not None
                x = self.pool(x)
        return self.projection(x)

    def _before_last(self, x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        return self.blocks.before_last(x) if self.pruning is None else self.pruning.before_last(self.blocks, x)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.projected(pixels)
        return x if self.style.pool == "none" else unit(x)


class ImageClassifier(VisionTransformer):
    """Logits of classes, float32 [B, C], from the class token."""

    forward = VisionTransformer.projected


class AttentionPool(Module):
    """A learned query attends to all tokens [B, N, W]. The answer x becomes x + mlp(norm(x)) -> [B, W].

    The query does not depend on the picture, so `fold` computes q once.
    """

    attends = 1  # Softmax ops in its graph

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.heads = style.heads
        self.probe = nn.Parameter(torch.empty(width))
        self.qkv, self.out = linear(state, "qkv", width, 3 * width), linear(state, "out", width, width)
        self.norm = LayerNorm(width, eps=style.eps)
        self.mlp = MLP(part(state, "mlp."), style, width)

    def query(self) -> Tensor:
        """[1, 1, W], scaled."""
        width = len(self.probe)
        query = self.qkv.weight[:width] @ self.probe + self.qkv.bias[:width]
        scaled: Tensor = query * (width // self.heads) ** -0.5
        return scaled[None, None]

    def fold(self) -> None:
        width = len(self.probe)
        self.probe = constant(self.query())
        self.kv = rows(self.qkv, width, 3 * width)
        del self.qkv

    def forward(self, x: Tensor) -> Tensor:
        if "qkv" in self._modules:  # not folded
            _, k, v = self.qkv(x).chunk(3, dim=-1)
            query = self.query()
        else:
            k, v = self.kv(x).chunk(2, dim=-1)
            query = self.probe
        x = self.out(attend(query.expand(x.shape[0], -1, -1), k, v, self.heads))
        return (x + self.mlp(self.norm(x))).flatten(1)


class Trunk(Module):
    """A backbone that a library builds (timm, open_clip's ResNet), and an optional projection -> unit vectors.

    The tensors of ``trunk`` have the library's names, under ``trunk.``.
    """

    def __init__(self, state: State, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        width = state["projection.weight"].shape[1] if "projection.weight" in state else 0
        self.projection = projection(state, width)

    def fold(self) -> None:
        for inner in self.trunk.modules():
            if isinstance(inner, MeanPool):
                inner.fold()
        with suppress(TraceError):  # control flow depends on values: the exporter folds what it can
            fold.fold(self.trunk)
        fold.take_apart(self.trunk)

    def forward(self, pixels: Tensor) -> Tensor:
        return unit(self.projection(self.trunk(pixels)))


class MeanPool(Module):
    """Attention whose query is the mean of a map [B, W, h, w]; keys and values are the mean and all positions
    -> [B, D] (CLIP's ResNets).

    ``positions`` [1 + h w, W]: the mean's position is the first. In CLIP's training every position is a query.
    """

    attends = 1  # Softmax ops in its graph

    def __init__(self, state: State, prefix: str, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.empty(state[f"{prefix}positions"].shape))
        width = self.positions.shape[1]
        self.qkv = linear(state, f"{prefix}qkv", width, 3 * width)
        self.out = linear(state, f"{prefix}out", width)

    def fold(self) -> None:
        """Split q, with the scale of attention, from k and v."""
        width = self.positions.shape[1]
        self.q = rows(self.qkv, 0, width, (width // self.heads) ** -0.5)
        self.kv = rows(self.qkv, width, 3 * width)
        del self.qkv

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positions
        if "qkv" in self._modules:  # not folded
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q = first(q) * (x.shape[-1] // self.heads) ** -0.5
        else:
            k, v = self.kv(x).chunk(2, dim=-1)
            q = self.q(first(x))
        return self.out(attend(q, k, v, self.heads)).flatten(1)
