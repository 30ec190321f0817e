"""The `regions` tower of the built-in model.

The tower has two networks. NanoDet proposes boxes and knows 80 names (`nanodet`). The backbone of the image tower sees
the picture at half the size; its map, averaged over a box, goes through the image head, which has an open vocabulary.
`RegionHead`, which we train, corrects that vector by what NanoDet sees in the box. The map's cells are coarse, so the
vector of a large box is good as it is, and that of a small box says little. A region has one vector:

    h = unit(a v + MLP([v, cell, map16, map32]))    v: the image head's vector of the box
    o = unit(s v + (1 - s) h)                       s: the square root of the box's part of the picture
    class_embeds = unit(sum_c p_c^2 T_c + (SMALL + LARGE s) o)
                                                    p: NanoDet's chances of its names, T: the names' text vectors
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.nets.mini import nanodet
from calmclip.export.nets.mini.backbone import Backbone
from calmclip.export.nets.mini.facts import PROPOSALS, SIDE, WIDTH
from calmclip.export.nets.mini.masks import MaskFeatures
from calmclip.export.nets.mini.nanodet import NanoDet
from calmclip.export.nets.mini.quality import Quality, shape
from calmclip.export.nets.mini.towers import ImageHead, unit
from calmclip.models.errors import WeightsMissing

HALF = 2  # the backbone sees the picture at 1 / HALF of the size
LIKELY = 1000  # cells of the highest chances, whose quality is computed
FIRST = 300  # best of them, which enter suppression
OVERLAP = 0.65  # above this IoU the worse of two proposals is dropped
ROUNDS = 12
SMALL, LARGE = 0.1, 0.5  # the open vector's weight beside the squares of NanoDet's chances
FEATURES = WIDTH + nanodet.WIDTH + nanodet.MIDDLE + nanodet.DEEP
HIDDEN = 384


class RegionHead(nn.Module):
    """Open vectors v [..., 384], NanoDet's features of the same boxes [..., 896] -> unit vectors [..., 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.ones(1))
        self.mean = nn.Buffer(torch.zeros(FEATURES))
        self.gain = nn.Buffer(torch.ones(FEATURES))
        self.inner = nn.Linear(FEATURES, HIDDEN)
        self.outer = nn.Linear(HIDDEN, WIDTH)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def standardize(self, features: Tensor) -> None:
        """Take mean and deviation of the inputs [N, 1280] from these."""
        self.mean.copy_(features.mean(0))
        self.gain.copy_(1 / features.std(0).clamp(min=1e-4))

    def forward(self, vectors: Tensor, features: Tensor, dropout: float = 0.0) -> Tensor:
        seen = (torch.cat((vectors, features), -1) - self.mean) * self.gain
        hidden = F.dropout(F.relu(self.inner(seen)), dropout, self.training)
        return unit(self.keep * vectors + self.outer(hidden))


class Regions(nn.Module):
    """pixels [B, 3, 416, 416] -> class_embeds [B, P, D] unit rows, boxes [B, P, 4] in pixels, objectness [B, P],
    mask_features [B, 32, 52, 52] (`masks`).

    Best first. P is always `PROPOSALS`; rows without a proposal have objectness 0.
    """

    def __init__(
        self,
        boxes: NanoDet,
        quality: Quality,
        backbone: Backbone,
        image: ImageHead,
        head: RegionHead,
        names: Tensor,
        masks: MaskFeatures,
    ) -> None:
        """``names`` [80, D]: unit text vectors of NanoDet's names."""
        super().__init__()
        self.boxes = boxes
        self.quality = quality
        self.backbone = backbone
        self.image = image
        self.head = head
        self.names = nn.Buffer(names)
        self.masks = masks
        self.cells = nn.Buffer(nanodet.grid())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        map32 = self.backbone(F.avg_pool2d(pixels, HALF))[1]  # first, so that its nodes count as in the image tower
        chances, boxes, objectness, features, maps = self.seen(pixels)
        vectors = self.image(average(map32, boxes, HALF * 32))
        side = extent(boxes)
        described = unit(side * vectors + (1 - side) * self.head(vectors, features))
        known = torch.matmul(chances.square(), self.names)
        vectors = unit(known + (SMALL + LARGE * side) * described)
        return vectors, boxes, objectness, self.masks(*maps)  # last, so that the other nodes keep their numbers

    def propose(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> chances [B, P, 80], boxes [B, P, 4], objectness [B, P], NanoDet's features of the boxes [B, P, 896]."""
        return self.seen(pixels)[:4]

    def seen(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """The same, and the maps that `MaskFeatures` reads."""
        logits, bins, cells, map16, map32, *maps = self.boxes(pixels)
        likely, order = logits.amax(-1).topk(LIKELY)
        bins, places = _rows(bins, order), self.cells[order]
        best, first = (likely.sigmoid() * self.quality(shape(bins, places))).sqrt().topk(FIRST)
        order, bins, places = torch.gather(order, 1, first), _rows(bins, first), _rows(places, first)
        boxes = nanodet.decode(bins, places).clamp(0.0, float(SIDE))
        objectness, kept = (best * survivors(boxes, OVERLAP)).topk(PROPOSALS)
        boxes, order = _rows(boxes, kept), torch.gather(order, 1, kept)
        features = (_rows(cells, order), average(map32, boxes, 32), average(map16, boxes, 16))
        return _rows(logits, order).sigmoid(), boxes, objectness, torch.cat(features, -1), tuple(maps)


def extent(boxes: Tensor) -> Tensor:
    """boxes [..., 4] in pixels -> [..., 1]: the square root of a box's part of the picture's area, 0 to 1."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    area = ((x1 - x0) * (y1 - y0)).clamp(min=0.0)
    return (area.sqrt() / SIDE).unsqueeze(-1)


def survivors(boxes: Tensor, threshold: float) -> Tensor:
    """boxes [B, N, 4], best first -> float [B, N]: 1 for a box that greedy suppression keeps, else 0.

    Each round decides on all boxes at once: a box is dropped if it overlaps a better box that survived the last round.
    After k rounds the result is exact for every box at the end of a chain of at most k such overlaps. Chains longer
    than `ROUNDS` do not occur.
    """
    rivals = overlapping(boxes, threshold).float().tril(-1)  # [i, j]: j is better and overlaps i
    alive = torch.ones_like(boxes[..., 0])
    for _ in range(ROUNDS):
        alive = (torch.matmul(rivals, alive.unsqueeze(-1)).squeeze(-1) < 0.5).float()
    return alive


def overlapping(boxes: Tensor, threshold: float) -> Tensor:
    """[B, N, 4] -> bool [B, N, N]: the IoU is above ``threshold``. Boxes without area overlap nothing.

    shared / (a + b - shared) > t is shared (1 + t) > t (a + b), which needs no division. x and y are separate tensors:
    ONNX Runtime is slow at comparing rows of two numbers.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        inner = torch.minimum(high[:, :, None], high[:, None, :]) - torch.maximum(low[:, :, None], low[:, None, :])
        return inner.clamp(min=0.0)

    area = threshold / (1 + threshold) * (x1 - x0) * (y1 - y0)
    return overlap(x0, x1) * overlap(y0, y1) > area[:, :, None] + area[:, None, :]


def average(features: Tensor, boxes: Tensor, cell: int) -> Tensor:
    """Map [B, C, h, w] of ``cell``-pixel cells, boxes [B, P, 4] in pixels -> [B, P, C]: the map's mean over each box.

    The mean is exact: a cell is weighted by the part of it that lies in the box. The weights are a product of a row and
    a column, so one matrix product replaces RoIAlign. A box thinner than a pixel counts as one pixel.
    """
    rows, cols = features.shape[-2:]
    x0, y0, x1, y1 = boxes.unbind(-1)
    weights = _cover(y0, y1, rows, cell)[..., :, None] * _cover(x0, x1, cols, cell)[..., None, :]  # [B, P, h, w]
    return torch.matmul(weights.flatten(2), features.flatten(2).transpose(1, 2))


def _cover(low: Tensor, high: Tensor, cells: int, cell: int) -> Tensor:
    """[..., cells], sum 1: the part of [low, high] that lies in each cell."""
    edges = torch.arange(cells, dtype=low.dtype) * cell
    middle = ((low + high) / 2).unsqueeze(-1)
    half = ((high - low) / 2).clamp(min=0.5).unsqueeze(-1)
    covered = (torch.minimum(middle + half, edges + cell) - torch.maximum(middle - half, edges)).clamp(min=0.0)
    return covered / covered.sum(-1, keepdim=True).clamp(min=1e-9)


def _rows(table: Tensor, order: Tensor) -> Tensor:
    """table [B, N, C], order int64 [B, P] -> [B, P, C]."""
    return torch.gather(table, 1, order.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


@dataclass(frozen=True)
class Detector:
    """The trained parts, as `detector.safetensors` holds them: float16, the first convolution in float32."""

    boxes: NanoDet
    quality: Quality
    head: RegionHead

    @classmethod
    def load(cls, path: Path) -> "Detector":
        """Raises `WeightsMissing` for a file that is absent or holds other tensors."""
        result = cls(NanoDet(), Quality(), RegionHead())
        try:
            state = {name: tensor.float() for name, tensor in load_file(path).items()}
            result.module().load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError) as error:
            remedy = "`python -m calmclip.export.regions` writes such a file"
            raise WeightsMissing(f"{path} holds no detector: {error}. {remedy}.") from None
        result.module().eval().requires_grad_(False)
        return result

    def module(self) -> nn.Module:
        return nn.ModuleDict({"boxes": self.boxes, "quality": self.quality, "head": self.head})

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        tensors = {
            name: (tensor if "stem" in name else tensor.half()).contiguous()
            for name, tensor in self.module().state_dict().items()
        }
        save_file(tensors, path, metadata={"format": "pt", **metadata})
        path.chmod(0o644)
