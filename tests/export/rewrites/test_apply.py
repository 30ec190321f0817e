"""Several rules: their order, the fixed point, and counts against promises."""

import re
import tomllib

import pytest
from onnx import parser

from calmclip.export import rewrites
from calmclip.models.errors import ExportError, UnknownName

ALL = ["softmax", "clipped_softmax"]
NOTHING = '<ir_version: 10, opset_import: ["": 20]> g (float[r, 7] x) => (float[r, 7] y) { y = Relu (x) }'


def graph():
    """A plain Softmax, a clipped one, and one in half precision."""
    return parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[r, n] x) => (float16[r, n] y)
        <float a = {1.1}, float b = {-0.1}, float low = {0.0}, float high = {1.0}>
        {
            plain = Softmax (x)
            s = Softmax (plain) m = Mul (s, a) t = Add (m, b) clipped = Clip (t, low, high)
            half = Cast <to = 10> (clipped)
            y = Softmax (half)
        }
    """)


@pytest.mark.parametrize("order", [ALL, ALL[::-1]])
def test_the_longer_pattern_goes_first_whatever_the_order_of_the_names(order):
    done = rewrites.apply(graph(), order)
    assert done.counts == {"softmax": 1, "clipped_softmax": 1}
    assert done.ops() == {"Softmax": 2}
    assert done.missed == {"softmax": {"the Softmax that makes y": "its input is FLOAT16; the op takes FLOAT"}}


def test_each_function_and_each_import_occurs_once():
    together = rewrites.apply(graph(), ALL)
    in_turn = rewrites.apply(rewrites.apply(graph(), ["clipped_softmax"]).model, ["softmax"])
    for done in (together, in_turn):
        assert done.ops() == {"Softmax": 2}
        assert [f.name for f in done.model.functions] == ["Softmax"]
        assert [o.domain for o in done.model.opset_import] == ["", "ai.calmclip"]


def test_inferred_types_are_not_written_into_the_graph():
    assert not graph().graph.value_info
    assert not rewrites.apply(graph(), ALL).model.graph.value_info


def test_near_misses_of_nodes_without_names_have_distinct_keys():
    text = "g (float16[r] x) => (float16[r] y, float16[r] z) { y = Softmax (x) z = Softmax (y) }"
    done = rewrites.apply(parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}'), ["softmax"])
    assert done.missed["softmax"].keys() == {"the Softmax that makes y", "the Softmax that makes z"}


def test_no_rules_change_nothing():
    done = rewrites.apply(graph(), [])
    assert (done.model, done.counts, done.missed) == (graph(), {}, {})


def test_a_name_that_is_no_rule_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        rewrites.apply(graph(), ["sofmax"])


def test_rules_without_a_fixed_point_are_stopped(monkeypatch):
    from dataclasses import replace

    from calmclip.export.rewrites import REWRITES, Outcome

    endless = replace(REWRITES.get("softmax"), rewrite=lambda model, params: Outcome(1, {}))
    monkeypatch.setitem(REWRITES._plugins, "softmax", endless)
    with pytest.raises(ExportError, match=r"the rewrites softmax still fire after \d+ rounds"):
        rewrites.apply(graph(), ["softmax"])


def test_a_kept_promise_and_one_of_rules_that_are_off_raise_nothing():
    rewrites.require(rewrites.apply(graph(), ALL), {"Softmax": 2}, "text")
    rewrites.require(rewrites.apply(graph(), ["clipped_softmax"]), {"Softmax": 3}, "text")


def test_a_broken_promise_lists_the_near_misses_and_why():
    with pytest.raises(ExportError) as error:
        rewrites.require(rewrites.apply(graph(), ALL), {"Softmax": 3}, "text")
    assert str(error.value).startswith(
        "text: the net promises 3 x Softmax, the rewrites made 2. "
        "softmax at the Softmax that makes y: its input is FLOAT16; the op takes FLOAT."
    )


def test_the_settings_that_a_broken_promise_names_work():
    """The rules that the message lists break no promise. `attention = "never"` leaves the Softmax to the rules."""
    with pytest.raises(ExportError, match=r'attention = "never" in its \[quantize\.ROLE\.params\]') as error:
        rewrites.require(rewrites.apply(graph(), ALL), {"Softmax": 3}, "text")
    (rules,) = re.findall(r"rewrites = (\[.*?\]) in the recipe", str(error.value))
    (others,) = tomllib.loads(f"rewrites = {rules}").values()
    assert {*rewrites.swaps()} - {*others} == {"softmax", "clipped_softmax"}
    rewrites.require(rewrites.apply(graph(), others), {"Softmax": 3}, "text")


def test_a_broken_promise_without_a_near_miss_says_so():
    done = rewrites.apply(graph(), [*ALL, "soft_nms"])
    with pytest.raises(ExportError, match=r"SoftNMS, the rewrites made 0\. soft_nms at the graph: it has no output"):
        rewrites.require(done, {"SoftNMS": 1, "Softmax": 2}, "detect")
    without = rewrites.apply(parser.parse_model(NOTHING), ALL)
    with pytest.raises(ExportError, match=r"the rewrites made 0\. Nothing else in the graph looks like it"):
        rewrites.require(without, {"Softmax": 1}, "text")
