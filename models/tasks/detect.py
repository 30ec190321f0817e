"""Picture + labels and examples -> boxes in pixels of the original upright picture.

The `regions` graph proposes boxes with embeddings. The `detect` graph compares the embeddings with queries and
suppresses overlapping boxes (op SoftNMS); thresholds are inputs of that graph. A query is the vector of a label, or the
embedding of an example picture's region. Over given boxes, over the windows of a grid, and in a bundle without
`regions`, the graph `dense` gives the embeddings (`models.tasks.regions`), and every box has objectness 1.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess, fits
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Array, Arrays, Call, Flow, Together
from calmclip.models.preprocess.image import Picture
from calmclip.models.preprocess.placement import Frame
from calmclip.models.suppression import DEFAULT, METHODS, NUMBERS, Suppression
from calmclip.models.tasks import TASKS, Command, Task, elongated, exactly
from calmclip.models.tasks.examples import pick
from calmclip.models.tasks.features import Driver, each
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.regions import Boxes, Grid, Located, check_dense, located, vectors_of

REGIONS = ("boxes", "class_embeds", "objectness")  # outputs of `regions`; more are allowed
QUERIED = ("boxes", "class_embeds", "text_embeds")  # inputs of `detect`; more outputs of `regions` are allowed
SUPPRESSION = ("iou_threshold", "max_output", "method", "min_score", "per_class", "sigma")
DETECTED = ("candidates", "classes", "kept_boxes", "raw_scores", "scores")


def default_suppression(bundle: Bundle) -> Suppression:
    """The settings of a request that sets none: the manifest's, and calmclip's own for those it does not set."""
    settings = bundle.manifest.suppression
    return replace(DEFAULT, **settings.model_dump(exclude_none=True)) if settings else DEFAULT


@dataclass(frozen=True)
class Example:
    """A picture of an object to look for. ``box``: the object, x0 y0 x1 y1 in pixels of the upright picture; None: the
    main object. ``label``: its name in the answer; None: "example N", counted from 0. ``query``: float32 [1, D], if
    `shared` has embedded it already."""

    image: Picture | str
    box: Sequence[float] | Array | None = None
    label: str | None = None
    query: Array | None = None


@dataclass(frozen=True)
class DetectRequest:
    """``labels`` and ``templates``: if empty, those of ``classifier``, else those of the bundle. With ``examples`` and
    without labels, the bundle's labels are not searched. The head is not used. ``suppression`` None: the bundle's
    default. ``boxes`` in pixels of the upright picture, or ``grid``: the regions to search instead of proposals."""

    image: Picture
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    suppression: Suppression | None = None
    examples: Sequence[Example] = ()
    classifier: Classifier | None = None
    boxes: Boxes | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class Detection:
    label: str
    index: int  # in the request's labels, followed by its examples
    score: float  # after suppression
    raw_score: float  # before
    box: Array  # float32 [4] x0 y0 x1 y1


@dataclass(frozen=True)
class Detections:
    """Best first; all boxes overlap the picture. ``width``, ``height``: the size of the upright picture.
    ``candidates``: the number of box-label pairs above min_score."""

    width: int
    height: int
    detections: tuple[Detection, ...]
    candidates: int

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.detections)


@dataclass(frozen=True)
class Regions:
    """``outputs`` of the graph `regions` for one picture, see `elongated`, or the same of given boxes; ``frame`` maps
    their boxes to the picture."""

    outputs: Arrays
    frame: Frame

    @property
    def boxes(self) -> Array:
        """float32 [P, 4] x0 y0 x1 y1 in pixels of the upright picture; boxes with an objectness above 0."""
        return self.frame.to_original(self.outputs["boxes"][0][self.outputs["objectness"][0] > 0])


def detect(bundle: Bundle, request: DetectRequest) -> Flow[Detections]:
    """Raises `TaskNotServed` (also for boxes without `dense`), `TooManyLabels` (no labels and no examples),
    `BadRequest` and `InputError`s."""
    bundle.require("detect")
    settings = request.suppression or default_suppression(bundle)
    settings.tensors()  # raises before the picture is decoded
    classifier = _named(bundle, request)
    where = _where(bundle, request.boxes, request.grid)
    look = yield from _looking(bundle, request.image, where)
    names: list[str] = []
    queries: list[Array] = []
    if classifier:
        queries.append((yield from label_vectors(bundle, classifier)))
        names += classifier.labels
    for number, example in enumerate(request.examples):
        if (query := example.query) is None:
            query = yield from _embed_example(bundle, number, example, where is not None)
        queries.append(query)
        names.append(f"example {number}" if example.label is None else example.label)
    regions = yield from look()
    return (yield from compare(bundle, regions, np.concatenate(queries), names, settings))


def shared(bundle: Bundle, request: DetectRequest) -> Flow[DetectRequest]:
    """What many pictures share: embeds the labels and the examples of ``request`` once; its own ``image`` is not read.
    -> the request for these pictures, whose labels are then in the driver's cache. Raises as `detect`."""
    bundle.require("detect")
    (request.suppression or default_suppression(bundle)).tensors()
    if classifier := _named(bundle, request):
        yield from label_vectors(bundle, classifier)
    dense = _where(bundle, request.boxes, request.grid) is not None
    queries = yield Together([_embed_example(bundle, *each, dense) for each in enumerate(request.examples)])
    examples = [replace(example, query=query) for example, query in zip(request.examples, queries, strict=True)]
    return replace(request, examples=examples)


def _named(bundle: Bundle, request: DetectRequest) -> Classifier | None:
    """The complete classifier of the labels; None: examples alone are searched for."""
    if request.labels or not request.examples or (request.classifier and request.classifier.labels):
        return bundle.classifier_for(request.classifier, request.labels, request.templates)
    return None


def propose(bundle: Bundle, image: Picture) -> Flow[Regions]:
    """The regions of one picture, for any number of searches with `find`."""
    bundle.require("detect")
    look = yield from _looking(bundle, image, _where(bundle))
    return (yield from look())


def _where(bundle: Bundle, boxes: Boxes | None = None, grid: Grid | None = None) -> Boxes | Grid | None:
    """Where `dense` has to look; None: `regions` proposes boxes. Raises `BadRequest` for two answers."""
    if boxes is not None and grid is not None:
        raise BadRequest("boxes and grid were given; expected one of them, because both say where to look")
    chosen = boxes if boxes is not None else grid
    return Grid() if chosen is None and "regions" not in bundle.manifest.graphs else chosen


def _looking(bundle: Bundle, image: Picture, where: Boxes | Grid | None) -> Flow[Callable[[], Flow[Regions]]]:
    """Prepares the picture; the flow that the answer starts runs its graph."""
    if where is not None:
        return partial(_given, bundle, (yield from located(bundle, image, where)))
    return partial(_proposed, (yield from elongated.views(bundle, image)))


def _proposed(views: Sequence[elongated.View]) -> Flow[Regions]:
    return Regions(*(yield from elongated.look(views)))


def _given(bundle: Bundle, place: Located) -> Flow[Regions]:
    """The boxes as proposals that are certainly objects."""
    vectors = yield from vectors_of(bundle, place)
    boxes, objectness = place.frame.to_input(place.boxes), np.ones(len(vectors), np.float32)
    return Regions({"class_embeds": vectors[None], "boxes": boxes[None], "objectness": objectness[None]}, place.frame)


def find(
    bundle: Bundle,
    regions: Regions,
    labels: Sequence[str] = (),
    templates: Sequence[str] = (),
    suppression: Suppression | None = None,
) -> Flow[Detections]:
    """Search for labels among proposed regions: one run of the small graph `detect`."""
    classifier = bundle.classifier_for(None, labels, templates)
    queries = yield from label_vectors(bundle, classifier)
    settings = suppression or default_suppression(bundle)
    return (yield from compare(bundle, regions, queries, classifier.labels, settings))


def compare(
    bundle: Bundle, regions: Regions, queries: Array, names: Sequence[str], settings: Suppression
) -> Flow[Detections]:
    """Run the graph `detect`: regions against queries float32 [Q, D], unit rows with ``names``."""
    outputs, frame, tensors = regions.outputs, regions.frame, settings.tensors()
    feeds = {name: outputs[name] for name in sorted(bundle.graph("detect").inputs.keys() & outputs.keys())}
    padding = np.count_nonzero(~_inside(frame.to_original(outputs["boxes"][0])))  # boxes that do not count
    tensors["max_output"] = tensors["max_output"] + padding * len(names)
    answer = yield Call("detect", {**feeds, "text_embeds": queries, **tensors})

    boxes = frame.to_original(answer["kept_boxes"])
    rows = zip(*(answer[name] for name in ("classes", "scores", "raw_scores")), boxes, _inside(boxes), strict=True)
    hits = [Detection(names[c], int(c), float(score), float(raw), box) for c, score, raw, box, inside in rows if inside]
    return Detections(frame.width, frame.height, tuple(hits[: settings.max_output]), int(answer["candidates"][0]))


def _inside(boxes: Array) -> Array:
    """Boxes [N, 4] clipped to the picture -> bool [N]: False for a box that lies in the padding."""
    inside: Array = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return inside


def _embed_example(bundle: Bundle, number: int, example: Example, dense: bool) -> Flow[Array]:
    """-> float32 [1, D], the query, by `dense` or by `regions`. Raises `InputError`s with the number of the example."""
    if dense:
        return (yield from _embed_box(bundle, number, example))
    with _numbered(number):
        _check(example)
        views = yield from elongated.views(bundle, example.image)  # type: ignore[arg-type]
        frame = views[0].frame
        box = _clipped((0.0, 0.0, frame.width, frame.height) if example.box is None else example.box, frame)
    outputs, frame = yield from elongated.look(views)
    with _numbered(number):
        return pick(outputs, frame.to_input(box), drawn=example.box is not None)


def _embed_box(bundle: Bundle, number: int, example: Example) -> Flow[Array]:
    """The same from the example's box, or its whole picture."""
    with _numbered(number):
        _check(example)
        where = Grid(sizes=(1.0,), ratios=(1.0,), stride=1.0) if example.box is None else [[*map(float, example.box)]]
        place = yield from located(bundle, example.image, where)  # type: ignore[arg-type]
    return (yield from vectors_of(bundle, replace(place, boxes=place.boxes[:1])))


@contextmanager
def _numbered(number: int) -> Iterator[None]:
    """An `InputError` names the example."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"example {number}: {error}") from None


def _check(example: Example) -> None:
    """Raises `BadRequest` for an empty label or an impossible box."""
    if example.label is not None and not example.label.strip():
        raise BadRequest("its label is empty; expected some words, or no label")
    if example.box is not None:
        box = [*map(float, example.box)]
        if len(box) != 4 or not all(map(isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
            raise BadRequest(f"box is {box}; expected x0, y0, x1, y1 in pixels, x0 < x1 and y0 < y1")


def _clipped(box: Sequence[float] | Array, frame: Frame) -> Array:
    """The part of the box inside the picture. Raises `BadRequest` if there is none."""
    cut: Array = np.clip(np.array(box, np.float64), 0.0, [frame.width, frame.height] * 2).astype(np.float32)
    if not (cut[0] < cut[2] and cut[1] < cut[3]):
        raise BadRequest(f"box {[*box]} lies outside of its picture, {frame.width} x {frame.height} pixels")
    return cut


def check(manifest: Manifest) -> None:
    if manifest.classifier is None:
        raise ValueError("task 'detect' needs `classifier`, for the templates of labels")
    check_dense(manifest)
    inputs, regions = manifest.graphs["detect"].inputs, manifest.graphs.get("regions")
    if regions is None and "dense" not in manifest.graphs:
        raise ValueError(
            f"task 'detect' needs a graph 'regions' or 'dense', for its boxes; the graphs are {sorted(manifest.graphs)}"
        )
    if regions and not isinstance(regions.preprocess, ImagePreprocess):
        raise ValueError("task 'detect' needs `graphs.regions.preprocess` to be an ImagePreprocess")
    outputs = regions.outputs if regions else {name: inputs[name] for name in REGIONS if name in inputs}
    exactly("regions", "outputs", outputs, REGIONS, also=outputs)
    exactly("detect", "inputs", inputs, (*QUERIED, *SUPPRESSION), also=outputs)
    exactly("detect", "outputs", manifest.graphs["detect"].outputs, DETECTED)
    for name in outputs.keys() & inputs.keys():
        if outputs[name].dtype != inputs[name].dtype or not fits((1, *outputs[name].shape[1:]), inputs[name].shape):
            raise ValueError(f"the input {name!r} of `detect` and the output of `regions` differ in dtype or shape")


def example(bundle: Bundle, picture: bytes) -> DetectRequest:
    return DetectRequest(picture, () if bundle.classifier.labels else ("a thing",))


def _options(options: ArgumentParser) -> None:
    options.add_argument("--label", action="append", default=[], help="may be given many times; else the bundle's own")
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; may be given many times")
    options.add_argument("--example", action="append", type=Path, default=[], help="a picture of an object to look for")
    options.add_argument("--box", action="append", nargs=4, type=float, default=[], metavar=("X0", "Y0", "X1", "Y1"),
                         help="search this box alone, in pixels; may be given many times")  # fmt: skip
    options.add_argument("--grid", action="store_true", help="search windows of many sizes instead of proposals")
    options.add_argument("--top", type=int, default=5, dest="max_output", help="at most so many boxes (default 5)")
    options.add_argument("--method", choices=METHODS, help="of soft-NMS; each setting has the bundle's default")
    for name in ("sigma", "iou_threshold", "min_score"):
        options.add_argument(f"--{name.replace('_', '-')}", type=float, help=NUMBERS[name].description)


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    flags = {name: value for name, value in vars(options).items() if name in ("method", *NUMBERS) and value is not None}
    settings = replace(default_suppression(driver.bundle), **flags)
    request = DetectRequest(b"", options.label, options.template, settings, [*map(Example, options.example)],
                            boxes=options.box or None, grid=Grid() if options.grid else None)  # fmt: skip
    answers = each(driver, options.pictures, lambda path: detect(driver.bundle, replace(request, image=path)))
    for path, detections in answers:
        rows = [
            {"label": d.label, "score": d.score, "raw_score": d.raw_score, "box": [round(float(x), 1) for x in d.box]}
            for d in detections
        ]
        yield {"picture": str(path), "detect": rows}


def _line(answer: dict[str, Any]) -> str:
    rows = []
    for row in answer["detect"]:
        box = " ".join(f"{x:7.1f}" for x in row["box"])
        rows.append(f"  {row['score']:.3f}  {row['label']}  {box}")
    return "\n".join([answer["picture"], *rows])


TASKS.register("detect")(
    Task(
        name="detect",
        summary="picture + labels and examples -> boxes, through soft-NMS",
        request=DetectRequest,
        flow=detect,
        example=example,
        roles={"text": TextPreprocess, "detect": None},
        check=check,
        command=Command(_options, _answers, _line),
    )
)
