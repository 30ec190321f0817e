"""Picture + labels -> boxes in pixels of the original upright picture.

The `regions` graph proposes boxes and says what each looks like; the `detect` graph compares them with the
labels and suppresses (op SoftNMS: Bodla et al. 2017, arXiv 1704.04503). Thresholds are inputs of that graph,
so one bundle serves every setting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.bundle.bundle import Bundle
from models.errors import BadRequest
from models.flow import Array, Call, Flow, Work
from models.ops.spec import METHODS, Method
from models.preprocess.image import decode
from models.tasks.texts import choose, embed_labels


@dataclass(frozen=True)
class Suppression:
    """How overlapping boxes are thinned out, as the op SoftNMS takes it.

    hard: a box over ``iou_threshold`` with a better one goes; linear: its score is multiplied by 1 - IoU;
    gaussian: by exp(-IoU^2 / sigma), whatever the overlap. Boxes under ``min_score`` go.
    """

    method: Method = "gaussian"
    sigma: float = 0.5
    iou_threshold: float = 0.3
    min_score: float = 0.15
    max_output: int = 100
    per_class: bool = True

    def tensors(self) -> dict[str, Array]:
        """The op's inputs, each of shape [1]. Raises `BadRequest` naming the value out of range."""
        if self.method not in METHODS:
            raise BadRequest(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        for name, low, high in (
            ("sigma", 1e-6, 1e6),
            ("iou_threshold", 0.0, 1.0),
            ("min_score", 0.0, 1.0),
            ("max_output", 1, 1000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadRequest(f"{name} is {value}; expected {low} to {high}")
        return {
            "method": np.array([METHODS.index(self.method)], np.int64),
            "per_class": np.array([int(self.per_class)], np.int64),
            "iou_threshold": np.array([self.iou_threshold], np.float32),
            "sigma": np.array([self.sigma], np.float32),
            "min_score": np.array([self.min_score], np.float32),
            "max_output": np.array([self.max_output], np.int64),
        }


@dataclass(frozen=True)
class DetectRequest:
    image: bytes
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    suppression: Suppression = field(default_factory=Suppression)


@dataclass(frozen=True)
class Detection:
    label: str
    index: int  # in the request's labels
    score: float  # after suppression
    raw_score: float  # before
    box: Array  # float32 [4] x0 y0 x1 y1


@dataclass(frozen=True)
class Detections:
    """Best first. ``width``, ``height``: of the upright picture. ``candidates``: box-label pairs over min_score."""

    width: int
    height: int
    detections: tuple[Detection, ...]
    candidates: int

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.detections)


def detect(bundle: Bundle, request: DetectRequest) -> Flow[Detections]:
    bundle.require("detect")
    settings = request.suppression.tensors()
    labels = choose(bundle, request.labels)
    picture = yield Work("decode", lambda: decode(request.image, max_pixels=bundle.max_pixels))
    preparer = bundle.image("regions")
    pixels, frame = preparer.prepare(picture)
    text = yield from embed_labels(bundle, labels, request.templates)
    regions = yield Call("regions", {preparer.spec.input: pixels})
    found = yield Call("detect", {**regions, "text_embeds": text, **settings})

    boxes = frame.to_original(found["kept_boxes"])
    return Detections(
        frame.width,
        frame.height,
        tuple(
            Detection(labels[c], int(c), float(score), float(raw), box)
            for c, score, raw, box in zip(found["classes"], found["scores"], found["raw_scores"], boxes, strict=True)
        ),
        int(found["candidates"][0]),
    )
