"""Vectors that another model made of texts -> float32 [B, dim], checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from calmclip.models.bundle.manifest import VectorPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array


@dataclass(frozen=True, eq=False)
class Vector:
    """``numbers`` [dim]: what the model of `VectorPreprocess.model` made of a text; it stands in place of the text."""

    numbers: ArrayLike


class VectorPreparer:
    """Runs a `VectorPreprocess`."""

    def __init__(self, spec: VectorPreprocess) -> None:
        self.spec = spec

    @property
    def wanted(self) -> str:
        """The vectors that the graph reads, in words."""
        return f"vectors of {self.spec.model or 'the model that it was trained with'} with {self.spec.dim} numbers"

    def prepare(self, vectors: Sequence[ArrayLike], name: str = "vector {}") -> dict[str, Array]:
        """The graph's feeds. ``name``: of a vector in an error, with a {} for its place.

        Raises `BadRequest` for no vectors; for what is no row of numbers; for another number of numbers; for NaN,
        infinity and what float32 cannot hold; and for a vector of length 0 that has to become a unit vector.
        """
        if not len(vectors):
            raise BadRequest(f"no vectors were given; expected at least one of {self.spec.dim} numbers")
        return {self.spec.input: np.stack([self._row(row, name.format(place)) for place, row in enumerate(vectors)])}

    def _row(self, vector: ArrayLike, name: str) -> Array:
        row = numbers(vector, name)
        if len(row) != self.spec.dim:
            raise BadRequest(f"{name} has {len(row)} numbers; this bundle reads {self.wanted}")
        if not self.spec.normalize:
            return row.astype(np.float32)
        if not (length := np.linalg.norm(row)):
            raise BadRequest(f"{name} has the length 0 and no direction; expected a vector that is not all zeros")
        unit: Array = (row / length).astype(np.float32)
        return unit


def numbers(vector: ArrayLike, name: str) -> Array:
    """-> float64 [N]. Raises `BadRequest`, which begins with ``name``, for what is no row of finite numbers."""
    try:
        row = np.asarray(vector, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"{name} is no list of numbers; expected one") from None
    if row.ndim != 1:
        raise BadRequest(f"{name} has the shape {list(row.shape)}; expected one row of numbers")
    wrong = np.flatnonzero(~(np.abs(row) <= np.finfo(np.float32).max))
    if len(wrong):
        raise BadRequest(f"{name}: number {wrong[0]} is {row[wrong[0]]:g}; expected finite numbers of float32")
    return row


def label_rows(vectors: Mapping[str, Sequence[ArrayLike]]) -> dict[str, Array]:
    """The `label_vectors` of a classifier, label -> float32 [N, d]. Raises `BadRequest` as `numbers`, and for a label
    without a vector or with vectors of several lengths."""
    rows: dict[str, Array] = {}
    for label, given in vectors.items():
        name = f"the label vectors of {label[:200]!r}"
        group = [numbers(vector, f"{name}, {place}") for place, vector in enumerate(given)]
        if len(lengths := sorted({len(row) for row in group})) != 1:
            raise BadRequest(f"{name} have {lengths or 'no'} numbers; expected vectors of one length, at least one")
        rows[label] = np.stack(group).astype(np.float32)
    return rows
