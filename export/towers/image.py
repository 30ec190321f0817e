"""Image towers: pixels float32 [B, 3, H, W] -> unit vectors float32 [B, D], or logits of classes [B, C].

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); CLIP's form: Radford et al. 2021; the attention pooling of SigLIP:
Zhai et al. 2023 (arXiv 2303.15343) after Zhai et al. 2022 (arXiv 2106.04560).
"""

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from calmclip.export.towers import State, Style, fold, part
from calmclip.export.towers.transformer import MLP, attend, blocks, linear, projection, rows, unit


class VisionTransformer(nn.Module):
    """Patches, a class token where there is one, blocks; what `Style.pool` takes of the tokens, projected."""

    def __init__(self, state: State, style: Style) -> None:
        super().__init__()
        self.style = style
        width, channels, *size = state["patch.weight"].shape
        self.patch = nn.Conv2d(channels, width, tuple(size), stride=tuple(size), bias="patch.bias" in state)
        self.cls = nn.Parameter(torch.empty(width)) if "cls" in state else None
        self.positions = nn.Parameter(torch.empty(state["positions"].shape[0], width))
        self.norm_pre = nn.LayerNorm(width, eps=style.eps) if "norm_pre.weight" in state else nn.Identity()
        self.blocks = blocks(part(state, "blocks."), style, width, one_token=style.pool == "cls")
        self.norm_post = nn.LayerNorm(width, eps=style.eps) if "norm_post.weight" in state else nn.Identity()
        self.pool = AttentionPool(part(state, "pool."), style, width) if style.pool == "map" else None
        self.projection = projection(state, width)

    folded = False

    def fold(self) -> None:
        """The class token's position into the token, the bias of the patches into theirs."""
        self.folded = True
        for block in self.blocks:
            block.fold()
        if self.pool is not None:
            self.pool.fold()
        with torch.no_grad():
            positions = self.positions
            if self.cls is not None:
                self.cls = nn.Parameter((self.cls + positions[0])[None, None], requires_grad=False)
                positions = positions[1:]
            if self.patch.bias is not None:
                positions = positions + self.patch.bias
                self.patch.bias = None
            self.positions = nn.Parameter(positions.clone(), requires_grad=False)

    def tokens(self, pixels: Tensor) -> Tensor:
        """[B, N, W]: before the first block, class token first."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = x + self.positions if self.folded else x
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
        return self.norm_pre(x if self.folded else x + self.positions)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.tokens(pixels)
        *most, last = self.blocks
        for block in most:
            x = block(x)
        match self.style.pool:
            case "cls":
                return unit(self.projection(self.norm_post(last(x, first)).flatten(1)))
            case "none":
                return self.projection(self.norm_post(last(x)))
            case "mean":
                return unit(self.projection(self.norm_post(last(x)).mean(dim=1)))
            case "map":
                assert self.pool is not None
                return unit(self.projection(self.pool(self.norm_post(last(x)))))
        raise AssertionError(self.style.pool)


class ImageClassifier(VisionTransformer):
    """What a picture shows: logits float32 [B, C], by the class token."""

    def forward(self, pixels: Tensor) -> Tensor:
        *most, last = self.blocks
        x = self.tokens(pixels)
        for block in most:
            x = block(x)
        return self.projection(self.norm_post(last(x, first)).flatten(1))


class AttentionPool(nn.Module):
    """A learned query attends to all tokens [B, N, W]; the answer x, and x + mlp(norm(x)) -> [B, W].

    ``q`` is what the query becomes: it does not depend on the picture, so it is worked out once.
    """

    attends = 1  # Softmax ops in its graph

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.heads = style.heads
        self.probe = nn.Parameter(torch.empty(width))
        self.qkv, self.out = linear(state, "qkv", width, 3 * width), linear(state, "out", width, width)
        self.norm = nn.LayerNorm(width, eps=style.eps)
        self.mlp = MLP(part(state, "mlp."), style, width)

    def fold(self) -> None:
        width = len(self.probe)
        with torch.no_grad():
            q, kv = self.qkv.weight[:width], self.qkv.weight[width:]
            probe = q @ self.probe
            if self.qkv.bias is not None:
                probe = probe + self.qkv.bias[:width]
            self.probe = nn.Parameter((probe * (width // self.heads) ** -0.5)[None, None], requires_grad=False)
            bias = None if self.qkv.bias is None else self.qkv.bias[width:]
            with torch.device("meta"):
                self.kv = nn.Linear(width, 2 * width, bias=bias is not None)
            self.kv.weight = nn.Parameter(kv.clone(), requires_grad=False)
            if bias is not None:
                self.kv.bias = nn.Parameter(bias.clone(), requires_grad=False)
        del self.qkv

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        x = self.out(attend(self.probe.expand(x.shape[0], -1, -1), k, v, self.heads, None))
        return (x + self.mlp(self.norm(x))).flatten(1)


class Trunk(nn.Module):
    """A backbone that a library builds (timm, open_clip's ResNet) and perhaps a projection: -> unit vectors.

    ``trunk`` names its tensors as the library does, under ``trunk.``.
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
        with suppress(TraceError):  # a course that hangs on values; the exporter folds what it finds then
            fold.fold(self.trunk)
        fold.take_apart(self.trunk)

    def forward(self, pixels: Tensor) -> Tensor:
        return unit(self.projection(self.trunk(pixels)))


class MeanPool(nn.Module):
    """The mean of a map [B, W, h, w] asks, all places and the mean answer -> [B, D] (CLIP's ResNets).

    ``positions`` [1 + h w, W]: the mean's first. Only the mean asks, though all of them are asked in training.
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
        """q and the scale of attention apart from k and v."""
        width, layer = self.positions.shape[1], self.qkv
        scale = (width // self.heads) ** -0.5
        self.q, self.kv = rows(layer, 0, width), rows(layer, width, 3 * width)
        with torch.no_grad():
            self.q.weight.mul_(scale)
            self.q.bias.mul_(scale)
        del self.qkv

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positions
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.out(attend(self.q(first(x)), k, v, self.heads, None)).flatten(1)


def first(x: Tensor) -> Tensor:
    return x[:, :1]
