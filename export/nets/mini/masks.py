"""Masks of boxes: one small network for things of every kind, which reads NanoDet's maps.

`MaskFeatures` is a part of the graph `regions`: it joins three maps of NanoDet at stride 8. `Masks` is the graph
`masks`: it samples these features over each box, which it enlarges by `MARGIN` a side, and says for each sample whether
the thing lies there:

    g = features at `SAMPLES` x `SAMPLES` places of the box: a product of a row's and of a column's weights
    h = relu(W [g; x; y; x^2; y^2; log2 size])      x and y from -1 to 1 over the enlarged box
    h = relu(h + conv3x3(h)), twice
    mask_logits = w h + b

Source: He et al. 2017 (arXiv 1703.06870), section 3, Mask R-CNN: masks of boxes of known place, apart from their names;
here the mask has no class. Bolya et al. 2019 (arXiv 1904.02689), YOLACT: the features of all masks are computed once.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.nets.mini import nanodet, parameters
from calmclip.export.nets.mini.facts import MARGIN, MASK_WIDTH, SAMPLES, SIDE
from calmclip.models.errors import WeightsMissing

STRIDE = 8  # of the features
PLACES = 5  # numbers beside the features of a sample
BLOCKS = 2


class MaskFeatures(nn.Module):
    """NanoDet's maps: its stage at stride 8 and its neck at 8 and 16 -> float32 [B, 32, H/8, W/8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stage8 = nn.Conv2d(nanodet.WIDTH, MASK_WIDTH, 1)
        self.neck8 = nn.Conv2d(nanodet.WIDTH, MASK_WIDTH, 1, bias=False)
        self.neck16 = nn.Conv2d(nanodet.WIDTH, MASK_WIDTH, 1, bias=False)

    def forward(self, stage8: Tensor, neck8: Tensor, neck16: Tensor) -> Tensor:
        features: Tensor = self.stage8(stage8) + self.neck8(neck8) + nanodet.twice(self.neck16(neck16))
        return features


class Masks(nn.Module):
    """mask_features [1, 32, h, w], boxes [1, N, 4] in pixels of the input -> mask_logits [1, N, S, S], rows from top to
    bottom of the box enlarged by `MARGIN` a side."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(MASK_WIDTH + PLACES, MASK_WIDTH, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(MASK_WIDTH, MASK_WIDTH, 3, padding=1) for _ in range(BLOCKS))
        self.outer = nn.Conv2d(MASK_WIDTH, 1, 1)
        self.places = nn.Buffer(torch.from_numpy(parameters.places()), persistent=False)

    def forward(self, mask_features: Tensor, boxes: Tensor) -> Tensor:
        x = F.relu(self.inner(sampled(mask_features[0], boxes[0], self.places)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        logits: Tensor = self.outer(x)
        return logits.transpose(0, 1)


def sampled(features: Tensor, boxes: Tensor, places: Tensor) -> Tensor:
    """features [C, h, w], boxes [N, 4], places [1, 4, S, S] -> [N, C + 5, S, S]: the features at the middles
    of S x S equal parts of each enlarged box, interpolated bilinearly, and their places."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    rows, columns = features.shape[-2:]
    down, across = _between(y0, y1, rows), _between(x0, x1, columns)
    wide = torch.matmul(down.unsqueeze(1), features)  # [N, C, S, w]
    seen = torch.matmul(wide, across.transpose(1, 2).unsqueeze(1))
    size = ((x1 - x0) * (y1 - y0)).clamp(min=1.0).sqrt().div(SIDE).log2() / 4
    level = size.reshape(-1, 1, 1, 1).expand(-1, 1, SAMPLES, SAMPLES)
    return torch.cat((seen, places.expand(boxes.shape[0], -1, -1, -1), level), 1)


def _between(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """[N], [N] in pixels -> [N, S, cells], rows of sum 1: the two cells around each of S places."""
    parts = (torch.arange(SAMPLES) + 0.5) / SAMPLES * (1 + 2 * MARGIN) - MARGIN
    places = ((low.unsqueeze(-1) + parts * (high - low).unsqueeze(-1)) / STRIDE - 0.5).clamp(0.0, cells - 1.0)
    return (1 - (places.unsqueeze(-1) - torch.arange(cells)).abs()).clamp(min=0.0)


class MaskHead(nn.Module):
    """Both parts, as `masks.safetensors` holds them in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.features = MaskFeatures()
        self.masks = Masks()

    @classmethod
    def load(cls, path: Path) -> "MaskHead":
        """Raises `WeightsMissing` for a file that is absent or holds other tensors."""
        head = cls()
        try:
            head.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            remedy = "`python -m calmclip.export.masks` writes such a file"
            raise WeightsMissing(f"{path} holds no mask head: {error}. {remedy}.") from None
        return head.eval().requires_grad_(False)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt", **metadata})
        path.chmod(0o644)
