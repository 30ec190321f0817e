"""The part of detect that makes a query of an example picture.

Source: Minderer et al. 2022 (arXiv 2205.06230), section 4.4, one-shot detection; the rule is that of its code and of
transformers' `embed_image_query`, for pictures with objectness that of OWLv2's.
"""

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays

NEAR = 0.8  # of the best overlap: boxes that fit nearly as well are looked at too


def pick(regions: Arrays, box: Array, *, drawn: bool) -> Array:
    """Answers of the `regions` graph for one picture -> float32 [1, D], the class embedding that stands for ``box``.

    ``box`` float32 [4], x0 y0 x1 y1 in pixels of the graph's input. ``drawn``: somebody drew it, so every region
    competes; where it is just the whole picture, only those of the highest objectness do, which is one region, or all
    of them where the model knows no objectness. Of those whose IoU with the box is at least `NEAR` of the best, the
    one is taken that is least like the mean of all regions. Raises `BadRequest` when there are no regions.
    """
    objectness = regions["objectness"][0]
    there = np.flatnonzero(objectness > 0)
    if not there.size:
        raise BadRequest("nothing was found in the picture; expected one that shows what is wanted")
    rows = regions["class_embeds"][0]
    long = rows[there] * regions["lengths"][0][there, None] if "lengths" in regions else rows[there]
    likeness = long @ long.mean(axis=0)
    rivals = np.arange(there.size) if drawn else np.flatnonzero(objectness[there] == objectness[there].max())
    overlap = overlaps(box, regions["boxes"][0][there[rivals]])
    near = rivals[overlap >= NEAR * overlap.max()]
    if not near.size:  # generalised IoU may be below 0 throughout, and 0.8 of such a best is above it
        near = rivals[[overlap.argmax()]]
    best: Array = rows[there[near[likeness[near].argmin()]]][None]
    return best


def overlaps(box: Array, boxes: Array) -> Array:
    """[4] and [N, 4], x0 y0 x1 y1 -> float32 [N]: IoU; where no box overlaps, the generalised IoU of Rezatofighi et al.
    2019 (arXiv 1902.09630): IoU less the part of the common hull that neither covers."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - shared
    iou: Array = shared / np.maximum(union, 1e-9)
    if iou.any():
        return iou
    hull = (np.maximum(boxes[:, 2:], box[2:]) - np.minimum(boxes[:, :2], box[:2])).prod(axis=1)
    generalised: Array = iou - (hull - union) / np.maximum(hull, 1e-9)
    return generalised
