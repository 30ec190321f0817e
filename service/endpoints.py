"""`Endpoint`: one operation over HTTP as a value; `ENDPOINTS`: the family; `Table`: the endpoints of one app.

Routes, keys and ports, tasks of metrics and admission, /openapi.json, objectives, and the tests of client and pages
read it. A handler takes an `asked.Asked`, and parameters that FastAPI reads from path, query and headers::

    @Endpoint("POST", "/v1/shout", task="shout", scope="read", body=ShoutBody, example={"text": "a"}, answer=Shout)
    async def shout(asked: Asked[ShoutBody]) -> Shout: ...
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, TypeVar

from calmclip.models.errors import CalmclipError
from calmclip.models.registry import Registry
from calmclip.service.access import EndpointScope
from calmclip.service.dialects import OURS, Dialect
from calmclip.service.schemas import Body

Handler = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)

# Tasks without an objective: probes, scrapes, the page and manifests; and requests that no endpoint serves.
CATALOG, OTHER = UNCOUNTED = ("catalog", "other")

# Common problems of endpoints that run a graph, read a body, or look at a picture.
ENGINE = ("overloaded", "model-not-found", "task-not-served")
INPUT = ("invalid-request", "picture-not-fetched", "unsupported-media-type", "body-too-large")
PICTURE = ("unsupported-image", "image-too-large")
# A PNG in base64, so that examples can be run.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4UaEBAAN0AWnL+tDXAAAAAElFTkSuQmCC"


@dataclass(frozen=True)
class Endpoint:
    """``path``: as in Starlette, `{name}` for a segment. As a decorator it registers the function as its handler.

    Raises `ValueError` for a body without an example.
    """

    method: str
    path: str
    _: KW_ONLY
    task: str  # of its requests in metrics, admission and objectives
    scope: EndpointScope = "write"  # of the key that it needs
    summary: str = ""
    description: str = ""
    tags: tuple[str, ...] = ("tasks",)
    body: type[Body] | None = None  # of a request
    example: Mapping[str, Any] | None = None  # of the body; it must succeed
    optional: bool = False  # the body may be empty; the handler gets the raw bytes
    kinds: tuple[str, ...] = ()  # content types beside the JSON of a body; with any, the handler gets the raw bytes
    answer: Any = None  # model of a success; None: no JSON
    many: bool = False  # it also answers with `Results` of ``answer``, or with a line for each
    status: int = 200
    problems: tuple[str, ...] = ()  # slugs, beside those that every request may have
    responses: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # status -> more for OpenAPI
    head: bool = False  # answer HEAD too
    rest: bool = False  # the last parameter of the path takes all that follows, slashes and line ends included
    dialect: Dialect = OURS  # of its problems
    operation: str = ""  # as OpenTelemetry's conventions for generative AI name it; "" if they do not
    listed: bool = True  # in /openapi.json
    handler: Handler | None = None  # None: FastAPI has its own

    def __post_init__(self) -> None:
        if (self.body is None) != (self.example is None):
            raise ValueError(f"{self.name} has only one of body and example; expected both or none")

    def __call__(self, handler: H) -> H:
        ENDPOINTS.register(self.name, handler.__module__)(replace(self, handler=handler))
        return handler

    @property
    def route(self) -> str:
        """The path as the router has it."""
        return f"{self.path[:-1]}:rest}}" if self.rest else self.path

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def interactive(self) -> bool:
        """Whether a user may wait for the answer: it takes a body, changes nothing, and has an objective."""
        return self.body is not None and self.scope == "read" and self.task not in UNCOUNTED


ENDPOINTS: Registry[Endpoint] = Registry("endpoints", "calmclip.service.routes")

# Stand for requests without an endpoint, which are answered 404 or 405: those that read, and all others.
READING = ("GET", "HEAD")
_NONE_READ = Endpoint("GET", "", task=OTHER, scope="read")
_NONE_WRITE = Endpoint("", "", task=OTHER)
REST = "(?s:.*)"  # Starlette's `path` leaves out line ends
_SEGMENT = re.compile(r"(\{\w+(?::\w+)?\})")


def registered() -> list[Endpoint]:
    """All of the family. Raises `CalmclipError` if a module does not import, because a service must not start without
    one of its routes."""
    names = ENDPOINTS.names()
    if ENDPOINTS.broken:
        module, error = next(iter(ENDPOINTS.broken.items()))
        problem = f"{module} did not import, so its endpoints would be missing: {error!r}"
        raise CalmclipError(f"{problem}; fix it, or uninstall its package") from error
    return [ENDPOINTS.get(name) for name in names]


class Table:
    """Endpoints of one app in the order in which a router must try them: fixed paths first, so that `/a/b` wins over
    `/a/{name}`, then frequent ones first.

    Raises `ValueError` if two have the same method and path, apart from the names of segments.
    """

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.all = sorted(endpoints, key=lambda e: ("{" in e.path, not e.interactive, e.path, e.method))
        shapes: dict[str, Endpoint] = {}
        for endpoint in self.all:
            other = shapes.setdefault(_SEGMENT.sub("{}", endpoint.name), endpoint)
            if other is not endpoint:
                raise ValueError(f"{endpoint.name} and {other.name} are one path; choose another")
        self._fixed = {e.name: e for e in self.all if "{" not in e.path}
        self._variable = [e for e in self.all if "{" in e.path]
        self._pattern = re.compile(
            "|".join(f"({_pattern(f'{e.method} {e.route}')}$)" for e in self._variable) or "(?!)"
        )
        dialects: dict[str, set[Dialect]] = {}
        for endpoint in self.all:
            dialects.setdefault(_tree(endpoint.path), set()).add(endpoint.dialect)
        # First segment of a path -> the only dialect of its endpoints: clients of a protocol also ask for what is not
        # served.
        self._dialects = {tree: only for tree, (only, *others) in dialects.items() if not others}

    def find(self, method: str, path: str) -> Endpoint:
        """The endpoint of a request; else one that stands for none, with task `other`.

        It runs before routing, on every request: one look-up in a dictionary, or one match.
        """
        name = f"{'GET' if method == 'HEAD' else method} {path}"
        if endpoint := self._fixed.get(name.removesuffix("\n")):  # as in the router, whose patterns end with `$`
            return endpoint
        if match := self._pattern.match(name):
            return self._variable[(match.lastindex or 0) - 1]
        none = _NONE_READ if method in READING else _NONE_WRITE
        dialect = self._dialects.get(_tree(path), OURS)
        return none if dialect is OURS else replace(none, dialect=dialect)


def _tree(path: str) -> str:
    """The first segment."""
    return path[1:].partition("/")[0]


def _pattern(name: str) -> str:
    """A regular expression without groups that matches all that the router matches, or more."""
    return "".join(
        re.escape(part) if part[:1] != "{" else REST if part.endswith((":path}", ":rest}")) else "[^/]+"
        for part in _SEGMENT.split(name)
    )
