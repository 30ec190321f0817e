"""FAMILY heads: vectors -> logits and scores, a column for each label. A head is pure numpy.

A head may need arrays of its own, its *assets*: it declares them by name, dtype and named dimensions. ``C`` is a column
for each label that the head was made for, ``D`` the length of the embeddings; any other name is a size of the head's
own that all its assets share. Who binds a head says which labels its columns are. What is then asked may be all of
them, some of them, or all in another order: assets are cut along ``C`` before the head sees them, so no head can
mistake a column. A label that a head with a ``C`` does not know is an error that names it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import ValidationError

from calmclip.models.bundle.manifest import FrozenModel, explain
from calmclip.models.errors import BadRequest, UnknownName
from calmclip.models.flow import Array, Arrays
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)


@dataclass(frozen=True)
class Asset:
    """An array that a head brings along. ``shape``: numbers, and names of dimensions."""

    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Columns:
    """What a head scores against, a column for each label that is asked for, in the order in which they are asked.

    ``text`` float32 [C, D], unit rows; ``assets``: the head's, cut to these labels along every ``C``.
    """

    labels: tuple[str, ...]
    text: Array
    assets: Arrays


@dataclass(frozen=True)
class Examples:
    """What a head is fitted on: ``image`` float32 [N, D] unit rows, ``truth`` int64 [N], places among ``labels``, and
    ``text`` float32 [C, D] unit rows of those labels."""

    image: Array
    truth: Array
    labels: tuple[str, ...]
    text: Array


@dataclass(frozen=True)
class Head(Generic[P]):
    """``logits(image [B, D], columns, params) -> [B, C]``; ``scores(logits) -> [B, C]`` in [0, 1].

    ``fit(examples, params) -> assets``, where the head can be fitted to pictures whose labels are known.
    """

    params: type[P]
    logits: Callable[[Array, Columns, P], Array]
    scores: Callable[[Array], Array]
    assets: Mapping[str, Asset] = field(default_factory=dict)
    fit: Callable[[Examples, P], Arrays] | None = None

    @cached_property
    def closed(self) -> bool:
        """Whether it scores only the labels that it was made for."""
        return any("C" in asset.shape for asset in self.assets.values())


HEADS: Registry[Head[Any]] = Registry("heads", "calmclip.models.heads")


def named(name: str) -> Head[Any]:
    """The head of that name, which a bundle or a caller says. Raises `BadRequest` with the nearest and all known
    names."""
    try:
        return HEADS.get(name)
    except UnknownName as error:
        raise BadRequest(str(error), known=error.known) from None


class BoundHead:
    """A head with its params and assets. ``labels``: those that its columns are.

    Raises `BadRequest` for a name that no head has; for params that are not the head's; for an asset that is absent,
    unknown, of another dtype or shape, or not finite; and where the columns are not as many as the labels.
    """

    def __init__(self, name: str, params: Mapping[str, Any], assets: Arrays, labels: Sequence[str]) -> None:
        self.name = name
        self.head = named(name)
        self.labels = tuple(labels)
        try:
            self.params = self.head.params.model_validate(dict(params))
        except ValidationError as error:
            raise BadRequest(f"head {name!r}: params {dict(params)}: {explain(error)}") from None
        self.assets = assets
        self.sizes = _sizes(name, self.head, assets)
        columns = self.sizes.get("C", len(self.labels))  # of a head without a C: as many as are asked for
        if columns != len(self.labels):
            raise BadRequest(f"head {name!r} has {columns} columns; expected one for each of {len(self.labels)} labels")
        self._place = {label: index for index, label in enumerate(self.labels)}

    def columns(self, labels: tuple[str, ...], text: Array) -> Columns:
        """``text`` float32 [C, D]: rows of ``labels``. Raises `BadRequest` for a label that is none of the head's."""
        self.check(labels, text.shape[1])
        if not self.head.closed or labels == self.labels:
            return Columns(labels, text, self.assets)
        places = [self._place[label] for label in labels]
        cut = {
            name: _cut(array, self.head.assets[name].shape, places) for name, array in self.assets.items()
        }  # a copy of what is asked for, C x D numbers for most heads
        return Columns(labels, text, cut)

    def check(self, labels: Sequence[str], dim: int | None = None) -> None:
        """Raises `BadRequest` for labels that the head does not know, and for vectors of another length."""
        if not self.head.closed:
            return
        if unknown := [label for label in labels if label not in self._place]:
            shown = ", ".join(map(repr, self.labels[:5])) + (", …" if len(self.labels) > 5 else "")
            raise BadRequest(
                f"the head {self.name!r} was not made for the label {unknown[0]!r}; it knows {shown}. "
                "Leave labels out for all of them, or ask for some of them"
            )
        if dim is not None and self.sizes.get("D", dim) != dim:
            raise BadRequest(
                f"the head {self.name!r} was made for vectors of {self.sizes['D']} numbers; the bundle's have {dim}"
            )

    def logits(self, image: Array, columns: Columns) -> Array:
        """float32 [B, D] unit rows -> float32 [B, C]."""
        return self.head.logits(image, columns, self.params)

    def scores(self, logits: Array) -> Array:
        """[B, C] -> [B, C] in [0, 1]."""
        return self.head.scores(logits)


def _sizes(name: str, head: Head[Any], assets: Arrays) -> dict[str, int]:
    """Named dimension -> its size. Raises `BadRequest`."""
    if {*assets} != {*head.assets}:
        raise BadRequest(f"head {name!r} has the assets {sorted(assets)}; expected {sorted(head.assets)}")
    sizes: dict[str, int] = {}
    for key, wanted in head.assets.items():
        array = assets[key]
        fits = array.ndim == len(wanted.shape) and all(
            size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for size, dim in zip(array.shape, wanted.shape, strict=True)
        )
        if array.dtype.name != wanted.dtype or not fits:
            raise BadRequest(
                f"head {name!r}: asset {key!r} is {array.dtype.name} {list(array.shape)}; expected {wanted.dtype} "
                f"{list(wanted.shape)} with equal names equal"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadRequest(f"head {name!r}: asset {key!r} holds numbers that are not finite")
    return sizes


def _cut(array: Array, shape: tuple[int | str, ...], places: Sequence[int]) -> Array:
    for axis, dim in enumerate(shape):
        if dim == "C":
            array = array.take(places, axis=axis)
    return array
