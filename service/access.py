"""Who may ask for what, and through which door; the middleware asks before it reads anything of a request.

Without `CALMCLIP_KEYS` everybody may ask for all. With it, what an endpoint needs is its `scope`, a key that may write
where it says nothing.
"""

import re
from typing import Literal

from starlette.types import Scope as Connection

from calmclip.models.errors import CalmclipError, UnknownName
from calmclip.service.keys import Keys, Scope
from calmclip.service.settings import Settings

# What an endpoint asks for: a key for this; none, since it says nothing of this service; or none and at every port.
Door = Scope | Literal["open", "health"]
OPEN = ("open", "health")
_BEARER = re.compile(rb"bearer +(\S+)", re.IGNORECASE)


class Unauthorized(CalmclipError):
    """No key, or none that is known. ``challenge``: RFC 6750's."""

    challenge = 'Bearer realm="calmclip"'


class Forbidden(CalmclipError):
    """A key that may not do this."""

    def __init__(self, message: str, scope: Door) -> None:
        super().__init__(message)
        self.challenge = f'Bearer realm="calmclip", error="insufficient_scope", scope="{scope}"'


class Access:
    """Of one app. Raises `BadRequest` where the keys cannot be read."""

    def __init__(self, settings: Settings) -> None:
        self.keys = Keys(settings.keys) if settings.keys else None
        self.metrics_port = settings.metrics_port

    def check(self, connection: Connection, door: Door) -> str:
        """-> the name of the key, "" where none was needed. Raises `Unauthorized`, `Forbidden`, `UnknownName`."""
        name = ""
        if self.keys and door not in OPEN:
            name = self._name(self.keys, connection, door)
        if self.metrics_port is not None:
            self._pass(connection, door, self.metrics_port)
        return name

    def _name(self, keys: Keys, connection: Connection, scope: Door) -> str:
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

    def _pass(self, connection: Connection, door: Door, metrics_port: int) -> None:
        """Metrics at their own port, with health and nothing else; and nowhere else."""
        port = (connection.get("server") or ("", None))[1]
        if (port == metrics_port) != (door == "metrics") and door != "health":
            raise UnknownName(f"there is no {connection['path']} at this port")


def _given(connection: Connection) -> list[bytes]:
    """The keys a request brings, each once; more than one is none that we would choose."""
    found = []
    for name, value in connection["headers"]:
        if name == b"x-api-key":
            found.append(value.strip())
        elif name == b"authorization" and (bearer := _BEARER.fullmatch(value.strip())):
            found.append(bearer[1])
    return list(dict.fromkeys(found))
