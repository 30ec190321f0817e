"""Text towers of CLIP's kind: ids int64 [B, T] -> unit vectors float32 [B, D].

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4. Causal and pooled at the end of the text, what follows that
end changes nothing: T may be as short as the longest text of a batch, and no mask is needed.
"""

import torch
from torch import Tensor, nn

from export.towers import State, Style, part
from export.towers.transformer import blocks, causal, projection, unit


class TextTransformer(nn.Module):
    def __init__(self, state: State, style: Style) -> None:
        super().__init__()
        self.style = style
        words, width = state["tokens.weight"].shape
        context = state["positions"].shape[0]
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = blocks(part(state, "blocks."), style, width, one_token=style.pool in ("first", "eot", "last"))
        self.norm_post = nn.LayerNorm(width, eps=style.eps)
        self.projection = projection(state, width)

    def fold(self) -> None:
        for block in self.blocks:
            block.fold()
        self.mask = nn.Buffer(causal(len(self.positions)), persistent=False) if self.style.causal else None

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.positions[:length]
        mask = None if self.mask is None else self.mask[:, :, :length, :length]
        *most, last = self.blocks
        for block in most:
            x = block(x, mask)
        if self.style.pool == "mean":
            return unit(self.projection(self.norm_post(last(x, mask)).mean(dim=1)))
        at = self.place(ids)
        own = Pick(at)
        row = None if self.mask is None else self.mask[0, 0, :, :length][at][:, None, None]
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


class Pick:
    """x [B, T, W] -> [B, 1, W]: of each row the token at ``at`` [B]."""

    def __init__(self, at: Tensor) -> None:
        self.at = at[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return x.gather(1, self.at.expand(-1, 1, x.shape[-1]))
