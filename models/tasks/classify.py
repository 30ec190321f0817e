"""Picture + labels -> ranked labels.

Source: Radford et al. 2021 (arXiv 2103.00020), zero-shot prediction; the head is the classifier's.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess
from calmclip.models.classifier import Classifier, check_none_below, check_temperature, require_labels
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Call, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.features import labels, output_of, picture, prepared

if TYPE_CHECKING:
    from calmclip.models.runner import Runner


@dataclass(frozen=True)
class ClassifyRequest:
    """``labels`` and ``templates`` (each with a ``{}``) win over those of ``classifier``, and these over the bundle's.

    ``top_k`` None: all labels. ``temperature`` and ``none_below`` None: the classifier's, see `Classifier`.
    """

    image: Picture
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    top_k: int | None = None
    temperature: float | None = None
    none_below: float | None = None
    classifier: Classifier | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    label: str
    index: int  # in the labels that were asked for
    score: float  # of the head: softmax over the labels, or a sigmoid for each
    cosine: float  # of picture and label, before temperature


@dataclass(frozen=True)
class Ranking:
    """Best first; ties go to the lower index. ``none``: whether none of them fits, None where that was not asked.
    ``temperature``: the one that the scores were made with."""

    labels: tuple[Ranked, ...]
    none: bool | None = None
    temperature: float = 1.0

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.labels)


def classify(bundle: Bundle, request: ClassifyRequest) -> Flow[Ranking]:
    """Raises `TaskNotServed`, `ClassifierMismatch`, `TooManyLabels` (there are none), `BadRequest` and
    `InputError`s."""
    bundle.require("classify")
    classifier = chosen(bundle, request.classifier, request.labels, request.templates)
    if request.top_k is not None and request.top_k < 1:
        raise BadRequest(f"top_k is {request.top_k}; expected at least 1")
    temperature = request.temperature
    if temperature is None:
        temperature = classifier.temperature_for(bundle.family)
    none_below = classifier.none_below if request.none_below is None else request.none_below
    check_temperature(temperature)
    check_none_below(none_below)
    feeds, _ = yield from prepared(bundle, request.image)
    text = yield from labels(bundle, classifier)
    found = yield Call("image", feeds)
    image = found[output_of(bundle, "image")]

    logits = scored(classifier, image, text) / np.float32(temperature)
    return ranking(classifier, logits, (image @ text.T)[0], request.top_k, none_below, temperature)


def chosen(
    bundle: Bundle, classifier: Classifier | None, labels: Sequence[str] = (), templates: Sequence[str] = ()
) -> Classifier:
    """The classifier of a request, complete, with at least one label that its head knows.

    Raises `ClassifierMismatch`, `TooManyLabels`, `BadRequest`.
    """
    own = bundle.classifier if classifier is None else classifier.over(bundle.classifier)
    own.require_family(bundle.family, bundle.name)
    found = own.asked(labels, templates)
    require_labels(found.labels)
    found.bound.check(found.labels)
    return found


def scored(classifier: Classifier, image: Array, text: Array) -> Array:
    """image float32 [B, D] and text [C, D], unit rows -> logits float32 [B, C], before temperature."""
    head = classifier.bound
    return head.logits(image, head.columns(classifier.labels, text))


def ranking(
    classifier: Classifier,
    logits: Array,
    cosines: Array,
    top_k: int | None,
    none_below: float | None,
    temperature: float,
) -> Ranking:
    """logits [1, C] and cosines [C] of one picture -> its labels, best first."""
    scores = classifier.bound.scores(logits)[0]
    order = np.argsort(-scores, kind="stable")[:top_k].tolist()
    none = None if none_below is None else bool(scores.max() < none_below)
    score, cosine, names = scores.tolist(), cosines.tolist(), classifier.labels
    return Ranking(tuple(Ranked(names[i], i, score[i], cosine[i]) for i in order), none, temperature)


@dataclass(frozen=True)
class LogitsRequest:
    """As of a `ClassifyRequest`."""

    image: Picture
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    classifier: Classifier | None = None


def logits(bundle: Bundle, request: LogitsRequest) -> Flow[Array]:
    """-> float32 [C], the head's logits before temperature, in the order of the labels: what evaluations score."""
    bundle.require("classify")
    classifier = chosen(bundle, request.classifier, request.labels, request.templates)
    text = yield from labels(bundle, classifier)
    image = yield from picture(bundle, request.image)
    row: Array = scored(classifier, image, text)[0]
    return row


def check(manifest: Manifest) -> None:
    one_space(manifest)
    if not (manifest.classifier and manifest.classifier.head):
        raise ValueError("task 'classify' needs `classifier` with a `head`")


def example(bundle: Bundle, picture: bytes) -> ClassifyRequest:
    return ClassifyRequest(picture, () if bundle.classifier.labels else ("a thing",))


def _options(options: ArgumentParser) -> None:
    options.add_argument("--label", action="append", default=[], help="may be given many times; else the bundle's own")
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; may be given many times")
    options.add_argument("--top", type=int, default=5, help="how many labels to print (default 5)")
    options.add_argument("--temperature", type=float, help="divides the logits, 0.01 to 100")
    options.add_argument("--none-below", type=float, help="say so where no score reaches it")


def _answers(runner: "Runner", given: Namespace) -> Iterator[dict[str, Any]]:
    many = runner.classify_many(
        given.pictures, given.label, templates=given.template, top_k=given.top, temperature=given.temperature,
        none_below=given.none_below,
    )  # fmt: skip
    for path, found in zip(given.pictures, many, strict=True):
        none = {} if found.none is None else {"none_of_these": found.none}
        yield {"picture": str(path), "classify": [{"label": r.label, "score": r.score} for r in found], **none}


def _line(answer: dict[str, Any]) -> str:
    rows = [f"  {row['score']:.3f}  {row['label']}" for row in answer["classify"]]
    return "\n".join([answer["picture"], *rows, *(["  none of these"] if answer.get("none_of_these") else [])])


TASKS.register("classify")(
    Task(
        name="classify",
        summary="picture + labels -> ranked labels",
        request=ClassifyRequest,
        flow=classify,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess},
        check=check,
        command=Command(_options, _answers, _line),
    )
)
