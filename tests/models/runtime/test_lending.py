"""Weights that are given back once they are packed: the same answers, and memory for them once."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calmclip.models.bundle.manifest import Graph, Tensor
from calmclip.models.ops.library import Library
from calmclip.models.runtime import lending, session
from calmclip.models.runtime.lending import Lent, Pages
from calmclip.models.runtime.session import Session, SessionOptions
from tests.lent import IDS, RANDOM, ROWS, WIDTH, make, opened, same

ROOT = Path(__file__).parents[3]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The names of the weights that the sessions of this test lend, and of those that they give back."""
    names: dict[str, list[str]] = {"lent": [], "back": []}
    give_back = Lent.give_back

    def noted(self: Lent, *arguments: Any) -> None:
        before = [*self.tensors]
        give_back(self, *arguments)
        names["lent"] += before
        names["back"] += [name for name in before if name not in self.tensors]

    monkeypatch.setattr(Lent, "give_back", noted)
    return names


def direct(path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, np.ndarray]:
    """The answer of ONNX Runtime over the file itself."""
    with monkeypatch.context() as patch:
        patch.setattr(session, "lend", lambda *_: None)
        return opened(path, **more).run(IDS)


def resident(session: Session) -> int:
    """Bytes of the session's pages that are in memory."""
    pages = session._kept[0]
    assert isinstance(pages, Pages)
    total, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            within = start < pages.address + pages.size and pages.address < end
        elif within and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone"),
]


def test_answers_are_the_same_and_packed_weights_are_not_in_memory(tmp_path, monkeypatch, given):
    path = make(tmp_path / "g.onnx")
    session = opened(path)
    assert given == {"lent": ["w0", "w1", "w2", "table"], "back": ["w0", "w1", "w2"]}
    table = ROWS * WIDTH
    assert table <= resident(session) < table + (64 << 10)
    answer = session.run(IDS)
    assert len(np.unique(answer["out"])) > 200
    assert same(answer, direct(path, monkeypatch))
    assert table <= resident(session) < table + (64 << 10)


def test_a_weight_of_many_nodes_is_given_back_once_each_has_packed_it(tmp_path, monkeypatch, given):
    path = make(tmp_path / "g.onnx", weights=2)
    answer = opened(path).run(IDS)
    assert given["back"] == ["w0", "w1"]
    assert same(answer, direct(path, monkeypatch))


READERS = {
    "another node": (
        [helper.make_node("Cast", ["w1"], ["y"], to=TensorProto.FLOAT)],
        ("float32", (WIDTH, WIDTH)),
        TensorProto.FLOAT,
    ),
    "a function's node": (
        [
            helper.make_node("Cast", ["out"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["w1"], ["g"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["f", "g"], ["y"]),
        ],
        ("float32", ("N", WIDTH)),
        TensorProto.FLOAT,
    ),
    "a graph in an If": (
        [
            helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
            helper.make_node(
                "If",
                ["yes"],
                ["y"],
                **{
                    f"{branch}_branch": helper.make_graph(
                        [helper.make_node("Identity", ["w1"], [f"{branch}_y"])],
                        branch,
                        [],
                        [helper.make_tensor_value_info(f"{branch}_y", TensorProto.INT8, (WIDTH, WIDTH))],
                    )
                    for branch in ("then", "else")
                },
            ),
        ],
        ("int8", (WIDTH, WIDTH)),
        TensorProto.INT8,
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_weight_that_something_else_reads_stays(tmp_path, monkeypatch, given, reader):
    nodes, promised, dtype = READERS[reader]
    path = make(tmp_path / "g.onnx", more=nodes, y=(dtype, promised[1]))
    answer = opened(path, y=promised).run(IDS)
    assert given["back"] == ["w0", "w2"]
    assert same(answer, direct(path, monkeypatch, y=promised))


def test_a_weight_that_is_an_output_stays(tmp_path, monkeypatch, given):
    path = make(tmp_path / "g.onnx", w1=(TensorProto.INT8, (WIDTH, WIDTH)))
    more = {"w1": ("int8", (WIDTH, WIDTH))}
    answer = opened(path, **more).run(IDS)
    assert given["back"] == ["w0", "w2"]
    assert same(answer, direct(path, monkeypatch, **more))


def test_weights_of_operators_left_to_their_functions_stay(tmp_path, monkeypatch, given):
    """ONNX Runtime gets no operator of ours, although the library is there."""
    path = make(tmp_path / "g.onnx")
    monkeypatch.setattr(session.ort.SessionOptions, "register_custom_ops_library", lambda *_: None)
    opened_anyway = opened(path)
    assert given == {"lent": ["w0", "w1", "w2", "table"], "back": []}
    assert same(opened_anyway.run(IDS), opened(path, ops="off").run(IDS))


def test_weights_of_operators_that_a_session_leaves_are_not_lent(tmp_path, library: Library):
    path = make(tmp_path / "g.onnx")
    assert lending.lend(path, library, {"QuantLinear"}) is None
    assert lending.lend(path, library, {"QuantConv"}) is not None


def test_a_node_that_packed_a_weight_counts_while_it_lives(tmp_path, library: Library):
    """Nodes that ONNX Runtime creates and drops while it optimizes have packed nothing that remains."""
    path = make(tmp_path / "g.onnx", weights=1)
    lent = lending.lend(path, library)
    assert lent
    address = lent.tensors["w0"].ctypes.data
    settings = session.ort.SessionOptions()
    settings.register_custom_ops_library(str(library.path))
    settings.add_session_config_entry(session._FOLDER, str(lent.folder))
    values = {name: session.ort.OrtValue.ortvalue_from_numpy(array) for name, array in lent.tensors.items()}
    for name, value in values.items():
        settings.add_initializer(name, value)
    with lending.counted(library, lent.pages) as packed:
        first = session.ort.InferenceSession(lent.model, settings)
        assert (packed(address), packed(address + 1), packed(0)) == (3, 0, 0)
        second = session.ort.InferenceSession(lent.model, settings)
        assert packed(address) == 6
        del first
        assert packed(address) == 3
        lent.give_back(packed)
        assert "w0" in lent.tensors or packed(address) == 3
    with lending.counted(library, lent.pages) as packed:
        del second
        assert packed(address) == 0  # and not less, for the nodes were counted by another


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_weight_stays_unless_as_many_nodes_packed_it_as_read_it(tmp_path, library: Library, count):
    lent = lending.lend(make(tmp_path / "g.onnx", weights=1), library)
    assert lent
    lent.give_back(lambda address: count)
    assert "w0" in lent.tensors
    lent.give_back(lambda address: 3)
    assert "w0" not in lent.tensors


def test_sessions_of_one_file_give_back_apart(tmp_path, monkeypatch):
    path = make(tmp_path / "g.onnx")
    answer = direct(path, monkeypatch)
    first, second = opened(path), opened(path)
    assert same(first.run(IDS), answer)
    del first
    third = opened(path)
    assert same(second.run(IDS), answer)
    assert same(third.run(IDS), answer)


@pytest.mark.parametrize("external", [False, True])
def test_a_file_that_is_cut_or_overwritten_in_place_changes_nothing(tmp_path, monkeypatch, external):
    """A process that maps it would be killed by the first, and answer otherwise after the second."""
    path = make(tmp_path / "g.onnx")
    if external:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    answer = direct(path, monkeypatch)
    session = opened(path)
    for file in tmp_path.iterdir():
        size = file.stat().st_size
        os.truncate(file, 0)
        assert same(session.run(IDS), answer)
        file.write_bytes(b"\xff" * size)
        assert same(session.run(IDS), answer)
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps


def test_without_the_library_nothing_is_lent(tmp_path, given):
    path = make(tmp_path / "g.onnx")
    assert opened(path, ops="off").run(IDS)["out"].shape == (4, WIDTH)
    assert given == {"lent": [], "back": []}


@pytest.mark.parametrize("ops", ["off", "required"])
def test_external_weights_that_no_operator_packs_are_read_and_not_mapped(tmp_path, ops):
    weight = RANDOM.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", WIDTH)) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "g.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin")
    tensor = Tensor(dtype="float32", shape=("N", WIDTH))
    session = Session(path, Graph(file="g.onnx", inputs={"x": tensor}, outputs={"y": tensor}), SessionOptions(ops=ops))
    os.truncate(tmp_path / "weights.bin", 0)
    x = RANDOM.normal(size=(3, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-4)


def test_the_most_external_tensors_that_a_model_holds(tmp_path, monkeypatch, library: Library):
    """Above it they are lent, for protobuf holds no more."""
    path = make(tmp_path / "g.onnx", more=READERS["another node"][0], y=(TensorProto.FLOAT, (WIDTH, WIDTH)))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    more = {"y": ("float32", (WIDTH, WIDTH))}
    answer = direct(path, monkeypatch, **more)
    monkeypatch.setattr(lending, "MOST", 1 << 16)
    lent = lending.lend(path, library)
    assert lent
    assert {"w1", "bias", "table"} <= lent.tensors.keys()
    assert same(opened(path, **more).run(IDS), answer)


def test_pages_that_were_given_back_end_the_process_that_reads_them():
    code = """
from calmclip.models.runtime.lending import Pages
import numpy as np
pages = Pages(100_000)
bytes_ = pages.array(np.dtype(np.uint8), (100_000,), 0)
bytes_[:] = 7
pages.give_back(4096 * 16, 4096)
print(bytes_[: 4096 * 16].sum(), bytes_[4096 * 17 :].sum(), flush=True)
print(bytes_[4096 * 16])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout.split(), done.returncode) == (["458752", str(7 * (100_000 - 17 * 4096))], -signal.SIGSEGV)


BOUND = """
import gc, os, sys
from pathlib import Path
from calmclip.models.runtime.heap import trim
from tests.lent import opened

def anonymous():
    gc.collect()
    trim()
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

opened(Path(sys.argv[1]))  # what the first session of a process leaves
before = anonymous()
session = opened(Path(sys.argv[2]), width=1024)
loaded = anonymous() - before
second = opened(Path(sys.argv[2]), width=1024)
both = anonymous() - before
del session, second
for _ in range(int(sys.argv[3])):
    opened(Path(sys.argv[2]), width=1024)
print(loaded, both, anonymous() - before)
"""


def test_weights_are_in_memory_once_and_not_after_the_session(tmp_path):
    """64 layers of 1 MiB. A second session shares the packed weights; four more leave nothing."""
    small, large = make(tmp_path / "small.onnx"), make(tmp_path / "large.onnx", layers=64, width=1024)
    packed = 64 << 20
    command = [sys.executable, "-c", BOUND, str(small), str(large), "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    loaded, both, left = map(int, done.stdout.split())
    assert packed <= loaded < 1.3 * packed
    assert both - loaded < 0.1 * packed
    assert left < 0.05 * packed
