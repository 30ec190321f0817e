"""JSON that a caller sends -> an object, without a silent choice between two readings."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

from calmclip.models.errors import kind
from calmclip.service.errors import InvalidRequest

DEEP = "is nested too deeply; send fewer levels"
LONG = "has an integer of more than 64 bits, which would become a float; send it as a string"


def parse(data: bytes, name: str = "the body") -> Mapping[str, Any]:
    """Raises `InvalidRequest`; ``name`` begins the message.

    orjson keeps the last of two equal keys, and makes floats of integers beyond 64 bits. A second parser finds both:
    behind a gateway that reads the first key, the last one would pass unchecked. It costs 3 to 5 ms per megabyte.
    """
    try:
        value = orjson.loads(data)
        whole = _EXACT.decode(data.decode())
    except orjson.JSONDecodeError as error:
        if data.startswith(COMPRESSED):
            raise InvalidRequest(
                f"{name} is not JSON but looks compressed; name its compression in the header Content-Encoding, as "
                "gzip or deflate"
            ) from None
        raise InvalidRequest(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{name} {DEEP}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} is {kind(value)}; expected an object")
    try:
        orjson.dumps(whole)  # refuses these integers, also one such as 2^70 that a float holds exactly
    except orjson.JSONEncodeError as error:
        raise InvalidRequest(f"{name} {LONG if '64-bit' in str(error) else DEEP}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequest(f"the body has the key {twice[:100]!r} twice in one object; expected each key once")
    return fields


COMPRESSED = (b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda")  # how gzip and zlib begin
_EXACT = json.JSONDecoder(object_pairs_hook=_object)
