"""Text towers of BERT's kind: ids and mask int64 [B, T] -> unit vectors float32 [B, D], or logits of words [B, T, V].

Source: Devlin et al. 2018 (arXiv 1810.04805); RoBERTa: Liu et al. 2019 (arXiv 1907.11692), whose positions begin at
``pad id + 1``; XLM-R: Conneau et al. 2019 (arXiv 1911.02116). Norms follow the residual sum. Every token reads every
other token except padding. So a mask is an input, and a row's answer does not depend on the amount of padding.

Names beside those of `calmclip.export.towers`:

    types [n, W]              added to every token; only the first is used, so it is folded into the positions
    pooler?.*                 tanh(pooler(x)) of the pooled token, if the argument ``pooler`` is true
    transformation?.*         between norm_post and the projection; it is folded into the projection
    projection?.up.weight  .down.weight      instead of projection.weight: two products with GELU between them
    head.dense.*  head.norm.*  words.weight?  words.bias    of `MaskedLM`; without words.weight, tokens.weight is used
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, part
from calmclip.export.towers.modules import LayerNorm, Linear, Module, constant, constant_linear, first, unit
from calmclip.export.towers.transformer import (
    ACTIVATIONS,
    Block,
    LastBlock,
    Words,
    blocks,
    hide,
    linear,
    norm,
    projection,
)


class PostBlock(Block):
    """x' = norm1(x + attention(x)); norm2(x' + mlp(x'))."""

    def read(self, x: Tensor) -> Tensor:
        return x

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm1(x + attended)
        return self.norm2(x + self.mlp(x))


class LastPostBlock(LastBlock, PostBlock):
    """The last `PostBlock`, for one token per row."""


class Head(Module):
    """down(gelu(up(x))), without biases."""

    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.up = linear(state, "up", width, bias=False)
        self.down = linear(state, "down", self.up.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def product(second: nn.Linear, first: nn.Linear) -> Linear:
    """One layer for second(first(x)), multiplied in float64. ``first`` has a bias, ``second`` has none."""
    weight, bias = (second.weight.double() @ tensor.double() for tensor in (first.weight, first.bias))
    return constant_linear(weight.float(), bias.float())


class BertText(Module):
    """``Style.pool``: first; mean, of the tokens that are not padding; or none: all tokens, [B, T, W], not projected.

    ``context``: the largest number of tokens. ``offset``: the position of a row's first token in the table of
    positions. ``pooler``: whether the pooled token goes through the pooler.
    """

    def __init__(self, state: State, style: Style, context: int, offset: int = 0, pooler: bool = False) -> None:
        super().__init__()
        self.style, self.context, self.offset, self.use_pooler = style, context, offset, pooler
        words, width = state["tokens.weight"].shape
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.empty(state["positions"].shape[0], width))
        self.types: nn.Parameter | None = nn.Parameter(torch.empty(state["types"].shape[0], width))
        self.norm_pre = LayerNorm(width, eps=style.eps)
        self.blocks = blocks(
            part(state, "blocks."), style, width, one_token=style.pool == "first", kinds=(PostBlock, LastPostBlock)
        )
        self.pooler = linear(state, "pooler", width) if pooler or "pooler.weight" in state else None
        if self.pooler is not None and pooler:
            width = self.pooler.out_features
        self.norm_post = norm(state, "norm_post", width, style.eps)
        self.transformation = linear(state, "transformation", width) if "transformation.weight" in state else None
        if self.transformation is not None:
            width = self.transformation.out_features
        two = "projection.up.weight" in state
        self.projection = Head(part(state, "projection."), width) if two else projection(state, width)

    def fold(self) -> None:
        """Fold the token type into the positions that are used, and two products into one."""
        self.blocks.fold()
        self.positions, self.offset, self.types = constant(self.placement(self.context)), 0, None
        if not self.use_pooler:
            self.pooler = None
        if self.transformation is not None:
            assert isinstance(self.projection, nn.Linear)
            self.projection, self.transformation = product(self.projection, self.transformation), None

    def placement(self, length: int) -> Tensor:
        """[T, W]: position and type, which are added to the embeddings of the tokens."""
        positions = self.positions[self.offset : self.offset + length]
        return positions if self.types is None else positions + self.types[0]

    def forward(self, ids: Tensor, mask: Tensor, pooled: Tensor | None = None) -> Tensor:
        """``pooled``: 1 for the tokens of the mean; None: ``mask``."""
        placement = self.placement(ids.shape[1])
        x = self.norm_pre(self.tokens(ids) + placement)
        valid = mask.to(x.dtype)
        addend = hide(valid)
        x, last = self.blocks.before_last(x, addend)
        if self.style.pool == "none":
            return last(x, addend)
        if self.style.pool == "mean":
            weights = valid if pooled is None else pooled.to(x.dtype)
            x = (last(x, addend) * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
        else:
            x = last(x, addend, first).flatten(1)
        if self.pooler is not None and self.use_pooler:
            x = torch.tanh(self.pooler(x))
        x = self.norm_post(x)
        return unit(self.projection(x if self.transformation is None else self.transformation(x)))


class MaskedLM(BertText):
    """Predicts the word at each position: logits float32 [B, T, V]."""

    def __init__(self, state: State, style: Style, context: int, offset: int = 0) -> None:
        super().__init__(state, replace(style, pool="none"), context, offset)
        width = state["tokens.weight"].shape[1]
        dense, self.act = linear(state, "head.dense", width, width), ACTIVATIONS[style.activation]()
        self.head = nn.ModuleDict({"dense": dense, "norm": LayerNorm(width, eps=style.eps)})
        self.words = Words(part(state, "words."), self.tokens)

    def fold(self) -> None:
        super().fold()
        self.words.fold(self.tokens.weight)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # nothing is pooled
        return self.logits(self.hidden(ids, mask))

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T, W]."""
        return super().forward(ids, mask)

    def logits(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., V]. Training computes the logits of a few tokens only."""
        return self.words(self.head["norm"](self.act(self.head["dense"](x))), self.tokens.weight)
