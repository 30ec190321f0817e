"""FAMILY heads: vectors -> logits and scores, a column for each label. A head is pure numpy.

A head may have arrays, its *assets*, which it declares by name, dtype and named dimensions. ``C`` is a column for each
label of the head, ``D`` the length of the embeddings; another name is a size that all assets of the head share. The
caller that binds a head names the labels of its columns. A request may have some of these labels, in any order: the
assets are indexed along ``C`` first, so the head sees the columns of the request. A label that a head with a ``C`` does
not know is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """An array of a head. ``shape``: numbers, and names of dimensions."""

    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Columns:
    """The columns of a request, one for each of its labels, in the order of the request.

    ``text`` float32 [C, D], unit rows; ``assets``: the head's, indexed by these labels along every ``C``.
    """

    labels: tuple[str, ...]
    text: Array
    assets: Arrays


@dataclass(frozen=True)
class Examples:
    """What a head is fitted on: ``image`` float32 [N, D] unit rows, ``truth`` int64 [N], indices into ``labels``, and
    ``text`` float32 [C, D] unit rows of those labels. Zero-shot logits are ``scale`` * image . text; the bias of a
    sigmoid head is left out, because it is the same for all labels.

    ``captions`` float32 [N, D] unit rows, one for each picture. ``views`` float32 [N, V, D] unit rows: V random crops
    of each picture. ``unlabelled`` float32 [M, D] unit rows of pictures without a label. ``words``, with their unit
    rows ``word_vectors`` float32 [W, D]: a vocabulary that explains a difference. ``patches``: of each picture float32
    [V, P, D] unit rows, the cells of the graph `dense`, first those of the picture, then those of its crops.
    """

    image: Array
    truth: Array
    labels: tuple[str, ...]
    text: Array
    scale: float = 100.0
    captions: Array | None = None
    views: Array | None = None
    unlabelled: Array | None = None
    words: tuple[str, ...] = ()
    word_vectors: Array | None = None
    patches: tuple[Array, ...] | None = None

    def only(self, rows: Array) -> "Examples":
        """``rows``: indices or a mask of pictures."""
        captions = None if self.captions is None else self.captions[rows]
        views = None if self.views is None else self.views[rows]
        patches = None if self.patches is None else tuple(self.patches[i] for i in np.arange(len(self.truth))[rows])
        return replace(
            self, image=self.image[rows], truth=self.truth[rows], captions=captions, views=views, patches=patches
        )

    @cached_property
    def spread(self) -> "Examples":
        """Each picture, then each of its views, as a picture of its own."""
        if self.views is None:
            return self
        times = 1 + self.views.shape[1]
        image = np.concatenate([self.image[:, None], self.views], axis=1).reshape(-1, self.image.shape[1])
        captions = None if self.captions is None else self.captions.repeat(times, axis=0)
        return replace(self, image=image, truth=self.truth.repeat(times), captions=captions, views=None)


@dataclass(frozen=True)
class Fit(Generic[P]):
    """How a head is fitted. ``assets(examples, params)``: `Examples` without views, params without a None.

    ``grid(examples)``: for each param that may be None, the values that the pictures choose from, in rising order; the
    middle one is used if no picture can be held out. ``fitted``: the params of the grid that the assets depend on.
    ``affine``: those that the logits are an affine function of. `calmclip.models.selection` reads both, so as not to
    compute a thing again.

    ``reads``: which of ``captions``, ``words`` and ``unlabelled`` it uses. ``labels``: the number of labels that it
    takes, None: any. ``open``: whether a label may have no picture. ``names``: the labels that it takes, and no others;
    the first needs a picture. ``patches``: it reads patches of pictures, and no vectors; nothing is chosen or measured.
    ``notes(examples, params, assets)``: what it has to say. ``ready()`` raises `ExtraMissing` if the fit needs a
    package that is not installed.
    """

    assets: Callable[[Examples, P], Arrays]
    grid: Callable[[Examples], Mapping[str, Sequence[float]]] = lambda examples: {}
    fitted: tuple[str, ...] = ()
    affine: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    labels: int | None = None
    open: bool = False
    names: tuple[str, ...] = ()
    patches: bool = False
    notes: Callable[[Examples, P, Arrays], Sequence[str]] = lambda examples, params, assets: ()
    ready: Callable[[], None] = lambda: None

    @property
    def task(self) -> str:
        """The task that a bundle must serve for this fit, and that its classifier is for."""
        return "anomaly" if self.patches else "classify"


@dataclass(frozen=True)
class Head(Generic[P]):
    """``logits(image [B, D], columns, params) -> [B, C]``; ``scores(logits) -> [B, C]`` in [0, 1].

    ``fit``: None if the head cannot be fitted to labelled pictures. ``exclusive``: the scores of a row sum to 1,
    because one label is true; else each label is scored by itself. ``vectors(assets)``: float32 [C, D], unit rows that
    stand for the labels in place of text vectors, so that no text is embedded; None if the head has none.
    """

    params: type[P]
    logits: Callable[[Array, Columns, P], Array]
    scores: Callable[[Array], Array]
    assets: Mapping[str, Asset] = field(default_factory=dict)
    fit: Fit[P] | None = None
    exclusive: bool = True
    vectors: Callable[[Arrays], Array] | None = None

    @cached_property
    def closed(self) -> bool:
        """Whether it scores only its own labels."""
        return any("C" in asset.shape for asset in self.assets.values())


HEADS: Registry[Head[Any]] = Registry("heads", "calmclip.models.heads")


def named(name: str) -> Head[Any]:
    """The head with this name. Raises `BadRequest` with the nearest name and all known names."""
    try:
        return HEADS.get(name)
    except UnknownName as error:
        raise BadRequest(str(error), known=error.known) from None


def params_of(name: str, params: Mapping[str, Any]) -> FrozenModel:
    """The checked params of a head. Raises `BadRequest`."""
    try:
        checked: FrozenModel = named(name).params.model_validate(dict(params))
    except ValidationError as error:
        raise BadRequest(f"head {name!r}: params {dict(params)}: {explain(error)}") from None
    return checked


class BoundHead:
    """A head with its params and assets. ``labels``: the labels of its columns.

    Raises `BadRequest` for an unknown head; for wrong params, or a param that is None; for an asset that is absent,
    unknown, of another dtype or shape, or not finite; and if the numbers of columns and labels differ.
    """

    def __init__(self, name: str, params: Mapping[str, Any], assets: Arrays, labels: Sequence[str]) -> None:
        self.name = name
        self.head = named(name)
        self.exclusive = self.head.exclusive
        self.labels = tuple(labels)
        self.params = params_of(name, params)
        if unset := [key for key, value in self.params if value is None]:
            raise BadRequest(f"head {name!r}: {unset[0]} is null, which only a fit replaces; send a number, or fit it")
        self.assets = assets
        self.sizes = _sizes(name, self.head, assets)
        columns = self.sizes.get("C", len(self.labels))  # a head without a C takes any number
        if columns != len(self.labels):
            raise BadRequest(f"head {name!r} has {columns} columns; expected one for each of {len(self.labels)} labels")
        self._index = {label: index for index, label in enumerate(self.labels)}

    def columns(self, labels: tuple[str, ...], text: Array) -> Columns:
        """``text`` float32 [C, D]: rows of ``labels``. Raises `BadRequest` for a label that the head does not know."""
        self.check(labels, text.shape[1])
        if not self.head.closed or labels == self.labels:
            return Columns(labels, text, self.assets)
        indices = [self._index[label] for label in labels]  # copies C x D numbers for most heads
        assets = {name: _take(array, self.head.assets[name].shape, indices) for name, array in self.assets.items()}
        return Columns(labels, text, assets)

    @cached_property
    def _vectors(self) -> Array | None:
        return self.head.vectors(self.assets) if self.head.vectors else None

    def vectors(self, labels: tuple[str, ...]) -> Array | None:
        """float32 [C, D]: the head's own unit rows of ``labels``; None if it has none, or does not know a label."""
        if self._vectors is None or not self._index.keys() >= {*labels}:
            return None
        if labels == self.labels:
            return self._vectors
        chosen: Array = self._vectors[[self._index[label] for label in labels]]
        return chosen

    def check(self, labels: Sequence[str], dim: int | None = None) -> None:
        """Raises `BadRequest` for labels that the head does not know, and for vectors of another length."""
        if not self.head.closed:
            return
        if unknown := [label for label in labels if label not in self._index]:
            shown = ", ".join(map(repr, self.labels[:5])) + (", …" if len(self.labels) > 5 else "")
            raise BadRequest(
                f"the head {self.name!r} does not know the label {unknown[0]!r}; it knows {shown}. "
                "Send some of these labels, or none to get all"
            )
        if dim is not None and self.sizes.get("D", dim) != dim:
            raise BadRequest(
                f"the head {self.name!r} takes vectors of {self.sizes['D']} numbers; the bundle's vectors have {dim}"
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
                f"{list(wanted.shape)}, with one size per name"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadRequest(f"head {name!r}: asset {key!r} has values that are not finite")
    return sizes


def _take(array: Array, shape: tuple[int | str, ...], indices: Sequence[int]) -> Array:
    for axis, dim in enumerate(shape):
        if dim == "C":
            array = array.take(indices, axis=axis)
    return array
