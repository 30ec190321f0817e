"""The tree drawn in the docstring is the tree there is."""

import re

import pytest

from calmclip.models import errors
from calmclip.models.errors import BundleNotFound, CalmclipError, Overloaded, suggestion


def drawn() -> dict[str, str | None]:
    """Class -> parent, read from the drawing: four columns a level."""
    above: dict[int, str] = {}
    tree: dict[str, str | None] = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.fullmatch(r"    ((?:│   |    )*(?:[├└]── )?)([A-Z]\w+)(?:  .*)?", line):
            level = len(found[1]) // 4
            above[level] = found[2]
            tree[found[2]] = above[level - 1] if level else None
    return tree


def real() -> dict[str, str | None]:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, CalmclipError)]
    return {c.__name__: None if c is CalmclipError else c.__bases__[0].__name__ for c in classes}


def test_the_drawing_is_the_tree():
    assert drawn() == real()
    assert len(drawn()) > 20


def test_every_error_takes_a_message_and_says_it():
    for name in real():
        assert str(getattr(errors, name)("what was")) == "what was"


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
