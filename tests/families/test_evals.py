"""What every eval promises."""

import sys
from pathlib import Path

import pytest

from calmclip.export.evals import EVALS
from calmclip.models.errors import BadRequest
from calmclip.models.runner import open_bundle


@pytest.mark.parametrize("name", EVALS.names())
def test_a_folder_without_its_data_is_refused_and_the_message_says_what_belongs_there(
    name: str, tiny_bundles: Path, tmp_path: Path
):
    runner = open_bundle(tiny_bundles / "tiny-float")
    with pytest.raises(BadRequest, match="must hold") as caught:
        EVALS.get(name).measure(runner, tmp_path, None)
    assert EVALS.get(name).data.split()[0] in str(caught.value)
    with pytest.raises(BadRequest, match="must hold"):  # an export says so before it begins
        EVALS.get(name).read(tmp_path)


@pytest.mark.parametrize("name", EVALS.names())
def test_it_says_what_it_measures_and_where_that_is_from(name: str):
    module = sys.modules[EVALS.get(name).measure.__module__]
    assert module.__doc__
    assert "Source: " in module.__doc__
    assert "Data: " in module.__doc__
