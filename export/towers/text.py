"""Text towers of CLIP's kind: ids int64 [B, T] -> unit vectors float32 [B, D]; of OPT's: -> logits of words [B, T, V].

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4; OPT: Zhang et al. 2022 (arXiv 2205.01068). A tower that is
causal, and pooled at the end of the text or not at all, does not depend on the tokens after the end. So T may be the
length of the longest text of a batch, and padding on the right needs no mask. Gates that average over tokens are the
exception: their mean leaves out the tokens after the end of a text, and OPT's tower takes a mask.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, part
from calmclip.export.towers.attention import Gate
from calmclip.export.towers.modules import LayerNorm, Module, constant, unit
from calmclip.export.towers.transformer import Kind, Mask, Words, blocks, causal, hide, projection


class TextTransformer(Module):
    """``mixer``: the class of blocks that do not attend; see `blocks`."""

    def __init__(self, state: State, style: Style, mixer: Kind | None = None) -> None:
        super().__init__()
        self.style = style
        words, width = state["tokens.weight"].shape
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.empty(state["positions"].shape[0], width))
        one_token = style.pool in ("first", "eot", "last")
        self.blocks = blocks(part(state, "blocks."), style, width, one_token=one_token, mixer=mixer)
        self.norm_post = LayerNorm(width, eps=style.eps)
        self.projection = projection(state, width)

    def fold(self) -> None:
        self.blocks.fold()
        if self.style.causal:
            self.triangle = nn.Buffer(causal(len(self.positions)), persistent=False)

    def mask(self, length: int) -> Tensor | None:
        """[1, 1, T, T], added to the logits of attention."""
        if not self.style.causal:
            return None
        if "triangle" in self._buffers:
            return self.triangle[:, :, :length, :length]
        return causal(length).to(self.positions.device)

    @property
    def gates_average(self) -> bool:
        """Whether gates average over tokens; training sets gates after the tower is built."""
        return any(isinstance(inner, Gate) and inner.mean for inner in self.modules())

    def forward(self, ids: Tensor) -> Tensor:
        return unit(self.encode(self.tokens(ids), ids))

    def encode(self, words: Tensor, ids: Tensor) -> Tensor:
        """[B, D], before it is made a unit vector. ``words`` [B, T, W]: the embeddings of the tokens, or learnt vectors
        in place of some; ``ids`` tells which token is pooled."""
        x = words + self.positions[: ids.shape[1]]
        mask = triangle = self.mask(ids.shape[1])
        if self.style.pool == "eot" and self.gates_average:
            within = torch.arange(ids.shape[1], device=ids.device) <= self.pooled(ids)[:, None]
            mask = both(mask, hide(within.to(x.dtype)))
        x, last = self.blocks.before_last(x, mask)
        if self.style.pool == "mean":
            return self.projection(self.norm_post(last(x, mask)).mean(dim=1))
        positions = self.pooled(ids)
        pick = TokenAt(positions)
        row = mask if triangle is None else triangle[0, 0][positions][:, None, None]
        return self.projection(self.norm_post(last(x, row, pick)).flatten(1))

    def pooled(self, ids: Tensor) -> Tensor:
        """[B]: the position of the pooled token in each row."""
        match self.style:
            case Style(pool="eot", end=None):
                return ids.argmax(dim=-1)
            case Style(pool="eot", end=int(end)):
                return torch.eq(ids, end).int().argmax(dim=-1)
            case Style(pool="last"):
                return torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return torch.zeros_like(ids[:, 0])


class TextTokens(TextTransformer):
    """All tokens after the last norm, float32 [B, T, W], neither pooled nor projected."""

    def forward(self, ids: Tensor) -> Tensor:
        mask = self.mask(ids.shape[1])
        x, last = self.blocks.before_last(self.tokens(ids) + self.positions[: ids.shape[1]], mask)
        return self.norm_post(last(x, mask))


class CausalLM(TextTransformer):
    """Predicts the next word: logits float32 [B, T, V].

    ``offset``: the position of a row's first token in the table of positions. Logits come from ``words.weight``; if
    ``state`` has none, from the table of token embeddings. ``mask`` int64 [B, T], 0 for padding: only gates that
    average over tokens need it; None: no padding.
    """

    def __init__(self, state: State, style: Style, offset: int = 0) -> None:
        super().__init__(state, replace(style, pool="none", causal=True))
        self.offset = offset
        self.words = Words(part(state, "words."), self.tokens)

    def fold(self) -> None:
        self.positions, self.offset = constant(self.positions[self.offset :]), 0
        self.words.fold(self.tokens.weight)
        super().fold()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        length = ids.shape[1]
        embeddings, hidden = self.tokens(ids) + self.positions[self.offset : self.offset + length], self.mask(length)
        if mask is not None:
            hidden = both(hidden, hide(mask.to(embeddings.dtype)))
        x, last = self.blocks.before_last(embeddings, hidden)
        return self.words(self.norm_post(last(x, hidden)), self.tokens.weight)


def both(mask: Mask, other: Tensor) -> Tensor:
    """The mask that hides what one of the two hides."""
    return other if mask is None else mask + other


class TokenAt:
    """x [B, T, W] -> [B, 1, W]: the token at ``positions`` [B] of each row."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return x.gather(1, self.positions.expand(-1, 1, x.shape[-1]))
