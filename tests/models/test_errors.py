"""Errors: the message, known names, and the suggestion of a name."""

import pytest

from calmclip.models import errors
from calmclip.models.errors import BundleNotFound, CalmclipError, Overloaded, suggestion


def test_every_error_has_its_message():
    tree = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, CalmclipError)]
    assert len(tree) > 20
    for error in tree:
        assert str(error("what was")) == "what was"


def test_known_names_are_sorted():
    assert BundleNotFound("no", known=["b", "a"]).known == ["a", "b"]
    assert BundleNotFound("no").known == []
    assert Overloaded("full", retry_after=2.5).retry_after == 2.5


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("mini-int9", ["mini-int8", "other"], "did you mean 'mini-int8'?"),
        ("zzz", ["b", "a"], "known: a, b."),
        ("zzz", [], "known: none."),
        ("", ["a"], "known: a."),
    ],
)
def test_a_suggestion_is_the_nearest_or_all(name: str, known: list[str], says: str):
    assert suggestion(name, known) == says
