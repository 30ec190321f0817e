"""Detection with the built-in model: the `regions` tower and the `detect` graph.

The tower proposes boxes and embeds each: the backbone's last map, averaged over the box, goes through the image head
of the image tower. The graph compares the regions with the prompts and with phrases of background, which absorb regions
that show no prompt. It outputs box-prompt pairs, and export appends SoftNMS:

    score = softmax(SCALE cos)[prompt] * objectness
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calmclip.export.nets import Built, Net, Tower, float32
from calmclip.export.nets.common import detect_graph as detection
from calmclip.export.nets.mini.backbone import QUANTIZE, Backbone
from calmclip.export.nets.mini.boxhead import BoxHead
from calmclip.export.nets.mini.towers import ImageHead, ImageTower, TextTower
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.spec import SOFTMAX

SIZE = 640  # the letterboxed picture's sides
CELL = 32  # pixels of a cell of the map that regions are averaged from
PROPOSALS = 100
FIRST = 400  # best cells that enter suppression
OVERLAP = 0.5  # above this IoU the worse of two proposals is dropped
ROUNDS = 12
SCALE = 20.0
BACKGROUND = (
    "the sky",
    "grass",
    "a wall",
    "the floor",
    "the ground",
    "trees",
    "water",
    "a road",
    "a building",
    "a blurry background",
    "texture",
    "part of something",
)


class Regions(nn.Module):
    """pixels [B, 3, 640, 640] -> class_embeds [B, P, D] unit rows, boxes [B, P, 4] in pixels, objectness [B, P].

    Best first. P is always `PROPOSALS`; rows without a proposal have objectness 0.
    """

    def __init__(self, backbone: Backbone, box_head: BoxHead, image_head: ImageHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.box_head = box_head
        self.image_head = image_head

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        map16, map32 = self.backbone(pixels)
        logits, boxes = self.box_head(map16, map32)
        boxes, objectness = propose(boxes.clamp(0.0, float(SIZE)), logits.sigmoid())
        return self.image_head(average(map32, boxes)), boxes, objectness


def propose(boxes: Tensor, objectness: Tensor) -> tuple[Tensor, Tensor]:
    """boxes [B, N, 4], objectness [B, N] -> the best `PROPOSALS` after hard suppression, padded with zeros."""
    best, order = objectness.topk(FIRST)
    boxes = _rows(boxes, order)
    scores, order = (best * survivors(boxes, OVERLAP)).topk(PROPOSALS)
    return _rows(boxes, order), scores


def survivors(boxes: Tensor, threshold: float) -> Tensor:
    """boxes [B, N, 4], best first -> float [B, N]: 1 for a box that greedy suppression keeps, else 0.

    Each round decides on all boxes at once: a box is dropped if it overlaps a better box that survived the last round.
    After k rounds the result is exact for every box at the end of a chain of at most k such overlaps. Chains longer
    than `ROUNDS` do not occur.
    """
    rivals = (pairwise_iou(boxes) > threshold).float().tril(-1)  # [i, j]: j is better and overlaps i
    alive = torch.ones_like(boxes[..., 0])
    for _ in range(ROUNDS):
        alive = (torch.matmul(rivals, alive.unsqueeze(-1)).squeeze(-1) < 0.5).float()
    return alive


def pairwise_iou(boxes: Tensor) -> Tensor:
    """[B, N, 4] -> [B, N, N]; boxes without area overlap nothing.

    x and y are separate tensors: ONNX Runtime takes 3 of the 48 ms of `regions` to compare rows of two numbers.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        inner = torch.minimum(high[:, :, None], high[:, None, :]) - torch.maximum(low[:, :, None], low[:, None, :])
        return inner.clamp(min=0.0)

    shared = overlap(x0, x1) * overlap(y0, y1)
    area = (x1 - x0) * (y1 - y0)
    return shared / (area[:, :, None] + area[:, None, :] - shared).clamp(min=1e-9)


def average(features: Tensor, boxes: Tensor) -> Tensor:
    """Map [B, C, h, w] of `CELL`-pixel cells, boxes [B, P, 4] in pixels -> [B, P, C]: the map's mean over each box.

    The mean is exact: a cell is weighted by the part of it that lies in the box. The weights are a product of a row and
    a column, so one matrix product replaces RoIAlign. A box thinner than a pixel counts as one pixel.
    """
    rows, cols = features.shape[-2:]
    x0, y0, x1, y1 = boxes.unbind(-1)
    weights = _cover(y0, y1, rows)[..., :, None] * _cover(x0, x1, cols)[..., None, :]  # [B, P, h, w]
    return torch.matmul(weights.flatten(2), features.flatten(2).transpose(1, 2))


def _cover(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """[..., cells], sum 1: the part of [low, high] that lies in each cell."""
    edges = torch.arange(cells, dtype=low.dtype) * CELL
    middle = ((low + high) / 2).unsqueeze(-1)
    half = ((high - low) / 2).clamp(min=0.5).unsqueeze(-1)
    covered = (torch.minimum(middle + half, edges + CELL) - torch.maximum(middle - half, edges)).clamp(min=0.0)
    return covered / covered.sum(-1, keepdim=True).clamp(min=1e-9)


def _rows(boxes: Tensor, order: Tensor) -> Tensor:
    return torch.gather(boxes, 1, order.unsqueeze(-1).expand(-1, -1, 4))


def detect_graph(background: Array, scale: float = SCALE) -> Built:
    """background [G, D] unit rows -> the graph that turns regions and prompts into candidates for SoftNMS."""
    dim = background.shape[1]
    regions = {
        "class_embeds": float32(1, PROPOSALS, dim),
        "boxes": float32(1, PROPOSALS, 4),
        "objectness": float32(1, PROPOSALS),
    }
    score = """
        described = Concat <axis = 0> (text_embeds, background)
        directions = Transpose (described)
        region = Squeeze (class_embeds, first)
        cosines = MatMul (region, directions)
        logits = Mul (cosines, scale)
        chances = Softmax <axis = -1> (logits)
        wanted = Slice (chances, first, labels, axis)
        column = Transpose (objectness)
        pairs = Mul (wanted, column)
    """
    constants = {
        "background": background.astype(np.float32), "scale": np.array(scale, np.float32), "axis": np.array([1])
    }  # fmt: skip
    random = np.random.default_rng(0)
    example = detection.example(random, PROPOSALS, dim, SIZE)
    example["objectness"] = np.sort(random.random((1, PROPOSALS)))[:, ::-1]
    return detection.detect_graph(regions, dim, score, constants, example, {SOFTMAX.name: 1})


PIXELS = ImagePreprocess(
    size=(SIZE, SIZE), resize="letterbox", pad=127, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)  # (x - 127) / 128; the backbone reads the margin as 0


def summary(outputs: Arrays) -> Arrays:
    """A summary of each picture's proposals that does not depend on their order, and hardly on the last of them.

    A rounding error may swap two equal proposals, or replace the hundredth. So these are means over the proposals
    weighted by objectness squared (boxes relative to the input), and the objectness itself, best first.
    """
    weight = outputs["objectness"][..., None].astype(np.float64) ** 2
    total = np.maximum(weight.sum(axis=1), 1e-12)
    means = {
        name: (weight * outputs[name]).sum(axis=1) / total / unit
        for name, unit in (("class_embeds", 1), ("boxes", SIZE))
    }
    return {**means, "objectness": outputs["objectness"]}


def add_detection(net: Net, image: ImageTower, text: TextTower, box_head: BoxHead) -> Net:
    """``net``, which has these towers, with the task detect."""
    background = embed(text, net.files["tokenizer.json"], BACKGROUND)
    tower = Tower(
        module=Regions(image.backbone, box_head, image.head).eval(),
        inputs={"pixels": float32("B", 3, SIZE, SIZE)},
        outputs={
            "class_embeds": float32("B", PROPOSALS, background.shape[1]),
            "boxes": float32("B", PROPOSALS, 4),
            "objectness": float32("B", PROPOSALS),
        },
        preprocess=PIXELS,
        quantizer="search",  # as the image tower's, so that both store the same INT8 bytes of the backbone, once
        quantizer_params=QUANTIZE,
        summary=summary,
        promises={SOFTMAX.name: 1},
    )
    return replace(
        net,
        tasks=(*net.tasks, "detect"),
        towers={**net.towers, "regions": tower},
        built={**net.built, "detect": detect_graph(background)},
    )


@torch.inference_mode()
def embed(text: TextTower, tokenizer: bytes, phrases: Sequence[str]) -> Array:
    """-> float32 [len(phrases), D] unit rows.

    They become constants of a graph. Float32 sums depend on the number of threads and on the instruction set; those of
    float64, rounded to float32, do not.
    """
    exact = copy.deepcopy(text).double()
    encoder = Tokenizer.from_str(tokenizer.decode())
    encoder.no_padding()
    rows = [exact(torch.tensor([encoding.ids]))[0] for encoding in encoder.encode_batch(list(phrases))]
    return torch.stack(rows).float().numpy()
