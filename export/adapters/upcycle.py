"""A mixture of experts out of dense checkpoints that differ in their MLPs alone: each MLP becomes an expert.

Source: CLIP-MoE, Zhang et al. 2024 (arXiv 2409.19291): p = softmax(gate(ln_2(x))), the ``top`` best renormalized. The
first expert is the net's own MLP, the others follow in the order of ``checkpoints``. Blocks whose MLPs are equal in all
checkpoints stay dense, which is the same function, unless ``routers`` has a gate for them.

``routers``: a file with ``{visual.}transformer.resblocks.{i}.gate.weight`` [experts, width], as CLIP-MoE's checkpoints
have, or with our names. Without it, routers are drawn as in the authors' code, uniform within 1 / sqrt(width). The
authors then train the routers, and nothing else. An untrained router sends a token to experts at random: the answers
are some mean of the checkpoints', and nothing says that they are better than those of one checkpoint.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from calmclip.export import layouts
from calmclip.export.adapters import ADAPTERS, Adapter, Context, tensors, with_note
from calmclip.export.adapters._tensors import State, check_same, layout_of, read_clip
from calmclip.export.checkpoints import hub, read
from calmclip.export.layouts import LAYOUTS
from calmclip.export.nets import Net
from calmclip.export.nets.clip import head
from calmclip.export.towers import Style, part
from calmclip.export.towers.transformer import MLP, Experts
from calmclip.models.bundle.manifest import FrozenModel, Plugin
from calmclip.models.errors import BadRequest, UnknownCheckpoint

_MLP = re.compile(r"((?:image|text)\.blocks\.\d+\.mlp\.)(.*)")
_EQUAL = 1e-6  # of a tensor's largest number


class Params(FrozenModel):
    checkpoints: Annotated[
        tuple[Path, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)
    ] = Field(
        min_length=1,
        description="A,B,…: checkpoints that differ from this one in their MLPs alone, which become its experts",
    )
    routers: Path | None = Field(
        default=None,
        description="a file with the gate.weight of each block of --upcycle; without it they are untrained",
    )
    top: int = Field(default=2, ge=1, description="experts for each token, of --upcycle (default 2)")
    routed: bool = Field(default=False, description="an expert of --upcycle computes its own tokens alone")
    seed: int = Field(default=0, description="of untrained routers of --upcycle (default 0)")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net that is no CLIP or a mixture already, `UnknownCheckpoint` with the tensors in which
    a checkpoint differs outside its MLPs, and with a router that is missing or does not fit."""
    _, name_of = layout_of(net, "upcycle")
    base, number = tensors(net), 1 + len(params.checkpoints)
    if any(name.endswith(".mlp.gate.weight") for name in base):
        raise BadRequest(f"upcycle: {net.source.model} is a mixture of experts already; expected a dense checkpoint")
    if params.top > number:
        raise BadRequest(f"upcycle: top is {params.top}; there are {number} experts, this checkpoint's included")
    assert net.classifier is not None  # of a CLIP
    assert net.classifier.head is not None
    states = []
    for path in params.checkpoints:
        other = read_clip(path, context.weights)
        towers = {name: tensor for name, tensor in other.items() if name.startswith(("image.", "text."))}
        check_same(base, towers, str(path), name_of)
        _check_equal(base, towers, net.classifier.head, head(other), str(path), name_of)
        states.append(towers)
    routers = _routers(params, base, states, number, name_of)
    for tower in net.towers.values():
        mlps = f"{tower.prefix}blocks."
        for i, block in enumerate(getattr(tower.module, "blocks", ())):
            if (router := routers.get(f"{mlps}{i}.mlp.gate.weight")) is not None:
                assert isinstance(block.mlp, MLP)
                assert isinstance(tower.module.style, Style)
                style = replace(tower.module.style, top=params.top, routed=params.routed)
                block.mlp = _mixture([part(state, f"{mlps}{i}.mlp.") for state in (base, *states)], router, style)
    origin = f"routers of {hub.name(params.routers)}" if params.routers else f"untrained routers (seed {params.seed})"
    names = ", ".join(map(hub.name, params.checkpoints))
    note = f"{number} experts, {params.top} a token, in {len(routers)} blocks, with the MLPs of {names}; {origin}"
    context.say(f"upcycle: {note}" + "; tokens go to experts at random until they are trained" * (not params.routers))
    files = {f"upcycle/{expert}": path for expert, path in enumerate(params.checkpoints, 1)}
    return with_note(net, note, **files, **({"upcycle/routers": params.routers} if params.routers else {}))


def _mixture(mlps: Sequence[State], router: Tensor, style: Style) -> Experts:
    state = {f"experts.{e}.{name}": tensor for e, mlp in enumerate(mlps) for name, tensor in mlp.items()}
    state["gate.weight"] = router
    experts = Experts(state, style, router.shape[1])
    experts.load_state_dict(state, assign=True)
    return experts.requires_grad_(False).eval()


def _check_equal(
    base: State, other: State, scale: Plugin, other_scale: Plugin, file: str, name_of: Callable[[str], str]
) -> None:
    """Raises `UnknownCheckpoint` with the first tensors outside the MLPs that differ, and how much."""
    apart = {
        name_of(name): float((tensor - other[name]).abs().max())
        for name, tensor in base.items()
        if not _MLP.fullmatch(name) and not _equal(tensor, other[name])
    }
    for name, value in scale.params.items():
        if not _equal(torch.tensor(value), torch.tensor(other_scale.params.get(name, float("inf")))):
            apart[f"logit_{name}"] = abs(other_scale.params.get(name, float("inf")) - value)
    if apart:
        some = ", ".join(f"{name} by up to {by:.3g}" for name, by in list(apart.items())[:3])
        raise UnknownCheckpoint(
            f"{file} differs from the base outside the MLPs of its blocks, in {len(apart)} tensors: {some}; expected "
            "checkpoints that were tuned from the base in their MLPs alone"
        )


def _equal(one_side: Tensor, other: Tensor) -> bool:
    return bool((one_side.double() - other.double()).abs().max() <= _EQUAL * one_side.double().abs().max())


def _routers(
    params: Params, base: State, states: Sequence[State], number: int, name_of: Callable[[str], str]
) -> dict[str, Tensor]:
    """Our name of a gate -> its weight [E, W], for each block that becomes a mixture."""
    dense: dict[str, int] = {}  # gate -> width
    mixed = []
    for name, tensor in base.items():
        if match := _MLP.fullmatch(name):
            gate = f"{match[1]}gate.weight"
            if match[2] == "up.weight":
                dense[gate] = tensor.shape[1]
            if any(not _equal(tensor, state[name]) for state in states):
                mixed.append(gate)
    if params.routers is None:
        if not mixed:
            raise UnknownCheckpoint("upcycle: the MLPs of all checkpoints are equal; their mixture is the base itself")
        draw = torch.Generator().manual_seed(params.seed)
        gates = {gate: dense[gate] ** -0.5 for gate in dict.fromkeys(mixed)}
        return {gate: (torch.rand(number, dense[gate], generator=draw) * 2 - 1) * end for gate, end in gates.items()}
    file, routers = params.routers, dict[str, Tensor]()
    names = {layouts.checkpoint_name(LAYOUTS.get("clip_moe"), gate): gate for gate in dense} | {g: g for g in dense}
    for name, tensor in read(file).tensors.items():
        if not name.endswith("gate.weight"):
            continue
        if (known := names.get(name)) is None:
            raise UnknownCheckpoint(f"{file}: {name} is the router of no block; expected {next(iter(names))} and so on")
        if list(tensor.shape) != (shape := [number, dense[known]]):
            raise UnknownCheckpoint(f"{file}: {name} has the shape {list(tensor.shape)}; expected {shape}")
        routers[known] = tensor.float()
    if absent := [gate for gate in mixed if gate not in routers]:
        name = next(name for name, gate in names.items() if gate == absent[0])
        raise UnknownCheckpoint(f"{file} lacks {name}; the MLPs of this block differ, so it needs a router")
    return routers


ADAPTERS.register("upcycle")(
    Adapter(
        Params,
        adapt,
        {
            "--upcycle": "checkpoints",
            "--upcycle-routers": "routers",
            "--upcycle-top": "top",
            "--upcycle-routed": "routed",
            "--upcycle-seed": "seed",
        },
    )
)
