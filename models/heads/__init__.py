"""FAMILY heads: unit features -> logits and scores. A head is pure numpy; its assets lie in the bundle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from calmclip.models.bundle.manifest import FrozenModel, explain
from calmclip.models.errors import BundleInvalid
from calmclip.models.flow import Array, Arrays
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)


@dataclass(frozen=True)
class Head(Generic[P]):
    """``logits(image [B, D], text [C, D], assets, params) -> [B, C]``; ``scores(logits) -> [B, C]`` in [0, 1]."""

    params: type[P]
    logits: Callable[[Array, Array, Arrays, P], Array]
    scores: Callable[[Array], Array]

    def bind(self, params: Mapping[str, Any], assets: Arrays) -> "BoundHead":
        """Raises `BundleInvalid` when the manifest's params are not this head's."""
        try:
            checked = self.params.model_validate(params)
        except ValidationError as error:
            raise BundleInvalid(f"head params {dict(params)}: {explain(error)}") from None
        return BoundHead(lambda image, text: self.logits(image, text, assets, checked), self.scores)


@dataclass(frozen=True)
class BoundHead:
    """A head with its params and assets."""

    logits: Callable[[Array, Array], Array]
    scores: Callable[[Array], Array]


HEADS: Registry[Head[Any]] = Registry("heads", "calmclip.models.heads")
