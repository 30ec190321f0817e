"""`calmclip ops check` passes here, and it fails if an operator differs from its oracle."""

import json
import re
from dataclasses import replace

import onnx
import pytest

from calmclip.export.functions import BODIES, alone
from calmclip.models.cli import main
from calmclip.models.ops import build, check, spec
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import Op
from calmclip.models.ops.table import OPS, TABLE, Probe, Row
from tests.bench.ops import benches

PROBES = [(row, probe) for row in TABLE for probe in row.probes]


@pytest.mark.parametrize(("row", "probe"), PROBES, ids=[probe.name for _, probe in PROBES])
def test_the_models_that_ship_are_those_of_the_export(row: Row, probe: Probe):
    graph = row.graph(probe)
    model = alone(row.op, graph.inputs, graph.outputs, probe.attributes)
    assert onnx.load(check.FOLDER / graph.file) == model, "python -m calmclip.export.functions writes them"


def test_the_table_has_every_spec_body_wrapper_bench_and_model():
    """The table has the order of the specs, of the local functions, and of the C++ list that registers the wrappers."""
    wrappers = re.findall(r"^OP\((\w+)\)$", (build.SOURCES / "ops" / "ops.inc").read_text(), re.MULTILINE)
    assert [op.key for op in OPS] == wrappers
    assert [op.name for op in OPS] == list(BODIES) == [op.name for op in vars(spec).values() if isinstance(op, Op)]
    assert benches()
    assert sorted(path.stem for path in check.FOLDER.iterdir()) == sorted(probe.name for _, probe in PROBES)


def test_every_operator_equals_its_oracle_by_the_library_and_by_the_function(
    library: Library, capsys: pytest.CaptureFixture[str]
):
    assert main(["ops", "check", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["probe"], r["way"]) for r in results] == [
        (probe.name, way) for _, probe in PROBES for way in ("library", "function")
    ]
    assert main(["ops", "check"]) == 0
    assert capsys.readouterr().out.count("ok  ") == len(results)


def test_a_wrong_answer_fails(library: Library):
    """The plain softmax is no oracle of the clipped one: they differ by more than 1e-6."""
    softmax = TABLE[0]
    plain = replace(softmax, oracle=lambda x, **_: softmax.oracle(x), probes=softmax.probes[1:])
    for result in check.check((plain,)):
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
    assert out.count("ok  ") == len(PROBES)
