import json
import shutil
from pathlib import Path

import pytest

from calmclip.export.recipe import Bars
from calmclip.export.report import accuracy, check, require
from calmclip.models.errors import BarMissed
from calmclip.models.runner import open_bundle

REPORT = {
    "graphs": {"regions": {"int8_against_float": {"objectness": {"cosine": 0.8}}}},
    "embeddings": {"image": {"cosine_mean": 0.98}, "text": {"cosine_mean": 0.96}},
    "size_bytes": {"int8": 31_000_000},
}


def test_each_bar_stands_beside_what_was_measured():
    found = check(REPORT, Bars(min_image_cosine=0.98, min_text_cosine=0.97, max_megabytes=35))
    assert {name: row["passed"] for name, row in found.items()} == {
        "min_image_cosine": True,
        "min_text_cosine": False,
        "regions.objectness": False,
        "max_megabytes": True,
    }
    with pytest.raises(BarMissed, match=r"min_text_cosine is 0\.96, the bar 0\.97") as caught:
        require(found, "x-int8")
    assert "min_image_cosine" not in str(caught.value)


def test_the_texts_of_a_detector_have_the_bar_of_texts():
    """A bundle that serves no embed has no embeddings; its text graph is measured all the same."""
    report = {**REPORT, "graphs": {"text": {"int8_against_float": {"text_embeds": {"cosine": 0.95}}}}, "embeddings": {}}
    assert check(report, Bars()) == {"text.text_embeds": {"bar": 0.97, "measured": 0.95, "passed": False}}
    assert check(report, Bars(min_text_cosine=0.94))["text.text_embeds"]["passed"]


def test_a_bundle_without_embeddings_has_only_the_bars_that_apply():
    assert check({"graphs": {}, "embeddings": {}, "size_bytes": {"int8": 1}}, Bars()) == {}


def test_evals_stand_in_float_and_in_int8_side_by_side(tiny_bundles: Path, photographs, tmp_path: Path):
    """Each picture is said to be what float finds it to be, so float is right about all; of INT8 we count ourselves."""
    int8, whole = (open_bundle(tiny_bundles / f"tiny-{kind}") for kind in ("int8", "float"))
    labels = ["a cat", "two dogs", "red", "a photo of green"]
    (tmp_path / "images").mkdir()
    best: dict[str, list[str]] = {"int8": [], "float32": []}
    for picture in photographs.values():
        shutil.copy(picture, tmp_path / "images")
        for side, runner in (("int8", int8), ("float32", whole)):
            best[side].append(next(iter(runner.classify(picture, sorted(labels)))).label)
    rows = [
        {"file": path.name, "label": label} for path, label in zip(photographs.values(), best["float32"], strict=True)
    ]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    # only labels that are in the file take part: those float never chose could not win either, unless in INT8
    assert set(best["int8"]) <= set(best["float32"])
    found = accuracy(int8, whole, {"zero_shot": tmp_path})["zero_shot"]
    right = sum(one == other for one, other in zip(best["int8"], best["float32"], strict=True))
    assert found["float32"]["top1"] == 100.0
    assert found["int8"]["top1"] == pytest.approx(100 * right / len(rows), abs=1e-3)
    assert found["int8"]["pictures"] == len(rows)
