"""Text towers of BERT's kind: ids and mask int64 [B, T] -> unit vectors float32 [B, D], or logits of words [B, T, V].

Source: Devlin et al. 2018 (arXiv 1810.04805); RoBERTa: Liu et al. 2019 (arXiv 1907.11692), whose positions begin at
``pad id + 1``; XLM-R: Conneau et al. 2019 (arXiv 1911.02116). Norms follow the residual sum; every token sees every
other but the padding, so a mask is an input, and a row's answer does not depend on how far it is padded.

Beside the names of `calmclip.export.towers`:

    types [n, W]              added to every token; only the first is ever used, so it is folded into the positions
    pooler?.*                 tanh(pooler(x)) of the pooled token, where ``pooler`` is asked for
    transformation?.*         after norm_post and before the projection, into which it is folded
    projection?.up.weight  .down.weight      instead of projection.weight: two products, GELU between them
    head.dense.*  head.norm.*  words.weight?  words.bias    of `MaskedLM`; without a weight that of the tokens is used
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, part
from calmclip.export.towers.image import first
from calmclip.export.towers.transformer import ACTIVATIONS, Block, LastBlock, Words, blocks, linear, projection, unit

MASKED = -1e4  # added to a padded token's logits: its float32 weight after the softmax is exactly 0


class PostBlock(Block):
    """y = norm1(x + attention(x)); norm2(y + mlp(y))."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.attn(x, mask))
        return self.norm2(x + self.mlp(x))


class LastPostBlock(LastBlock):
    """The last `PostBlock` for one token a row. Equal to `PostBlock`, then ``own``."""

    def forward(self, x: Tensor, own, mask: Tensor | None = None) -> Tensor:  # type: ignore[no-untyped-def, override]
        if not self.folded:
            return own(PostBlock.forward(self, x, mask))  # type: ignore[arg-type]
        k, v = self.kv(x).chunk(2, dim=-1)
        x = own(x)
        x = self.norm1(x + self.attn.mix(self.q(x), k, v, mask, x))
        return self.norm2(x + self.mlp(x))


class Head(nn.Module):
    """down(gelu(up(x))), without biases."""

    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.up = linear(state, "up", width, bias=False)
        self.down = linear(state, "down", self.up.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def product(second: nn.Linear, first: nn.Linear) -> nn.Linear:
    """One layer for second(first(x)), multiplied in float64. ``first`` has a bias, ``second`` none."""
    weight, bias = (second.weight.double() @ tensor.double() for tensor in (first.weight, first.bias))
    with torch.device("meta"):
        both = nn.Linear(first.in_features, second.out_features)
    both.weight, both.bias = (nn.Parameter(t.float(), requires_grad=False) for t in (weight, bias))
    return both


class BertText(nn.Module):
    """``Style.pool``: first; mean, of the tokens that are not padding; or none: all tokens, [B, T, W], as they are.

    ``context``: at most so many tokens; ``offset``: the position of a row's first token in the table; ``pooler``:
    whether the pooled token goes through it.
    """

    def __init__(self, state: State, style: Style, context: int, offset: int = 0, pooler: bool = False) -> None:
        super().__init__()
        self.style, self.context, self.offset, self.pooled = style, context, offset, pooler
        words, width = state["tokens.weight"].shape
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.empty(state["positions"].shape[0], width))
        self.types: nn.Parameter | None = nn.Parameter(torch.empty(state["types"].shape[0], width))
        self.norm_pre = nn.LayerNorm(width, eps=style.eps)
        self.blocks = blocks(
            part(state, "blocks."), style, width, one_token=style.pool == "first", kinds=(PostBlock, LastPostBlock)
        )
        self.pooler = linear(state, "pooler", width) if pooler or "pooler.weight" in state else None
        if self.pooler is not None and pooler:
            width = self.pooler.out_features
        self.norm_post = nn.LayerNorm(width, eps=style.eps) if "norm_post.weight" in state else nn.Identity()
        self.transformation = linear(state, "transformation", width) if "transformation.weight" in state else None
        if self.transformation is not None:
            width = self.transformation.out_features
        two = "projection.up.weight" in state
        self.projection = Head(part(state, "projection."), width) if two else projection(state, width)

    def fold(self) -> None:
        """The type of all tokens into their positions, of which as many stay as are used; two products into one."""
        for block in self.blocks:
            block.fold()
        used = self.positions[self.offset : self.offset + self.context] + self.types[0]
        self.positions, self.offset = nn.Parameter(used, requires_grad=False), 0
        self.types = None
        if not self.pooled:
            self.pooler = None
        if self.transformation is not None:
            self.projection, self.transformation = product(self.projection, self.transformation), None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = self.positions[self.offset : self.offset + ids.shape[1]]
        if self.types is not None:
            positions = positions + self.types[0]
        x = self.norm_pre(self.tokens(ids) + positions)
        kept = mask.to(x.dtype)
        addend = ((1 - kept) * MASKED)[:, None, None, :]
        *most, last = self.blocks
        for block in most:
            x = block(x, addend)
        if self.style.pool == "none":
            return last(x, addend)
        if self.style.pool == "mean":
            x = (last(x, addend) * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        else:
            x = last(x, first, addend).flatten(1)
        if self.pooler is not None and self.pooled:
            x = torch.tanh(self.pooler(x))
        return unit(self.projection(self.norm_post(x)))


class MaskedLM(BertText):
    """Which word stands at each place: logits float32 [B, T, V]."""

    def __init__(self, state: State, style: Style, context: int, offset: int = 0) -> None:
        super().__init__(state, replace(style, pool="none"), context, offset)
        width = state["tokens.weight"].shape[1]
        self.head = nn.Module()
        self.head.dense, self.act = linear(state, "head.dense", width, width), ACTIVATIONS[style.activation]()
        self.head.norm = nn.LayerNorm(width, eps=style.eps)
        self.words = Words(part(state, "words."), self.tokens)

    def fold(self) -> None:
        super().fold()
        self.words.fold(self.tokens.weight.detach().clone())

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.logits(self.hidden(ids, mask))

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T, W]."""
        return super().forward(ids, mask)

    def logits(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., V]; training asks for a few tokens alone."""
        return self.words(self.head.norm(self.act(self.head.dense(x))), self.tokens.weight)
