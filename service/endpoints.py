"""`Endpoint`: one operation over HTTP, as one value; `ENDPOINTS`, the family of them; `Table`, those of one app.

The app's routes, keys and ports, tasks in metrics and paces, /openapi.json, objectives, and the tests of client and
pages read it. A handler takes an `asked.Asked`, and whatever of the path, query and headers FastAPI is to read for it::

    @Endpoint("POST", "/v1/shout", task="shout", scope="read", body=ShoutBody, example={"text": "a"}, answer=Shout)
    async def shout(asked: Asked[ShoutBody]) -> Shout: ...
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, TypeVar

from calmclip.models.errors import CalmclipError
from calmclip.models.registry import Registry
from calmclip.service.access import Door
from calmclip.service.schemas import Body

Handler = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)

# What requests count as that no objective is about: probes, scrapes, the page, manifests; and what nobody serves.
CATALOG, OTHER = UNCOUNTED = ("catalog", "other")

# Problems that endpoints have in common: of those that run a graph, that read a body, that look at a picture.
ENGINE = ("overloaded", "model-not-found", "task-not-served")
INPUT = ("invalid-request", "picture-not-fetched", "unsupported-media-type", "body-too-large")
PICTURE = ("unsupported-image", "image-too-large")
# A PNG, base64, for examples that work.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4UaEBAAN0AWnL+tDXAAAAAElFTkSuQmCC"


@dataclass(frozen=True)
class Endpoint:
    """``path``: as Starlette has it, `{name}` for a segment. Over a function it registers itself with that handler.

    Raises `ValueError` for a body without an example.
    """

    method: str
    path: str
    _: KW_ONLY
    task: str  # what its requests count as, in metrics, paces and objectives
    scope: Door = "write"  # what a key must be for; closed until somebody opens it
    summary: str = ""
    description: str = ""
    tags: tuple[str, ...] = ("tasks",)
    body: type[Body] | None = None  # what a request brings
    example: Mapping[str, Any] | None = None  # of the body; it is answered with success
    kinds: tuple[str, ...] = ()  # content types beside JSON; with any, the handler gets the body's bytes as they are
    answer: Any = None  # the model of a success; None: no JSON
    status: int = 200
    problems: tuple[str, ...] = ()  # slugs, beside those that every request may come to
    responses: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # status -> what OpenAPI says beside that
    head: bool = False  # HEAD is answered too
    listed: bool = True  # in /openapi.json
    handler: Handler | None = None  # None: FastAPI's own

    def __post_init__(self) -> None:
        if (self.body is None) != (self.example is None):
            raise ValueError(f"{self.name} has a body or an example of one; expected both, or none")

    def __call__(self, handler: H) -> H:
        ENDPOINTS.register(self.name, handler.__module__)(replace(self, handler=handler))
        return handler

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def interactive(self) -> bool:
        """Somebody waits for its answer: it is asked something and changes nothing."""
        return self.body is not None and self.scope == "read"


ENDPOINTS: Registry[Endpoint] = Registry("endpoints", "calmclip.service.routes")

# What is asked of no endpoint, and answered 404 or 405: it looks, or it is closed to those who may only look.
LOOKING = ("GET", "HEAD")
_LOOKED = Endpoint("GET", "", task=OTHER, scope="read")
_CLOSED = Endpoint("", "", task=OTHER)
_PLACE = re.compile(r"(\{\w+(?::\w+)?\})")


def registered() -> list[Endpoint]:
    """All of the family. Raises `CalmclipError` where a module of it does not import: a service that lacks a route it
    was given does not start."""
    names = ENDPOINTS.names()
    if ENDPOINTS.broken:
        where, error = next(iter(ENDPOINTS.broken.items()))
        what = f"{where} did not import, so its endpoints would be missing: {error!r}"
        raise CalmclipError(f"{what}; mend it, or uninstall the package that brings it") from error
    return [ENDPOINTS.get(name) for name in names]


class Table:
    """Endpoints of one app, in the order in which a router should try them: fixed paths first, so that `/a/b` wins over
    `/a/{name}`, of those the ones whose requests are many.

    Raises `ValueError` where two have the same verb and path, but for the names in it.
    """

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.all = sorted(endpoints, key=lambda one: ("{" in one.path, not one.interactive, one.path, one.method))
        shapes: dict[str, Endpoint] = {}
        for one in self.all:
            other = shapes.setdefault(_PLACE.sub("{}", one.name), one)
            if other is not one:
                raise ValueError(f"{one.name} and {other.name} are one path; choose another")
        self._fixed = {one.name: one for one in self.all if "{" not in one.path}
        self._placed = [one for one in self.all if "{" in one.path]
        self._pattern = re.compile("|".join(f"({_pattern(one.name)}$)" for one in self._placed) or "(?!)")

    def find(self, method: str, path: str) -> Endpoint:
        """The one that answers this; else one that stands for none, counts as `other` and is closed to strangers.

        On every request, before routing: a look into a dictionary, or one match.
        """
        asked = f"{'GET' if method == 'HEAD' else method} {path}"
        if found := self._fixed.get(asked.removesuffix("\n")):  # as the router has it, whose paths end with a `$`
            return found
        if match := self._pattern.match(asked):
            return self._placed[(match.lastindex or 0) - 1]
        return _LOOKED if method in LOOKING else _CLOSED


def _pattern(name: str) -> str:
    """A regular expression without groups, which takes what the router does, or more."""
    return "".join(
        re.escape(part) if part[:1] != "{" else ".*" if part.endswith(":path}") else "[^/]+"
        for part in _PLACE.split(name)
    )
