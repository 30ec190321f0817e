"""A classifier: defaults come from the bundle, values of a request win, wrong values are refused by name."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.classifier import Classifier, fill
from calmclip.models.errors import BadRequest, ClassifierMismatch, TaskNotServed

BUNDLE = Classifier(("x", "y"), ("a photo of a {}.",), {"y": ("why",)}, head="cosine", params={"scale": 3.0})


@pytest.mark.parametrize(
    ("arguments", "says"),
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
def test_invalid_values_are_refused(arguments: dict[str, Any], says: str):
    with pytest.raises(BadRequest, match=says):
        Classifier(**arguments)


def test_sentences_are_of_the_templates_unless_there_are_descriptions():
    assert BUNDLE.sentences("x") == ("a photo of a x.",)
    assert BUNDLE.sentences("y") == ("why",)
    assert Classifier(("x",)).sentences("x") == ("x",)
    assert fill("a {} and {0.__class__} {}", "{}") == "a {} and {0.__class__} {}"  # neither is a format string


def test_absent_values_are_the_bundles():
    assert BUNDLE.with_defaults(BUNDLE) is BUNDLE
    everything = Classifier().with_defaults(BUNDLE)
    assert (everything.labels, everything.templates, everything.head) == (BUNDLE.labels, BUNDLE.templates, "cosine")
    assert everything.sentences("y") == ("why",)
    classifier = Classifier(("z",), temperature=2.0, none_below=0.5).with_defaults(BUNDLE)
    assert (classifier.labels, classifier.sentences("z")) == (("z",), ("a photo of a z.",))
    assert (classifier.params, classifier.temperature, classifier.none_below) == ({"scale": 3.0}, 2.0, 0.5)
    assert Classifier(head="sigmoid").with_defaults(BUNDLE).params == {}  # the default's params belong to another head


def test_labels_and_templates_of_a_request_win():
    assert BUNDLE.for_request() is BUNDLE
    assert BUNDLE.for_request(["y", "w"]).sentences("y") == ("why",)
    assert BUNDLE.for_request(["y"], ["{}!"]).sentences("y") == ("y!",)
    assert BUNDLE.for_request(templates=["{}!"]).labels == ("x", "y")


def test_the_cache_key_of_the_vectors_depends_on_all_their_inputs():
    others = (
        BUNDLE.for_request(["y", "x"]),
        BUNDLE.for_request(["x"]),
        BUNDLE.for_request(templates=["{}"]),
        Classifier(("x", "y")),
    )
    keys = [classifier.text_key for classifier in (BUNDLE, *others)]
    assert len({*keys}) == 5
    assert Classifier(BUNDLE.labels, BUNDLE.templates, BUNDLE.descriptions, temperature=3.0).text_key == keys[0]


def test_a_head_keeps_its_columns_when_other_labels_are_requested(monkeypatch: pytest.MonkeyPatch):
    """The columns are those of the labels of the fit, also after `with_defaults` and `for_request`."""
    from calmclip.models.bundle.manifest import FrozenModel
    from calmclip.models.heads import HEADS, Asset, Head

    class Nothing(FrozenModel):
        pass

    plain: Head[Nothing] = Head(
        Nothing, lambda image, columns, params: image @ columns.assets["w"].T, lambda x: x, {"w": Asset(("C", "D"))}
    )
    HEADS.load()
    monkeypatch.setitem(HEADS._plugins, "plain", plain)
    weight = np.eye(3, dtype=np.float32)
    fitted = Classifier(("a", "b", "c"), head="plain", assets={"w": weight}, family="f" * 64)
    for classifier in (
        fitted.for_request(["c", "a"]),
        fitted.with_defaults(BUNDLE).for_request(["c", "a"]),
        Classifier(("c", "a")).with_defaults(fitted),
    ):
        columns = classifier.bound.columns(classifier.labels, np.zeros((2, 3), np.float32))
        assert classifier.bound.logits(np.array([[1.0, 2.0, 4.0]], np.float32), columns).tolist() == [[4.0, 1.0]]
    with pytest.raises(BadRequest, match="does not know the label 'd'"):
        fitted.for_request(["a", "d"]).bound.check(("a", "d"))
    fitted.require_family("f" * 64, "mini-float")
    with pytest.raises(
        ClassifierMismatch, match=r"vectors of the family ffffffffffff…; bundle 'other' is of the family 0000"
    ):
        fitted.require_family("0" * 64, "other")


def test_a_calibrated_temperature_belongs_to_its_family():
    calibrated = Classifier(("a",), temperature=3.0, family="f")
    assert (calibrated.temperature_for("f"), calibrated.temperature_for("g")) == (3.0, 1.0)
    assert Classifier(("a",), temperature=3.0).temperature_for("g") == 3.0
    calibrated.require_family("g", "other")  # it has no fitted head


def test_without_a_head_nothing_is_scored():
    with pytest.raises(TaskNotServed, match="no head"):
        Classifier(("a",)).bound  # noqa: B018 - binds the head
