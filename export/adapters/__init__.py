"""FAMILY adapters: `Net` -> `Net`, before it is folded and traced. A recipe lists them in order, each with its params.

At that point tensors are what the checkpoint holds, under our names, and modules can still be changed or replaced: an
adapter may edit weights, computations, inputs, outputs and preprocessing. What it did is in the net's source, and so in
the manifest of each bundle.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from torch import Tensor

from calmclip.export.checkpoints import Weights, hub
from calmclip.export.checkpoints.weights import weights_sha256
from calmclip.export.nets import Net, Tower
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Arrays
from calmclip.models.registry import Registry


@dataclass(frozen=True)
class Context:
    """What there is beside the net. ``feeds(net, tower)``: inputs of the tower, of pictures or texts that ship;
    ``weights``: what the recipe says of the checkpoint; ``say``: a line for who waits."""

    feeds: Callable[[Net, Tower], Sequence[Arrays]]
    weights: Weights = field(default_factory=Weights)
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Adapter:
    """``adapt(net, params, context)``: the net itself where there is nothing to do, else another one.

    The net is not folded (`calmclip.export.nets.ready`), unless its kind has no such form (`Net.folded`). Its modules
    may be changed in place, since nobody else holds them. Raises `BadRequest` for a net that the adapter does not fit.

    ``params``: fields of the kind `Path` are checkpoints: ``hf:owner/name`` is fetched before ``adapt`` sees it.
    ``flags``: options of `calmclip export` -> the param that each sets. The first appends the adapter to the recipe's;
    the others set a param of the last one. A field's description is the help of its option.
    """

    params: type[FrozenModel]
    adapt: Callable[[Net, Any, Context], Net]
    flags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := set(self.flags.values()) - set(self.params.model_fields):
            raise ValueError(f"{self.params.__module__}: a flag sets {min(unknown)!r}, which is none of the params")


class Adapt(FrozenModel):
    """An adapter and its params."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

    def given(self) -> FrozenModel:
        """The params, checked, and the checkpoints among them on this machine.

        Raises `UnknownName`; `BadRequest` naming the param, and the option that sets it; as `hub.locate`.
        """
        adapter = ADAPTERS.get(self.name)
        try:
            asked = adapter.params.model_validate(self.params)
        except ValidationError as error:
            first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # which explains the others
            where = ".".join(map(str, first["loc"]))
            said = "there is no such param" if first["type"] == "extra_forbidden" else first["msg"]
            option = next((f" ({option})" for option, param in adapter.flags.items() if where == param), "")
            raise BadRequest(f"recipe: adapter {self.name}: {where}{option}: {said}") from None
        return _each_path(asked, lambda path: hub.locate(path.as_posix()))

    def checked(self) -> "Adapt":
        """The same with params as a recipe writes them. Raises as `given`."""
        return self.model_copy(update={"params": self.given().model_dump(mode="json", exclude_unset=True)})

    def public(self) -> dict[str, Any]:
        """What a report may say: a checkpoint's name, but not where on this machine it lies."""
        named = _each_path(self.given(), lambda path: Path(hub.name(path)))
        return {"name": self.name, "params": named.model_dump(mode="json", exclude_unset=True)}


ADAPTERS: Registry[Adapter] = Registry("adapters", "calmclip.export.adapters")


def adapt(net: Net, asked: Iterable[Adapt], context: Context) -> Net:
    """``net`` after all that is ``asked``, in this order. Raises as `Adapt.given` and as the adapters do."""
    for one, params in [(one, one.given()) for one in asked]:
        made = ADAPTERS.get(one.name).adapt(net, params, context)
        if made is not net and made.source.notes == net.source.notes:
            told = (f"{param}={value}" for param, value in one.public()["params"].items())
            made = noted(made, " ".join((f"adapter {one.name}", *told)))
        if made is not net:
            made = replace(made, ranges={})  # those that ship were observed on the net as it was
        net = replace(made, adapters=(*net.adapters, one.name))
    return net


def noted(net: Net, note: str, **files: Path) -> Net:
    """``net`` whose source says in words what was done, and names by hash the checkpoints ``files`` that went in, as
    KEY/FILE."""
    weights = {f"{key}/{name}": sha for key, path in files.items() for name, sha in weights_sha256(path).items()}
    notes = "; ".join(filter(None, (net.source.notes, note)))
    source = net.source.model_copy(update={"notes": notes, "weights": {**net.source.weights, **weights}})
    return replace(net, source=source)


def tensors(net: Net) -> dict[str, Tensor]:
    """Those of all towers, by our names. Raises `BadRequest` for a net that does not keep its checkpoint's tensors."""
    if net.folded or not all(tower.prefix for tower in net.towers.values()):
        raise BadRequest(f"a {net.name} net does not keep the tensors of {net.source.model}; they cannot be edited")
    towers = net.towers.values()
    return {f"{tower.prefix}{name}": t for tower in towers for name, t in tower.module.state_dict().items()}


def put(net: Net, state: Mapping[str, Tensor]) -> None:
    """Tensors by our names into the modules of ``net``; of the shapes that are there."""
    for tower in net.towers.values():
        own = {name: state[f"{tower.prefix}{name}"] for name in tower.module.state_dict()}
        tower.module.load_state_dict(own, assign=True)


def _each_path(params: FrozenModel, do: Callable[[Path], Path]) -> FrozenModel:
    paths = {name: do(value) for name, value in params if isinstance(value, Path)}
    return params.model_copy(update=paths)
