import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score, roc_curve

from calmclip.models.errors import BadRequest, ExtraMissing
from calmclip.models.evals import corruptions, measure, robustness, robustness_data, tables
from calmclip.models.evals.bootstrap import Resampling
from calmclip.models.evals.corruptions import corrupted, standard
from calmclip.models.evals.samples import Samples
from calmclip.models.evals.scaling import Scaling
from calmclip.models.evals.separation import Separation
from calmclip.models.heads import HEADS
from calmclip.models.runner import open_bundle

COLOURS = ("red", "green", "blue")
QUICK = {"corruptions": ["contrast", "gaussian_noise"], "severities": [1, 5], "prompts": {"bare": ["{}"]}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures of one colour, outliers in two mixed colours, factors, and cue conflicts."""
    folder = tmp_path / "data"
    for name in ("images", "outliers", "cue_conflict"):
        (folder / name).mkdir(parents=True)
    rows = []
    for label, colour in enumerate(COLOURS):
        for number in range(4):
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[..., label] = 255 - 10 * number
            Image.fromarray(pixels).save(folder / "images" / f"{colour}{number}.png")
            rows.append({"file": f"{colour}{number}.png", "label": colour})
    (folder / "labels.json").write_text(json.dumps(rows))
    for number in range(3):
        Image.new("RGB", (40, 30), (200, 190 + number, 0)).save(folder / "outliers" / f"{number}.png")
    (folder / "factors.csv").write_text("file,pose,light\nred0.png,yes,dark\nblue1.png,,bright\ngreen2.png,yes,dark\n")
    conflicts = [(*COLOURS[:2], "red"), ("green", "red", "red"), ("blue", "green", "blue"), ("red", "red", "red")]
    for number, (shape, texture, colour) in enumerate(conflicts):  # a bundle sees the colour: shape, texture, shape
        Image.new("RGB", (8, 8), colour).save(folder / "cue_conflict" / f"{number}.png")
        conflicts[number] = (f"{number}.png", shape, texture)
    lines = [",".join(row) for row in [("file", "shape", "texture"), *conflicts]]
    (folder / "cue_conflict.csv").write_text("\n".join(lines))
    return folder


def made(logits, truth, views=(), severity=(), outliers=(), **arrays) -> Samples:
    """Samples without a bundle; ``views``: the best label of each view of each picture [N, V]."""
    truth, count = np.asarray(truth), len(truth)
    best = np.asarray(views, np.int32).reshape(count, -1)
    logits = np.float32(logits)
    return Samples(
        {"pictures": count + len(outliers) + len(arrays.get("decided", ()))},
        {
            "logits": logits, "truth": truth, "temperature": np.array(1.0), "best": best,
            "score": np.full(best.shape, 0.5, np.float32), "loss": np.full(best.shape, 0.7, np.float32),
            "severity": np.asarray(severity, np.int64), "prompts": np.empty((count, 0), np.int32),
            "outliers": np.float32(outliers).reshape(-1, logits.shape[1]), "factors": np.empty((count, 0), bool),
            **arrays,
        },
        {
            "labels": (), "head": ("cosine",), "prompts": (), "factors": (), "values": (),
            "corruption": ["none" if level == 0 else f"c{place // 2}" for place, level in enumerate(severity)],
        },
    )  # fmt: skip


def figures(samples: Samples, params=None, rows=None) -> dict[tuple[str, str], float]:
    rows = np.arange(samples.count) if rows is None else rows
    return {figure.key: figure.value for figure in robustness.score(samples, params or robustness.Params())(rows)}


def drawn(temperature: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at ``temperature`` drew the truth."""
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (count, 3))
    powers = np.exp(logits / temperature)
    return logits, (draw.random((count, 1)) > (powers / powers.sum(1, keepdims=True)).cumsum(1)).sum(1)


def test_scores_too_sure_by_a_factor_are_calibrated_at_that_temperature():
    samples = made(*drawn(temperature=2.5, count=8_000))
    value_of = figures(samples)
    scaled = "at a temperature fitted on the other half"
    assert value_of[scaled, "temperature"] == pytest.approx(2.5, rel=0.03)
    assert value_of["clean pictures", "calibration error"] > 15
    assert value_of[scaled, "calibration error"] < 2  # the noise of 15 bins
    calibrated = figures(replace(samples, arrays={**samples.arrays, "temperature": np.array(2.5)}))
    assert calibrated["clean pictures", "calibration error"] < 2
    log_likelihood = calibrated["clean pictures", "negative log-likelihood"]
    assert value_of[scaled, "negative log-likelihood"] == pytest.approx(log_likelihood, abs=2e-3)


def by_hand(logits, truth, head: str, right: float, wrong: float) -> np.ndarray:
    """The cross-entropy of each row with the targets ``right`` and ``wrong``."""
    target = np.where(np.eye(3)[truth] == 1, right, wrong)
    if head == "cosine":
        return -(target * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    return (np.logaddexp(0, -logits) * target + np.logaddexp(0, logits) * (1 - target)).sum(1)


@pytest.mark.parametrize("head", ["cosine", "sigmoid"])
def test_each_half_has_the_temperature_of_the_other(head: str):
    """Against scipy's minimum of the loss, on halves, and for a resample; and the loss by hand."""
    logits, truth = drawn(temperature=1.7, count=300)
    logits[:150] *= 2  # so a resample of the first pictures has another temperature
    scaling = Scaling(logits, truth, HEADS.get(head), 15)
    assert all(abs((scaling.half[truth == label] * 2 - 1).sum()) <= 1 for label in range(3))
    for weight in (np.ones(300), np.r_[np.full(150, 3.0), np.zeros(150)]):
        temperatures, loss = [], np.empty(300)
        for half in (0, 1):
            mine = scaling.half == half
            rows, true, count = logits[mine], truth[mine], mine.sum()
            smooth = (count + 1) / (count + 2), 1 / (count + 2) / (2 if head == "cosine" else 1)

            def total(t, rows=rows, true=true, smooth=smooth, times=weight[mine]):
                return times @ by_hand(rows / t, true, head, *smooth)

            best = minimize_scalar(total, bounds=(0.1, 20), method="bounded").x
            temperatures.append(best)
            loss[~mine] = by_hand(logits[~mine] / best, truth[~mine], head, 1, 0)
        scaled = scaling.of(weight)
        assert scaled.temperature == pytest.approx(
            np.sqrt(np.prod(temperatures)), rel=0.013
        )  # the grid's step is 2.3 %
        assert scaled.loss == pytest.approx(weight @ loss / weight.sum(), rel=2e-3)
    assert scaling.best(np.float64(scaling.half == 0)) is None


def test_areas_and_false_positives_are_those_of_scikit_learn():
    draw = np.random.default_rng(1)
    scores = np.concatenate([draw.normal(1, 1, 60), draw.normal(0, 1, 40)]).round(1)  # there are ties
    known = np.arange(100) < 60
    separation = Separation(scores, known)
    for places in (np.arange(100), draw.integers(0, 100, 100)):
        copies = np.bincount(places, minlength=100)
        assert separation.area(copies) == pytest.approx(roc_auc_score(known[places], scores[places]))
        false, true, _ = roc_curve(known[places], scores[places], drop_intermediate=False)
        assert separation.false_positives(copies) == pytest.approx(false[np.argmax(true >= 0.95)])
    ones, half = np.ones(40), np.arange(40) < 20
    assert (Separation(half * 1.0, half).area(ones), Separation(ones, half).area(ones)) == (1.0, 0.5)
    exact = Separation(np.r_[np.arange(20), np.arange(20) - 0.5], half)
    assert exact.false_positives(ones) == 18 / 20  # 19 of 20 reach the score 1, and so do 18 of the others
    assert np.isnan([part(kind * ones) for part in (exact.area, exact.false_positives) for kind in (half, ~half)]).all()


def test_accuracy_under_corruption_by_hand():
    # two pictures; views: none, c0 at 1 and 5, c1 at 1 and 5; the right labels are 0 and 1
    views, severity = [[0, 0, 1, 0, 1], [1, 1, 1, 0, 0]], [0, 1, 5, 1, 5]
    samples = made([[3, 0], [0, 3]], [0, 1], views, severity)
    samples.words["corruption"] = ["none", "c_0", "c_0", "c_1", "c_1"]
    value_of = figures(samples)
    group = "top1 by corruption, mean of severities"
    assert [value_of[group, name] for name in ("none", "c 0", "c 1")] == [100, 75, 25]
    assert [value_of["top1 by severity, mean of corruptions", level] for level in ("1", "5")] == [75, 25]
    group = "corrupted pictures"
    assert (value_of[group, "top1"], value_of[group, "loss"], value_of[group, "relative loss"]) == (50, 50, 50)
    assert value_of[group, "calibration error"] == 0  # every score is .5, and half of the answers are right
    assert value_of[group, "negative log-likelihood"] == pytest.approx(0.7)
    assert figures(samples, rows=np.array([1, 1]))[group, "calibration error"] == 0
    sure = replace(samples, arrays={**samples.arrays, "score": np.full((2, 5), 0.9, np.float32)})
    assert figures(sure)[group, "calibration error"] == pytest.approx(40)
    other = made([[3, 0], [3, 0]], [0, 1], [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], severity)
    both = robustness.together(samples, other, robustness.Params())
    # the first loses 50 points; the second has 50 % without a corruption and 75 % with, so it gains 25
    assert [figure.value for figure in both(np.arange(2))] == [50, 75, 75]
    accuracy, trusted = robustness.plots({"a": samples, "b": other}, robustness.Params())
    assert [(list(line.x), list(line.y)) for line in accuracy.lines] == [
        ([0, 1, 5], [100, 75, 25]), ([0, 1, 5], [50, 75, 75])
    ]  # fmt: skip
    assert [line.label for line in trusted.lines] == ["a", "a, scaled", "b", "b, scaled"]


def test_each_picture_counts_in_its_own_bin_factor_and_weight():
    """Three pictures that differ in everything; by hand, once each, and the first twice beside the third."""
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])  # the best label: wrong, right, right
    samples = made(
        np.log(probabilities), [1, 1, 0], [[1, 0, 0], [1, 1, 0], [0, 0, 0]], [0, 1, 5],
        score=np.float32([[0.1, 0.9, 0.7], [0.1, 0.2, 0.4], [0.1, 0.6, 0.3]]),
        loss=np.float32([[9, 0.1, 0.3], [9, 0.2, 0.6], [9, 0.4, 0.8]]),
        prompts=np.int32([[1, 0], [1, 1], [0, 0]]), factors=np.array([[1, 1, 0], [1, 0, 1], [0, 0, 1]], bool),
    )  # fmt: skip
    samples.words.update(factors=["pose", "light", "light"], values=["yes", "dark", "bright"], prompts=["a", "b"])
    once, again = (figures(samples, robustness.Params(bins=4), rows) for rows in (None, np.array([0, 0, 2])))
    for group, name, expected, of_resample in [
        # score minus right by bin: .6 - 1 + .7 - 1 and .9
        ("clean pictures", "calibration error", (0.7 + 0.9) / 3, (0.3 + 1.8) / 3),
        ("clean pictures", "top1", 2 / 3, 1 / 3),
        # by bin: .2 - 1, then .4 + .3 - 1, then .7 + .6 - 1, then .9
        ("corrupted pictures", "calibration error", (0.8 + 0.3 + 0.3 + 0.9) / 6, (0.7 + 1.0 + 1.8) / 6),
        ("top1 by pose", "yes", 1 / 2, 0),
        ("top1 by light", "dark", 0, 0),
        ("top1 by light", "bright", 1, 1),
        ("top1 by prompts", "a", 1, 1),
        ("top1 by prompts", "b", 2 / 3, 1 / 3),
        ("top1 by prompts", "best minus worst", 1 / 3, 2 / 3),
    ]:
        assert once[group, name] == pytest.approx(100 * expected), (group, name)
        assert again[group, name] == pytest.approx(100 * of_resample), (group, name)
    key = "corrupted pictures", "negative log-likelihood"
    assert (once[key], again[key]) == (pytest.approx((0.2 + 0.4 + 0.6) / 3), pytest.approx((0.2 + 0.2 + 0.6) / 3))


@pytest.mark.parametrize(
    ("head", "logit", "losses"),
    [
        ("cosine", np.log, [[0.5, 0.2], [0.3, 0.1]]),
        (
            "sigmoid",
            lambda p: np.log(p / (1 - p)),
            [[0.8 * 0.5 * 0.7, 0.3 * 0.2 * 0.5], [0.4 * 0.9 * 0.3, 0.5 * 0.6 * 0.1]],
        ),
    ],
)
def test_a_view_keeps_its_best_label_its_score_and_the_loss_of_the_truth(head: str, logit, losses):
    """The likelihood of the truth, by hand from scores at a temperature of 2."""
    scores = np.array([[[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]], [[0.6, 0.1, 0.3], [0.5, 0.4, 0.1]]])
    if head == "sigmoid":
        scores[0, 1] = [0.7, 0.2, 0.5]
    seen = [robustness.Seen(np.zeros(3), np.float32([[1, 0, 2]]), 2 * logit(views)) for views in scores]
    rows = [*robustness._reduced(seen, [1, 2], HEADS.get(head), 2.0)]
    assert [list(row["best"]) for row in rows] == [[1, 0], [0, 0]]
    assert [list(row["prompts"]) for row in rows] == [[2], [2]]
    np.testing.assert_allclose([row["score"] for row in rows], scores.max(axis=2), rtol=1e-6)
    np.testing.assert_allclose(np.exp([-row["loss"] for row in rows]), losses, rtol=1e-5)


def test_every_figure_of_a_bundle_whose_answers_are_known(sealed: Path, data: Path):
    """The bundle sees the mean colour, so contrast and noise change no answer, and shapes do not exist for it."""
    pictures = measure.read("robustness", data, QUICK)
    assert pictures.factors == {"pose": {"yes": [0, 6]}, "light": {"bright": [9], "dark": [0, 6]}}
    runner = open_bundle(sealed)
    samples = measure.predict("robustness", runner, pictures, QUICK)
    assert dict(samples.counts) == {
        "pictures": 18, "labelled": 12, "outliers": 3, "cue conflicts": 3, "labels": 3, "corrupted": 48
    }  # fmt: skip
    table = tables.tabulate([samples, samples], how=Resampling(resamples=10))
    value = {row.figure.key: row.figure.value for row in table.rows}
    assert value["clean pictures", "top1"] == value["top1 by prompts", "bare"] == 100
    # cosines 1, 0, 0 at a scale of 2
    assert value["clean pictures", "negative log-likelihood"] == pytest.approx(np.log(1 + 2 / np.e**2), rel=1e-4)
    assert value["corrupted pictures", "loss"] == 0 == table.together[-1].value
    # an outlier's cosines are .72, .69, 0: it is less sure than every picture
    assert (value["outliers", "AUROC"], value["outliers", "FPR@95"]) == (1, 0)
    assert value["cue conflicts", "shape bias"] == pytest.approx(200 / 3)
    assert value["cue conflicts", "shape or texture"] == 100
    assert {key for key in value if key[0].startswith("top1 by light")} == {
        ("top1 by light", "bright"), ("top1 by light", "dark")
    }  # fmt: skip
    assert {row.difference.value for row in table.rows} == {0}
    again = measure.predict("robustness", runner, measure.read("robustness", data, QUICK), QUICK)
    assert all(np.array_equal(again.arrays[name], array) for name, array in samples.arrays.items())
    samples.save(saved := data / "samples.npz")
    assert measure.named(Samples.load(saved)) == measure.named(samples)
    with pytest.raises(BadRequest, match="measure again"):
        measure.figures(samples, {"severities": [1]})


def test_a_limit_takes_pictures_of_every_label_and_folders_are_classes(data: Path):
    few = robustness_data.read(data, 3)
    assert [few.labels[label] for label in few.truth] == ["red", "green", "blue"]
    assert (len(few.outliers), len(few.conflicts.pictures)) == (3, 3)
    assert few.factors == {"pose": {"yes": [0]}, "light": {"dark": [0]}}
    assert robustness_data.balanced([0, 0, 0, 1, 2, 1], 4) == [0, 1, 3, 4]
    (data / "factors.csv").write_text("file,factor\nred0.png,pose\nred0.png,blur\nred1.png,pose\n")
    assert robustness_data.read(data).factors == {"pose": {"yes": [0, 1]}, "blur": {"yes": [0]}}
    (data / "cue_conflict.csv").unlink()
    (data / "cue_conflict.json").write_text('[{"file": "0.png", "shape": "a", "texture": "b"}]')
    assert robustness_data.read(data).conflicts.labels == ["a", "b"]
    for colour in COLOURS:
        (data / colour).mkdir()
        (data / "images" / f"{colour}0.png").rename(data / colour / "x.png")
    for name in ("labels.json", "factors.csv"):
        (data / name).unlink()
    folders = robustness_data.read(data)
    assert (folders.labels, list(folders.truth)) == (["blue", "green", "red"], [0, 1, 2])


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("factors.csv", "file,pose\nblack.png,yes\n", r"line 2, column 'file': 'black\.png'; expected a file of the"),
        ("factors.csv", "file\nred0.png\n", "has no factor"),
        ("factors.csv", "picture,pose\nred0.png,yes\n", "no column 'file'"),
        ("cue_conflict.json", '[{"file": "0.png", "shape": "red"}]', "lacks a file, a shape or a texture in"),
        ("cue_conflict.json", '{"0.png": "red"}', "lacks a file, a shape or a texture in"),
        ("cue_conflict.json", '[{"file": "0.png", "shape": "a", "texture": "a"}]', "another texture"),
        ("labels.json", '[{"file": "red0.png", "label": "red"}]', "at least 2 labels"),
        ("labels.json", "[]", r"optional: outliers/"),
    ],
)
def test_a_wrong_file_is_one_sentence(data: Path, file: str, content: str, says: str):
    if file == "labels.json":
        (data / "factors.csv").unlink()
    (data / file).write_text(content)
    with pytest.raises(BadRequest, match=says) as refused:
        robustness_data.read(data)
    assert str(data) in str(refused.value) or "labels" in str(refused.value)


@pytest.mark.parametrize(
    "params", [{"corruptions": ["rain"]}, {"severities": [6]}, {"severities": [1, 1]}, {"prompts": {"a": []}}]
)
def test_params_that_are_no_corruption_are_refused(params):
    with pytest.raises(BadRequest, match="params of robustness"):
        measure.params_of("robustness", params)


def test_without_the_library_only_corruptions_are_refused(data: Path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ExtraMissing, match=r"'imagecorruptions', which is not installed; .*eval"):
        measure.read("robustness", data)
    assert measure.read("robustness", data, {"corruptions": []}).labels == ["blue", "green", "red"]


def test_corruptions_by_their_formulas(photographs: dict[str, Path]):
    import io

    from skimage.color import hsv2rgb, rgb2hsv
    from skimage.util import random_noise

    pixels = standard(Image.open(photographs["cat"]).convert("RGB"))
    assert standard(Image.new("RGB", (64, 32))).shape == (224, 448, 3)
    x = pixels / 255
    brighter = rgb2hsv(x)
    brighter[..., 2] = np.clip(brighter[..., 2] + 0.3, 0, 1)
    mean = x.mean((0, 1), keepdims=True)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=15)
    by_hand = {
        "brightness": hsv2rgb(brighter) * 255,
        "contrast": ((x - mean) * 0.2 + mean) * 255,
        "jpeg_compression": np.array(Image.open(file)),
    }
    for name, expected in by_hand.items():
        assert np.abs(corrupted(pixels, name, 3).astype(float) - expected).max() <= 1.01, name
    noise = corrupted(np.full((224, 224, 3), 128, np.uint8), "gaussian_noise", 1) / 255
    assert noise.std() == pytest.approx(0.08, rel=0.02)
    salted = corrupted(pixels, "impulse_noise", 5)
    assert (salted != pixels).mean() == pytest.approx(
        (random_noise(x, "s&p", rng=0, amount=0.27) != x).mean(), rel=0.05
    )


def _distances(pixels: np.ndarray, name: str) -> list[float]:
    return [float(np.square(corrupted(pixels, name, s).astype(float) - pixels).mean()) for s in corruptions.SEVERITIES]


def _holds(name: str, pixels: np.ndarray) -> None:
    """The same pixels whatever numpy's global generator did, which it leaves as it was; another seed, another noise."""
    np.random.seed(0)
    before, first = np.random.get_state()[1].copy(), corrupted(pixels, name, 2, seed=4)
    assert np.array_equal(before, np.random.get_state()[1])
    np.random.seed(1)
    assert np.array_equal(first, corrupted(pixels, name, 2, seed=4))
    assert (first.shape, first.dtype) == (pixels.shape, np.uint8)
    other = corrupted(pixels, name, 2, seed=5)
    assert np.array_equal(first, other) == (name in FIXED)


FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
# in the severities of the paper frost grows whiter and less blended: see its code's constants
RISING = [name for name in corruptions.NAMES if name not in ("glass_blur", "zoom_blur", "frost", "snow", "fog")]


def test_quick_corruptions_repeat_and_grow_with_severity(photographs: dict[str, Path]):
    pixels = standard(Image.open(photographs["cat"]).convert("RGB"))
    for name in ("gaussian_noise", "impulse_noise", "defocus_blur", "contrast", "pixelate", "jpeg_compression"):
        _holds(name, pixels)
        assert (np.diff(_distances(pixels, name)) > 0).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", corruptions.NAMES)
def test_all_corruptions_repeat_take_any_size_and_grow(name: str, photographs: dict[str, Path]):
    draw = np.random.default_rng(0)
    for size in ((32, 32), (9, 40), (300, 224)):
        _holds(name, standard(Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8))))
    pixels = standard(Image.open(photographs["cat"]).convert("RGB"))
    distances = _distances(pixels, name)
    assert min(distances) > 0
    if name in RISING:
        assert (np.diff(distances) > 0).all(), distances
