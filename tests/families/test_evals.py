"""What every eval promises."""

from pathlib import Path

import pytest

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, measure

EACH = pytest.mark.parametrize("name", EVALS.names())


@EACH
def test_a_folder_without_its_data_is_refused_and_the_message_says_what_belongs_there(name: str, tmp_path: Path):
    with pytest.raises(BadRequest, match="must hold") as caught:  # an export says so before it begins
        measure.read(name, tmp_path)
    assert EVALS.get(name).data.split()[0] in str(caught.value)


@EACH
def test_it_works_with_nothing_set_and_names_its_params(name: str):
    params = measure.params_of(name)
    assert isinstance(params, FrozenModel)
    assert EVALS.get(name).scoring <= {*type(params).model_fields}
    with pytest.raises(BadRequest, match=rf"params of {name}: colour: unknown key; its params: "):
        measure.params_of(name, {"colour": 1})
