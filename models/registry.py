"""`Registry`: the one mechanism behind every plug-in family.

A family is a package. A module of it registers what it holds when imported; packages of others join through
the entry-point group ``calmclip.<family>``. Nothing is imported before somebody asks for a name.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from threading import RLock
from typing import Generic, TypeVar

from models.errors import UnknownName, suggestion

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one family."""

    def __init__(self, family: str, package: str) -> None:
        self.family = family
        self.package = package
        self._things: dict[str, T] = {}
        self._loaded = False
        self._loading = RLock()  # of one thread's imports the others wait for the end

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator. A second use of a name is an error, never a silent replacement."""

        def keep(thing: T) -> T:
            if name in self._things:
                raise ValueError(f"{self.family} {name!r} is registered twice; choose another name")
            self._things[name] = thing
            return thing

        return keep

    def get(self, name: str) -> T:
        """Raises `UnknownName`, which says the nearest and all known names."""
        self.load()
        try:
            return self._things[name]
        except KeyError:
            known = self.names()
            raise UnknownName(f"there is no {self.family} {name!r}; {suggestion(name, known)}", known=known) from None

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
                    import_module(f"{self.package}.{module.name}")
            for point in entry_points(group=f"calmclip.{self.family}"):
                point.load()
            self._loaded = True
