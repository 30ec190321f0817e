"""The table "kernel x instruction set"."""

import re

import pytest

from calmclip.models.ops import build
from calmclip.models.ops.library import Library
from tests.bench import ops_isas


def test_every_kernel_of_bytes_has_a_row():
    text = (build.SOURCES / "kernels" / "list.inc").read_text()
    named = re.findall(r"^(?:INT8|BYTE|TABLE)_KERNEL\((\w+),", text, re.MULTILINE)
    assert set(named) == {row.kernel for row in ops_isas.ROWS}


def test_a_row_has_a_figure_for_each_instruction_set_that_runs(library: Library, capsys: pytest.CaptureFixture[str]):
    ops_isas.main(["--kernel", "quant_max_pool", "--seconds", "0", "--scalar"])
    head, _, row = capsys.readouterr().out.split("\n\n")[1].splitlines()
    runs = [kernel.isa for kernel in library.kernels if kernel.name == "quant_max_pool" and kernel.runs]
    assert head.split(" | ")[1:] == [*runs[:-1], f"{runs[-1]} |"]
    assert all(float(cell) > 0 for cell in row.strip("| ").split(" | ")[1:])


def test_the_calls_of_a_row_are_as_many_as_asked(library: Library, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    monkeypatch.setattr(ops_isas, "bind", lambda row, places: {isa: lambda isa=isa: made.append(isa) for isa in places})
    ops_isas.main(["--kernel", "quant_lookup", "--isa", "scalar", "--calls", "3"])
    assert made == ["scalar"] * 3
