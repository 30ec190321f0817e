"""Adapters on the command line of `calmclip export`: the options that each declares, and ``--adapter`` for any."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from calmclip.export.adapters import ADAPTERS, Adapt


@dataclass(frozen=True)
class Typed:
    """One option: it appends an adapter, or, where it is not the adapter's first, sets a param of the last one."""

    name: str
    params: dict[str, Any]
    first: bool = True


def declare(options: argparse.ArgumentParser) -> None:
    """Values end up in ``adapters``, in the order in which they were typed. An option that there is already stays what
    it is: the adapter is reached by ``--adapter``."""
    options.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        type=_named,
        metavar="NAME[:PARAM=VALUE,…]",
        help=f"what changes the net before it is traced, in this order: {', '.join(ADAPTERS.names())}",
    )
    for name in ADAPTERS.names():
        adapter = ADAPTERS.get(name)
        for place, (option, param) in enumerate(adapter.flags.items()):
            with suppress(argparse.ArgumentError):
                _declare(options, option, name, param, place == 0)


def _declare(options: argparse.ArgumentParser, option: str, name: str, param: str, first: bool) -> None:
    about = ADAPTERS.get(name).params.model_fields[param]
    shown = (about.description or f"{param} of the adapter {name}").replace("%", "%%")
    if about.annotation is bool:
        true = Typed(name, {param: True}, first)
        options.add_argument(option, dest="adapters", action="append_const", const=true, help=shown)
    else:
        made = lambda value: Typed(name, {param: value}, first)  # noqa: E731
        options.add_argument(option, dest="adapters", action="append", type=made, metavar=param.upper(), help=shown)


def asked(listed: Sequence[Adapt], typed: Sequence[Typed]) -> tuple[Adapt, ...]:
    """The recipe's adapters and those of the command line. What is not an adapter's first option may stand before it,
    and belongs to the recipe's last one of the name where none was typed. Raises as `Adapt.checked`."""
    made: list[Adapt] = []
    early: list[Typed] = []
    for one in typed:
        if one.first:
            made.append(Adapt(name=one.name, params=one.params))
        elif not _set(made, one):
            early.append(one)
    made = [*listed, *made]
    for one in early:
        if not _set(made, one):
            made.append(Adapt(name=one.name, params=one.params))  # which lacks what the first option says
    return tuple(one.checked() for one in made)


def _set(made: list[Adapt], one: Typed) -> bool:
    """Whether there is an adapter of the name, whose last one takes the params."""
    for place in reversed(range(len(made))):
        if made[place].name == one.name:
            made[place] = Adapt(name=one.name, params=made[place].params | one.params)
            return True
    return False


def _named(given: str) -> Typed:
    name, _, rest = given.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if rest else []
    if not name or not all(param and sign for param, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"{given!r} is not NAME or NAME:PARAM=VALUE,…, such as stretch:tokens=248")
    return Typed(name, {param: value for param, _, value in pairs})
