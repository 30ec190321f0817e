"""Retrieval: recall@1/5/10, average precision and hard negatives, text -> image and image -> text, over captioned
pictures.

Source: Karpathy & Fei-Fei 2015 (arXiv 1412.2306), section 4.2: a query is a hit if one of its matches is among the
first K. Every caption is a query for its picture; every picture is a query for any of its captions. `ranked` defines
the other figures: map, mrr (the reciprocal rank of the best match), and hard: the best match is before all hard
negatives. A caption has one match, so its map is its mrr. Intervals resample pictures, with their captions, as queries;
the searched set does not change.

Data: captions.json {"file": [captions]}, or captions.jsonl lines {"image", "captions"}; pictures under images/.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.datasets import first, read_captions
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, Line, Plot, Samples, Statistic
from calmclip.models.evals.ranked import before, ranked
from calmclip.models.evals.vectors import vectors
from calmclip.models.flow import Array
from calmclip.models.runner import Picture, Runner

DATA = 'captions.json ({"file": [captions]}) or captions.jsonl ({"image", "captions"} a line), and images/'
RECALLS = (1, 5, 10)
CURVE = range(1, 51)  # K of the plot
HARD = "hard negatives of the second"  # the heading of figures of both bundles


class Params(FrozenModel):
    margin: float = Field(default=0.1, ge=0, le=2, description="a cosine so far above the match is no hard negative")
    negatives: int = Field(default=8, ge=1, le=1000, description="hard negatives of a query")


@dataclass(frozen=True)
class DataSet:
    """``captions``: at least one per picture."""

    pictures: Sequence[Picture]
    captions: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if not self.pictures or len(self.pictures) != len(self.captions) or not all(self.captions):
            raise BadRequest(
                f"{len(self.pictures)} pictures, {sum(map(bool, self.captions))} with captions; expected all"
            )


def read(data: Path, params: Params, limit: int | None = None) -> DataSet:
    """Raises `BadRequest` as `read_captions`."""
    rows = data / "captions.jsonl"
    pairs = first([*read_captions(rows if rows.is_file() else data / "captions.json").items()], limit)
    return DataSet([data / "images" / name for name, _ in pairs], [captions for _, captions in pairs])


def predict(runner: Runner, data: DataSet, params: Params) -> Samples:
    texts = [caption for captions in data.captions for caption in captions]
    owner = np.repeat(np.arange(len(data.pictures)), [len(captions) for captions in data.captions])
    images, rows = vectors(runner, data.pictures, texts)
    counts = {"pictures": len(images), "captions": len(texts)}
    return Samples(counts, {"images": images, "texts": rows, "owner": owner.astype(np.int64)})


@dataclass(frozen=True)
class Direction:
    """One direction of the search. ``matches``: see `ranked`; ``picture`` int64 [Q]: the picture of each query."""

    queries: Array
    gallery: Array
    matches: Callable[[slice], Array]
    picture: Array


def directions(samples: Samples) -> Mapping[str, Direction]:
    images, texts, owner = (samples.arrays[name] for name in ("images", "texts", "owner"))
    pictures = np.arange(len(images))
    return {
        "text_to_image": Direction(texts, images, lambda rows: owner[rows][:, None] == pictures, owner),
        "image_to_text": Direction(images, texts, lambda rows: pictures[rows][:, None] == owner, pictures),
    }


def score(samples: Samples, params: Params) -> Statistic:
    """The mean is that of the six recalls."""
    of_query: dict[str, tuple[Direction, dict[str, Array]]] = {}
    for name, each in directions(samples).items():
        ranking = ranked(each.queries, each.gallery, each.matches, params.margin, params.negatives)
        values: dict[str, Array] = {f"r{k}": ranking.rank < k for k in RECALLS}
        values |= {"map": ranking.precision, "mrr": 1 / (1 + ranking.rank), "hard": ranking.hard}
        of_query[name] = each, values

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)
        figures = {
            f"{name}_{key}": 100 * float(np.average(value, weights=weights[each.picture]))
            for name, (each, values) in of_query.items()
            for key, value in values.items()
        }
        figures["mean"] = float(np.mean([figures[f"{name}_r{k}"] for name in of_query for k in RECALLS]))
        return [Figure(name, value, "%") for name, value in figures.items()]

    return of


def together(samples: Samples, others: Samples, params: Params) -> Statistic:
    """The hard negatives that the second bundle chooses, for both bundles: the percentage of queries whose best match
    is before them. Names of the figures end in ``first`` and ``second``."""
    hits: dict[str, tuple[Array, Array]] = {}
    second = directions(others)
    for name, each in directions(samples).items():
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
        for name, each in directions(samples).items():
            rank = ranked(each.queries, each.gallery, each.matches, params.margin, params.negatives).rank
            recalls = [100 * float((rank < k).mean()) for k in CURVE]
            lines.append(Line(f"{side}, {name.replace('_', ' ')}", CURVE, recalls))
    says = "The part of the queries whose first K answers hold a match: the recall at K."
    return [Plot("Queries with a match among the first K", "K", "queries, %", lines, says)]


EVALS.register("retrieval")(
    Eval("embed", DATA, Params, read, predict, score, together, plots, frozenset({"margin", "negatives"}))
)
