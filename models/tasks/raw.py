"""Named tensors -> named tensors of one graph, for graphs without a task of their own."""

from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import BadRequest, ImageTooLarge, TextTooLong
from calmclip.models.flow import Array, Arrays, Call, Flow
from calmclip.models.tasks import TASKS, Task


@dataclass(frozen=True)
class RawRequest:
    graph: str
    feeds: Arrays


def raw(bundle: Bundle, request: RawRequest) -> Flow[Arrays]:
    """Raises `TaskNotServed`, and as `run`."""
    bundle.require("raw")
    return (yield from run(bundle, request))


def run(bundle: Bundle, request: RawRequest) -> Flow[Arrays]:
    """Raises `BadRequest` naming the input that is absent, unknown, of another dtype, or of another shape;
    `TextTooLong`, `ImageTooLarge` as the preprocessing of the graph."""
    wanted = bundle.graph(request.graph).inputs
    if sorted(wanted) != sorted(request.feeds):
        raise BadRequest(
            f"graph {request.graph!r} takes the inputs {sorted(wanted)}; {sorted(request.feeds)} were given"
        )
    sizes: dict[str, int] = {}
    for name, tensor in wanted.items():
        array = np.asarray(request.feeds[name])
        if array.dtype.name != tensor.dtype:
            raise BadRequest(f"input {name!r} is {array.dtype.name}; expected {tensor.dtype}")
        fits = len(array.shape) == len(tensor.shape) and all(
            size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for size, dim in zip(array.shape, tensor.shape, strict=False)
        )
        if not fits:
            raise BadRequest(
                f"input {name!r} has shape {list(array.shape)}; expected {list(tensor.shape)}, with one size per name"
            )
        if 0 in array.shape:
            raise BadRequest(f"input {name!r} has shape {list(array.shape)}; it holds nothing")
        _within(bundle, request.graph, name, array)
    answer: Arrays = yield Call(request.graph, request.feeds)
    return answer


def _within(bundle: Bundle, role: str, name: str, array: Array) -> None:
    """Limits of the graph's preprocessing that the manifest's shapes do not state.

    A driver may merge the calls of several requests; an input that the graph refuses would fail all of them.
    """
    spec, shape = bundle.graph(role).preprocess, array.shape
    if isinstance(spec, TextPreprocess):
        if shape[1] > spec.context:
            raise TextTooLong(
                f"input {name!r} has {shape[1]} tokens in a row; graph {role!r} reads at most {spec.context}"
            )
        if name == spec.ids and not 0 <= array.min() <= array.max() < bundle.text(role).ids:
            most = bundle.text(role).ids - 1
            raise BadRequest(f"input {name!r} holds ids outside of the vocabulary; expected 0 to {most}")
    if isinstance(spec, ImagePreprocess) and spec.in_graph and shape[0] * shape[1] > bundle.max_pixels:
        raise ImageTooLarge(f"input {name!r} has {shape[0]} x {shape[1]} pixels; at most {bundle.max_pixels} are read")


TASKS.register("raw")(
    Task(
        name="raw",
        summary="named tensors -> named tensors of one graph",
        request=RawRequest,
        flow=raw,
        example=lambda bundle, picture: None,  # only the caller knows the graph
    )
)
