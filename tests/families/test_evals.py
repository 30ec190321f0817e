"""The contract of every eval."""

from pathlib import Path

import pytest

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, measure

EACH = pytest.mark.parametrize("name", EVALS.names())


@EACH
def test_a_folder_without_its_data_is_refused_and_the_error_names_the_data(name: str, tmp_path: Path):
    with pytest.raises(BadRequest, match="must hold") as refused:  # an export fails so before it begins
        measure.read(name, tmp_path)
    assert EVALS.get(name).data.split()[0] in str(refused.value)


@EACH
def test_its_params_have_defaults_and_an_unknown_param_is_refused(name: str):
    params = measure.params_of(name)
    assert isinstance(params, FrozenModel)
    assert EVALS.get(name).scoring <= {*type(params).model_fields}
    with pytest.raises(BadRequest, match=rf"params of {name}: colour: unknown key; its params: "):
        measure.params_of(name, {"colour": 1})
