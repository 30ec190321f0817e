"""The verbs without torch or HTTP, where what they are given is wrong."""

from pathlib import Path

import pytest

from models.cli import main


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
