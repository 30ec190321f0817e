"""The mechanism of every plug-in family: a get by name, lazy imports, and no silent replacement."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from calmclip.models import registry as module
from calmclip.models.errors import UnknownName
from calmclip.models.registry import Registry

Family = Callable[..., Registry[str]]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """A family with modules of these texts, in which `THINGS` is its registry."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, **modules: str) -> Registry[str]:
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(
            f"from calmclip.models.registry import Registry\nTHINGS = Registry('things', {name!r})\n"
        )
        for title, text in modules.items():
            (package / f"{title}.py").write_text(f"from {name} import THINGS\n{text}\n")
        things: Registry[str] = __import__(name).THINGS
        return things

    return make


def test_nothing_is_imported_before_the_first_get(family: Family):
    things = family("lazy_family", one="THINGS.register('one')('ONE')")
    assert "lazy_family.one" not in sys.modules
    assert things.get("one") == "ONE"
    assert "lazy_family.one" in sys.modules


def test_a_module_may_register_several_and_a_private_one_is_not_imported(family: Family):
    things = family(
        "several_family", b="THINGS.register('b')('B'); THINGS.register('a')('A')", _private="raise AssertionError"
    )
    assert things.names() == ["a", "b"]


def test_register_is_a_decorator(family: Family):
    things = family("decorated_family", f="@THINGS.register('f')\ndef f(): return 'called'")
    assert things.get("f")() == "called"  # type: ignore[operator]


def test_an_unknown_name_is_refused_with_the_nearest_and_all_names(family: Family):
    things = family("near_family", m="for n in ('cosine', 'sigmoid'): THINGS.register(n)(n)")
    with pytest.raises(UnknownName, match="there is no things 'cosin'; did you mean 'cosine'") as refused:
        things.get("cosin")
    assert refused.value.known == ["cosine", "sigmoid"]
    with pytest.raises(UnknownName, match=r"known: cosine, sigmoid\."):
        things.get("zzz")


def test_an_empty_family_says_so(family: Family):
    with pytest.raises(UnknownName, match=r"known: none\."):
        family("empty_family").get("x")


def test_a_second_use_of_a_name_is_refused(family: Family):
    things = family("twice_family")
    things.register("x")("first")
    with pytest.raises(ValueError, match="things 'x' is registered twice; choose another name"):
        things.register("x")("second")
    assert things.get("x") == "first"


def test_packages_of_others_join_by_entry_point(family: Family, monkeypatch: pytest.MonkeyPatch):
    things = family("joined_family")

    class Point(EntryPoint):
        def load(self) -> None:
            things.register("guest")("GUEST")

    groups = []
    monkeypatch.setattr(module, "entry_points", lambda group: groups.append(group) or [Point("guest", "guests", group)])
    assert things.get("guest") == "GUEST"
    assert things.names() == ["guest"]
    assert groups == ["calmclip.things"]  # once


def test_a_module_that_does_not_import_does_not_affect_the_others(family: Family, monkeypatch: pytest.MonkeyPatch):
    things = family(
        "broken_family",
        bad="THINGS.register('half')('HALF')\nraise RuntimeError('bad module')",
        good="THINGS.register('good')('GOOD')",
    )
    monkeypatch.setattr(module, "entry_points", lambda group: [EntryPoint("guest", "no_such_package", group)])
    for _ in range(2):
        assert things.get("good") == "GOOD"
        assert things.names() == ["good"]
        with pytest.raises(
            UnknownName, match=r"broken_family\.bad did not import: RuntimeError\('bad module'\)"
        ) as refused:
            things.get("half")
        assert "entry point guest = no_such_package did not import" in str(refused.value)
        assert isinstance(refused.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="bad module"):  # not "registered twice"
        import_module("broken_family.bad")


def test_concurrent_threads_wait_for_all_imports(family: Family):
    things = family("slow_family", a="import time; time.sleep(0.1)", b="THINGS.register('b')('B')")

    def ask(_: int) -> str:
        time.sleep(0.01)
        return things.get("b")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == ["B"] * 8
