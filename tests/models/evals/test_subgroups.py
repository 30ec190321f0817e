import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import logit, softmax
from scipy.stats import norm
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, ExtraMissing
from calmclip.models.evals import bootstrap, grouped, measure, page, predictability, subgroups, tables
from calmclip.models.evals.bootstrap import Resampling
from calmclip.models.evals.samples import Origin, Samples
from calmclip.models.runner import open_bundle

TABLE = """file,cat,dog,sex,age,mark
a.png,1,0,F,17.9,1
b.png,0,1.0,M,18,
c.png,,0,,24.9,0
d.png,0,0,F,25,0
e.png,1,0,M,80,1
f.png,1,1,F,,0
"""


def folder(tmp_path: Path, text: str = TABLE) -> Path:
    (tmp_path / "groups.csv").write_text(text)
    return tmp_path


def asked(**params):
    return subgroups.Params(**{"labels": ["cat", "dog"], "group_by": ["sex", "age"], "minimum": 1, **params})


def test_a_table_becomes_findings_groups_and_bins(tmp_path: Path):
    data = subgroups.read(folder(tmp_path), asked(shortcut=["cat", "mark"]))
    assert data.pictures[1] == tmp_path / "images" / "b.png"
    assert data.truth.tolist() == [[1, 0], [0, 1], [-1, 0], [0, 0], [1, 0], [1, 1]]
    assert data.groups == {
        "sex": ["F", "M"], "age": ["[18, 25)", "[25, 50)", "[50, 65)", "[65, 80)", "[80, inf)"],
    }  # fmt: skip
    assert data.members.T.tolist() == [[0, 1, -1, 0, 1, 0], [-1, 0, 0, 1, 4, -1]]
    assert data.shortcut.tolist() == [1, -1, 0, 0, 1, 0]
    part = subgroups.read(tmp_path, asked(), 3)
    rows = [data.pictures.index(picture) for picture in part.pictures]
    assert rows == sorted(rows)
    assert part.truth.tolist() == data.truth[rows].tolist()
    assert {*subgroups.read(tmp_path, asked(seed=8), 3).pictures} != {*part.pictures}


def test_the_classes_of_one_column_exclude_each_other(tmp_path: Path):
    text = "file,label,site\na.png,cat,x\nb.png,dog,y\nc.png,,y\nd.png,ant,x\n"
    data = grouped.read(folder(tmp_path, text), grouped.Columns(group_by=("site",)))
    assert (data.labels, data.exclusive) == (["ant", "cat", "dog"], True)
    assert data.truth.tolist() == [[0, 1, 0], [0, 0, 1], [-1, -1, -1], [1, 0, 0]]


WRONG = [
    (TABLE.replace("sex", "gender"), {}, r"line 1: there is no column 'sex' in .* must hold groups\.csv"),
    (TABLE.replace("1.0", "-1"), {}, r"line 3, column 'dog': '-1'; expected 1, 0 or nothing"),
    (TABLE.replace("24.9", "young"), {}, r"line 4, column 'age': 'young'; expected a number"),
    (TABLE.replace("24.9", "nan"), {}, r"line 4, column 'age': 'nan'; expected a number"),
    (TABLE.replace("b.png", "a.png"), {}, r"line 3, column 'file': 'a.png'; expected the name of a picture, once"),
    (TABLE, {"group_by": []}, r"group_by is empty; expected .* which has \['sex', 'age', 'mark'\]"),
    (TABLE, {"labels": []}, "there is no column 'label' in"),
    (TABLE, {"bins": {"age": [100]}}, "column 'age', has no picture in a group"),
    (TABLE, {"minimum": 3}, r"no label has 3 pictures with it and 3 without it .*: cat 2, dog 2\)"),
    ("file,label,g\na,x,1\nb,x,2\n", {"labels": [], "group_by": ["g"]}, r"has the classes \['x'\]; expected two"),
    ("file,cat,id\n" + "".join(f"{i},1,{i}\n" for i in range(201)), {"labels": ["cat"], "group_by": ["id"]},
     "has 201 groups; expected at most 200. Numbers need bins"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "params", "says"), WRONG)
def test_a_wrong_data_set_is_one_sentence(tmp_path: Path, text: str, params, says: str):
    with pytest.raises(BadRequest, match=says):
        subgroups.read(folder(tmp_path, text), asked(**params))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"bins": {"age": [25, 18]}}, r"bins of 'age' are \[25.0, 18.0\]; expected rising numbers"),
        ({"labels": ["a", "a"]}, "labels are .* expected different names"),
        ({"labels": ["a"], "shortcut": ["b", "c"]}, r"shortcut is of 'b'; expected one of the labels \['a'\]"),
        ({"positive": ["Chest"]}, "'Chest' has no {label}"),
    ],
)
def test_wrong_params_are_refused(params, says: str):
    with pytest.raises(BadRequest, match=says):
        measure.params_of("subgroups", params)


def drawn(seed: int, shifts, *, count=900, labels=("x",), **params) -> Samples:
    """Margins of positives are normal with the group's shift, those of negatives standard normal."""
    draw = np.random.default_rng(seed)
    group = draw.integers(0, len(shifts), count)
    truth = draw.random((count, len(labels))) < 0.35
    margins = draw.normal(size=truth.shape) + truth * np.array(shifts)[group][:, None]
    checked = subgroups.Params(labels=labels, group_by=("g",), **{"probe": 0, **params})
    origin = Origin(
        eval="subgroups", bundle="b", digest="0" * 64, data="d", params=checked.model_dump(mode="json")
    )  # fmt: skip
    arrays = {
        "margins": margins.astype(np.float32), "truth": truth.astype(np.int8),
        "members": group[:, None].astype(np.int16), "vectors": draw.normal(size=(count, 12)).astype(np.float32),
    }  # fmt: skip
    names = tuple("abcdefgh"[: len(shifts)])
    return Samples({"pictures": count}, arrays, {"labels": labels, "columns": ("g",), "groups of g": names}, origin)


def values(samples: Samples, rows=None, **params) -> dict[tuple[str, str], float]:
    checked = measure.rescored(samples, params)
    rows = np.arange(samples.count) if rows is None else rows
    return {figure.key: figure.value for figure in subgroups.score(samples, checked)(rows)}


def test_figures_of_a_resample_are_scikit_learns_on_the_drawn_pictures():
    samples = drawn(1, (1.5, 0.2, 1.0), labels=("x", "y"), count=400)
    samples.arrays["truth"][::7, 1] = -1  # unknown: left out of the figures of y alone
    samples.arrays["members"][::5] = -1
    rows = np.random.default_rng(2).integers(0, 400, 400)
    figures = values(samples, rows, by_label=True)
    truth, margins = samples.arrays["truth"][rows], samples.arrays["margins"][rows]
    group = samples.arrays["members"][rows, 0]
    gaps = []
    for number, name in enumerate("abc"):
        each = []
        for label, text in enumerate("xy"):
            known = truth[:, label] >= 0
            inside, rest = known & (group == number), known & (group >= 0) & (group != number)
            auroc, other = (roc_auc_score(truth[part, label], margins[part, label]) for part in (inside, rest))
            precision = average_precision_score(truth[inside, label], margins[inside, label])
            corrected = 1 - np.log(precision) / np.log(truth[inside, label].mean())
            key = f"g = {name}"
            assert figures[key, f"AUROC {text}"] == pytest.approx(auroc, abs=1e-9)
            assert figures[key, f"AUPRC {text}"] == pytest.approx(precision, abs=1e-9)
            assert figures[key, f"adjusted AUPRC {text}"] == pytest.approx(corrected, abs=1e-9)
            assert figures[key, f"gap of AUROC {text}"] == pytest.approx(auroc - other, abs=1e-9)
            each.append([auroc, precision, corrected, auroc - other])
        names = ("mean AUROC", "mean AUPRC", "mean adjusted AUPRC", "gap of AUROC")
        assert [figures[key, each] for each in names] == pytest.approx(np.mean(each, axis=0).tolist(), abs=1e-9)
        gaps.append(figures[key, "gap of AUROC"])
    assert figures["g", "worst gap of AUROC"] == min(gaps) == gaps[1]
    every = roc_auc_score(truth[:, 0], margins[:, 0])
    assert figures["", "AUROC x"] == pytest.approx(every, abs=1e-9)
    assert figures["g", "left out, no group"] == 80


def test_small_groups_are_named_and_left_out():
    samples = drawn(1, (1.0, 1.0, 1.0), labels=("x", "y"), count=400)
    members, truth = samples.arrays["members"], samples.arrays["truth"]
    members[truth[:, 1] == 1] = 0  # y is in group a alone, so a gap needs x
    figures = values(samples)
    small = int((members[:, 0] == 2).sum())
    assert figures["g = c", "pictures"] == small
    assert figures["g = c", "left out, too few: y"] == 0
    assert figures["g = a", "gap of AUROC"] == values(samples, by_label=True)["g = a", "gap of AUROC x"]
    few = values(samples, minimum=100)
    assert few["g = c", "left out, too few: x"] == (truth[members[:, 0] == 2, 0] == 1).sum()
    assert ("g = c", "mean AUROC") not in few
    with pytest.raises(BadRequest, match="no label has 390 pictures with it"):
        values(samples, minimum=390)


def test_the_shortcut_is_scored_against_the_healthy():
    samples = drawn(3, (0.5,), labels=("x", "y"))
    truth, margins = samples.arrays["truth"], samples.arrays["margins"]
    marks = np.random.default_rng(4).integers(-1, 2, len(truth)).astype(np.int8)
    margins[(marks == 1) & (truth[:, 0] == 1), 0] += 2  # the mark helps
    changed = {"shortcut": marks}
    marked = Samples(
        samples.counts, {**samples.arrays, **changed}, {**samples.words, "shortcut": ("x", "m")}, samples.origin
    )
    figures = values(marked)
    healthy = (truth == 0).all(axis=1)
    expected = {}
    for name, mark in (("with", 1), ("without", 0)):
        part = healthy | ((truth[:, 0] == 1) & (marks == mark))
        expected[name] = roc_auc_score(truth[part, 0], margins[part, 0])
        assert figures["shortcut m for x", f"AUROC {name} m"] == pytest.approx(expected[name])
    gap = figures["shortcut m for x", "AUROC difference"]
    assert gap == pytest.approx(expected["with"] - expected["without"])
    assert gap > 0.25
    assert figures["shortcut m for x", "healthy"] == healthy.sum()
    assert figures["shortcut m for x", "with m"] == ((truth[:, 0] == 1) & (marks == 1)).sum()
    rare = np.where(np.cumsum(marks == 1) > 5, -1, marks)
    changed["shortcut"] = rare.astype(np.int8)
    few = values(Samples(marked.counts, {**marked.arrays, **changed}, marked.words, marked.origin))
    assert few["shortcut m for x", "left out, too few: with m"] <= 5
    assert ("shortcut m for x", "AUROC difference") not in few


def test_a_probe_finds_a_group_that_two_principal_components_hide():
    samples = drawn(5, (1.0, 1.0), count=400)
    vectors, group = samples.arrays["vectors"], samples.arrays["members"][:, 0]
    null = values(samples, probe=400)
    assert null["g", "probe AUROC"] == pytest.approx(0.5, abs=0.1)
    vectors[:, 5] = 0.3 * vectors[:, 5] + group  # a column with less variance than the first two
    vectors[:, :2] *= 5
    figures = values(samples, probe=400)
    expected = roc_auc_score(group, vectors[:, 5])
    assert figures["g", "probe AUROC"] == pytest.approx(expected, abs=0.02)
    assert expected > 0.98
    assert figures["g", "probe AUROC, 2 principal components"] == pytest.approx(0.5, abs=0.1)
    sizes = np.linalg.eigvalsh(np.cov(vectors.T.astype(float)))
    assert figures["g", "variance in 2 principal components"] == pytest.approx(100 * sizes[-2:].sum() / sizes.sum())
    assert figures["g", "balanced accuracy by chance"] == 50.0
    answers = predictability.probed(vectors, np.arange(400), group.astype(int), 0)
    rows = np.random.default_rng(6).integers(0, 400, 400)
    right = balanced_accuracy_score(group[rows], answers.logits.argmax(axis=1)[rows])
    assert values(samples, rows, probe=400)["g", "probe balanced accuracy"] == pytest.approx(100 * right)


def test_a_probe_of_many_groups_is_the_mean_of_one_against_the_others(monkeypatch):
    samples = drawn(5, (1.0, 1.0, 1.0, 1.0), count=200)
    group = samples.arrays["members"][:, 0]
    group[np.flatnonzero(group == 3)[3:]] = -1  # three pictures are too few for five folds
    samples.arrays["vectors"][:, 0] += group
    figures = values(samples, probe=150, seed=0)
    places = np.sort(np.random.default_rng(0).permutation(200)[:150])
    places = places[(group[places] >= 0) & (group[places] < 3)]
    answers = predictability.probed(samples.arrays["vectors"][places], places, group[places].astype(int), 0)
    each = [roc_auc_score(group[places] == number, answers.logits[:, number]) for number in range(3)]
    assert figures["g", "probe AUROC"] == pytest.approx(np.mean(each))
    assert 1 <= figures["g", "left out of the probe, too few: d"] <= 3
    monkeypatch.setattr(predictability, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"--param probe=0 leaves it out.* 'scikit-learn'"):
        values(samples, probe=150)


def test_agreement_is_the_part_of_labels_on_the_same_side_of_one_half():
    first, second = drawn(1, (1.0, 1.0), count=100), drawn(1, (1.0, 1.0), count=100)
    group = second.arrays["members"][:, 0]
    second.arrays["margins"][np.flatnonzero(group == 1)[:10]] *= -1
    together = subgroups.together(first, second, subgroups.Params())(np.arange(100))
    figures = {figure.group: figure.value for figure in together}
    assert figures == pytest.approx({"": 90.0, "g = a": 100.0, "g = b": 100 * (1 - 10 / (group == 1).sum())})


def test_the_interval_of_the_least_is_that_of_the_studentized_maximum():
    data = np.random.default_rng(0).normal([0, 0.1, 2], [1, 3, 1], (80, 3))
    drawn_means = []

    def statistic(rows):
        means = data[rows].mean(axis=0)
        drawn_means.append(means)
        return np.array([*means, means.min()])

    how = Resampling(resamples=300)
    low, high = bootstrap.intervals(statistic, 80, how, {3: [0, 1, 2]})
    resamples, center = np.array(drawn_means[:300]), data.mean(axis=0)
    errors = resamples.std(axis=0, ddof=1)
    largest = sorted(max(abs(row[k] - center[k]) / errors[k] for k in range(3)) for row in resamples)
    width = np.quantile(largest, 0.95)
    assert (low[3], high[3]) == pytest.approx((min(center - width * errors), min(center + width * errors)))
    assert low[3] < low[:3].min()  # wider than that of the least alone
    plain = bootstrap.intervals(statistic, 80, how)
    assert (low[:3].tolist(), high[:3].tolist()) == (plain[0][:3].tolist(), plain[1][:3].tolist())


def test_the_table_has_both_sides_and_facts_have_no_interval():
    sides = [drawn(1, (2.0, 0.3), count=300), drawn(1, (2.0, 0.3), count=300)]
    sides[1].arrays["margins"][:] += 0.1 * np.random.default_rng(9).normal(size=(300, 1))
    table = tables.tabulate(sides, how=Resampling(resamples=60))
    rows = {row.figure.key: row for row in table.rows}
    count = rows["g = a", "pictures"]
    assert (count.difference, count.figure.lower) == (None, None)
    worst = rows["g", "worst gap of AUROC"]
    single = rows["g = b", "gap of AUROC"]
    assert worst.figure.value == single.figure.value < -0.2
    assert worst.figure.upper < 0  # found
    assert worst.difference.lower <= worst.difference.value <= worst.difference.upper
    alone = tables.tabulate(sides[1:], how=Resampling(resamples=60))
    (same,) = (row.figure for row in alone.rows if row.figure.key == worst.figure.key)
    assert worst.values[1] == same  # each side has the interval of its own gaps
    lines = [line.split() for line in tables.text(table).splitlines()]
    assert "worst: the least of many figures is low by chance" in tables.text(table)
    assert ["pictures", "pictures", *[f"{count.figure.value:.0f}"] * 2] in lines
    html = page.html(table, sides)
    for text in ("AUROC by group", "g = a", "g = b", "principal components"):
        assert text in html
    (plot,) = subgroups.plots({"one": sides[0]}, subgroups.Params(group_by=("g",), labels=("x",)))
    assert plot.names == ["all", "g = a", "g = b"]
    (line,) = plot.lines
    assert line.y[2] == rows["g = b", "mean AUROC"].values[0].value
    assert (line.lower < line.y).all()
    assert (line.upper > line.y).all()


def test_a_run_on_a_bundle(sealed: Path, tmp_path: Path, capsys):
    # the vector of a picture is its mean colour, that of a text the sum of its colour words; the scale is 2
    (tmp_path / "images").mkdir()
    lines = ["file,red,green,blue,size"]
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "both": (200, 200, 0), "blue": (0, 0, 255)}
    for number in range(12):
        name = [*colours][number % 4]
        Image.new("RGB", (8, 8), colours[name]).save(tmp_path / "images" / f"{number}.png")
        shown = [name in ("red", "both"), name in ("green", "both"), name == "blue"]
        lines.append(",".join([f"{number}.png", *(str(int(each)) for each in shown), str(number // 6)]))
    folder(tmp_path, "\n".join(lines))
    params = {"labels": ["red", "green", "blue"], "positive": ["{label}"], "negative": ["blue"], "group_by": ["size"],
              "minimum": 2, "probe": 0}  # fmt: skip
    data = measure.read("subgroups", tmp_path, params)
    answers = measure.predict("subgroups", open_bundle(sealed), data, params)
    half = 2**-0.5
    cosines = np.array([[1, 0, 0], [0, 1, 0], [half, half, 0], [0, 0, 1]])  # of red, green and blue
    expected = 2 * (cosines - cosines[:, 2:])
    assert answers.arrays["margins"] == pytest.approx(np.tile(expected, (3, 1)), abs=1e-5)
    named = measure.named(answers)
    assert [named[f"AUROC {label}"] for label in ("red", "green", "blue")] == [1.0, 1.0, 0.5]
    (tmp_path / "p.json").write_text(json.dumps(params | {"negative": []}))
    run = ["eval", "colours", "subgroups", "--bundles", str(sealed.parent), "--data", str(tmp_path)]
    saved = tmp_path / "s" / "colours.subgroups.npz"
    assert main([*run, "--params", str(tmp_path / "p.json"), "--param", "minimum=3", "--save", str(saved.parent)]) == 0
    assert "size = 0" in capsys.readouterr().out
    assert Samples.load(saved).made.params["minimum"] == 3
    margins = Samples.load(saved).arrays["margins"]
    probabilities = softmax(2 * cosines, axis=1)  # without a negative prompt the labels exclude each other
    assert margins == pytest.approx(np.tile(logit(probabilities), (3, 1)), abs=1e-5)
    assert main([*run, "--params", "brain_mri"]) == 2
    assert "expected a JSON file of params, or one of the recipes chest_xray" in capsys.readouterr().err
    assert main([*run, "--params", "chest_xray"]) == 2
    assert "there is no column 'Atelectasis' in" in capsys.readouterr().err


def test_the_recipe_of_the_chest_study_has_its_labels_prompts_and_bins():
    file = Path(subgroups.__file__).parent / "recipes" / "chest_xray.json"
    params = measure.params_of("subgroups", json.loads(file.read_text()))
    assert params.labels == (
        "Atelectasis", "Cardiomegaly", "Consolidation", "Pleural Effusion", "Pneumonia", "Pneumothorax",
    )  # fmt: skip
    assert (params.positive, params.negative) == (("Chest {label}",), ("Chest No findings",))
    assert params.bins == {"age": (18, 25, 50, 65, 80)}


@pytest.mark.slow
@pytest.mark.parametrize("shifts", [(1.5, 1.5, 0.6), (1.2, 1.2, 1.2)], ids=["planted", "null"])
def test_intervals_of_gaps_hold_the_true_gap_in_a_thousand_simulations(shifts):
    """AUROC of a group: Phi(shift / sqrt 2); of the other groups together: their mean, for equal negatives."""
    areas = norm.cdf(np.array(shifts) / np.sqrt(2))
    true = [area - np.delete(areas, place).mean() for place, area in enumerate(areas)]
    hits, below, covered, worst_below = np.zeros(3), np.zeros(3), 0, 0
    for seed in range(1000):
        table = tables.tabulate([drawn(seed, shifts)], how=Resampling(resamples=300, seed=seed))
        rows = {row.figure.key: row.figure for row in table.rows}
        gaps = [rows[f"g = {name}", "gap of AUROC"] for name in "abc"]
        hits += [gap.lower <= value <= gap.upper for gap, value in zip(gaps, true, strict=True)]
        below += [gap.upper < 0 for gap in gaps]
        worst = rows["g", "worst gap of AUROC"]
        covered += worst.lower <= min(true) <= worst.upper
        worst_below += worst.upper < 0
    assert ((hits / 1000 >= 0.925) & (hits / 1000 <= 0.97)).all(), hits
    assert covered / 1000 >= 0.925, covered
    planted = min(shifts) < max(shifts)
    assert (worst_below >= 950) if planted else (worst_below <= 50), worst_below
    assert below[2] >= 950 if planted else (below <= 50).all(), below
