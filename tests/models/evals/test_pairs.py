import json
import math
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.evals import NoParams, Samples, measure, pairs
from calmclip.models.evals.pairs import DataSet, Pair

NAN = math.nan
#          cosines of caption 0 with both pictures, and of caption 1   category   text image group
TABLE = [
    (((0.9, 0.1), (0.2, 0.8)), "colour"),  #                                      yes  yes   yes
    (((0.5, 0.4), (0.1, 0.3)), "colour"),  # picture 1 takes caption 0: .4 > .3   no   yes
    (((0.5, 0.2), (0.6, 0.7)), "count"),  #  picture 0 takes caption 1: .6 > .5   no   yes
    (((0.5, 0.6), (0.4, 0.8)), "count"),  #  caption 0 takes picture 1: .6 > .5   yes  no
    (((0.5, 0.5), (0.2, 0.9)), "count"),  #  a tie of caption 0's pictures        yes  no
    (((0.5, 0.2), (0.5, 0.9)), "count"),  #  a tie of picture 0's captions        no   yes
    (((0.6, NAN), (0.4, NAN)), "swap"),  #   one picture: right
    (((0.4, NAN), (0.4, NAN)), "swap"),  #   a tie
    (((0.3, NAN), (0.5, NAN)), "count"),  #  wrong
]


def of_table(rows: list[int]) -> dict[tuple[str, str], float]:
    cosines = np.array([cells for cells, _ in TABLE])
    names = ["colour", "count", "swap"]
    category = np.array([names.index(name) for _, name in TABLE])
    arrays = {"cosines": cosines, "two": ~np.isnan(cosines[:, 0, 1]), "category": category}
    statistic = pairs.score(Samples({"pairs": len(TABLE)}, arrays, {"categories": names}), NoParams())
    return {figure.key: figure.value for figure in statistic(np.array(rows))}


def test_figures_by_hand():
    assert of_table([*range(9)]) == pytest.approx(
        {
            ("", "text"): 100 * 3 / 6, ("", "image"): 100 * 4 / 6, ("", "group"): 100 / 6,
            ("", "mmvp"): (100 + 50) / 2,  # the mean of the categories' image figures, 2 of 2 and 2 of 4
            ("colour", "text"): 50, ("colour", "image"): 100, ("colour", "group"): 50,
            ("count", "text"): 50, ("count", "image"): 50, ("count", "group"): 0,
            ("", "caption"): 100 / 3, ("", "caption mean"): (50 + 0) / 2,
            ("swap", "caption"): 50, ("count", "caption"): 0,
        }
    )  # fmt: skip


def test_a_resample_has_the_same_figures_and_nan_for_those_without_a_pair():
    drawn = of_table([0, 0, 3])
    assert drawn.keys() == of_table([*range(9)]).keys()
    assert [drawn["", name] for name in ("text", "image", "mmvp")] == pytest.approx([100, 200 / 3, 50])
    assert all(math.isnan(drawn[key]) for key in drawn if "caption" in key[1])


class Fake:
    """Draws a vector for each picture and text, and remembers what it embedded. Names that begin alike up to "=" have
    the same vector."""

    bundle = SimpleNamespace(name="fake", digest="0", require=lambda task: None, reads_vectors=False)

    def __init__(self):
        self.embedded = []

    def embed(self, *, texts=(), images=()):
        keys = [*texts, *images]
        self.embedded += keys
        return np.stack([self.vector(key) for key in keys])

    @staticmethod
    def vector(key):
        name = key.name if isinstance(key, Path) else key if isinstance(key, str) else str(key.sum())
        row = np.random.default_rng([*name.split("=")[0].encode()]).normal(size=37)
        return np.float32(row / np.linalg.norm(row))


def test_figures_equal_a_loop_over_pairs_with_the_published_rules_and_each_input_is_embedded_once(tmp_path: Path):
    draw = np.random.default_rng(0)
    for number in range(40):
        (tmp_path / f"{number}.jpg").touch()
    drawn = []
    for number in range(300):
        pictures = [tmp_path / f"{place}.jpg" for place in draw.choice(40, 2, replace=False)]
        captions = [f"caption {place}" for place in draw.choice(40, 2, replace=False)]
        drawn.append(Pair(pictures[: 1 + number % 3 % 2], captions, "ab"[number % 2]))
    runner = Fake()
    figures = measure.named(measure.predict("pairs", runner, DataSet(drawn)))
    assert len(runner.embedded) == len({*runner.embedded}) == figures["pictures"] + figures["captions"]

    winoground, sugar_crepe, mmvp = [], [], {"a": [], "b": []}
    for pair in drawn:
        pictures, texts = ([np.float64(Fake.vector(key)) for key in keys] for keys in (pair.pictures, pair.captions))
        if len(pictures) == 1:
            sugar_crepe.append(texts[0] @ pictures[0] > texts[1] @ pictures[0])
            continue
        s = [[text @ picture for picture in pictures] for text in texts]
        f = s[0][0] > s[1][0] and s[1][1] > s[0][1]
        g = s[0][0] > s[0][1] and s[1][1] > s[1][0]
        winoground.append((f, g, f and g))
        # MMVP's script: a softmax over the two pictures for each statement, the first picture above 1/2
        chosen = ["first" if np.exp(100 * a) / (np.exp(100 * a) + np.exp(100 * b)) > 0.5 else "second" for a, b in s]
        mmvp[pair.category].append(chosen == ["first", "second"])
    expected = 100 * np.mean(winoground, axis=0)
    assert [figures[name] for name in ("text", "image", "group")] == pytest.approx(expected)
    assert figures["mmvp"] == pytest.approx(100 * np.mean([np.mean(each) for each in mmvp.values()]))
    assert figures["caption"] == pytest.approx(100 * np.mean(sugar_crepe))
    assert 10 < figures["group"] < figures["text"] < 40 < figures["caption"] < 60  # chance: 1 in 6, 4 and 2


def test_equal_inputs_and_equal_vectors_tie_and_a_tie_is_never_right():
    first, second = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    tied = [
        Pair([first, second], ["a", "a"]),
        Pair([first, second], ["a", "a=b"]),  # other texts with the same tokens
        Pair([first, first.copy()], ["a", "b"]),
        Pair([first], ["a", "a=b"]),
    ]
    for pair in tied:
        figures = measure.named(measure.predict("pairs", Fake(), DataSet([pair] * 3)))
        assert figures["pictures"] == len(pair.pictures)
        assert 0 in (figures.get("text"), figures.get("image"), figures.get("caption"))
        assert figures.get("group", 0) == 0


@pytest.mark.parametrize(
    ("drawn", "error"),
    [
        ([], "has no pairs"),
        ([Pair(["a"] * 3, ["b", "c"])], "3 pictures and 2"),
        ([Pair(["a"], ["b"])], "1 pictures and 1"),
    ],
)
def test_a_pair_of_another_size_is_refused(drawn, error: str):
    with pytest.raises(BadRequest, match=error):
        DataSet(drawn)


def test_two_bundles_are_compared_pair_by_pair(
    tiny_bundles: Path, photographs: dict[str, Path], tmp_path: Path, capsys
):
    """Of a bundle and its float sibling, from the command line and for the report of an export."""
    names = sorted(photographs)[:6]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / f"{name}.jpg").write_bytes(photographs[name].read_bytes())
    files = [f"{name}.jpg" for name in names]
    rows = [
        {"images": [files[n], files[n - 1]], "captions": [names[n], names[n - 1]], "category": "ab"[n % 2]}
        for n in range(6)
    ]
    rows.append({"images": [files[0]], "captions": ["red", "blue"]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["eval", "tiny-int8", "pairs", "--data", str(tmp_path), "--bundles", str(tiny_bundles), "--resamples", "50"]
    assert main([*argv, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["counts"] == {"pairs": 7, "pictures": 6, "captions": 8}
    assert [bundle["name"] for bundle in table["bundles"]] == ["tiny-int8", "tiny-float"]
    figures = {(row["group"], row["name"]): row for row in table["figures"]}
    assert figures.keys() == {
        *(("", name) for name in ("text", "image", "group", "mmvp", "caption", "caption mean")),
        *((group, name) for group in "ab" for name in ("text", "image", "group")),
    }
    for row in figures.values():
        assert row["difference"]["lower"] <= row["difference"]["value"] <= row["difference"]["upper"]
    assert figures["", "caption"]["values"]["tiny-float"]["value"] in (0, 100)
    assert main([*argv, "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["pairs"] == 2
    assert figures["", "mmvp"]["values"]["tiny-float"]["value"] == pytest.approx(
        np.mean([figures[group, "image"]["values"]["tiny-float"]["value"] for group in "ab"])
    )
    assert [*chain(*figures)].count("group") == 3
