"""Pictures and one instruction, or one label of a classifier -> the pictures in order, with scores.

The score of a picture depends on this picture alone, so scores of several requests compare. A bundle with a graph
`rank` scores by it (`models.tasks.ranking_graph`), every other bundle by vectors. Source: Radford et al. 2021
(arXiv 2103.00020), for the cosine of a picture and a text.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow, Together
from calmclip.models.preprocess.image import Picture
from calmclip.models.stored_classifier import read_classifier
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.classify import chosen
from calmclip.models.tasks.features import Driver, each, labels, picture, texts
from calmclip.models.tasks.ranking_graph import RANK, scorer
from calmclip.models.tasks.ranking_graph import check as check_graph

Scale = Literal["cosine", "logit", "learned"]


@dataclass(frozen=True)
class RankRequest:
    """``instruction``: what the first pictures should show; or ``classifier``, with the ``label`` that they should have
    (None: its first). ``top``: how many pictures to answer; None: all."""

    images: Sequence[Picture] = ()
    instruction: str | None = None
    classifier: Classifier | None = None
    label: str | None = None
    top: int | None = None


@dataclass(frozen=True, slots=True)
class RankedPicture:
    index: int  # in the pictures of the request
    score: float


@dataclass(frozen=True)
class Ranks:
    """Best first; ties go to the lower index. ``scale``: what a score is.

    cosine: of the vectors of picture and instruction, -1 to 1. logit: of the head for the label, before temperature.
    learned: of the bundle's graph `rank`, of any size and sign.
    """

    pictures: tuple[RankedPicture, ...]
    scale: Scale

    def __iter__(self) -> Iterator[RankedPicture]:
        return iter(self.pictures)


@dataclass(frozen=True)
class Judge:
    """``score(image)``: the flow from one picture to its score."""

    scale: Scale
    score: Callable[[Picture], Flow[float]]


def rank(bundle: Bundle, request: RankRequest) -> Flow[Ranks]:
    """Raises `TaskNotServed`, `ClassifierMismatch`, `BadRequest` and `InputError`s."""
    require_pictures(request)
    judged = yield from judge(bundle, request)
    scores = yield Together([judged.score(image) for image in request.images])
    return ranks(judged.scale, scores, request.top)


def require_pictures(request: RankRequest) -> None:
    if not request.images:
        raise BadRequest("no pictures were given; expected at least one")
    if request.top is not None and request.top < 1:
        raise BadRequest(f"top is {request.top}; expected at least 1")


def judge(bundle: Bundle, request: RankRequest) -> Flow[Judge]:
    """What scores the pictures; ``images`` of the request are not read. Raises as `rank`."""
    bundle.require("rank")
    if RANK in bundle.manifest.graphs:
        if request.instruction is None or request.classifier is not None or request.label is not None:
            raise BadRequest(f"bundle {bundle.name!r} ranks by `instruction` alone; it has no vectors for a classifier")
        return Judge("learned", (yield from scorer(bundle, request.instruction)))
    scale, scored = yield from comparison(bundle, request)

    def score(image: Picture) -> Flow[float]:
        return float(scored((yield from picture(bundle, image)))[0])

    return Judge(scale, score)


def comparison(bundle: Bundle, request: RankRequest) -> Flow[tuple[Scale, Callable[[Array], Array]]]:
    """-> a function from unit rows float32 [N, D] to scores float32 [N]. Raises as `rank`."""
    if (request.instruction is None) == (request.classifier is None):
        raise BadRequest("expected `instruction` or `classifier`, one of them")
    if request.instruction is not None:
        if request.label is not None:
            raise BadRequest(f"the label {request.label[:100]!r} has no classifier; send `classifier`, or leave it out")
        (query,) = yield from texts(bundle, (request.instruction,))
        return "cosine", lambda rows: rows @ query
    classifier = chosen(bundle, request.classifier)
    column = _column(classifier, request.label)
    columns = classifier.bound.columns(classifier.labels, (yield from labels(bundle, classifier)))
    return "logit", lambda rows: classifier.bound.logits(rows, columns)[:, column]


def _column(classifier: Classifier, label: str | None) -> int:
    if label is None:
        return 0
    if label not in classifier.labels:
        known = ", ".join(map(repr, classifier.labels[:5])) + (", …" if len(classifier.labels) > 5 else "")
        raise BadRequest(f"the classifier has no label {label[:100]!r}; it has {known}")
    return classifier.labels.index(label)


def ranks(scale: Scale, scores: Sequence[float], top: int | None) -> Ranks:
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:top].tolist()
    return Ranks(tuple(RankedPicture(index, scores[index]) for index in order), scale)


def check(manifest: Manifest) -> None:
    (check_graph if RANK in manifest.graphs else one_space)(manifest)


def example(bundle: Bundle, picture: bytes) -> RankRequest:
    return RankRequest([picture], "a thing")


def _options(options: ArgumentParser) -> None:
    options.add_argument("--instruction", help="what the first pictures should show")
    options.add_argument("--classifier", type=Path, metavar="FILE", help="NAME.json of 'calmclip fit' or of a service")
    options.add_argument("--label", help="of the classifier; default: its first")
    options.add_argument("--top", type=int, help="how many pictures to print; default: all")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    stored = read_classifier(options.classifier).classifier if options.classifier else None
    request = RankRequest(options.pictures, options.instruction, stored, options.label, options.top)
    require_pictures(request)
    (judged,) = driver.map([judge(driver.bundle, replace(request, images=()))])
    places = {path: place for place, path in enumerate(options.pictures)}
    scored = [*each(driver, options.pictures, judged.score)]
    for ranked in ranks(judged.scale, [score for _, score in scored], request.top):
        path = scored[ranked.index][0]
        yield {"picture": str(path), "rank": {"index": places[path], "score": ranked.score}}


TASKS.register("rank")(
    Task(
        name="rank",
        summary="pictures + an instruction -> the pictures in order",
        request=RankRequest,
        flow=rank,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess},
        follows="classify",
        check=check,
        command=Command(_options, _answers, lambda answer: f"  {answer['rank']['score']:.3f}  {answer['picture']}"),
    )
)
