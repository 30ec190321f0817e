"""The reader of torch's first file format. The oracle is torch.load."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calmclip.export.nets.mini import torch_file
from calmclip.export.nets.mini.weights import BACKBONE
from calmclip.models.errors import WeightsMissing


def saved(path: Path, state: Mapping[str, Any]) -> Path:
    torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=False)
    return path


def check(file: Path) -> None:
    arrays, tensors = torch_file.read(file), torch.load(file, weights_only=True)
    assert [*arrays] == [*tensors]
    for name, tensor in tensors.items():
        assert arrays[name].dtype == tensor.numpy().dtype
        assert arrays[name].flags.c_contiguous
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), err_msg=name)


def test_the_backbones_file_holds_what_torch_reads():
    check(BACKBONE.locate())


def test_views_of_one_storage_have_their_offset_and_strides(tmp_path: Path):
    base = torch.arange(24.0)
    views = {"matrix": base[3:15].view(3, 4), "turned": base[3:15].view(3, 4).T, "every_other": base[1::2]}
    check(saved(tmp_path / "views.pth", {**views, "number": torch.tensor(7), "empty": torch.zeros(0, 3)}))


def zipped(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)


def cut(path: Path) -> None:
    path.write_bytes(saved(path, {"a": torch.ones(1000)}).read_bytes()[:-100])


def half(path: Path) -> None:
    saved(path, {"a": torch.ones(2, dtype=torch.float16)})


def program(path: Path) -> None:
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {}):
            pickle.dump(part, file, protocol=2)
        pickle.dump(Runs(path.with_name("ran")), file, protocol=2)


class Runs:
    """Pickled, it makes the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def number(path: Path) -> None:
    path.write_bytes(pickle.dumps(3) * 5)


def text(path: Path) -> None:
    path.write_text("<html>no weights</html>")


def empty(path: Path) -> None:
    path.touch()


def outside(path: Path) -> None:
    """The tensor has four numbers, its storage three."""
    data = saved(path, {"a": torch.arange(4.0)}).read_bytes()
    at = data.rindex((4).to_bytes(8, "little"))
    path.write_bytes(data[:at] + (3).to_bytes(8, "little") + data[at + 8 : -4])


@pytest.mark.parametrize("write", [zipped, cut, half, program, number, text, empty, outside])
def test_another_or_a_damaged_file_is_an_error_that_names_it(write: Any, tmp_path: Path):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(WeightsMissing, match=r"weights\.pth is no state dict of torch's first format: .+"):
        torch_file.read(path)
    assert not (tmp_path / "ran").exists()
