"""The parts that all evals share: intervals, files, tables, a page, the verb. The eval is one of another package."""

import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, page, tables
from calmclip.models.evals.bootstrap import Resampling
from calmclip.models.evals.samples import Origin, Samples, fingerprint

ROOT = Path(__file__).parents[3]
HOW = Resampling(resamples=200, seed=7)
TOY = '''
"""Toy: how often a text is long. Source: none. Data: texts.txt, one a line."""
import numpy as np
from calmclip.models.evals import EVALS, Eval, Figure, Line, Plot, Samples
from calmclip.models.bundle.manifest import FrozenModel

class Params(FrozenModel):
    long: int = 3
    scale: float = 100.0

def read(data, params, limit):
    return tuple((data / "texts.txt").read_text().split()[:limit])

def predict(runner, data, params):
    lengths = [len(text) + len(runner.bundle.name) % 2 for text in data]
    return Samples({"texts": len(data)}, {"hit": np.array(lengths) >= params.long})

def score(samples, params):
    hit = samples.arrays["hit"]
    return lambda rows: [
        Figure("long", params.scale * hit[rows].mean(), "%"),
        Figure("odds <b>", hit[rows].sum() / (~hit[rows]).sum() if (~hit[rows]).any() else np.nan, group="of <two>"),
    ]

def together(samples, others, params):
    same = samples.arrays["hit"] == others.arrays["hit"]
    return lambda rows: [Figure("agreement", 100 * same[rows].mean(), "%")]

def plots(sides, params):
    lines = [Line(name, [0, 1], [s.arrays["hit"].mean()] * 2) for name, s in sides.items()]
    return [Plot("Shares", "x & y", "part", [*lines, Line("bars", [0, 1], [0.1, 0.2], "bars")], "Says so.")]

EVALS.register("toy")(Eval("embed", "texts.txt", Params, read, predict, score, together, plots, frozenset({"scale"})))
'''


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch):
    EVALS.load()
    for part in ("_plugins", "_homes"):
        monkeypatch.setattr(EVALS, part, dict(getattr(EVALS, part)))
    exec(compile(TOY, "toy.py", "exec"), {"__name__": __name__})


def side(bundle: str, hit, data: str = "d") -> Samples:
    origin = Origin(eval="toy", bundle=bundle, digest="0" * 64, data=data, params={})
    return Samples({"texts": len(hit)}, {"hit": np.array(hit, bool), "scalar": np.array(1.0)}, {}, origin)


@pytest.fixture
def two() -> list[Samples]:
    draw = np.random.default_rng(1)
    return [side("a-int8", draw.random(60) < 0.7), side("a-float", draw.random(60) < 0.8)]


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_intervals_are_those_of_scipys_paired_bootstrap(two, method: str):
    a, b = (samples.arrays["hit"] for samples in two)
    table = tables.tabulate(two, how=HOW.model_copy(update={"method": method}))

    def by_hand(statistic, *data):
        rng = np.random.default_rng(7)
        bootstrap = scipy.stats.bootstrap(data, statistic, paired=True, n_resamples=200, method=method, rng=rng)
        return pytest.approx(bootstrap.confidence_interval)

    first = table.rows[0]
    assert first.difference.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert (first.difference.lower, first.difference.upper) == by_hand(
        lambda x, y, axis: 100 * x.mean(axis) - 100 * y.mean(axis), a, b
    )
    assert (first.values[1].lower, first.values[1].upper) == by_hand(lambda y, axis: 100 * y.mean(axis), b)
    (agreement,) = table.together
    assert (agreement.lower, agreement.upper) == by_hand(lambda same, axis: 100 * same.mean(axis), a == b)


def test_resamples_without_a_value_are_skipped_and_a_constant_figure_has_a_point_as_interval():
    # one of two texts is long: a resample has two short, two long, or one of each; only the last has odds: 1
    odds = tables.tabulate([side("a", [True, False])], how=HOW)
    row = odds.rows[1].figure
    assert (row.value, row.lower, row.upper) == (1.0, 0.0, 1.0)
    cells = ["odds <b>", " " * len("unit"), "1".rjust(len("50.00")), "[0, 1]".rjust(len("[0.00, 100.00]"))]
    assert tables.text(odds).splitlines()[4] == "  ".join(cells)
    constant = tables.tabulate([side("a", [True, True, True])], how=HOW)
    assert (constant.rows[0].figure.lower, constant.rows[0].figure.upper) == (100.0, 100.0)
    assert constant.rows[1].figure.lower is None
    assert constant.as_json()["figures"][1]["values"]["a"] == {"value": None, "lower": None, "upper": None}
    assert tables.tabulate([side("a", [True])]).notes == ("no intervals: the data set has 1 of texts",)


def test_samples_read_back_give_the_same_table_and_damaged_ones_are_refused_by_name(two, tmp_path: Path, capsys):
    files = [tmp_path / "new" / f"{samples.made.bundle}.npz" for samples in two]
    for samples, file in zip(two, files, strict=True):
        samples.save(file)
    assert [path.name for path in sorted(files[0].parent.iterdir())] == ["a-float.npz", "a-int8.npz"]
    assert np.load(files[0])["hit"].tolist() == two[0].arrays["hit"].tolist()
    assert np.load(files[0])["scalar"].shape == ()
    back = [Samples.load(file, "toy") for file in files]
    assert tables.tabulate(back, how=HOW) == tables.tabulate(two, how=HOW)
    with pytest.raises(BadRequest, match=r"a-int8\.npz holds samples of 'toy'; expected samples of 'zero_shot'"):
        Samples.load(files[0], "zero_shot")
    saved = files[0].read_bytes()
    place = saved.index(two[0].arrays["hit"].tobytes())
    broken = {"cut": saved[:-40], "flipped": saved[:place] + bytes([saved[place] ^ 1]) + saved[place + 1 :],
              "text": b"no zip", "header": saved.replace(b'"format": 1', b'"format": 9')}  # fmt: skip
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRequest, match=rf"{name} holds no samples that can be read"):
            Samples.load(tmp_path / name)
    for sides, says in (
        ([two[0], side("b", [True] * 60, "other")], "only answers to the same pictures"),
        (
            [two[0], replace(two[1], origin=two[1].made.model_copy(update={"eval": "zero_shot"}))],
            "are of toy, those of",
        ),
    ):
        with pytest.raises(BadRequest, match=says):
            tables.tabulate(sides)
    assert main(["eval", "--from", *map(str, files), "--param", "scale=1", "--resamples", "50"]) == 0
    assert f"{two[0].arrays['hit'].mean():.2f}" in capsys.readouterr().out
    assert main(["eval", "--from", *map(str, files), "--param", "long=4"]) == 2
    assert "the samples have long = 3; measure again for 4" in capsys.readouterr().err
    assert main(["eval", "a", "toy", "--from", str(files[0])]) == main(["eval", "a"]) == 2


def test_the_page_has_the_table_and_a_drawing_of_each_plot(two):
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            texts.append(data)

    table = tables.tabulate(two, how=HOW)
    html = page.html(table, two)
    Reader().feed(html)
    head, groups = tables.cells(table)
    assert head == ["figure", "unit", "a-int8", "a-float", "difference", "95 % interval"]
    assert [name for name, _ in groups] == ["", "of <two>", "both together"]
    for cell in [*head, *(cell for _, rows in groups for row in rows for cell in row if cell), "Says so.", "x & y"]:
        assert cell in texts
    assert html.count("<svg") == 1
    assert "http" not in html.replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", "").replace("https://matplotlib.org/", "")  # fmt: skip
    assert page.html(table, two) == html
    shown = tables.text(table)
    assert "200 paired bootstrap resamples of texts, percentile, seed 7" in shown
    assert f"{100 * two[0].arrays['hit'].mean():.2f}" in shown


def test_without_scipy_there_are_no_intervals_and_without_matplotlib_no_page(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    table = tables.tabulate(two)
    assert "no intervals: they need 'scipy', which is not installed; in " in tables.text(table)
    assert "pip install -e '.[eval]'" in table.notes[0]
    assert tables.cells(table)[0][-1] == "difference"
    assert table.as_json()["intervals"] is None
    assert main(["eval", "x", "toy", "--data", str(tmp_path), "--html", str(tmp_path / "a.html")]) == 3
    assert "'matplotlib'" in capsys.readouterr().err


def test_the_fingerprint_depends_on_the_content_not_on_the_folder(tmp_path: Path):
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes(content)
    a, b, c = (fingerprint([tmp_path / folder / "x.jpg"]) for folder in "abc")
    assert a == b != c
    values = [[b"1"], ["1"], [1], [["1"]], ["1", ""], ["", "1"], [np.uint8([1])], [np.int8([1])], [np.uint8([[1]])], {}]
    assert len({fingerprint(value) for value in values}) == len(values)
