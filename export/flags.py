"""Adapters on the command line of `calmclip export`: the options that each adapter declares, and ``--adapter``.

The options come from the sources of our adapters, so that neither a help text nor a mistyped flag loads torch. Adapters
of other packages, which join by an entry point, are imported for it.
"""

import argparse
import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from calmclip.models.registry import catalog, sources

if TYPE_CHECKING:
    from calmclip.export.adapters import Adapt


@dataclass(frozen=True)
class Typed:
    """One option. An adapter's first option appends it; the others set a param of the last adapter of that name."""

    name: str
    params: dict[str, Any]
    first: bool = True


@dataclass(frozen=True)
class Option:
    """What an adapter says of one of its options. ``switch``: the param is a bool."""

    option: str
    name: str
    param: str
    first: bool
    switch: bool
    help: str


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
        help=f"changes of the net before it is traced, in this order: {', '.join(catalog('adapters'))}",
    )
    for option in declared():
        with suppress(argparse.ArgumentError):
            _declare(options, option)


def declared() -> list[Option]:
    """The options of all adapters, by the adapters' names."""
    if entry_points(group="calmclip.adapters"):
        return imported()
    read = [option for module in sources("adapters") for option in _read(module)]
    return sorted(read, key=lambda option: option.name)


def imported() -> list[Option]:
    """The same from the registered adapters."""
    from calmclip.export.adapters import ADAPTERS

    options = []
    for name in ADAPTERS.names():
        adapter = ADAPTERS.get(name)
        for place, (option, param) in enumerate(adapter.flags.items()):
            field = adapter.params.model_fields[param]
            words = field.description or _default_help(param, name)
            options.append(Option(option, name, param, place == 0, field.annotation is bool, words))
    return options


def _read(module: ast.Module) -> Iterator[Option]:
    """The options that the source of a module declares: ``register("name")(Adapter(Params, adapt, {option: param}))``,
    with the fields of a class ``Params`` of that module."""
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(module):
        match node:
            case ast.Call(
                func=ast.Call(func=ast.Attribute(attr="register"), args=[ast.Constant(value=str(name)), *_]),
                args=[ast.Call(func=ast.Name(id="Adapter"), args=args, keywords=keywords)],
            ):
                given = dict(zip(("params", "adapt", "flags"), args, strict=False))
                given |= {keyword.arg: keyword.value for keyword in keywords if keyword.arg}
                params = given["params"]
                if not isinstance(params, ast.Name):
                    continue
                flags: Mapping[str, str] = ast.literal_eval(given["flags"]) if "flags" in given else {}
                fields = dict(_fields(classes[params.id])) if flags else {}
                for place, (option, param) in enumerate(flags.items()):
                    switch, words = fields[param]
                    yield Option(option, name, param, place == 0, switch, words or _default_help(param, name))


def _fields(params: ast.ClassDef) -> Iterator[tuple[str, tuple[bool, str]]]:
    """name -> (whether it is a bool, its description)"""
    for node in params.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                keywords = value.keywords if isinstance(value, ast.Call) else []
                texts = [ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg == "description"]
                yield name, (ast.unparse(annotation) == "bool", "".join(texts))


def _default_help(param: str, name: str) -> str:
    return f"{param} of the adapter {name}"


def _declare(options: argparse.ArgumentParser, option: Option) -> None:
    words = option.help.replace("%", "%%")
    if option.switch:
        true = Typed(option.name, {option.param: True}, option.first)
        options.add_argument(option.option, dest="adapters", action="append_const", const=true, help=words)
    else:
        typed = lambda value: Typed(option.name, {option.param: value}, option.first)  # noqa: E731
        options.add_argument(
            option.option, dest="adapters", action="append", type=typed, metavar=option.param.upper(), help=words
        )


def merged(listed: Sequence["Adapt"], typed: Sequence[Typed]) -> tuple["Adapt", ...]:
    """The recipe's adapters, then those of the command line. An option that is not an adapter's first one may come
    before the first; if no first one follows, it sets the recipe's last adapter of that name. Raises as
    `Adapt.checked`."""
    from calmclip.export.adapters import Adapt

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


def _set(adapters: list["Adapt"], option: Typed) -> bool:
    """Set the params of the last adapter of the option's name; -> whether there is one."""
    from calmclip.export.adapters import Adapt

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
