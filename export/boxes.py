"""Train the box head on photographs with boxes.

`python -m calmclip.export.boxes --images DIR --instances FILE --out FILE`


``instances`` is in COCO form; names are not used, only boxes. The backbone is frozen, so each photograph is seen
through it once per *view* (as served, mirrored, or scaled, shifted, recoloured and set beside others), and the head
trains on the views' maps: about ten minutes of backbone and three of training on one quiet core for 128 photographs.
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
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export.nets.mini.backbone import Backbone, frozen
from calmclip.export.nets.mini.boxhead import STRIDE, BoxHead, centres
from calmclip.export.nets.mini.weights import backbone_state
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array

SIZE = 640
PAD = 127  # grey: what the backbone reads as 0
VISIBLE = 0.4  # a box of which less than this part is left by a crop is no longer taught
SHORTEST = 6.0  # nor one with a side of fewer pixels
PARTS = 4  # of the photographs, which never meet on one canvas
EPOCHS = 4  # over all views
CANDIDATES = 10  # cells that a true box may take


@dataclass(frozen=True)
class Photo:
    """``boxes`` float64 [n, 4] x0 y0 x1 y1 in pixels of the upright picture."""

    path: Path
    boxes: Array


@dataclass(frozen=True)
class Views:
    """What the backbone made of N canvases. ``map32`` holds round(255 / 6 * x) of a map between 0 and 6."""

    map16: Tensor  # float16 [N, 120, 40, 40]
    map32: Tensor  # uint8 [N, 1280, 20, 20]
    boxes: list[Tensor]  # N times float32 [n, 4] on the canvas

    @staticmethod
    def join(parts: Sequence["Views"]) -> "Views":
        return Views(
            torch.cat([part.map16 for part in parts]),
            torch.cat([part.map32 for part in parts]),
            [boxes for part in parts for boxes in part.boxes],
        )


def read_photos(instances: Path, images: Path) -> list[Photo]:
    """Raises `ExportError` for a file that is not COCO instances, or names a picture that is not there."""
    try:
        data = json.loads(instances.read_text(encoding="utf-8"))
        boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in data["images"]}
        for one in data["annotations"]:
            if not one.get("iscrowd"):
                x, y, w, h = one["bbox"]
                boxes[one["image_id"]].append([x, y, x + w, y + h])
        photos = [Photo(images / i["file_name"], np.array(boxes[i["id"]]).reshape(-1, 4)) for i in data["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{instances} is not in COCO's instances form ({error!r}); see cocodataset.org") from None
    if missing := [photo.path for photo in photos if not photo.path.is_file()]:
        raise ExportError(f"{instances} names {missing[0].name}, which is not in {images}")
    return photos


def place(
    canvas: Image.Image, photo: Photo, area: tuple[int, int, int, int], *, scale: float, at: Array, mirror: bool
) -> Array:
    """Draw ``photo`` into ``area`` of ``canvas`` and return its boxes there, cut to it.

    ``scale`` 1 fits the area; ``at`` [2] in [0, 1] says which part of a larger picture shows, or where a smaller lies.
    """
    x0, y0, x1, y1 = area
    size = np.array([x1 - x0, y1 - y0])
    with Image.open(photo.path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    original = np.array(image.size)
    wide = np.maximum(1, np.rint(original * min(size / original) * scale)).astype(int)
    boxes = photo.boxes * np.tile(wide / original, 2)
    if mirror:
        image = ImageOps.mirror(image)
        boxes = np.stack((wide[0] - boxes[:, 2], boxes[:, 1], wide[0] - boxes[:, 0], boxes[:, 3]), axis=1)
    offset = np.rint((size - wide) * at).astype(int)
    patch = Image.new("RGB", tuple(size), (PAD,) * 3)
    patch.paste(image.resize(tuple(wide), Image.Resampling.BICUBIC), tuple(offset))
    canvas.paste(patch, (x0, y0))
    whole = boxes + np.tile(offset, 2)
    cut = np.clip(whole, 0, np.tile(size, 2))
    sizes, visible = whole[:, 2:] - whole[:, :2], cut[:, 2:] - cut[:, :2]
    seen = (visible.prod(axis=1) >= VISIBLE * sizes.prod(axis=1)) & (visible.min(axis=1, initial=SIZE) >= SHORTEST)
    return cut[seen] + [x0, y0, x0, y0]


def draw(photos: Sequence[Photo], index: int, view: int, rng: Generator) -> tuple[Image.Image, Array]:
    """The canvas of one view of photo ``index`` and the boxes on it. Views 0 and 1: as served, and mirrored."""
    canvas = Image.new("RGB", (SIZE, SIZE), (PAD,) * 3)
    corner = np.zeros(2)
    if view < 2:
        return canvas, place(canvas, photos[index], (0, 0, SIZE, SIZE), scale=1.0, at=corner, mirror=view == 1)
    if rng.random() < 0.7:
        scale = float(np.exp(rng.uniform(np.log(0.5), np.log(1.8))))
        boxes = place(
            canvas, photos[index], (0, 0, SIZE, SIZE), scale=scale, at=rng.random(2), mirror=rng.random() < 0.5
        )
    else:  # four photographs in one: small objects, many scenes (Bochkovskiy et al. 2020, arXiv 2004.10934)
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
def see(backbone: Backbone, photos: Sequence[Photo], views: int, seed: int, shown: bool = True) -> Views:
    """``views`` views of each photo through the backbone; pictures are mixed only among ``photos``."""
    rng = np.random.default_rng(seed)
    backbone = backbone.to(memory_format=torch.channels_last)
    maps16, maps32, boxes = [], [], []
    for index in tqdm(range(len(photos)), desc="views", disable=not shown):
        for view in range(views):
            canvas, found = draw(photos, index, view, rng)
            map16, map32 = backbone(pixels(canvas).to(memory_format=torch.channels_last))
            maps16.append(map16.half().contiguous())
            maps32.append((map32 * (255 / 6)).round().to(torch.uint8).contiguous())
            boxes.append(torch.from_numpy(found.astype(np.float32)))
    return Views(torch.cat(maps16), torch.cat(maps32), boxes)


def see_in_parts(backbone: Backbone, photos: Sequence[Photo], views: int, seed: int, parts: int = PARTS) -> list[Views]:
    """Photo i goes to part i % ``parts``, and only photos of one part share a canvas: parts can be left out."""
    return [see(backbone, photos[part::parts], views, seed + part) for part in range(parts)]


def pixels(canvas: Image.Image) -> Tensor:
    """RGB -> float32 [1, 3, H, W], (x - 127) / 128."""
    return (torch.from_numpy(np.asarray(canvas).transpose(2, 0, 1).astype(np.float32)) - 127)[None] / 128


def pairs(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019, arXiv 1902.09630) of boxes that broadcast to one another."""
    low, high = torch.maximum(boxes[..., :2], true[..., :2]), torch.minimum(boxes[..., 2:], true[..., 2:])
    shared = (high - low).clamp(min=0.0).prod(-1)
    hull = torch.maximum(boxes[..., 2:], true[..., 2:]) - torch.minimum(boxes[..., :2], true[..., :2])
    whole = hull.prod(-1).clamp(min=1e-9)
    union = (_area(boxes) + _area(true) - shared).clamp(min=1e-9)
    return shared / union, shared / union - (whole - union) / whole


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def central(true: Tensor, centre: Tensor, part: float) -> Tensor:
    """true [G, 4], centre [N, 2] -> bool [N, G]: is the cell in the middle ``part`` of the box, or near it if small?"""
    middle, half = (true[:, :2] + true[:, 2:]) / 2, (true[:, 2:] - true[:, :2]) / 2
    away = (centre[:, None] - middle).abs()
    return ((away < half) & (away <= torch.maximum(half * part, half.clamp(max=float(STRIDE))))).all(-1)


def by_size(true: Tensor, centre: Tensor) -> Tensor:
    """-> [N]: the smallest box whose middle half holds the cell, -1 for none. How training starts."""
    area = _area(true).expand(len(centre), -1).masked_fill(~central(true, centre, 0.5), torch.inf)
    smallest, which = area.min(1)
    return which.masked_fill(smallest.isinf(), -1)


def by_quality(true: Tensor, centre: Tensor, boxes: Tensor, objectness: Tensor) -> Tensor:
    """-> [N]: each true box gets the cells that already say it best, about as many as fit it well; -1 for the rest.

    boxes [N, 4], objectness [N] in [0, 1]: what the head says now. After Ge et al. 2021 (OTA, arXiv 2103.14259) in
    the short form of YOLOX (arXiv 2107.08430), with the quality of Feng et al. 2021 (TOOD, arXiv 2108.07755).
    """
    inside = central(true, centre, 0.7)
    overlap = pairs(boxes[:, None], true)[0].masked_fill(~inside, 0.0)
    quality = (objectness.clamp(min=1e-4).sqrt()[:, None] * overlap**3).masked_fill(~inside, -1.0)
    best, order = quality.topk(CANDIDATES, dim=0)
    count = overlap.topk(CANDIDATES, dim=0).values.sum(0).clamp(min=1.0).int()
    taken = (torch.arange(CANDIDATES)[:, None] < count) & (best >= 0)
    claims = torch.full_like(quality, -1.0).scatter(0, order, torch.where(taken, best, -1.0))
    strongest, which = claims.max(1)
    return which.masked_fill(strongest < 0, -1)


def loss(logits: Tensor, boxes: Tensor, true: Sequence[Tensor], centre: Tensor, started: bool) -> Tensor:
    """logits [B, N], boxes [B, N, 4], true boxes of each picture.

    Objectness learns the IoU of its own box (quality focal loss: Li et al. 2020, arXiv 2006.04388); boxes learn
    1 - GIoU, a true box with many cells counting only as their root.
    """
    target = torch.zeros_like(logits)
    misses, weights = [boxes.new_zeros(1)], [boxes.new_full((1,), 1e-6)]
    for row, gold in enumerate(true):
        if not len(gold):
            continue
        if started:
            which = by_quality(gold, centre, boxes[row].detach(), logits[row].detach().sigmoid())
        else:
            which = by_size(gold, centre)
        cells = (which >= 0).nonzero()[:, 0]
        overlap, generalised = pairs(boxes[row, cells], gold[which[cells]])
        target[row, cells] = overlap.detach()
        share = torch.bincount(which[cells], minlength=len(gold))[which[cells]].rsqrt()
        misses.append((1 - generalised) * share)
        weights.append(share)
    focus = (target - logits.sigmoid()).square()
    objectness = (focus * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()
    return objectness / target.sum().clamp(min=1.0) + 2 * torch.cat(misses).sum() / torch.cat(weights).sum()


def train(views: Views, epochs: int, seed: int, *, batch: int = 8, rate: float = 2e-3) -> BoxHead:
    torch.manual_seed(seed)
    head = BoxHead().to(memory_format=torch.channels_last).train()
    steps = epochs * (len(views.boxes) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    centre = centres(SIZE // STRIDE, SIZE // STRIDE)
    order = torch.cat([torch.randperm(len(views.boxes))[: steps // epochs * batch] for _ in range(epochs)])
    for step, rows in enumerate(bar := tqdm(order.split(batch), desc="box head", leave=False)):
        map16, map32 = views.map16[rows].float(), views.map32[rows].float() * (6 / 255)
        maps = (F.dropout2d(m, 0.1).contiguous(memory_format=torch.channels_last) for m in (map16, map32))
        error = loss(*head(*maps), [views.boxes[i] for i in rows], centre, started=step > 0.15 * steps)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{error.item():.3f}")
    return head.to(memory_format=torch.contiguous_format).eval()


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("python -m calmclip.export.boxes", description=__doc__.splitlines()[0])
    options.add_argument("--images", type=Path, required=True, help="folder of the photographs")
    options.add_argument("--instances", type=Path, required=True, help="their boxes: COCO instances JSON")
    options.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    options.add_argument("--views", type=int, default=20, help="of each photograph (default %(default)s)")
    options.add_argument("--epochs", type=int, default=EPOCHS, help="over all views (default %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as there are cores")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    photos = read_photos(given.instances, given.images)
    views = Views.join(see_in_parts(frozen(backbone_state()), photos, given.views, given.seed))
    head = train(views, given.epochs, given.seed)
    count = sum(len(photo.boxes) for photo in photos)
    about = f"{len(photos)} photographs, {count} boxes; {given.views} views, {given.epochs} epochs, seed {given.seed}"
    save(head, given.out, about)
    print(f"{given.out}: {about}")


def save(head: BoxHead, file: Path, about: str) -> None:
    """float16, but for what BatchNorm counts in whole numbers. ``about``: what it was trained on, kept in the file."""
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in head.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt", "trained_on": about})


if __name__ == "__main__":
    main()
