"""JSON that a caller sends -> an object, without a silent choice between two readings."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

from calmclip.service.errors import InvalidRequest, kind


def parse(data: bytes, name: str = "the body") -> Mapping[str, Any]:
    """Raises `InvalidRequest`; ``name`` begins the message.

    orjson keeps the last of two equal keys, and rounds integers beyond 64 bits. A second parser finds both: behind a
    gateway that reads the first key, the last one would pass unchecked. It costs 3 to 5 ms per megabyte.
    """
    try:
        value = orjson.loads(data)
        exact = _EXACT.decode(data.decode()) == value
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply; send fewer levels") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} is {kind(value)}; expected an object")
    if not exact:
        raise InvalidRequest(f"{name} has an integer of more than 64 bits, which would be rounded; send it as a string")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequest(f"the body has the key {twice[:100]!r} twice in one object; expected each key once")
    return fields


_EXACT = json.JSONDecoder(object_pairs_hook=_object)
