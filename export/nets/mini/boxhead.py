"""The class-agnostic box head on the frozen backbone's maps: the positions of objects, not their classes.

Source: the dense, anchor-free form of Tian et al. 2019 (FCOS, arXiv 1904.01355): every cell of a stride-16 grid has a
score for being in an object, and the distances to the object's four sides. Trained by `calmclip.export.boxes`.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from calmclip.export.nets.mini.backbone import WIDTH16, WIDTH32
from calmclip.models.errors import WeightsMissing

STRIDE = 16
WIDTH, BLOCKS = 96, 4


class Mix(nn.Module):
    """A depthwise 5x5 and a pointwise convolution, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.across = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(width)
        self.through = nn.Conv2d(width, width, 1, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm2(self.through(F.relu(self.norm1(self.across(x))))))


class BoxHead(nn.Module):
    """map16 [B, 120, h, w], map32 [B, 1280, h/2, w/2] -> objectness logits [B, N], boxes [B, N, 4], N = h * w.

    Boxes are x0 y0 x1 y1 in input pixels and always hold their cell's centre. Cells run row by row.
    """

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.from16 = nn.Conv2d(WIDTH16, width, 1, bias=False)
        self.norm16: nn.Module = nn.BatchNorm2d(width)
        self.from32 = nn.Conv2d(WIDTH32, width, 1, bias=False)
        self.norm32: nn.Module = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Mix(width) for _ in range(blocks)))
        self.out = nn.Conv2d(width, 5, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        with torch.no_grad():  # one cell in a hundred is in an object; objects extend about four cells to each side
            self.out.bias = nn.Parameter(torch.tensor([-4.6, 1.4, 1.4, 1.4, 1.4]))

    def forward(self, map16: Tensor, map32: Tensor) -> tuple[Tensor, Tensor]:
        coarse = F.interpolate(self.norm32(self.from32(map32)), scale_factor=2.0, mode="nearest")
        x = self.out(self.blocks(F.relu(self.norm16(self.from16(map16)) + coarse)))
        _, _, rows, cols = x.shape
        logits, reach = x.flatten(2).split((1, 4), dim=1)
        return logits[:, 0], decode(reach.transpose(1, 2), centres(rows, cols))


def load(path: Path) -> BoxHead:
    """The trained head in ``path``, its BatchNorms folded. Raises `WeightsMissing`."""
    head = BoxHead()
    try:
        head.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WeightsMissing(
            f"{path} holds no box head: {error}. `python -m calmclip.export.boxes` writes such a file."
        ) from None
    return fold(head)


def fold(head: BoxHead) -> BoxHead:
    """BatchNorms folded into the convolutions before them, in place and in float64."""
    head.eval().double()
    pairs: list[tuple[nn.Module, str, str]] = [(head, "from16", "norm16"), (head, "from32", "norm32")]
    pairs += [(block, *names) for block in head.blocks for names in (("across", "norm1"), ("through", "norm2"))]
    for owner, conv, norm in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return head.float().requires_grad_(False)


def centres(rows: int, cols: int) -> Tensor:
    """[rows * cols, 2] x y of the cells' centres in input pixels."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return (torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5) * STRIDE


def decode(reach: Tensor, centre: Tensor) -> Tensor:
    """Log distances [B, N, 4] to left, top, right, bottom, in cells -> boxes [B, N, 4] in pixels."""
    distance = reach.clamp(max=4.0).exp() * STRIDE
    return torch.cat((centre - distance[..., :2], centre + distance[..., 2:]), dim=-1)
