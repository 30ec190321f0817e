"""The figures of segmentation: counts and folds by hand, COCO's truth in three forms, and the outlines' contract."""

import hashlib
import json

import numpy as np
import pytest

from calmclip.models.errors import BadRequest
from calmclip.models.evals.outlined import IGNORED, NONE, counted, mean_iou, read
from tests.bench import outlines
from tests.bench.masks import enlarged, held_out


def test_counts_of_two_maps_by_hand():
    truth = np.array([[0, 0, 1], [NONE, IGNORED, 1]])
    labels = np.array([[0, 1, 1], [0, 1, NONE]])
    right, called, true = counted(truth, labels, 3)
    assert right.tolist() == [1, 1, 0]
    assert called.tolist() == [2, 2, 0]  # the pixel of the crowd does not count
    assert true.tolist() == [2, 2, 0]


def test_mean_iou_of_photographs_together_by_hand():
    first = [[2, 0, 0], [4, 0, 3], [2, 1, 0]]  # right, called, true; the third class is nowhere
    second = [[1, 1, 0], [1, 2, 0], [4, 1, 0]]
    expected = 100 * (3 / (5 + 6 - 3) + 1 / (2 + 2 - 1)) / 2
    assert mean_iou(np.array([first, second])) == pytest.approx(expected)


def test_a_half_gets_the_setting_that_is_best_on_the_other():
    bad, good = [[1], [2], [2]], [[2], [2], [2]]
    counts = np.array([[bad, good], [good, bad], [bad, good], [good, bad]])  # even places need 1, odd places 0
    rows, settings = held_out(counts, (0.1, 0.9), mean_iou)
    assert settings == (0.1, 0.9)
    assert (rows == np.array([bad] * 4)).all()


def test_a_map_is_enlarged_by_the_middles_of_pixels():
    assert enlarged(np.array([[1, 2]]), 5, 1).tolist() == [[1, 1, 2, 2, 2]]


def test_truth_of_polygons_runs_and_crowds(tmp_path):
    """A 4 x 3 picture, its columns from left to right: a polygon over the left half, runs over a column of it, and a
    crowd over everything."""
    square = {"segmentation": [[0, 0, 2, 0, 2, 3, 0, 3]], "category_id": 7}
    column = {"segmentation": {"size": [3, 4], "counts": [3, 3, 6]}, "category_id": 9}
    crowd = {"segmentation": {"size": [3, 4], "counts": "0<"}, "category_id": 9, "iscrowd": 1}  # 12 pixels: 48 + 12
    content = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 4, "height": 3}],
        "categories": [{"id": 7, "name": "left"}, {"id": 9, "name": "column"}],
        "annotations": [{"image_id": 5, **each} for each in (column, crowd, square)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    names, (photograph,) = read(tmp_path)
    assert names == ("left", "column")
    assert photograph.truth().tolist() == [[0, 1, IGNORED, IGNORED]] * 3
    assert photograph.present == [0, 1]


def test_the_outlines_are_thirty_by_the_rule():
    content = json.loads(outlines.FILE.read_text(encoding="utf-8"))
    rows = outlines.read()
    assert len(rows) == 30
    skipped = {each["photograph"] for each in content["info"]["skipped"]}
    for part in outlines.SETS:
        files = [row.path.name for row in rows if row.set == part]
        assert files == sorted(files, key=lambda name: hashlib.sha256(f"calmclip-23:{name}".encode()).hexdigest())
        assert len({*files}) == len(files)
        assert not {f"{part}/{file}" for file in files} & skipped
    for row in rows:
        assert 0.005 < row.mask().mean() < 0.98, row.path


def test_an_outline_has_its_area_by_the_shoelace_formula():
    for row in outlines.read():
        if len(row.polygons) == 1 and not row.holes:
            x, y = np.array(row.polygons[0]).reshape(-1, 2).T
            area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
            assert row.mask().sum() == pytest.approx(area, rel=0.03, abs=20), row.path


@pytest.mark.parametrize("polygon", [[0, 0, 1, 1], [0, 0, 1, 1, 2], [0, 0, 300, 0, 5, 5], [-1, 0, 5, 0, 5, 5]])
def test_a_broken_outline_is_refused_with_its_photograph(tmp_path, polygon):
    content = json.loads(outlines.FILE.read_text(encoding="utf-8"))
    content["photographs"][3]["polygons"] = [polygon]
    (tmp_path / "outlines.json").write_text(json.dumps(content))
    with pytest.raises(BadRequest, match=content["photographs"][3]["file_name"]):
        outlines.read(file=tmp_path / "outlines.json")


def test_another_photograph_is_refused(tmp_path):
    for row in outlines.read():
        file = tmp_path / row.set / "images" / row.path.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with pytest.raises(BadRequest, match="not the photograph that was outlined"):
        outlines.read(tmp_path)
    with pytest.raises(BadRequest, match="is not there"):
        outlines.read(tmp_path / "elsewhere")
