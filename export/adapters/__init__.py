"""FAMILY adapters: `Net` -> `Net`, before it is folded and traced. A recipe lists them in order, each with its params.

At that point the modules hold the checkpoint's tensors under our names, and can still be changed or replaced. An
adapter may edit weights, computations, inputs, outputs and preprocessing. The net's source, and so the manifest of each
bundle, states the change.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from calmclip.export.checkpoints import Weights, hub
from calmclip.export.checkpoints.locate import weights_sha256
from calmclip.export.nets import Net, Tower
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Arrays
from calmclip.models.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The inputs of an adapter beside the net. ``feeds(net, tower)``: feeds of the tower from the samples that ship;
    ``weights``: facts from the recipe; ``say``: prints a line for the user."""

    feeds: Callable[[Net, Tower], Sequence[Arrays]]
    weights: Weights = field(default_factory=Weights)
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Adapter:
    """``adapt(net, params, context)``: the same net if there is nothing to do, else another net.

    The net is not folded (`calmclip.export.nets.ready`), unless its kind has no such form (`Net.folded`). Its modules
    may be changed in place, since no other code uses them. Raises `BadRequest` for a net that the adapter does not fit.

    ``params``: fields of the types `Path` and tuple of `Path` are checkpoints: ``hf:owner/name`` is fetched before
    ``adapt`` runs.
    ``flags``: option of `calmclip export` -> the param that it sets. The first option appends the adapter to those of
    the recipe; the others set a param of the last adapter. A field's description is the help of its option.
    ``last``: no adapter may follow, because it derives towers or graphs from the net as it is then.
    """

    params: type[FrozenModel]
    adapt: Callable[[Net, Any, Context], Net]
    flags: Mapping[str, str] = field(default_factory=dict)
    last: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.flags.values()) - set(self.params.model_fields):
            raise ValueError(f"{self.params.__module__}: a flag sets {min(unknown)!r}, which is none of the params")


class Adapt(FrozenModel):
    """An adapter and its params."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

    def checked_params(self) -> FrozenModel:
        """The validated params, with local paths of checkpoints.

        Raises `UnknownName`; `BadRequest` with the param and the option that sets it; as `hub.locate`.
        """
        adapter = ADAPTERS.get(self.name)
        try:
            params = adapter.params.model_validate(self.params)
        except ValidationError as error:
            # an unknown param explains the other errors
            first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
            field = ".".join(map(str, first["loc"]))
            message = "there is no such param" if first["type"] == "extra_forbidden" else first["msg"]
            option = next((f" ({option})" for option, param in adapter.flags.items() if field == param), "")
            raise BadRequest(f"recipe: adapter {self.name}: {field}{option}: {message}") from None
        return _map_paths(params, lambda path: hub.locate(path.as_posix()))

    def checked(self) -> "Adapt":
        """The same with params as a recipe writes them. Raises as `checked_params`."""
        return self.model_copy(update={"params": self.checked_params().model_dump(mode="json", exclude_unset=True)})

    def public(self) -> dict[str, Any]:
        """For a report: the names of checkpoints, without their local paths."""
        named = _map_paths(self.checked_params(), lambda path: Path(hub.name(path)))
        return {"name": self.name, "params": named.model_dump(mode="json", exclude_unset=True)}


ADAPTERS: Registry[Adapter] = Registry("adapters", "calmclip.export.adapters")


def adapt(net: Net, adapters: Iterable[Adapt], context: Context) -> Net:
    """``net`` after all ``adapters``, in this order. Raises as `Adapt.checked_params` and as the adapters do, and
    `BadRequest` for a net that ships its graphs, because adapters change modules."""
    for adapter, params in [(adapter, adapter.checked_params()) for adapter in adapters]:
        if net.adapters and ADAPTERS.get(net.adapters[-1]).last:
            raise BadRequest(f"{adapter.name} follows {net.adapters[-1]}, which must come last; change their order")
        if any(tower.graph for tower in net.towers.values()) and adapter.name not in net.offers:
            raise BadRequest(
                f"{adapter.name} does not apply to {net.source.model}: it ships its graphs, without modules"
            )
        adapted = ADAPTERS.get(adapter.name).adapt(net, params, context)
        if adapted is not net and adapted.source.notes == net.source.notes:
            values = (f"{param}={value}" for param, value in adapter.public()["params"].items())
            adapted = with_note(adapted, " ".join((f"adapter {adapter.name}", *values)))
        if adapted is not net and adapter.name not in net.offers:  # the ranges that ship belong to the unchanged net
            adapted = replace(adapted, ranges={})
        net = replace(adapted, adapters=(*net.adapters, adapter.name))
    return net


def with_note(net: Net, note: str, **files: Path) -> Net:
    """``net`` whose source has the note, and the hashes of the checkpoints ``files`` that it used, as KEY/FILE."""
    weights = {f"{key}/{name}": sha for key, path in files.items() for name, sha in weights_sha256(path).items()}
    notes = "; ".join(filter(None, (net.source.notes, note)))
    source = net.source.model_copy(update={"notes": notes, "weights": {**net.source.weights, **weights}})
    return replace(net, source=source)


def tensors(net: Net) -> "dict[str, Tensor]":
    """The tensors of all towers, by our names; a tower without a prefix has those of another. Raises `BadRequest` for a
    net that does not keep those of its checkpoint, or that an adapter wrapped."""
    towers = _keepers(net)
    if net.folded or not towers:
        raise BadRequest(f"a {net.name} net does not keep the tensors of {net.source.model}; they cannot be edited")
    if not all(hasattr(tower.module, "fold") for tower in towers):  # as in `nets.ready`
        raise BadRequest(f"the tensors of {net.source.model} can be edited before {net.adapters[-1]}; change the order")
    return {f"{tower.prefix}{name}": t for tower in towers for name, t in tower.module.state_dict().items()}


def load_tensors(net: Net, state: "Mapping[str, Tensor]") -> None:
    """Loads tensors by our names into the modules of ``net``, which must have the same shapes."""
    for tower in _keepers(net):
        tensors = {name: state[f"{tower.prefix}{name}"] for name in tower.module.state_dict()}
        tower.module.load_state_dict(tensors, assign=True)


def _keepers(net: Net) -> list[Tower]:
    return [tower for tower in net.towers.values() if tower.prefix]


def _map_paths(params: FrozenModel, change: Callable[[Path], Path]) -> FrozenModel:
    paths: dict[str, Any] = {name: change(value) for name, value in params if isinstance(value, Path)}
    paths |= {name: tuple(map(change, value)) for name, value in params if _are_paths(value)}
    return params.model_copy(update=paths)


def _are_paths(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(entry, Path) for entry in value)
