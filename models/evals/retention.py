"""Retention: what a bundle keeps of another one, such as a student of its teacher, in percent.

Each part is an eval of its own, which runs with its defaults; a part is measured if its data are there. ``kept`` is the
first bundle's figure as a percentage of the second's. Above chance, the accuracy of a guess is first taken from both:
of 2 labels a coin keeps 50 % of every teacher, and nothing above chance. A part that one bundle does not serve has no
value. Intervals resample the samples of all parts together, so each part by its own.

Source: Csizmadia et al. 2025, DCLIP (arXiv 2505.21549), which reports the zero-shot accuracy that a student keeps.

Cost: the sum of the parts; see the evals zero_shot, retrieval, regions and segmentation.

Data: a folder zero_shot/, retrieval/, regions/ or segmentation/ with the data of that eval, or all files in one folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, NoParams, Plot, Samples, Statistic
from calmclip.models.flow import Array
from calmclip.models.runner import Runner

DATA = "zero_shot/, retrieval/, regions/ or segmentation/ with the data of that eval, or their files and images/"
KEPT = "kept of the second"  # the heading


@dataclass(frozen=True)
class Part:
    """``files``: one of them is in the folder if the eval has data there. ``unit``: the field of its data set that has
    a row for each sample. ``figures``: those whose kept part is shown; more is better, and the first counts in the
    mean. ``guess``: the figure that a guess of one of so many reaches, and the count of the samples that tells it."""

    files: tuple[str, ...]
    unit: str
    figures: tuple[str, ...]
    guess: tuple[str, str] | None = None


PARTS = {
    "zero_shot": Part(("labels.json",), "pictures", ("top1", "top5"), ("top1", "labels")),
    "retrieval": Part(
        ("captions.jsonl", "captions.json"), "pictures",
        (
            "mean", "text_to_image_r1", "text_to_image_map", "text_to_image_hard", "image_to_text_r1",
            "image_to_text_map", "image_to_text_mrr", "image_to_text_hard",
        ),
    ),
    "regions": Part(("instances.json",), "pictures", ("top1", "mean of classes"), ("top1", "names")),
    "segmentation": Part(("instances.json",), "photographs", ("mIoU present names", "mIoU all names")),
}  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """Name of a part -> the data set of its eval. Raises `BadRequest` if there is none, or one of another name."""

    parts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.parts or not self.parts.keys() <= PARTS.keys():
            raise BadRequest(f"the data set has the parts {[*self.parts]}; expected some of {[*PARTS]}")


def read(data: Path, params: NoParams, limit: int | None = None) -> DataSet:
    """At most ``limit`` samples of each part. A folder ``data``/PART is read before ``data`` itself. Raises
    `BadRequest` if no part has data, and as the parts do."""
    parts = {}
    for name, part in PARTS.items():
        for folder in (data / name, data):
            if any((folder / file).is_file() for file in part.files):
                parts[name] = EVALS.get(name).read(folder, EVALS.get(name).params(), limit)
                break
    if not parts:
        raise BadRequest(f"{data} holds the data of no part; the data directory must hold {DATA}")
    return DataSet(parts)


def predict(runner: Runner, data: DataSet, params: NoParams) -> Samples:
    """The samples of all parts that the bundle serves: arrays and words are named PART.NAME; ``PART.counts`` and
    ``PART.units`` are the counts of the part. The words ``parts`` name the parts of the data set, and ``sizes`` int64
    [parts] their samples, which lie one part after the other."""
    sizes = [len(getattr(content, PARTS[name].unit)) for name, content in data.parts.items()]
    arrays: dict[str, Array] = {"sizes": np.array(sizes, np.int64)}
    words: dict[str, Sequence[str]] = {"parts": tuple(data.parts)}
    for name, content in data.parts.items():
        each = EVALS.get(name)
        if each.task in runner.bundle.tasks:
            samples = each.predict(runner, content, each.params())
            arrays |= {f"{name}.{key}": array for key, array in samples.arrays.items()}
            words |= {f"{name}.{key}": texts for key, texts in samples.words.items()}
            arrays[f"{name}.counts"] = np.array([*samples.counts.values()], np.int64)
            words[f"{name}.units"] = tuple(samples.counts)
    counts = {f"of {name}": size for name, size in zip(data.parts, sizes, strict=True)}
    return Samples({"samples": sum(sizes), **counts}, arrays, words)


@dataclass(frozen=True)
class _Share:
    """A part of the samples: those from ``low`` to ``high`` of all. ``samples``: None if the bundle does not serve
    it."""

    low: int
    high: int
    samples: Samples | None

    def of(self, statistic: Statistic) -> Statistic:
        """``statistic`` of this part's rows among the rows of all; NaN for no row."""
        names = [replace(figure, value=np.nan) for figure in statistic(np.arange(self.high - self.low))]

        def inside(rows: Array) -> Sequence[Figure]:
            those = rows[(rows >= self.low) & (rows < self.high)] - self.low
            return statistic(those) if len(those) else names

        return inside


def shares(samples: Samples) -> dict[str, _Share]:
    """Name of a part -> its samples."""
    names = samples.words["parts"]
    edges = pairwise(accumulate(samples.arrays["sizes"].tolist(), initial=0))
    return {name: _Share(low, high, _samples(samples, name)) for name, (low, high) in zip(names, edges, strict=True)}


def _samples(samples: Samples, name: str) -> Samples | None:
    if f"{name}.units" not in samples.words:
        return None
    start = f"{name}."
    arrays = {key.removeprefix(start): array for key, array in samples.arrays.items() if key.startswith(start)}
    words = {key.removeprefix(start): texts for key, texts in samples.words.items() if key.startswith(start)}
    counts = dict(zip(words.pop("units"), arrays.pop("counts").tolist(), strict=True))
    return Samples(counts, arrays, words)


def score(samples: Samples, params: NoParams) -> Statistic:
    statistics = _statistics(samples)
    return lambda rows: [
        replace(figure, group=_heading(name, figure))
        for name, statistic in statistics.items()
        for figure in statistic(rows)
    ]


def _statistics(samples: Samples) -> dict[str, Statistic]:
    return {
        name: share.of(EVALS.get(name).score(share.samples, EVALS.get(name).params()))
        for name, share in shares(samples).items()
        if share.samples is not None
    }


def _heading(name: str, figure: Figure) -> str:
    return f"{name}, {figure.group}" if figure.group else name


def together(samples: Samples, others: Samples, params: NoParams) -> Statistic:
    """What the first keeps of the second, in percent; then what the parts themselves say of both."""
    first, second, theirs = shares(samples), _statistics(others), shares(others)
    sides = {name: (each, second[name]) for name, each in _statistics(samples).items() if name in second}
    both = {}
    for name in sides:
        if make := EVALS.get(name).together:
            ours, other = first[name].samples, theirs[name].samples
            assert ours is not None
            assert other is not None
            both[name] = first[name].of(make(ours, other, EVALS.get(name).params()))
    chances = {name: _chance(PARTS[name], first[name]) for name in sides}

    def of(rows: Array) -> Sequence[Figure]:
        figures, heads = [], []
        for name, (statistic, other) in sides.items():
            a, b = ({figure.name: figure.value for figure in each(rows)} for each in (statistic, other))
            kept = [Figure(f"{name} {key}", _percent(a[key], b[key]), "%", KEPT) for key in PARTS[name].figures]
            heads.append(kept[0].value)
            if (guess := PARTS[name].guess) is not None:
                key, chance = guess[0], chances[name]
                value = _percent(a[key] - chance, b[key] - chance)
                kept.append(Figure(f"{name} {key} above chance", value, "%", KEPT))
            figures += kept
        figures.append(Figure("mean of the parts", float(np.mean(heads)) if heads else np.nan, "%", KEPT))
        more = [replace(each, group=_heading(name, each)) for name, of in both.items() for each in of(rows)]
        return [*figures, *more]

    return of


def _chance(part: Part, share: _Share) -> float:
    """Percent; 0 for a part without one."""
    return 100 / share.samples.counts[part.guess[1]] if part.guess and share.samples else 0.0


def _percent(value: float, whole: float) -> float:
    """NaN if there is nothing to keep."""
    return 100 * value / whole if whole > 0 else np.nan


def plots(sides: Mapping[str, Samples], params: NoParams) -> Sequence[Plot]:
    """The plots of the parts."""
    drawn: list[Plot] = []
    for name in next(iter(sides.values())).words["parts"]:
        part = {side: shares(samples)[name].samples for side, samples in sides.items()}
        served = {side: samples for side, samples in part.items() if samples is not None}
        if served and (make := EVALS.get(name).plots):
            drawn += [replace(each, title=f"{name}: {each.title}") for each in make(served, EVALS.get(name).params())]
    return drawn


EVALS.register("retention")(Eval("embed", DATA, NoParams, read, predict, score, together, plots, limit=300))
