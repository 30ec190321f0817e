"""How well a vector names the object in a true box: dense map, crop, and nearest proposal.

    python -m tests.bench.region_vectors --bundle mini-int8 --float mini-float --coco coco-masks coco128 [--most 60]

Bundles are folders. A folder of --coco holds instances.json and images/. Each object of at least 8 x 8 pixels that is
no crowd is named by the text vector of highest cosine among all names of the set. box: the vector of its box by
`dense`; crop: the box is cut out and embedded as a picture; nearest: the vector of the proposal of highest IoU.
Photographs of COCO train2017 trained the network of the proposals with these names, so the last row flatters. The last
lines compare INT8 with float: cosines of single patches and of boxes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from calmclip import open_bundle
from calmclip.models.evals.average_precision import overlaps
from calmclip.models.flow import Array, Call, Flow
from calmclip.models.runner import Runner
from calmclip.models.tasks.features import prepared

LEAST = 8  # pixels of a side
EDGES = (0.0, 0.1, 0.25, 0.5, 1.01)  # square root of the box's part of the picture


def objects(folder: Path, most: int) -> Iterator[tuple[Path, Array, list[str]]]:
    """(picture, boxes [N, 4], names) of each picture with objects."""
    data = json.loads((folder / "instances.json").read_text())
    names = {row["id"]: row["name"] for row in data["categories"]}
    for picture in data["images"][:most]:
        rows = [row for row in data["annotations"] if row["image_id"] == picture["id"] and not row.get("iscrowd")]
        rows = [row for row in rows if min(row["bbox"][2:]) >= LEAST]
        if rows:
            boxes = np.array([row["bbox"] for row in rows], np.float32)
            boxes[:, 2:] += boxes[:, :2]
            yield folder / "images" / picture["file_name"], boxes, [names[row["category_id"]] for row in rows]


def patches(runner: Runner, picture: Path) -> Array:
    def flow() -> Flow[Array]:
        feeds, _ = yield from prepared(runner.bundle, picture, "dense")
        outputs = yield Call("dense", feeds)
        rows: Array = outputs["patches"][0]
        return rows.reshape(-1, rows.shape[-1])

    return runner.run(flow())


def crops(picture: Path, boxes: Array) -> list[Image.Image]:
    image = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
    return [image.crop((int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1)))) for x0, y0, x1, y1 in boxes.tolist()]


def nearest(runner: Runner, picture: Path, boxes: Array) -> Array:
    vectors, proposed = runner.embed_boxes(picture)
    if not len(vectors):
        return np.zeros((len(boxes), runner.bundle.dim), np.float32)
    rows: Array = vectors[overlaps(boxes, proposed, np.zeros(len(proposed), bool)).argmax(axis=1)]
    return rows


def cosines(a: Array, b: Array) -> Array:
    result: Array = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return result


def table(title: str, right: dict[str, list[Array]], sizes: Array) -> None:
    print(f"\n{title}: top-1, percent, of {len(sizes)} objects; then by the root of the box's part of the picture")
    bands = [(sizes >= low) & (sizes < high) for low, high in pairwise(EDGES)]
    limits = [f"{low}-{min(high, 1.0)}" for low, high in pairwise(EDGES)]
    print(" " * 10 + "".join(f"{words:>12}" for words in ("all", *limits)))
    for name, parts in right.items():
        hits = np.concatenate(parts)
        shares = [hits.mean(), *(hits[band].mean() if band.any() else np.nan for band in bands)]
        print(f"{name:10}" + "".join(f"{100 * share:12.1f}" for share in shares))


def measure(runner: Runner, floats: Runner | None, folder: Path, most: int) -> None:
    names = [row["name"] for row in json.loads((folder / "instances.json").read_text())["categories"]]
    templates = runner.bundle.classifier.templates or ("{}",)
    texts = np.stack([runner.embed(texts=[t.format(name) for t in templates]).mean(axis=0) for name in names])
    right: dict[str, list[Array]] = {"box": [], "crop": [], "nearest": []}
    sizes: list[Array] = []
    agreement: dict[str, list[Array]] = {"patch": [], "box": []}
    for picture, drawn, true in objects(folder, most):
        vectors, boxes = runner.embed_boxes(picture, drawn)
        rows = {"box": vectors, "crop": runner.embed(images=crops(picture, boxes))}
        if "regions" in runner.bundle.manifest.graphs:
            rows["nearest"] = nearest(runner, picture, boxes)
        wanted = np.array([names.index(name) for name in true])
        for kind, vector in rows.items():
            right[kind].append((vector @ texts.T).argmax(axis=1) == wanted)
        whole = Image.open(picture).size
        sizes.append(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / np.prod(whole)))
        if floats:
            agreement["patch"].append(cosines(patches(runner, picture), patches(floats, picture)))
            agreement["box"].append(cosines(vectors, floats.embed_boxes(picture, boxes)[0]))
    table(f"{runner.bundle.name}, {folder.name}", {kind: parts for kind, parts in right.items() if parts},
          np.concatenate(sizes))  # fmt: skip
    for kind, parts in agreement.items():
        if parts:
            values = np.concatenate(parts)
            print(f"cosine of INT8 and float, {kind}: mean {values.mean():.4f}, worst {values.min():.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bundle", type=Path, required=True)
    options.add_argument("--float", type=Path, help="its float bundle, to compare INT8 with")
    options.add_argument("--coco", type=Path, nargs="+", required=True)
    options.add_argument("--most", type=int, default=10_000, help="pictures of each folder, at most")
    given = options.parse_args(arguments)
    runner, floats = open_bundle(given.bundle), open_bundle(given.float) if given.float else None
    for folder in given.coco:
        measure(runner, floats, folder, given.most)


if __name__ == "__main__":
    main()
