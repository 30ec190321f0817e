"""Train `Quality` of the built-in detector on photographs with boxes. The boxes' names are not used.

Source: Kim et al. 2021 (arXiv 2108.06753), OLN: the target is the IoU with the nearest box, and only cells near a box
train. A thing without a box is then no counterexample, so things of other names keep their chances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export.nets.mini import nanodet
from calmclip.export.nets.mini.facts import REGION_PIXELS, SIDE
from calmclip.export.nets.mini.quality import Quality, shape
from calmclip.export.nets.mini.regions import Regions
from calmclip.models.errors import BadRequest
from calmclip.models.evals.average_precision import Boxes
from calmclip.models.flow import Array
from calmclip.models.ops.reference import iou
from calmclip.models.preprocess.image import ImagePreparer, decode

NEAR = 0.3  # IoU of a cell's box with a true box, from which on the cell trains
STEPS, BATCH, RATE, DECAY = 600, 1024, 3e-3, 0.05


@dataclass(frozen=True)
class Cells:
    """N cells near boxes: ``shapes`` float32 [N, 17] as `quality.shape` gives them, ``overlaps`` [N], their IoU."""

    shapes: Tensor
    overlaps: Tensor


@torch.inference_mode()
def see(module: Regions, paths: Sequence[Path], truth: Sequence[Boxes]) -> Cells:
    """The cells near the true boxes of each picture. A picture takes about 50 ms on one core.

    Raises `InputError` with the file that is no picture, and `BadRequest` if no cell is near any box.
    """
    preparer = ImagePreparer(REGION_PIXELS)
    shapes, overlaps = [torch.zeros(0, module.quality.mean.numel())], [torch.zeros(0)]
    for path, boxes in tqdm(list(zip(paths, truth, strict=True)), "boxes", unit=""):
        wanted = boxes.boxes[~boxes.crowd]
        if not len(wanted):
            continue
        array, frame = preparer.prepare(decode(path.read_bytes()))
        near = cells_near(module, torch.from_numpy(array), frame.to_input(wanted))
        shapes.append(near.shapes)
        overlaps.append(near.overlaps)
    cells = Cells(torch.cat(shapes), torch.cat(overlaps))
    if not len(cells.overlaps):
        raise BadRequest(f"no box of {len(paths)} pictures is near any place; expected COCO boxes in pixels")
    return cells


def cells_near(module: Regions, pixels: Tensor, boxes: Array) -> Cells:
    """The cells near ``boxes`` [n, 4], n >= 1, in pixels of the input ``pixels`` [1, 3, 416, 416]."""
    _, bins, *_ = module.boxes(pixels)
    proposed = nanodet.decode(bins[0], module.cells).clamp(0.0, float(SIDE)).numpy()
    nearest = torch.from_numpy(np.max([iou(box, proposed) for box in boxes], axis=0)).float()
    near = nearest > NEAR
    return Cells(shape(bins[0], module.cells)[near], nearest[near])


def train(cells: Cells, *, start: Quality | None = None, steps: int = STEPS, seed: int = 0) -> Quality:
    """-> a network that continues from ``start``, or a new one. Seconds on one core."""
    torch.manual_seed(seed)
    quality = Quality()
    if start is not None:
        quality.load_state_dict(start.state_dict())
    else:
        quality.standardize(cells.shapes)
    optimizer = torch.optim.AdamW(quality.parameters(), RATE, weight_decay=DECAY)
    quality.train()
    for _ in range(steps):
        rows = torch.randint(0, len(cells.overlaps), (BATCH,))
        error = F.binary_cross_entropy_with_logits(quality.logits(cells.shapes[rows]), cells.overlaps[rows])
        optimizer.zero_grad()
        torch.autograd.backward(error)
        optimizer.step()
    return quality.eval().requires_grad_(False)
