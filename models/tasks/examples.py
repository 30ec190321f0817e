"""The query of an example picture, for the task detect.

Source: Minderer et al. 2022 (arXiv 2205.06230), section 4.4, one-shot detection; its code and transformers'
`embed_image_query`; with objectness, as in OWLv2.
"""

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays

NEAR = 0.8  # of the best overlap: boxes that fit nearly as well are candidates too


def pick(regions: Arrays, box: Array, *, drawn: bool) -> Array:
    """Outputs of the `regions` graph for one picture -> float32 [1, D], the class embedding of ``box``.

    ``box`` float32 [4], x0 y0 x1 y1 in pixels of the graph's input. ``drawn``: the caller drew the box, so all regions
    are candidates. Else the box is the whole picture, and the candidates are the regions of the highest objectness: one
    region, or all if the model has no objectness. Among the candidates whose IoU with the box is at least `NEAR` times
    the best IoU, the region that is least similar to the mean of all regions wins. Raises `BadRequest` if there are no
    regions.
    """
    objectness = regions["objectness"][0]
    objects = np.flatnonzero(objectness > 0)
    if not objects.size:
        raise BadRequest("the picture shows no object; expected a picture of the object to look for")
    rows = regions["class_embeds"][0]
    vectors = rows[objects] * regions["lengths"][0][objects, None] if "lengths" in regions else rows[objects]
    similarity = vectors @ vectors.mean(axis=0)
    candidates = np.arange(objects.size) if drawn else np.flatnonzero(objectness[objects] == objectness[objects].max())
    overlap = overlaps(box, regions["boxes"][0][objects[candidates]])
    near = candidates[overlap >= NEAR * overlap.max()]
    if not near.size:  # all generalised IoUs are below 0, so 0.8 times the best is above the best
        near = candidates[[overlap.argmax()]]
    query: Array = rows[objects[near[similarity[near].argmin()]]][None]
    return query


def overlaps(box: Array, boxes: Array) -> Array:
    """[4] and [N, 4], x0 y0 x1 y1 -> float32 [N]: IoU. If no box overlaps, the generalised IoU of Rezatofighi et al.
    2019 (arXiv 1902.09630): IoU minus the fraction of the common hull that neither box covers."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - shared
    iou: Array = shared / np.maximum(union, 1e-9)
    if iou.any():
        return iou
    hull = (np.maximum(boxes[:, 2:], box[2:]) - np.minimum(boxes[:, :2], box[:2])).prod(axis=1)
    generalised: Array = iou - (hull - union) / np.maximum(hull, 1e-9)
    return generalised
