"""Picture + labels -> ranked labels.

Source: Radford et al. 2021 (arXiv 2103.00020), zero-shot prediction.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess, VectorPreprocess
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow, Work
from calmclip.models.labels import check_none_below, check_temperature
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.stored_classifier import read_classifier
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.attributes import Attributes, Inferred, mixed
from calmclip.models.tasks.attributes import vectors as attributed_vectors
from calmclip.models.tasks.features import Driver, each, labels, picture, prepared, row_of
from calmclip.models.tasks.grounding import check as check_alpha
from calmclip.models.tasks.grounding import described, grounded, regions_of
from calmclip.models.vector_files import read_label_vectors


@dataclass(frozen=True)
class ClassifyRequest:
    """``labels`` and ``templates`` (each with a ``{}``): if empty, those of ``classifier``, else those of the bundle.

    ``top_k`` None: all labels. ``temperature`` and ``none_below`` None: the classifier's, see `Classifier`.

    ``attributes``: `Attributes`, or their values alone. ``descriptions``: label -> sentences, in place of the templates
    for that label; with ``alpha``, 0 to 1, they are compared with regions, and the templates stay: see `grounding`.
    Attributes and alpha exclude each other.
    """

    image: Picture
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    top_k: int | None = None
    temperature: float | None = None
    none_below: float | None = None
    classifier: Classifier | None = None
    attributes: Attributes | Mapping[str, Sequence[str]] | None = None
    descriptions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    label: str
    index: int  # in the labels of the request
    score: float  # of the head: softmax over the labels, or a sigmoid for each
    cosine: float  # of picture and label, before temperature


@dataclass(frozen=True)
class Ranking:
    """Best first; ties go to the lower index. ``none``: whether none of the labels fits; None without ``none_below``.
    ``temperature``: the divisor of the logits. ``inferred``: the attributes of the picture, if the request has some."""

    labels: tuple[Ranked, ...]
    none: bool | None = None
    temperature: float = 1.0
    inferred: Inferred | None = None

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.labels)


def classify(bundle: Bundle, request: ClassifyRequest) -> Flow[Ranking]:
    """Raises `TaskNotServed` (also for ``alpha``, of a bundle without regions), `ClassifierMismatch`, `TooManyLabels`
    (no labels), `BadRequest` and `InputError`s."""
    bundle.require("classify")
    classifier = chosen(bundle, request.classifier, request.labels, request.templates, request.descriptions)
    if request.top_k is not None and request.top_k < 1:
        raise BadRequest(f"top_k is {request.top_k}; expected at least 1")
    temperature = request.temperature
    if temperature is None:
        temperature = classifier.temperature_for(bundle.family)
    none_below = classifier.none_below if request.none_below is None else request.none_below
    check_temperature(temperature)
    check_none_below(none_below)
    score_all = _composition(classifier, request)
    scores, cosines, inferred = yield from score_all(bundle, classifier, request.image, temperature)
    order = np.argsort(-scores, kind="stable")[: request.top_k].tolist()
    none = None if none_below is None else bool(scores.max() < none_below)
    score, cosine, names = scores.tolist(), cosines.tolist(), classifier.labels
    return Ranking(tuple(Ranked(names[i], i, score[i], cosine[i]) for i in order), none, temperature, inferred)


Scored = tuple[Array, Array, Inferred | None]  # scores [C], cosines [C], the attributes


def _composition(classifier: Classifier, request: ClassifyRequest) -> Callable[..., Flow[Scored]]:
    """How the labels of a request are scored: `_plain`, `_mixed` or `_grounded`. Raises `BadRequest`."""
    attributes, alpha = request.attributes, request.alpha
    if attributes is not None:
        if alpha is not None:
            raise BadRequest("the request has `attributes` and `alpha`; expected at most one of them")
        classifier.require_sentences("attributes")
        return partial(_mixed, attributes if isinstance(attributes, Attributes) else Attributes(attributes))
    if alpha is None:
        return _plain
    check_alpha(classifier, alpha)
    return partial(_grounded, alpha)


def shared(bundle: Bundle, request: ClassifyRequest) -> Flow[ClassifyRequest]:
    """What many pictures share: embeds the texts of ``request`` once, so that the driver's cache has them for each of
    the pictures. Its own ``image`` is not read. -> ``request``. Raises as `classify`."""
    bundle.require("classify")
    classifier = chosen(bundle, request.classifier, request.labels, request.templates, request.descriptions)
    _composition(classifier, request)
    attributes, alpha = request.attributes, request.alpha
    if attributes is not None:
        given = attributes if isinstance(attributes, Attributes) else Attributes(attributes)
        yield from attributed_vectors(bundle, classifier, given)
        return request
    yield from labels(bundle, classifier if alpha is None else classifier.without_descriptions())
    if alpha is not None and alpha != 1:
        yield from described(bundle, classifier)
    return request


def _plain(bundle: Bundle, classifier: Classifier, image: Picture, temperature: float) -> Flow[Scored]:
    feeds, _ = yield from prepared(bundle, image)  # a broken picture is refused before a graph runs
    text = yield from labels(bundle, classifier)
    row = yield from row_of(bundle, feeds)
    logits = scored(classifier, row, text)
    return classifier.bound.scores(logits / np.float32(temperature))[0], (row @ text.T)[0], None


def _mixed(
    attributes: Attributes, bundle: Bundle, classifier: Classifier, image: Picture, temperature: float
) -> Flow[Scored]:
    feeds, _ = yield from prepared(bundle, image)
    text = yield from attributed_vectors(bundle, classifier, attributes)
    return mixed(classifier, attributes, (yield from row_of(bundle, feeds)), text, temperature)


def _grounded(alpha: float, bundle: Bundle, classifier: Classifier, image: Picture, temperature: float) -> Flow[Scored]:
    plain = classifier.without_descriptions()
    if alpha == 1:
        return (yield from _plain(bundle, plain, image, temperature))
    decoded = yield Work("decode", lambda: load(image, max_pixels=bundle.max_pixels))  # once, for two graphs
    regions = yield from regions_of(bundle, decoded)
    row = yield from picture(bundle, decoded)
    logits = yield from grounded(bundle, classifier, regions if len(regions) else row)
    text = yield from labels(bundle, plain)
    logits = np.float32(alpha) * scored(plain, row, text) + np.float32(1 - alpha) * logits
    return plain.bound.scores(logits / np.float32(temperature))[0], (row @ text.T)[0], None


def chosen(
    bundle: Bundle,
    classifier: Classifier | None,
    labels: Sequence[str] = (),
    templates: Sequence[str] = (),
    descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Classifier:
    """The complete classifier of a request, with at least one label; its head knows all its labels.

    Raises `ClassifierMismatch`, `TooManyLabels`, `BadRequest`.
    """
    complete = bundle.classifier_for(classifier, labels, templates, descriptions)
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
    spec = bundle.graph("text").preprocess
    if isinstance(spec, VectorPreprocess):
        rows = np.ones((1, spec.dim), np.float32)
        return ClassifyRequest(picture, classifier=Classifier(("a thing",), label_vectors={"a thing": rows}))
    return ClassifyRequest(picture, () if bundle.classifier.labels else ("a thing",))


def _options(options: ArgumentParser) -> None:
    options.add_argument("--label", action="append", default=[], help="may be given many times; else the bundle's own")
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; may be given many times")
    options.add_argument(
        "--label-vectors",
        type=Path,
        metavar="FILE.npz",
        help="label -> [N, d], of the model that the bundle names, in place of labels",
    )
    options.add_argument("--classifier", type=Path, metavar="FILE", help="NAME.json of 'calmclip fit' or of a service")
    options.add_argument("--top", type=int, default=5, help="how many labels to print (default 5)")
    options.add_argument("--temperature", type=float, help="divides the logits, 0.01 to 100")
    options.add_argument("--none-below", type=float, help="if every score is lower, print 'none of these'")
    options.add_argument(
        "--attribute",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="such as 'background=on land'; many times",
    )
    options.add_argument("--tau", type=float, default=1.0, help="above 1 the attributes are less certain (default 1)")
    options.add_argument("--without-labels", action="store_true", help="infer the attributes without the labels")
    options.add_argument("--descriptions", type=Path, metavar="FILE.json", help="an object: label -> list of sentences")
    options.add_argument("--alpha", type=float, help="below 1 the descriptions are looked for in regions; 0 to 1")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    if options.label_vectors and options.classifier:
        raise BadRequest("--label-vectors and --classifier are given; expected one of them")
    stored = read_classifier(options.classifier).classifier if options.classifier else None
    if options.label_vectors:
        vectors = read_label_vectors(options.label_vectors)
        stored = Classifier(tuple(vectors), label_vectors=vectors)
    descriptions = _descriptions(options.descriptions) if options.descriptions else {}
    classifier = driver.bundle.classifier_for(stored, options.label, options.template, descriptions)
    attributes = _attributes(options)
    numbers = (options.top, options.temperature, options.none_below)
    request = ClassifyRequest(b"", (), (), *numbers, classifier, attributes, alpha=options.alpha)
    answers = each(driver, options.pictures, lambda path: classify(driver.bundle, replace(request, image=path)))
    for path, ranking in answers:
        none = {} if ranking.none is None else {"none_of_these": ranking.none}
        inferred = {"attributes": ranking.inferred.marginals} if ranking.inferred else {}
        rows = [{"label": r.label, "score": r.score} for r in ranking]
        yield {"picture": str(path), "classify": rows, **inferred, **none}


def _attributes(options: Namespace) -> Attributes | None:
    """Raises `BadRequest` for an attribute without "=", and for options of attributes without an attribute."""
    values: dict[str, list[str]] = {}
    for given in options.attribute:
        name, equals, value = given.partition("=")
        if not equals:
            raise BadRequest(f"--attribute is {given!r}; expected NAME=VALUE, such as 'background=on land'")
        values.setdefault(name, []).append(value)
    if values:
        return Attributes(values, options.tau, not options.without_labels)
    if options.tau != 1 or options.without_labels:
        raise BadRequest("--tau and --without-labels belong to attributes, and there are none; add --attribute")
    return None


def _descriptions(file: Path) -> dict[str, Any]:
    """Raises `BadRequest`."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise BadRequest(f"the descriptions in {file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BadRequest(f"{file} is no JSON object; expected a list of sentences for each label")
    return content


def _line(answer: dict[str, Any]) -> str:
    lines = [answer["picture"], *(f"  {row['score']:.3f}  {row['label']}" for row in answer["classify"])]
    for name, values in answer.get("attributes", {}).items():
        lines.append(f"  {name}: " + ", ".join(f"{value!r} {part:.2f}" for value, part in values.items()))
    return "\n".join([*lines, *(["  none of these"] if answer.get("none_of_these") else [])])


TASKS.register("classify")(
    Task(
        name="classify",
        summary="picture + labels -> ranked labels",
        request=ClassifyRequest,
        flow=classify,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess | VectorPreprocess},
        check=check,
        command=Command(_options, _answers, _line),
    )
)
