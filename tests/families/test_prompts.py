"""The contract of every prompts plug-in there is, and the door for those of other packages."""

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from calmclip.models.errors import BundleInvalid, UnknownName
from calmclip.models.prompts import PROMPTS, fill
from calmclip.models.registry import Registry

LABELS = ["cat", "a {} in braces", "猫", "red\nfox", "{label}", "%s", "\\d+"]

# Plug-ins that have no default for everything get the rest here: name -> params.
PARAMS: dict[str, dict[str, Any]] = {"ensemble": {"templates": ["a photo of a {}.", "a drawing of a {}."]}}


def bound(name: str) -> Callable[[str], Sequence[str]]:
    return PROMPTS.get(name).bind(PARAMS.get(name, {}))


@pytest.fixture(params=PROMPTS.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("label", LABELS)
def test_a_label_becomes_sentences_that_hold_it(name: str, label: str):
    sentences = bound(name)(label)
    assert len(sentences) >= 1
    assert all(isinstance(sentence, str) and label in sentence for sentence in sentences)


def test_the_same_label_gives_the_same_sentences(name: str):
    assert list(bound(name)("cat")) == list(bound(name)("cat"))


def test_different_labels_give_different_sentences(name: str):
    assert not set(bound(name)("cat")) & set(bound(name)("dog"))


def test_it_says_what_it_is_and_where_it_is_from(name: str):
    assert "Source:" in (sys.modules[PROMPTS.get(name).sentences.__module__].__doc__ or "")


def test_params_that_are_not_its_own_are_refused(name: str):
    with pytest.raises(BundleInvalid, match=r"prompts params .*no_such: unknown key"):
        PROMPTS.get(name).bind(PARAMS.get(name, {}) | {"no_such": 1})


def test_a_name_is_used_once(name: str):
    with pytest.raises(ValueError, match=f"prompts '{name}' is registered twice"):
        PROMPTS.register(name)(PROMPTS.get(name))


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UnknownName, match="did you mean 'single'") as refused:
        PROMPTS.get("singel")
    assert refused.value.known == PROMPTS.names()


# --- what is particular ---------------------------------------------------------------------------------------------


def test_single_is_one_sentence():
    assert list(PROMPTS.get("single").bind({})("cat")) == ["a photo of a cat."]
    assert list(PROMPTS.get("single").bind({"template": "{}"})("cat")) == ["cat"]


def test_ensemble_is_one_sentence_per_template_in_their_order():
    assert list(bound("ensemble")("cat")) == ["a photo of a cat.", "a drawing of a cat."]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("single", {"template": "a photo"}),
        ("single", {"template": "{label}"}),
        ("ensemble", {}),
        ("ensemble", {"templates": []}),
        ("ensemble", {"templates": ["{}", "a photo"]}),
        ("ensemble", {"templates": "{}"}),
    ],
)
def test_a_template_has_a_place_for_the_label(name: str, params: dict[str, Any]):
    with pytest.raises(BundleInvalid, match=r"prompts params .*template"):
        PROMPTS.get(name).bind(params)


def test_fill_runs_nothing_of_the_template_or_the_label():
    assert fill("a {} and {0.__class__} {}", "{}") == "a {} and {0.__class__} {}"


# --- plug-ins of other packages -------------------------------------------------------------------------------------


def test_an_installed_package_joins_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real distribution on disk: metadata, entry point and a module that registers when imported."""
    info = tmp_path / "guest_prompts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest-prompts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[calmclip.guests]\nshout = guest_prompts\n")
    (tmp_path / "guest_prompts.py").write_text(
        "from calmclip.models.prompts import Prompts\n"
        "from calmclip.models.prompts.single import Params\n"
        "import guest_family\n"
        "guest_family.GUESTS.register('shout')(Prompts(Params, lambda label, params: (label.upper(),)))\n"
    )
    (tmp_path / "guest_family").mkdir()
    (tmp_path / "guest_family" / "__init__.py").write_text(
        "from calmclip.models.registry import Registry\nGUESTS = Registry('guests', 'guest_family')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    guests: Registry[Any] = importlib.import_module("guest_family").GUESTS
    assert guests.names() == ["shout"]
    assert guests.get("shout").bind({})("cat") == ("CAT",)
