"""Outliers in a report, and `calmclip show --outliers`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import describe, read
from calmclip.models.cli import main

FACTS = {
    "max_inf_norm": 90.5,
    "avg_inf_norm": 31.25,
    "max_kurtosis": 700.0,
    "avg_kurtosis": 200.0,
    "inputs": 4,
    "worst": ["blocks.0.mlp.down"],
    "tensors": {"patch": [1.5, 3.0], "blocks.0.mlp.down": [90.5, 700.0]},
}


def with_report(directory: Path, report: Any) -> Path:
    """The bundle with this report, and with the new hashes."""
    (directory / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    describe(directory, Manifest.model_validate_json((directory / "bundle.json").read_text()))
    return directory


def of(**graphs: Any) -> dict[str, Any]:
    return {"graphs": {role: {"outliers": facts} for role, facts in graphs.items()}}


def test_a_bundle_has_the_outliers_of_its_report(sealed: Path):
    outliers = Bundle(read(with_report(sealed, of(image=FACTS)))).outliers
    assert list(outliers) == ["image"]
    assert outliers["image"].max_inf_norm == 90.5
    assert outliers["image"].tensors["blocks.0.mlp.down"].kurtosis == 700.0


@pytest.mark.parametrize(
    "report",
    [
        "", "no JSON", "[]", "{}", '"graphs"', "[" * 100_000, '{"graphs": []}', '{"graphs": {"image": 1}}', "\xff",
        of(image={}), of(image=[]), of(image=FACTS | {"max_kurtosis": float("inf")}), of(image=FACTS | {"tensors": {}}),
        of(image=FACTS | {"tensors": {"patch": [1.0]}}), of(image=FACTS | {"tensors": {"patch": [1.0, float("nan")]}}),
        of(nowhere=FACTS),
        # the older form, without tensors
        of(image={"max_inf_norm": 1.0, "worst": {"Add_1": {"inf_norm": 1.0, "kurtosis": 3.0}}}),
    ],
)  # fmt: skip
def test_an_invalid_report_has_no_outliers_and_no_error(sealed: Path, report: Any):
    bundle = Bundle(read(with_report(sealed, report)))
    bundle.warm()
    assert bundle.outliers == {}


def test_a_valid_graph_beside_an_invalid_one_is_read(sealed: Path):
    bundle = Bundle(read(with_report(sealed, of(image=FACTS, text={"inputs": 4}))))
    assert list(bundle.outliers) == ["image"]


def test_show_prints_every_tensor_and_the_totals(sealed: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(with_report(sealed, of(image=FACTS, text=FACTS))), "--outliers"]) == 0
    each = """
        graph tensor inf norm kurtosis
        {0} patch 1.5 3
        {0} blocks.0.mlp.down 90.5 700
        {0} max 90.5 700
        {0} avg 31.25 200
        {0} worst of 4 inputs: blocks.0.mlp.down
    """
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    wanted = [line.strip() for role in ("image", "text") for line in each.format(role).strip().splitlines()]
    assert [line for line in lines if line] == wanted


def test_show_as_json_names_its_numbers(sealed: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(with_report(sealed, of(image=FACTS))), "--outliers", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["bundle"], shown["plot"]) == ("colours", None)
    tensors = {"patch": {"inf_norm": 1.5, "kurtosis": 3.0}, "blocks.0.mlp.down": {"inf_norm": 90.5, "kurtosis": 700.0}}
    assert shown["graphs"] == {"image": FACTS | {"tensors": tensors}}
    assert list(shown["graphs"]["image"]["tensors"]) == ["patch", "blocks.0.mlp.down"]  # in order of depth


def test_show_draws_into_the_file(sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "outliers.png"
    assert main(["show", str(with_report(sealed, of(image=FACTS))), "--outliers", "--plot", str(file)]) == 0
    assert f"drawn into {file}" in capsys.readouterr().out
    with Image.open(file) as opened:
        assert opened.format == "PNG"
        assert len(opened.getcolors(1 << 20)) > 20


def test_show_says_what_it_cannot_do(
    sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(["show", str(sealed), "--outliers"]) == 2
    assert "the report of colours has no outliers: " in capsys.readouterr().err
    for wrong, why in ((["--outliers"], "needs a bundle"), ([str(sealed), "--plot", "x.png"], "add --outliers")):
        with pytest.raises(SystemExit, match="2"):
            main(["show", *wrong])
        assert why in capsys.readouterr().err
    with_report(sealed, of(image=FACTS))
    assert main(["show", str(sealed), "--outliers", "--plot", str(tmp_path / "nowhere" / "x.png")]) == 2
    assert "x.png does not exist" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "calmclip.export.chart", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert main(["show", str(sealed), "--outliers", "--plot", str(tmp_path / "x.png")]) == 3
    error = capsys.readouterr().err
    assert "'matplotlib.figure', which is not installed; in " in error
    assert "pip install -e '.[export]'" in error
    assert not list(tmp_path.glob("*.png"))
