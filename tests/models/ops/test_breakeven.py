"""Operators whose kernels lose to their functions on this processor are left to ONNX Runtime."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from calmclip.export.functions import alone
from calmclip.models.cli import main
from calmclip.models.ops import breakeven, build, check, trial
from calmclip.models.ops.breakeven import KERNELS, LOSES, PICTURES, Measured
from calmclip.models.ops.library import MODES, find, mask
from calmclip.models.ops.table import OPS, TABLE
from calmclip.models.runtime.session import Session, SessionOptions


@pytest.fixture(autouse=True)
def ratios(library, tmp_path, monkeypatch):
    """A file of ratios that is not the library's own; at first there is none."""
    path = tmp_path / "ratios.json"
    monkeypatch.setattr(breakeven, "ratios_file", lambda library: path)
    monkeypatch.setattr(trial, "ratios_file", lambda library: path)
    return path


@pytest.fixture
def scalar(library):
    mask({kernel.isa for kernel in library.kernels} - {"scalar"})
    yield find("required")
    mask(())


def write(path, library, ratios, **changes):
    measured = replace(Measured(library.sha256, breakeven.processor(library), ratios), **changes)
    path.write_text(json.dumps(measured.as_json()))


def test_the_table_has_every_operator_and_kernels_of_the_list(library):
    assert [op.name for op in OPS] == [name for name in KERNELS if name != PICTURES]
    assert {*KERNELS.values()} <= library.isas.keys()
    assert LOSES.keys() <= KERNELS.keys()
    assert {isa for isas in LOSES.values() for isa in isas} <= build.ISA_FLAGS.keys()


def test_the_trials_have_every_operator_and_the_models_that_ship():
    assert {case.op.name for case in trial.CASES} == {op.name for op in OPS}
    assert sorted(path.name for path in trial.FOLDER.iterdir()) == sorted(case.graph.file for case in trial.CASES)
    for case in trial.CASES:
        graph, (_, constants, elsewhere) = case.graph, case.drawn()
        model = alone(case.op, graph.inputs, graph.outputs, case.attributes, constants, elsewhere)
        stored = onnx.load(trial.FOLDER / graph.file, load_external_data=False)
        assert stored == model, "python -m calmclip.export.functions writes them"


def test_without_ratios_the_table_decides(library, scalar):
    choices = breakeven.choices(scalar)
    assert {name for name, choice in choices.items() if not choice.compiled} == {
        name for name, isas in LOSES.items() if "scalar" in isas
    }
    assert choices["QuantLinear"].why == "the table, for scalar kernels"
    mask(())
    assert breakeven.left(find("required")) == () or library.isas["quant_linear"] == "scalar"


@pytest.mark.parametrize(
    ("ratio", "compiled"), [(0.5, False), (0.89, False), (0.91, None), (1.0, None), (1.09, None), (1.11, True)]
)
@pytest.mark.parametrize("op", ["QuantLinear", "QuantLookup"])  # the table leaves the first
def test_a_ratio_overrules_the_table_unless_it_is_near_1(scalar, ratios, op, ratio, compiled):
    write(ratios, scalar, {op: ratio})
    choice = breakeven.choices(scalar)[op]
    assert choice.ratio == ratio
    if compiled is None:
        assert choice.compiled == ("scalar" not in LOSES.get(op, ()))
        assert choice.why == "the table, for scalar kernels"
    else:
        assert choice.compiled is compiled
        assert choice.why == "measured on this processor"
    assert (op in breakeven.left(scalar)) is not choice.compiled
    assert breakeven.left(scalar, "all") == ()


def test_ratios_of_another_build_processor_or_instruction_sets_do_not_count(library, ratios):
    for changes in ({"sha256": "0" * 64}, {"processor": "another; scalar"}):
        write(ratios, library, {"Softmax": 0.1}, **changes)
        assert breakeven.read(library) is None
        assert breakeven.choices(library)["Softmax"].ratio is None
    write(ratios, library, {"Softmax": 0.1})
    assert breakeven.read(library) is not None
    try:
        mask({isa for isa in library.isas.values() if isa != "scalar"})
        assert breakeven.read(find("required")) is None or {*library.isas.values()} == {"scalar"}
    finally:
        mask(())
    for text in ("", "[]", "{}", '{"sha256": 1, "processor": 2, "ratios": [3]}', '{"ratios": {"Softmax": "much"}}'):
        ratios.write_text(text)
        assert breakeven.read(library) is None


def test_a_left_operator_runs_by_its_function_and_the_others_compiled(library, ratios, tmp_path):
    """By the node that a profile names; the answers are those of the oracle either way."""
    write(ratios, library, {"QuantAdd": 0.5, "QuantLookup": 2})
    for op, left in (("QuantAdd", ("auto", "required", "off")), ("QuantLookup", ("off",))):
        row = next(row for row in TABLE if row.op.name == op)
        graph, feeds = row.graph(row.probes[0]), row.probes[0].draw(np.random.default_rng(0))
        for mode in MODES:
            options = SessionOptions(threads=1, ops=mode, profile=str(tmp_path / mode))
            session = Session(check.FOLDER / graph.file, graph, options)
            answers = session.run(feeds).values()
            ran = {event["args"].get("op_name") for event in json.loads(Path(session.end_profiling()).read_text())}
            assert (op in ran) is (mode not in left), (op, mode)
            for answer, oracle in zip(answers, row.expected(feeds, row.probes[0]), strict=True):
                assert np.abs(answer.astype(int) - oracle).max() <= row.tolerance


def test_a_graph_without_the_function_takes_the_kernel(library, ratios, tmp_path):
    """No bundle should lack one; such a graph must not stop to load because a processor is slow."""
    write(ratios, library, {"Softmax": 0.5})
    row = TABLE[0]
    graph = row.graph(row.probes[0])
    model = onnx.load(check.FOLDER / graph.file)
    del model.functions[:]
    onnx.save(model, tmp_path / graph.file)
    x = np.zeros((2, 3), np.float32)
    (y,) = Session(tmp_path / graph.file, graph, SessionOptions(ops="auto")).run({"x": x}).values()
    assert np.allclose(y, 1 / 3)


def test_measuring_finds_the_faster_side_and_ignores_a_function_that_answers_otherwise(library, monkeypatch):
    """The function does three times the work, then it also answers otherwise, as one does whose products saturate."""
    cases = tuple(case for case in trial.CASES if case.op.name in ("QuantAdd", "QuantLookup"))
    real = trial.pair

    def slow(case):
        of = real(case)
        return replace(of, function=lambda: of.compiled() and of.compiled() and of.compiled())

    monkeypatch.setattr(trial, "pair", slow)
    measured = trial.measure(library, cases)
    assert measured.keys() == {"QuantAdd", "QuantLookup"}
    assert all(2 < ratio < 4 for ratio in measured.values()), measured
    monkeypatch.setattr(trial, "pair", lambda case: replace(of := real(case), function=lambda: (of.compiled()[0] + 3,)))
    assert trial.measure(library, cases[:1]) == {}


def test_build_measures_once_and_info_says_what_is_left(library, ratios, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(trial, "measure", lambda library: asked.append(library) or {"Softmax": 0.25, "QuantAdd": 1.5})
    for _ in range(2):
        assert main(["ops", "build", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["measured"]
    assert len(asked) == 1
    assert main(["ops", "info", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["measured"] is True
    assert value["ops"]["Softmax"] | {"inputs": 0, "attributes": 0} == {
        "inputs": 0, "attributes": 0, "compiled": False, "isa": library.isas["softmax_reload"], "ratio": 0.25,
        "why": "measured on this processor",
    }  # fmt: skip
    assert main(["ops", "info"]) == 0
    out = capsys.readouterr().out
    assert "Softmax                  left     measured on this processor, 0.25 times as fast as its function" in out
    assert "QuantAdd                 compiled measured on this processor, 1.50 times" in out
    assert "pictures                 compiled the table" in out
    assert breakeven.processor(library) in out


def test_build_goes_on_if_it_cannot_measure(library, ratios, monkeypatch, capsys):
    def fail(library):
        raise OSError("no space is left")

    monkeypatch.setattr(trial, "measure", fail)
    assert main(["ops", "build", "--json"]) == 0
    done = capsys.readouterr()
    assert json.loads(done.out)["measured"] is False
    assert "the operators were not measured (no space is left); a table says which are used" in done.err
    assert main(["ops", "info"]) == 0
    assert "not measured, so a table says" in capsys.readouterr().out
