"""Samples of one bundle or two -> a table of figures, their differences, and intervals.

Only `text` rounds; a `Table` and its JSON have the computed values.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Statistic
from calmclip.models.evals.bootstrap import Resampling, intervals
from calmclip.models.evals.figures import Figure
from calmclip.models.evals.measure import rescored
from calmclip.models.evals.samples import Samples
from calmclip.models.extras import how_to_install
from calmclip.models.flow import Array

EMPTY = "-"
TOGETHER = "both together"  # the heading of figures that compare two bundles


@dataclass(frozen=True)
class Side:
    """``name``: the bundle's, with a number if both sides have the same name."""

    name: str
    digest: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure of each side; with two sides, also the first minus the second, if it is an estimate."""

    values: tuple[Figure, ...]
    difference: Figure | None = None

    @property
    def figure(self) -> Figure:
        """The figure with the row's name, unit and group."""
        return self.values[0]


@dataclass(frozen=True)
class Table:
    """``together``: figures that compare both sides. ``resampling``: None if there are no intervals; ``notes`` say why.
    ``data``: the data set's fingerprint."""

    eval: str
    data: str
    counts: Mapping[str, int]
    sides: tuple[Side, ...]
    rows: tuple[Row, ...]
    together: tuple[Figure, ...] = ()
    resampling: Resampling | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON-like values; null for a figure without a value."""
        names = [side.name for side in self.sides]
        return {
            "eval": self.eval,
            "data": self.data,
            "counts": dict(self.counts),
            "bundles": [{"name": s.name, "digest": s.digest, "params": dict(s.params)} for s in self.sides],
            "figures": [
                {
                    "name": row.figure.name, "group": row.figure.group, "unit": row.figure.unit,
                    "values": {name: _plain(figure) for name, figure in zip(names, row.values, strict=True)},
                }
                | ({"difference": {"unit": row.difference.unit, **_plain(row.difference)}} if row.difference else {})
                for row in self.rows
            ],
            "together": [
                {"name": figure.name, "group": figure.group, "unit": figure.unit, **_plain(figure)}
                for figure in self.together
            ],
            "intervals": self.resampling.model_dump() if self.resampling else None,
            "notes": list(self.notes),
        }  # fmt: skip


def tabulate(sides: Sequence[Samples], params: Mapping[str, Any] | None = None, how: Resampling | None = None) -> Table:
    """The table of one bundle's samples, or of two bundles' samples of the same data. ``how`` None: `Resampling()`.

    Raises `BadRequest` for more than two, and for different evals or data sets. Without scipy, or with a single
    picture, the table has no intervals but a note.
    """
    how = how or Resampling()
    if not 1 <= len(sides) <= 2:
        raise BadRequest(f"samples of {len(sides)} bundles were given; expected one or two")
    first = sides[0]
    origin, measured = first.made, EVALS.get(first.made.eval)
    for other in sides[1:]:
        _paired(first, other)
    checked = [rescored(side, params or {}) for side in sides]
    statistics = [measured.score(side, settings) for side, settings in zip(sides, checked, strict=True)]
    both = measured.together(sides[0], sides[1], checked[0]) if measured.together and len(sides) == 2 else None

    layout = _Layout(statistics, both, first.count)
    figures, notes = layout.figures, []
    if first.count < 2:
        notes.append(f"no intervals: the data set has {first.count} of {next(iter(first.counts))}")
    else:
        try:
            figures = layout.with_intervals(how)
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] != "scipy":
                raise
            notes.append(f"no intervals: they need 'scipy', which is not installed; {how_to_install('eval')}")
    names = [side.made.bundle for side in sides]
    if len({*names}) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return Table(
        origin.eval, origin.data, dict(first.counts),
        tuple(
            Side(name, side.made.digest, used.model_dump(mode="json"))
            for name, side, used in zip(names, sides, checked, strict=True)
        ),
        tuple(layout.rows(figures)), tuple(layout.together(figures)), None if notes else how, tuple(notes),
    )  # fmt: skip


def _paired(first: Samples, other: Samples) -> None:
    ours, theirs = first.made, other.made
    if ours.eval != theirs.eval:
        raise BadRequest(f"the samples of {ours.bundle} are of {ours.eval}, those of {theirs.bundle} of {theirs.eval}")
    if ours.data != theirs.data or dict(first.counts) != dict(other.counts):
        raise BadRequest(
            f"the samples of {ours.bundle} are of the data set {ours.data[:12]}, those of {theirs.bundle} of "
            f"{theirs.data[:12]}; only answers to the same pictures can be compared"
        )


class _Layout:
    """All figures of a table as one vector, for one resampling: each side's, the differences, those of both
    together."""

    def __init__(self, statistics: Sequence[Statistic], both: Statistic | None, count: int) -> None:
        self.count = count
        self._statistics, self._both = statistics, both
        every = np.arange(count)
        sides = [statistic(every) for statistic in statistics]
        self._keys = [*dict.fromkeys(figure.key for side in sides for figure in side)]
        first = {figure.key: figure for side in reversed(sides) for figure in side}
        named = [first[key] for key in self._keys]
        extra = [*both(every)] if both else []
        self._both_keys = [figure.key for figure in extra]
        empty = [*named * len(statistics), *(map(_differing, named) if len(statistics) == 2 else ()), *extra]
        self.figures = [replace(figure, value=float(v)) for figure, v in zip(empty, self.vector(every), strict=True)]

    def vector(self, rows: Array) -> Array:
        """float64 [K] for the pictures at ``rows``."""
        sides = [_values(statistic(rows), self._keys) for statistic in self._statistics]
        if len(sides) == 2:
            sides.append(sides[0] - sides[1])
        if self._both:
            sides.append(_values(self._both(rows), self._both_keys))
        return np.concatenate(sides)

    def with_intervals(self, how: Resampling) -> list[Figure]:
        low, high = intervals(self.vector, self.count, how, self._least())
        return [
            replace(figure, lower=float(a), upper=float(b)) if figure.estimate and np.isfinite([a, b]).all() else figure
            for figure, a, b in zip(self.figures, low, high, strict=True)
        ]

    def _least(self) -> dict[int, list[int]]:
        """Place of a figure of one side -> the places of the figures whose least it is."""
        size = len(self._keys)
        places = {key: place for place, key in enumerate(self._keys)}
        return {
            start + place: [start + places[key] for key in figure.least_of]
            for start in range(0, size * len(self._statistics), size)
            for place, figure in enumerate(self.figures[:size])
            if figure.least_of
        }

    def rows(self, figures: Sequence[Figure]) -> Iterator[Row]:
        size, sides = len(self._keys), len(self._statistics)
        for place in range(size):
            *values, difference = (figures[place + size * side] for side in range(sides + (sides == 2)))
            if sides == 1:
                yield Row((difference,))
            else:
                yield Row((*values,), difference if difference.estimate else None)

    def together(self, figures: Sequence[Figure]) -> Sequence[Figure]:
        return figures[len(figures) - len(self._both_keys) :]


def _values(figures: Sequence[Figure], keys: Sequence[tuple[str, str]]) -> Array:
    """Values in the order of ``keys``; NaN for an absent figure."""
    values = {figure.key: figure.value for figure in figures}
    return np.array([values.get(key, math.nan) for key in keys], np.float64)


def _differing(figure: Figure) -> Figure:
    return replace(figure, unit="points" if figure.unit == "%" else figure.unit, least_of=())


def _plain(figure: Figure) -> dict[str, float | None]:
    return {
        key: None if value is None or not math.isfinite(value) else value
        for key, value in (("value", figure.value), ("lower", figure.lower), ("upper", figure.upper))
    }


def rounded(value: float | None, unit: str, sign: str = "") -> str:
    """Percent and points to two decimals, whole numbers in full, others to four significant digits."""
    if value is None or not math.isfinite(value):
        return EMPTY
    form = ".2f" if unit in ("%", "points") else ".0f" if value == int(value) else ".4g"
    shown = f"{value:{sign}{form}}"
    return shown if float(shown) else shown.lstrip("+-")


def between(figure: Figure, sign: str = "") -> str:
    """The figure's interval in brackets, or an empty string."""
    if figure.lower is None or figure.upper is None:
        return ""
    return f"[{rounded(figure.lower, figure.unit, sign)}, {rounded(figure.upper, figure.unit, sign)}]"


def cells(table: Table) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """The head, and for each group its name and its rows, all with the same number of cells."""
    two = len(table.sides) == 2
    head = ["figure", "unit", *(side.name for side in table.sides)]
    head += ["difference", *_interval_head(table)] if two else _interval_head(table)
    groups: dict[str, list[list[str]]] = {}
    for row in table.rows:
        figure = row.figure
        line = [figure.name, figure.unit, *(rounded(v.value, figure.unit) for v in row.values)]
        if two:
            line.append(rounded(row.difference.value, row.difference.unit, "+") if row.difference else "")
        if table.resampling:
            line.append(between(row.difference, "+") if row.difference else between(figure))
        groups.setdefault(figure.group, []).append(line)
    for figure in table.together:
        line = [figure.name, figure.unit, rounded(figure.value, figure.unit), *[""] * (len(table.sides) - 1), ""]
        groups.setdefault(figure.group or TOGETHER, []).append([*line, between(figure)] if table.resampling else line)
    return head, [*groups.items()]


def _interval_head(table: Table) -> list[str]:
    return [f"{100 * table.resampling.confidence:g} % interval"] if table.resampling else []


def remarks(table: Table) -> list[str]:
    """The lines under a table: notes, and how the intervals were computed."""
    lines = [*table.notes]
    if how := table.resampling:
        paired = "paired " if len(table.sides) == 2 else ""
        lines.append(
            f"intervals: {how.resamples} {paired}bootstrap resamples of {next(iter(table.counts))}, {how.method}, "
            f"seed {how.seed}"
        )
    if any(row.figure.least_of for row in table.rows):
        lines.append("worst: the least of many figures is low by chance; the interval of one bundle accounts for that")
    return lines


def heading(table: Table) -> str:
    counts = ", ".join(f"{count} {unit}" for unit, count in table.counts.items())
    return f"{table.eval}: {counts}"


def text(table: Table) -> str:
    """The table as text for a terminal."""
    head, groups = cells(table)
    lines = [head, *(line for _, rows in groups for line in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(row: Sequence[str]) -> str:
        shown = [cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(shown).rstrip()

    output = [heading(table), line(head)]
    for group, rows in groups:
        output += [f"-- {group}"] if group else []
        output += map(line, rows)
    return "\n".join([*output, *remarks(table)])
