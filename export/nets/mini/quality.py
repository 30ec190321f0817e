"""How well a cell's box fits some thing, from the shape of its sides' distributions alone.

NanoDet's logits know 80 names, so things with other names get low chances. But the distributions of a side's distance
are narrow where the picture has an edge, whatever the thing is called. A small network reads four numbers of each
distribution and predicts the IoU with the nearest thing:

    quality   = sigmoid(MLP([largest chance, sum of squares, mean, deviation of 4 sides; log2(stride / 8)]))
    objectness = sqrt(max_c p_c * quality)

Source: Li et al. 2020 (arXiv 2011.12885), Generalized Focal Loss V2: the distributions' shape tells the quality. Kim
et al. 2021 (arXiv 2108.06753), OLN: it is learnt near things alone, so a thing without a label is no background.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.nets.mini import nanodet

INPUTS = 4 * 4 + 1
HIDDEN = 64


class Quality(nn.Module):
    """Inputs of `shape`, float32 [..., 17] -> [...] in 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(INPUTS))
        self.gain = nn.Buffer(torch.ones(INPUTS))
        self.inner = nn.Linear(INPUTS, HIDDEN)
        self.outer = nn.Linear(HIDDEN, 1)

    def standardize(self, shapes: Tensor) -> None:
        """Take mean and deviation of the inputs [N, 17] from these."""
        self.mean.copy_(shapes.mean(0))
        self.gain.copy_(1 / shapes.std(0).clamp(min=1e-3))

    def logits(self, shapes: Tensor) -> Tensor:
        result: Tensor = self.outer(F.relu(self.inner((shapes - self.mean) * self.gain)))
        return result.squeeze(-1)

    def forward(self, shapes: Tensor) -> Tensor:
        return self.logits(shapes).sigmoid()


def shape(bins: Tensor, cells: Tensor) -> Tensor:
    """bins [..., N, 44], cells [..., N, 3] of `nanodet.grid` -> [..., N, 17]. Distances are in 10 strides."""
    chances = torch.unflatten(bins, -1, (4, nanodet.BINS)).softmax(-1)
    reach = torch.arange(nanodet.BINS, dtype=bins.dtype) / (nanodet.BINS - 1)
    moments = torch.matmul(chances, torch.stack((reach, reach.square()), 1))  # the mean, and that of the squares
    mean, square = moments.unbind(-1)
    deviation = (square - mean.square()).clamp(min=0.0).sqrt()
    sides = torch.stack((chances.amax(-1), chances.square().sum(-1), mean, deviation), -1)
    level = cells[..., 2:].log2() - 3
    return torch.cat((sides.flatten(-2), level), -1)
