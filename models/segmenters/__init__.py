"""FAMILY segmenters: picture and labels -> a map of logits for each label.

A segmenter is a flow over the bundle's graphs. It answers on the plane of its own map; the task `segment` does the
rest: probabilities, enlargement, masks, boxes. It reads patches by `segmenters.maps`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image
from pydantic import ValidationError

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel, Manifest, explain
from calmclip.models.errors import BadRequest, TaskNotServed, UnknownName
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.placement import Frame
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)


@dataclass(frozen=True)
class Windows:
    """Squares that slide over a picture, which the graph `dense` sees one by one. ``size``: their side as a part of the
    picture's shorter side; ``stride``: between neighbours, as a part of the window."""

    size: float = 0.5
    stride: float = 0.5


@dataclass(frozen=True)
class Scene:
    """What a segmenter receives. ``image``: decoded, upright, RGB. ``text`` float32 [C, D]: unit rows of ``labels``;
    ``background`` float32 [K, D]: unit rows of the background words, K may be 0. ``windows`` None: the graph sees the
    whole picture at once. ``descriptions``: the sentences that the classifier has for its labels, instead of templates.
    """

    image: Image.Image
    labels: tuple[str, ...]
    text: Array
    background: Array
    windows: Windows | None = None
    descriptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreMap:
    """``labels`` float32 [C, h, w]: logits, a plane for each label; ``background`` float32 [h, w]: of none of them,
    -inf where there is no background. ``frame`` maps the upright picture to cells of the map: cell = pixel * scale +
    offset, so the middle of the first cell is at 0.5; cells outside of the picture are padding."""

    labels: Array
    background: Array
    frame: Frame


@dataclass(frozen=True)
class Segmenter(Generic[P]):
    """``flow(bundle, scene, params)``. ``why_not(manifest)``: what a bundle lacks for this method, None if it lacks
    nothing. ``rank``: without a choice of the request or the bundle, the fitting method of the highest rank answers;
    below 0 a method answers only if it is named."""

    params: type[P]
    summary: str
    why_not: Callable[[Manifest], str | None]
    flow: Callable[[Bundle, Scene, P], Flow[ScoreMap]]
    rank: int = -1


SEGMENTERS: Registry[Segmenter[Any]] = Registry("segmenters", "calmclip.models.segmenters")


def fitting(manifest: Manifest) -> list[str]:
    """The names of the methods that the bundle can run, the default first."""
    SEGMENTERS.load()
    names = [name for name in SEGMENTERS.names() if SEGMENTERS.get(name).why_not(manifest) is None]
    return sorted(names, key=lambda name: -SEGMENTERS.get(name).rank)


def default(manifest: Manifest) -> str | None:
    """The method of a request that names none: the manifest's, else the best that fits; None if there is none."""
    if manifest.segmentation and manifest.segmentation.method:
        return manifest.segmentation.method
    return next((name for name in fitting(manifest) if SEGMENTERS.get(name).rank >= 0), None)


def chosen(manifest: Manifest, name: str | None, params: Mapping[str, Any]) -> tuple[Segmenter[Any], FrozenModel]:
    """The method of a request and its checked params; those that the request does not set are the manifest's, if it
    has the same method.

    Raises `BadRequest` for an unknown name or wrong params, `TaskNotServed` if the bundle cannot run the method.
    """
    name = name or default(manifest)
    if name is None:
        raise TaskNotServed(f"bundle {manifest.name!r} has no graphs for any method of 'segment'", known=())
    try:
        segmenter = SEGMENTERS.get(name)
    except UnknownName as error:
        raise BadRequest(str(error), known=error.known) from None
    if lack := segmenter.why_not(manifest):
        known = fitting(manifest)
        raise TaskNotServed(
            f"bundle {manifest.name!r} cannot segment by {name!r}: {lack}; it can by {', '.join(known) or 'none'}",
            known=known,
        )
    settings = manifest.segmentation
    defaults = settings.params if settings and name == default(manifest) else {}
    try:
        return segmenter, segmenter.params.model_validate({**defaults, **params})
    except ValidationError as error:
        raise BadRequest(f"method {name!r}: params {dict(params)}: {explain(error)}") from None
