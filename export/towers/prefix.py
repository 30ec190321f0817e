"""Learnt tokens in every text: a text tower whose graph adds the ids of learnt rows to the ids that it is given.

Source: Lester et al. 2021 (arXiv 2104.08691), rows before the text; CoOp, Zhou et al. 2022 (arXiv 2109.01134), rows
behind the first token. The rows are the last ones of the tower's table of tokens, so the tower does with them what it
does with any token: positions, mask and pooling count them.
"""

import torch
from torch import Tensor, nn

from calmclip.export.towers.modules import Module, constant


class Prefixed(Module):
    """ids int64 [B, T] and the other inputs of ``tower``, all int64 [B, T] -> what it answers for T + n tokens.

    ``rows`` [n, W] are added to the tower's table. ``behind_first``: they stand behind the first token of a text, not
    before it. ``pooled``: whether a mean of chosen tokens (the third input) takes them.
    """

    def __init__(self, tower: nn.Module, rows: Tensor, *, behind_first: bool, pooled: bool = True) -> None:
        super().__init__()
        table: nn.Embedding = tower.tokens  # type: ignore[assignment]
        self.words, self.number = len(table.weight), len(rows)
        table.weight, table.num_embeddings = constant(torch.cat([table.weight, rows])), self.words + self.number
        self.tower, self.behind_first, self.pooled = tower, int(behind_first), pooled

    def forward(self, ids: Tensor, mask: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
        """``mask``: 0 for padding, on either side; ``chosen``: 0 for tokens that a mean leaves out."""
        first = torch.zeros_like(ids[:, :1]) if mask is None else mask.int().argmax(dim=1, keepdim=True)
        start = first + self.behind_first
        places = torch.arange(ids.shape[1] + self.number, device=ids.device)[None]
        learnt = (places >= start) & (places < start + self.number)
        sources = torch.where(places < start, places, places - self.number).clamp(min=0)
        sources = sources.clamp(max=ids.shape[1] - 1)
        inputs = [torch.where(learnt, self.words + places - start, ids.gather(1, sources))]
        for given, value in ((mask, 1), (chosen, int(self.pooled))):
            if given is not None:
                inputs.append(torch.where(learnt, value, given.gather(1, sources)))
        vectors: Tensor = self.tower(*inputs)
        return vectors
