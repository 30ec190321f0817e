from pathlib import Path

import numpy as np
import pytest
import torch

from calmclip.export.nets.mini.features import of_pictures
from calmclip.models.errors import BadImage


def test_cached_features_equal_the_first_ones(photographs: dict[str, Path], tmp_path: Path):
    first = of_pictures([photographs["cat"]], tmp_path, quiet=True)
    (file,) = tmp_path.iterdir()  # no partial file
    assert np.load(file).dtype == np.float16
    assert torch.equal(of_pictures([photographs["cat"]], tmp_path, quiet=True), first)
    assert torch.equal(of_pictures([photographs["cat"]], quiet=True), first)
    assert (first.shape, first.dtype) == ((1, 2, 1280), torch.float32)


def test_a_file_that_is_no_picture_is_named_and_not_cached(tmp_path: Path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"broken\.jpg: "):
        of_pictures([tmp_path / "broken.jpg"], tmp_path / "cache", quiet=True)
    assert not (tmp_path / "cache").exists()
