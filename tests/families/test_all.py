"""The contract of every plug-in of every family. The contract of a single family is in its own file."""

import sys
from importlib import import_module
from typing import Any, cast

import pytest
from pydantic import ValidationError

from calmclip.models.registry import FAMILIES, Registry

# family -> the parts of a module's docstring besides its source
PARTS = {
    "nets": (), "layouts": (), "adapters": (), "quantizers": (), "rewrites": (), "evals": ("Data: ",),
    "heads": ("In:", "Assets:", "Out:"), "segmenters": (),
}  # fmt: skip


def registry(family: str) -> Registry[Any]:
    package, _, name = FAMILIES[family].partition(":")
    return cast(Registry[Any], getattr(import_module(package), name))


EACH = pytest.mark.parametrize(("family", "name"), [(f, name) for f in PARTS for name in registry(f).names()])


@EACH
def test_the_docstring_of_its_module_names_its_source(family: str, name: str):
    """The module that registers the name: a member of the plug-in may be a function of another module."""
    module = sys.modules[registry(family)._homes[name]]
    assert module.__name__.startswith(registry(family).package + ".")
    for part in ("Source:", *PARTS[family]):
        assert part in (module.__doc__ or ""), part


@EACH
def test_a_name_is_used_once(family: str, name: str):
    with pytest.raises(ValueError, match=f"{family} '{name}' is registered twice"):
        registry(family).register(name)(registry(family).get(name))


@EACH
def test_unknown_params_are_refused(family: str, name: str):
    if params := getattr(registry(family).get(name), "params", None):
        with pytest.raises(ValidationError, match="no_such_param"):
            params.model_validate({"no_such_param": 1})
