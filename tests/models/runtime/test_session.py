"""Sessions over tiny graphs: the checks of a load, and the answers of a run."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, parser

from calmclip import models
from calmclip.models.bundle.manifest import Graph, Tensor
from calmclip.models.errors import BadRequest, BundleInvalid, CalmclipError
from calmclip.models.ops.library import Library, Mode
from calmclip.models.ops.spec import DOMAIN, VERSION
from calmclip.models.runtime.session import Session, SessionOptions, versions

Make = Callable[..., Session]


def model(shape: tuple[Any, ...] = ("B", 3), dtype: int = TensorProto.FLOAT) -> bytes:
    """sum, difference = a + b, a - b"""
    tensors = {name: helper.make_tensor_value_info(name, dtype, shape) for name in ("a", "b", "sum", "difference")}
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    graph = helper.make_graph(nodes, "two", [tensors["a"], tensors["b"]], [tensors["sum"], tensors["difference"]])
    opset = helper.make_opsetid("", 18)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString())


def graph(inputs: str = "a b", outputs: str = "sum difference", dtype: Any = "float32", shape: Any = ("B", 3)) -> Graph:
    tensor = Tensor(dtype=dtype, shape=shape)
    return Graph(
        file="two.onnx",
        inputs=dict.fromkeys(inputs.split(), tensor),
        outputs=dict.fromkeys(outputs.split(), tensor),
    )


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def session(promised: Graph | None = None, content: bytes | None = None, **options: Any) -> Session:
        (tmp_path / "two.onnx").write_bytes(model() if content is None else content)
        return Session(tmp_path / "two.onnx", promised or graph(), SessionOptions(**options))

    return session


A, B = np.array([[1, 2, 3]], np.float32), np.array([[10, 20, 30]], np.float32)


def test_arrays_by_name_in_and_out(make: Make):
    answer = make(threads=1).run({"b": B, "a": A})
    assert {name: array.tolist() for name, array in answer.items()} == {
        "sum": [[11, 22, 33]],
        "difference": [[-9, -18, -27]],
    }


def test_float_weights_stay_float(tmp_path: Path):
    """Also between quantized tensors, for which ONNX Runtime would quantize them: 0.1 beside 100 would become 0."""
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[b, 2, 1, 1] x) => (float[b, 2, 1, 1] y)
        <float step = {1.0}, float fine = {0.1}, uint8 nil = {0}, float[2, 2, 1, 1] w = {100, 0, 0.1, 0.1}>
        { x8 = QuantizeLinear (x, step, nil) xb = DequantizeLinear (x8, step, nil) z = Conv (xb, w)
          z8 = QuantizeLinear (z, fine, nil) y = DequantizeLinear (z8, fine, nil) }"""
    (tmp_path / "conv.onnx").write_bytes(parser.parse_model(text).SerializeToString())
    tensor = Tensor(dtype="float32", shape=("b", 2, 1, 1))
    promised = Graph(file="conv.onnx", inputs={"x": tensor}, outputs={"y": tensor})
    x = np.array([3, 5], np.float32).reshape(1, 2, 1, 1)
    y = Session(tmp_path / "conv.onnx", promised).run({"x": x})["y"]
    np.testing.assert_allclose(y.ravel(), [25.5, 0.8], rtol=1e-6)  # 300 is out of the range of 8 bits


def test_the_order_of_outputs_is_the_manifests(make: Make):
    assert list(make(graph(outputs="difference sum")).run({"a": A, "b": B})) == ["difference", "sum"]


def test_one_session_serves_many_threads(make: Make):
    session = make(threads=1)

    def add(n: int) -> float:
        return float(session.run({"a": A * n, "b": B})["sum"][0, 0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(add, range(64))) == [n + 10.0 for n in range(64)]


@pytest.mark.parametrize(
    ("promised", "says"),
    [
        (graph(inputs="a"), r"has the inputs \['a', 'b'\]; the manifest promises \['a'\]"),
        (graph(inputs="a b c"), r"promises \['a', 'b', 'c'\]"),
        (graph(outputs="sum"), r"has the outputs \['difference', 'sum'\]; the manifest promises \['sum'\]"),
        (graph(dtype="int64"), r"input 'a' as float32 \['B', 3\]; the manifest promises int64 \['B', 3\]"),
        (graph(shape=("B", 4)), r"input 'a' as float32 \['B', 3\]; the manifest promises float32 \['B', 4\]"),
        (graph(shape=("B",)), r"the manifest promises float32 \['B'\]"),
    ],
)
def test_a_graph_that_differs_from_the_manifest_is_refused(make: Make, promised: Graph, says: str):
    with pytest.raises(BundleInvalid, match=says):
        make(promised)


def test_a_dimension_may_be_dynamic_on_either_side(make: Make):
    assert make(graph(shape=("B", "D"))).run({"a": A, "b": B})["sum"].shape == (1, 3)
    assert make(graph(shape=(1, 3)), model((None, None))).run({"a": A, "b": B})["sum"].shape == (1, 3)


@pytest.mark.parametrize("content", [b"", b"no graph", model()[:40]])
def test_a_graph_that_does_not_load_is_refused_by_its_path(make: Make, content: bytes):
    with pytest.raises(BundleInvalid, match=r"two\.onnx does not load in ONNX Runtime \d+"):
        make(content=content)


def test_an_absent_file_is_refused(tmp_path: Path):
    with pytest.raises(BundleInvalid, match=r"absent\.onnx does not load"):
        Session(tmp_path / "absent.onnx", graph())


@pytest.mark.parametrize(
    "feeds",
    [
        {"a": A, "b": B, "c": B},
        {"a": A, "b": B.astype(np.int64)},
        {"a": A, "b": B[0]},
        {"a": A, "b": np.zeros((1, 4), np.float32)},
        {"a": A, "b": np.array([["x"] * 3])},
    ],
)
def test_feeds_the_graph_refuses_are_a_bad_request(
    make: Make, feeds: dict[str, Any], capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(BadRequest, match=r"graph two\.onnx refused \{'a': \('float32', "):
        make().run(feeds)
    assert capfd.readouterr().err == ""  # the error is raised, not printed


@pytest.mark.parametrize("feeds", [{"a": A}, {"a": np.zeros((2, 3), np.float32), "b": np.zeros((3, 3), np.float32)}])
def test_a_failed_run_is_not_the_callers_fault(make: Make, feeds: dict[str, Any]):
    with pytest.raises(Exception, match=r"missing|Non-zero status code") as caught:
        make().run(feeds)
    assert not isinstance(caught.value, CalmclipError)
    assert caught.value.__notes__[0].endswith("two.onnx")


def test_a_profile_is_written_where_asked(make: Make, tmp_path: Path):
    session = make(profile=str(tmp_path / "profile"))
    session.run({"a": A, "b": B})
    assert "Add" in Path(session.end_profiling()).read_text()


def test_versions_name_the_runtime():
    assert versions() == {"onnxruntime": onnxruntime.__version__}


@pytest.mark.parametrize(("ops", "by_kernel"), [("off", False), ("auto", True), ("required", True)])
def test_the_op_library_runs_custom_nodes_unless_it_is_off(
    library: Library, tmp_path: Path, ops: Mode, by_kernel: bool
):
    """The function of this graph is wrong on purpose: the answer shows whether the kernel ran."""
    name, opsets = "Softmax", [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    body = helper.make_node("Identity", ["x"], ["y"])
    defaults = [
        helper.make_attribute("axis", -1),
        helper.make_attribute("gamma", 0.0),
        helper.make_attribute("zeta", 1.0),
    ]
    function = helper.make_function(DOMAIN, name, ["x"], ["y"], [body], opsets[:1], attribute_protos=defaults)
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ("B", 3)) for end in ("a", "sum")]
    nodes = helper.make_graph([helper.make_node(name, ["a"], ["sum"], domain=DOMAIN)], "one", ends[:1], ends[1:])
    model = helper.make_model(nodes, opset_imports=opsets, functions=[function], ir_version=9)
    (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
    session = Session(tmp_path / "one.onnx", graph(inputs="a", outputs="sum"), SessionOptions(ops=ops))
    output = session.run({"a": np.zeros((1, 3), np.float32)})["sum"]
    assert output[0].tolist() == pytest.approx([1 / 3] * 3 if by_kernel else [0] * 3)


def test_a_session_writes_no_telemetry(tmp_path: Path):
    """ONNX Runtime 1.32 writes .ses into the temporary folder and a database into ~/.cache, to upload them."""
    (tmp_path / "two.onnx").write_bytes(model())
    home = tmp_path / "home"
    home.mkdir()
    code = "import sys; from calmclip.models.runtime.session import ort; ort.InferenceSession(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home)}
    root = Path(models.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, tmp_path / "two.onnx"], env=environment, cwd=root, check=True)
    assert not list(home.rglob("*"))


def counting(session: Session) -> list[int]:
    """The rows of each run of ``session`` from now on."""
    seen: list[int] = []
    run = session._run

    def count(feeds: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(feeds["a"]))
        return run(feeds)

    session._run = count  # type: ignore[method-assign]
    return seen


def test_many_rows_run_in_parts(make: Make):
    """Of nearly equal size, in order; one row always fits."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(7, 3)).astype(np.float32) for name in ("a", "b")}  # 24 bytes a row
    whole = make(threads=1, run_bytes=7 * 24).run(feeds)
    for size, parts in ((7 * 24, [7]), (7 * 24 - 1, [3, 4]), (3 * 24, [2, 2, 3]), (24, [1] * 7), (1, [1] * 7)):
        session = make(threads=1, run_bytes=size)
        seen = counting(session)
        answer = session.run(feeds)
        assert seen == parts
        assert answer.keys() == whole.keys()
        assert all((answer[name] == whole[name]).all() for name in whole)


def test_rows_that_depend_on_each_other_run_at_once(make: Make):
    session = make(graph().model_copy(update={"batch": False}), threads=1, run_bytes=1)
    seen = counting(session)
    session.run({"a": np.ones((5, 3), np.float32), "b": np.ones((5, 3), np.float32)})
    assert seen == [5]


@pytest.mark.parametrize(("threads", "parts"), [(1, [4096, 4096]), (2, [8192])])
def test_one_thread_runs_many_bytes_in_parts(make: Make, threads: int, parts: list[int]):
    session = make(graph(shape=("B", 56)), model(("B", 56)), threads=threads)
    seen = counting(session)
    feeds = {name: np.ones((8192, 56), np.float32) for name in ("a", "b")}  # 3.5 MiB
    assert (session.run(feeds)["sum"] == 2).all()
    assert seen == parts


def test_arrays_of_different_rows_run_at_once(make: Make):
    """A row of one array is added to each row of the other."""
    session = make(threads=1, run_bytes=1)
    seen = counting(session)
    answer = session.run({"a": np.ones((5, 3), np.float32), "b": np.ones((1, 3), np.float32)})
    assert seen == [5]
    assert answer["sum"].tolist() == [[2] * 3] * 5
