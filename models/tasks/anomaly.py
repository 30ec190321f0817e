"""Picture -> how damaged it looks, and where: a score, a map, and a verdict where a threshold is known.

text    the rule of WinCLIP (`models.tasks.winclip`): the whole picture and windows of its dense map beside sentences of
        a normal and of a damaged thing. The score is the mean of the whole picture's and of the map's highest value.
memory  the distance of each cell to the patches of normal pictures, by a classifier with the head `memory`. The score
        is the highest distance.
both    the map is the mean of both maps; the score is the mean of the whole picture's score by text and of the highest
        distance.
graph   the map and the score of the graph `anomaly`, whose sentences were learnt; the map is smoothed by a Gaussian.

The graph `anomaly`: pixels -> `map` float32 [B, h, w] and `score` float32 [B], both from 0 to 1.

Source: WinCLIP, Jeong et al. 2023 (arXiv 2303.14814), sections 4.3 and 4.4; PatchCore, Roth et al. 2022
(arXiv 2106.08265); AnomalyCLIP, Zhou et al. 2024 (arXiv 2310.18961), section 3.4 and its code.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, TaskNotServed
from calmclip.models.flow import Array, Call, Flow, Work
from calmclip.models.heads.memory import Params, distances, threshold
from calmclip.models.preprocess.image import Picture
from calmclip.models.preprocess.placement import Frame
from calmclip.models.stored_classifier import read_classifier
from calmclip.models.tasks import TASKS, Command, Task, exactly, heat
from calmclip.models.tasks.cells import Cells, Look, cells, look
from calmclip.models.tasks.features import Driver, each, labels, prepared
from calmclip.models.tasks.fit import CLIP_SCALE
from calmclip.models.tasks.regions import check_dense
from calmclip.models.tasks.winclip import states, text_scores

Method = Literal["text", "memory", "both", "graph"]
SIGMA = 4.0  # pixels of the input of the graph `anomaly`


@dataclass(frozen=True)
class AnomalyRequest:
    """``thing``: what the picture shows, such as "bottle"; "": an object. ``normal`` and ``damaged``: phrases of both
    states, each with a ``{}`` for the thing; ``templates``: sentences, each with a ``{}`` for the phrase; what is empty
    is the bundle's, else that of `states`. ``classifier``: fitted to normal pictures. ``method``: None: the best that
    bundle and classifier allow. ``threshold``: of the verdict; None: that of the classifier, if it has a threshold."""

    image: Picture
    thing: str = ""
    normal: Sequence[str] = ()
    damaged: Sequence[str] = ()
    templates: Sequence[str] = ()
    classifier: Classifier | None = None
    method: Method | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Anomaly:
    """``width``, ``height``: the size of the upright picture. ``score``: 0 to 1, higher is more damaged; scores of two
    methods cannot be compared. ``map`` float32 [h, w], 0 to 1, covers the whole picture in its proportions; its longer
    side is `heat.MAP_SIDE`. ``threshold``: in units of the score, None if none is known. ``levels``: the values of the
    map that the heat map shows as black and as white."""

    width: int
    height: int
    score: float
    map: Array
    method: Method
    threshold: float | None = None
    levels: tuple[float, float] = (0.0, 1.0)

    @property
    def is_damaged(self) -> bool | None:
        """Whether the score is above the threshold; None without a threshold."""
        return None if self.threshold is None else self.score > self.threshold

    def png(self) -> bytes:
        """The heat map, as large as the upright picture: black, red, yellow, white. At most a byte for each pixel."""
        return heat.png(self.map, (self.width, self.height), *self.levels)


@dataclass(frozen=True)
class Scored:
    """``score``, and ``plane`` float32 [h, w], of the cells ``where``. ``sigma``: of the Gaussian, as a part of each
    side of the graph's input."""

    score: float
    plane: Array
    where: Cells
    frame: Frame
    sigma: tuple[float, float] = (0.0, 0.0)

    @property
    def map(self) -> Array:
        """On the picture, see `Anomaly`."""
        plane = heat.on_picture(self.plane, self.where, self.frame)
        rows, columns = (part * cells for part, cells in zip(self.sigma, plane.shape, strict=True))
        return heat.smoothed(plane, (rows, columns))


@dataclass(frozen=True)
class Memory:
    """``patches`` float32 [M, D], unit rows."""

    patches: Array
    threshold: float | None

    def plane(self, seen: Look) -> Array:
        """float32 [h, w]: the distance of each cell."""
        return distances(seen.rows, self.patches).reshape(seen.patches.shape[:2])


def anomaly(bundle: Bundle, request: AnomalyRequest) -> Flow[Anomaly]:
    """Raises `TaskNotServed`, `ClassifierMismatch`, `BadRequest` and the `InputError`s of pictures and texts."""
    bundle.require("anomaly")
    if request.threshold is not None and not 0 <= request.threshold <= 1:
        raise BadRequest(f"threshold is {request.threshold}; expected 0 to 1")
    memory = _memory(bundle, request.classifier)
    method = request.method or _best(bundle, memory)
    if method not in METHODS:
        raise BadRequest(f"method is {method!r}; expected {', '.join(METHODS)}, or none")
    scored = yield from METHODS[method](bundle, request, memory)
    known = memory.threshold if memory and method == "memory" else None
    limit = known if request.threshold is None else request.threshold
    high = HIGHEST[method] if limit is None else min(1.0, 2 * limit)
    plane = yield Work("postprocess", lambda: scored.map)
    frame = scored.frame
    return Anomaly(frame.width, frame.height, scored.score, plane, method, limit, (0.0, high))


def _best(bundle: Bundle, memory: Memory | None) -> Method:
    if memory:
        return "memory"
    return "graph" if "anomaly" in bundle.manifest.graphs else "text"


def _memory(bundle: Bundle, classifier: Classifier | None) -> Memory | None:
    """None without a classifier. Raises `BadRequest` for another head, `ClassifierMismatch`."""
    if classifier is None:
        return None
    if classifier.head != "memory":
        raise BadRequest(
            f"the classifier has the head {classifier.head!r}; anomaly needs one that is fitted to normal pictures by "
            "the head 'memory'"
        )
    classifier.require_family(bundle.family, bundle.name)
    params = classifier.bound.params
    assert isinstance(params, Params)
    return Memory(classifier.assets["patches"], threshold(classifier.assets, params))


def _by_text(bundle: Bundle, request: AnomalyRequest, memory: Memory | None) -> Flow[Scored]:
    seen, whole, plane = yield from _told(bundle, request)
    return Scored((whole + float(plane.max())) / 2, plane, seen.where, seen.frame)


def _by_memory(bundle: Bundle, request: AnomalyRequest, memory: Memory | None) -> Flow[Scored]:
    remembered = _required(memory)
    seen = yield from look(bundle, request.image)
    plane = yield Work("postprocess", lambda: remembered.plane(seen))
    return Scored(float(plane.max()), plane, seen.where, seen.frame)


def _by_both(bundle: Bundle, request: AnomalyRequest, memory: Memory | None) -> Flow[Scored]:
    remembered = _required(memory)
    seen, whole, told = yield from _told(bundle, request)
    plane = yield Work("postprocess", lambda: remembered.plane(seen))
    return Scored((whole + float(plane.max())) / 2, (told + plane) / 2, seen.where, seen.frame)


def _by_graph(bundle: Bundle, request: AnomalyRequest, memory: Memory | None) -> Flow[Scored]:
    if "anomaly" not in bundle.manifest.graphs:
        raise TaskNotServed(
            f"bundle {bundle.name!r} has no graph 'anomaly'; export its checkpoint with --anomalyclip FILE",
            known=sorted(bundle.manifest.graphs),
        )
    feeds, frame = yield from prepared(bundle, request.image, "anomaly")
    outputs = yield Call("anomaly", feeds)
    plane, size = outputs["map"][0], bundle.image("anomaly").spec.size
    where = cells(frame, size, plane.shape)
    return Scored(float(outputs["score"][0]), where.of(plane), where, frame, (SIGMA / size[0], SIGMA / size[1]))


def _required(memory: Memory | None) -> Memory:
    if memory is None:
        raise BadRequest("no classifier was given; expected one that is fitted to normal pictures by the head 'memory'")
    return memory


METHODS: Mapping[Method, Callable[[Bundle, AnomalyRequest, Memory | None], Flow[Scored]]] = {
    "text": _by_text,
    "memory": _by_memory,
    "both": _by_both,
    "graph": _by_graph,
}
HIGHEST: Mapping[Method, float] = {
    "text": 1.0,
    "memory": 0.5,
    "both": 0.75,
    "graph": 1.0,
}  # white of a heat map, if no threshold is known


def _told(bundle: Bundle, request: AnomalyRequest) -> Flow[tuple[Look, float, Array]]:
    """The picture, and its `text_scores`."""
    if "text" not in bundle.manifest.graphs:
        raise TaskNotServed(
            f"bundle {bundle.name!r} has no graph 'text', which reads the states; send a classifier that is fitted to "
            "normal pictures",
            known=sorted(bundle.manifest.graphs),
        )
    told = states(bundle.manifest.anomaly, request.thing, request.normal, request.damaged, request.templates)
    seen = yield from look(bundle, request.image)
    sides = yield from labels(bundle, told)
    whole, plane = yield Work("postprocess", lambda: text_scores(seen.patches, sides, _scale(bundle)))
    return seen, whole, plane


def _scale(bundle: Bundle) -> float:
    """That of the bundle's head, which is the tower's."""
    classifier = bundle.classifier
    return float(getattr(classifier.bound.params, "scale", CLIP_SCALE)) if classifier.head else CLIP_SCALE


def check(manifest: Manifest) -> None:
    """Raises `ValueError`."""
    check_dense(manifest)
    if graph := manifest.graphs.get("anomaly"):
        exactly("anomaly", "outputs", graph.outputs, ("map", "score"))
        if (len(graph.outputs["map"].shape), len(graph.outputs["score"].shape)) != (3, 1):
            raise ValueError("the outputs of graph 'anomaly' must be 'map' float32 [B, h, w] and 'score' float32 [B]")


def example(bundle: Bundle, picture: bytes) -> AnomalyRequest | None:
    """Few sentences: all of them take longer than a warm-up should."""
    if "text" not in bundle.manifest.graphs and "anomaly" not in bundle.manifest.graphs:
        return None
    return AnomalyRequest(picture, normal=["{}"], damaged=["damaged {}"], templates=["{}"])


def _options(options: ArgumentParser) -> None:
    options.add_argument("--thing", default="", help="what the pictures show, such as 'bottle' (default: an object)")
    options.add_argument("--normal", action="append", default=[], help="a phrase with {}; may be given many times")
    options.add_argument("--damaged", action="append", default=[], help="a phrase with {}; may be given many times")
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; may be given many times")
    options.add_argument("--classifier", type=Path, metavar="FILE", help="NAME.json of `calmclip fit --method memory`")
    options.add_argument(
        "--method", choices=sorted(METHODS), help="default: memory with --classifier, else graph, else text"
    )
    options.add_argument("--threshold", type=float, help="the score above which a picture counts as damaged, 0 to 1")
    options.add_argument("--heat", type=Path, metavar="DIR", help="where the heat maps go, as NAME.png")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    classifier = read_classifier(options.classifier).classifier if options.classifier else None
    phrases = (options.thing, options.normal, options.damaged, options.template)
    request = AnomalyRequest(b"", *phrases, classifier, options.method, options.threshold)
    files = [options.heat / f"{path.stem}.png" if options.heat else None for path in options.pictures]
    if options.heat:
        if len({*files}) < len(files):
            raise BadRequest("two pictures have one name, and would be one file; give pictures with different names")
        options.heat.mkdir(parents=True, exist_ok=True)
    heat = dict(zip(options.pictures, files, strict=True))
    answers = each(driver, options.pictures, lambda path: anomaly(driver.bundle, replace(request, image=path)))
    for path, answer in answers:
        if file := heat[path]:
            file.write_bytes(answer.png())
        yield {
            "picture": str(path), "score": answer.score, "threshold": answer.threshold, "damaged": answer.is_damaged,
            "method": answer.method, "heat": file and str(file),
        }  # fmt: skip


VERDICTS = {True: "damaged", False: "normal", None: "no threshold"}


def _line(answer: dict[str, Any]) -> str:
    saved = f" -> {answer['heat']}" if answer["heat"] else ""
    return f"{answer['picture']}  {answer['score']:.3f}  {VERDICTS[answer['damaged']]} ({answer['method']}){saved}"


TASKS.register("anomaly")(
    Task(
        name="anomaly",
        summary="picture -> how damaged it looks, and where: score and map",
        request=AnomalyRequest,
        flow=anomaly,
        example=example,
        roles={"dense": ImagePreprocess, "anomaly": ImagePreprocess},
        any_role=True,
        follows="embed",
        check=check,
        command=Command(_options, _answers, _line),
    )
)
