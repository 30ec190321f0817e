"""`calmclip ops check`: it passes here, and it fails where an operator is not its oracle."""

import json
from dataclasses import replace

import onnx
import pytest

from calmclip.export.functions import BODIES, alone
from calmclip.models.cli import main
from calmclip.models.ops import build, check
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import OPS


@pytest.mark.parametrize("probe", check.PROBES, ids=lambda probe: probe.name)
def test_the_models_that_ship_are_those_that_export_makes(probe: check.Probe):
    made = alone(probe.op, probe.graph.inputs, probe.graph.outputs, probe.attributes)
    assert onnx.load(check.FOLDER / probe.graph.file) == made, "python -m calmclip.export.functions prints them anew"


def test_every_operator_has_a_body_and_a_probe():
    assert {op.name for op in OPS} == set(BODIES) == {probe.op.name for probe in check.PROBES}
    assert {path.name for path in check.FOLDER.iterdir()} == {probe.graph.file for probe in check.PROBES}


def test_every_operator_is_its_oracle_compiled_and_as_a_function(library: Library, capsys: pytest.CaptureFixture[str]):
    assert main(["ops", "check", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["probe"], r["way"]) for r in results] == [
        (probe.name, way) for probe in check.PROBES for way in ("library", "function")
    ]
    assert main(["ops", "check"]) == 0
    assert capsys.readouterr().out.count("ok  ") == len(results)


def test_another_answer_fails(library: Library):
    """The oracle of the plain softmax is none of the clipped one, whose values are elsewhere by more than 1e-6."""
    plain, clipped = check.PROBES[:2]
    for result in check.check((replace(clipped, expected=plain.expected),)):
        assert not result.passed
        assert 1e-4 < result.difference < 1e-2


def test_without_a_library_the_functions_are_checked_and_the_verb_fails(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert main(["ops", "check"]) == 1
    out = capsys.readouterr().out
    assert "FAIL library" in out
    assert "no op library is built" in out
    assert out.count("ok  ") == len(check.PROBES)
