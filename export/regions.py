"""Train the built-in detector: the region head on photographs, the box quality on photographs with boxes.

    python -m calmclip.export.regions --pictures DIR [DIR …] [--boxes DIR] [--out FILE] [--start] [--nanodet FILE]

The teacher of a region's vector is the image tower, which sees the region alone: a crop with a tenth of its sides
around it. The two towers and NanoDet are frozen, so each picture is seen once, and `--cache` keeps what was
seen. `box_quality` has the other training.

Source: Gu et al. 2021 (arXiv 2104.13921), ViLD: region vectors distilled from an image tower's vectors of crops. The
second term compares both vectors' chances among names (Hinton et al. 2015, arXiv 1503.02531).
"""

import argparse
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from calmclip.export import box_quality, parity
from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED, regions
from calmclip.export.nets.mini import load as load_net
from calmclip.export.nets.mini.facts import PIXELS, REGION_PIXELS, WIDTH
from calmclip.export.nets.mini.modules import load
from calmclip.export.nets.mini.nanodet import NanoDet, normalized
from calmclip.export.nets.mini.parameters import read
from calmclip.export.nets.mini.quality import Quality
from calmclip.export.nets.mini.regions import Detector, RegionHead, Regions, average
from calmclip.export.nets.mini.towers import Heads
from calmclip.models.errors import BadRequest, WeightsMissing
from calmclip.models.evals import NoParams, detection
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import SUFFIXES, ImagePreparer, decode

LEAST, MOST = 0.15, 10  # the proposals of a picture that train: their objectness, and how many
AROUND = 0.1  # of a box's sides, on each side of a crop
SCALE = 20.0  # of the cosines with names in the second term
CHUNK = 50  # pictures of a file of the cache
EPOCHS, BATCH, RATE, DECAY, DROPOUT = 10, 256, 1e-3, 0.05, 0.1


@dataclass(frozen=True)
class Seen:
    """N regions: ``vectors`` [N, 384] of the image head, ``features`` [N, 896] of NanoDet, ``crops`` [N, 384]: the
    teacher's unit vectors. All float32."""

    vectors: Tensor
    features: Tensor
    crops: Tensor


def see(module: Regions, teacher: parity.Run, paths: Sequence[Path], cache: Path | None = None) -> Seen:
    """The proposals of each picture, and the crops of their boxes. Raises `InputError` with the file that is no
    picture, and `BadRequest` if nothing was proposed.

    A picture takes about 70 ms and each of its crops 10 ms, on one core. ``cache``: a folder, which a second run reads,
    and a run that was stopped goes on from; a file holds `CHUNK` pictures, and its name depends on them and on the
    frozen weights.
    """
    chunks, parts = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)], []
    weights = _weights(module) if cache else ""
    with tqdm(total=len(paths), desc="pictures", unit="") as bar:
        for chunk in chunks:
            file = cache / f"regions-{_digest(weights, chunk)}.npz" if cache else None
            part = _cached(file) if file and file.is_file() else _see(module, teacher, chunk)
            if file and not file.is_file():
                _write(part, file)
            parts.append(part)
            bar.update(len(chunk))
    seen = Seen(*(torch.cat([getattr(part, name) for part in parts]) for name in Seen.__annotations__))
    if not len(seen.crops):
        raise BadRequest(f"no region was proposed in {len(paths)} pictures; expected photographs of things")
    return seen


@torch.inference_mode()
def _see(module: Regions, teacher: parity.Run, paths: Sequence[Path]) -> Seen:
    preparer = ImagePreparer(REGION_PIXELS)
    parts = [(torch.zeros(0, WIDTH), torch.zeros(0, regions.FEATURES - WIDTH), torch.zeros(0, WIDTH))]
    for path in paths:
        picture = decode(path.read_bytes())
        array, frame = preparer.prepare(picture)
        pixels = torch.from_numpy(array)
        _, boxes, objectness, features = module.propose(pixels)
        count = min(MOST, int((objectness[0] >= LEAST).sum()))
        if not count:
            continue
        boxes, features = boxes[:, :count], features[:, :count]
        map32 = module.backbone(F.avg_pool2d(pixels, regions.HALF))[1]
        vectors = module.image(average(map32, boxes, regions.HALF * 32))
        parts.append((vectors[0], features[0], crop_vectors(teacher, picture, frame.to_original(boxes[0].numpy()))))
    return Seen(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _cached(file: Path) -> Seen:
    with np.load(file) as arrays:
        return Seen(*(torch.from_numpy(arrays[name].astype(np.float32)) for name in Seen.__annotations__))


def _write(seen: Seen, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part.npz")
    np.savez(part, **{name: getattr(seen, name).half().numpy() for name in Seen.__annotations__})
    part.replace(file)


def crop_vectors(teacher: parity.Run, picture: Image.Image, boxes: Array) -> Tensor:
    """What the teacher makes of the crops of ``boxes`` [n, 4], n >= 1, in pixels -> unit vectors [n, 384]."""
    preparer = ImagePreparer(PIXELS)
    squeezed = [crop(picture, box).resize(PIXELS.size, Image.Resampling.BICUBIC) for box in boxes]
    batch = np.concatenate([preparer.prepare(part)[0] for part in squeezed])
    return torch.from_numpy(teacher({"pixels": batch})["image_embeds"])


def crop(picture: Image.Image, box: Array) -> Image.Image:
    """The part of ``picture`` in ``box`` [4], in pixels, with `AROUND` of its sides around it."""
    x0, y0, x1, y1 = (float(number) for number in box)
    wide, high = AROUND * (x1 - x0), AROUND * (y1 - y0)
    low = max(0, int(x0 - wide)), max(0, int(y0 - high))
    high_end = min(picture.width, int(np.ceil(x1 + wide))), min(picture.height, int(np.ceil(y1 + high)))
    return picture.crop((*low, max(high_end[0], low[0] + 1), max(high_end[1], low[1] + 1)))


def _weights(module: Regions) -> str:
    frozen = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("head.")}
    return "\n".join(f"{name} {float(tensor.double().sum())!r}" for name, tensor in frozen.items())


def _digest(weights: str, paths: Sequence[Path]) -> str:
    lines = [f"{path.name} {path.stat().st_size}" for path in paths]
    return hashlib.sha256("\n".join([weights, *lines]).encode()).hexdigest()[:12]


def names(heads: Heads, known: Tensor) -> Tensor:
    """Unit text vectors [1000 + 80, 384]: the backbone's own classes in the space of texts, and NanoDet's names."""
    return torch.cat((F.normalize(heads.class_table @ heads.text_weight.T, dim=-1), known))


def loss(student: Tensor, teacher: Tensor, texts: Tensor) -> Tensor:
    """Unit rows [n, D] both, texts [M, D] -> 2 (1 - cos) + cross-entropy of the student's chances among the texts to
    the teacher's."""
    wanted, given = (SCALE * rows @ texts.T for rows in (teacher, student))
    return 2 * (1 - (student * teacher).sum(-1)).mean() + F.cross_entropy(given, wanted.softmax(-1))


def train(
    seen: Seen, texts: Tensor, *, start: RegionHead | None = None, epochs: int = EPOCHS, seed: int = 0
) -> RegionHead:
    """-> a head that continues from ``start``, or a new head."""
    torch.manual_seed(seed)
    head = RegionHead()
    if start is not None:
        head.load_state_dict(start.state_dict())
    else:
        head.standardize(torch.cat((seen.vectors, seen.features), -1))
    steps = epochs * max(1, len(seen.crops) // BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    head.train()
    with tqdm(total=steps, desc="region head", leave=False) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(seen.crops)).tensor_split(max(1, len(seen.crops) // BATCH)):
                error = loss(head(seen.vectors[rows], seen.features[rows], DROPOUT), seen.crops[rows], texts)
                optimizer.zero_grad()
                torch.autograd.backward(error)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{error.item():.3f}")
                bar.update()
    return head.eval().requires_grad_(False)


def published(path: Path) -> NanoDet:
    """NanoDet-g of its published tensors. Raises `WeightsMissing`."""
    boxes = NanoDet()
    try:
        boxes.load_state_dict(normalized(read(path, None, "the hand-over data")))
    except RuntimeError as error:
        raise WeightsMissing(f"{path} holds no NanoDet-g: {error}") from None
    return boxes


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("python -m calmclip.export.regions", description=str(__doc__).splitlines()[0])
    options.add_argument("--pictures", type=Path, nargs="+", required=True, help="folders of photographs")
    options.add_argument("--most", type=int, help="photographs of each folder, drawn by --seed (default: all)")
    options.add_argument("--boxes", type=Path, help="instances.json and images/, to train the box quality, too")
    options.add_argument("--out", type=Path, default=DETECTOR, help="safetensors file to write (default: that ships)")
    options.add_argument("--nanodet", type=Path, help="NanoDet's published tensors (default: those that ship)")
    options.add_argument("--start", action="store_true", help="continue from the head that ships")
    options.add_argument("--epochs", type=int, default=EPOCHS)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cache", type=Path, help="folder for what was seen, which the next run reuses")
    arguments = options.parse_args(argv)
    if arguments.nanodet and not DETECTOR.is_file():
        Detector(published(arguments.nanodet), Quality(), RegionHead()).save(DETECTOR, {})
    modules = load(SHIPPED, DETECTOR, MASKS)
    if arguments.nanodet:
        modules.regions.boxes.load_state_dict(published(arguments.nanodet).state_dict())
    about = []
    if arguments.boxes:
        labelled = detection.read(arguments.boxes, NoParams())
        near = box_quality.see(modules.regions, [Path(str(path)) for path in labelled.pictures], labelled.truth)
        quality = box_quality.train(near, seed=arguments.seed)
        modules.regions.quality.load_state_dict(quality.state_dict())
        about += [f"quality: {len(near.overlaps)} cells of {len(labelled.pictures)} photographs with boxes"]
    draw, paths = random.Random(arguments.seed), []
    for folder in arguments.pictures:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        paths += files if arguments.most is None else sorted(draw.sample(files, min(arguments.most, len(files))))
    graph = load_net("mini").towers["image"].graph
    assert graph is not None  # it ships
    seen = see(modules.regions, parity.onnx_run(graph), paths, arguments.cache)
    start = modules.regions.head if arguments.start else None
    texts = names(Heads.load(SHIPPED), modules.regions.names)
    head = train(seen, texts, start=start, epochs=arguments.epochs, seed=arguments.seed)
    about += [f"head: {len(seen.crops)} regions of {len(paths)} photographs, {arguments.epochs} epochs"]
    trained = "; ".join([*about, f"seed {arguments.seed}"])
    Detector(modules.regions.boxes, modules.regions.quality, head).save(arguments.out, {"trained_on": trained})
    print(f"{arguments.out}: {trained}")


if __name__ == "__main__":
    main()
