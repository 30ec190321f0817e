"""groups.csv: pictures with findings and groups, the data set of `subgroups`.

A line has a ``file`` under images/. A finding is a column of its own with 1, 0 or nothing (unknown), or the classes
are the texts of one column ``label``. A group column has texts; a column with bins has numbers. An empty cell is
unknown: the picture is left out there and nowhere else.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.datasets import CsvTable, first, read_table
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.runner import Picture

DATA = 'groups.csv ("file", findings as columns of 1 and 0 or one column "label", columns of groups) and images/'
FILE, CLASS = "file", "label"
UNKNOWN = -1
AGES = (18.0, 25.0, 50.0, 65.0, 80.0)


class Columns(FrozenModel):
    """The params that say which columns of groups.csv mean what."""

    labels: tuple[str, ...] = Field(default=(), description="columns of findings; none: the classes of column label")
    group_by: tuple[str, ...] = Field(default=(), description="columns of groups")
    bins: dict[str, tuple[float, ...]] = Field(
        default={"age": AGES},
        description="numeric column -> lower edges; a bin holds its edge, and the last one has no end",
    )
    shortcut: tuple[str, str] | None = Field(default=None, description="a finding, and a column of 1 and 0")
    seed: int = Field(default=0, ge=0, description="of the pictures of a limit, and of the folds of the probe")

    @model_validator(mode="after")
    def _consistent(self) -> "Columns":
        for name, edges in self.bins.items():
            if not edges or list(edges) != sorted({*edges}) or not all(map(math.isfinite, edges)):
                raise ValueError(f"bins of {name!r} are {list(edges)}; expected rising numbers")
        for name in ("labels", "group_by"):
            if len({*getattr(self, name)}) < len(getattr(self, name)):
                raise ValueError(f"{name} are {list(getattr(self, name))}; expected different names")
        if self.shortcut and self.shortcut[0] not in self.labels:
            raise ValueError(f"shortcut is of {self.shortcut[0]!r}; expected one of the labels {list(self.labels)}")
        return self


@dataclass(frozen=True)
class DataSet:
    """``truth`` int8 [N, L]: 1, 0 or -1 for unknown. ``groups``: column -> names of its groups. ``members`` int16
    [N, K]: for each column the index of the picture's group, or -1. ``shortcut`` int8 [N], or None. ``exclusive``:
    each picture has exactly one of the labels."""

    pictures: Sequence[Picture]
    labels: Sequence[str]
    truth: Array
    groups: Mapping[str, Sequence[str]]
    members: Array
    shortcut: Array | None = None
    exclusive: bool = False


def read(data: Path, columns: Columns, limit: int | None = None) -> DataSet:
    """At most ``limit`` pictures, drawn by the seed, in the order of the file. Raises `BadRequest`."""
    file = data / "groups.csv"
    shortcut = (columns.shortcut[1],) if columns.shortcut else ()
    findings = columns.labels or (CLASS,)
    table = read_table(file, [FILE, *findings, *columns.group_by, *shortcut], DATA)
    if not columns.group_by:
        others = [name for name in table.columns if name not in (FILE, *findings, *shortcut)]
        raise BadRequest(f"group_by is empty; expected columns of groups of {file}, which has {others}")
    names = [row[FILE] for row in table.rows]
    seen: set[str] = set()
    for place, name in enumerate(names):
        if not name or name in seen:
            raise table.wrong(place, FILE, "the name of a picture, once")
        seen.add(name)
    labels, truth = _findings(table, columns.labels) if columns.labels else _classes(table)
    grouped = [_groups(table, name, columns.bins.get(name)) for name in columns.group_by]
    marks = _flags(table, shortcut[0]) if shortcut else None
    count = len(first(names, limit))
    kept = np.arange(len(names))
    if count < len(names):
        kept = np.sort(np.random.default_rng(columns.seed).permutation(len(names))[:count])
    return DataSet(
        [data / "images" / names[place] for place in kept],
        labels,
        truth[kept],
        {name: groups for name, (groups, _) in zip(columns.group_by, grouped, strict=True)},
        np.stack([members for _, members in grouped], axis=1)[kept],
        None if marks is None else marks[kept],
        not columns.labels,
    )


def _flags(table: CsvTable, column: str) -> Array:
    """int8 [N]: 1, 0, or -1 for an empty cell."""
    return np.array([_flag(table, place, column) for place in range(len(table.rows))], np.int8)


_FLAGS = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "": UNKNOWN}  # a tool that knows empty cells may write numbers with .0


def _flag(table: CsvTable, place: int, column: str) -> int:
    value = _FLAGS.get(table.rows[place][column])
    if value is None:
        raise table.wrong(place, column, "1, 0 or nothing, which means unknown")
    return value


def _findings(table: CsvTable, labels: Sequence[str]) -> tuple[Sequence[str], Array]:
    return labels, np.stack([_flags(table, label) for label in labels], axis=1)


def _classes(table: CsvTable) -> tuple[Sequence[str], Array]:
    cells = [row[CLASS] for row in table.rows]
    labels = sorted({*cells} - {""})
    if len(labels) < 2:
        raise BadRequest(f"{table.file}, column {CLASS!r}, has the classes {labels}; expected two or more")
    index = np.array([labels.index(cell) if cell else UNKNOWN for cell in cells])
    truth = (index[:, None] == np.arange(len(labels))).astype(np.int8)
    truth[index == UNKNOWN] = UNKNOWN
    return labels, truth


def _groups(table: CsvTable, column: str, edges: Sequence[float] | None) -> tuple[Sequence[str], Array]:
    """The names of the groups, and int16 [N]: the index of each picture's group, or -1. A number below the first edge
    is in no group."""
    cells = [row[column] for row in table.rows]
    if edges is None:
        names: Sequence[str] = sorted({*cells} - {""})
        places = {name: place for place, name in enumerate(names)}
        members = [places.get(cell, UNKNOWN) for cell in cells]
    else:
        names = [f"[{a:g}, {b:g})" for a, b in zip(edges, [*edges[1:], math.inf], strict=True)]
        members = [
            bisect.bisect_right(edges, _number(table, place, column)) - 1 if cell else UNKNOWN
            for place, cell in enumerate(cells)
        ]
    if not any(member != UNKNOWN for member in members):
        raise BadRequest(f"{table.file}, column {column!r}, has no picture in a group; expected a group in its cells")
    if len(names) > _MOST:
        raise BadRequest(
            f"{table.file}, column {column!r}, has {len(names)} groups; expected at most {_MOST}. Numbers need bins, "
            f"such as --param 'bins={{\"{column}\": [0, 10]}}'"
        )
    return names, np.array(members, np.int16)


_MOST = 200  # more groups are numbers, dates or names of persons


def _number(table: CsvTable, place: int, column: str) -> float:
    try:
        number = float(table.rows[place][column])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise table.wrong(place, column, "a number or nothing, because the column has bins")
    return number
