"""What the tests of operators share: a few nodes in ONNX Runtime, kernels, how near bytes are, a process apart."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from calmclip.export.functions import BODIES
from calmclip.models.ops import build
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import DOMAIN, VERSION, Op

ROOT = Path(__file__).parents[3]
ISAS = build.INT8_ISAS.get(platform.machine(), ("scalar",))
Feeds = dict[str, np.ndarray]


def node(op: Op, inputs: Iterable[str], outputs: Iterable[str], **attributes) -> onnx.NodeProto:
    return helper.make_node(op.name, list(inputs), list(outputs), domain=DOMAIN, **attributes)


def model(nodes, inputs, outputs, constants: Feeds | None = None, functions=()) -> onnx.ModelProto:
    """``inputs``, ``outputs``: name -> (dtype, shape); of a shape that is None not even the rank is known."""

    def declare(tensors) -> list[onnx.ValueInfoProto]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for name, (dtype, _) in tensors.items()}
        return [helper.make_tensor_value_info(name, kinds[name], shape) for name, (_, shape) in tensors.items()]

    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", declare(inputs), declare(outputs), held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)


def load(made: onnx.ModelProto, library: Library | None, *, threads: int = 1, path=None) -> ort.InferenceSession:
    """``path``: where what ONNX Runtime makes of it is written."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # many tests are after refusals
    options.enable_cpu_mem_arena = False  # each tensor has memory of its own, whose ends a sanitizer knows
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def session(op: Op, feeds: Feeds, attributes, *, library: Library | None, constants=(), shapes=None, body=False, **how):
    """Of one node, by the library, or else by its function, which the model has then, or with ``body``.

    Sides of what is fed are known at run time only, unless ``shapes`` has them; ``constants``: what the model holds.
    """
    given = op.attributes | attributes
    known = {name: [f"{name}_{axis}" for axis in range(array.ndim)] for name, array in feeds.items()} | (shapes or {})
    inputs = {name: (array.dtype, known[name]) for name, array in feeds.items() if name not in constants}
    outputs = {name: (tensor.dtype, None) for name, tensor in op.outputs.items()}
    functions = [BODIES[op.name](**given)] if body or library is None else []
    nodes = [node(op, op.inputs, op.outputs, **given)]
    return load(model(nodes, inputs, outputs, {name: feeds[name] for name in constants}, functions), library, **how)


def run(op: Op, feeds: Feeds, attributes, *, library: Library | None, constants=(), **how) -> list[np.ndarray]:
    """-> the node's outputs."""
    fed = {name: array for name, array in feeds.items() if name not in constants}
    return session(op, feeds, attributes, library=library, constants=constants, **how).run(None, fed)


def kernels(library: Library, name: str, prototype) -> dict[str, Callable]:
    """Instruction set -> function, of those that this processor has."""
    return {one.isa: prototype(one.address) for one in library.kernels if one.name == name and one.runs}


def kernel(library: Library, name: str, isa: str, prototype) -> Callable:
    """Where the processor has no such instructions, the test is skipped."""
    assert (name, isa) in {(one.name, one.isa) for one in library.kernels}, f"the library has no {name} of {isa}"
    functions = kernels(library, name, prototype)
    if isa not in functions:
        pytest.skip(f"no {isa} here")
    return functions[isa]


def near(y: np.ndarray, exact: np.ndarray, *, most: float = 0.01) -> bool:
    """Bytes against what they round, float64 before it is rounded: nowhere more than a step away, and rarely one."""
    expected = np.clip(np.rint(exact), 0, 255)
    apart = np.abs(y.astype(np.float64) - expected)
    return bool(apart.max(initial=0) <= 1 and (apart > 0).sum() <= np.ceil(most * apart.size))


def apart(file: str, library: Library, *arguments: object) -> list[str]:
    """The words that a file prints, run in a process of its own: there a crash is seen as a crash."""
    command = [sys.executable, file, str(library.path.parent), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.split()
