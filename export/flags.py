"""Adapters on the command line of `calmclip export`: the options that each adapter declares, and ``--adapter``."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from calmclip.export.adapters import ADAPTERS, Adapt


@dataclass(frozen=True)
class Typed:
    """One option. An adapter's first option appends it; the others set a param of the last adapter of that name."""

    name: str
    params: dict[str, Any]
    first: bool = True


def declare(options: argparse.ArgumentParser) -> None:
    """Values end up in ``adapters``, in the order in which they were typed. An option that exists already keeps its
    meaning; the adapter is then reached by ``--adapter``."""
    options.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        type=_named,
        metavar="NAME[:PARAM=VALUE,…]",
        help=f"changes of the net before it is traced, in this order: {', '.join(ADAPTERS.names())}",
    )
    for name in ADAPTERS.names():
        adapter = ADAPTERS.get(name)
        for place, (option, param) in enumerate(adapter.flags.items()):
            with suppress(argparse.ArgumentError):
                _declare(options, option, name, param, place == 0)


def _declare(options: argparse.ArgumentParser, option: str, name: str, param: str, first: bool) -> None:
    field = ADAPTERS.get(name).params.model_fields[param]
    text = (field.description or f"{param} of the adapter {name}").replace("%", "%%")
    if field.annotation is bool:
        true = Typed(name, {param: True}, first)
        options.add_argument(option, dest="adapters", action="append_const", const=true, help=text)
    else:
        typed = lambda value: Typed(name, {param: value}, first)  # noqa: E731
        options.add_argument(option, dest="adapters", action="append", type=typed, metavar=param.upper(), help=text)


def merged(listed: Sequence[Adapt], typed: Sequence[Typed]) -> tuple[Adapt, ...]:
    """The recipe's adapters, then those of the command line. An option that is not an adapter's first one may come
    before the first; if no first one follows, it sets the recipe's last adapter of that name. Raises as
    `Adapt.checked`."""
    adapters: list[Adapt] = []
    early: list[Typed] = []
    for option in typed:
        if option.first:
            adapters.append(Adapt(name=option.name, params=option.params))
        elif not _set(adapters, option):
            early.append(option)
    adapters = [*listed, *adapters]
    for option in early:
        if not _set(adapters, option):
            adapters.append(Adapt(name=option.name, params=option.params))  # `checked` names the missing param
    return tuple(adapter.checked() for adapter in adapters)


def _set(adapters: list[Adapt], option: Typed) -> bool:
    """Set the params of the last adapter of the option's name; -> whether there is one."""
    for place in reversed(range(len(adapters))):
        if adapters[place].name == option.name:
            adapters[place] = Adapt(name=option.name, params=adapters[place].params | option.params)
            return True
    return False


def _named(text: str) -> Typed:
    name, _, params = text.partition(":")
    pairs = [pair.partition("=") for pair in params.split(",")] if params else []
    if not name or not all(param and sign for param, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME:PARAM=VALUE,…, such as stretch:tokens=248")
    return Typed(name, {param: value for param, _, value in pairs})
