"""Picture + caption -> how much each word of the caption fits the picture, and the words that do not.

A word's contribution is positive if it brings the caption nearer to the picture, and negative if it takes it away.
Words differ in their weight: without "dog" a caption means something else, without "young" nearly the same. A word that
fits contributes in proportion to its weight, so a heavy word that contributes little is suspicious:

    margin = contribution - expected * weight

The word with the lowest margin is the most suspicious one. A word whose margin is below a threshold is flagged, unless
it is a function word (`words`). ``expected`` and the threshold are fitted to a bundle (key `explain` of its manifest);
of a bundle without them ``expected`` is 0. `METHODS` lists how contributions and weights are computed.

Source: CLIP4DM and F-CLIPScore, Nam et al. 2024 (arXiv 2412.18404), for negative contributions as signs of misaligned
words, and for a score that adds them to CLIPScore (Hessel et al. 2021, arXiv 2104.08718, equation 1: 2.5 max(cosine,
0)). The exact weights of the published F-CLIPScore are not confirmed: here the sum has the same weight as the cosine.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest, TextPreprocess
from calmclip.models.errors import BadRequest, TaskNotServed, suggestion
from calmclip.models.flow import Array, Flow
from calmclip.models.labels import check_length
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks import TASKS, Command, Task, one_space
from calmclip.models.tasks.contributions import Method, Scene, leave_one_out
from calmclip.models.tasks.features import Driver, each, picture
from calmclip.models.tasks.gradient import gradient
from calmclip.models.tasks.words import Span, words

AUTO = "auto"
MAX_WORDS = 128  # of a caption: each is a text of its own to embed
CLIP_SCALE = 2.5  # CLIPScore's w

# the first that fits a bundle is the default
METHODS: dict[str, Method] = {
    "leave_one_out": Method(leave_one_out, threshold=-0.05),
    "gradient": Method(
        gradient, threshold=-0.05, role="attribution", remedy="export the checkpoint again with --attribution"
    ),
}


@dataclass(frozen=True)
class ExplainRequest:
    """``method``: one of `METHODS`, or `AUTO`: the bundle's, else the first that it has the graphs for. ``threshold``:
    a word whose margin is lower is flagged; None: the bundle's for the method, else the method's own."""

    image: Picture
    caption: str
    method: str = AUTO
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Word:
    """``start``, ``end``: offsets in characters (code points) of the caption. ``contribution``: in units of the method,
    a difference of cosines for leave_one_out. ``margin``: in the same units, beyond what a word that fits would
    contribute."""

    text: str
    start: int
    end: int
    contribution: float
    flagged: bool
    margin: float


@dataclass(frozen=True)
class Explanation:
    """``score``: the cosine of picture and caption. ``clip_score``: 2.5 max(score, 0). ``f_score``: `clip_score` and
    2.5 times the sum of the negative contributions of words that may be flagged. ``lowest``: the index of the word with
    the lowest margin among these; None if there is none. ``method`` and ``threshold``: those that were used."""

    score: float
    clip_score: float
    f_score: float
    words: tuple[Word, ...]
    lowest: int | None
    method: str
    threshold: float

    @property
    def flagged(self) -> tuple[Word, ...]:
        return tuple(word for word in self.words if word.flagged)


def explain(bundle: Bundle, request: ExplainRequest) -> Flow[Explanation]:
    """Raises `TaskNotServed` (also for a method whose graph the bundle lacks), `BadRequest` (no words, too many, an
    unknown method), `TextTooLong` and the `InputError`s of pictures."""
    bundle.require("explain")
    settings(bundle.manifest, request)  # with the checks of the caption, before the picture is decoded
    spans_of(bundle, request.caption)
    row = yield from picture(bundle, request.image)
    return (yield from explained(bundle, request, row[0]))


def explained(bundle: Bundle, request: ExplainRequest, image: Array) -> Flow[Explanation]:
    """``image`` float32 [D]: the unit row of the picture, whose own field is not read. Raises as `explain`."""
    name, threshold, expected = settings(bundle.manifest, request)
    spans = spans_of(bundle, request.caption)
    told = yield from METHODS[name].flow(bundle, Scene(request.caption, spans, image))
    margins = told.margins(expected)
    content = np.array([span.has_content for span in spans])
    each = zip(
        spans, told.contributions.tolist(), (content & (margins < threshold)).tolist(), margins.tolist(), strict=True
    )
    explained_words = tuple(Word(span.text, span.start, span.end, *values) for span, *values in each)
    clip_score = CLIP_SCALE * max(told.score, 0.0)
    f_score = clip_score + CLIP_SCALE * float(np.minimum(told.contributions[content], 0).sum())
    lowest = int(np.where(content, margins, np.inf).argmin()) if content.any() else None
    return Explanation(told.score, clip_score, f_score, explained_words, lowest, name, threshold)


def spans_of(bundle: Bundle, caption: str) -> tuple[Span, ...]:
    """Raises `BadRequest`, `TextTooLong`."""
    check_length("the caption", caption)
    spans = words(caption)
    if not spans:
        raise BadRequest(f"the caption {caption[:40]!r} has no word; expected some words")
    if len(spans) > MAX_WORDS:
        raise BadRequest(f"the caption has {len(spans)} words; at most {MAX_WORDS} are explained. Shorten it.")
    bundle.text().tokens(caption)  # a text that is too long is refused before a graph runs
    return spans


def settings(manifest: Manifest, request: ExplainRequest) -> tuple[str, float, float]:
    """-> the name of the method, its threshold, and what a unit of weight is expected to contribute. Raises
    `BadRequest`, `TaskNotServed`."""
    name = chosen(manifest, request.method)
    fitted = manifest.explain.fitted.get(name) if manifest.explain else None
    return name, threshold_of(manifest, name, request.threshold), fitted.expected if fitted else 0.0


def chosen(manifest: Manifest, method: str) -> str:
    """The name of the method. Raises `BadRequest`, `TaskNotServed`."""
    if method == AUTO:
        preferred = manifest.explain and manifest.explain.method
        return preferred or next(name for name, each in METHODS.items() if each.fits(manifest))
    if method not in METHODS:
        raise BadRequest(f"there is no method {method[:40]!r}; {suggestion(method, (*METHODS, AUTO))}")
    if not METHODS[method].fits(manifest):
        known = [name for name, each in METHODS.items() if each.fits(manifest)]
        raise TaskNotServed(
            f"bundle {manifest.name!r} has no graph {METHODS[method].role!r}, which the method {method!r} needs; "
            f"{METHODS[method].remedy}. It serves {', '.join(known)}",
            known=known,
        )
    return method


def threshold_of(manifest: Manifest, method: str, threshold: float | None) -> float:
    """The request's, else the bundle's for the method, else the method's own. Raises `BadRequest`."""
    if threshold is None:
        fitted = manifest.explain.fitted.get(method) if manifest.explain else None
        return METHODS[method].threshold if fitted is None or fitted.threshold is None else fitted.threshold
    if not -1 <= threshold <= 1:
        raise BadRequest(f"threshold is {threshold}; expected -1 to 1")
    return threshold


def check(manifest: Manifest) -> None:
    """Raises `ValueError`."""
    one_space(manifest)
    named = {*manifest.explain.fitted, manifest.explain.method or AUTO} if manifest.explain else set()
    known = {name for name, each in METHODS.items() if each.fits(manifest)}
    if unknown := sorted(named - known - {AUTO}):
        raise ValueError(f"`explain` names the method {unknown[0]!r}; the graphs serve {', '.join(sorted(known))}")


def example(bundle: Bundle, picture: bytes) -> ExplainRequest:
    return ExplainRequest(picture, "a thing")


def _options(options: ArgumentParser) -> None:
    options.add_argument("--caption", required=True, help="a sentence about the picture")
    options.add_argument(
        "--method", choices=(AUTO, *METHODS), default=AUTO, help="default: the best that the bundle has the graphs for"
    )
    options.add_argument("--threshold", type=float, help="a word with a lower margin is flagged, -1 to 1")


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    request = ExplainRequest(b"", options.caption, options.method, options.threshold)
    answers = each(driver, options.pictures, lambda path: explain(driver.bundle, replace(request, image=path)))
    for path, answer in answers:
        yield {"picture": str(path), **asdict(answer)}


def _line(answer: dict[str, Any]) -> str:
    rows = (
        f"  {word['contribution']:+.3f}  {word['margin']:+.3f}  {word['text']}{'  !' * word['flagged']}"
        for word in answer["words"]
    )
    scores = f"cosine {answer['score']:.3f}, F-CLIPScore {answer['f_score']:.3f}"
    return "\n".join((f"{answer['picture']}  {scores} ({answer['method']})", *rows))


TASKS.register("explain")(
    Task(
        name="explain",
        summary="picture + caption -> how much each word fits, and the words that do not",
        request=ExplainRequest,
        flow=explain,
        example=example,
        roles={"image": ImagePreprocess, "text": TextPreprocess},
        follows="embed",
        check=check,
        command=Command(_options, _answers, _line),
    )
)
