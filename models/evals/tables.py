"""Samples of one bundle or two -> a table: figures side by side, their difference, and how sure it is.

`text` is the one place that rounds; a `Table` and its JSON hold what was computed.
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
TOGETHER = "both together"  # the heading of figures of two bundles at once


@dataclass(frozen=True)
class Side:
    """``name``: of the bundle, with a number behind it where both sides have one name."""

    name: str
    digest: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure of each side, and the first side less the second where there are two."""

    values: tuple[Figure, ...]
    difference: Figure | None = None

    @property
    def figure(self) -> Figure:
        """Whose name, unit and group are the row's."""
        return self.values[0]


@dataclass(frozen=True)
class Table:
    """``together``: figures of both sides at once. ``resampling``: None where no interval was computed; ``notes`` say
    why. ``data``: the data set's fingerprint."""

    eval: str
    data: str
    counts: Mapping[str, int]
    sides: tuple[Side, ...]
    rows: tuple[Row, ...]
    together: tuple[Figure, ...] = ()
    resampling: Resampling | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values; null for a figure without a value."""
        names = [side.name for side in self.sides]
        return {
            "eval": self.eval,
            "data": self.data,
            "counts": dict(self.counts),
            "bundles": [{"name": s.name, "digest": s.digest, "params": dict(s.params)} for s in self.sides],
            "figures": [
                {
                    "name": row.figure.name, "group": row.figure.group, "unit": row.figure.unit,
                    "values": {name: _plain(one) for name, one in zip(names, row.values, strict=True)},
                }
                | ({"difference": {"unit": row.difference.unit, **_plain(row.difference)}} if row.difference else {})
                for row in self.rows
            ],
            "together": [
                {"name": one.name, "group": one.group, "unit": one.unit, **_plain(one)} for one in self.together
            ],
            "intervals": self.resampling.model_dump() if self.resampling else None,
            "notes": list(self.notes),
        }  # fmt: skip


def tabulate(sides: Sequence[Samples], params: Mapping[str, Any] | None = None, how: Resampling | None = None) -> Table:
    """One bundle's samples, or two bundles' of the same data. ``how`` None: as `Resampling` has it.

    Raises `BadRequest` where they are more, or of other evals or other data. Without scipy, and of a single picture,
    the table has no intervals and says so.
    """
    how = how or Resampling()
    if not 1 <= len(sides) <= 2:
        raise BadRequest(f"samples of {len(sides)} bundles were given; expected of one or two")
    first = sides[0]
    origin, measured = first.made, EVALS.get(first.made.eval)
    for other in sides[1:]:
        _paired(first, other)
    checked = [rescored(side, params or {}) for side in sides]
    statistics = [measured.score(side, given) for side, given in zip(sides, checked, strict=True)]
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
    one, two = first.made, other.made
    if one.eval != two.eval:
        raise BadRequest(f"the samples of {one.bundle} are of {one.eval}, those of {two.bundle} of {two.eval}")
    if one.data != two.data or dict(first.counts) != dict(other.counts):
        raise BadRequest(
            f"the samples of {one.bundle} are of the data set {one.data[:12]}, those of {two.bundle} of "
            f"{two.data[:12]}; only answers to the same pictures can be compared"
        )


class _Layout:
    """All figures of a table as one vector, so that one resample serves all: those of each side, the differences, those
    of both together."""

    def __init__(self, statistics: Sequence[Statistic], both: Statistic | None, count: int) -> None:
        self.count = count
        self._statistics, self._both = statistics, both
        every = np.arange(count)
        found = [statistic(every) for statistic in statistics]
        self._keys = [*dict.fromkeys(one.key for side in found for one in side)]
        first = {one.key: one for side in reversed(found) for one in side}
        named = [first[key] for key in self._keys]
        extra = [*both(every)] if both else []
        self._both_keys = [one.key for one in extra]
        empty = [*named * len(statistics), *(map(_differing, named) if len(statistics) == 2 else ()), *extra]
        self.figures = [replace(one, value=float(v)) for one, v in zip(empty, self.vector(every), strict=True)]

    def vector(self, rows: Array) -> Array:
        """float64 [K] of the pictures at ``rows``."""
        sides = [_values(statistic(rows), self._keys) for statistic in self._statistics]
        if len(sides) == 2:
            sides.append(sides[0] - sides[1])
        if self._both:
            sides.append(_values(self._both(rows), self._both_keys))
        return np.concatenate(sides)

    def with_intervals(self, how: Resampling) -> list[Figure]:
        low, high = intervals(self.vector, self.count, how)
        return [
            replace(one, lower=float(a), upper=float(b)) if one.sampled and np.isfinite([a, b]).all() else one
            for one, a, b in zip(self.figures, low, high, strict=True)
        ]

    def rows(self, figures: Sequence[Figure]) -> Iterator[Row]:
        size, sides = len(self._keys), len(self._statistics)
        for place in range(size):
            *values, difference = (figures[place + size * side] for side in range(sides + (sides == 2)))
            yield Row((*values,), difference) if sides == 2 else Row((difference,))

    def together(self, figures: Sequence[Figure]) -> Sequence[Figure]:
        return figures[len(figures) - len(self._both_keys) :]


def _values(figures: Sequence[Figure], keys: Sequence[tuple[str, str]]) -> Array:
    """In the order of ``keys``; NaN for those that are not there."""
    found = {one.key: one.value for one in figures}
    return np.array([found.get(key, math.nan) for key in keys], np.float64)


def _differing(one: Figure) -> Figure:
    return replace(one, unit="points" if one.unit == "%" else one.unit)


def _plain(one: Figure) -> dict[str, float | None]:
    return {
        key: None if value is None or not math.isfinite(value) else value
        for key, value in (("value", one.value), ("lower", one.lower), ("upper", one.upper))
    }


def rounded(value: float | None, unit: str, sign: str = "") -> str:
    """Percent and points to two places, others to four digits that count."""
    if value is None or not math.isfinite(value):
        return EMPTY
    shown = f"{value:{sign}.2f}" if unit in ("%", "points") else f"{value:{sign}.4g}"
    return shown if float(shown) else shown.lstrip("+-")


def between(one: Figure, sign: str = "") -> str:
    """Its interval in brackets, or nothing."""
    if one.lower is None or one.upper is None:
        return ""
    return f"[{rounded(one.lower, one.unit, sign)}, {rounded(one.upper, one.unit, sign)}]"


def cells(table: Table) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """What a reader sees: the head, and for each group its name and rows of as many cells."""
    two = len(table.sides) == 2
    head = ["figure", "unit", *(side.name for side in table.sides)]
    head += ["difference", *_interval_head(table)] if two else _interval_head(table)
    groups: dict[str, list[list[str]]] = {}
    for row in table.rows:
        one = row.figure
        line = [one.name, one.unit, *(rounded(v.value, one.unit) for v in row.values)]
        if row.difference:
            line.append(rounded(row.difference.value, row.difference.unit, "+"))
        if table.resampling:
            line.append(between(row.difference, "+") if row.difference else between(one))
        groups.setdefault(one.group, []).append(line)
    for one in table.together:
        line = [one.name, one.unit, rounded(one.value, one.unit), *[""] * (len(table.sides) - 1), ""]
        groups.setdefault(one.group or TOGETHER, []).append([*line, between(one)] if table.resampling else line)
    return head, [*groups.items()]


def _interval_head(table: Table) -> list[str]:
    return [f"{100 * table.resampling.confidence:g} % interval"] if table.resampling else []


def remarks(table: Table) -> list[str]:
    """Lines under a table: how intervals were made, params that were set, notes."""
    found = [*table.notes]
    if how := table.resampling:
        paired = "paired " if len(table.sides) == 2 else ""
        found.append(
            f"intervals: {how.resamples} {paired}bootstrap resamples of {next(iter(table.counts))}, {how.method}, "
            f"seed {how.seed}"
        )
    return found


def heading(table: Table) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in table.counts.items())
    return f"{table.eval}: {counts}"


def text(table: Table) -> str:
    """As the command line prints it."""
    head, groups = cells(table)
    lines = [head, *(line for _, rows in groups for line in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(row: Sequence[str]) -> str:
        shown = [cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(shown).rstrip()

    found = [heading(table), line(head)]
    for group, rows in groups:
        found += [f"-- {group}"] if group else []
        found += map(line, rows)
    return "\n".join([*found, *remarks(table)])
