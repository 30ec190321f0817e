"""Photographs with outlined objects: what each pixel shows, and how well a map of labels agrees with that.

A folder has COCO's form: instances.json with polygons or runs, and images/. Objects are painted from the largest to the
smallest, so a small object lies on top. Pixels of a crowd that no object covers count for nothing. What is no object is
background; it is no class.

Dataset mIoU: the pixels of a class that are right, divided by those that are it or are called it, both summed over all
photographs; the mean over the classes that the photographs show. Source: Long et al. 2015 (arXiv 1411.4038), section 5.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.extras import missing
from calmclip.models.flow import Array

DATA = "instances.json (COCO form, with polygons or runs), images/"
NONE, IGNORED = -1, -2  # of a map of labels: background; pixels that count for nothing


@dataclass(frozen=True)
class Photograph:
    """``objects``: COCO's annotations of ``path``; ``classes``: their indices in the names of the set."""

    path: Path
    width: int
    height: int
    objects: Sequence[Mapping[str, Any]]
    classes: Sequence[int]

    def truth(self) -> Array:
        """int16 [height, width]: the index of the class, `NONE` or `IGNORED`. Raises `ExtraMissing`."""
        masks = [decoded(each["segmentation"], self.width, self.height) for each in self.objects]
        truth = np.full((self.height, self.width), NONE, np.int16)
        for number in sorted(range(len(masks)), key=lambda number: -int(masks[number].sum())):
            if self.objects[number].get("iscrowd"):
                truth[masks[number] & (truth == NONE)] = IGNORED
            else:
                truth[masks[number]] = self.classes[number]
        return truth

    @property
    def present(self) -> list[int]:
        """The classes of its objects that are no crowds."""
        return sorted({c for c, each in zip(self.classes, self.objects, strict=True) if not each.get("iscrowd")})


def read(folder: Path) -> tuple[tuple[str, ...], list[Photograph]]:
    """The names of the set, and its photographs. Raises `BadRequest` for a file in another form."""
    file = folder / "instances.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        index = {category["id"]: number for number, category in enumerate(content["categories"])}
        objects: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if not annotation["segmentation"]:
                raise ValueError(f"the annotation {annotation['id']} has no outline")
            objects[annotation["image_id"]].append(annotation)
        names = tuple(category["name"] for category in content["categories"])
        photographs = [
            Photograph(
                folder / "images" / image["file_name"],
                image["width"],
                image["height"],
                objects[image["id"]],
                [index[each["category_id"]] for each in objects[image["id"]]],
            )
            for image in content["images"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{file} cannot be read ({error!r}); the data directory must hold {DATA}") from None
    return names, photographs


def decoded(segmentation: Any, width: int, height: int) -> Array:
    """COCO's polygons, run lengths, or compressed run lengths -> bool [height, width]. Raises `ExtraMissing`."""
    try:
        from pycocotools import mask as coco
    except ModuleNotFoundError:
        raise missing("the outlines of COCO", "pycocotools", "eval") from None
    if isinstance(segmentation, list):
        runs = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = coco.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    mask: Array = coco.decode(runs).astype(bool)
    return mask


def counted(truth: Array, labels: Array, classes: int) -> Array:
    """Two maps of labels [h, w] -> int64 [3, classes]: pixels that are rightly called the class, that are called it,
    that are it."""
    codes = (truth.astype(np.int32) - IGNORED) * (classes + 1) + labels - NONE
    table = np.bincount(codes.ravel(), minlength=(classes + 2) * (classes + 1)).reshape(classes + 2, classes + 1)[1:]
    return np.stack((np.diagonal(table[1:, 1:]), table[:, 1:].sum(axis=0), table[1:].sum(axis=1)))


def mean_iou(counts: Array) -> float:
    """int64 [..., 3, classes], summed over all but the last two axes -> percent; NaN if no class is shown."""
    right, called, true = counts.reshape(-1, *counts.shape[-2:]).sum(axis=0)
    shown = true > 0
    if not shown.any():
        return float("nan")
    return 100 * float((right / np.maximum(called + true - right, 1))[shown].mean())
