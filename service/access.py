"""`Access`: which requests need which key, and at which port. The middleware checks it before it reads a body.

Without `CALMCLIP_KEYS` every request is allowed. With it, an endpoint needs a key of its `scope`, which is `write`
unless the endpoint says otherwise.
"""

import re
from typing import Literal

from starlette.types import Scope as Connection

from calmclip.models.errors import UnknownName
from calmclip.service.errors import Forbidden, Unauthorized
from calmclip.service.keys import Keys
from calmclip.service.scopes import Scope
from calmclip.service.settings import Settings

# An endpoint needs a key of this scope; or no key, because it reveals nothing (open); or no key at any port (health).
EndpointScope = Scope | Literal["open", "health"]
OPEN = ("open", "health")
_BEARER = re.compile(rb"bearer +(\S+)", re.IGNORECASE)


class Access:
    """One per app. Raises `BadRequest` if the keys cannot be read."""

    def __init__(self, settings: Settings) -> None:
        self.keys = Keys(settings.keys) if settings.keys else None
        self.metrics_port = settings.metrics_port

    def check(self, connection: Connection, scope: EndpointScope) -> str:
        """-> the key's name, "" if no key is needed. Raises `Unauthorized`, `Forbidden`, `UnknownName`."""
        name = ""
        if self.keys and scope not in OPEN:
            name = self._key_name(self.keys, connection, scope)
        if self.metrics_port is not None:
            self._check_port(connection, scope, self.metrics_port)
        return name

    def _key_name(self, keys: Keys, connection: Connection, scope: EndpointScope) -> str:
        secrets = _secrets(connection)
        if not secrets:
            raise Unauthorized("a key is needed; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        key = keys.find(secrets[0]) if len(secrets) == 1 else None
        if key is None:
            raise Unauthorized("the key is not one of this service's; ask its operator for a key")
        if scope not in key.scopes:
            raise Forbidden(f"the key {key.name!r} is for {', '.join(key.scopes)}; this needs one for {scope}", scope)
        return key.name

    def _check_port(self, connection: Connection, scope: EndpointScope, metrics_port: int) -> None:
        """The metrics port serves metrics and health alone; the other port serves no metrics."""
        port = (connection.get("server") or ("", None))[1]
        if (port == metrics_port) != (scope == "metrics") and scope != "health":
            raise UnknownName(f"there is no {connection['path']} at this port")


def _secrets(connection: Connection) -> list[bytes]:
    """The distinct keys in a request's headers. A request with two different keys is not authorized."""
    secrets = []
    for name, value in connection["headers"]:
        if name == b"x-api-key":
            secrets.append(value.strip())
        elif name == b"authorization" and (bearer := _BEARER.fullmatch(value.strip())):
            secrets.append(bearer[1])
    return list(dict.fromkeys(secrets))
