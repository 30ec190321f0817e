"""ONNX files in parts, beside the library that defines their format."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from calmclip.models.runtime import onnx_file
from calmclip.models.runtime.onnx_file import NotRead, Reader

RANDOM = np.random.default_rng(0)
TENSORS = {
    "bytes": RANDOM.integers(-128, 128, (256, 300), np.int8),
    "table": RANDOM.integers(0, 256, (70_000, 1), np.uint8),
    "halves": RANDOM.normal(size=(3, 256, 64)).astype(np.float16),
    "floats": RANDOM.normal(size=(130, 130)).astype(np.float32),
    "numbers": RANDOM.integers(-9, 9, 9000),
    "flags": RANDOM.random(70_000) < 0.5,
    "small": np.arange(5, dtype=np.float32),
    "unused": RANDOM.normal(size=(9, 40, 50)),
}
LARGE = TENSORS.keys() - {"small"}


def model() -> onnx.ModelProto:
    """Every large tensor has readers of another kind; `bytes` one by a node and one by the graph inside an If."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["floats"], ["inner"])],
        "inner",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, (130, 130))],
    )
    nodes = [
        helper.make_node("Ours", ["x", "", "bytes"], ["a"], domain="ai.calmclip"),
        helper.make_node("Ours", ["x", "", "bytes"], ["b"], domain="ai.calmclip"),
        helper.make_node("Gather", ["table", "x"], ["c"], axis=0),
        helper.make_node("If", ["small"], ["d"], then_branch=inner, else_branch=inner),
        helper.make_node("Identity", ["halves"], ["e"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("B",)) for name in ("x", "flags", "d", "numbers")]
    tensors = [numpy_helper.from_array(array, name) for name, array in TENSORS.items()]
    graph = helper.make_graph(nodes, "g", ends[:2], ends[2:], initializer=tensors, doc_string="größe " * 40)
    body = helper.make_node("Identity", ["x"], ["y"])
    function = helper.make_function("ai.calmclip", "Ours", ["x"], ["y"], [body], [helper.make_opsetid("", 18)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.calmclip", 1)]
    whole = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    whole.metadata_props.add(key="k", value="v" * 300)
    return whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "g.onnx").write_bytes(model().SerializeToString())
    return tmp_path / "g.onnx"


def read(stored: onnx_file.Stored) -> np.ndarray:
    data = bytearray(stored.length)
    onnx_file.data(stored, memoryview(data))
    return np.frombuffer(data, stored.dtype).reshape(stored.shape)


def test_large_tensors_have_the_types_shapes_and_data_of_the_file(path: Path):
    stored = {part.name: part for part in onnx_file.read(path).stored}
    assert stored.keys() == LARGE
    for name, part in stored.items():
        assert part.dtype == TENSORS[name].dtype
        np.testing.assert_array_equal(read(part), TENSORS[name])


def test_readers_are_nodes_by_the_place_of_the_input_and_all_else_is_anonymous(path: Path):
    readers = {part.name: part.readers for part in onnx_file.read(path).stored}
    other = Reader("", "", 0)
    assert readers == {
        "bytes": [Reader("ai.calmclip", "Ours", 2)] * 2,
        "table": [Reader("", "Gather", 0)],
        "halves": [Reader("", "Identity", 0)],
        "floats": [other, other],
        "numbers": [other],  # an output of the graph
        "flags": [other],  # an input, which a caller may feed
        "unused": [],
    }


def test_a_model_with_all_its_data_is_the_file(path: Path):
    assert onnx.load_from_string(onnx_file.read(path).model(set())) == model()


def test_a_model_without_some_data_names_its_places(path: Path):
    apart = {"bytes", "floats"}
    light = onnx_file.read(path).model(apart)
    assert len(light) < len(model().SerializeToString()) - sum(TENSORS[name].nbytes for name in apart) + 1000
    (path.parent / "light.onnx").write_bytes(light)
    restored = onnx.load(path.parent / "light.onnx")  # reads the data from g.onnx
    assert {t.name: numpy_helper.to_array(t).tobytes() for t in restored.graph.initializer} == {
        name: array.tobytes() for name, array in TENSORS.items()
    }


def test_data_in_a_file_beside_the_graph_is_read_at_its_place(path: Path):
    onnx.save(model(), path, save_as_external_data=True, location="weights.bin", size_threshold=16)
    parts = onnx_file.read(path)
    assert {part.name: part.external for part in parts.stored} == dict.fromkeys(TENSORS, True)
    for part in parts.stored:
        np.testing.assert_array_equal(read(part), TENSORS[part.name])
    inlined = {t.name: t for t in onnx.load_from_string(parts.model(set())).graph.initializer}
    assert all(not external_data_helper.uses_external_data(tensor) for tensor in inlined.values())
    np.testing.assert_array_equal(numpy_helper.to_array(inlined["small"]), TENSORS["small"])


@pytest.mark.parametrize("location", ["", "../weights.bin", "inner/weights.bin", "/etc/hostname", "link"])
def test_data_elsewhere_is_not_read(path: Path, location: str):
    onnx.save(model(), path, save_as_external_data=True, location="weights.bin", size_threshold=16)
    (path.parent / "link").symlink_to(path.parents[1] / "elsewhere")
    (path.parents[1] / "elsewhere").write_bytes((path.parent / "weights.bin").read_bytes())
    changed = onnx.load(path, load_external_data=False)
    for tensor in changed.graph.initializer:
        tensor.external_data[0].value = location
    path.write_bytes(changed.SerializeToString())
    with pytest.raises(NotRead, match="not beside it"):
        onnx_file.read(path)


def test_data_that_ends_early_is_not_read(path: Path):
    onnx.save(model(), path, save_as_external_data=True, location="weights.bin", size_threshold=16)
    parts = onnx_file.read(path)
    (path.parent / "weights.bin").write_bytes(b"short")
    with pytest.raises(NotRead, match=r"weights\.bin ends within the data of"):
        parts.model(set())


def test_sides_may_be_packed(path: Path):
    """proto3 packs them, proto2 does not; readers take both."""
    data = bytes(range(256)) * 256
    sides, uint8 = _field(1, b"\x80\x80\x04"), b"\x10\x02"
    path.write_bytes(_field(7, _field(5, sides + uint8 + _field(8, b"w") + _field(9, data))))
    (stored,) = onnx_file.read(path).stored
    assert (stored.shape, read(stored).tobytes()) == ((65536,), data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.graph.initializer[0].dims.append(2), "has 76800 bytes, not 153600"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two initializers 'bytes'"),
        (lambda m: m.ClearField("graph"), "no graph"),
    ],
)
def test_what_contradicts_itself_is_not_read(path: Path, change, says: str):
    whole = model()
    change(whole)
    path.write_bytes(whole.SerializeToString())
    with pytest.raises(NotRead, match=says):
        onnx_file.read(path)


def test_graphs_inside_graphs_end(path: Path):
    message = b""
    for _ in range(onnx_file.DEEPEST + 2):  # a node, its attribute, and the graph in it
        message = _field(1, _field(5, _field(6, message)))
    path.write_bytes(_field(7, message))
    with pytest.raises(NotRead, match="graphs inside graphs"):
        onnx_file.read(path)


def test_a_damaged_file_is_not_read_or_read_but_nothing_else(path: Path):
    """Cut anywhere, and with other bytes around the tensors."""
    whole = bytearray(model().SerializeToString())
    ends = [*range(0, 400, 9), *range(len(whole) - 400, len(whole), 9)]
    refused = 0
    for place in ends:
        for damaged in (
            whole[:place],
            whole[:place] + bytes(RANDOM.integers(0, 256, 3, np.uint8)) + whole[place + 3 :],
        ):
            path.write_bytes(damaged)
            try:
                onnx_file.read(path)
            except NotRead:
                refused += 1
    assert refused > len(ends)  # every cut, and some of the others


def _field(number: int, content: bytes) -> bytes:
    size = len(content)
    return bytes([number << 3 | 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + content
