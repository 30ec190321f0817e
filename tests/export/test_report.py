import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calmclip.export import report
from calmclip.export.recipe import Bars
from calmclip.export.report import accuracy, check, precision, require, shortfalls
from calmclip.models.errors import BarMissed
from calmclip.models.runner import open_bundle

REPORT = {
    "graphs": {"regions": {"int8_against_float": {"objectness": {"cosine": 0.8}}}},
    "embeddings": {"image": {"cosine_mean": 0.98}, "text": {"cosine_mean": 0.96}},
    "size_bytes": {"int8": 31_000_000},
}


def test_each_bar_is_compared_with_the_measured_value():
    rows = check(REPORT, Bars(min_image_cosine=0.98, min_text_cosine=0.97, max_megabytes=35))
    assert {name: row["passed"] for name, row in rows.items()} == {
        "min_image_cosine": True,
        "min_text_cosine": False,
        "regions.objectness": False,
        "max_megabytes": True,
    }
    with pytest.raises(BarMissed, match=r"min_text_cosine is 0\.96, the bar 0\.97") as caught:
        require(rows, "x-int8")
    assert "min_image_cosine" not in str(caught.value)


def test_without_embeddings_the_bars_are_those_of_the_graphs():
    """A bundle without the task embed has no embeddings. The text graph of a detector has the bar of texts."""
    low = {**REPORT, "graphs": {"text": {"int8_against_float": {"text_embeds": {"cosine": 0.95}}}}, "embeddings": {}}
    assert check(low, Bars()) == {"text.text_embeds": {"bar": 0.97, "measured": 0.95, "passed": False}}
    assert check(low, Bars(min_text_cosine=0.94))["text.text_embeds"]["passed"]
    assert check({"graphs": {}, "embeddings": {}, "size_bytes": {"int8": 1}}, Bars()) == {}


def graded(*, coverage: float = 0.9, size: float = 0.35, mean: float = 0.99, worst: float = 0.95, role: str = "text"):
    """A report whose graph ``role`` has these figures; the other graph is better."""
    graphs = {name: {"int8_against_float": {"x": {"cosine": 0.999, "cosine_min": 0.99}}} for name in ("image", "text")}
    embeddings = {name: {"cosine_mean": 0.999, "cosine_min": 0.99} for name in graphs}
    if role in graphs:
        graphs[role]["int8_against_float"]["y"] = {"cosine": mean, "cosine_min": worst}
    else:
        embeddings["image"] = {"cosine_mean": mean, "cosine_min": worst}
    return {"graphs": graphs, "embeddings": embeddings, "int8": {"coverage": coverage, "size_ratio": size}}


@pytest.mark.parametrize("size", [0.35, 0.36])
@pytest.mark.parametrize(
    ("figures", "name", "reason"),
    [
        ({}, "int8", None),
        ({"coverage": 0.89}, "mixed", "89.0% of the multiply-accumulates are in INT8, not 90%"),
        ({"mean": 0.9899}, "mixed", "the mean cosine of text.y is 0.9899, not 0.99"),
        ({"worst": 0.9499}, "mixed", "the worst cosine of text.y is 0.9499, not 0.95"),
        ({"mean": 0.98, "role": "image"}, "mixed", "the mean cosine of image.y is 0.9800, not 0.99"),
        ({"worst": -1.0, "role": "bundle"}, "mixed", "the worst cosine of image vectors is -1.0000, not 0.95"),
        ({"coverage": 0.0}, "float", "0.0% of the multiply-accumulates are in INT8, not 90%"),
    ],
)
def test_the_name_int8_needs_coverage_size_and_accuracy_of_every_output(figures, name, reason, size, monkeypatch):
    monkeypatch.setattr(report, "SIZE", 0.35)  # tests of tiny nets raise it
    graph = graded(**figures, size=size)
    reasons = [reason] if reason else []
    if size > 0.35:
        name = "mixed" if name == "int8" else name
        reasons.append("its size is 0.360 of float, not at most 0.35")
    assert precision(graph) == name
    assert sorted(shortfalls(graph)) == sorted(reasons)


def test_evals_are_reported_for_float_and_int8(tiny_bundles: Path, photographs, tmp_path: Path):
    """The labels are the answers of float, so float is always right. The test counts the right answers of INT8."""
    int8, float32 = (open_bundle(tiny_bundles / f"tiny-{kind}") for kind in ("int8", "float"))
    labels = ["a cat", "two dogs", "red", "a photo of green"]
    (tmp_path / "images").mkdir()
    best: dict[str, list[str]] = {"int8": [], "float32": []}
    for picture in photographs.values():
        shutil.copy(picture, tmp_path / "images")
        for side, runner in (("int8", int8), ("float32", float32)):
            best[side].append(next(iter(runner.classify(picture, sorted(labels)))).label)
    rows = [
        {"file": path.name, "label": label} for path, label in zip(photographs.values(), best["float32"], strict=True)
    ]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    # the eval offers only the labels of the file, so the file needs every label that INT8 may choose
    assert set(best["int8"]) <= set(best["float32"])
    result = accuracy(int8, float32, {"zero_shot": tmp_path})["zero_shot"]
    right = sum(answer == label for answer, label in zip(best["int8"], best["float32"], strict=True))
    assert result["float32"]["top1"] == 100.0
    assert result["int8"]["top1"] == pytest.approx(100 * right / len(rows), abs=1e-3)
    assert result["int8"]["pictures"] == len(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts a parent's memory")
def test_the_peak_of_a_process_is_its_own_and_not_that_of_its_parent():
    held = np.ones(75_000_000)  # 600 MB of this process
    code = "from calmclip.export.report import peak_rss_mb; print(peak_rss_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parent = report.peak_rss_mb()
    assert parent is not None
    assert float(child.stdout) < held.nbytes / 1e6 < parent
