"""The verbs without torch or HTTP, mostly with wrong arguments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import describe
from calmclip.models.cli import main
from calmclip.models.preprocess import image


def resealed(directory: Path) -> str:
    """Seal a changed directory again, with the new hashes."""
    describe(directory, Manifest.model_validate_json((directory / "bundle.json").read_text()))
    return str(directory)


def test_check_feeds_outputs_of_regions_and_text_to_detect(detector: Path, capsys: pytest.CaptureFixture[str]):
    main(["check", str(detector), "--json"])  # does not pass: the fixture's `text` embeds other words than colours as 0
    checks = {entry["check"]: entry["passed"] for entry in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["detect: kept_boxes [1, 4] float32, finite"]
    assert [check for check, passed in checks.items() if not passed] == ["text: text_embeds rows are unit vectors"]


def test_check_runs_graphs_that_load(detector: Path, capsys: pytest.CaptureFixture[str]):
    model = onnx.load(detector / "detect.onnx")
    four = next(n for n in model.graph.node if "four" in n.output)
    four.attribute[0].ints[:] = [5]  # boxes of four numbers cannot be reshaped to five
    onnx.save(model, detector / "detect.onnx")
    assert main(["check", resealed(detector)]) == 1
    out = capsys.readouterr().out
    assert "FAIL detect: " in out
    assert "ok   regions: boxes" in out


def test_check_goes_on_after_a_graph_whose_inputs_are_unknown_and_one_that_breaks(
    detector: Path, capsys: pytest.CaptureFixture[str]
):
    model = (
        '<ir_version: 8, opset_import: ["" : 17]> raw (float[1] frames) => (float[1] steps) {steps = Identity (frames)}'
    )
    onnx.save(onnx.parser.parse_model(model), detector / "raw.onnx")
    (detector / "broken.onnx").write_bytes(b"no model")
    file = detector / "bundle.json"
    manifest = json.loads(file.read_text())
    tensors = {name: {name: {"dtype": "float32", "shape": [1]}} for name in ("frames", "steps")}
    raw = {"file": "raw.onnx", "batch": False, "inputs": tensors["frames"], "outputs": tensors["steps"]}
    manifest["graphs"] = {"raw": raw, "broken": {**raw, "file": "broken.onnx"}, **manifest["graphs"]}
    for name in ("raw", "broken"):
        manifest["files"][f"{name}.onnx"] = manifest["files"]["detect.onnx"]  # until it is sealed again
    file.write_text(json.dumps(manifest))
    assert main(["check", resealed(detector)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ok   raw: loads" in lines
    assert [line[:12] for line in lines if "broken" in line] == ["FAIL broken:"]
    assert "ok   detect: kept_boxes [1, 4] float32, finite" in lines


def test_a_bundle_that_cannot_serve_does_not_pass(sealed: Path, capsys: pytest.CaptureFixture[str]):
    file = sealed / "bundle.json"
    manifest = json.loads(file.read_text())
    manifest["classifier"]["head"] = {"name": "cosin"}
    file.write_text(json.dumps(manifest))
    assert main(["check", str(sealed)]) == 1
    assert "there is no heads 'cosin'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("check absent", "there is no bundle 'absent'"),
        ("bench tiny-int8 --rounds 1", "rounds is 1; expected at least 2"),
        ("bench tiny-int8 --picture {0}", "{0}: Is a directory"),
        ("bench tiny-int8 --picture {0}/lost.jpg", "lost.jpg does not exist"),
    ],
)
def test_wrong_arguments_are_named(
    tiny_bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, says: str
):
    assert main([*arguments.format(tmp_path).split(), "--bundles", str(tiny_bundles)]) == 2
    assert says.format(tmp_path) in capsys.readouterr().err


def test_run_detects_by_labels_and_examples_with_the_bundles_defaults(
    detector: Path, png: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour, (8, 8)))
    manifest = json.loads((detector / "bundle.json").read_text())
    (detector / "bundle.json").write_text(json.dumps(manifest | {"suppression": {"min_score": 0.9}}))

    def detections(*more: str) -> list[tuple[str, float]]:
        assert main(["run", resealed(detector), "detect", str(tmp_path / "red.png"), *more, "--json"]) == 0
        (answer,) = json.loads(capsys.readouterr().out)["answers"]
        return [(detection["label"], round(detection["score"], 2)) for detection in answer["detect"]]

    examples = [f"--example={tmp_path / name}.png" for name in ("blue", "red")]
    assert detections(*examples) == [("example 1", 1.0)]
    assert detections("--label=red", "--label=red green", examples[0]) == [("red", 1.0)]  # 0.71 is below 0.9
    assert len(detections("--label=red", "--label=red green", "--min-score=0.5")) == 2
    assert (
        main(["run", str(detector), "detect", "--example", str(tmp_path / "red.png"), str(tmp_path / "red.png")]) == 0
    )
    assert "1.000  example 0" in capsys.readouterr().out  # the picture follows an option
    assert main(["run", str(detector), "detect", str(tmp_path / "red.png"), "--example=nowhere.png"]) == 2
    assert "nowhere.png' cannot be read" in capsys.readouterr().err


def test_run_classifies_with_attributes_and_descriptions(
    detector: Path, png: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture, file = tmp_path / "red.png", tmp_path / "descriptions.json"
    picture.write_bytes(png("red", (8, 8)))
    file.write_text('{"green": ["red"], "red": ["blue", "green"]}')

    def run(*more: str) -> int:
        return main(["run", str(detector), "classify", str(picture), "--label=green", "--label=red", *more])

    def answer(*more: str) -> dict[str, Any]:
        assert run(*more, "--json") == 0
        (only,) = json.loads(capsys.readouterr().out)["answers"]
        return only

    hues = ["--attribute=hue=blue", "--attribute=hue=red"]
    # "red , red" and "green , red": cosines 1 and 1 / sqrt(2); with blue 1 / sqrt(2) and 0; the head's scale is 2
    totals = [sum(np.exp([2**0.5, 0])), sum(np.exp([2, 2**0.5]))]
    expected = {"blue": totals[0] / sum(totals), "red": totals[1] / sum(totals)}
    assert answer(*hues)["attributes"] == {"hue": pytest.approx(expected, abs=1e-6)}
    # the paper's word without labels: "object , blue" and "object , red", cosines 0 and 1, divided by tau
    without = answer(*hues, "--without-labels", "--tau=2")["attributes"]["hue"]
    assert without["red"] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)
    assert [row["score"] for row in answer(f"--descriptions={file}", "--alpha=0.5")["classify"]] == pytest.approx(
        [0.5, 0.5], abs=1e-6
    )
    assert answer(f"--descriptions={file}")["classify"][0]["label"] == "green"
    assert run(*hues) == 0
    assert "  hue: 'blue' 0.31, 'red' 0.69" in capsys.readouterr().out
    for options, says in (
        (["--attribute=blue"], "--attribute is 'blue'; expected NAME=VALUE"),
        (["--tau=2"], "belong to attributes, and there are none; add --attribute"),
        (["--descriptions=nowhere.json"], "the descriptions in nowhere.json cannot be read"),
        ([f"--descriptions={picture}"], "cannot be read"),
        (["--alpha=0.5"], "the label 'green' has no descriptions"),
    ):
        assert run(*options) == 2
        assert says in capsys.readouterr().err


def test_run_prints_tags_and_pictures_in_order(
    sealed: Path, tmp_path: Path, png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
):
    paths = [tmp_path / f"{colour}.png" for colour in ("blue", "red")]
    for path in paths:
        path.write_bytes(png(path.stem))
    shown = [str(path) for path in paths]
    assert main(["run", str(sealed), "rank", *shown, "--instruction", "red", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [
        {"picture": shown[1], "rank": {"index": 1, "score": 1.0}},
        {"picture": shown[0], "rank": {"index": 0, "score": 0.0}},
    ]
    assert main(["run", str(sealed), "rank", *shown, "--instruction", "red", "--top", "1"]) == 0
    assert capsys.readouterr().out == f"  1.000  {shown[1]}\n"
    assert main(["run", str(sealed), "tag", shown[1], "--word", "blue", "--word", "red"]) == 0
    assert capsys.readouterr().out == f"{shown[1]}\n  a photo of red (by template)\n  1.000  red\n"
    assert main(["run", str(sealed), "rank", *shown]) == 2
    assert "expected `instruction` or `classifier`" in capsys.readouterr().err
    assert main(["run", str(sealed), "rank", "--instruction", "red"]) == 2
    assert "no pictures were given" in capsys.readouterr().err


def test_run_compress_reads_texts_and_files(sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of 10 tokens, in a context of 6, the two lines of 8 tokens are nearest to the whole."""
    file = tmp_path / "a.txt"
    file.write_text("blue blue\n\nred red red red\n\ngreen green green green", encoding="utf-8")
    assert main(["run", str(sealed), "compress", str(file), "--text", "red", "--budget", "8", "--json"]) == 0
    short, long = json.loads(capsys.readouterr().out)["answers"]
    assert (short["text"], short["tokens"], short["ratio"], short["cosine"]) == ("red", 1, 1, 1)
    assert (long["text"], long["kept"]) == ("red red red red\n\ngreen green green green", [1, 2])
    assert (long["tokens"], long["tokens_before"], long["ratio"]) == (8, 10, 0.8)
    assert main(["run", str(sealed), "compress", str(file), "--budget", "8"]) == 0
    assert "(8 of 10 tokens, cosine " in capsys.readouterr().out
    file.write_bytes(b"\xff")
    for words, says in ((["--budget", "8", str(file)], "UTF-8"), (["--text", "red", "--budget", "7"], "budget is 7"),
                        ([], "has no input")):  # fmt: skip
        assert main(["run", str(sealed), "compress", *words]) == 2
        assert says in capsys.readouterr().err


def test_run_embed_chooses_what_becomes_of_a_long_text(sealed: Path, capsys: pytest.CaptureFixture[str]):
    long = ["run", str(sealed), "embed", "--text", "red " * 6 + "blue " * 3, "--json"]
    for flags, want in (
        (["--truncate", "end"], (5, 0, 1)),
        (["--truncate", "chunk"], (6, 0, 3)),
        (["--truncate", "chunk", "--pooling", "max"], (1, 0, 1)),
        (["--truncate", "chunk", "--stride", "3"], (1 + 0.5**0.5, 0, 0.5**0.5)),
    ):
        assert main([*long, *flags]) == 0
        (answer,) = json.loads(capsys.readouterr().out)["answers"]
        assert answer["embedding"] == pytest.approx((np.array(want) / np.linalg.norm(want)).tolist(), abs=1e-6)
    for flags, says in (([], "has 9 tokens"), (["--truncate", "none"], "has 9 tokens"), (["--stride", "3"], "chunk")):
        assert main([*long, *flags]) == 2
        assert says in capsys.readouterr().err


def test_run_answers_each_picture_and_goes_on_after_a_broken_one(
    sealed: Path, tmp_path: Path, png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
):
    for name in ("blue", "red"):
        (tmp_path / f"{name}.png").write_bytes(png(name))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes(png("red")[:40])
    names = ["blue.png", "broken.png", "lost.png", "red.png", "cut.png"]
    paths = [str(tmp_path / name) for name in names]
    for task, flags in (("tag", ["--word=blue", "--word=red"]), ("classify", ["--label=blue", "--label=red"])):
        assert main(["run", str(sealed), task, *paths, *flags]) == 1
        out, error = capsys.readouterr()
        assert [line for line in out.splitlines() if "png" in line] == [paths[0], paths[3]]
        assert sorted(line.split(": ")[1] for line in error.splitlines()) == [paths[1], paths[4], paths[2]]
        assert main(["run", str(sealed), task, *paths, *flags, "--json"]) == 1
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {line["picture"] for line in lines if task in line} == {paths[0], paths[3]}
        assert {line["picture"] for line in lines if "error" in line} == {paths[1], paths[2], paths[4]}
    assert main(["run", str(sealed), "embed", *paths[:2], "--text", "red", "--json"]) == 1
    text, blue, broken = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert text["embedding"] == pytest.approx([1, 0, 0], abs=1e-6)
    assert (blue["picture"], blue["embedding"]) == (paths[0], pytest.approx([0, 0, 1], abs=1e-6))
    assert broken["picture"] == paths[1]
    assert main(["run", str(sealed), "rank", *paths, "--instruction", "red", "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rank"]["index"] for line in lines if "rank" in line] == [3, 0]
    assert main(["run", str(sealed), "classify", paths[1], "--label=red", "--label=blue", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"answers": []}
    assert main(["run", str(sealed), "classify", *paths, "--label=red", "--label= "]) == 2  # no picture's fault


def test_run_prints_an_answer_before_the_next_pictures_are_read(
    sealed: Path, tmp_path: Path, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
):
    read, printed = [], []
    plain = image.load
    monkeypatch.setattr(
        "calmclip.models.tasks.features.load", lambda path, **o: (read.append(path), plain(path, **o))[1]
    )
    monkeypatch.setattr("builtins.print", lambda *text, **o: printed.append(len(read)))
    paths = [tmp_path / f"{number:03}.png" for number in range(64)]
    for path in paths:
        path.write_bytes(png("red", (8, 8)))
    assert main(["run", str(sealed), "classify", *map(str, paths), "--label=red", "--label=blue"]) == 0
    assert (len(printed), printed[0], printed[-1]) == (64, 1, 64)
    assert printed[1] < 64  # those that are decoded ahead
