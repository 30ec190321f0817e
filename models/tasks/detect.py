"""Picture + labels and examples -> boxes in pixels of the original upright picture.

The `regions` graph proposes boxes and says what each looks like; the `detect` graph compares them with the
labels and suppresses (op SoftNMS: Bodla et al. 2017, arXiv 1704.04503). Thresholds are inputs of that graph,
so one bundle serves every setting. An example is a picture of what is wanted: its own regions give a query, which takes
the place of a text's vector.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Array, Call, Flow, Work
from calmclip.models.ops.spec import METHODS, Method
from calmclip.models.preprocess.image import Frame, decode
from calmclip.models.tasks.examples import pick
from calmclip.models.tasks.texts import choose, embed_labels

T = TypeVar("T")


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


def default_suppression(bundle: Bundle) -> Suppression:
    """What a request that says nothing else asks for: the manifest's words, over calmclip's own."""
    said = bundle.manifest.suppression
    return replace(Suppression(), **said.model_dump(exclude_none=True)) if said else Suppression()


@dataclass(frozen=True)
class Example:
    """A picture of what is wanted: the bytes of its file; a `Runner` reads paths too. ``box``: where in it, x0 y0 x1 y1
    in pixels of the upright picture; None: what it shows. ``label``: its name in the answer; None: "example N", counted
    from 0."""

    image: bytes | str | Path
    box: Sequence[float] | Array | None = None
    label: str | None = None


@dataclass(frozen=True)
class DetectRequest:
    """The bundle's own labels are looked for where there are neither labels nor examples. ``suppression`` None: the
    bundle's default."""

    image: bytes
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    suppression: Suppression | None = None
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Detection:
    label: str
    index: int  # in the request's labels, examples counted on behind them
    score: float  # after suppression
    raw_score: float  # before
    box: Array  # float32 [4] x0 y0 x1 y1


@dataclass(frozen=True)
class Detections:
    """Best first, none that lies beside the picture. ``width``, ``height``: of the upright picture.
    ``candidates``: box-label pairs over min_score."""

    width: int
    height: int
    detections: tuple[Detection, ...]
    candidates: int

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.detections)


def detect(bundle: Bundle, request: DetectRequest) -> Flow[Detections]:
    bundle.require("detect")
    settings = (request.suppression or default_suppression(bundle)).tensors()
    labels = () if request.examples and not request.labels else choose(bundle, request.labels)
    picture = yield Work("decode", lambda: decode(request.image, max_pixels=bundle.max_pixels))
    preparer = bundle.image("regions")
    pixels, frame = preparer.prepare(picture)
    queries = [(yield from embed_labels(bundle, labels, request.templates))] if labels else []
    for number, example in enumerate(request.examples):
        queries.append((yield from _embed_example(bundle, number, example)))
        labels = (*labels, f"example {number}" if example.label is None else example.label)
    regions = yield Call("regions", {preparer.spec.input: pixels})
    wanted = bundle.graph("detect").inputs.keys() & regions.keys()
    feeds = {name: regions[name] for name in sorted(wanted)}
    most = settings["max_output"]
    beside = np.count_nonzero(~_inside(frame.to_original(regions["boxes"][0])))  # which shall cost no other its place
    settings = {**settings, "max_output": most + beside * len(labels)}
    found = yield Call("detect", {**feeds, "text_embeds": np.concatenate(queries), **settings})

    boxes = frame.to_original(found["kept_boxes"])
    rows = zip(*(found[name] for name in ("classes", "scores", "raw_scores")), boxes, _inside(boxes), strict=True)
    kept = [
        Detection(labels[c], int(c), float(score), float(raw), box) for c, score, raw, box, inside in rows if inside
    ]
    return Detections(frame.width, frame.height, tuple(kept[: most[0]]), int(found["candidates"][0]))


def _inside(boxes: Array) -> Array:
    """Boxes [N, 4] cut to the picture -> bool [N]: what is left of the others lies in what was added to the picture."""
    inside: Array = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return inside


def _embed_example(bundle: Bundle, number: int, example: Example) -> Flow[Array]:
    """-> float32 [1, D], the query. Raises `InputError`s that name the example."""

    def named(do: Callable[..., T], *given: Any) -> T:
        try:
            return do(*given)
        except InputError as error:
            raise type(error)(f"example {number}: {error}") from None

    preparer = bundle.image("regions")
    data = named(_checked, example)
    picture = yield Work("decode", lambda: named(lambda: decode(data, max_pixels=bundle.max_pixels)))
    pixels, frame = yield Work("preprocess", lambda: preparer.prepare(picture))
    whole = (0.0, 0.0, frame.width, frame.height)
    box = named(_within, whole if example.box is None else example.box, frame)
    regions = yield Call("regions", {preparer.spec.input: pixels})
    return named(partial(pick, drawn=example.box is not None), regions, frame.to_input(box))


def _checked(example: Example) -> bytes:
    """The bytes of the picture. Raises `BadRequest` where the example says nonsense."""
    if not isinstance(example.image, bytes):
        raise BadRequest(f"its picture is a {type(example.image).__name__}; expected the bytes of a file")
    if example.label is not None and not example.label.strip():
        raise BadRequest("its label is empty; expected some words, or none at all")
    if example.box is not None:
        box = [*map(float, example.box)]
        if len(box) != 4 or not all(map(isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
            raise BadRequest(f"box is {box}; expected x0, y0, x1, y1 in pixels, x0 < x1 and y0 < y1")
    return example.image


def _within(box: Sequence[float] | Array, frame: Frame) -> Array:
    """What of the box is in the picture. Raises `BadRequest` when nothing is."""
    cut: Array = np.clip(np.array(box, np.float64), 0.0, [frame.width, frame.height] * 2).astype(np.float32)
    if not (cut[0] < cut[2] and cut[1] < cut[3]):
        raise BadRequest(f"box {[*box]} lies outside of its picture, {frame.width} x {frame.height} pixels")
    return cut
