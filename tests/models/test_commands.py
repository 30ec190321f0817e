"""The verbs without torch or HTTP, where what they are given is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import describe
from calmclip.models.cli import main


def resealed(directory: Path) -> str:
    """After a change: every hash is right again."""
    describe(directory, Manifest.model_validate_json((directory / "bundle.json").read_text()))
    return str(directory)


def test_check_feeds_detect_what_regions_and_text_answer(detector: Path, capsys: pytest.CaptureFixture[str]):
    main(["check", str(detector), "--json"])  # does not pass: to the hand-made `text` other words than colours are 0
    found = {one["check"]: one["passed"] for one in json.loads(capsys.readouterr().out)["checks"]}
    assert found["detect: kept_boxes [1, 4] float32, finite"]
    assert [check for check, passed in found.items() if not passed] == ["text: text_embeds rows are unit vectors"]


def test_check_runs_what_merely_loads(detector: Path, capsys: pytest.CaptureFixture[str]):
    model = onnx.load(detector / "detect.onnx")
    four = next(n for n in model.graph.node if "four" in n.output)
    four.attribute[0].ints[:] = [5]  # boxes of four numbers cannot be shown as five
    onnx.save(model, detector / "detect.onnx")
    assert main(["check", resealed(detector)]) == 1
    out = capsys.readouterr().out
    assert "FAIL detect: " in out
    assert "ok   regions: boxes" in out


def test_a_bundle_that_cannot_serve_does_not_pass(sealed: Path, capsys: pytest.CaptureFixture[str]):
    file = sealed / "bundle.json"
    manifest = json.loads(file.read_text())
    manifest["classifier"]["head"] = {"name": "cosin"}
    file.write_text(json.dumps(manifest))
    assert main(["check", str(sealed)]) == 1
    assert "there is no heads 'cosin'" in capsys.readouterr().out


def test_a_bundle_that_is_not_there_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", "absent", "--bundles", str(tmp_path)]) == 2
    assert "there is no bundle 'absent'" in capsys.readouterr().err


def test_one_round_is_too_few_to_bench(tiny_bundles: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "tiny-int8", "--rounds", "1", "--bundles", str(tiny_bundles)]) == 2
    assert "rounds is 1; expected at least 2" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_bad_input_and_named(
    tiny_bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    where = ["bench", "tiny-int8", "--bundles", str(tiny_bundles), "--picture"]
    assert main([*where, str(tmp_path)]) == 2
    assert f"{tmp_path}: Is a directory" in capsys.readouterr().err
    assert main([*where, str(tmp_path / "lost.jpg")]) == 2
    assert "lost.jpg is not there" in capsys.readouterr().err


def test_run_detects_by_labels_and_examples_with_the_bundles_defaults(
    detector: Path, png: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour, (8, 8)))
    manifest = json.loads((detector / "bundle.json").read_text())
    (detector / "bundle.json").write_text(json.dumps(manifest | {"suppression": {"min_score": 0.9}}))

    def found(*more: str) -> list[tuple[str, float]]:
        assert main(["run", resealed(detector), "detect", str(tmp_path / "red.png"), *more, "--json"]) == 0
        (answer,) = json.loads(capsys.readouterr().out)["answers"]
        return [(one["label"], round(one["score"], 2)) for one in answer["detect"]]

    examples = [f"--example={tmp_path / name}.png" for name in ("blue", "red")]
    assert found(*examples) == [("example 1", 1.0)]
    assert found("--label=red", "--label=red green", examples[0]) == [("red", 1.0)]  # 0.71 is under the bundle's 0.9
    assert len(found("--label=red", "--label=red green", "--min-score=0.5")) == 2
    assert (
        main(["run", str(detector), "detect", "--example", str(tmp_path / "red.png"), str(tmp_path / "red.png")]) == 0
    )
    assert "1.000  example 0" in capsys.readouterr().out  # the picture stands behind an option
    assert main(["run", str(detector), "detect", str(tmp_path / "red.png"), "--example=nowhere.png"]) == 2
    assert "nowhere.png' cannot be read" in capsys.readouterr().err
