"""What attributes and descriptions gain or lose on photographs.

    python -m tests.bench.composed DATA [--bundle models/bundles/mini-int8]

DATA has the folders natural-images, coco-masks and flickr8k.

* everyday: 96 photographs of 8 classes, as they are.
* moved: a probe in the way of Waterbirds (Sagawa et al. 2020, arXiv 1911.08731). Animals and vehicles are cut out of
  photographs along their masks and pasted onto 4 photographs of water and 4 of grass, the same for all, so that the
  background says nothing about the label. A figure is the accuracy on each background; the worse of them is the worst
  group.

The descriptions and values below were written before the first figure was measured; "named", with the label in each
description, was tried after it. `half`: half the width of a 95 %
interval of a paired difference to zero-shot, by resampling the photographs (of the probe: the cut-outs).

`--costs` measures time instead: a repeated request of each kind, in turn, over the median of the plain requests.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from calmclip import Attributes, Runner, open_bundle
from calmclip.models.flow import Array

EVERYDAY: dict[str, list[str]] = {
    "airplane": ["a long fuselage", "two wings with engines under them", "a tail fin", "a row of small windows"],
    "car": ["four wheels with round tyres", "headlights and a grille", "a windscreen", "side doors with handles"],
    "cat": ["pointed ears", "long whiskers", "slit eyes", "soft striped fur"],
    "dog": ["floppy ears", "a long snout with a black nose", "a collar", "a tongue that hangs out"],
    "flower": ["colourful petals", "a yellow centre", "a green stem", "green leaves"],
    "fruit": ["a round shiny skin", "a short stalk", "a red or orange peel", "juicy flesh"],
    "motorbike": ["two wheels", "a fuel tank and a seat", "handlebars with mirrors", "an exhaust pipe"],
    "person": ["a human face", "eyes and eyebrows", "hair on a head", "shoulders and clothes"],
}
MOVED: dict[str, list[str]] = {
    "cow": ["a broad muzzle", "horns", "a brown and white hide", "an udder"],
    "dog": EVERYDAY["dog"],
    "cat": EVERYDAY["cat"],
    "zebra": ["black and white stripes", "a short upright mane", "hooves"],
    "elephant": ["a long trunk", "tusks", "large flat ears", "grey wrinkled skin"],
    "bear": ["thick brown fur", "small round ears", "large paws with claws"],
    "giraffe": ["a very long neck", "brown patches on yellow fur", "small horns", "long thin legs"],
    "bird": ["feathers", "a beak", "two wings", "thin legs with claws"],
    "horse": ["a long mane", "hooves", "a long face", "a saddle"],
    "boat": ["a hull", "a mast with sails", "a deck with a cabin"],
    "airplane": EVERYDAY["airplane"],
    "bus": ["a long row of windows", "a folding door", "a sign with a number"],
    "car": EVERYDAY["car"],
}
PLACES = {"background": ["indoors", "outdoors", "on a plain background"]}
VIEWS = {"view": ["from the side", "from the front", "close up"]}
GROUNDS = {"background": ["on water", "on grass"]}
WORDS = {"on water": r"\b(water|ocean|sea|lake|river|wave)\b", "on grass": r"\b(grass\w*|field|meadow)\b"}
ALPHAS = (0.9, 0.75, 0.5, 0.0)
SMALLEST = 0.015  # of the picture, so that a cut-out is more than a few pixels
SIDE, OBJECT = 224, 150  # pixels of a pasted picture, and of the longer side of its object


def everyday(data: Path) -> Iterator[tuple[Path, str]]:
    folder = data / "natural-images"
    for entry in json.loads((folder / "labels.json").read_text()):
        yield folder / "images" / entry["file"], entry["label"]


def cut_outs(data: Path) -> Iterator[tuple[Image.Image, str]]:
    """RGBA pictures of single objects, transparent outside of their polygons."""
    folder = data / "coco-masks"
    instances = json.loads((folder / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in instances["categories"]}
    pictures = {picture["id"]: picture for picture in instances["images"]}
    for entry in instances["annotations"]:
        picture, label = pictures[entry["image_id"]], names[entry["category_id"]]
        large = entry["area"] > SMALLEST * picture["width"] * picture["height"]
        if label not in MOVED or not large or not isinstance(entry["segmentation"], list):
            continue
        image = Image.open(folder / "images" / picture["file_name"]).convert("RGB")
        mask = Image.new("L", image.size)
        for polygon in entry["segmentation"]:
            ImageDraw.Draw(mask).polygon(polygon, fill=255)
        image.putalpha(mask)
        cut = image.crop(mask.getbbox())
        cut.thumbnail((OBJECT, OBJECT))
        yield cut, label


def grounds(data: Path) -> dict[str, list[Image.Image]]:
    """For each value of `GROUNDS` the 4 photographs whose captions name it most often, and never the other."""
    folder = data / "flickr8k"
    captions: dict[str, list[str]] = json.loads((folder / "captions.json").read_text())
    counts = {
        ground: {file: sum(bool(re.search(words, line.lower())) for line in lines) for file, lines in captions.items()}
        for ground, words in WORDS.items()
    }
    chosen: dict[str, list[Image.Image]] = {}
    for ground, other in zip(counts, reversed(counts), strict=True):
        files = sorted((file for file in captions if not counts[other][file]), key=lambda f: (-counts[ground][f], f))
        images = sorted((folder / "images").rglob("*.jpg"))
        paths = {path.name: path for path in images}
        chosen[ground] = [Image.open(paths[file]).convert("RGB").resize((SIDE, SIDE)) for file in files[:4]]
    return chosen


def pasted(cut: Image.Image, ground: Image.Image) -> Image.Image:
    """In the middle of the lower half, where an object stands."""
    picture = ground.copy()
    picture.paste(cut, ((SIDE - cut.width) // 2, SIDE - 20 - cut.height), cut)
    return picture


def ways(descriptions: Mapping[str, list[str]], *attributes: Mapping[str, list[str]]) -> Iterator[tuple[str, Any]]:
    """Name -> arguments of `Runner.classify`."""
    yield "zero-shot", {}
    for values in attributes:
        for tau, with_labels in product((1.0, 3.0), (True, False)):
            name = f"{' x '.join(values)}, tau {tau:g}, {'with' if with_labels else 'without'} labels"
            yield name, {"attributes": Attributes(values, tau, with_labels)}
        yield f"{' x '.join(values)}, all alike", {"attributes": Attributes(values, inf)}
    named = {label: [f"a {label} with {line}" for line in lines] for label, lines in descriptions.items()}
    for kind, lines in (("descriptions", descriptions), ("named descriptions", named)):
        yield f"{kind} for templates", {"descriptions": lines}
        for alpha in ALPHAS:
            yield f"{kind} in regions, alpha {alpha:g}", {"descriptions": lines, "alpha": alpha}


def right(runner: Runner, pictures: list[Any], truth: list[str], labels: list[str], how: Any) -> Array:
    """bool [N]: whether the best label is the truth."""
    rankings = runner.classify_many(pictures, labels, top_k=1, **how)
    return np.array([ranking.labels[0].label == label for ranking, label in zip(rankings, truth, strict=True)])


def half_width(differences: Array) -> float:
    """Of the 95 % interval of the mean, by 2000 resamples of the rows."""
    draw = np.random.default_rng(0)
    means = differences[draw.integers(len(differences), size=(2000, len(differences)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(high - low) / 2


def costs(runner: Runner, picture: Path, rounds: int = 40) -> None:
    kinds: dict[str, Any] = {
        "plain": {},
        "3 composites": {"attributes": PLACES},
        "96 composites": {"attributes": {str(i): ["near", "far"] for i in range(5)} | PLACES},
        "regions": {"descriptions": EVERYDAY, "alpha": 0.5},
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, how in kinds.items():
            start = perf_counter()
            runner.classify(picture, [*EVERYDAY], **how)
            seconds[name].append(perf_counter() - start)
    plain = float(np.median(seconds["plain"][1:]))
    for name, each in seconds.items():
        print(f"{name}: first {each[0] / plain:.1f}, repeated {float(np.median(each[1:])) / plain:.2f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("--bundle", type=Path, default=Path("models/bundles/mini-int8"))
    options.add_argument("--costs", action="store_true", help="measure time instead")
    args = options.parse_args()
    runner = open_bundle(args.bundle)
    if args.costs:
        return costs(runner, next(everyday(args.data))[0])

    pictures, truth = map(list, zip(*everyday(args.data), strict=True))
    print(f"everyday: {len(pictures)} photographs, {len(EVERYDAY)} labels")
    plain = np.zeros(len(truth))
    for name, how in ways(EVERYDAY, PLACES, {**PLACES, **VIEWS}):
        hits = right(runner, pictures, truth, [*EVERYDAY], how).astype(float)
        plain = hits if name == "zero-shot" else plain
        gain, half = 100 * (hits - plain).mean(), 100 * half_width(hits - plain)
        print(f"  {100 * hits.mean():5.1f}   {gain:+5.1f} (half {half:3.1f})   {name}", flush=True)

    cuts, truth = map(list, zip(*cut_outs(args.data), strict=True))
    labels = [label for label in MOVED if label in truth]
    scenes = grounds(args.data)
    moved = {g: [pasted(cut, scene) for cut in cuts for scene in images] for g, images in scenes.items()}
    each = [label for label in truth for _ in range(4)]
    print(f"moved: {len(cuts)} cut-outs, {len(labels)} labels, 4 photographs for each of {', '.join(moved)}")
    for name, how in ways({label: MOVED[label] for label in labels}, GROUNDS):
        hits = np.stack([right(runner, moved[g], each, labels, how).reshape(-1, 4).mean(axis=1) for g in moved])
        plain = hits if name == "zero-shot" else plain
        gain, half = 100 * (hits - plain).mean(), 100 * half_width((hits - plain).mean(axis=0))
        parts = "   ".join(f"{g} {100 * part.mean():5.1f}" for g, part in zip(moved, hits, strict=True))
        inferred = _inferred(runner, moved, labels, how) if "attributes" in how else ""
        print(f"  {100 * hits.mean():5.1f}   {gain:+5.1f} (half {half:3.1f})   {parts}   {name}{inferred}", flush=True)


def _inferred(runner: Runner, moved: Mapping[str, list[Any]], labels: list[str], how: Any) -> str:
    """How often the most probable background is the true one."""
    good = [
        max(values := ranking.inferred.marginals["background"], key=lambda value: values[value]) == ground
        for ground, pictures in moved.items()
        for ranking in runner.classify_many(pictures, labels, **how)
        if ranking.inferred
    ]
    return f"; background right {100 * float(np.mean(good)):.1f}"


if __name__ == "__main__":
    main()
