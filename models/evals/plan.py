"""A list of figures that are made of areas of many subsets: all are computed at once for each resample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from calmclip.models.evals import Figure, Statistic
from calmclip.models.evals.areas import Areas, Subset
from calmclip.models.flow import Array

Key = tuple[str, str]  # of a figure
Term = tuple[str, int, float]  # a field of `Measured`, a place of a subset, a factor


@dataclass
class Plan:
    """Subsets to measure, and figures made of them. Subsets with the same pictures are measured once; those with a
    precision come first. A figure is a sum of terms, the least of other figures, a function of the copies of each
    picture, or a fact."""

    margins: Array
    truth: Array
    subsets: list[Subset] = field(default_factory=list)
    precise: int = 0
    figures: list[Figure] = field(default_factory=list)
    sums: dict[int, Sequence[Term]] = field(default_factory=dict)  # by the place of the figure, as the next
    functions: dict[int, Callable[[Array], float]] = field(default_factory=dict)
    _known: dict[tuple[int, bytes], int] = field(default_factory=dict)

    def subset(self, label: int, members: Array) -> int:
        """The place of the subset of ``members`` bool [N] for a label."""
        inside = members & (self.truth[:, label] >= 0)
        key = label, np.packbits(inside).tobytes()
        if key not in self._known:
            places = np.flatnonzero(inside)
            self._known[key] = self.add(Subset(places, self.margins[places, label], self.truth[places, label] == 1))
        return self._known[key]

    def add(self, subset: Subset) -> int:
        self.subsets.append(subset)
        return len(self.subsets) - 1

    def sum(self, name: str, group: str, terms: Sequence[Term]) -> Key:
        self.sums[len(self.figures)] = terms
        return self._figure(Figure(name, np.nan, "", group))

    def function(self, name: str, group: str, of: Callable[[Array], float], unit: str) -> Key:
        self.functions[len(self.figures)] = of
        return self._figure(Figure(name, np.nan, unit, group))

    def least(self, name: str, group: str, keys: Sequence[Key]) -> Key:
        return self._figure(Figure(name, np.nan, "", group, least_of=tuple(keys)))

    def fact(self, name: str, group: str, value: float, unit: str = "pictures") -> Key:
        return self._figure(Figure(name, value, unit, group, estimate=False))

    def _figure(self, figure: Figure) -> Key:
        self.figures.append(figure)
        return figure.key

    def keep(self, name: str) -> None:
        """Leave out all figures but those sums with this name, and the precision of subsets."""
        kept = [place for place in self.sums if self.figures[place].name == name]
        self.sums = {number: self.sums[place] for number, place in enumerate(kept)}
        self.figures, self.functions, self.precise = [self.figures[place] for place in kept], {}, 0

    def statistic(self, count: int) -> Statistic:
        areas = Areas(self.subsets, self.precise)
        start = {name: number * len(self.subsets) for number, name in enumerate(("auroc", "precision", "adjusted"))}
        terms = [(start[name] + place, factor) for each in self.sums.values() for name, place, factor in each]
        index, factors = (np.array(part) for part in zip(*terms, strict=True))
        sizes = [len(each) for each in self.sums.values()]
        begins, targets = np.cumsum([0, *sizes[:-1]]), [*self.sums]
        places = {figure.key: place for place, figure in enumerate(self.figures)}
        least = {places[f.key]: [places[key] for key in f.least_of] for f in self.figures if f.least_of}
        facts = np.array([figure.value for figure in self.figures])

        def of(rows: Array) -> Sequence[Figure]:
            copies, values = np.bincount(rows, minlength=count), facts.copy()
            measured = areas(copies)
            flat = np.concatenate([measured.auroc, measured.precision, measured.adjusted])
            values[targets] = np.add.reduceat(flat[index] * factors, begins)
            for place, members in least.items():
                values[place] = values[members].min()  # NaN if one is NaN, so that the resample is skipped
            for place, function in self.functions.items():
                values[place] = function(copies)
            return [
                Figure(f.name, value, f.unit, f.group, None, None, f.estimate, f.least_of)
                for f, value in zip(self.figures, values.tolist(), strict=True)
            ]

        return of


def mean(field_name: str, places: Sequence[int], sign: float = 1.0) -> list[Term]:
    """The mean of a field of `Measured` over subsets."""
    return [(field_name, place, sign / len(places)) for place in places]


def difference(places: Sequence[int], others: Sequence[int]) -> list[Term]:
    """The mean AUROC of subsets minus that of others."""
    return [*mean("auroc", places), *mean("auroc", others, -1.0)]
