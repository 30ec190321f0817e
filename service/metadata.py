"""The metadata of an item: what every store keeps alike, within limits."""

from typing import Any

import orjson

from calmclip.models.errors import BadRequest

MAX_DEPTH = 16  # an answer nests it deeper, and JSON writers have limits


def storable(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` if PostgreSQL can store it: then every store answers alike. No recursion: it may be nested deeply.

    Raises `ValueError` for a text with a NUL character.
    """
    rest: list[Any] = [meta]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            no_nul(value)
        elif isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list):
            rest += value
    return meta


def no_nul(text: str) -> str:
    """Raises `ValueError`."""
    if "\0" in text:
        raise ValueError(f"{text[:100]!r} contains a NUL character")
    return text


def check_size(meta: dict[str, Any], item: str, most: int) -> None:
    """Raises `BadRequest` for metadata that is nested too deeply, or has more than ``most`` bytes as JSON. ``item``
    names the item."""
    if not _is_within(meta, MAX_DEPTH):
        raise BadRequest(f"the meta of {item} is nested deeper than {MAX_DEPTH} levels")
    if (size := len(orjson.dumps(meta))) > most:
        raise BadRequest(f"the meta of {item} has {size} bytes; at most {most} are stored")


def _is_within(value: object, levels: int) -> bool:
    """Whether JSON ``value`` has at most ``levels`` levels of nesting."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_within(child, levels - 1) for child in inner)
