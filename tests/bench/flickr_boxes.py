"""Photographs that were boxed by hand to test open-vocabulary detection: reads and checks data/flickr_boxes.json.

The file has COCO's instances form. An annotation has three more keys: `other` and `free`, two more wordings of the
category's name, and `coco`, COCO's name of the thing or null. Its `info` says how the photographs were chosen and
boxed. The photographs are those of the Flickr8k dev split, 224 x 224 pixels; they are not part of the repository.

    python -m tests.bench.flickr_boxes --photographs flickr8k/images --out boxed
    calmclip eval BUNDLE detection --data boxed
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmclip.models.datasets import read_json
from calmclip.models.errors import BadRequest

FILE = Path(__file__).parent / "data" / "flickr_boxes.json"
FORM = "COCO's instances form, each annotation with the keys other, free and coco"


@dataclass(frozen=True)
class BoxedObject:
    """``box``: x0 y0 x1 y1 in pixels of the file. ``name``, ``other``, ``free``: three wordings. ``coco``: COCO's name,
    or None. ``crowd``: the box is a region of many or doubtful objects; it has no other wordings than its name."""

    box: tuple[float, float, float, float]
    name: str
    other: str | None
    free: str | None
    coco: str | None
    crowd: bool


@dataclass(frozen=True)
class Photograph:
    path: Path
    objects: Sequence[BoxedObject]


def read(photographs: Path, file: Path = FILE) -> list[Photograph]:
    """The photographs in the folder ``photographs`` that ``file`` has boxes for, in its order.

    Raises `BadRequest` for a missing photograph, and for an annotation that breaks the form.
    """
    content = read_json(file, FORM)
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects: dict[int, list[BoxedObject]] = {image["id"]: [] for image in content["images"]}
        images = {image["id"]: image for image in content["images"]}
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            objects[image["id"]].append(_object(annotation, names[annotation["category_id"]], image))
        boxed = [Photograph(photographs / image["file_name"], objects[i]) for i, image in images.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequest(f"{file} cannot be read ({error!r}); it must hold {FORM}") from None
    for photograph in boxed:
        _check_wordings(photograph)
    if missing := [photograph.path.name for photograph in boxed if not photograph.path.is_file()]:
        raise BadRequest(
            f"{photographs} lacks {len(missing)} of {len(boxed)} photographs, the first is {missing[0]}; "
            "it must hold the photographs of the Flickr8k dev split"
        )
    return boxed


def _object(annotation: Mapping[str, Any], name: str, image: Mapping[str, Any]) -> BoxedObject:
    x, y, width, height = annotation["bbox"]
    box = (x, y, x + width, y + height)
    crowd = bool(annotation["iscrowd"])
    other, free, coco = (annotation[key] for key in ("other", "free", "coco"))
    place = f"annotation {annotation['id']} ({name!r} in {image['file_name']})"
    if not (width > 0 and height > 0 and min(x, y) >= 0 and box[2] <= image["width"] and box[3] <= image["height"]):
        raise BadRequest(
            f"{place} has the box {box}; expected x0 < x1 and y0 < y1 within "
            f"{image['width']} x {image['height']} pixels"
        )
    if coco not in (None, name):
        raise BadRequest(f"{place} has the COCO name {coco!r}; expected its own name or null")
    wordings = [name] if crowd else [name, other, free]
    if not all(isinstance(text, str) and text.strip() for text in wordings) or len({*wordings}) < len(wordings):
        raise BadRequest(f"{place} has the wordings {wordings}; expected texts that differ and are not empty")
    if crowd and (other, free) != (None, None):
        raise BadRequest(f"{place} is a crowd with the wordings {[other, free]}; expected null for both")
    return BoxedObject(box, name, other, free, coco, crowd)


def _check_wordings(photograph: Photograph) -> None:
    """All objects with one wording have one name; else the truth of that wording would be incomplete."""
    name_of = {thing.name: thing.name for thing in photograph.objects}
    for thing in photograph.objects:
        for text in filter(None, (thing.other, thing.free)):
            if name_of.setdefault(text, thing.name) != thing.name:
                raise BadRequest(
                    f"{photograph.path.name} has {text!r} as a wording of {thing.name!r} and of {name_of[text]!r}; "
                    "expected one of them"
                )


def lay_out(photographs: Path, directory: Path) -> None:
    """Makes ``directory`` a data directory of the eval `detection`: instances.json, images/ with copies."""
    boxed = read(photographs)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for photograph in boxed:
        shutil.copy(photograph.path, directory / "images")
    shutil.copy(FILE, directory / "instances.json")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--photographs", type=Path, required=True, help="the folder of the Flickr8k dev photographs")
    options.add_argument("--out", type=Path, required=True, help="the data directory to make")
    arguments = options.parse_args()
    lay_out(arguments.photographs, arguments.out)
    print(json.dumps(read_json(FILE, FORM)["info"]["counts"]))


if __name__ == "__main__":
    main()
