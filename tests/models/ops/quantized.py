"""What the tests of operators on bytes share: one node in ONNX Runtime, its kernels, and how near bytes are."""

import platform
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from onnx import numpy_helper

from calmclip.export.functions import alone
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.ops import build
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import Op

ISAS = build.INT8_ISAS.get(platform.machine(), ("scalar",))


def session(
    op: Op, feeds: dict[str, np.ndarray], attributes, *, library: Library | None, threads: int = 1, constants=()
):
    """Of one node, by the library or by its function; every side is known at run time only, but of ``constants``."""
    sides = lambda name, rank: tuple(f"{name}_{axis}" for axis in range(rank))  # noqa: E731
    inputs = {name: Tensor(dtype=str(x.dtype), shape=sides(name, x.ndim)) for name, x in feeds.items()}
    rank = {"QuantPatches": 3}.get(op.name, feeds[next(iter(op.inputs))].ndim)
    outputs = {name: Tensor(dtype=tensor.dtype, shape=sides(name, rank)) for name, tensor in op.outputs.items()}
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    model = alone(op, inputs, outputs, attributes)
    for name in constants:
        model.graph.initializer.append(numpy_helper.from_array(feeds[name], name))
        model.graph.input.remove(next(given for given in model.graph.input if given.name == name))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op: Op, feeds: dict[str, np.ndarray], attributes, *, library: Library | None, threads: int = 1):
    """-> the node's outputs."""
    return session(op, feeds, attributes, library=library, threads=threads).run(None, feeds)


def kernel(library: Library, name: str, isa: str, prototype) -> Callable | None:
    """The function, or None where the processor has no such instructions."""
    found = [one for one in library.kernels if (one.name, one.isa) == (name, isa)]
    assert found, f"the library has no {name} of {isa}"
    return prototype(found[0].address) if found[0].runs else None


def near(y: np.ndarray, exact: np.ndarray, *, most: float = 0.01) -> bool:
    """Bytes against what they round, float64 before it is rounded: nowhere more than a step away, and rarely one."""
    expected = np.clip(np.rint(exact), 0, 255)
    apart = np.abs(y.astype(np.float64) - expected)
    return bool(apart.max(initial=0) <= 1 and (apart > 0).sum() <= np.ceil(most * apart.size))
