import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from calmclip.models.errors import BadRequest
from calmclip.models.evals import classification, measure, zero_shot
from calmclip.models.evals.samples import Samples
from calmclip.models.runner import open_bundle

NONE = zero_shot.Params()


def samples(logits, truth) -> Samples:
    arrays = {"logits": np.float32(logits), "truth": np.array(truth), "temperature": np.array(1.0)}
    return Samples({"pictures": len(truth)}, arrays, {"head": ["cosine"]})


def figures(given: Samples, params=NONE, rows=None) -> dict[str, float]:
    rows = np.arange(given.count) if rows is None else rows
    return {one.name: one.value for one in classification.score(given, params)(rows)}


def test_top1_and_top5_worked_out_by_hand():
    # seven labels; the right one is 0, 0, 0, 1, and stands at the places 0, 4, 6, 0; of equal logits the lower is first
    rows = [[7, 6, 5, 4, 3, 2, 1], [3, 7, 6, 5, 4, 2, 1], [1, 2, 3, 4, 5, 6, 7], [6, 7, 5, 4, 3, 2, 1]]
    given = samples(rows, [0, 0, 0, 1])
    assert [figures(given)[name] for name in ("top1", "top5")] == [50.0, 75.0]
    assert figures(given, rows=np.array([1, 1, 2, 3]))["top1"] == 25.0
    assert [figures(samples([[1, 1]], [place]))["top1"] for place in (0, 1)] == [100.0, 0.0]


@pytest.mark.parametrize(("right", "error"), [(3, 0.0), (2, 25.0), (4, 25.0)])
def test_the_calibration_error_is_how_far_scores_are_from_right(right: int, error: float):
    # softmax of (log 3, 0) is 3/4, 1/4: four pictures of which three are right are as sure as they are right
    given = samples([[np.log(3), 0]] * 4, [0] * right + [1] * (4 - right))
    assert figures(given)["calibration error"] == pytest.approx(error, abs=1e-5)
    assert classification.judge(given, NONE).bin.tolist() == [11] * 4  # 11 / 15 < 3/4 < 12 / 15
    # at a temperature of log 3 the score is e / (e + 1) = .73106
    cooler = zero_shot.Params(temperature=np.log(3))
    assert figures(given, cooler)["calibration error"] == pytest.approx(abs(25 * right - 73.106), abs=1e-3)
    own = replace(given, arrays={**given.arrays, "temperature": np.array(np.log(3))})  # of the bundle
    assert figures(own) == figures(given, cooler)


def test_logits_of_known_calibration_have_an_error_near_zero_and_the_plot_lies_on_the_diagonal():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (40_000, 2)).astype(np.float32)
    truth = (draw.random(len(logits)) > 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))).astype(int)
    given = samples(logits, truth)
    assert figures(given)["calibration error"] < 0.8  # the truth was drawn by the softmax itself; noise of 15 bins
    (plot,) = classification.plots({"a": given}, NONE)
    assert plot.lines[0].x == pytest.approx(plot.lines[0].y, abs=0.03)


def test_pictures_are_arrays_bytes_or_files_and_each_is_measured_as_the_runner_sees_it(sealed: Path, tmp_path: Path):
    pixels = {name: np.zeros((8, 8, 3), np.uint8) for name in ("red", "green", "blue")}
    for place, array in enumerate(pixels.values()):
        array[..., place] = 255
    file, path = io.BytesIO(), tmp_path / "blue.png"
    Image.fromarray(pixels["green"]).save(file, "PNG")
    Image.fromarray(pixels["blue"]).save(path)
    shown = [pixels["red"], file.getvalue(), str(path), Image.fromarray(pixels["red"])]
    data = zero_shot.DataSet(shown, ["blue", "green", "red"], [2, 1, 0, 1])
    runner = open_bundle(sealed)
    found = measure.predict("zero_shot", runner, data)
    # cosines 1 and 0, scale 2 (see the fixture); the last picture is red and was said to be green
    assert found.arrays["logits"] == pytest.approx(np.float32([[0, 0, 2], [0, 2, 0], [2, 0, 0], [0, 0, 2]]), abs=1e-5)
    assert measure.named(found) == pytest.approx({"top1": 75.0, "top5": 100.0, "calibration error": 3.7, "pictures": 4,
                                                  "labels": 3}, abs=0.1)  # fmt: skip
    turned = measure.predict("zero_shot", runner, data, {"templates": ["{} red"]})
    assert turned.arrays["logits"][0] == pytest.approx([2**0.5, 2**0.5, 2], abs=1e-5)
    for other in (["blue", "red", "green"], 5):
        with pytest.raises(BadRequest, match="truth"):
            zero_shot.DataSet(shown, data.labels, other if isinstance(other, list) else [5, 0, 0, 0])


def test_files_are_read_with_the_labels_they_have(tmp_path: Path):
    rows = [{"file": "1.jpg", "label": "b"}, {"file": "2.jpg", "name": "a"}]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    found = zero_shot.read(tmp_path, NONE)
    assert (found.labels, found.truth) == (["a", "b"], [1, 0])
    assert found.pictures[1] == tmp_path / "images" / "2.jpg"
    assert zero_shot.read(tmp_path, NONE, 1).labels == ["b"]
    bundle = SimpleNamespace(name="fake", digest="0", require=lambda task: None)
    with pytest.raises(BadRequest, match=r"images/1\.jpg cannot be read"):
        measure.predict("zero_shot", SimpleNamespace(bundle=bundle), found)


@pytest.mark.parametrize(
    "content",
    ['[{"file": "1.jpg"}]', "[]", '{"1.jpg": "cat"}', "[1]", '[{"label": "cat"}]', '[{"file": "1.jpg", "label": ""}]'],
)
def test_data_without_labels_says_what_it_must_hold(tmp_path: Path, content: str):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(BadRequest, match=r"labels\.json .* must hold"):
        zero_shot.read(tmp_path, NONE)
