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


def figures(answers: Samples, params=NONE, rows=None) -> dict[str, float]:
    rows = np.arange(answers.count) if rows is None else rows
    return {figure.name: figure.value for figure in classification.score(answers, params)(rows)}


def test_top1_and_top5_by_hand():
    # seven labels; the right labels 0, 0, 0, 1 have the ranks 0, 4, 6, 0; of equal logits the lower index is first
    rows = [[7, 6, 5, 4, 3, 2, 1], [3, 7, 6, 5, 4, 2, 1], [1, 2, 3, 4, 5, 6, 7], [6, 7, 5, 4, 3, 2, 1]]
    answers = samples(rows, [0, 0, 0, 1])
    assert [figures(answers)[name] for name in ("top1", "top5")] == [50.0, 75.0]
    assert figures(answers, rows=np.array([1, 1, 2, 3]))["top1"] == 25.0
    assert [figures(samples([[1, 1]], [place]))["top1"] for place in (0, 1)] == [100.0, 0.0]


@pytest.mark.parametrize(("right", "error"), [(3, 0.0), (2, 25.0), (4, 25.0)])
def test_the_calibration_error_is_the_distance_of_scores_from_accuracy(right: int, error: float):
    # softmax of (log 3, 0) is 3/4, 1/4: with three of four pictures right the error is 0
    answers = samples([[np.log(3), 0]] * 4, [0] * right + [1] * (4 - right))
    assert figures(answers)["calibration error"] == pytest.approx(error, abs=1e-5)
    assert classification.judge(answers, NONE).bin.tolist() == [11] * 4  # 11 / 15 < 3/4 < 12 / 15
    # at a temperature of log 3 the score is e / (e + 1) = .73106
    cooler = zero_shot.Params(temperature=np.log(3))
    assert figures(answers, cooler)["calibration error"] == pytest.approx(abs(25 * right - 73.106), abs=1e-3)
    calibrated = replace(answers, arrays={**answers.arrays, "temperature": np.array(np.log(3))})
    assert figures(calibrated) == figures(answers, cooler)


def test_calibrated_logits_have_an_error_near_zero_and_a_plot_near_the_diagonal():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (40_000, 2)).astype(np.float32)
    truth = (draw.random(len(logits)) > 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))).astype(int)
    answers = samples(logits, truth)
    assert figures(answers)["calibration error"] < 0.8  # the softmax drew the truth; the error is noise of 15 bins
    (plot,) = classification.plots({"a": answers}, NONE)
    assert plot.lines[0].x == pytest.approx(plot.lines[0].y, abs=0.03)


def test_pictures_are_arrays_bytes_or_files_with_the_runners_logits(sealed: Path, tmp_path: Path):
    pixels = {name: np.zeros((8, 8, 3), np.uint8) for name in ("red", "green", "blue")}
    for place, array in enumerate(pixels.values()):
        array[..., place] = 255
    file, path = io.BytesIO(), tmp_path / "blue.png"
    Image.fromarray(pixels["green"]).save(file, "PNG")
    Image.fromarray(pixels["blue"]).save(path)
    shown = [pixels["red"], file.getvalue(), str(path), Image.fromarray(pixels["red"])]
    data = zero_shot.DataSet(shown, ["blue", "green", "red"], [2, 1, 0, 1])
    runner = open_bundle(sealed)
    answers = measure.predict("zero_shot", runner, data)
    # cosines 1 and 0, scale 2 (see the fixture); the last picture is red, its label is green
    assert answers.arrays["logits"] == pytest.approx(np.float32([[0, 0, 2], [0, 2, 0], [2, 0, 0], [0, 0, 2]]), abs=1e-5)
    expected = {"top1": 75.0, "top5": 100.0, "calibration error": 3.7, "pictures": 4, "labels": 3}
    assert measure.named(answers) == pytest.approx(expected, abs=0.1)
    described = measure.predict("zero_shot", runner, data, {"templates": ["{} red"]})
    assert described.arrays["logits"][0] == pytest.approx([2**0.5, 2**0.5, 2], abs=1e-5)
    for other in (["blue", "red", "green"], 5):
        with pytest.raises(BadRequest, match="truth"):
            zero_shot.DataSet(shown, data.labels, other if isinstance(other, list) else [5, 0, 0, 0])


def test_files_are_read_with_the_labels_they_have(tmp_path: Path):
    rows = [{"file": "1.jpg", "label": "b"}, {"file": "2.jpg", "name": "a"}]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    data = zero_shot.read(tmp_path, NONE)
    assert (data.labels, data.truth) == (["a", "b"], [1, 0])
    assert data.pictures[1] == tmp_path / "images" / "2.jpg"
    assert zero_shot.read(tmp_path, NONE, 1).labels == ["b"]
    bundle = SimpleNamespace(name="fake", digest="0", require=lambda task: None)
    with pytest.raises(BadRequest, match=r"images/1\.jpg cannot be read"):
        measure.predict("zero_shot", SimpleNamespace(bundle=bundle), data)


@pytest.mark.parametrize(
    "content",
    ['[{"file": "1.jpg"}]', "[]", '{"1.jpg": "cat"}', "[1]", '[{"label": "cat"}]', '[{"file": "1.jpg", "label": ""}]'],
)
def test_data_without_labels_are_refused(tmp_path: Path, content: str):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(BadRequest, match=r"labels\.json .* must hold"):
        zero_shot.read(tmp_path, NONE)
