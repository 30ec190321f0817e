"""Picture and labels -> a mask for each label, in pixels of the upright original.

A method of the family segmenters gives a coarse map of logits. They are enlarged bilinearly to a working size of at
most `LONG_SIDE` pixels, strip by strip; there each pixel gets its label. The masks of the original are their nearest
neighbours, as runs: memory grows with neither the pixels of the original nor the labels.

Boxes are those of connected components, through soft-NMS: Bodla et al. 2017 (arXiv 1704.04503).
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, suggestion
from calmclip.models.flow import Array, Flow, Work
from calmclip.models.labels import check_distinct, listed
from calmclip.models.ops.reference import soft_nms
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import Scene, ScoreMap, Windows, chosen, default, fitting
from calmclip.models.stored_classifier import read_classifier
from calmclip.models.suppression import Suppression
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.components import Components, components
from calmclip.models.tasks.features import Driver, each
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.masks import Mask, Painted, indexed_png, palette, starts

LONG_SIDE = 512  # of the plane on which pixels get their labels
STRIP = 1 << 20  # numbers of a strip of logits
MAX_RUNS = 1_000_000  # of all masks of an answer: about 3 MB as text
MAX_BACKGROUND = 100  # words
MAX_COLOURS = 255  # labels of one indexed PNG
LEAST = -1e4  # of a logit: what is less likely counts as that, so that no infinity is interpolated
COMPONENTS = 300  # of a label that soft-NMS compares, the largest
LEAST_PART = 1e-3  # of the picture: a smaller component has no box, if it is not the largest of its label
BACKGROUND = (
    "the sky", "grass", "a wall", "the floor", "the ground", "trees", "water", "a road", "a building",
    "a blurry background", "texture", "part of something",
)  # fmt: skip
SAME = 0.95  # cosine of two texts that mean the same, such as "sky" and "the sky"
BOXES = Suppression(min_score=0.0, max_output=20)


@dataclass(frozen=True)
class SegmentRequest:
    """``labels`` and ``templates`` (each with a ``{}``): if empty, those of ``classifier``, else those of the bundle.
    The templates also make sentences of the background's words. The head is not used, but for vectors of its own.

    ``method``: of the family segmenters, with its ``params``; None: the bundle's. ``background``: words for what is
    none of the labels, empty: there is no such thing; None: the bundle's, else `BACKGROUND`, in both cases without
    those that mean the same as a label. A pixel whose label is less likely than ``threshold`` belongs to none; None:
    with ``independent`` 0.5, else the bundle's, else 0.
    ``independent``: each label is compared with the background alone, so masks may overlap. ``windows``: the graph sees
    parts of the picture. ``suppression``: of boxes of one label; None: `BOXES`.
    """

    image: Picture
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    classifier: Classifier | None = None
    method: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    background: Sequence[str] | None = None
    threshold: float | None = None
    independent: bool = False
    windows: Windows | None = None
    suppression: Suppression | None = None


@dataclass(frozen=True)
class Segment:
    """``score``: the mean over the mask of the label's probability. ``area`` in pixels. ``boxes`` float32 [N, 4]
    x0 y0 x1 y1 in pixels of the upright picture, of the mask's connected components, best first; ``box_scores`` float32
    [N]: the mean probability in the component, after suppression."""

    label: str
    index: int  # in the labels of the request
    score: float
    area: int
    boxes: Array
    box_scores: Array
    mask: Mask


@dataclass(frozen=True)
class Segments:
    """Best first; a label without a pixel is not in it. ``width``, ``height``: the size of the upright picture.
    ``labels``: of the request."""

    width: int
    height: int
    segments: tuple[Segment, ...]
    labels: tuple[str, ...]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def png(self, label: str) -> bytes:
        """White where the label is, as large as the upright picture. Raises `BadRequest` for an unknown label."""
        if label not in self.labels:
            raise BadRequest(f"there is no label {label!r}; {suggestion(label, self.labels)}")
        empty = Mask(self.width, self.height, np.array([self.width * self.height]))
        return next((each.mask for each in self if each.label == label), empty).png()

    def indexed_png(self) -> bytes:
        """One picture for all labels: 0 where there is none, else 1 + the label's index; where masks overlap, the
        label of the best score. The file's text `labels` is JSON: value -> label. Raises `BadRequest` above
        `MAX_COLOURS` labels."""
        last = max((each.index for each in self), default=-1)
        if last >= MAX_COLOURS:
            raise BadRequest(
                f"the label {last} has a mask, and an indexed PNG has {MAX_COLOURS} colours for labels. Send fewer "
                "labels, or ask for a picture of each label"
            )
        masks = [(each.index + 1, each.mask) for each in reversed(self.segments)]
        labels = {each.index + 1: each.label for each in sorted(self.segments, key=lambda each: each.index)}
        return indexed_png(self.width, self.height, masks, palette(last + 1), labels)


def segment(bundle: Bundle, request: SegmentRequest) -> Flow[Segments]:
    """Raises `TaskNotServed` (also for a method that the bundle cannot run), `TooManyLabels` (no labels), `BadRequest`
    and `InputError`s."""
    bundle.require("segment")
    method, params = chosen(bundle.manifest, request.method, request.params)
    classifier = classifier_of(bundle, request)
    words = background_of(bundle, request.background)
    threshold = threshold_of(bundle, request)
    settings = request.suppression or BOXES
    settings.tensors()  # raises before the picture is decoded
    picture = yield Work("decode", lambda: load(request.image, max_pixels=bundle.max_pixels))
    text = yield from label_vectors(bundle, classifier)
    background = np.empty((0, text.shape[1]), np.float32)
    if words:
        background = yield from label_vectors(bundle, Classifier(words, classifier.templates))
    if request.background is None:  # words for any question: of some questions they are the answer
        background = background[(background @ text.T).max(axis=1, initial=-1.0) < SAME]
    lines = tuple(chain.from_iterable(classifier.descriptions.values()))
    scene = Scene(picture, classifier.labels, text, background, request.windows, lines)
    scores: ScoreMap = yield from method.flow(bundle, scene, params)
    if request.independent and scores.background.max() == -np.inf:
        raise BadRequest("independent compares each label with the background, and there is none; send `background`")
    layers = (independent if request.independent else exclusive)(scores, threshold)
    frame = scores.frame
    segments: Segments = yield Work(
        "postprocess", lambda: masked(classifier.labels, frame.width, frame.height, layers, settings)
    )
    return segments


def classifier_of(bundle: Bundle, request: SegmentRequest) -> Classifier:
    """The complete classifier. As in `detect`, its head is not used, but for the vectors that it may have.

    Raises `ClassifierMismatch`, `TooManyLabels` (no labels), `BadRequest` (a label that is given twice).
    """
    classifier = bundle.classifier_for(request.classifier, request.labels, request.templates)
    check_distinct(classifier.labels)
    if classifier.assets and classifier.bound.vectors(classifier.labels) is not None:
        classifier.require_family(bundle.family, bundle.name)
        classifier.bound.check(classifier.labels, bundle.dim)
    return classifier


def background_of(bundle: Bundle, words: Sequence[str] | None) -> tuple[str, ...]:
    """The request's, else the bundle's, else `BACKGROUND`. Raises `BadRequest`."""
    if words is None:
        settings = bundle.manifest.segmentation
        return BACKGROUND if settings is None or settings.background is None else settings.background
    checked = tuple(listed("background", words))
    if len(checked) > MAX_BACKGROUND:
        raise BadRequest(f"{len(checked)} background words were given; at most {MAX_BACKGROUND} are read")
    if not all(word.strip() for word in checked):
        raise BadRequest("a background word is empty; expected some words, or an empty list for no background")
    return tuple(dict.fromkeys(checked))


def threshold_of(bundle: Bundle, request: SegmentRequest) -> float:
    """Raises `BadRequest`."""
    if request.threshold is not None:
        if not 0 <= request.threshold <= 1:
            raise BadRequest(f"threshold is {request.threshold}; expected 0 to 1")
        return request.threshold
    if request.independent:
        return 0.5
    settings = bundle.manifest.segmentation
    return (settings and settings.threshold) or 0.0


@dataclass(frozen=True)
class Layer:
    """The plane on which pixels get their labels. ``names`` int [H, W]: the index of a label, below 0 for none;
    ``likely`` float32 [H, W]: its probability."""

    names: Array
    likely: Array


def exclusive(scores: ScoreMap, threshold: float) -> Iterator[Layer]:
    """A pixel has the label whose enlarged logit is best, or none if the background's is better, or if no method gave
    it a logit. The probabilities are softmax in each cell of the map, enlarged likewise."""
    down, across = weights(scores.frame, scores.background.shape)
    used, logits, lowest = seen(scores)
    chances = probabilities(logits, lowest, len(scores.labels) + 1 - len(used))
    may_win = contenders(logits)
    names = np.empty((len(down), across.shape[1]), np.int32)
    likely = np.empty(names.shape, np.float32)
    for strip, cells in strips(down, len(logits) * names.shape[1]):
        rows = down[strip, cells]
        able = np.flatnonzero(may_win[:, min(cells.start, may_win.shape[1] - 1)]).tolist()
        best, names[strip] = np.full(names[strip].shape, LEAST / 2, np.float32), -1
        for index, plane in zip(able, rows @ logits[able, cells] @ across, strict=True):
            np.copyto(names[strip], used[index], where=plane > best)
            np.maximum(best, plane, out=best)
        for index in able:
            np.copyto(likely[strip], rows @ chances[index, cells] @ across, where=names[strip] == used[index])
    names[(names == len(scores.labels)) | (likely < threshold)] = -1
    yield Layer(names, likely)


def seen(scores: ScoreMap) -> tuple[list[int], Array, float]:
    """-> the planes that are somewhere above the lowest logit of all, float32 [S, h, w], before them their indices (the
    background's is the last), and that logit, which all others have everywhere. At least one plane."""
    planes = (*scores.labels, scores.background)
    lowest = max(LEAST, float(min(scores.labels.min(), scores.background.min())))
    used = [index for index, plane in enumerate(planes) if plane.max() > lowest] or [0]
    return used, np.stack([planes[index] for index in used]).clip(LEAST, None), lowest


def probabilities(logits: Array, lowest: float, others: int) -> Array:
    """Softmax over the first axis of ``logits`` [S, h, w] and ``others`` more planes, which are ``lowest``."""
    top = logits.max(axis=0)
    powers = np.exp(logits - top)
    powers /= powers.sum(axis=0) + np.float32(others) * np.exp(np.float32(lowest) - top)
    chances: Array = powers
    return chances


def independent(scores: ScoreMap, threshold: float) -> Iterator[Layer]:
    """Each label against the background alone: a layer for each label."""
    down, across = weights(scores.frame, scores.background.shape)
    background = scores.background.clip(LEAST, None)
    for index, logits in enumerate(scores.labels):
        margin = (logits.clip(LEAST, None) - background).clip(-80, 80)
        likely = down @ (1 / (1 + np.exp(-margin))) @ across
        yield Layer(np.where(likely >= threshold, np.int32(index), np.int32(-1)), likely)


def strips(down: Array, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows that the enlargement ``down`` [H, h] makes of one or two rows of the map, and these; at most `STRIP` numbers
    in rows of ``width``."""
    first = (down > 0).argmax(axis=1)
    most = max(1, STRIP // width)
    edges = np.flatnonzero(np.diff(first, prepend=-1, append=-1))
    for start, end in pairwise(edges.tolist()):
        for top in range(start, end, most):
            yield slice(top, min(end, top + most)), slice(int(first[start]), int(first[start]) + 2)


def contenders(logits: Array) -> Array:
    """``logits`` [C, h, w] -> bool [C, max(1, h - 1)]: the planes that may be the best somewhere between a row and the
    next one. A plane is not if at each corner of four cells it is less than the least corner of another."""
    least = most = logits
    for axis in (1, 2):
        if logits.shape[axis] > 1:
            sides = (np.s_[:, :-1], np.s_[:, 1:]) if axis == 1 else (np.s_[:, :, :-1], np.s_[:, :, 1:])
            least = np.minimum(*(least[side] for side in sides))
            most = np.maximum(*(most[side] for side in sides))
    able: Array = (most >= least.max(axis=0)).any(axis=2)
    return able


def working_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the plane on which pixels get their labels."""
    ratio = min(1.0, LONG_SIDE / max(width, height))
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def weights(frame: Frame, grid: tuple[int, ...]) -> tuple[Array, Array]:
    """The matrices of the bilinear enlargement of a map of ``grid`` rows and columns: float32 [H, h] and [w, W]. Cells
    in the padding weigh nothing."""
    width, height = working_size(frame.width, frame.height)
    down = between(height, frame.height, frame.scale[1], frame.offset[1], grid[0])
    across = between(width, frame.width, frame.scale[0], frame.offset[0], grid[1])
    return down, np.ascontiguousarray(across.T)


def between(count: int, pixels: int, scale: float, offset: float, cells: int) -> Array:
    """float32 [count, cells], rows of sum 1: the two cells around each of ``count`` equal parts of an axis."""
    places = (np.arange(count) + 0.5) * (pixels / count) * scale + offset - 0.5
    first = min(max(int(np.floor(offset + 1e-6)), 0), cells - 1)
    last = max(min(int(np.ceil(pixels * scale + offset - 1e-6)), cells) - 1, first)
    places = places.clip(first, last)
    left = np.minimum(np.floor(places).astype(np.int64), max(last - 1, first))
    matrix = np.zeros((count, cells), np.float32)
    rows = np.arange(count)
    matrix[rows, np.minimum(left + 1, cells - 1)] = places - left
    matrix[rows, left] += 1 - (places - left)
    return matrix


def masked(labels: Sequence[str], width: int, height: int, layers: Iterable[Layer], settings: Suppression) -> Segments:
    """Raises `BadRequest` above `MAX_RUNS`."""
    segments, runs = [], 0
    for layer in layers:
        painted = Painted(layer.names, width, height)
        runs += painted.runs
        if runs > MAX_RUNS:
            raise BadRequest(
                f"the masks have more than {MAX_RUNS} runs of equal pixels; at most so many are answered. Send fewer "
                "labels, a higher threshold or a smaller picture"
            )
        parts = components(layer.names, layer.likely)
        for index in np.unique(parts.names).tolist():
            of = np.flatnonzero(parts.names == index)
            mask = painted.mask(index)
            score = float(parts.sums[of].sum() / parts.areas[of].sum())
            boxes, box_scores = boxes_of(parts, of, layer.names.shape, width, height, settings)
            segments.append(Segment(labels[index], index, score, mask.area, boxes, box_scores, mask))
    return Segments(width, height, tuple(sorted(segments, key=lambda each: -each.score)), tuple(labels))


def boxes_of(
    parts: Components, of: Array, size: tuple[int, ...], width: int, height: int, settings: Suppression
) -> tuple[Array, Array]:
    """The boxes of the components ``of`` a plane of ``size`` rows and columns: float32 [N, 4] in pixels of the picture,
    and their scores float32 [N], best first."""
    largest = of[np.argsort(-parts.areas[of], kind="stable")[:COMPONENTS]]
    visible = parts.areas[largest] >= LEAST_PART * size[0] * size[1]
    visible[0] = True
    chosen = largest[visible]
    x, y = starts(width, size[1]), starts(height, size[0])
    places = parts.boxes[chosen].T
    boxes = np.stack((x[places[0]], y[places[1]], x[places[2]], y[places[3]]), axis=1).astype(np.float32)
    kept = soft_nms(
        boxes,
        parts.sums[chosen] / parts.areas[chosen],
        method=settings.method,
        iou_threshold=settings.iou_threshold,
        sigma=settings.sigma,
        min_score=settings.min_score,
        max_output=settings.max_output,
    )
    return boxes[kept.indices], kept.scores.astype(np.float32)


def check(manifest: Manifest) -> None:
    one_space(manifest)
    if not {"image", "text"} <= manifest.graphs.keys():
        raise ValueError(f"task 'segment' needs graphs 'image' and 'text'; the graphs are {sorted(manifest.graphs)}")
    name = default(manifest)
    if name is None:
        raise ValueError(f"task 'segment' has no method for the graphs {sorted(manifest.graphs)}")
    if name not in fitting(manifest):
        raise ValueError(
            f"`segmentation.method` is {name!r}; the graphs serve {', '.join(fitting(manifest)) or 'none'}"
        )


def example(bundle: Bundle, picture: bytes) -> SegmentRequest:
    return SegmentRequest(picture, bundle.classifier.labels[:1] or ("a thing",), background=("the ground",))


def _options(options: ArgumentParser) -> None:
    options.add_argument("--label", action="append", default=[], help="may be given many times; else the bundle's own")
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; may be given many times")
    options.add_argument("--classifier", type=Path, metavar="FILE", help="NAME.json of 'calmclip fit' or of a service")
    options.add_argument("--method", help="of the family segmenters; else the bundle's, see 'calmclip plugins'")
    options.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="of the method; many times")
    options.add_argument("--background", action="append", metavar="WORD", help="what is none of the labels; many times")
    options.add_argument("--no-background", action="store_true", help="every pixel has a label")
    options.add_argument("--threshold", type=float, help="a pixel whose label is less likely has none, 0 to 1")
    options.add_argument("--independent", action="store_true", help="compare each label with the background alone")
    options.add_argument("--window", type=float, metavar="SIZE", help="look at parts, as a part of the shorter side")
    options.add_argument("--stride", type=float, default=0.5, help="between windows, as a part of one (default 0.5)")
    options.add_argument("--out", type=Path, metavar="DIR", help="write the masks of each picture, as NAME.png")
    options.add_argument("--each", action="store_true", help="with --out: a picture of each label, as NAME-INDEX.png")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    """Raises `BadRequest` for pictures whose files would have one name, and params that are no NAME=VALUE."""
    if options.out and len({path.stem for path in options.pictures}) < len(options.pictures):
        raise BadRequest("two pictures have one name, and would be one file; give pictures with different names")
    if options.background and options.no_background:
        raise BadRequest("--background and --no-background were given; expected one of them")
    request = SegmentRequest(
        b"",
        options.label,
        options.template,
        read_classifier(options.classifier).classifier if options.classifier else None,
        options.method,
        _params(options.param),
        () if options.no_background else options.background,
        options.threshold,
        options.independent,
        None if options.window is None else Windows(options.window, options.stride),
    )
    answers = each(driver, options.pictures, lambda path: segment(driver.bundle, replace(request, image=path)))
    for path, segments in answers:
        files = _write(segments, options.out, path.stem, options.each) if options.out else []
        rows = [
            {
                "label": each.label,
                "index": each.index,
                "score": each.score,
                "area": each.area,
                "boxes": each.boxes.tolist(),
                "box_scores": each.box_scores.tolist(),
                "mask": each.mask.rle(),
            }
            for each in segments
        ]
        yield {"picture": str(path), "size": [segments.width, segments.height], "segment": rows, "files": files}


def _params(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, the value a JSON value or else a text. Raises `BadRequest`."""
    params = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals:
            raise BadRequest(f"--param is {entry!r}; expected NAME=VALUE, such as scale=40")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value
    return params


def _write(segments: Segments, folder: Path, stem: str, each: bool) -> list[str]:
    """The paths of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    if not each:
        (folder / f"{stem}.png").write_bytes(segments.indexed_png())
        return [str(folder / f"{stem}.png")]
    files = []
    for part in segments:
        file = folder / f"{stem}-{part.index}.png"
        file.write_bytes(part.mask.png())
        files.append(str(file))
    return files


def _line(answer: dict[str, Any]) -> str:
    pixels = answer["size"][0] * answer["size"][1]
    rows = [
        f"  {row['score']:.3f}  {row['area'] / pixels:6.1%}  {len(row['boxes']):3d} boxes  {row['label']}"
        for row in answer["segment"]
    ]
    return "\n".join([answer["picture"], *(rows or ["  none of the labels"]), *(f"  -> {f}" for f in answer["files"])])


TASKS.register("segment")(
    Task(
        name="segment",
        summary="picture + labels -> a mask for each label, and the boxes of its parts",
        request=SegmentRequest,
        flow=segment,
        example=example,
        roles={"dense": ImagePreprocess, "masks": None},
        any_role=True,
        follows="classify",
        check=check,
        command=Command(_options, _answers, _line),
    )
)
