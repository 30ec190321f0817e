"""Labelled pictures -> a classifier with a head that is fitted to them, and a report (`calmclip.models.heads.Fit`).

The params that are None are chosen by the pictures themselves, see `calmclip.models.selection`. Random crops as in
Wang et al. 2024 (arXiv 2402.04087): half to all of the picture's area, half of them mirrored. A head that reads patches
compares places, so its crops keep 90 to 100 % of each side and are not mirrored, in light of 85 to 115 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow, Together, Work
from calmclip.models.heads import HEADS, Examples, Head, named, params_of
from calmclip.models.labels import check_distinct
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.selection import Choice, choose
from calmclip.models.tasks.cells import look, require_dense
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.features import picture, texts, unit
from calmclip.models.vocabulary import words as vocabulary

WORD = "a photo of a {}."
CLIP_SCALE = 100.0  # of a bundle whose own head has no scale
MAX_CROPS = 50  # of a picture
MAX_PATCHES = 1 << 17  # of all pictures and their crops: 200 MB of 384 numbers each
UNMEASURED = "nothing; the notes have the threshold"


@dataclass(frozen=True)
class FitRequest:
    """``truth``: for each picture the index of its label in the classifier's labels. ``head``: a head with `fit`.

    ``captions``: a text for each picture, or none. ``validation``: pictures and their truth, that choose the params and
    measure the accuracy; None: cross-validation over the pictures. ``augment``: so many random crops of each picture
    are used, too. ``unlabelled``: pictures without a label. ``words``: the vocabulary of a head that explains itself,
    if empty that of `calmclip.models.vocabulary`.
    """

    images: Sequence[Picture]
    truth: Sequence[int]
    classifier: Classifier
    head: str
    params: Mapping[str, Any] = field(default_factory=dict)
    captions: Sequence[str] = ()
    validation: tuple[Sequence[Picture], Sequence[int]] | None = None
    augment: int = 0
    unlabelled: Sequence[Picture] = ()
    words: Sequence[str] = ()


@dataclass(frozen=True)
class FitReport:
    """``method``: the head. ``pictures``: labelled ones. ``before``: the accuracy of zero-shot, ``after``: of the
    fitted head, both on the pictures that ``measured`` names; None if no picture could be held out. These pictures
    also chose ``params``, so on others expect a little less. ``seconds``: of the fit, without the graphs. ``notes``:
    sentences of the method.
    """

    method: str
    pictures: int
    labels: int
    before: float | None
    after: float | None
    measured: str
    params: Mapping[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    classifier: Classifier
    report: FitReport


def fit(bundle: Bundle, request: FitRequest) -> Flow[Fitted]:
    """The classifier with the fitted head; it has the bundle's family.

    Raises as `prepare` before it decodes a picture, the `InputError`s of pictures and texts, and as the head's `fit`.
    """
    prepare(bundle, request)
    rows = yield Together([*picture_flows(bundle, request)])
    return (yield from fit_rows(bundle, request, rows))


def fit_vectors(
    bundle: Bundle,
    classifier: Classifier,
    head: str,
    params: Mapping[str, Any],
    image: Array,
    truth: Sequence[int],
    captions: Array | None = None,
    validation: tuple[Array, Sequence[int]] | None = None,
    *,
    views: Array | None = None,
    unlabelled: Array | None = None,
    words: Sequence[str] = (),
) -> Flow[Fitted]:
    """As `fit`, from vectors, float32 unit rows: ``image`` [N, D], ``captions`` [N, D], ``unlabelled`` [M, D], and
    ``views`` [N, V, D], random crops of each picture. ``words`` are texts."""
    validated = None if validation is None else ((), validation[1])
    request = FitRequest((), truth, classifier, head, params, validation=validated, words=words)
    given = {"captions": captions is not None, "unlabelled": unlabelled is not None, "words": bool(words)}
    plan = _plan(bundle, request, [name for name, is_given in given.items() if is_given])
    if plan.patches:
        raise BadRequest(f"the head {head!r} reads patches of pictures, and vectors have none; send the pictures")
    return (yield from _fitted(bundle, plan, request, image, captions, validation, views, unlabelled))


def prepare(bundle: Bundle, request: FitRequest) -> None:
    """Raises `ExtraMissing` if the fit needs a package that is not installed. Raises `BadRequest` for a head that does
    not exist or has no `fit`, for wrong params; for fewer than two labels, or another number than the head takes; for a
    label without a picture, if the head needs one; for captions, words or unlabelled pictures that the head does not
    read; and for wrong counts."""
    given = [name for name in ("captions", "unlabelled", "words") if getattr(request, name)]
    plan = _plan(bundle, request, given)
    if len(request.images) != len(request.truth):
        raise BadRequest(f"{len(request.images)} pictures have {len(request.truth)} labels; expected a label for each")
    if request.captions and len(request.captions) != len(request.images):
        raise BadRequest(
            f"{len(request.captions)} captions were given for {len(request.images)} pictures; expected one for each, "
            "or none"
        )
    if not 0 <= request.augment <= MAX_CROPS:
        raise BadRequest(f"augment is {request.augment}; expected 0 to {MAX_CROPS} crops of each picture")
    if plan.patches:
        _check_patches(bundle, request)


def _check_patches(bundle: Bundle, request: FitRequest) -> None:
    """Raises `TaskNotServed` without the graph `dense`; `BadRequest` for a validation, and above `MAX_PATCHES`."""
    grid = require_dense(bundle).outputs["patches"].shape[1:3]
    if request.validation:
        raise BadRequest(f"the head {request.head!r} measures nothing on a validation; leave it out")
    count = len(request.images) * (1 + request.augment) * prod(side for side in grid if isinstance(side, int))
    if count > MAX_PATCHES:
        raise BadRequest(
            f"{len(request.images)} pictures and {request.augment} crops of each have {count} patches; at most "
            f"{MAX_PATCHES} are read. Send fewer pictures, or augment less"
        )


def picture_flows(bundle: Bundle, request: FitRequest) -> Iterator[Flow[Array]]:
    """A flow for each picture -> float32 [B, D] unit rows: the labelled ones, each followed by its crops; those of the
    validation; the unlabelled ones. Of a head that reads patches: [B, P, D]. `fit_rows` takes the answers in this
    order."""
    fit = named(request.head).fit
    for index, image in enumerate(request.images):
        if fit and fit.patches:
            yield _patches(bundle, image, request.augment, index)
            continue
        yield _with_crops(bundle, image, request.augment, index) if request.augment else picture(bundle, image)
    for image in (*(request.validation[0] if request.validation else ()), *request.unlabelled):
        yield picture(bundle, image)


def fit_rows(bundle: Bundle, request: FitRequest, rows: Sequence[Array]) -> Flow[Fitted]:
    """``rows``: the answers of `picture_flows`."""
    plan = _plan(bundle, request, [name for name in ("captions", "unlabelled", "words") if getattr(request, name)])
    if plan.patches:
        means = unit(np.stack([views[0].mean(axis=0) for views in rows]))
        blank = np.zeros((len(plan.classifier.labels), means.shape[1]), np.float32)  # no text is read
        examples = Examples(means, plan.truth, plan.classifier.labels, blank, patches=tuple(rows))
        return (yield from _finished(bundle, plan, examples, None))
    shown, validating = len(request.images), len(request.validation[0]) if request.validation else 0
    stacked = np.stack(rows[:shown]) if shown else np.empty((0, 1 + request.augment, bundle.dim), np.float32)
    captions = unit((yield from texts(bundle, request.captions))) if request.captions else None
    others = np.concatenate([np.empty((0, bundle.dim), np.float32), *rows[shown:]])
    validation = (others[:validating], request.validation[1]) if request.validation else None
    views = stacked[:, 1:] if request.augment else None
    unlabelled = others[validating:] if request.unlabelled else None
    return (yield from _fitted(bundle, plan, request, stacked[:, 0], captions, validation, views, unlabelled))


@dataclass(frozen=True)
class _Plan:
    """The head, its checked params, the complete classifier with the bundle's own head, and the index of each picture's
    label in it."""

    name: str  # of the head
    head: Head[Any]
    params: FrozenModel
    classifier: Classifier
    truth: Array  # int64 [N]

    @property
    def patches(self) -> bool:
        """Whether the head reads patches."""
        return self.head.fit is not None and self.head.fit.patches


def _plan(bundle: Bundle, request: FitRequest, given: Sequence[str]) -> _Plan:
    """``given``: the names of the optional inputs. Raises as `prepare`."""
    head = named(request.head)
    bundle.require(head.fit.task if head.fit else "classify")
    if head.fit is None:
        able = [other for other in HEADS.names() if HEADS.get(other).fit]
        raise BadRequest(f"the head {request.head!r} has nothing to fit; those that do: {', '.join(able) or 'none'}")
    head.fit.ready()
    checked = params_of(request.head, request.params)
    complete = bundle.classifier_for(replace(request.classifier, head=None, params={}, assets={}, columns=None))
    check_distinct(complete.labels)
    complete, truth = _renamed(request, head.fit.names, complete)
    labels = complete.labels
    if unread := [name for name in given if name not in head.fit.reads]:
        able = [other for other in HEADS.names() if (fit := HEADS.get(other).fit) and unread[0] in fit.reads]
        raise BadRequest(f"the head {request.head!r} reads no {unread[0]}; those that do: {', '.join(able) or 'none'}")
    if head.fit.labels not in (None, len(labels)):
        raise BadRequest(f"the head {request.head!r} takes {head.fit.labels} labels; {len(labels)} were given")
    if len(labels) < 2 or not (len(request.truth) or "unlabelled" in given):
        raise BadRequest(
            f"there are {len(labels)} labels and {len(request.truth)} pictures; "
            "expected at least 2 labels, and pictures of them"
        )
    if request.validation is not None and not len(request.validation[1]):
        raise BadRequest("the validation has no picture; send some, or leave it out")
    with_pictures = set(truth.tolist())
    lacking = [label for index, label in enumerate(labels) if index not in with_pictures]
    if lacking and not (head.fit.open and lacking[0] not in head.fit.names[:1]):
        others = f", nor have {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise BadRequest(
            f"the label {lacking[0]!r} has no picture{others}; "
            f"expected at least one for each of the {len(labels)} labels"
        )
    return _Plan(request.head, head, checked, complete, truth)


def _renamed(request: FitRequest, names: Sequence[str], complete: Classifier) -> tuple[Classifier, Array]:
    """The classifier with all ``names`` of its head as labels, if it has some, and the truth in their order.

    Raises `BadRequest` for another label."""
    truth = np.asarray(request.truth, np.int64)
    if not names:
        return complete, truth
    if unknown := [label for label in complete.labels if label not in names]:
        raise BadRequest(f"the head {request.head!r} takes the labels {' and '.join(names)}; {unknown[0]!r} is neither")
    places = np.array([names.index(label) for label in complete.labels], np.int64)
    return replace(complete, labels=tuple(names)), places[truth]


def _fitted(
    bundle: Bundle,
    plan: _Plan,
    request: FitRequest,
    image: Array,
    captions: Array | None,
    validation: tuple[Array, Sequence[int]] | None,
    views: Array | None,
    unlabelled: Array | None,
) -> Flow[Fitted]:
    text = yield from label_vectors(bundle, plan.classifier)
    explains = plan.head.fit is not None and "words" in plan.head.fit.reads
    words = tuple(request.words) or (vocabulary() if explains else ())
    word_vectors = (yield from label_vectors(bundle, Classifier(words, (WORD,)))) if words else None
    scale = getattr(plan.classifier.bound.params, "scale", CLIP_SCALE)
    labels = plan.classifier.labels
    examples = Examples(image, plan.truth, labels, text, scale, captions, views, unlabelled, words, word_vectors)
    held = None if validation is None else (validation[0], np.asarray(validation[1], np.int64))
    return (yield from _finished(bundle, plan, examples, held))


def _finished(bundle: Bundle, plan: _Plan, examples: Examples, held: tuple[Array, Array] | None) -> Flow[Fitted]:
    """``held``: vectors and truth of the validation."""
    choice, assets, notes, seconds = yield Work("fit", lambda: _compute(plan, examples, held))
    params = choice.params.model_dump()
    classifier = replace(
        plan.classifier, head=plan.name, params=params, assets=assets, columns=None, family=bundle.family
    )
    _ = classifier.bound  # raises now if the assets do not fit
    measured = {key: value for key, value in asdict(choice).items() if key != "params"}
    counts = len(examples.truth), len(examples.labels)
    report = FitReport(plan.name, *counts, params=params, seconds=seconds, notes=notes, **measured)
    return Fitted(classifier, report)


def _compute(
    plan: _Plan, examples: Examples, validation: tuple[Array, Array] | None
) -> tuple[Choice[Any], dict[str, Array], tuple[str, ...], float]:
    """Params, assets, notes, seconds."""
    fit, clock = plan.head.fit, Stopwatch()
    assert fit is not None  # `_plan` checks it
    choice: Choice[Any]
    if plan.patches:
        choice = Choice(plan.params, None, None, UNMEASURED)
    else:
        choice = choose(plan.head, plan.params, examples, validation)
    assets = dict(fit.assets(examples.spread, choice.params))
    return choice, assets, tuple(fit.notes(examples, choice.params, assets)), clock.elapsed


def _with_crops(bundle: Bundle, image: Picture, count: int, seed: int) -> Flow[Array]:
    """-> float32 [1 + count, D]: the picture, and its random crops; ``seed`` chooses them."""
    draw = np.random.default_rng(seed)
    whole = yield Work("decode", lambda: load(image, max_pixels=bundle.max_pixels))
    rows = [(yield from picture(bundle, whole))]
    for _ in range(count):
        crop = yield Work("preprocess", lambda: _crop(whole, draw))
        rows.append((yield from picture(bundle, crop)))
    return np.concatenate(rows)


def _patches(bundle: Bundle, image: Picture, count: int, seed: int) -> Flow[Array]:
    """-> float32 [1 + count, P, D] unit rows: the cells of the picture, and of its crops; ``seed`` chooses them."""
    draw = np.random.default_rng(seed)
    whole = yield Work("decode", lambda: load(image, max_pixels=bundle.max_pixels))
    looks = [(yield from look(bundle, whole))]
    for _ in range(count):
        view = yield Work("preprocess", lambda: _lit(_inner(whole, draw), draw))
        looks.append((yield from look(bundle, view)))
    return np.stack([seen.rows for seen in looks])


def _inner(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """90 to 100 % of each side, enlarged to the picture's size, so that as many cells show it."""
    width, height = (max(1, round(draw.uniform(0.9, 1.0) * side)) for side in image.size)
    left, top = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _lit(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(draw.uniform(0.85, 1.15))


def _crop(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """A part with half to all of the area, at the picture's own ratio of sides, mirrored every other time."""
    side = np.sqrt(draw.uniform(0.5, 1.0))
    width, height = (max(1, round(side * length)) for length in image.size)
    left, top = draw.integers(image.width - width + 1), draw.integers(image.height - height + 1)
    part = image.crop((int(left), int(top), int(left) + width, int(top) + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part
