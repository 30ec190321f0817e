"""Filters against a plain Python evaluator, which is written from docs/using.md, section Collections.

Hypothesis makes metadata and filters. Each filter is either refused with its place, or the evaluator, LanceDB, LanceDB
with a quantized copy and PostgreSQL agree on the rows that match.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from calmclip.models.errors import InputError
from calmclip.service import quantized
from calmclip.service.schemas.collections import ItemsBody, SearchBody
from calmclip.service.stores import Info, Row, open_store
from calmclip.service.strict_json import parse
from tests.asking import raw

VECTOR = np.eye(4, dtype=np.float32)[0]
ROWS, FILTERS = 8, 6  # of one example
COMPARE = {
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
}


def kind(value: Any) -> str:
    """What compares with what: values of another kind never match."""
    if isinstance(value, bool):
        return "boolean"
    return {int: "number", float: "number", str: "string"}.get(type(value), "other")


def may_be_compared(value: Any) -> bool:
    if kind(value) == "number":
        return abs(value) <= 2**53 - 1
    return kind(value) == "boolean" or (kind(value) == "string" and len(value) <= 2048 and "\0" not in value)


def is_name(name: str) -> bool:
    def inside(c: str) -> bool:
        return c == "_" or unicodedata.category(c)[0] in ("L", "M", "N")  # letters, marks, digits

    return 1 <= len(name) <= 64 and inside(name[0]) and all(inside(c) or c in " .:-" for c in name)


def is_allowed(wanted: Any) -> bool:
    if not isinstance(wanted, dict):
        return may_be_compared(wanted)
    for op, value in wanted.items():
        if op in ("in", "not_in"):
            good = isinstance(value, list) and value and all(map(may_be_compared, value))
        elif op in ("ne", "has"):
            good = may_be_compared(value)
        elif op == "contains":
            good = kind(value) == "string" and value and may_be_compared(value)
        elif op == "exists":
            good = isinstance(value, bool)
        else:
            good = op in COMPARE and kind(value) in ("number", "string") and may_be_compared(value)
        if not good:
            return False
    return bool(wanted)


def fields_in(fields: Any, levels: int = 4) -> int | None:
    """The number of fields of an allowed filter; None if it is not allowed."""
    if not isinstance(fields, dict) or not fields:
        return None
    count = 0
    for name, wanted in fields.items():
        if name in ("or", "and") and isinstance(wanted, list):
            inner = [fields_in(each, levels - 1) for each in wanted] if levels else [None]
            if not inner or None in inner:
                return None
            count += sum(inner)
        elif is_name(name) and is_allowed(wanted):
            count += 1
        else:
            return None
    return count


def may_be_asked(fields: Any) -> bool:
    return 1 <= (fields_in(fields) or 0) <= 32


def equal(a: Any, b: Any) -> bool:
    return kind(a) == kind(b) != "other" and a == b


def holds(op: str, value: Any, bound: Any) -> bool:
    """Whether a field with ``value``, None without the field, meets one condition."""
    if op == "in":
        return any(equal(value, each) for each in bound)
    if op == "not_in":
        alike = [each for each in bound if kind(each) == kind(value)]
        return bool(alike) and all(value != each for each in alike)
    if op == "ne":
        return holds("not_in", value, [bound])
    if op == "contains":
        return kind(value) == "string" and bound in value
    if op == "has":
        return isinstance(value, list) and any(equal(each, bound) for each in value)
    if op == "exists":
        return (value is not None) is bound
    return kind(value) == kind(bound) and COMPARE[op](value, bound)


def matches(fields: dict[str, Any], meta: dict[str, Any]) -> bool:
    """Whether an item with ``meta`` meets all conditions of an allowed filter."""
    for name, wanted in fields.items():
        if name in ("or", "and") and isinstance(wanted, list):
            met = (any if name == "or" else all)(matches(each, meta) for each in wanted)
        else:
            conditions = wanted if isinstance(wanted, dict) else {"in": [wanted]}
            met = all(holds(op, meta.get(name), bound) for op, bound in conditions.items())
        if not met:
            return False
    return True


OPS = ("in", "not_in", "ne", "contains", "has", "exists", "or", "and", *COMPARE)


def asked_in(fields: dict[str, Any]) -> Iterator[str]:
    """The operators and groups of an allowed filter."""
    for name, wanted in fields.items():
        if isinstance(wanted, list):
            yield name
            for each in wanted:
                yield from asked_in(each)
        elif isinstance(wanted, dict):
            yield from wanted


def same(a: Any, b: Any) -> bool:
    """JSON values that are equal, without Python's ``True == 1``."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


NUMBERS = [0, 1, -1, 3, 3.0, -0.0, 0.1, 1e-7, 5e-324, 2**53 - 1, 1 - 2**53]
ROUNDED = [2**53, 2**53 + 1, 1e18, 10**18 + 1, 2**63, 2**64 - 1, -(2**63), 2.0**70, 1e300, 1.2345678901234567e17]
TEXTS = [
    "",
    "a",
    "A",
    "ab",
    "é",
    "e\u0301",
    "3",
    "true",
    "null",
    "it's",
    'q"q',
    "\\",
    "%",
    "_",
    "\n",
    "\x7f",
    "🎨",
    "\uffff",
]
NAMES = ["a", "b", "a.b c", "é", "e\u0301", "\u017f", "s", "\u212a", "K", "0", "_", "d:e-f", "यह"]
ODD_NAMES = ["", " a", "a'", 'a"', "a\\", "a\n", "a\0", "$", "a[0]", "*", "x" * 65, "a@"]


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(range(16)).flatmap(lambda n: other if n == 15 else usual)


text = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
number = st.sampled_from(NUMBERS) | st.integers(-4, 4) | st.floats(-100, 100)
any_number = st.sampled_from(ROUNDED) | st.floats(allow_nan=False, allow_infinity=False)
scalar = mostly(st.booleans() | number | text, any_number)
odd = st.sampled_from([None, [], {}, [None], {"a": 1}, "a\0", "x" * 2049])
name = st.sampled_from([*NAMES[:2] * 6, *NAMES])  # mostly two, so that rows differ in one field
stored = st.recursive(
    scalar | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=4,
)
metadata = st.dictionaries(mostly(name, text), mostly(scalar, stored) | stored, min_size=1, max_size=4)


@st.composite
def examples_of(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[Any]]:
    """Metadata of some rows, and filters that often ask for a field and a value that a row has, or one beside it."""
    rng = draw(st.randoms(use_true_random=True))  # spreads choices evenly; Hypothesis favours some
    metas = draw(st.lists(metadata, min_size=ROWS, max_size=ROWS))
    present = [(field, value) for meta in metas for field, value in meta.items()]
    plain = [(field, value) for field, value in present if kind(value) != "other"]

    def wanted(value: Any) -> Any:
        if kind(value) == "other":
            return other(value)
        exact = ["equal", "in", "ne", "ne", "not_in", "not_in", "exists", "has"]
        op = rng.choice(
            [*exact, "unknown", *COMPARE, *COMPARE, *["contains"] * 3] if kind(value) in ("number", "string") else exact
        )
        if op == "equal":
            return draw(mostly(st.just(value), odd))
        if op in ("in", "not_in"):
            rest = draw(st.lists(mostly(scalar, odd), max_size=4))
            return {op: draw(mostly(st.just([*rest, value] if op == "in" or rng.random() < 0.3 else rest), odd))}
        if op in ("ne", "has"):
            return {op: value if rng.random() < 0.3 else draw(mostly(scalar, odd))}
        if op == "exists":
            return {op: draw(mostly(st.booleans(), odd | scalar))}
        if op == "contains":
            start = rng.randrange(len(value) + 1) if isinstance(value, str) else 0
            part = value[start : start + rng.choice([1, 1, 2, 9])] if isinstance(value, str) else "1"
            return {op: draw(mostly(st.just(part), mostly(text, odd)))}
        if op == "unknown":
            return draw(st.dictionaries(st.sampled_from(["eq", "$in", "nin", "IN", "gt ", "in"]), scalar, max_size=2))
        beside = mostly(number | text, odd | st.booleans() | any_number)
        same_bound = rng.random() < (0.6 if op in ("gte", "lte") else 0.2)
        bounds = {op: value if same_bound else draw(beside)}
        return bounds | draw(mostly(st.just({}), st.dictionaries(st.sampled_from(list(COMPARE)), beside, max_size=1)))

    def other(value: Any) -> Any:
        """Of a list, an object or null: also what is in an inner list, which is no element."""
        elements = [each for each in value if kind(each) != "other"] if isinstance(value, list) else []
        inner = (
            [each for lists in value if isinstance(lists, list) for each in lists] if isinstance(value, list) else []
        )
        choice = rng.choice([*elements * 3, *inner, 0])
        ops = {"has": choice, "exists": rng.random() < 0.5, "ne": draw(scalar), "contains": "a"}
        op = rng.choice([*["has"] * 5, *ops])
        return {op: ops[op]}

    def fields_of(levels: int) -> Any:
        fields = {}
        for field, value in rng.choices(
            (plain if rng.random() < 0.7 else present) or [("a", 0)], k=rng.choice([1, 1, 2])
        ):
            fields[draw(mostly(st.just(field), st.sampled_from(ODD_NAMES) | name | text))] = wanted(value)
        if rng.random() < 0.35 and levels:
            group = [fields_of(levels - 1) for _ in range(rng.choice([1, 2, 2, 3]))]
            fields = fields if rng.random() < 0.3 else {}
            fields[rng.choice(["or", "or", "and"])] = draw(
                mostly(st.just(group), st.sampled_from([[], [{}], [None], {}]))
            )
        return fields

    filters = []
    for _ in range(FILTERS):
        fields = fields_of(3)
        for _ in range(5 if rng.random() < 0.02 else 0):
            fields = {"or": [fields]}  # too deep
        filters.append(draw(mostly(st.just(fields), st.sampled_from([{}, [], None, "a", 1, [{"a": 1}]]))))
    return metas, filters


@pytest.fixture(scope="module")
def tables(tmp_path_factory, postgres):
    """Name -> an empty table of each store, and of LanceDB with a quantized copy."""
    info = Info("c", "m", "d", 4, "")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        urls = [f"lancedb:{tmp_path_factory.mktemp('plain')}", f"lancedb:{tmp_path_factory.mktemp('copied')}"]
        urls.append(f"pgvector:{postgres.database()}")
        plain, copied, other = (stack.enter_context(closing(open_store(url))).create(info) for url in urls)
        patch.setattr(quantized, "MIN_ROWS", 1)
        copied.upsert([Row(str(i), VECTOR) for i in range(ROWS)])
        yield {"lancedb": plain, "copied": quantized.QuantizedTable(copied, 1 << 20), "pgvector": other}


def read(model: Any, body: dict[str, Any]) -> Any:
    """``body`` as the service reads it from the wire, or the error."""
    try:
        return model.model_validate(parse(json.dumps(body).encode()))
    except (InputError, ValidationError) as error:
        return error


def has_nul(value: Any) -> bool:
    return "\\u0000" in json.dumps(value).replace("\\\\", "")


def store(tables, metas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Store one row for each of ``metas`` that the service takes, else one without metadata. Returns what is stored."""
    kept = []
    for each in metas:
        body = read(ItemsBody, {"items": [{"id": "x", "text": "a", "meta": each}]})
        assert isinstance(body, Exception) == has_nul(each), (each, body)
        kept.append({} if isinstance(body, Exception) else body.items[0].meta)
    for table in tables.values():
        table.upsert([Row(str(i), VECTOR, each) for i, each in enumerate(kept)])
        for row in table.page(None, ROWS):
            assert same(row.meta, kept[int(row.id)]), (row.meta, kept[int(row.id)])
    return kept


@pytest.mark.parametrize(
    ("examples", "least"), [(50, 50), pytest.param(1700, 2500, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_every_filter_is_refused_or_means_the_same_everywhere(tables, examples, least):
    """``least``: so many filters must be refused, so many evaluated, and so many rows must match. An operator counts if
    its filter matches a row."""
    counts: Counter[str] = Counter()

    # not shrunk, which takes minutes: the assertion shows the filter and the rows
    @settings(max_examples=examples, phases=[Phase.generate], deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(examples_of())
    def check(example):
        metas, filters = example
        kept = store(tables, metas)
        for each in filters:
            body = read(SearchBody, {"query": {"text": "a"}, "filter": each})
            if isinstance(body, Exception):
                assert not may_be_asked(each), (each, body)
                assert body.errors[0]["where"].startswith("filter"), body.errors
                assert str(body).startswith(body.errors[0]["where"]), body
                counts["refused"] += 1
                continue
            assert may_be_asked(each), each
            expected = {str(i) for i, row in enumerate(kept) if matches(each, row)}
            for store_name, table in tables.items():
                ids = {hit.id for hit in table.search(VECTOR, 2 * ROWS, body.filter)}
                assert ids == expected, (store_name, each, [kept[int(i)] for i in ids ^ expected])
            counts["evaluated"] += 1
            counts["matched"] += len(expected)
            counts.update(asked_in(each) if expected else ())
        if counts["evaluated"] % 500 < FILTERS:
            for table in tables.values():
                table.compact()

    check()
    print(dict(counts))
    assert min(counts[each] for each in ("refused", "evaluated", "matched")) >= least, counts
    assert min(counts[op] for op in OPS), counts


OWNERS = {"ann": {"owner": "ann", "n": 1, "b": True}, "bob": {"owner": "bob", "n": 2, "b": False}}


@pytest.fixture
def search(client):
    """Searches a collection of two owners' items with a body given as text."""
    client.put("/v1/collections/owned", json={})
    items = [{"id": id_, "text": "red", "meta": meta} for id_, meta in OWNERS.items()]
    assert client.post("/v1/collections/owned/items", json={"items": items}).status_code == 200

    def send(body: str, query: str = ""):
        return client.post(f"/v1/collections/owned/search{query}", **raw(body.encode(), "application/json"))

    return send


OMIT = "leave the field out to match any value"
LIST = f"expected a list of at least one string, number or boolean; {OMIT}"
ONE = f"expected a string, number or boolean; {OMIT}"
BOUND = f"expected a number or a string; {OMIT}"
OPERATORS = "in, not_in, ne, gt, gte, lt, lte, contains, has, exists"
VALUE = f"expected a string, number or boolean, or an object of {OPERATORS}; {OMIT}"
NONE = "expected an object of at least one field of the metadata; leave `filter` out to search all items"


@pytest.mark.parametrize(
    ("wrong", "where", "message"),
    [
        ("null", "filter", f"is null; {NONE}"),
        ("{}", "filter", f"is an empty object; {NONE}"),  # {owner: undefined} in JavaScript
        ("[]", "filter", f"is an empty list; {NONE}"),
        ('"owner=ann"', "filter", f"is a string; {NONE}"),
        ('{"owner": null}', "filter.owner", f"is null; {VALUE}"),
        ('{"owner": []}', "filter.owner", f"is an empty list; {VALUE}"),
        ('{"owner": ["ann"]}', "filter.owner", f"is a list; {VALUE}"),
        ('{"owner": {}}', "filter.owner", f"is an empty object; expected at least one of {OPERATORS}; {OMIT}"),
        ('{"owner": {"in": null}}', "filter.owner.in", f"is null; {LIST}"),
        ('{"owner": {"in": []}}', "filter.owner.in", f"is an empty list; {LIST}"),
        ('{"owner": {"in": {}}}', "filter.owner.in", f"is an empty object; {LIST}"),
        ('{"owner": {"in": "ann"}}', "filter.owner.in", f"is a string; {LIST}"),
        ('{"owner": {"in": ["ann", null]}}', "filter.owner.in.1", f"is null; {ONE}"),
        ('{"owner": {"in": [["ann"]]}}', "filter.owner.in.0", f"is a list; {ONE}"),
        ('{"owner": {"gte": null}}', "filter.owner.gte", f"is null; {BOUND}"),
        ('{"owner": "ann", "n": {"lt": null}}', "filter.n.lt", f"is null; {BOUND}"),
        ('{"owner": {"in": ["ann"], "gte": {}}}', "filter.owner.gte", f"is an empty object; {BOUND}"),
        ('{"n": {"gt": true}}', "filter.n.gt", f"is a boolean; {BOUND}"),
        ('{"owner": {"eq": "ann"}}', "filter.owner.eq", "is no operator; known: contains, exists, gt"),
        ('{"owner": {"$in": ["ann"]}}', "filter.owner.$in", "is no operator; did you mean 'in'?"),
        ('{"owner": {"in": ["ann"], "nin": 1}}', "filter.owner.nin", "is no operator"),
        ('{"owner": {"ne": null}}', "filter.owner.ne", f"is null; {ONE}"),
        ('{"owner": {"ne": ["ann"]}}', "filter.owner.ne", f"is a list; {ONE}"),
        ('{"owner": {"not_in": []}}', "filter.owner.not_in", f"is an empty list; {LIST}"),
        ('{"owner": {"not_in": "ann"}}', "filter.owner.not_in", f"is a string; {LIST}"),
        ('{"owner": {"contains": ""}}', "filter.owner.contains", "is an empty string, which every string contains"),
        ('{"owner": {"contains": null}}', "filter.owner.contains", "is null; expected a string"),
        ('{"owner": {"contains": ["a"]}}', "filter.owner.contains", "is a list; expected a string"),
        ('{"owner": {"has": null}}', "filter.owner.has", f"is null; {ONE}"),
        ('{"owner": {"exists": null}}', "filter.owner.exists", f"is null; expected true or false; {OMIT}"),
        ('{"owner": {"exists": 1}}', "filter.owner.exists", "is a number; expected true or false"),
        ('{"or": null}', "filter.or", f"is null; {VALUE.replace('; leave', ', or a list of filters; leave')}"),
        ('{"or": []}', "filter.or", "is an empty list; expected a list of at least one filter"),
        ('{"or": [{"owner": "ann"}, {}]}', "filter.or.1", f"is an empty object; {NONE.partition(';')[0]}, because"),
        ('{"or": [{"owner": "ann"}, null]}', "filter.or.1", "is null; expected an object"),
        ('{"or": [{"owner": null}]}', "filter.or.0.owner", f"is null; {VALUE}"),
        ('{"or": {"owner": "ann"}}', "filter.or.owner", "is no operator"),
        ('{"or": [{"or": [{"or": [{"or": [{"or": [{"a": 1}]}]}]}]}]}', "filter.or.0.or.0.or.0.or.0.or", "is a group"),
        (json.dumps({"or": [{f"f{i}": 1} for i in range(33)]}), "filter", "is an object of 33 fields; at most 32"),
        (json.dumps({"or": [{"a": {"in": [1] * 600}}, {"a": {"not_in": [1] * 401}}]}), "filter", "is an object of 100"),
        ('{"n": 9007199254740992}', "filter.n", "is a number that is not exact; expected one from -9007199254740991"),
        ('{"n": {"lt": 1e300}}', "filter.n.lt", "is a number that is not exact"),
        ('{"n": {"in": [1.2e21]}}', "filter.n.in.0", "is a number that is not exact"),
        ('{"owner": "a\\u0000"}', "filter.owner", "is a string with a NUL character"),
        (json.dumps({"owner": "x" * 2049}), "filter.owner", "is a string of 2049 characters; at most 2048"),
        (json.dumps({"x" * 65: 1}), f"filter.{'x' * 65}", "is a name of 65 characters; expected 1 to 64"),
        ('{"": 1}', "filter.", "is a name of 0 characters"),
        ('{"owner\\n": "ann"}', "filter.owner\n", "is a name with '\\n'; expected letters, digits and `_`"),
        ('{".owner": "ann"}', "filter..owner", "is a name with '.'"),
        ("""{"a'; DROP TABLE owned; --": 1}""", "filter.a'; DROP TABLE owned; --", 'is a name with "\'"'),
        (json.dumps({f"f{i}": 1 for i in range(40_000)}), "filter", "is an object of 40000 fields; at most 32"),
        (json.dumps({"a": {"in": [1] * 600}, "b": {"in": [1] * 401}}), "filter", "is an object of 1001 values"),
    ],
)  # fmt: skip
def test_what_faulty_code_sends_is_refused_with_place_and_expectation(search, wrong, where, message):
    answer = search(f'{{"query": {{"text": "red"}}, "filter": {wrong}}}')
    problem = answer.json()
    assert answer.status_code == 422, problem
    assert problem["detail"].startswith(f"{where} {message}"), problem["detail"]
    assert problem["errors"] == [{"where": where, "message": f"it {problem['detail'][len(where) + 1 :]}"}]


def ids(answer) -> list[str]:
    return sorted(hit["id"] for hit in answer.json()["hits"])


def test_a_filter_that_does_not_arrive_is_an_error(client, search):
    query = '"query": {"text": "red"}'
    owned = '"filter": {"owner": "ann"}'
    assert ids(search(f"{{{query}, {owned}}}")) == ["ann"]
    assert ids(search(f"{{{query}}}")) == ["ann", "bob"]
    for body, words in [
        (f'{{{query}, {owned}, "filter": {{"b": false}}}}', "'filter' twice"),
        (f'{{{query}, {owned}, "f\\u0069lter": {{"b": false}}}}', "'filter' twice"),
        (f'{{{query}, "filter": {{"owner": "ann", "owner": "bob"}}}}', "'owner' twice"),
        (f'{{{query}, "filter": {{"n": {{"gte": 2, "gte": 1}}}}}}', "'gte' twice"),
        (f'{{{query}, "filters": {{"owner": "ann"}}}}', "filters"),
        (f'{{{query}, "where": {{"owner": "ann"}}}}', "where"),
        (f'{{"query": {{"text": "red", {owned}}}}}', "filter: there is no such field"),
        (f'{{{query}, "filter": {{"n": NaN}}}}', "not JSON"),
        (f'{{{query}, "filter": {{"n": {{"lt": 1e400}}}}}}', "not JSON"),
        (f'{{{query}, "filter": {{"owner": "\\ud800"}}}}', "not JSON"),
    ]:
        answer = search(body)
        assert answer.status_code == 422, body
        assert words in answer.json()["detail"], (body, answer.json())
    for name in ("filter", "filters", "owner"):
        answer = search(f"{{{query}}}", f"?{name}=ann")
        assert (answer.status_code, answer.json()["errors"]) == (422, [{"where": name, "message": "unknown"}])
    form = client.post("/v1/collections/owned/search", data={"filter": "{}"}, files={"image": b"x"})
    assert form.status_code == 415


def test_types_are_respected_and_large_filters_are_quick(search):
    for fields, wanted in [
        ({"n": 1}, ["ann"]), ({"n": 1.0}, ["ann"]), ({"n": "1"}, []), ({"n": True}, []), ({"b": True}, ["ann"]),
        ({"b": 1}, []), ({"b": "true"}, []), ({"owner": "Ann"}, []), ({"never": "x"}, []), ({"n": {"gte": "0"}}, []),
        ({"owner": "x' OR 1 = 1 --"}, []), ({"n": {"in": [-0.0, 2, *range(3, 1000)]}}, ["bob"]),
        ({"owner": {"in": [f"it's {i}" for i in range(998)] + ["bob"]}, "n": 2}, ["bob"]),
    ]:  # fmt: skip
        answer = search(json.dumps({"query": {"text": "red"}, "filter": fields}))
        assert ids(answer) == wanted, fields


def test_metadata_that_would_change_is_refused(client, search):
    def put(meta: str):
        body = f'{{"items": [{{"id": "odd", "text": "red", "meta": {meta}}}]}}'
        return client.post("/v1/collections/owned/items", **raw(body.encode(), "application/json"))

    deep = "[" * 990 + "]" * 990
    for meta, words in [
        ('{"a": 1, "a": 2}', "'a' twice"), ('{"a": {"b": 1, "b": 1}}', "'b' twice"), (f'{{"a": {2**70+1}}}', "64 bit"),
        (f'{{"a": {2**70}}}', "64 bit"), (f'{{"a": {2**64}}}', "64 bit"), (f'{{"a": [{-(2**63)-1}]}}', "64 bit"),
        (f'{{"a": [{{"b": {10**30}}}]}}', "64 bit"),
        ('{"a": 1e400}', "not JSON"), ('{"a": "x\\u0000"}', "NUL"), ('{"a\\u0000": 1}', "NUL"),
        ('{"a": [{"b": "\\u0000"}]}', "NUL"), (f'{{"a": {deep}}}', "nested"), ("null", "meta"), ("[]", "meta"),
    ]:  # fmt: skip
        answer = put(meta)
        assert answer.status_code == 422, meta
        assert words in answer.json()["detail"], answer.json()
    assert client.get("/v1/collections/owned").json()["items"] == 2
    for meta in (
        '{"a": "\\\\u0000", "n": -0.0, "i": 18446744073709551615, "f": 1e300}',
        f'{{"a": {-(2**63)}}}',
        '{"a": 1.5e30}',
    ):
        assert put(meta).status_code == 200
        listed = {item["id"]: item["meta"] for item in client.get("/v1/collections/owned/items").json()["items"]}
        assert listed["odd"] == json.loads(meta)


def test_ids_with_a_nul_character_are_refused_everywhere(client, search):
    url = "/v1/collections/owned/items"
    for answer in (
        client.post(url, json={"items": [{"id": "a\0", "text": "red"}]}),
        client.request("DELETE", url, json={"ids": ["a\0"]}),
        client.request("DELETE", url, json={"ids": []}),
        client.get(f"{url}?after=a%00"),
        client.get(f"{url}?limit=1&limit=1000"),
        client.get(f"{url}?limt=1"),
    ):
        assert answer.status_code == 422, answer.text
