"""Words that do not fit their picture: is the wrong word of a false caption found, and are true captions left alone?

Each picture has a true caption and a false one that differs in some words. The task `explain` gives each word a margin,
and flags words with a margin below a threshold. Figures:

    lowest         the word with the lowest margin of the false caption is an exchanged one
    lowest, plain  the same by contributions, whatever the weight of a word
    recall         false captions with an exchanged word that is flagged
    precision      flagged words of both captions that are exchanged ones
    unchanged      true captions with a flagged word: false alarms
    AUROC          a true caption has a higher score than a false one, by the cosine, by the F-CLIPScore, and by the
                   lowest margin of its words
    pairs right    of the two captions of a picture the true one has the higher F-CLIPScore

Source: Nam et al. 2024, CLIP4DM and F-CLIPScore (arXiv 2412.18404), for the tasks; Shekhar et al. 2017, FOIL (arXiv
1705.01359), for "which word is wrong". Intervals resample pictures. Function words have no margin here, as the task
never flags them.

Data: captions.json or captions.jsonl with several captions a picture, and images/: one noun of one caption is exchanged
(`exchanged`); or pairs.jsonl with one picture in each line, or SugarCrepe as published: see `datasets.read_pairs`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.datasets import first, read_captions, read_pairs
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, Line, Plot, Samples, Statistic
from calmclip.models.evals.areas import Areas, Subset
from calmclip.models.evals.exchanged import Kinds, exchange
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Flow
from calmclip.models.runner import Picture, Runner
from calmclip.models.tasks.explain import AUTO, ExplainRequest, Explanation, explained
from calmclip.models.tasks.features import picture
from calmclip.models.tasks.words import words

DATA = (
    'captions.json ({"file": [captions]}), captions.jsonl ({"image", "captions"} a line), pairs.jsonl ({"images": '
    '[one], "captions": [true, false]} a line) or SugarCrepe, and images/'
)
_FILES = ("captions.jsonl", "captions.json")
_TRUE, _FALSE = 0, 1
_BINS = 24  # of the histogram


class Params(FrozenModel):
    seed: int = Field(default=0, ge=0, description="of the exchanged nouns")
    kinds: Kinds = Field(default="wide", description="of the nouns that are exchanged for each other")
    method: str = Field(default=AUTO, description="of the task explain")
    threshold: float | None = Field(
        default=None, ge=-1, le=1, description="a word with a lower margin is flagged; None: the bundle's own"
    )


@dataclass(frozen=True)
class DataSet:
    """``captions``: of each picture the true and the false one. Raises `BadRequest` for no or unequal numbers."""

    pictures: Sequence[Picture]
    captions: Sequence[tuple[str, str]]

    def __post_init__(self) -> None:
        if not self.pictures or len(self.pictures) != len(self.captions):
            raise BadRequest(f"{len(self.pictures)} pictures and {len(self.captions)} pairs of captions; expected both")


def read(data: Path, params: Params, limit: int | None = None) -> DataSet:
    """The first ``limit`` pictures or pairs. Raises `BadRequest`."""
    file = next((data / name for name in _FILES if (data / name).is_file()), None)
    if file is None:
        return _of_pairs(data, limit)
    captioned = first([*read_captions(file).items()], limit)
    rows = exchange([captions for _, captions in captioned], params.seed, params.kinds)
    if not rows:
        raise BadRequest(
            f"no caption of {file} has a noun that can be exchanged; expected English captions of everyday things"
        )
    names = [captioned[row.picture][0] for row in rows]
    return DataSet([data / "images" / name for name in names], [(row.caption, row.false) for row in rows])


def _of_pairs(data: Path, limit: int | None) -> DataSet:
    """Pairs with one picture and a changed word; a pair that only moves words is left out."""
    if not any(data.glob("*.json*")):
        raise BadRequest(f"{data} holds no captions and no pairs; the data directory must hold {DATA}")
    pairs = read_pairs(data)
    single = [(pictures[0], true, false) for pictures, (true, false), _ in pairs if len(pictures) == 1]
    rows = first([row for row in single if any(changed(*row[1:]))], limit)
    if not rows:
        raise BadRequest(
            f"none of the {len(pairs)} pairs in {data} has one picture and a false caption with another word; the data "
            f"directory must hold {DATA}"
        )
    return DataSet([row[0] for row in rows], [row[1:] for row in rows])


def changed(true: str, false: str) -> list[bool]:
    """For each word of the false caption, whether it is none of those that the captions share in one order."""
    before, after = ([span.text.casefold() for span in words(caption)] for caption in (true, false))
    other = [True] * len(after)
    for _, start, count in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        other[start : start + count] = [False] * count
    return other


def predict(runner: Runner, data: DataSet, params: Params) -> Samples:
    """-> for each pair: ``cosine`` and ``f_score`` float64 [N, 2] of the true and the false caption; ``margins`` and
    ``contributions`` float64 [N, 2, W] of their words, NaN for function words and after the last one; ``changed`` bool
    [N, W] of the false caption's words; ``threshold`` []."""
    title = f"misalignment {runner.bundle.name}"
    rows = progress([*zip(data.pictures, data.captions, strict=True)], title, "picture", len(data.pictures))
    answers = [*runner.map(_both(runner.bundle, shown, captions, params) for shown, captions in rows)]
    most = max(len(each.words) for pair in answers for each in pair)
    margins, contributions = np.full((2, len(answers), 2, most), np.nan)
    others = np.zeros((len(answers), most), bool)
    for place, (pair, captions) in enumerate(zip(answers, data.captions, strict=True)):
        for side, (answer, caption) in enumerate(zip(pair, captions, strict=True)):
            content = [span.has_content for span in words(caption)]
            values = np.array([(word.margin, word.contribution) for word in answer.words]).T
            margins[place, side, : len(content)] = np.where(content, values[0], np.nan)
            contributions[place, side, : len(content)] = np.where(content, values[1], np.nan)
        marks = changed(*captions)
        others[place, : len(marks)] = marks
    arrays = {
        "cosine": np.array([[each.score for each in pair] for pair in answers]),
        "f_score": np.array([[each.f_score for each in pair] for pair in answers]),
        "margins": margins,
        "contributions": contributions,
        "changed": others,
        "threshold": np.array(answers[0][0].threshold),
    }
    return Samples({"pairs": len(answers)}, arrays, {"method": (answers[0][0].method,)})


def _both(
    bundle: Bundle, shown: Picture, captions: tuple[str, str], params: Params
) -> Flow[tuple[Explanation, Explanation]]:
    """Two captions of a picture that is embedded once."""
    bundle.require("explain")
    row = yield from picture(bundle, Path(shown) if isinstance(shown, str) else shown)
    requests = [ExplainRequest(b"", caption, params.method) for caption in captions]
    true = yield from explained(bundle, requests[_TRUE], row[0])
    false = yield from explained(bundle, requests[_FALSE], row[0])
    return true, false


@dataclass(frozen=True)
class Judged:
    """``lowest`` float64 [N, 2]: the lowest margin of each caption, infinite without one. ``by_margin`` bool [N]: it is
    an exchanged word's; ``by_contribution``: the lowest contribution is. ``flags`` and ``right`` int64 [N]: flagged
    words of both captions, and exchanged ones among them; ``alarm`` bool [N]: the true caption has a flagged word."""

    lowest: Array
    by_margin: Array
    by_contribution: Array
    flags: Array
    right: Array
    alarm: Array


def judge(samples: Samples, params: Params) -> Judged:
    margins, other = samples.arrays["margins"], samples.arrays["changed"]
    threshold = float(samples.arrays["threshold"]) if params.threshold is None else params.threshold
    filled, plain = (np.where(np.isnan(each), np.inf, each) for each in (margins, samples.arrays["contributions"]))
    flagged = filled < threshold
    return Judged(
        lowest=filled.min(axis=2),
        by_margin=_lowest(filled[:, _FALSE], other),
        by_contribution=_lowest(plain[:, _FALSE], other),
        flags=flagged.sum(axis=(1, 2)),
        right=(flagged[:, _FALSE] & other).sum(axis=1),
        alarm=np.asarray(flagged[:, _TRUE].any(axis=1)),
    )


def _lowest(values: Array, other: Array) -> Array:
    """float [N, W], infinite for words that do not count -> bool [N]: one of the ``other`` words has the lowest."""
    exchanged = np.where(other, values, np.inf).min(axis=1)
    is_lowest: Array = (exchanged == values.min(axis=1)) & np.isfinite(exchanged)
    return is_lowest


def score(samples: Samples, params: Params) -> Statistic:
    judged = judge(samples, params)
    scores = {
        "AUROC cosine": samples.arrays["cosine"],
        "AUROC F-CLIPScore": samples.arrays["f_score"],
        "AUROC lowest margin": judged.lowest,
    }
    areas = Areas([_captions(each) for each in scores.values()], precise=0)
    true, false = samples.arrays["f_score"].T

    def of(rows: Array) -> Sequence[Figure]:
        flags = int(judged.flags[rows].sum())
        values = areas(np.bincount(rows, minlength=samples.count)).auroc
        return (
            Figure("lowest", 100 * float(judged.by_margin[rows].mean()), "%", "exchanged word"),
            Figure("lowest, plain", 100 * float(judged.by_contribution[rows].mean()), "%", "exchanged word"),
            Figure("recall", 100 * float((judged.right[rows] > 0).mean()), "%", "exchanged word"),
            Figure(
                "precision", 100 * int(judged.right[rows].sum()) / flags if flags else np.nan, "%", "exchanged word"
            ),
            Figure("unchanged", 100 * float(judged.alarm[rows].mean()), "%", "captions with a flag"),
            *(Figure(name, float(value), "", "captions") for name, value in zip(scores, values, strict=True)),
            Figure("pairs right", 100 * float((true[rows] > false[rows]).mean()), "%", "captions"),
        )

    return of


def _captions(scores: Array) -> Subset:
    """float [N, 2] -> the scores of 2 N captions, with the pair of each and whether it is true."""
    places = np.repeat(np.arange(len(scores)), 2)
    return Subset(places, scores.ravel(), np.tile([True, False], len(scores)))


def plots(sides: Mapping[str, Samples], params: Params) -> Sequence[Plot]:
    return [_roc(sides), *_histograms(sides, params)]


def _roc(sides: Mapping[str, Samples]) -> Plot:
    lines = []
    for name, samples in sides.items():
        true, false = samples.arrays["f_score"].T
        steps = np.concatenate([[np.inf], np.unique(samples.arrays["f_score"])[::-1]])
        x, y = (np.searchsorted(np.sort(-each), -steps, side="right") / len(each) for each in (false, true))
        lines.append(Line(name, x, y))
    says = (
        "A threshold of the F-CLIPScore accepts this part of the false and of the true captions. The higher the curve, "
        "the better the score tells them apart; the dashed line is chance."
    )
    return Plot(
        "True and false captions", "false captions accepted", "true captions accepted", lines, says, diagonal=True
    )


def _histograms(sides: Mapping[str, Samples], params: Params) -> Iterator[Plot]:
    """Of each side: the lowest margins of true captions beside those of false captions."""
    for name, samples in sides.items():
        lowest = judge(samples, params).lowest
        finite = lowest[np.isfinite(lowest)]
        if not finite.size or finite.min() == finite.max():
            continue
        edges = np.linspace(finite.min(), finite.max(), _BINS + 1)
        threshold = float(samples.arrays["threshold"]) if params.threshold is None else params.threshold
        lines = [
            Line(
                label, (edges[1:] + edges[:-1]) / 2, np.histogram(lowest[np.isfinite(lowest[:, side]), side], edges)[0]
            )
            for side, label in ((_TRUE, "true captions"), (_FALSE, "false captions"))
        ]
        says = f"The lowest margin of each caption. Words below the threshold, {threshold:.3f}, are flagged."
        yield Plot(f"Lowest margins: {name}", "lowest margin", "captions", lines, says)


EVALS.register("misalignment")(
    Eval(
        "explain", DATA, Params, read, predict, score, plots=plots, scoring=frozenset({"threshold"}), limit=300,
    )
)  # fmt: skip
