"""Picture + labels and examples -> boxes in pixels of the original upright picture.

The `regions` graph proposes boxes and says what each looks like; the `detect` graph compares them with the
labels and suppresses (op SoftNMS: Bodla et al. 2017, arXiv 1704.04503). Thresholds are inputs of that graph,
so one bundle serves every setting. An example is a picture of what is wanted: its own regions give a query, which takes
the place of a text's vector.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess, fits
from calmclip.models.classifier import Classifier, require_labels
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Array, Arrays, Call, Flow
from calmclip.models.ops.spec import METHODS, Method
from calmclip.models.preprocess.image import Frame, Picture
from calmclip.models.tasks import TASKS, Command, Task, exactly
from calmclip.models.tasks.examples import pick
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.features import prepared

if TYPE_CHECKING:
    from calmclip.models.runner import Runner

REGIONS = ("boxes", "class_embeds", "objectness")  # outputs of `regions`; it may have more
QUERIED = ("boxes", "class_embeds", "text_embeds")  # what `detect` takes besides its settings, and more of `regions`
SUPPRESSION = ("iou_threshold", "max_output", "method", "min_score", "per_class", "sigma")
DETECTED = ("candidates", "classes", "kept_boxes", "raw_scores", "scores")


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
    """A picture of what is wanted. ``box``: where in it, x0 y0 x1 y1 in pixels of the upright picture; None: what it
    shows. ``label``: its name in the answer; None: "example N", counted from 0."""

    image: Picture | str
    box: Sequence[float] | Array | None = None
    label: str | None = None


@dataclass(frozen=True)
class DetectRequest:
    """``labels`` and ``templates`` win over those of ``classifier``, and these over the bundle's own, which are looked
    for where there is nothing else, no examples either. Heads score no boxes. ``suppression`` None: the bundle's
    default."""

    image: Picture
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    suppression: Suppression | None = None
    examples: Sequence[Example] = ()
    classifier: Classifier | None = None


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


@dataclass(frozen=True)
class Regions:
    """What the graph `regions` found in one picture. ``outputs``: its answer; ``frame`` maps its boxes to the
    picture."""

    outputs: Arrays
    frame: Frame

    @property
    def boxes(self) -> Array:
        """float32 [P, 4] x0 y0 x1 y1 in pixels of the upright picture, those with an objectness over 0."""
        found: Array = self.frame.to_original(self.outputs["boxes"][0][self.outputs["objectness"][0] > 0])
        return found


def detect(bundle: Bundle, request: DetectRequest) -> Flow[Detections]:
    """Raises `TaskNotServed`, `TooManyLabels` (there is nothing to look for), `BadRequest` and `InputError`s."""
    bundle.require("detect")
    settings = request.suppression or default_suppression(bundle)
    settings.tensors()  # said before the picture is decoded
    classifier = chosen(bundle, request.classifier, request.labels, request.templates, optional=bool(request.examples))
    feeds, frame = yield from prepared(bundle, request.image, "regions")
    names: list[str] = []
    queries: list[Array] = []
    if classifier:
        queries.append((yield from label_vectors(bundle, classifier)))
        names += classifier.labels
    for number, example in enumerate(request.examples):
        queries.append((yield from _embed_example(bundle, number, example)))
        names.append(f"example {number}" if example.label is None else example.label)
    outputs = yield Call("regions", feeds)
    return (yield from compare(bundle, Regions(outputs, frame), np.concatenate(queries), names, settings))


def propose(bundle: Bundle, image: Picture) -> Flow[Regions]:
    """The regions of one picture, to be asked about as often as one likes, see `find`."""
    bundle.require("detect")
    feeds, frame = yield from prepared(bundle, image, "regions")
    outputs = yield Call("regions", feeds)
    return Regions(outputs, frame)


def find(
    bundle: Bundle,
    regions: Regions,
    labels: Sequence[str] = (),
    templates: Sequence[str] = (),
    suppression: Suppression | None = None,
) -> Flow[Detections]:
    """Labels among regions that were proposed before: one run of the small graph `detect`."""
    classifier = chosen(bundle, None, labels, templates)
    assert classifier is not None
    queries = yield from label_vectors(bundle, classifier)
    settings = suppression or default_suppression(bundle)
    return (yield from compare(bundle, regions, queries, classifier.labels, settings))


def chosen(
    bundle: Bundle,
    classifier: Classifier | None,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    optional: bool = False,
) -> Classifier | None:
    """The classifier whose labels are looked for; None where ``optional`` and the caller named none."""
    if optional and not labels and (classifier is None or not classifier.labels):
        return None
    own = bundle.classifier if classifier is None else classifier.over(bundle.classifier)
    found = own.asked(labels, templates)
    require_labels(found.labels)
    return found


def compare(
    bundle: Bundle, regions: Regions, queries: Array, names: Sequence[str], settings: Suppression
) -> Flow[Detections]:
    """queries float32 [Q, D] unit rows, called ``names``, against regions, through the `detect` graph."""
    outputs, frame, tensors = regions.outputs, regions.frame, settings.tensors()
    wanted = bundle.graph("detect").inputs.keys() & outputs.keys()
    feeds = {name: outputs[name] for name in sorted(wanted)}
    most = settings.max_output
    beside = np.count_nonzero(~_inside(frame.to_original(outputs["boxes"][0])))  # which shall cost no other its place
    tensors["max_output"] = tensors["max_output"] + beside * len(names)
    found = yield Call("detect", {**feeds, "text_embeds": queries, **tensors})

    boxes = frame.to_original(found["kept_boxes"])
    rows = zip(*(found[name] for name in ("classes", "scores", "raw_scores")), boxes, _inside(boxes), strict=True)
    kept = [Detection(names[c], int(c), float(score), float(raw), box) for c, score, raw, box, inside in rows if inside]
    return Detections(frame.width, frame.height, tuple(kept[:most]), int(found["candidates"][0]))


def _inside(boxes: Array) -> Array:
    """Boxes [N, 4] cut to the picture -> bool [N]: what is left of the others lies in what was added to the picture."""
    inside: Array = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return inside


def _embed_example(bundle: Bundle, number: int, example: Example) -> Flow[Array]:
    """-> float32 [1, D], the query. Raises `InputError`s that name the example."""
    with _named(number):
        _check(example)
        feeds, frame = yield from prepared(bundle, example.image, "regions")  # type: ignore[arg-type]
        whole = (0.0, 0.0, frame.width, frame.height)
        box = _within(whole if example.box is None else example.box, frame)
    regions = yield Call("regions", feeds)
    with _named(number):
        return pick(regions, frame.to_input(box), drawn=example.box is not None)


@contextmanager
def _named(number: int) -> Iterator[None]:
    """What the caller did wrong in one example is said of that example."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"example {number}: {error}") from None


def _check(example: Example) -> None:
    """Raises `BadRequest` where the example says nonsense."""
    if example.label is not None and not example.label.strip():
        raise BadRequest("its label is empty; expected some words, or none at all")
    if example.box is not None:
        box = [*map(float, example.box)]
        if len(box) != 4 or not all(map(isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
            raise BadRequest(f"box is {box}; expected x0, y0, x1, y1 in pixels, x0 < x1 and y0 < y1")


def _within(box: Sequence[float] | Array, frame: Frame) -> Array:
    """What of the box is in the picture. Raises `BadRequest` when nothing is."""
    cut: Array = np.clip(np.array(box, np.float64), 0.0, [frame.width, frame.height] * 2).astype(np.float32)
    if not (cut[0] < cut[2] and cut[1] < cut[3]):
        raise BadRequest(f"box {[*box]} lies outside of its picture, {frame.width} x {frame.height} pixels")
    return cut


def check(manifest: Manifest) -> None:
    if manifest.classifier is None:
        raise ValueError("task 'detect' needs `classifier`, whose templates say how a label is read")
    made, taken = manifest.graphs["regions"].outputs, manifest.graphs["detect"].inputs
    exactly("regions", "outputs", made, REGIONS, also=made)
    exactly("detect", "inputs", taken, (*QUERIED, *SUPPRESSION), also=made)
    exactly("detect", "outputs", manifest.graphs["detect"].outputs, DETECTED)
    for name in made.keys() & taken.keys():
        if made[name].dtype != taken[name].dtype or not fits((1, *made[name].shape[1:]), taken[name].shape):
            raise ValueError(f"`detect` takes {name!r} as another tensor than `regions` answers")


def example(bundle: Bundle, picture: bytes) -> DetectRequest:
    return DetectRequest(picture, () if bundle.classifier.labels else ("a thing",))


def _options(options: ArgumentParser) -> None:
    options.add_argument("--label", action="append", default=[], help="may be given many times; else the bundle's own")
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; may be given many times")
    options.add_argument("--example", action="append", default=[], help="a picture of what is looked for")
    options.add_argument("--top", type=int, default=5, dest="max_output", help="at most so many boxes (default 5)")
    options.add_argument("--method", choices=METHODS, help="it and what follows: else the bundle's default")
    for name in ("sigma", "iou-threshold", "min-score"):
        options.add_argument(f"--{name}", type=float)


def _answers(runner: "Runner", given: Namespace) -> Iterator[dict[str, Any]]:
    asked = {name: getattr(given, name) for name in ("method", "sigma", "iou_threshold", "min_score", "max_output")}
    asked = {name: value for name, value in asked.items() if value is not None}
    how = replace(default_suppression(runner.bundle), **asked)
    many = runner.detect_many(
        given.pictures, given.label, templates=given.template, suppression=how, examples=given.example
    )
    for path, found in zip(given.pictures, many, strict=True):
        rows = [
            {"label": d.label, "score": d.score, "raw_score": d.raw_score, "box": [round(float(x), 1) for x in d.box]}
            for d in found
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
        roles={"regions": ImagePreprocess, "text": TextPreprocess, "detect": None},
        check=check,
        command=Command(_options, _answers, _line),
    )
)
