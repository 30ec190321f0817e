"""What `dense` answers beside its patches: keys and objectness.

Keys float32 [B, h, w, C] are unit vectors; the cosine of two says how alike two patches are. Objectness float32
[B, h, w] is the probability that a patch shows a thing. Both read the input of the feed-forward of the third block from
the end, from which CLIP-DINOiser recovers the correlations of DINO's patches by one convolution.

Source: CLIP-DINOiser, Wysoczanska et al. 2024 (arXiv 2312.12359), section 3.2 and its code.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers.dense import INNER, DenseTransformer, Extra, Step
from calmclip.export.towers.guided import centred
from calmclip.export.towers.modules import unit


class OwnKeys(Extra):
    """The tower's own features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = (width,)

    def forward(self, tower: DenseTransformer, steps: Sequence[Step]) -> Tensor:
        return torch.unflatten(centred(tower.patches(steps[INNER].middle)), 1, tower.grid)


class ObjectKeys(Extra):
    """CLIP-DINOiser's ``obj_proj``: a convolution whose padding repeats the border."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        channels, width, side, _ = weight.shape
        self.shape = (channels,)
        self.conv = _given(nn.Conv2d(width, channels, side, padding=side // 2, padding_mode="replicate"), weight, bias)

    def forward(self, tower: DenseTransformer, steps: Sequence[Step]) -> Tensor:
        return unit(self.conv(_plane(tower, steps)).permute(0, 2, 3, 1))


class Objectness(Extra):
    """CLIP-DINOiser's ``bkg_decoder``: a layer on unit features."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.conv = _given(nn.Conv2d(weight.shape[1], 1, 1), weight, bias)

    def forward(self, tower: DenseTransformer, steps: Sequence[Step]) -> Tensor:
        return torch.sigmoid(self.conv(F.normalize(_plane(tower, steps), dim=1)))[:, 0]


def dinoiser(tensors: Mapping[str, Tensor]) -> dict[str, Extra]:
    """``tensors``: obj_proj.weight [C, W, k, k], bkg_decoder.weight [1, W, 1, 1], and their biases."""
    parts = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in ("obj_proj", "bkg_decoder")]
    return {"keys": ObjectKeys(*parts[0]), "objectness": Objectness(*parts[1])}


def _plane(tower: DenseTransformer, steps: Sequence[Step]) -> Tensor:
    """[B, W, h, w]."""
    return torch.unflatten(tower.patches(steps[INNER].middle), 1, tower.grid).permute(0, 3, 1, 2)


def _given(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    conv.weight, conv.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    return conv
