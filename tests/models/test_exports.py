"""`import models` gives the public names, and costs nothing until one is used."""

import subprocess
import sys

import pytest

import models
from models.errors import CalmclipError
from models.runner import Runner, open_bundle
from models.tasks.detect import Example, Suppression


def test_the_public_names_are_these():
    assert sorted(models.__all__) == ["CalmclipError", "Example", "Runner", "Suppression", "open_bundle"]
    assert (models.open_bundle, models.Runner, models.Suppression) == (open_bundle, Runner, Suppression)
    assert models.Example is Example
    assert models.CalmclipError is CalmclipError


def test_an_unknown_name_is_answered_with_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'open'; public: open_bundle, Runner"):
        models.open  # noqa: B018 - the access is the test


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, models; print([m for m in ('numpy', 'onnxruntime', 'PIL', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
