"""Pairs that look or read alike: two pictures and two captions, or one picture with a true and a false caption.

Two pictures: captions C0, C1 belong to pictures I0, I1, and s is the cosine. Source: Thrush et al. 2022, Winoground
(arXiv 2204.03162), equations 1 to 3:

    text    each picture takes its caption: s(C0, I0) > s(C1, I0) and s(C1, I1) > s(C0, I1)
    image   each caption takes its picture: s(C0, I0) > s(C0, I1) and s(C1, I1) > s(C1, I0)
    group   text and image

MMVP-VLM's accuracy is the mean over the visual patterns of ``image``. Source: Tong et al. 2024 (arXiv 2401.06209),
whose table 1 reports it, and whose published evaluation compares the two pictures for each caption; a pair is right if
both choices are. It counts a tie as the second picture; here a tie is never right.

One picture I: ``caption`` is s(true, I) > s(false, I). Source: Yuksekgonul et al. 2023, ARO (arXiv 2210.01936); Hsieh
et al. 2023, SugarCrepe (arXiv 2306.14610).

At random text, image and MMVP are 25 %, group is 1 in 6, caption 50 %. Cost: each picture and each caption is embedded
once, also if several pairs hold it. Intervals resample pairs.

Data: pairs.jsonl and images/, or MMVP_VLM or SugarCrepe as they are published; see `datasets.read_pairs`.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from calmclip.models.datasets import PAIRS, first, read_pairs
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, NoParams, Samples, Statistic
from calmclip.models.evals.vectors import vectors
from calmclip.models.flow import Array
from calmclip.models.runner import Picture, Runner

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """``captions``: two. Of two ``pictures`` the first belongs to the first caption, the second to the second; to one
    picture only the first caption belongs. ``category``: such as a visual pattern, or empty."""

    pictures: Sequence[Picture]
    captions: Sequence[str]
    category: str = ""


@dataclass(frozen=True)
class DataSet:
    """Raises `BadRequest` for no pairs, and for a pair of other numbers of pictures or captions."""

    pairs: Sequence[Pair]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise BadRequest("the data set has no pairs; expected at least one")
        for number, pair in enumerate(self.pairs):
            if len(pair.pictures) not in (1, 2) or len(pair.captions) != 2:
                raise BadRequest(
                    f"pair {number} has {len(pair.pictures)} pictures and {len(pair.captions)} captions; expected one "
                    "picture or two, and two captions"
                )


def read(data: Path, params: NoParams, limit: int | None = None) -> DataSet:
    """At most ``limit`` pairs. Raises `BadRequest` as `read_pairs`."""
    return DataSet([Pair(*row) for row in first(read_pairs(data), limit)])


def predict(runner: Runner, data: DataSet, params: NoParams) -> Samples:
    """-> ``cosines`` float64 [N, caption, picture], NaN for the second picture of a pair with one; ``two`` bool [N]:
    pairs with two pictures; ``category`` int64 [N], an index into the words ``categories``."""
    pairs = data.pairs
    pictures, picture_places = _once(picture for pair in pairs for picture in pair.pictures)
    captions, caption_places = _once(caption for pair in pairs for caption in pair.captions)
    categories, category = _once(pair.category for pair in pairs)
    images, texts = (rows.astype(np.float64) for rows in vectors(runner, pictures, captions))
    shown, read = iter(images[picture_places]), texts[caption_places].reshape(len(pairs), 2, -1)
    cosines = np.full((len(pairs), 2, 2), np.nan)
    for place, pair in enumerate(pairs):
        for column, image in enumerate(islice(shown, len(pair.pictures))):
            # a sum for each cell: equal vectors then have equal cosines, which a product of matrices may round apart
            cosines[place, :, column] = [(text * image).sum() for text in read[place]]
    counts = {"pairs": len(pairs), "pictures": len(pictures), "captions": len(captions)}
    two = np.array([len(pair.pictures) == 2 for pair in pairs])
    arrays = {"cosines": cosines, "two": two, "category": np.array(category, np.int64)}
    return Samples(counts, arrays, {"categories": categories})


def _once(items: Iterable[T]) -> tuple[list[T], list[int]]:
    """The different items in order, and the place of each item among them. Pictures in memory are equal only if they
    are one object."""
    different: dict[Hashable, T] = {}
    keys: list[Hashable] = []
    for item in items:
        keys.append(item if isinstance(item, str | Path) else id(item))
        different.setdefault(keys[-1], item)
    places = {key: place for place, key in enumerate(different)}
    return [*different.values()], [places[key] for key in keys]


def score(samples: Samples, params: NoParams) -> Statistic:
    cosines, two, category = (samples.arrays[name] for name in ("cosines", "two", "category"))
    (c0_i0, c0_i1), (c1_i0, c1_i1) = np.moveaxis(cosines, 0, -1)
    text = (c0_i0 > c1_i0) & (c1_i1 > c0_i1)
    image = (c0_i0 > c0_i1) & (c1_i1 > c1_i0)
    forms = [
        _Form(two, {"text": text, "image": image, "group": text & image}, ("mmvp", "image")),
        _Form(~two, {"caption": c0_i0 > c1_i0}, ("caption mean", "caption")),
    ]
    present = [form for form in forms if form.pairs.any()]
    categories = samples.words["categories"]
    return lambda rows: [figure for form in present for figure in form.figures(rows, category, categories)]


@dataclass(frozen=True)
class _Form:
    """``pairs`` bool [N]: the pairs of this form. ``right``: figure -> bool [N]. ``mean``: the name of the mean over
    categories, and the figure that it is the mean of."""

    pairs: Array
    right: Mapping[str, Array]
    mean: tuple[str, str]

    def figures(self, rows: Array, category: Array, categories: Sequence[str]) -> Iterator[Figure]:
        """Figures of the pairs at ``rows``, then of each category that has a name. NaN for no pair."""
        rows = rows[self.pairs[rows]]
        total = np.bincount(category[rows], minlength=len(categories))
        hits = {
            name: np.bincount(category[rows], weights=right[rows], minlength=len(categories))
            for name, right in self.right.items()
        }
        for name, of_category in hits.items():
            yield _percent(name, of_category.sum(), total.sum())
        name, of = self.mean
        occurs = total > 0
        yield _percent(name, (hits[of][occurs] / total[occurs]).sum(), occurs.sum())
        for place in sorted({*category[self.pairs].tolist()}):
            if categories[place]:
                for name, of_category in hits.items():
                    yield _percent(name, of_category[place], total[place], categories[place])


def _percent(name: str, hits: float, count: int, group: str = "") -> Figure:
    return Figure(name, 100 * float(hits) / int(count) if count else math.nan, "%", group)


EVALS.register("pairs")(Eval("embed", PAIRS, NoParams, read, predict, score))
