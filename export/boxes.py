"""Train the box head on photographs with boxes.

`python -m calmclip.export.boxes --images DIR --instances FILE --out FILE`

``instances`` is in COCO form; only its boxes are used. The backbone is frozen, so it runs once for each *view* of a
photograph: as served, mirrored, or scaled, shifted, recoloured and beside other photographs. The head trains on the
views' maps. 128 photographs take about ten minutes of backbone and three of training on one idle core.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, convert_conv2d_weight_memory_format
from tqdm import tqdm

from calmclip.export.nets.mini.backbone import Backbone, frozen
from calmclip.export.nets.mini.boxhead import STRIDE, BoxHead, centres
from calmclip.export.nets.mini.weights import backbone_state
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array

SIZE = 640
PAD = 127  # grey, which the backbone reads as 0
VISIBLE = 0.4  # a crop drops a box if less than this part of its area is visible,
SHORTEST = 6.0  # or if a side is shorter, in pixels
PARTS = 4  # photograph i is in part i % PARTS; different parts share no canvas, so a fold can leave a part out
EPOCHS = 4  # over all views
CANDIDATES = 10  # the largest number of cells for a true box


@dataclass(frozen=True)
class Photo:
    """``boxes`` float64 [n, 4] x0 y0 x1 y1 in pixels of the upright picture."""

    path: Path
    boxes: Array


@dataclass(frozen=True)
class Views:
    """The backbone's maps of N canvases. ``map32`` holds round(255 / 6 * x) of a map x between 0 and 6."""

    map16: Tensor  # float16 [N, 120, 40, 40]
    map32: Tensor  # uint8 [N, 1280, 20, 20]
    boxes: list[Tensor]  # float32 [n, 4] in pixels of each canvas

    @staticmethod
    def join(parts: Sequence["Views"]) -> "Views":
        return Views(
            torch.cat([part.map16 for part in parts]),
            torch.cat([part.map32 for part in parts]),
            [boxes for part in parts for boxes in part.boxes],
        )


def read_photos(instances: Path, images: Path) -> list[Photo]:
    """Raises `ExportError` if the file is not in COCO's instances form, or if a picture is missing."""
    try:
        data = json.loads(instances.read_text(encoding="utf-8"))
        boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in data["images"]}
        for annotation in data["annotations"]:
            if not annotation.get("iscrowd"):
                x, y, w, h = annotation["bbox"]
                boxes[annotation["image_id"]].append([x, y, x + w, y + h])
        photos = [Photo(images / i["file_name"], np.array(boxes[i["id"]]).reshape(-1, 4)) for i in data["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{instances} is not in COCO's instances form ({error!r}); see cocodataset.org") from None
    if missing := [photo.path for photo in photos if not photo.path.is_file()]:
        raise ExportError(
            f"{instances} names {missing[0].name}, which is not in {images}; --images is the pictures' folder"
        )
    return photos


def place(
    canvas: Image.Image, photo: Photo, area: tuple[int, int, int, int], *, scale: float, at: Array, mirror: bool
) -> Array:
    """Draw ``photo`` into ``area`` (x0, y0, x1, y1) of ``canvas``; -> its boxes on the canvas, cut to the area.

    ``scale`` 1 fits the picture into the area. ``at`` [2] in [0, 1]: the visible part of a picture that is larger than
    the area, or the position of a smaller picture.
    """
    x0, y0, x1, y1 = area
    size = np.array([x1 - x0, y1 - y0])
    with Image.open(photo.path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    original = np.array(image.size)
    scaled = np.maximum(1, np.rint(original * min(size / original) * scale)).astype(int)
    boxes = photo.boxes * np.tile(scaled / original, 2)
    if mirror:
        image = ImageOps.mirror(image)
        boxes = np.stack((scaled[0] - boxes[:, 2], boxes[:, 1], scaled[0] - boxes[:, 0], boxes[:, 3]), axis=1)
    offset = np.rint((size - scaled) * at).astype(int)
    patch = Image.new("RGB", tuple(size), (PAD,) * 3)
    patch.paste(image.resize(tuple(scaled), Image.Resampling.BICUBIC), tuple(offset))
    canvas.paste(patch, (x0, y0))
    boxes = boxes + np.tile(offset, 2)
    cut = np.clip(boxes, 0, np.tile(size, 2))
    sizes, visible = boxes[:, 2:] - boxes[:, :2], cut[:, 2:] - cut[:, :2]
    kept = (visible.prod(axis=1) >= VISIBLE * sizes.prod(axis=1)) & (visible.min(axis=1, initial=SIZE) >= SHORTEST)
    return np.asarray(cut[kept] + [x0, y0, x0, y0])


def draw(photos: Sequence[Photo], index: int, view: int, rng: Generator) -> tuple[Image.Image, Array]:
    """The canvas of one view of photo ``index``, and the boxes on it. View 0 is as served, view 1 is mirrored."""
    canvas, area = Image.new("RGB", (SIZE, SIZE), (PAD,) * 3), (0, 0, SIZE, SIZE)
    if view < 2:
        return canvas, place(canvas, photos[index], area, scale=1.0, at=np.zeros(2), mirror=view == 1)
    if rng.random() < 0.7:
        scale = float(np.exp(rng.uniform(np.log(0.5), np.log(1.8))))
        boxes = place(canvas, photos[index], area, scale=scale, at=rng.random(2), mirror=rng.random() < 0.5)
    else:  # four photographs on one canvas: small objects, many scenes (Bochkovskiy et al. 2020, arXiv 2004.10934)
        x, y = (int(v) for v in rng.integers(SIZE // 3, 2 * SIZE // 3, 2))
        areas = ((0, 0, x, y), (x, 0, SIZE, y), (0, y, x, SIZE), (x, y, SIZE, SIZE))
        chosen = [index, *rng.integers(len(photos), size=3)]
        scales = np.exp(rng.uniform(np.log(0.8), np.log(1.8), 4))
        parts = [
            place(canvas, photos[i], area, scale=float(scale), at=rng.random(2), mirror=rng.random() < 0.5)
            for i, area, scale in zip(chosen, areas, scales, strict=True)
        ]
        boxes = np.concatenate(parts)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        canvas = enhance(canvas).enhance(float(rng.uniform(0.7, 1.3)))
    return canvas, boxes


@torch.inference_mode()
def see(backbone: Backbone, photos: Sequence[Photo], views: int, seed: int) -> Views:
    """The maps of ``views`` views of each photo. A canvas holds photos of ``photos`` only."""
    rng = np.random.default_rng(seed)
    convert_conv2d_weight_memory_format(backbone, torch.channels_last)
    maps16, maps32, boxes = [], [], []
    for index in tqdm(range(len(photos)), desc="views"):
        for view in range(views):
            canvas, true = draw(photos, index, view, rng)
            map16, map32 = backbone(pixels(canvas).to(memory_format=torch.channels_last))
            maps16.append(map16.half().contiguous())
            maps32.append((map32 * (255 / 6)).round().to(torch.uint8).contiguous())
            boxes.append(torch.from_numpy(true.astype(np.float32)))
    return Views(torch.cat(maps16), torch.cat(maps32), boxes)


def pixels(canvas: Image.Image) -> Tensor:
    """RGB -> float32 [1, 3, H, W], (x - 127) / 128."""
    return (torch.from_numpy(np.asarray(canvas).transpose(2, 0, 1).astype(np.float32)) - 127)[None] / 128


def pairs(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019, arXiv 1902.09630) of boxes [..., 4] that broadcast."""
    low, high = torch.maximum(boxes[..., :2], true[..., :2]), torch.minimum(boxes[..., 2:], true[..., 2:])
    shared = (high - low).clamp(min=0.0).prod(-1)
    hull = torch.maximum(boxes[..., 2:], true[..., 2:]) - torch.minimum(boxes[..., :2], true[..., :2])
    hull_area = hull.prod(-1).clamp(min=1e-9)
    union = (_area(boxes) + _area(true) - shared).clamp(min=1e-9)
    return shared / union, shared / union - (hull_area - union) / hull_area


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def central(true: Tensor, centre: Tensor, part: float) -> Tensor:
    """true [G, 4], centre [N, 2] -> bool [N, G]: is the cell in the central ``part`` of the box? That part measures at
    least two cells, but no more than the box."""
    middle, half = (true[:, :2] + true[:, 2:]) / 2, (true[:, 2:] - true[:, :2]) / 2
    away = (centre[:, None] - middle).abs()
    return ((away < half) & (away <= torch.maximum(half * part, half.clamp(max=float(STRIDE))))).all(-1)


def by_size(true: Tensor, centre: Tensor) -> Tensor:
    """-> [N]: the smallest box whose central half holds the cell, or -1. The assignment at the start of training."""
    area = _area(true).expand(len(centre), -1).masked_fill(~central(true, centre, 0.5), torch.inf)
    smallest, index = area.min(1)
    return index.masked_fill(smallest.isinf(), -1)


def by_quality(true: Tensor, centre: Tensor, boxes: Tensor, objectness: Tensor) -> Tensor:
    """-> [N]: the true box of each cell, or -1. A true box takes the cells that predict it best, as many as the sum of
    its best IoUs.

    boxes [N, 4], objectness [N] in [0, 1]: the head's predictions. After Ge et al. 2021 (OTA, arXiv 2103.14259) in the
    short form of YOLOX (arXiv 2107.08430), with the quality of Feng et al. 2021 (TOOD, arXiv 2108.07755).
    """
    inside = central(true, centre, 0.7)
    overlap = pairs(boxes[:, None], true)[0].masked_fill(~inside, 0.0)
    quality = (objectness.clamp(min=1e-4).sqrt()[:, None] * overlap**3).masked_fill(~inside, -1.0)
    best, order = quality.topk(CANDIDATES, dim=0)
    count = overlap.topk(CANDIDATES, dim=0).values.sum(0).clamp(min=1.0).int()
    taken = (torch.arange(CANDIDATES)[:, None] < count) & (best >= 0)
    claims = torch.full_like(quality, -1.0).scatter(0, order, torch.where(taken, best, -1.0))
    strongest, index = claims.max(1)
    return index.masked_fill(strongest < 0, -1)


def loss(logits: Tensor, boxes: Tensor, true: Sequence[Tensor], centre: Tensor, started: bool) -> Tensor:
    """logits [B, N], boxes [B, N, 4], true boxes of each picture. ``started``: assign by quality instead of by size.

    The target of objectness is the IoU of its box (quality focal loss: Li et al. 2020, arXiv 2006.04388). The loss of
    boxes is 1 - GIoU; a true box with n cells weighs sqrt(n).
    """
    target = torch.zeros_like(logits)
    misses, weights = [boxes.new_zeros(1)], [boxes.new_full((1,), 1e-6)]
    for row, gold in enumerate(true):
        if not len(gold):
            continue
        if started:
            assigned = by_quality(gold, centre, boxes[row].detach(), logits[row].detach().sigmoid())
        else:
            assigned = by_size(gold, centre)
        cells = (assigned >= 0).nonzero()[:, 0]
        assigned = assigned[cells]
        overlap, generalised = pairs(boxes[row, cells], gold[assigned])
        target[row, cells] = overlap.detach()
        weight = torch.bincount(assigned, minlength=len(gold))[assigned].rsqrt()
        misses.append((1 - generalised) * weight)
        weights.append(weight)
    focus = (target - logits.sigmoid()).square()
    objectness = (focus * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()
    return objectness / target.sum().clamp(min=1.0) + 2 * torch.cat(misses).sum() / torch.cat(weights).sum()


def train(views: Views, epochs: int, seed: int, *, batch: int = 8, rate: float = 2e-3) -> BoxHead:
    torch.manual_seed(seed)
    head = convert_conv2d_weight_memory_format(BoxHead(), torch.channels_last).train()
    steps = epochs * (len(views.boxes) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    centre = centres(SIZE // STRIDE, SIZE // STRIDE)
    order = torch.cat([torch.randperm(len(views.boxes))[: steps // epochs * batch] for _ in range(epochs)])
    for step, rows in enumerate(bar := tqdm(torch.split(order, batch), desc="box head", leave=False)):
        map16, map32 = views.map16[rows].float(), views.map32[rows].float() * (6 / 255)
        maps = (F.dropout2d(m, 0.1).contiguous(memory_format=torch.channels_last) for m in (map16, map32))
        logits, boxes = head(*maps)
        error = loss(logits, boxes, [views.boxes[i] for i in rows], centre, started=step > 0.15 * steps)
        optimizer.zero_grad()
        torch.autograd.backward(error)
        clip_grad_norm_(head.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{error.item():.3f}")
    return convert_conv2d_weight_memory_format(head, torch.contiguous_format).eval()


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("python -m calmclip.export.boxes", description=__doc__.splitlines()[0])
    options.add_argument("--images", type=Path, required=True, help="folder of the photographs")
    options.add_argument("--instances", type=Path, required=True, help="boxes of the photographs: COCO instances JSON")
    options.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    options.add_argument("--views", type=int, default=20, help="views of each photograph (default %(default)s)")
    options.add_argument("--epochs", type=int, default=EPOCHS, help="epochs over all views (default %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=0, help="threads of torch; 0: one per core")
    args = options.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    photos = read_photos(args.instances, args.images)
    backbone = frozen(backbone_state())
    parts = [see(backbone, photos[part::PARTS], args.views, args.seed + part) for part in range(PARTS)]
    views = Views.join(parts)
    head = train(views, args.epochs, args.seed)
    count = sum(len(photo.boxes) for photo in photos)
    about = f"{len(photos)} photographs, {count} boxes; {args.views} views, {args.epochs} epochs, seed {args.seed}"
    save(head, args.out, about)
    print(f"{args.out}: {about}")


def save(head: BoxHead, file: Path, about: str) -> None:
    """float16, except BatchNorm's integer counters. ``about``: the training data, stored in the file's metadata."""
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in head.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt", "trained_on": about})


if __name__ == "__main__":
    main()
