"""Errors that HTTP alone knows. `problems.TABLE` maps them to answers, as it does those of `models.errors`."""

from collections.abc import Mapping, Sequence

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from calmclip.models.errors import CalmclipError, InputError

MAX_FINDINGS = 100  # in one answer


# Of pydantic's types of errors, where its own message names Python's types.
MESSAGES = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "expected an object"),
    "list_type": "expected a list",
    "string_type": "expected a string",
    "bytes_type": "expected a string",
    "extra_forbidden": "there is no such field",
}


class BodyTooLarge(InputError):
    """More bytes than a request may have."""


class WrongContentType(InputError):
    """A content type that the route does not read."""


class WrongCoding(WrongContentType):
    """A compression of the body that is not read. ``accepted``: the header Accept-Encoding of the answer."""

    accepted = "gzip, deflate"


class InvalidHeader(InputError):
    """One of our headers has a value that cannot be used."""


class NotSupported(InputError):
    """A part of another server's protocol that this service does not have."""


class NotFetched(InputError):
    """An address that may not be fetched, or that gave no picture."""


class InvalidRequest(InputError):
    """A body that does not fit the schema. ``errors``: each finding with its ``where`` and ``message``."""

    def __init__(self, message: str, errors: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)


class Unauthorized(CalmclipError):
    """No key, or an unknown one. ``challenge``: the WWW-Authenticate header of RFC 6750."""

    challenge = 'Bearer realm="calmclip"'


class Forbidden(CalmclipError):
    """A key without the scope that the endpoint needs."""

    def __init__(self, message: str, scope: str) -> None:
        super().__init__(message)
        self.challenge = f'Bearer realm="calmclip", error="insufficient_scope", scope="{scope}"'


def invalid(error: ValidationError | RequestValidationError) -> InvalidRequest:
    """The first `MAX_FINDINGS` of Pydantic's findings, without the values that were sent."""
    plain = {"include_url": False, "include_input": False, "include_context": False}
    details = error.errors(**plain) if isinstance(error, ValidationError) else error.errors()
    findings = [
        {
            "where": ".".join(map(str, detail["loc"]))[:100] or "body",  # may hold a key that the caller chose
            "message": MESSAGES.get(detail["type"]) or detail["msg"].removeprefix("Value error, "),
        }
        for detail in details[:MAX_FINDINGS]
    ]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    first = findings[0]
    return InvalidRequest(f"the request does not fit: {first['where']}: {first['message']}{more}", findings)
