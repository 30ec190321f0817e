"""Ways to a map of labels of a picture, for `tests.bench.segment` and `tests.bench.outlines`: controls, and the methods
of `segment`. A way is a flow, which answers a map for each threshold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.cache import RowCache
from calmclip.models.classifier import Classifier
from calmclip.models.evals.outlined import NONE
from calmclip.models.flow import Array, Arrays, Cached, CacheGet, CachePut, Call, Flow, drive
from calmclip.models.preprocess.placement import Frame
from calmclip.models.runner import Runner
from calmclip.models.segmenters import SEGMENTERS, Scene, ScoreMap
from calmclip.models.tasks.detect import default_suppression, find, propose
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.features import pictures
from calmclip.models.tasks.segment import LEAST, SAME, SegmentRequest, background_of, segment, weights, working_size

T = TypeVar("T")
Thresholds = Sequence[float]
LabelMaps = Sequence[Array]  # for each threshold int16 [h, w]: indices of labels, or `NONE`
WINDOWS = 5  # a side; each a third of the picture wide and high, so that neighbours share half
COSINES = tuple(round(float(x), 3) for x in np.arange(-0.1, 0.161, 0.02))  # by which a label beats the background
SCORES = tuple(round(float(x), 2) for x in np.arange(0.05, 0.8, 0.05))
LOGITS = tuple(round(float(x), 2) for x in np.arange(-2.0, 3.1, 0.5))
CHANCES = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4)

WayFlow = Callable[[Bundle, Scene, Thresholds], Flow[LabelMaps]]


@dataclass(frozen=True)
class Way:
    """``thresholds``: those of the sweep."""

    title: str
    thresholds: Thresholds
    flow: WayFlow
    why_not: Callable[[Manifest], str | None] = lambda manifest: None


class Recorded:
    """Drives flows over a bundle. With a folder it keeps the answer of each graph there, under the digests of the
    graph's files and inputs; a later run reads it instead of running the graph."""

    def __init__(self, runner: Runner, folder: Path | None = None) -> None:
        self.runner = runner
        self.bundle = runner.bundle
        self.folder = folder
        self.rows = RowCache(32_768)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, flow: Flow[T]) -> T:
        return drive(flow, self._call, None, self._cached)

    def _cached(self, asked: CacheGet | CachePut) -> Cached:
        return self.rows.answer(self.bundle.digest, asked)

    def _call(self, call: Call) -> Arrays:
        session = self.runner.session(call.graph)
        if call.keys is not None:
            part = self.rows.split(self.bundle.digest, call)
            return part.complete(session.run(part.feeds) if part.feeds else {})
        if self.folder is None:
            return session.run(call.feeds)
        digest = blake2b(self._files(call.graph).encode(), digest_size=20)
        for name, array in sorted(call.feeds.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        file = self.folder / f"{digest.hexdigest()}.npz"
        if file.exists():
            with np.load(file) as kept:
                return dict(kept)
        outputs = session.run(call.feeds)
        np.savez(file, allow_pickle=False, **outputs)
        return outputs

    def _files(self, role: str) -> str:
        """The digests of the graph and of the weights that graphs share."""
        graph = Path(self.bundle.graph(role).file)
        files = {Path(path): file.sha256 for path, file in self.bundle.manifest.files.items()}
        return " ".join(files[path] for path in sorted(files) if path == graph or path.suffix == ".bin")


def scene(
    bundle: Bundle, image: Image.Image, labels: Sequence[str], background: Sequence[str] | None = None
) -> Flow[Scene]:
    """``background`` None: the bundle's words."""
    classifier = bundle.classifier_for(None, labels, ())
    text = yield from label_vectors(bundle, classifier)
    words = background_of(bundle, background)
    rows = np.empty((0, text.shape[1]), np.float32)
    if words:
        rows = yield from label_vectors(bundle, Classifier(words, classifier.templates))
        rows = rows[(rows @ text.T).max(axis=1) < SAME]
    return Scene(image, tuple(labels), text, rows)


def compared(scores: ScoreMap, thresholds: Thresholds) -> LabelMaps:
    """A label is drawn where its logit is the highest and beats the background's by more than the threshold."""
    down, across = weights(scores.frame, scores.background.shape)
    best = np.full((len(down), across.shape[1]), -np.inf, np.float32)
    index = np.full(best.shape, NONE, np.int16)
    for number, logits in enumerate(scores.labels):
        if (logits - scores.background).max() <= min(thresholds):
            continue  # nowhere drawn, and enlarging takes the time
        plane = down @ logits.clip(LEAST, None) @ across
        index[plane > best] = number
        np.maximum(best, plane, out=best)
    margin = best - down @ scores.background.clip(LEAST, None) @ across
    return [np.where(margin > threshold, index, np.int16(NONE)) for threshold in thresholds]


def by_margin(name: str, params: Mapping[str, Any]) -> WayFlow:
    """The threshold is what `compared` asks for."""
    segmenter = SEGMENTERS.get(name)
    chosen = segmenter.params.model_validate(params)

    def flow(bundle: Bundle, scene: Scene, thresholds: Thresholds) -> Flow[LabelMaps]:
        return compared((yield from segmenter.flow(bundle, scene, chosen)), thresholds)

    return flow


def by_param(name: str, param: str) -> WayFlow:
    """The threshold is a param of the method, which runs once for each."""
    segmenter = SEGMENTERS.get(name)

    def flow(bundle: Bundle, scene: Scene, thresholds: Thresholds) -> Flow[LabelMaps]:
        maps: list[Array] = []
        for threshold in thresholds:
            chosen = segmenter.params.model_validate({param: threshold})
            maps += compared((yield from segmenter.flow(bundle, scene, chosen)), (0.0,))
        return maps

    return flow


def crops(bundle: Bundle, scene: Scene, thresholds: Thresholds) -> Flow[LabelMaps]:
    """The vectors of 5 x 5 windows, each read by the image tower as a picture. A place has the mean cosine of the
    windows that cover it."""
    width, height = scene.image.size
    cells = WINDOWS + 1
    x, y = (np.linspace(0, size, cells + 1).round().astype(int).tolist() for size in (width, height))
    places = [(i, j) for i in range(WINDOWS) for j in range(WINDOWS)]
    parts = [scene.image.crop((x[j], y[i], x[j + 2], y[i + 2])) for i, j in places]
    vectors = yield from pictures(bundle, parts)
    logits, visits = np.zeros((cells, cells, len(scene.text)), np.float32), np.zeros((cells, cells, 1), np.float32)
    others = np.zeros((cells, cells), np.float32)
    for (i, j), vector in zip(places, vectors, strict=True):
        logits[i : i + 2, j : j + 2] += scene.text @ vector
        others[i : i + 2, j : j + 2] += (scene.background @ vector).max()
        visits[i : i + 2, j : j + 2] += 1
    frame = Frame(width, height, (cells / width, cells / height), (0.0, 0.0))
    return compared(ScoreMap((logits / visits).transpose(2, 0, 1), others / visits[:, :, 0], frame), thresholds)


def filled(bundle: Bundle, scene: Scene, thresholds: Thresholds) -> Flow[LabelMaps]:
    """The boxes of `detect`, drawn as rectangles by rising score / root of the area."""
    regions = yield from propose(bundle, scene.image)
    settings = replace(default_suppression(bundle), min_score=SCORES[0], max_output=100)
    detections = [*(yield from find(bundle, regions, scene.labels, (), settings))]
    width, height = working_size(*scene.image.size)
    scale = np.array([width / scene.image.width, height / scene.image.height] * 2)
    boxes = [(each.box * scale).round().astype(int).tolist() for each in detections]
    areas = [max((x1 - x0) * (y1 - y0), 1) for x0, y0, x1, y1 in boxes]
    order = sorted(range(len(boxes)), key=lambda n: detections[n].score / areas[n] ** 0.5)

    def drawn(threshold: float) -> Array:
        labels = np.full((height, width), NONE, np.int16)
        for n in order:
            if detections[n].score > threshold:
                x0, y0, x1, y1 = boxes[n]
                labels[y0:y1, x0:x1] = detections[n].index
        return labels

    return [drawn(threshold) for threshold in thresholds]


def answered(bundle: Bundle, scene: Scene, thresholds: Thresholds) -> Flow[LabelMaps]:
    """The task `segment` as it is, with all its defaults; it has no threshold."""
    segments = yield from segment(bundle, SegmentRequest(scene.image, scene.labels))
    labels = np.full((segments.height, segments.width), NONE, np.int16)
    for each in reversed(segments.segments):
        labels[each.mask.pixels()] = each.index
    return [labels] * len(thresholds)


def _no_regions(manifest: Manifest) -> str | None:
    return None if "regions" in manifest.graphs else "it has no graph 'regions'"


def ways() -> dict[str, Way]:
    """By the name that a command line gives."""
    no_dense, no_boxes = (SEGMENTERS.get(name).why_not for name in ("maskclip", "boxes"))
    alone = by_margin("maskclip", {"scale": 1.0, "bias": 0.0})
    mixed = by_margin("boxes", {"near": 2.0, "bias": 0.0})
    excel, plain = by_margin("excel", {}), by_margin("excel", {"stretch": False, "scale": 1.0})
    no_excel = SEGMENTERS.get("excel").why_not
    return {
        "crops": Way("5 x 5 window crops through the image tower", COSINES, crops),
        "dense": Way("dense map alone (`maskclip`)", COSINES, alone, no_dense),
        "affinity": Way("dense map + affinity (`boxes`, no label known)", LOGITS, mixed, no_boxes),
        "excel": Way("`excel` without attributes", LOGITS, excel, no_excel),
        "excel-plain": Way("the same with `stretch=false`", COSINES, plain, no_excel),
        "filled": Way("detector boxes filled (control)", SCORES, filled, _no_regions),
        "boxes": Way("detector boxes + mask head (`boxes`)", CHANCES, by_param("boxes", "min_score"), no_boxes),
        "default": Way("`segment` with the bundle's defaults", (0.0,), answered),
    }
