"""Named tensors -> named tensors of one graph, for anything without a task of its own."""

from dataclasses import dataclass

import numpy as np

from models.bundle.bundle import Bundle
from models.errors import BadRequest
from models.flow import Arrays, Call, Flow


@dataclass(frozen=True)
class RawRequest:
    graph: str
    feeds: Arrays


def raw(bundle: Bundle, request: RawRequest) -> Flow[Arrays]:
    """Raises `BadRequest` naming the input that is absent, unknown, of another dtype, or of another shape."""
    bundle.require("raw")
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
            found == (sizes.setdefault(want, found) if isinstance(want, str) else want)
            for found, want in zip(array.shape, tensor.shape, strict=False)
        )
        if not fits:
            raise BadRequest(
                f"input {name!r} has shape {list(array.shape)}; expected {list(tensor.shape)} with equal names equal"
            )
        if 0 in array.shape:
            raise BadRequest(f"input {name!r} has shape {list(array.shape)}; it holds nothing")
    answer: Arrays = yield Call(request.graph, request.feeds)
    return answer
