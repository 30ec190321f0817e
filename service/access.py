"""Who may ask for what, and through which door; the middleware asks before it reads anything of a request.

Without `CALMCLIP_KEYS` everybody may ask for all. With it, a route that nothing is said of here needs a key that may
write, so a new one is closed until somebody opens it. Paths are those the router sees.
"""

import re
from collections.abc import Iterable

from starlette.types import Scope as Connection

from calmclip.models.errors import CalmclipError, UnknownName
from calmclip.service.keys import Keys, Scope
from calmclip.service.settings import Settings

HEALTH = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
METRICS = "/metrics"
LOOKING = ("GET", "HEAD")
# POSTs that change nothing
_ASKING = re.compile(r"/v1/(classify|detect|embed|embeddings|collections/[^/]+/search)|/v2/models/[^/]+/infer")
_BEARER = re.compile(rb"bearer +(\S+)", re.IGNORECASE)


class Unauthorized(CalmclipError):
    """No key, or none that is known. ``challenge``: RFC 6750's."""

    challenge = 'Bearer realm="calmclip"'


class Forbidden(CalmclipError):
    """A key that may not do this."""

    def __init__(self, message: str, scope: Scope) -> None:
        super().__init__(message)
        self.challenge = f'Bearer realm="calmclip", error="insufficient_scope", scope="{scope}"'


def needs(method: str, path: str) -> Scope:
    """What a key must be allowed to, to ask this."""
    if path == METRICS:
        return "metrics"
    looks = method in LOOKING or (method == "POST" and _ASKING.fullmatch(path))
    return "read" if looks else "write"


class Access:
    """Of one app. ``page``: paths of files that say nothing of this service, the page's own, which asks for a key.

    Raises `BadRequest` where the keys cannot be read.
    """

    def __init__(self, settings: Settings, page: Iterable[str]) -> None:
        self.keys = Keys(settings.keys) if settings.keys else None
        self.metrics_port = settings.metrics_port
        self._open = {*HEALTH, *page}

    def is_open(self, method: str, path: str) -> bool:
        """Whether it needs no key."""
        return self.keys is None or (method in LOOKING and path in self._open)

    def check(self, connection: Connection) -> str:
        """-> the name of the key, "" where none was needed. Raises `Unauthorized`, `Forbidden`, `UnknownName`."""
        method, path = connection["method"], connection["path"]
        name = ""
        if self.keys and not self.is_open(method, path):
            name = self._name(self.keys, connection, needs(method, path))
        self._door(connection, path)
        return name

    def _name(self, keys: Keys, connection: Connection, scope: Scope) -> str:
        given = _given(connection)
        if not given:
            raise Unauthorized("a key is needed; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        found = keys.find(given[0]) if len(given) == 1 else None
        if found is None:
            raise Unauthorized("the key is not one of this service's; ask whoever runs it for one")
        if scope not in found.scopes:
            may = ", ".join(found.scopes)
            raise Forbidden(f"the key {found.name!r} is for {may}; this needs one for {scope}", scope)
        return found.name

    def _door(self, connection: Connection, path: str) -> None:
        """Metrics at their own port, if they have one, with health and nothing else; and nowhere else."""
        if self.metrics_port is None:
            return
        port = (connection.get("server") or ("", None))[1]
        if (port == self.metrics_port) != (path == METRICS) and path not in HEALTH:
            raise UnknownName(f"there is no {path} at this port")


def _given(connection: Connection) -> list[bytes]:
    """The keys a request brings, each once; more than one is none that we would choose."""
    found = []
    for name, value in connection["headers"]:
        if name == b"x-api-key":
            found.append(value.strip())
        elif name == b"authorization" and (bearer := _BEARER.fullmatch(value.strip())):
            found.append(bearer[1])
    return list(dict.fromkeys(found))
