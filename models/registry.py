"""`Registry`: the one mechanism behind every plug-in family.

A family is a package. Each of its modules registers its names when it is imported; other packages join through the
entry-point group ``calmclip.<family>``. The modules are imported when the first name is needed. A module that fails to
import does not affect the others. The error is shown when a caller asks for a name that is missing.

`catalog` lists the names of a family without importing it, so a list needs no torch. It reads the sources: the string
in ``register("name")``, both strings in ``@Endpoint("VERB", "/path")``, and ``NAMES``, a tuple of strings.
"""

import ast
import sys
from collections.abc import Callable, Iterator
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

# family -> its package and the registry in it
FAMILIES = {
    "nets": "calmclip.export.nets:NETS",
    "layouts": "calmclip.export.layouts:LAYOUTS",
    "adapters": "calmclip.export.adapters:ADAPTERS",
    "quantizers": "calmclip.export.quantizers:QUANTIZERS",
    "rewrites": "calmclip.export.rewrites:REWRITES",
    "evals": "calmclip.models.evals:EVALS",
    "tasks": "calmclip.models.tasks:TASKS",
    "heads": "calmclip.models.heads:HEADS",
    "segmenters": "calmclip.models.segmenters:SEGMENTERS",
    "stores": "calmclip.service.stores:STORES",
    "endpoints": "calmclip.service.routes:ENDPOINTS",
}


def catalog(family: str) -> list[str]:
    """Sorted names of a family: from the sources of its modules, and from entry points of other packages.

    No module of the family is imported. Raises `ModuleNotFoundError` if its package is not installed.
    """
    names = {point.name for point in entry_points(group=f"calmclip.{family}")}
    return sorted(names.union(*map(_registered, sources(family))))


def sources(family: str) -> Iterator[ast.Module]:
    """The sources of a family's modules. Raises as `catalog`."""
    package, _ = FAMILIES[family].split(":")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    for folder in spec.submodule_search_locations:
        for module in iter_modules([folder]):
            if not module.name.startswith("_"):
                path = Path(folder, module.name)
                source = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
                yield ast.parse(source.read_text(encoding="utf-8"))


def _registered(module: ast.Module) -> set[str]:
    """The names that the source of a module registers."""
    names: set[str] = set()
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Attribute(attr="register"), args=[ast.Constant(value=str(name)), *_]):
                names.add(name)
            case ast.Call(args=[ast.Constant(value=str(verb)), ast.Constant(value=str(path)), *_]) if path[:1] == "/":
                names.add(f"{verb} {path}")  # of an Endpoint, or of a partial of it
            case ast.Assign(targets=[ast.Name(id="NAMES")], value=ast.Tuple() as value):
                names |= set(ast.literal_eval(value))
    return names


class Registry(Generic[T]):
    """The named plug-ins of one family."""

    def __init__(self, family: str, package: str) -> None:
        self.family = family
        self.package = package
        self.broken: dict[str, Exception] = {}  # module or entry point -> its import error
        self._plugins: dict[str, T] = {}
        self._homes: dict[str, str] = {}  # name -> the module that registered it
        self._loaded = False
        self._loading = RLock()  # other threads wait until the imports end

    def register(self, name: str, home: str = "") -> Callable[[T], T]:
        """A decorator. A second use of a name is an error. ``home``: the module that owns the name; else the
        caller's."""
        home = home or sys._getframe(1).f_globals["__name__"]

        def add(plugin: T) -> T:
            if name in self._plugins:
                raise ValueError(f"{self.family} {name!r} is registered twice; choose another name")
            self._plugins[name], self._homes[name] = plugin, home
            return plugin

        return add

    def get(self, name: str) -> T:
        """Raises `UnknownName` with the nearest name, all known names, and all import errors."""
        self.load()
        try:
            return self._plugins[name]
        except KeyError:
            known = self.names()
            why = "".join(f" {module} did not import: {error!r}." for module, error in self.broken.items())
            raise UnknownName(
                f"there is no {self.family} {name!r}; {suggestion(name, known)}{why}", known=known
            ) from next(iter(self.broken.values()), None)

    def names(self) -> list[str]:
        self.load()
        return sorted(self._plugins)

    def load(self) -> None:
        """Import every module of the package, then the entry points of other packages. Only the first call does so."""
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
        """Remove the names of a module that fails, so that a second import raises the same error again."""
        try:
            load()
        except Exception as error:
            self.broken[title] = error
            for name in [name for name, owner in self._homes.items() if owner == home]:
                del self._plugins[name], self._homes[name]
