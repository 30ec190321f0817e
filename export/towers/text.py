"""Text towers of CLIP's kind: ids int64 [B, T] -> unit vectors float32 [B, D]; of OPT's: -> logits of words [B, T, V].

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4; OPT: Zhang et al. 2022 (arXiv 2205.01068). Causal and
pooled at the end of the text, or not at all, what follows a token changes nothing: T may be as short as the longest
text of a batch, and no mask is needed for what is padded on the right.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, part
from calmclip.export.towers.transformer import Words, blocks, causal, projection, unit


class TextTransformer(nn.Module):
    def __init__(self, state: State, style: Style) -> None:
        super().__init__()
        self.style = style
        words, width = state["tokens.weight"].shape
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.empty(state["positions"].shape[0], width))
        self.blocks = blocks(part(state, "blocks."), style, width, one_token=style.pool in ("first", "eot", "last"))
        self.norm_post = nn.LayerNorm(width, eps=style.eps)
        self.projection = projection(state, width)

    def fold(self) -> None:
        for block in self.blocks:
            block.fold()
        if self.style.causal:
            self.triangle = nn.Buffer(causal(len(self.positions)), persistent=False)

    def mask(self, length: int) -> Tensor | None:
        """[1, 1, T, T]: what is added to the logits."""
        if not self.style.causal:
            return None
        if "triangle" in self._buffers:
            return self.triangle[:, :, :length, :length]
        return causal(length).to(self.positions.device)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        mask = self.mask(ids.shape[1])
        *most, last = self.blocks
        for block in most:
            x = block(x, mask)
        if self.style.pool == "mean":
            return unit(self.projection(self.norm_post(last(x, mask)).mean(dim=1)))
        at = self.place(ids)
        own = Pick(at)
        row = None if mask is None else mask[0, 0][at][:, None, None]
        return unit(self.projection(self.norm_post(last(x, own, row)).flatten(1)))

    def place(self, ids: Tensor) -> Tensor:
        """[B]: where the token that is pooled stands in each row."""
        match self.style:
            case Style(pool="eot", end=None):
                return ids.argmax(dim=-1)
            case Style(pool="eot", end=end):
                return (ids == end).int().argmax(dim=-1)
            case Style(pool="last"):
                return torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return torch.zeros_like(ids[:, 0])


class CausalLM(TextTransformer):
    """Which word comes next: logits float32 [B, T, V].

    ``offset``: the position of a row's first token in the table. The logits are those of ``words.weight``, where it is,
    else of the table of tokens.
    """

    def __init__(self, state: State, style: Style, offset: int = 0) -> None:
        super().__init__(state, replace(style, pool="none", causal=True))
        self.offset = offset
        self.words = Words(part(state, "words."), self.tokens)

    def fold(self) -> None:
        self.positions, self.offset = nn.Parameter(self.positions[self.offset :], requires_grad=False), 0
        self.words.fold(self.tokens.weight.detach().clone())
        super().fold()

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x, mask = self.tokens(ids) + self.positions[self.offset : self.offset + length], self.mask(length)
        for block in self.blocks:
            x = block(x, mask)
        return self.words(self.norm_post(x), self.tokens.weight)


class Pick:
    """x [B, T, W] -> [B, 1, W]: of each row the token at ``at`` [B]."""

    def __init__(self, at: Tensor) -> None:
        self.at = at[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return x.gather(1, self.at.expand(-1, 1, x.shape[-1]))
