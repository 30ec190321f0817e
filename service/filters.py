"""A search's filter: JSON -> conditions on the metadata.

It fails closed. A variable that a caller's code never set arrives as null or as an empty object; if that stood for "any
value", it would show one tenant the items of another. So it is an error, which names field, operator and expectation.
docs/using.md says what a filter means; tests/service/test_filters.py evaluates it in plain Python.
"""

import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from calmclip.models.errors import kind, suggestion
from calmclip.service.errors import InvalidRequest
from calmclip.service.stores import Condition, Group, Part

MAX_FIELDS = 32  # in all groups; the engine's parser is recursive, and thousands of fields overflow its stack
MAX_LEVELS = 4  # of groups inside groups
MAX_VALUES = 1000  # values of `in` and `not_in`, and those of equality, in all fields together
MAX_NAME = 64
MAX_TEXT = 2048  # characters of one string: LanceDB parses a bound once per row
MAX_NUMBER = 2**53 - 1  # LanceDB compares as float64, PostgreSQL as decimal; they agree on these and on no greater ones
WITHIN = " .:-"  # a name, but not at its start; `_` and Unicode's letters, marks and numbers may be anywhere
SHOWN = 100  # characters of a name that the caller chose, in an error

SCALARS = (str, int, float, bool)
BOUNDS = (str, int, float)
LEFT_OUT = "leave the field out to match any value"


class Operator(NamedTuple):
    """``read``: its place and its JSON value -> the value of the `Condition`. ``op``: of the condition, if its name is
    another one."""

    read: Callable[[str, Any], Any]
    schema: dict[str, Any]
    op: Literal["not_in"] | None = None


def parse(fields: object) -> list[Part]:
    """The parts of a search's ``filter``, JSON; all must hold. Raises `InvalidRequest`."""
    if not isinstance(fields, dict) or not fields:
        raise _error("filter", f"{kind(fields)}; {FILTER}; leave `filter` out to search all items")
    if (count := _count(fields, MAX_LEVELS)) > MAX_FIELDS:
        raise _error("filter", f"an object of {count} fields; at most {MAX_FIELDS} are read")
    parts = _filter("filter", fields, MAX_LEVELS)
    if (values := sum(map(_values, parts))) > MAX_VALUES:
        raise _error("filter", f"an object of {values} values in all its fields; at most {MAX_VALUES} are read")
    return parts


def _count(fields: dict[str, Any], levels: int) -> int:
    """The fields of a filter and of those in its groups."""
    inner = [each for name, wanted in fields.items() if levels and _is_group(name, wanted) for each in wanted]
    plain = sum(not (levels and _is_group(name, wanted)) for name, wanted in fields.items())
    return plain + sum(_count(each, levels - 1) for each in inner if isinstance(each, dict))


def _values(part: Part) -> int:
    if isinstance(part, Group):
        return sum(_values(inner) for each in part.filters for inner in each)
    return len(part.value) if isinstance(part.value, tuple) else 0


def _is_group(name: str, wanted: object) -> bool:
    """A list is no value of a field, so a field called `or` can still be asked for."""
    return name in GROUPS and isinstance(wanted, list)


def _filter(where: str, fields: dict[str, Any], levels: int) -> list[Part]:
    parts: list[Part] = []
    for name, wanted in fields.items():
        place = f"{where}.{name[:SHOWN]}"
        if _is_group(name, wanted):
            parts.append(Group(name, tuple(_members(place, wanted, levels))))  # type: ignore[arg-type]
        else:
            parts += _conditions(place, name, wanted)
    return parts


def _members(where: str, filters: list[Any], levels: int) -> Iterator[tuple[Part, ...]]:
    if not levels:
        raise _error(where, f"a group inside {MAX_LEVELS} others; groups are read {MAX_LEVELS} levels deep")
    if not filters:
        raise _error(where, "an empty list; expected a list of at least one filter")
    for index, fields in enumerate(filters):
        place = f"{where}.{index}"
        if not isinstance(fields, dict) or not fields:
            raise _error(place, f"{kind(fields)}; {FILTER}, because an empty filter would match every item")
        yield tuple(_filter(place, fields, levels - 1))


def _conditions(where: str, name: str, wanted: object) -> list[Part]:
    _check_name(where, name)
    if not isinstance(wanted, dict):
        expected = f"{EXPECTED}, or a list of filters" if name in GROUPS else EXPECTED
        return [Condition(name, "in", (_value(where, wanted, SCALARS, expected),))]
    if not wanted:
        raise _error(where, f"an empty object; expected at least one of {', '.join(OPERATORS)}; {LEFT_OUT}")
    for op in wanted:
        if op not in OPERATORS:
            hint = f'{suggestion(op[:SHOWN], OPERATORS)} Equality is {{"field": value}}'
            raise _error(f"{where}.{op[:SHOWN]}", f"no operator; {hint}")
    return [
        Condition(name, OPERATORS[op].op or op, OPERATORS[op].read(f"{where}.{op}", value))
        for op, value in wanted.items()
    ]


def _check_name(where: str, name: str) -> None:
    if not 1 <= len(name) <= MAX_NAME:
        raise _error(where, f"a name of {len(name)} characters; expected 1 to {MAX_NAME}")
    for index, character in enumerate(name):
        allowed = character == "_" or unicodedata.category(character)[0] in "LMN"
        if not (allowed or (index and character in WITHIN)):
            expected = "letters, digits and `_`, and after the first also space . : -"
            raise _error(where, f"a name with {character!r}; expected {expected}")


def _list(where: str, values: Any) -> tuple[Any, ...]:
    expected = "a list of at least one string, number or boolean"
    if not isinstance(values, list) or not values:
        raise _error(where, f"{kind(values)}; expected {expected}; {LEFT_OUT}")
    return tuple(
        _value(f"{where}.{i}", value, SCALARS, "a string, number or boolean") for i, value in enumerate(values)
    )


def _bound(where: str, value: Any) -> Any:
    return _value(where, value, BOUNDS, "a number or a string")


def _scalar(where: str, value: Any) -> Any:
    return _value(where, value, SCALARS, "a string, number or boolean")


def _one(where: str, value: Any) -> tuple[Any]:
    return (_scalar(where, value),)


def _text(where: str, value: Any) -> str:
    if value == "":
        raise _error(where, f"an empty string, which every string contains; expected a part of a string; {LEFT_OUT}")
    text: str = _value(where, value, (str,), "a string")
    return text


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error(where, f"{kind(value)}; expected true or false; {LEFT_OUT}")
    return value


def _value(where: str, value: Any, types: tuple[type, ...], expected: str) -> Any:
    """``value`` if it is a scalar of one of ``types`` that both stores compare alike."""
    if type(value) not in types:
        raise _error(where, f"{kind(value)}; expected {expected}; {LEFT_OUT}")
    if not isinstance(value, str):
        if not -MAX_NUMBER <= value <= MAX_NUMBER:  # also for NaN
            limits = f"{-MAX_NUMBER} to {MAX_NUMBER}"
            raise _error(where, f"a number that is not exact; expected one from {limits}; store others as strings")
    elif len(value) > MAX_TEXT:
        raise _error(where, f"a string of {len(value)} characters; at most {MAX_TEXT} are read")
    elif "\0" in value:
        raise _error(where, "a string with a NUL character, which no metadata has")
    return value


def _error(where: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{where} is {message}", [{"where": where, "message": f"it is {message}"}])


_TEXT = {"type": "string", "maxLength": MAX_TEXT}
_NUMBER = {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
_SCALARS = [_TEXT, _NUMBER, {"type": "boolean"}]
_ANY_OF = {"type": "array", "items": {"anyOf": _SCALARS}, "minItems": 1, "maxItems": MAX_VALUES}

OPERATORS: dict[Any, Operator] = {
    "in": Operator(_list, _ANY_OF),
    "not_in": Operator(_list, _ANY_OF),
    "ne": Operator(_one, {"anyOf": _SCALARS}, op="not_in"),
    **dict.fromkeys(("gt", "gte", "lt", "lte"), Operator(_bound, {"anyOf": [_TEXT, _NUMBER]})),
    "contains": Operator(_text, {**_TEXT, "minLength": 1}),
    "has": Operator(_scalar, {"anyOf": _SCALARS}),
    "exists": Operator(_flag, {"type": "boolean"}),
}
MEANINGS = {
    "in": "equal to one of these",
    "not_in": "of the type of one of these, and equal to none",
    "ne": "of the same type, and not equal",
    "gt": "greater; strings by code points",
    "gte": "greater or equal",
    "lt": "less",
    "lte": "less or equal",
    "contains": "a string with this part",
    "has": "a list with this element",
    "exists": "true: the item has the field, and it is not null; false: it has not, or null",
}
GROUPS = {"or": "at least one of these filters holds", "and": "all of these filters hold"}
FILTER = "expected an object of at least one field of the metadata"
EXPECTED = f"a string, number or boolean, or an object of {', '.join(OPERATORS)}"
_CONDITION = [
    *_SCALARS,
    {
        "type": "object",
        "properties": {op: {**operator.schema, "description": MEANINGS[op]} for op, operator in OPERATORS.items()},
        "additionalProperties": False,
        "minProperties": 1,
    },
]


def schema(reference: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a filter. ``reference``: to it, because a group holds filters."""
    filters = {"type": "array", "items": reference, "minItems": 1, "maxItems": MAX_FIELDS}
    return {
        "type": "object",
        "title": "Filter",
        "description": "field of the metadata -> a value, or an object of operators; all must hold",
        "minProperties": 1,
        "maxProperties": MAX_FIELDS + len(GROUPS),
        "properties": {
            name: {
                "anyOf": [filters, *_CONDITION],
                "description": f"a list: {meaning}, {MAX_LEVELS} levels deep at most; else a field of this name",
            }
            for name, meaning in GROUPS.items()
        },
        "propertyNames": {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
        "additionalProperties": {"anyOf": _CONDITION},
    }
