"""Filters against a plain Python evaluator, which is written from docs/using.md, section Collections.

Hypothesis makes metadata and filters. Each filter is either refused with its place, or the evaluator, LanceDB, LanceDB
with a quantized copy and PostgreSQL agree on the rows that match.
"""

import json
import unicodedata
from collections import Counter
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
        if op == "in":
            good = isinstance(value, list) and value and all(map(may_be_compared, value))
        else:
            good = op in COMPARE and kind(value) in ("number", "string") and may_be_compared(value)
        if not good:
            return False
    return bool(wanted)


def may_be_asked(fields: Any) -> bool:
    return (
        isinstance(fields, dict)
        and 1 <= len(fields) <= 32
        and all(is_name(name) and is_allowed(wanted) for name, wanted in fields.items())
    )


def equal(a: Any, b: Any) -> bool:
    return kind(a) == kind(b) != "other" and a == b


def matches(fields: dict[str, Any], meta: dict[str, Any]) -> bool:
    """Whether an item with ``meta`` meets all conditions of an allowed filter."""
    for name, wanted in fields.items():
        value = meta.get(name)
        conditions = wanted if isinstance(wanted, dict) else {"in": [wanted]}
        for op, bound in conditions.items():
            if op == "in":
                holds = any(equal(value, each) for each in bound)
            else:
                holds = kind(value) == kind(bound) and COMPARE[op](value, bound)
            if not holds:
                return False
    return True


def same(a: Any, b: Any) -> bool:
    """JSON values that are equal, without Python's ``True == 1``."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


NUMBERS = [0, 1, -1, 3, 3.0, -0.0, 0.1, 1e-7, 5e-324, 2**53 - 1, 1 - 2**53]
ROUNDED = [2**53, 2**53 + 1, 1e18, 10**18 + 1, 2**63, 2**64 - 1, -(2**63), 2**70, 1e300, 1.2345678901234567e17]
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
    present = [(field, value) for meta in metas for field, value in meta.items() if kind(value) != "other"]

    def wanted(value: Any) -> Any:
        kinds = ["equal", "in", "unknown", *COMPARE] if kind(value) in ("number", "string") else ["equal", "in"]
        op = rng.choice(kinds)
        if op == "equal":
            return draw(mostly(st.just(value), odd))
        if op == "in":
            return {"in": draw(mostly(st.lists(mostly(scalar, odd), max_size=4).map(lambda rest: [*rest, value]), odd))}
        if op == "unknown":
            return draw(st.dictionaries(st.sampled_from(["eq", "$in", "ne", "IN", "gt ", "in"]), scalar, max_size=2))
        beside = mostly(number | text, odd | st.booleans() | any_number)
        exact = rng.random() < (0.6 if op in ("gte", "lte") else 0.2)
        bounds = {op: value if exact else draw(beside)}
        return bounds | draw(mostly(st.just({}), st.dictionaries(st.sampled_from(list(COMPARE)), beside, max_size=1)))

    filters = []
    for _ in range(FILTERS):
        fields = {}
        for field, value in rng.choices(present or [("a", 0)], k=rng.choice([1, 1, 2])):
            fields[draw(mostly(st.just(field), st.sampled_from(ODD_NAMES) | name | text))] = wanted(value)
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
            counts.update(op for wanted in each.values() if isinstance(wanted, dict) and expected for op in wanted)
        if counts["evaluated"] % 500 < FILTERS:
            for table in tables.values():
                table.compact()

    check()
    print(dict(counts))
    assert min(counts[each] for each in ("refused", "evaluated", "matched")) >= least, counts
    assert min(counts[op] for op in ("in", *COMPARE)), counts


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
VALUE = f"expected a string, number or boolean, or an object of in, gt, gte, lt, lte; {OMIT}"
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
        ('{"owner": {}}', "filter.owner", f"is an empty object; expected at least one of in, gt, gte, lt, lte; {OMIT}"),
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
        ('{"owner": {"eq": "ann"}}', "filter.owner.eq", "is no operator; known: gt, gte, in, lt, lte."),
        ('{"owner": {"$in": ["ann"]}}', "filter.owner.$in", "is no operator; did you mean 'in'?"),
        ('{"owner": {"in": ["ann"], "ne": 1}}', "filter.owner.ne", "is no operator"),
        ('{"n": 9007199254740992}', "filter.n", "is a number that is not exact; expected one from -9007199254740991"),
        ('{"n": {"lt": 1e300}}', "filter.n.lt", "is a number that is not exact"),
        ('{"n": {"in": [1180591620717411303424]}}', "filter.n.in.0", "is a number that is not exact"),
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
        (f'{{"query": {{"text": "red", {owned}}}}}', "query.filter"),
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
        ('{"a": 1e400}', "not JSON"), ('{"a": "x\\u0000"}', "NUL"), ('{"a\\u0000": 1}', "NUL"),
        ('{"a": [{"b": "\\u0000"}]}', "NUL"), (f'{{"a": {deep}}}', "nested"), ("null", "meta"), ("[]", "meta"),
    ]:  # fmt: skip
        answer = put(meta)
        assert answer.status_code == 422, meta
        assert words in answer.json()["detail"], answer.json()
    assert client.get("/v1/collections/owned").json()["items"] == 2
    for meta in ('{"a": "\\\\u0000", "n": -0.0, "i": 18446744073709551615, "f": 1e300}', f'{{"a": {2**70}}}'):
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
