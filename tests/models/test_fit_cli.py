"""`calmclip fit`: folders of pictures -> the files that the service reads. Colours stand for classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calmclip.models.cli import main
from calmclip.models.datasets import read_classes
from calmclip.models.errors import BadRequest
from calmclip.models.stored_classifier import read_classifier

Fit = Callable[..., int]
SHOWN = {"sea": ["red", "red"], "fire": ["blue", "blue"]}  # so that texts would not match


def folder(root: Path, png: Callable[..., bytes], classes: dict[str, list[str]]) -> Path:
    for name, colours in classes.items():
        (root / name).mkdir(parents=True)
        for index, colour in enumerate(colours):
            (root / name / f"{index}.png").write_bytes(png(colour))
    return root


@pytest.fixture
def shown(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    return folder(tmp_path / "shown", png, SHOWN)


@pytest.fixture
def fit(sealed: Path, shown: Path, tmp_path: Path) -> Fit:
    """`calmclip fit pets …` with these options, which come after the usual ones."""
    usual = ["--bundle", str(sealed), "--method", "prototype", "--pictures", str(shown), "--out", str(tmp_path / "out")]
    return lambda *options: main(["fit", "pets", *usual, *map(str, options)])


def test_a_folder_of_classes_becomes_a_stored_classifier(
    fit: Fit, sealed: Path, tmp_path: Path, png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
):
    assert fit("--param", "scale=2", "--template", "{}", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["name"], value["version"], value["file"]) == ("pets", 1, str(tmp_path / "out" / "pets.json"))
    stored = read_classifier(tmp_path / "out" / "pets.json")
    assert stored.classifier.labels == ("fire", "sea")  # by name
    assert stored.classifier.assets["prototypes"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert (stored.classifier.params, stored.classifier.templates) == ({"scale": 2.0}, ("{}",))
    assert (stored.report.pictures, stored.report.after) == (4, 1.0)
    (tmp_path / "red.png").write_bytes(png("red"))
    run = ["run", str(sealed), "classify", str(tmp_path / "red.png"), "--classifier", value["file"], "--json"]
    assert main(run) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["classify"][0] == {"label": "sea", "score": pytest.approx(0.880797, abs=1e-6)}  # logits 2 and 0
    assert main([*run, "--label", "fire"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["classify"] == [{"label": "fire", "score": 1.0}]


def test_the_report_is_printed(fit: Fit, capsys: pytest.CaptureFixture[str]):
    assert fit() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pets: prototype of 4 pictures, 2 labels"
    assert lines[1].endswith("fitted 1.000 (2-fold cross-validation)")
    assert lines[-1].endswith("out/pets.json, version 1")
    assert fit() == 2
    assert "there is a classifier 'pets' already, of version 1" in capsys.readouterr().err
    assert fit("--replace", "--label", "sea", "--label", "fire", "--augment") == 0
    out = capsys.readouterr().out
    assert "version 2" in out


def test_a_validation_measures_instead_of_the_pictures(
    fit: Fit, tmp_path: Path, png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
):
    """Three of four pictures of the validation are as the pictures say."""
    held = folder(tmp_path / "held", png, {"sea": ["red", "blue", "red"], "fire": ["blue"]})
    assert fit("--validation", held, "--json") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert (report["after"], report["measured"]) == (0.75, "validation")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pictures", "ROOT/none"], "none is not a folder; expected a folder of pictures for each class, such as"),
        (
            ["--pictures", "ROOT/shown/sea"],
            "sea has no folder in it, and 2 pictures; expected a folder of pictures for",
        ),
        (["--validation", "ROOT/other"], "ice is a folder of none of the 2 labels; expected fire, sea"),
        (["--label", "sea", "--label", "ice"], "shown/fire is a folder of none of the 2 labels; expected sea, ice"),
        (["--captions", "ROOT/captions.json"], "captions.json has no caption of fire/1.png, nor of 2 others"),
        (["--captions", "ROOT/all.json"], "the head 'prototype' reads no captions"),
        (["--param", "scale"], "--param 'scale' is not KEY=VALUE"),
        (["--param", "warm=1"], "warm: unknown key"),
        (["--augment", "51"], "augment is 51; expected 0 to 50"),
        (["--unlabelled", "ROOT/empty"], "empty has no picture; expected a folder of pictures without a label"),
        (["--method", "cosine"], "the head 'cosine' has nothing to fit"),
        (["--bundle", "nothere"], "nothere"),
        (["--pictures", "ROOT/broken"], "broken/sea/cut.png: the PNG picture is broken"),
    ],
)
def test_what_is_wrong_is_named(
    fit: Fit, shown: Path, tmp_path: Path, png: Callable[..., bytes], capsys: pytest.CaptureFixture[str],
    options: list[str], says: str,
):  # fmt: skip
    folder(tmp_path / "other", png, {"ice": ["red"]})
    folder(tmp_path / "broken", png, SHOWN)
    (tmp_path / "broken" / "sea" / "cut.png").write_bytes(png("red")[:45])
    (tmp_path / "empty").mkdir()
    names = [path.relative_to(shown).as_posix() for path in sorted(shown.rglob("*.png"))]
    (tmp_path / "captions.json").write_text(json.dumps({names[0]: ["a fire"]}))
    (tmp_path / "all.json").write_text(json.dumps({name: ["a sea", "more"] for name in names}))
    assert fit(*(option.replace("ROOT", str(tmp_path)) for option in options)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "pets.json").exists()


def test_classes_are_read_in_the_order_of_their_names(shown: Path, png: Callable[..., bytes]):
    (shown / ".hidden").mkdir()
    (shown / "sea" / "deep").mkdir()
    (shown / "sea" / "deep" / "a.JPG").write_bytes(png("red"))
    (shown / "sea" / "notes.txt").write_text("no picture")
    classes: dict[str, Any] = read_classes(shown)
    assert {name: [path.name for path in paths] for name, paths in classes.items()} == {
        "fire": ["0.png", "1.png"], "sea": ["0.png", "1.png", "a.JPG"],
    }  # fmt: skip
    (shown / "ash").mkdir()
    with pytest.raises(BadRequest, match=r"ash has no picture \(\.jpg, \.jpeg, .*\.webp, .*\); .* or remove it"):
        read_classes(shown)
