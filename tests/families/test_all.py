"""What is asked of a plug-in whichever its family; what a family promises stands in its own file."""

import sys
from importlib import import_module
from typing import Any

import pytest
from pydantic import ValidationError

from calmclip.models.registry import FAMILIES, Registry

# family -> the member that its module defines, and what the module's docstring names besides its source
ASKED = {
    "nets": ("load", ()), "layouts": ("settings", ()), "adapters": ("adapt", ()), "quantizers": ("quantize", ()),
    "rewrites": ("rewrite", ()), "evals": ("predict", ("Data: ",)), "heads": ("logits", ("In:", "Assets:", "Out:")),
}  # fmt: skip


def registry(family: str) -> Registry[Any]:
    package, _, name = FAMILIES[family].partition(":")
    found: Registry[Any] = getattr(import_module(package), name)
    return found


EACH = pytest.mark.parametrize(("family", "name"), [(one, name) for one in ASKED for name in registry(one).names()])


@EACH
def test_it_says_what_it_is_and_where_it_is_from(family: str, name: str):
    member, parts = ASKED[family]
    text = sys.modules[getattr(registry(family).get(name), member).__module__].__doc__ or ""
    for part in ("Source:", *parts):
        assert part in text, part


@EACH
def test_a_name_is_used_once(family: str, name: str):
    with pytest.raises(ValueError, match=f"{family} '{name}' is registered twice"):
        registry(family).register(name)(registry(family).get(name))


@EACH
def test_params_that_are_not_its_own_are_refused(family: str, name: str):
    if params := getattr(registry(family).get(name), "params", None):
        with pytest.raises(ValidationError, match="no_such_param"):
            params.model_validate({"no_such_param": 1})
