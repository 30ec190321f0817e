"""A search's filter: JSON -> conditions on the metadata.

It fails closed. A variable that a caller's code never set arrives as null or as an empty object; if that stood for "any
value", it would show one tenant the items of another. So it is an error, which names field, operator and expectation.
docs/using.md says what a filter means; tests/service/test_filters.py evaluates it in plain Python.
"""

import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from calmclip.models.errors import suggestion
from calmclip.service.errors import InvalidRequest, kind
from calmclip.service.stores import Condition

MAX_FIELDS = 32  # the engine's parser is recursive, and thousands of fields overflow its stack
MAX_VALUES = 1000  # equal values of all fields together
MAX_NAME = 64
MAX_TEXT = 2048  # characters of one string: LanceDB parses a bound once per row
MAX_NUMBER = 2**53 - 1  # LanceDB compares as float64, PostgreSQL as decimal; they agree on these and on no greater ones
WITHIN = " .:-"  # a name, but not at its start; `_` and Unicode's letters, marks and numbers may be anywhere
SHOWN = 100  # characters of a name that the caller chose, in an error

SCALARS = (str, int, float, bool)
BOUNDS = (str, int, float)
LEFT_OUT = "leave the field out to match any value"


class Operator(NamedTuple):
    """``read``: its place and its JSON value -> the value of the `Condition`."""

    read: Callable[[str, Any], Any]
    schema: dict[str, Any]


def parse(fields: object) -> list[Condition]:
    """The conditions of a search's ``filter``, JSON; all must hold. Raises `InvalidRequest`."""
    if not isinstance(fields, dict) or not fields:
        hint = "leave `filter` out to search all items"
        raise _error("filter", f"{kind(fields)}; expected an object of at least one field of the metadata; {hint}")
    if len(fields) > MAX_FIELDS:
        raise _error("filter", f"an object of {len(fields)} fields; at most {MAX_FIELDS} are read")
    conditions = [condition for name, wanted in fields.items() for condition in _conditions(name, wanted)]
    values = sum(len(condition.value) for condition in conditions if condition.op == "in")
    if values > MAX_VALUES:
        raise _error("filter", f"an object of {values} values in all its fields; at most {MAX_VALUES} are read")
    return conditions


def _conditions(name: str, wanted: object) -> list[Condition]:
    where = f"filter.{name[:SHOWN]}"
    _check_name(where, name)
    if not isinstance(wanted, dict):
        return [Condition(name, "in", (_value(where, wanted, SCALARS, EXPECTED),))]
    if not wanted:
        raise _error(where, f"an empty object; expected at least one of {', '.join(OPERATORS)}; {LEFT_OUT}")
    for op in wanted:
        if op not in OPERATORS:
            hint = f'{suggestion(op[:SHOWN], OPERATORS)} Equality is {{"field": value}}'
            raise _error(f"{where}.{op[:SHOWN]}", f"no operator; {hint}")
    return [Condition(name, op, OPERATORS[op].read(f"{where}.{op}", value)) for op, value in wanted.items()]


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
    **dict.fromkeys(("gt", "gte", "lt", "lte"), Operator(_bound, {"anyOf": [_TEXT, _NUMBER]})),
}
EXPECTED = f"a string, number or boolean, or an object of {', '.join(OPERATORS)}"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": MAX_FIELDS,
    "propertyNames": {"minLength": 1, "maxLength": MAX_NAME},
    "additionalProperties": {
        "anyOf": [
            *_SCALARS,
            {
                "type": "object",
                "properties": {op: operator.schema for op, operator in OPERATORS.items()},
                "additionalProperties": False,
                "minProperties": 1,
            },
        ]
    },
}
