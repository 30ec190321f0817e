"""Tensors of another checkpoint that take part in a net's must be the same ones, of the same shapes."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from calmclip.export import layouts
from calmclip.export.layouts import LAYOUTS, Layout
from calmclip.export.nets import Net
from calmclip.models.errors import BadRequest, UnknownCheckpoint

State = Mapping[str, Tensor]


def same(wanted: State, given: State, what: str, said: Callable[[str], str] = str) -> None:
    """Raises `UnknownCheckpoint` naming what ``given``, of the file ``what``, lacks, holds beside ``wanted`` or has in
    another shape; by our names, or by what ``said`` makes of them."""
    for name, tensor in wanted.items():
        if name not in given:
            raise UnknownCheckpoint(f"{what} lacks {said(name)}, which the base has")
        if given[name].shape != tensor.shape:
            raise UnknownCheckpoint(
                f"{what}: {said(name)} has the shape {list(given[name].shape)}; the base's is {list(tensor.shape)}"
            )
    if extra := [name for name in given if name not in wanted]:
        raise UnknownCheckpoint(f"{what} holds {said(extra[0])}, which the base does not have")


def of_a_layout(net: Net, adapter: str) -> tuple[Layout, Callable[[str], str]]:
    """The layout of the family by which ``net`` was read, and what it calls a tensor of ours. Raises `BadRequest`."""
    if net.layout is None or not any(LAYOUTS.get(name) is net.layout for name in LAYOUTS.names()):
        raise BadRequest(
            f"{adapter} does not apply to {net.source.model}: expected a net of the kind clip, not {net.name}"
        )
    return net.layout, partial(layouts.theirs, net.layout)
