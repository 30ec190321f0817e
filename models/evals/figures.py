"""What scores come to, before anybody rounds or draws it: figures, and curves as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calmclip.models.flow import Array


@dataclass(frozen=True)
class Figure:
    """``unit``: "%", "nats", "" for a plain number. ``group``: a heading that figures stand under, such as a corruption
    or an age. ``lower``, ``upper``: a confidence interval, where there is one. ``sampled``: False for a figure that was
    computed once, of all pictures, whatever the places asked for; it gets no interval."""

    name: str
    value: float
    unit: str = ""
    group: str = ""
    lower: float | None = None
    upper: float | None = None
    sampled: bool = True

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name


@dataclass(frozen=True)
class Line:
    """``x``, ``y`` float [n]; bars stand at ``x``, as wide as they are apart."""

    label: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    kind: Literal["line", "points", "bars"] = "line"


@dataclass(frozen=True)
class Plot:
    """``says``: one sentence on how to read it. ``diagonal``: y = x is drawn too, dashed."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    says: str
    diagonal: bool = False
    log_x: bool = False
