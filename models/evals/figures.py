"""Figures and curves as data, before they are rounded or drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calmclip.models.flow import Array


@dataclass(frozen=True)
class Figure:
    """``unit``: "%", "nats", "" for a plain number. ``group``: a heading for several figures, such as a corruption or
    an age. ``lower``, ``upper``: a confidence interval, or None.

    ``estimate``: False for a fact of the data set, such as a number of pictures; it has no interval and no difference.
    ``least_of``: the keys of the figures whose least this one is; its interval accounts for that choice.
    """

    name: str
    value: float
    unit: str = ""
    group: str = ""
    lower: float | None = None
    upper: float | None = None
    estimate: bool = True
    least_of: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name


@dataclass(frozen=True)
class Line:
    """``x``, ``y`` float [n]; a bar at each ``x`` is as wide as the distance of the first two. ``lower``, ``upper``
    [n] or empty: an interval at each point."""

    label: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    kind: Literal["line", "points", "bars"] = "line"
    lower: Sequence[float] | Array = ()
    upper: Sequence[float] | Array = ()


@dataclass(frozen=True)
class Plot:
    """``says``: one sentence on how to read it. ``diagonal``: also draw y = x, dashed. ``names``: of x = 0, 1, …, in
    place of numbers."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    says: str
    diagonal: bool = False
    names: Sequence[str] = ()
