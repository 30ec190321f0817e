"""A classifier: what it leaves open is the bundle's, what a request says wins, and each is refused by name."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.classifier import Classifier, fill
from calmclip.models.errors import BadRequest, ClassifierMismatch, TaskNotServed

BUNDLE = Classifier(("x", "y"), ("a photo of a {}.",), {"y": ("why",)}, head="cosine", params={"scale": 3.0})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"labels": "red"}, "labels is the text 'red'; expected a list of texts"),
        ({"labels": ("red", "\n")}, "label 1 is empty; expected some words"),
        ({"templates": ("a photo",)}, r"the template 'a photo' has no '\{\}' where the label belongs"),
        ({"templates": "{}"}, "templates is the text"),
        ({"labels": ("a",), "descriptions": {"b": ("c",)}}, "descriptions of 'b', which is none of the 1 labels"),
        ({"labels": ("a",), "descriptions": {"a": "c"}}, "descriptions of 'a' are 'c'; expected a list of sentences"),
        ({"labels": ("a",), "descriptions": {"a": (" ",)}}, "expected a list of sentences"),
        ({"temperature": 0.0}, "temperature is 0.0; expected 0.01 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"none_below": 0.0}, "none_below is 0.0; expected over 0, at most 1"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], says: str):
    with pytest.raises(BadRequest, match=says):
        Classifier(**given)


def test_sentences_are_of_the_templates_unless_there_are_descriptions():
    assert BUNDLE.sentences("x") == ("a photo of a x.",)
    assert BUNDLE.sentences("y") == ("why",)
    assert Classifier(("x",)).sentences("x") == ("x",)
    assert fill("a {} and {0.__class__} {}", "{}") == "a {} and {0.__class__} {}"  # nothing of either is run


def test_what_is_left_open_is_the_bundles():
    assert BUNDLE.over(BUNDLE) is BUNDLE
    everything = Classifier().over(BUNDLE)
    assert (everything.labels, everything.templates, everything.head) == (BUNDLE.labels, BUNDLE.templates, "cosine")
    assert everything.sentences("y") == ("why",)
    own = Classifier(("z",), temperature=2.0, none_below=0.5).over(BUNDLE)
    assert (own.labels, own.sentences("z"), own.params) == (("z",), ("a photo of a z.",), {"scale": 3.0})
    assert (own.temperature, own.none_below) == (2.0, 0.5)
    assert Classifier(head="sigmoid").over(BUNDLE).params == {}  # params belong to their head


def test_labels_and_templates_of_a_request_win():
    assert BUNDLE.asked() is BUNDLE
    assert BUNDLE.asked(["y", "w"]).sentences("y") == ("why",)
    assert BUNDLE.asked(["y"], ["{}!"]).sentences("y") == ("y!",)
    assert BUNDLE.asked(templates=["{}!"]).labels == ("x", "y")


def test_the_key_of_the_vectors_knows_all_that_they_are_made_of():
    others = BUNDLE.asked(["y", "x"]), BUNDLE.asked(["x"]), BUNDLE.asked(templates=["{}"]), Classifier(("x", "y"))
    keys = [one.text_key for one in (BUNDLE, *others)]
    assert len({*keys}) == 5
    assert Classifier(BUNDLE.labels, BUNDLE.templates, BUNDLE.descriptions, temperature=3.0).text_key == keys[0]


def test_a_head_with_columns_keeps_them_when_others_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    """The columns are those of the labels it was made for, also behind `over` and `asked`."""
    from calmclip.models.bundle.manifest import FrozenModel
    from calmclip.models.heads import HEADS, Asset, Head

    class Nothing(FrozenModel):
        pass

    plain: Head[Nothing] = Head(
        Nothing, lambda image, columns, params: image @ columns.assets["w"].T, lambda x: x, {"w": Asset(("C", "D"))}
    )
    HEADS.load()
    monkeypatch.setitem(HEADS._things, "plain", plain)
    weight = np.eye(3, dtype=np.float32)
    fitted = Classifier(("a", "b", "c"), head="plain", assets={"w": weight}, family="f" * 64)
    for one in (fitted.asked(["c", "a"]), fitted.over(BUNDLE).asked(["c", "a"]), Classifier(("c", "a")).over(fitted)):
        columns = one.bound.columns(one.labels, np.zeros((2, 3), np.float32))
        assert one.bound.logits(np.array([[1.0, 2.0, 4.0]], np.float32), columns).tolist() == [[4.0, 1.0]]
    with pytest.raises(BadRequest, match="not made for the label 'd'"):
        fitted.asked(["a", "d"]).bound.check(("a", "d"))
    fitted.require_family("f" * 64, "mini-float")
    with pytest.raises(
        ClassifierMismatch, match=r"vectors of the family ffffffffffff…; bundle 'other' is of the family 0000"
    ):
        fitted.require_family("0" * 64, "other")


def test_a_calibrated_temperature_belongs_to_its_family():
    found = Classifier(("a",), temperature=3.0, family="f")
    assert (found.temperature_for("f"), found.temperature_for("g")) == (3.0, 1.0)
    assert Classifier(("a",), temperature=3.0).temperature_for("g") == 3.0
    found.require_family("g", "other")  # nothing of it was fitted to vectors


def test_without_a_head_nothing_is_scored():
    with pytest.raises(TaskNotServed, match="no head"):
        Classifier(("a",)).bound  # noqa: B018 - binds the head
