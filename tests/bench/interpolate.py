"""A small CLIP that is trained here, fine-tuned on negatives, and the weights between: curve, layers, pruning.

    python -m tests.bench.interpolate --data natural-images --captions flickr8k-train --out /tmp/path

``--data``: Natural Images (labels.json, images/): half of each class trains, half measures. ``--captions``: photographs
with captions (captions.jsonl, images/). The base trains on both; the fine-tuned net goes on with negatives (255 - x) of
the first. Both nets are far too small to be CLIPs: they show that the commands work, and how their output reads. The
commands are printed. About ten minutes on two cores; a second run continues.
"""

import argparse
import json
import random
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from calmclip.models.cli import main

SIDE, VIEWS = 32, 10
TEMPLATES = ("a photo of a {}.", "a {}.", "a picture of the {}.", "there is a {} here.")
SIZE = f"--side {SIDE} --patch 8 --width 64 --layers 3 --length 16 --words 1000"


def prepare(source: Path, captioned: Path, count: int, out: Path) -> None:
    """Folders ``plain`` and ``negative`` of training pictures with captions, and of held-out pictures with labels."""
    by_label: dict[str, list[str]] = {}
    for row in json.loads((source / "labels.json").read_text()):
        by_label.setdefault(row["label"], []).append(row["file"])
    draw = random.Random(0)
    captions: dict[str, dict[str, list[str]]] = {"plain": {}, "negative": {}}
    labels = []
    for label, files in by_label.items():
        for place, file in enumerate(sorted(files)):
            picture = Image.open(source / "images" / file).convert("RGB")
            name = f"{label}-{place}"
            trains = place % 2 == 0
            views = [_view(picture, draw) for _ in range(VIEWS)] if trains else [picture]
            if not trains:
                labels.append({"file": f"{name}.png", "label": label})
            for number, view in enumerate(views):
                for kind, shown in (("plain", view), ("negative", ImageOps.invert(view))):
                    folder = out / kind / ("train" if trains else "held-out/images")
                    folder.mkdir(parents=True, exist_ok=True)
                    shown.save(folder / (written := f"{name}-{number}.png" if trains else f"{name}.png"))
                    if trains:
                        captions[kind][written] = [template.replace("{}", label) for template in TEMPLATES]
    for kind in captions:
        (out / kind / "held-out/labels.json").write_text(json.dumps(labels))
    for line in (captioned / "captions.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        shutil.copyfile(captioned / "images" / row["image"], out / "plain/train" / row["image"])
        captions["plain"][row["image"]] = row["captions"]
    for kind, rows in captions.items():
        (out / kind / "captions.json").write_text(json.dumps(rows))


def _view(picture: Image.Image, draw: random.Random) -> Image.Image:
    """A random crop of 60 to 100 % of each side, mirrored in half of the cases."""
    part = draw.uniform(0.6, 1)
    width, height = (round(part * side) for side in picture.size)
    x, y = (draw.randint(0, whole - side) for whole, side in zip(picture.size, (width, height), strict=True))
    view = picture.crop((x, y, x + width, y + height)).resize((64, 64))
    return ImageOps.mirror(view) if draw.random() < 0.5 else view


def run(words: str, *more: str) -> None:
    arguments = [*shlex.split(words), *more]
    print("\n$ calmclip", shlex.join(arguments), flush=True)
    assert main(arguments) == 0


def measured(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--captions", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--tuning", type=int, default=120)
    options.add_argument("--count", type=int, default=300, help="of the photographs with captions")
    args = options.parse_args(argv)
    out = args.out
    if not (out / "negative/captions.json").is_file():
        prepare(args.data, args.captions, args.count, out)
    pictures = {kind: f"--captions {out}/{kind}/captions.json --pictures {out}/{kind}/train" for kind in KINDS}
    run(
        f"train contrastive {pictures['plain']} --out {out}/base {SIZE} --steps {args.steps} --warmup 40 --batch 64 "
        "--every 100"
    )
    run(
        f"train contrastive {pictures['negative']} --start {out}/base --out {out}/tuned --steps {args.tuning} "
        "--warmup 10 --batch 32 --rate 5e-4"
    )
    sets = [word for kind in KINDS for word in ("--data", f"{kind}={out}/{kind}/held-out")]
    run(f"interpolate {out}/base {out}/tuned --plot {out}/path.png", *sets)
    run(f"sharpness {out}/base {out}/tuned --plot {out}/layers.png", *sets)
    for part in (0.5, 0.1, 0):
        run(f"sharpness {out}/base {out}/tuned --alphas 0,1 --prune {part} --out {out}/pruned --replace", *sets)


KINDS = ("plain", "negative")

if __name__ == "__main__":
    measured()
