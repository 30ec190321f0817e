"""`Registry`: the one mechanism behind every plug-in family.

A family is a package. A module of it registers what it holds when imported; packages of others join through
the entry-point group ``calmclip.<family>``. Nothing is imported before somebody asks for a name. One that does
not import takes nothing from the others; its error is told to whoever asks for a name that is then not there.

`catalog` lists a family without importing it, so that a list of names costs no torch. It reads the sources: the text
in ``register("name")``, both in ``@Endpoint("VERB", "/path")``, which registers itself, and ``NAMES``, a tuple of
texts, of a module that makes its names in a loop.
"""

import ast
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from threading import RLock
from typing import Generic, TypeVar

from calmclip.models.errors import UnknownName, suggestion

T = TypeVar("T")

# family -> its package and the registry in it. Every family of calmclip, on one screen.
FAMILIES = {
    "nets": "calmclip.export.nets:NETS",
    "layouts": "calmclip.export.layouts:LAYOUTS",
    "adapters": "calmclip.export.adapters:ADAPTERS",
    "quantizers": "calmclip.export.quantizers:QUANTIZERS",
    "rewrites": "calmclip.export.rewrites:REWRITES",
    "evals": "calmclip.models.evals:EVALS",
    "tasks": "calmclip.models.tasks:TASKS",
    "heads": "calmclip.models.heads:HEADS",
    "stores": "calmclip.service.stores:STORES",
    "endpoints": "calmclip.service.routes:ENDPOINTS",
}


def catalog(family: str) -> list[str]:
    """Names of a family of `FAMILIES`, sorted: of its own modules as their sources say, of other packages' entry
    points as these are called. Nothing of the family is imported. Raises `ModuleNotFoundError`: its package is not
    installed.
    """
    package, _ = FAMILIES[family].split(":")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    names = {point.name for point in entry_points(group=f"calmclip.{family}")}
    for folder in found.submodule_search_locations:
        for module in iter_modules([folder]):
            if not module.name.startswith("_"):
                path = Path(folder, module.name)
                source = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
                names |= _registered(ast.parse(source.read_text(encoding="utf-8")))
    return sorted(names)


def _registered(module: ast.Module) -> set[str]:
    """The names that a module of a family registers, as its source says."""
    names: set[str] = set()
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Attribute(attr="register"), args=[ast.Constant(value=str(name)), *_]):
                names.add(name)
            case ast.Call(
                func=ast.Name(id="Endpoint"), args=[ast.Constant(value=str(verb)), ast.Constant(value=str(path)), *_]
            ):
                names.add(f"{verb} {path}")
            case ast.Assign(targets=[ast.Name(id="NAMES")], value=ast.Tuple() as value):
                names |= set(ast.literal_eval(value))
    return names


class Registry(Generic[T]):
    """Named things of one family."""

    def __init__(self, family: str, package: str) -> None:
        self.family = family
        self.package = package
        self.broken: dict[str, Exception] = {}  # module or entry point -> why it did not import
        self._things: dict[str, T] = {}
        self._homes: dict[str, str] = {}  # name -> the module that registered it
        self._loaded = False
        self._loading = RLock()  # of one thread's imports the others wait for the end

    def register(self, name: str, home: str = "") -> Callable[[T], T]:
        """A decorator. A second use of a name is an error, never a silent replacement.

        ``home``: the module whose name it is, else the caller's.
        """
        home = home or sys._getframe(1).f_globals["__name__"]

        def keep(thing: T) -> T:
            if name in self._things:
                raise ValueError(f"{self.family} {name!r} is registered twice; choose another name")
            self._things[name], self._homes[name] = thing, home
            return thing

        return keep

    def get(self, name: str) -> T:
        """Raises `UnknownName`, which says the nearest and all known names, and what did not import."""
        self.load()
        try:
            return self._things[name]
        except KeyError:
            known = self.names()
            why = "".join(f" {module} did not import: {error!r}." for module, error in self.broken.items())
            raise UnknownName(
                f"there is no {self.family} {name!r}; {suggestion(name, known)}{why}", known=known
            ) from next(iter(self.broken.values()), None)

    def names(self) -> list[str]:
        self.load()
        return sorted(self._things)

    def load(self) -> None:
        """Imports every module of the package, then the entry points of other packages. Once."""
        if self._loaded:
            return
        with self._loading:
            package = import_module(self.package)
            for module in iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    name = f"{self.package}.{module.name}"
                    self._try(name, name, partial(import_module, name))
            for point in entry_points(group=f"calmclip.{self.family}"):
                self._try(f"entry point {point.name} = {point.value}", point.module, point.load)
            self._loaded = True

    def _try(self, title: str, home: str, load: Callable[[], object]) -> None:
        """A module that fails half-way holds nothing, so that importing it again fails as it did, not for its names."""
        try:
            load()
        except Exception as error:
            self.broken[title] = error
            for name in [name for name, where in self._homes.items() if where == home]:
                del self._things[name], self._homes[name]
