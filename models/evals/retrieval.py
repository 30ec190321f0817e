"""Retrieval: recall@1/5/10, average precision and hard negatives, text -> image and image -> text, over captioned
pictures.

Source: Karpathy & Fei-Fei 2015 (arXiv 1412.2306), section 4.2: a query is a hit if one of its matches is among the
first K. Every caption is a query for its picture; every picture is a query for any of its captions. `ranked` defines
the other figures: map, mrr (the reciprocal rank of the best match), and hard: the best match is before all hard
negatives. A caption has one match, so its map is its mrr. Intervals resample pictures, with their captions, as queries;
the searched set does not change.

By language: captions in other languages get figures of their own, under the language as heading. They search the same
pictures, and a picture searches the captions of one language. "minus en" is the difference to the reference language,
paired: over the pictures with captions in both, a picture's mean hit in the one minus its mean hit in the other.

Data: captions.json {"file": [captions]}, or captions.jsonl lines {"image", "captions"}; pictures under images/. Other
languages: captions.de.json beside captions.json, or lines with "lang". Captions without a language give the figures
without a heading; if there are none, those of the reference language do. They also are the reference, unless there are
others in that language. Bundles that read vectors of a language model (LLM2CLIP) take those of vectors.npz: ``texts``
[N], the captions, and ``vectors`` [N, d].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel, Language
from calmclip.models.datasets import first, read_languages
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, Line, Plot, Samples, Statistic
from calmclip.models.evals.ranked import before, ranked
from calmclip.models.evals.vectors import vectors
from calmclip.models.flow import Array
from calmclip.models.runner import Picture, Runner
from calmclip.models.tasks.features import prefix
from calmclip.models.vector_files import read_text_vectors

DATA = (
    'captions.json ({"file": [captions]}) or captions.jsonl ({"image", "captions"} a line), and images/; other '
    'languages: captions.LANG.json, or "lang" in a line'
)
RECALLS = (1, 5, 10)
CURVE = range(1, 51)  # K of the plot
SCORING = frozenset({"margin", "negatives", "dimensions", "reference"})
HARD = "hard negatives of the second"  # the heading of figures of both bundles


class Params(FrozenModel):
    margin: float = Field(default=0.1, ge=0, le=2, description="a cosine so far above the match is no hard negative")
    negatives: int = Field(default=8, ge=1, le=1000, description="hard negatives of a query")
    dimensions: int | None = Field(
        default=None, ge=1, description="rank by the first so many numbers, whether or not the bundle says they hold"
    )
    reference: Language = Field(default="en", description="other languages are compared with this one")


@dataclass(frozen=True)
class DataSet:
    """``captions``: at least one per picture. ``translations``: language -> the captions of each picture in it, of some
    pictures none. ``vectors``: caption -> its vector, for bundles that read vectors of a language model."""

    pictures: Sequence[Picture]
    captions: Sequence[Sequence[str]]
    translations: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    vectors: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pictures or len(self.pictures) != len(self.captions) or not all(self.captions):
            raise BadRequest(
                f"{len(self.pictures)} pictures, {sum(map(bool, self.captions))} with captions; expected all"
            )


def read(data: Path, params: Params, limit: int | None = None) -> DataSet:
    """Raises `BadRequest` as `read_languages`, and if captions neither are without a language nor in the reference."""
    languages = read_languages(data)
    usual = languages.pop("") or languages.pop(params.reference, {})
    if not usual:
        raise BadRequest(
            f"{data} has captions in {', '.join(languages)}; expected some in {params.reference}, or without a "
            "language. Set reference to one of them"
        )
    pictures = first([*usual], limit)
    return DataSet(
        [data / "images" / name for name in pictures],
        [usual[name] for name in pictures],
        {language: [texts.get(name, ()) for name in pictures] for language, texts in languages.items()},
        read_text_vectors(data),
    )


def predict(runner: Runner, data: DataSet, params: Params) -> Samples:
    """Samples: ``images`` float32 [P, D]; ``texts`` [C, D], and ``owner`` int64 [C], the picture of each caption; the
    same as ``texts LANG`` and ``owner LANG`` for each other language."""
    captions = {"": data.captions, **data.translations}
    flat = {language: [text for each in texts for text in each] for language, texts in captions.items()}
    images, rows = vectors(runner, data.pictures, [text for texts in flat.values() for text in texts], data.vectors)
    counts, arrays, start = {"pictures": len(images)}, {"images": images}, 0
    for language, texts in captions.items():
        lengths = [len(each) for each in texts]
        counts[f"captions in {language}" if language else "captions"] = sum(lengths)
        arrays[_key("texts", language)] = rows[start : start + sum(lengths)]
        arrays[_key("owner", language)] = np.repeat(np.arange(len(texts)), lengths).astype(np.int64)
        start += sum(lengths)
    return Samples(counts, arrays, {"languages": tuple(data.translations)})


def _key(name: str, language: str) -> str:
    return f"{name} {language}" if language else name


def _shortened(samples: Samples, params: Params) -> Samples:
    """The samples with the first `Params.dimensions` numbers of each vector, as unit vectors. Raises `BadRequest`."""
    if params.dimensions is None:
        return samples
    if params.dimensions > (dim := samples.arrays["images"].shape[1]):
        raise BadRequest(f"dimensions is {params.dimensions}; the vectors have {dim}")
    vectors = {name: prefix(array, params.dimensions) for name, array in samples.arrays.items() if array.ndim == 2}
    return replace(samples, arrays={**samples.arrays, **vectors})


@dataclass(frozen=True)
class Direction:
    """One direction of the search. ``matches``: see `ranked`; ``picture`` int64 [Q]: the picture of each query."""

    queries: Array
    gallery: Array
    matches: Callable[[slice], Array]
    picture: Array


def directions(samples: Samples, language: str = "") -> Mapping[str, Direction]:
    """``language`` "": the captions without one."""
    images, texts, owner = (
        samples.arrays[name] for name in ("images", _key("texts", language), _key("owner", language))
    )
    pictures = np.unique(owner)  # those with captions
    return {
        "text_to_image": Direction(texts, images, lambda rows: owner[rows][:, None] == np.arange(len(images)), owner),
        "image_to_text": Direction(images[pictures], texts, lambda rows: pictures[rows][:, None] == owner, pictures),
    }


@dataclass(frozen=True)
class _Values:
    """``values`` [Q]: of each query; ``picture`` int64 [Q]."""

    values: Array
    picture: Array

    def mean(self, weights: Array) -> float:
        """In percent; ``weights`` [P]: of the pictures. NaN if none has a query."""
        each = weights[self.picture]
        return 100 * float(np.average(self.values, weights=each)) if each.any() else float("nan")

    def by_picture(self, count: int) -> Array:
        """float64 [P]: the mean of each picture, NaN without a query."""
        number = np.bincount(self.picture, minlength=count)
        with np.errstate(invalid="ignore"):
            means: Array = np.bincount(self.picture, self.values, count) / number
        return means


def score(samples: Samples, params: Params) -> Statistic:
    """The mean is that of the six recalls."""
    samples = _shortened(samples, params)
    languages = samples.words.get("languages", ())
    of_query = {language: _hits(samples, language, params) for language in ("", *languages) if _has(samples, language)}
    reference = of_query[params.reference if params.reference in of_query else ""]
    gains: dict[tuple[str, str], Array] = {}
    for language, values in of_query.items():
        if language not in ("", params.reference):
            for name in _names():
                ours, theirs = (each[name].by_picture(samples.count) for each in (values, reference))
                gains[language, f"{name} minus {params.reference}"] = ours - theirs

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)
        figures = {name: each.mean(weights) for name, each in of_query[""].items()}
        figures["mean"] = float(np.mean([figures[name] for name in _names()]))
        spoken = {(lang, name): of_query[lang][name].mean(weights) for lang in of_query if lang for name in _names()}
        for key, gain in gains.items():
            kept = np.isfinite(gain) & (weights > 0)
            spoken[key] = 100 * float(np.average(gain[kept], weights=weights[kept])) if kept.any() else float("nan")
        return [
            *(Figure(name, value, "%") for name, value in figures.items()),
            *(Figure(name, value, "%", language) for (language, name), value in sorted(spoken.items())),
        ]

    return of


def _hits(samples: Samples, language: str, params: Params) -> dict[str, _Values]:
    hits: dict[str, _Values] = {}
    for name, each in directions(samples, language).items():
        ranking = ranked(each.queries, each.gallery, each.matches, params.margin, params.negatives)
        values: dict[str, Array] = {f"r{k}": ranking.rank < k for k in RECALLS}
        values |= {"map": ranking.precision, "mrr": 1 / (1 + ranking.rank), "hard": ranking.hard}
        hits |= {f"{name}_{key}": _Values(value, each.picture) for key, value in values.items()}
    return hits


def _names() -> list[str]:
    """Of the recalls."""
    return [f"{direction}_r{k}" for direction in ("text_to_image", "image_to_text") for k in RECALLS]


def _has(samples: Samples, language: str) -> bool:
    """A limit may leave a language without captions."""
    return len(samples.arrays[_key("owner", language)]) > 0


def together(samples: Samples, others: Samples, params: Params) -> Statistic:
    """The hard negatives that the second bundle chooses, for both bundles: the percentage of queries whose best match
    is before them. Names of the figures end in ``first`` and ``second``."""
    hits: dict[str, tuple[Array, Array]] = {}
    second = directions(_shortened(others, params))
    for name, each in directions(_shortened(samples, params)).items():
        other = second[name]
        chosen = ranked(other.queries, other.gallery, other.matches, params.margin, params.negatives)
        hits[f"{name}, first"] = before(each.queries, each.gallery, each.matches, chosen.negatives), each.picture
        hits[f"{name}, second"] = chosen.hard, each.picture

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)
        return [
            Figure(name, 100 * float(np.average(right, weights=weights[picture])), "%", HARD)
            for name, (right, picture) in hits.items()
        ]

    return of


def plots(sides: Mapping[str, Samples], params: Params) -> Sequence[Plot]:
    lines = []
    for side, samples in sides.items():
        for name, each in directions(_shortened(samples, params)).items():
            rank = ranked(each.queries, each.gallery, each.matches, params.margin, params.negatives).rank
            recalls = [100 * float((rank < k).mean()) for k in CURVE]
            lines.append(Line(f"{side}, {name.replace('_', ' ')}", CURVE, recalls))
    says = "The part of the queries whose first K answers hold a match: the recall at K."
    return [Plot("Queries with a match among the first K", "K", "queries, %", lines, says)]


EVALS.register("retrieval")(Eval("embed", DATA, Params, read, predict, score, together, plots, SCORING))
