"""Graphs whose weights our operators pack, for tests of what is lent and given back."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calmclip.export.functions import BODIES
from calmclip.models.bundle.manifest import Graph, Tensor
from calmclip.models.ops.library import Mode
from calmclip.models.ops.spec import DOMAIN, VERSION
from calmclip.models.runtime.session import Session, SessionOptions

WIDTH, ROWS = 320, 500
RANDOM = np.random.default_rng(0)
Nodes = list[onnx.NodeProto]
IDS = {"ids": np.array([3, 1, 499, 7])}


def make(path: Path, layers: int = 3, width: int = WIDTH, more: Nodes = (), weights: int = 0, **outputs: Any) -> Path:  # type: ignore[assignment]
    """A file of a graph: a table, from which ids gather rows of uint8, and ``layers`` of QuantLinear; ``weights``: so
    many layers have a weight of their own (0: all). ``more``: nodes, which may read the weights w0, w1 and so on."""
    constants: dict[str, Any] = {"table": RANDOM.integers(0, 256, (ROWS, width), np.uint8)}
    constants |= {"step": np.float32(0.02), "zero": np.uint8(128), "bias": np.zeros(width, np.float32)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x0"])]
    for i in range(layers):
        weight = f"w{i % (weights or layers)}"
        constants[weight] = RANDOM.integers(-128, 128, (width, width), np.int8)
        output = "out" if i == layers - 1 else f"x{i + 1}"
        ends = [f"x{i}", "step", "zero", weight, "fine", "bias", "step", "zero"], [output]
        nodes.append(helper.make_node("QuantLinear", *ends, domain=DOMAIN, activation=0))
    constants["fine"] = np.float32(0.0012)
    known = {"out": (TensorProto.UINT8, ("N", width)), **outputs}
    graph = helper.make_graph(
        [*nodes, *more],
        "layers",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ("N",))],
        [helper.make_tensor_value_info(name, *known[name]) for name in known],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        graph, opset_imports=opsets, functions=[BODIES["QuantLinear"](activation=0)], ir_version=10
    )
    path.write_bytes(model.SerializeToString())
    return path


def opened(path: Path, ops: Mode = "required", width: int = WIDTH, **more: tuple[str, tuple[Any, ...]]) -> Session:
    outputs = {"out": ("uint8", ("N", width)), **more}
    promised = Graph(
        file=path.name,
        inputs={"ids": Tensor(dtype="int64", shape=("N",))},
        outputs={name: Tensor(dtype=dtype, shape=shape) for name, (dtype, shape) in outputs.items()},  # type: ignore[arg-type]
    )
    return Session(path, promised, SessionOptions(threads=1, ops=ops))


def same(answer: Any, other: Any) -> bool:
    return answer.keys() == other.keys() and all(answer[name].tobytes() == other[name].tobytes() for name in answer)
