"""Picture + labels -> ranked labels.

Source: Radford et al. 2021 (arXiv 2103.00020), zero-shot prediction.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Call, Flow
from calmclip.models.labels import check_none_below, check_temperature
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.features import Driver, labels, output_of, picture, prepared


@dataclass(frozen=True)
class ClassifyRequest:
    """``labels`` and ``templates`` (each with a ``{}``): if empty, those of ``classifier``, else those of the bundle.

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
    index: int  # in the labels of the request
    score: float  # of the head: softmax over the labels, or a sigmoid for each
    cosine: float  # of picture and label, before temperature


@dataclass(frozen=True)
class Ranking:
    """Best first; ties go to the lower index. ``none``: whether none of the labels fits; None without ``none_below``.
    ``temperature``: the divisor of the logits."""

    labels: tuple[Ranked, ...]
    none: bool | None = None
    temperature: float = 1.0

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.labels)


def classify(bundle: Bundle, request: ClassifyRequest) -> Flow[Ranking]:
    """Raises `TaskNotServed`, `ClassifierMismatch`, `TooManyLabels` (no labels), `BadRequest` and `InputError`s."""
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
    outputs = yield Call("image", feeds)
    image = outputs[output_of(bundle, "image")]

    logits = scored(classifier, image, text) / np.float32(temperature)
    scores = classifier.bound.scores(logits)[0]
    order = np.argsort(-scores, kind="stable")[: request.top_k].tolist()
    none = None if none_below is None else bool(scores.max() < none_below)
    score, cosine, names = scores.tolist(), (image @ text.T)[0].tolist(), classifier.labels
    return Ranking(tuple(Ranked(names[i], i, score[i], cosine[i]) for i in order), none, temperature)


def chosen(
    bundle: Bundle, classifier: Classifier | None, labels: Sequence[str] = (), templates: Sequence[str] = ()
) -> Classifier:
    """The complete classifier of a request, with at least one label; its head knows all its labels.

    Raises `ClassifierMismatch`, `TooManyLabels`, `BadRequest`.
    """
    complete = bundle.classifier_for(classifier, labels, templates)
    complete.require_family(bundle.family, bundle.name)
    complete.bound.check(complete.labels)
    return complete


def scored(classifier: Classifier, image: Array, text: Array) -> Array:
    """image float32 [B, D] and text [C, D], unit rows -> logits float32 [B, C], before temperature."""
    head = classifier.bound
    return head.logits(image, head.columns(classifier.labels, text))


def logits(bundle: Bundle, image: Picture, classifier: Classifier) -> Flow[Array]:
    """-> float32 [C], the head's logits before temperature, in the order of the labels."""
    bundle.require("classify")
    classifier = chosen(bundle, classifier)
    text = yield from labels(bundle, classifier)
    row: Array = scored(classifier, (yield from picture(bundle, image)), text)[0]
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
    options.add_argument("--none-below", type=float, help="if every score is lower, print 'none of these'")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    classifier = driver.bundle.classifier_for(None, options.label, options.template)
    request = ClassifyRequest(b"", (), (), options.top, options.temperature, options.none_below, classifier)
    rankings = driver.map(classify(driver.bundle, replace(request, image=path)) for path in options.pictures)
    for path, ranking in zip(options.pictures, rankings, strict=True):
        none = {} if ranking.none is None else {"none_of_these": ranking.none}
        yield {"picture": str(path), "classify": [{"label": r.label, "score": r.score} for r in ranking], **none}


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
