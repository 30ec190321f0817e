"""misalignment: its figures against scikit-learn and by hand, the data that it reads, and one run over graphs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import precision_score, roc_auc_score

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ExplainDefaults, Fitted
from calmclip.models.errors import BadRequest
from calmclip.models.evals import measure, misalignment
from calmclip.models.evals.misalignment import Params, changed
from calmclip.models.evals.samples import Samples
from calmclip.models.runner import Runner

NAN = np.nan
WORD, FLAG, CAPTIONS = "exchanged word", "captions with a flag", "captions"


def drawn(count: int = 80) -> Samples:
    """Rounded, so that scores tie."""
    draw = np.random.default_rng(0)
    true = draw.normal(0.3, 1, count)
    cosine = np.stack([true, true - draw.exponential(1, count)], axis=1).round(1)
    margins = draw.normal(0, 0.1, (count, 2, 5)).round(2)
    margins[:, :, 4] = NAN  # a function word
    other = np.zeros((count, 5), bool)
    other[np.arange(count), draw.integers(0, 4, count)] = True
    parts = {"margins": margins, "contributions": -margins}
    arrays = {"cosine": cosine, "f_score": cosine + margins[:, :, 0], **parts, "changed": other}
    return Samples({"pairs": count}, {**arrays, "threshold": np.array(-0.1)}, {"method": ("leave_one_out",)})


def figures(samples: Samples, rows: list[int] | None = None, params: Params = Params()) -> dict[tuple[str, str], float]:  # noqa: B008
    statistic = misalignment.score(samples, params)
    places = np.arange(samples.count) if rows is None else np.array(rows)
    return {figure.key: figure.value for figure in statistic(places)}


@pytest.mark.parametrize("rows", [[*range(80)], [3, 3, 3, 7, 50, 51, 51, 79]])
def test_figures_agree_with_scikit_learn_also_for_a_resample(rows: list[int]):
    samples = drawn()
    arrays = {name: array[rows] if array.ndim else array for name, array in samples.arrays.items()}
    truth = np.tile([1, 0], len(rows))
    values = figures(samples, rows)
    lowest = np.nanmin(arrays["margins"], axis=2)
    for name, scores in (("cosine", arrays["cosine"]), ("F-CLIPScore", arrays["f_score"]), ("lowest margin", lowest)):
        assert values[CAPTIONS, f"AUROC {name}"] == pytest.approx(roc_auc_score(truth, scores.ravel()), abs=1e-12)
    flagged = np.nan_to_num(arrays["margins"], nan=1) < -0.1
    wrong = np.stack([np.zeros_like(arrays["changed"]), arrays["changed"]], axis=1)
    assert values[WORD, "precision"] == pytest.approx(100 * precision_score(wrong.ravel(), flagged.ravel()))
    assert values[FLAG, "unchanged"] == pytest.approx(100 * flagged[:, 0].any(axis=1).mean())
    assert values[WORD, "recall"] == pytest.approx(100 * (flagged[:, 1] & arrays["changed"]).any(axis=1).mean())
    ranks_lowest = [
        other[np.nanargmin(row)] for row, other in zip(arrays["margins"][:, 1], arrays["changed"], strict=True)
    ]
    assert values[WORD, "lowest"] == pytest.approx(100 * np.mean(ranks_lowest), abs=4)  # argmin takes the first of ties


def test_figures_by_hand_and_another_threshold():
    margins = np.array([[[0.2, -0.3], [0.1, -0.2]], [[0.3, 0.1], [-0.4, NAN]], [[0.1, 0.2], [0.3, 0.0]]])
    other = np.array([[False, True], [True, False], [True, False]])
    cosine = np.array([[0.5, 0.1], [0.4, 0.4], [0.2, 0.3]])
    parts = {"margins": margins, "contributions": -margins}
    arrays = {"cosine": cosine, "f_score": cosine, **parts, "changed": other, "threshold": np.array(-0.1)}
    samples = Samples({"pairs": 3}, arrays, {"method": ("leave_one_out",)})
    values = figures(samples)
    assert values[WORD, "lowest"] == pytest.approx(200 / 3)
    assert values[WORD, "lowest, plain"] == pytest.approx(200 / 3)  # with the signs turned: no, yes, yes
    assert values[WORD, "recall"] == pytest.approx(200 / 3)
    assert values[WORD, "precision"] == pytest.approx(200 / 3)  # of three flagged words one is of a true caption
    assert values[FLAG, "unchanged"] == pytest.approx(100 / 3)
    assert values[CAPTIONS, "pairs right"] == pytest.approx(100 / 3)  # a tie is not right
    none = figures(samples, params=Params(threshold=-1.0))
    assert np.isnan(none[WORD, "precision"])
    assert (none[FLAG, "unchanged"], none[WORD, "recall"]) == (0, 0)
    roc, *histograms = misalignment.plots({"a": samples}, Params())
    assert (roc.lines[0].x[-1], roc.lines[0].y[-1]) == (1, 1)
    assert [sum(line.y) for line in histograms[0].lines] == [3, 3]


def test_changed_words_are_those_that_the_true_caption_lacks():
    assert changed("a dog on a sofa", "a cat on a sofa") == [False, True, False, False, False]
    assert changed("a dog", "A big dog") == [False, True, False]
    assert changed("a red ball", "a ball") == [False, False]


@pytest.fixture
def folder(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png(name))
    return tmp_path


def test_pairs_are_measured_saved_and_scored_again(folder: Path, bundle: Bundle):
    """A red picture with "red" and "red blue": without "blue" the cosine is 1, with it 1 / sqrt 2."""
    lines = [
        {"images": ["red.png"], "captions": ["a red", "a blue"]},
        {"images": ["blue.png"], "captions": ["blue", "blue red"]},
        {"images": ["red.png", "blue.png"], "captions": ["red", "blue"]},  # two pictures: left out
        {"images": ["red.png"], "captions": ["red blue", "red"]},  # no word is added: left out
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = measure.read("misalignment", folder)
    assert [*data.captions] == [("a red", "a blue"), ("blue", "blue red")]
    samples = measure.predict("misalignment", Runner(bundle), data)
    half = 2**-0.5
    assert samples.arrays["cosine"] == pytest.approx(np.array([[1, 0], [1, half]]), abs=1e-6)
    expected = [[[NAN, 1], [NAN, 0]], [[1, NAN], [half, half - 1]]]
    assert samples.arrays["margins"] == pytest.approx(np.array(expected), abs=1e-6, nan_ok=True)
    values = {figure.key: figure.value for figure in measure.figures(samples)}
    assert values[WORD, "lowest"] == 100
    assert values[CAPTIONS, "AUROC cosine"] == 1
    fitted = ExplainDefaults(fitted={"leave_one_out": Fitted(expected=0.25)})
    bundle.manifest = bundle.manifest.model_copy(update={"explain": fitted})
    weighed = measure.predict("misalignment", Runner(bundle), data).arrays
    weight = np.array([[[NAN, 1], [NAN, 1]], [[1, NAN], [(2 - 2 * half) ** 0.5] * 2]])
    assert weighed["contributions"] == pytest.approx(np.array(expected), abs=1e-6, nan_ok=True)
    assert weighed["margins"] == pytest.approx(np.array(expected) - 0.25 * weight, abs=1e-6, nan_ok=True)
    samples.save(folder / "saved.npz")
    again = measure.figures(Samples.load(folder / "saved.npz", "misalignment"), {"threshold": 0.5})
    assert {figure.key: figure.value for figure in again}[WORD, "recall"] == 100


def test_captions_are_exchanged_and_wrong_data_is_one_sentence(folder: Path):
    captions = {"red.png": ["a dog"], "blue.png": ["a cat"]}
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    data = measure.read("misalignment", folder, {"seed": 1})
    assert [*data.captions] == [("a dog", "a cat"), ("a cat", "a dog")]
    assert [path.name for path in data.pictures] == [*captions]
    (folder / "captions.json").write_text(json.dumps({"red.png": ["nothing here"]}), encoding="utf-8")
    with pytest.raises(BadRequest, match=r"no caption of .*captions.json has a noun that can be exchanged"):
        measure.read("misalignment", folder)
    (folder / "captions.json").unlink()
    with pytest.raises(BadRequest, match="holds no captions and no pairs; the data directory must hold captions"):
        measure.read("misalignment", folder)
    (folder / "pairs.jsonl").write_text('{"images": ["red.png"], "captions": ["a b", "b a"]}', encoding="utf-8")
    assert measure.read("misalignment", folder).captions  # a moved word counts as changed
    (folder / "pairs.jsonl").write_text('{"images": ["red.png"], "captions": ["a b", "a"]}', encoding="utf-8")
    with pytest.raises(BadRequest, match=r"none of the 1 pairs .* has one picture and a false caption with another"):
        measure.read("misalignment", folder)
