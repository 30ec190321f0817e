"""Figures and curves as data, before they are rounded or drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calmclip.models.flow import Array


@dataclass(frozen=True)
class Figure:
    """``unit``: "%", "nats", "" for a plain number. ``group``: a heading for several figures, such as a corruption or
    an age. ``lower``, ``upper``: a confidence interval, or None."""

    name: str
    value: float
    unit: str = ""
    group: str = ""
    lower: float | None = None
    upper: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name


@dataclass(frozen=True)
class Line:
    """``x``, ``y`` float [n]; a bar at each ``x`` is as wide as the distance of the first two."""

    label: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    kind: Literal["line", "points", "bars"] = "line"


@dataclass(frozen=True)
class Plot:
    """``says``: one sentence on how to read it. ``diagonal``: also draw y = x, dashed."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    says: str
    diagonal: bool = False
