"""Train the mask head of the built-in model on photographs with outlined things. The things' names are not used.

    python -m calmclip.export.masks --data DIR [--out FILE] [--half 0 | 1] [--epochs N] [--seed N]

DIR holds `instances.json` in COCO's form, with polygons, and `images`. NanoDet is frozen, so each picture is seen once;
then an epoch over 160 photographs takes some seconds on a core. A box trains as it is drawn, a little moved and
stretched (`JITTER`), because proposals are. `--half` leaves every second photograph out, on which the head can be
measured.

Source: He et al. 2017 (arXiv 1703.06870), section 3, Mask R-CNN: a binary loss for each sample of a box; Milletari et
al. 2016 (arXiv 1606.04797), section 3, V-Net: the Dice term, here with half the weight.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export import parity
from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED
from calmclip.export.nets.mini.facts import MARGIN, REGION_PIXELS, SAMPLES, SIDE
from calmclip.export.nets.mini.masks import MaskHead
from calmclip.export.nets.mini.modules import load
from calmclip.export.nets.mini.nanodet import NanoDet
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.image import ImagePreparer, decode
from calmclip.models.preprocess.placement import Frame

EPOCHS, BATCH, RATE, DECAY = 12, 4, 2e-3, 0.05  # BATCH: photographs of a step
JITTER = 0.08  # deviation of a box's sides, in parts of its width and height
LEAST = 3.0  # pixels of the input: a thing that is smaller does not train
MOST = 16  # things of a photograph in a step, drawn by lot
FINE = 2  # a thing is drawn with FINE x FINE pixels for one of the input
PER_SAMPLE = 3  # pixels read in each direction of a sample


@dataclass(frozen=True)
class Outlined:
    """A photograph: NanoDet's ``maps`` (float16, `MaskFeatures.forward`'s arguments without the batch), ``boxes``
    float32 [N, 4] in pixels of the input, ``shapes`` uint8 [N, 416, 416]: 0 to 255, the part of a pixel that shows the
    thing."""

    maps: tuple[Tensor, ...]
    boxes: Tensor
    shapes: Tensor


@dataclass(frozen=True)
class Photograph:
    """``things``: for each its polygons, [x0, y0, x1, y1, ...] in pixels of the picture."""

    file: Path
    things: tuple[list[list[float]], ...]


def read(folder: Path) -> list[Photograph]:
    """The photographs of ``folder``; crowds and things without polygons are left out. Raises `BadRequest`."""
    file = folder / "instances.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        things: dict[int, list[list[list[float]]]] = {image["id"]: [] for image in data["images"]}
        for row in data["annotations"]:
            if isinstance(row["segmentation"], list) and not row.get("iscrowd"):
                things[row["image_id"]].append(row["segmentation"])
        rows = [Photograph(folder / "images" / i["file_name"], tuple(things[i["id"]])) for i in data["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequest(
            f"{file} cannot be read ({type(error).__name__}: {error}); expected COCO's `images` and `annotations` with "
            "`segmentation`"
        ) from None
    if not any(row.things for row in rows):
        raise BadRequest(f"{file} outlines no thing; expected polygons under `segmentation`")
    return rows


@torch.inference_mode()
def see(boxes: NanoDet, photographs: Sequence[Photograph]) -> list[Outlined]:
    """Those with a thing of at least `LEAST` pixels. Raises `InputError` with the file that is no picture."""
    preparer, seen = ImagePreparer(REGION_PIXELS), []
    for photograph in tqdm(photographs, "photographs", unit=""):
        pixels, frame = preparer.prepare(decode(photograph.file.read_bytes()))
        shapes = [drawn(thing, frame) for thing in photograph.things]
        places = [around(thing, frame) for thing in photograph.things]
        large = [i for i, box in enumerate(places) if min(box[2] - box[0], box[3] - box[1]) >= LEAST]
        if large:
            maps = boxes(torch.from_numpy(pixels))[-3:]
            inside = torch.stack([shapes[i] for i in large]), torch.stack([places[i] for i in large])
            seen.append(Outlined(tuple(each[0].half() for each in maps), inside[1], inside[0]))
    return seen


def drawn(polygons: list[list[float]], frame: Frame) -> Tensor:
    """-> uint8 [416, 416]: the thing in the graph's input."""
    picture = Image.new("L", (SIDE * FINE, SIDE * FINE))
    draw = ImageDraw.Draw(picture)
    for polygon in polygons:
        points = (_points(polygon) * frame.scale + frame.offset) * FINE - 0.5
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    return torch.from_numpy(np.array(picture.reduce(FINE)))


def around(polygons: list[list[float]], frame: Frame) -> Tensor:
    """-> float32 [4]: the box of the thing in the graph's input."""
    points = np.concatenate([_points(polygon) for polygon in polygons])
    box = np.concatenate((points.min(axis=0), points.max(axis=0)))
    return torch.from_numpy(frame.to_input(box[None].astype(np.float32))[0])


def _points(polygon: list[float]) -> np.ndarray:
    return np.array(polygon, np.float64).reshape(-1, 2)


def targets(shapes: Tensor, boxes: Tensor) -> Tensor:
    """shapes uint8 [N, 416, 416], boxes [N, 4] -> float32 [N, S, S]: the part of each sample of the enlarged box that
    shows the thing, by `PER_SAMPLE` x `PER_SAMPLE` pixels."""
    count = SAMPLES * PER_SAMPLE
    parts = (torch.arange(count) + 0.5) / count * (1 + 2 * MARGIN) - MARGIN
    low, size = boxes[:, :2, None], (boxes[:, 2:] - boxes[:, :2])[..., None]
    x, y = (2 * (low + parts * size) / SIDE - 1).unbind(1)
    places = torch.stack((x[:, None].expand(-1, count, -1), y[:, :, None].expand(-1, -1, count)), -1)
    read_out = F.grid_sample(shapes.float().unsqueeze(1) / 255, places, align_corners=False)
    return F.avg_pool2d(read_out, PER_SAMPLE).squeeze(1)


def moved(boxes: Tensor) -> Tensor:
    """Boxes with jittered sides, in the input; a box that becomes too small stays as it is."""
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    jittered = (boxes + JITTER * size * torch.randn(boxes.shape)).clamp(0.0, float(SIDE))
    small = (jittered[:, 2:] - jittered[:, :2] < LEAST).any(1)
    return torch.where(small[:, None], boxes, jittered)


def loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """[N, S, S] both -> binary cross-entropy + half of 1 - Dice, means over the boxes."""
    chances = logits.sigmoid()
    shared = (chances * wanted).sum((1, 2))
    dice = (2 * shared + 1) / (chances.square().sum((1, 2)) + wanted.square().sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, wanted) + 0.5 * (1 - dice).mean()


def train(seen: Sequence[Outlined], *, epochs: int = EPOCHS, seed: int = 0) -> MaskHead:
    """-> a new head."""
    torch.manual_seed(seed)
    head = MaskHead()
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=DECAY)
    steps = epochs * -(-len(seen) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    with tqdm(total=steps, desc="mask head", leave=False) as bar:
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(seen)), BATCH):
                pairs = [_answer(head, seen[i]) for i in chosen.tolist()]
                logits, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
                error = loss(logits, wanted)
                optimizer.zero_grad()
                torch.autograd.backward(error)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{error.item():.3f}")
                bar.update()
    return head.eval().requires_grad_(False)


def _answer(head: MaskHead, photograph: Outlined) -> tuple[Tensor, Tensor]:
    """Logits and targets of at most `MOST` jittered boxes, [n, S, S] both."""
    drawn_by_lot = torch.randperm(len(photograph.boxes))[:MOST]
    boxes = moved(photograph.boxes[drawn_by_lot])
    features = head.features(*(each.float().unsqueeze(0) for each in photograph.maps))
    return head.masks(features, boxes.unsqueeze(0))[0], targets(photograph.shapes[drawn_by_lot], boxes)


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("python -m calmclip.export.masks", description=str(__doc__).splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="folder with instances.json and images/")
    options.add_argument("--out", type=Path, default=MASKS, help="safetensors file to write (default: that ships)")
    options.add_argument(
        "--half", type=int, choices=(0, 1), help="leave out the photographs of these even or odd places"
    )
    options.add_argument("--epochs", type=int, default=EPOCHS)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args(argv)
    photographs = read(arguments.data)
    used = [row for place, row in enumerate(photographs) if place % 2 != arguments.half]
    if not MASKS.is_file():
        MaskHead().save(MASKS, {})
    with parity.one_thread():
        seen = see(load(SHIPPED, DETECTOR, MASKS).regions.boxes, used)
        head = train(seen, epochs=arguments.epochs, seed=arguments.seed)
    things = sum(len(each.boxes) for each in seen)
    trained = f"{things} things of {len(seen)} photographs, {arguments.epochs} epochs, seed {arguments.seed}"
    head.save(arguments.out, {"trained_on": trained})
    print(f"{arguments.out}: {trained}")


if __name__ == "__main__":
    main()
