"""Shared parts of the tests of operators: contracts, nodes, kernels, comparisons, and separate processes."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from calmclip.export.functions import BODIES
from calmclip.models.ops import build
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import DOMAIN, VERSION, Op
from tests import numpy_torch
from tests.models.ops import emulated

numpy_torch.stand_in()  # for files that run separately
ROOT = Path(__file__).parents[3]
ISAS = build.isas("INT8_")  # of kernels of byte products
BYTE_ISAS = build.isas("BYTE_")
Feeds = dict[str, Any]
Names = Iterable[str]
Prototype = Callable[[int], Callable[..., Any]]


@dataclass(frozen=True)
class Contract:
    """One operator, for the tests of all operators. The list `CONTRACTS` of the operator's file contains it.

    ``draw``: a seed, and whether scales have one number per column -> small inputs; ``attributes``: those of the node.
    ``refused``: new inputs or attributes (a list: an input of that shape), and the error that they cause.
    ``large``: inputs and attributes worth several threads. ``in_place``: the inputs whose memory y may take.
    ``any_side``: the inputs whose sides may be unknown. ``empty``: inputs, attributes, and the shape of the outputs;
    ``empty_by_function``: whether the function takes them, too (nodes of ONNX Runtime may crash on empty tensors).
    """

    op: Op
    draw: Callable[[int, bool], Feeds]
    refused: list[tuple[dict[str, Any], str]]
    attributes: dict[str, Any] = field(default_factory=dict)
    large: tuple[Feeds, dict[str, Any]] | None = None
    in_place: tuple[str, ...] = ()
    any_side: tuple[str, ...] = ()
    empty: list[tuple[Feeds, dict[str, Any], tuple[int, ...]]] = field(default_factory=list)
    empty_by_function: bool = False


def gather(name: str) -> list[Any]:
    """The lists called ``name`` of all test files in this folder, as one list."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    modules = [import_module(f"tests.models.ops.{file.stem}") for file in files]
    return [item for module in modules for item in getattr(module, name, ())]


def node(op: Op, inputs: Iterable[str], outputs: Iterable[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op.name, list(inputs), list(outputs), domain=DOMAIN, **attributes)


def model(
    nodes: Iterable[Any], inputs: Feeds, outputs: Feeds, constants: Feeds | None = None, functions: Iterable[Any] = ()
) -> onnx.ModelProto:
    """``inputs``, ``outputs``: name -> (dtype, shape). A shape of None leaves even the rank open."""

    def declare(tensors: Feeds) -> list[onnx.ValueInfoProto]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for name, (dtype, _) in tensors.items()}
        return [helper.make_tensor_value_info(name, kinds[name], shape) for name, (_, shape) in tensors.items()]

    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", declare(inputs), declare(outputs), initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)


def load(proto: onnx.ModelProto, library: Library | None, *, threads: int = 1, path: Path | None = None) -> Any:
    """``path``: the file for the graph as ONNX Runtime optimizes it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # many tests expect a refusal
    options.enable_cpu_mem_arena = False  # each tensor has its own memory, so a sanitizer knows its ends
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def session(
    op: Op, feeds: Feeds, attributes: Feeds, *, library: Library | None, constants: Names = (),
    shapes: Feeds | None = None, body: bool = False, **how: Any,
) -> Any:  # fmt: skip
    """A session of one node. Without a library, or with ``body``, the model carries the local function.

    Sides of fed inputs are unknown before a run, unless ``shapes`` has them. ``constants``: inputs in the model.
    """
    attributes = op.attributes | attributes
    sides = {name: [f"{name}_{axis}" for axis in range(array.ndim)] for name, array in feeds.items()} | (shapes or {})
    inputs = {name: (array.dtype, sides[name]) for name, array in feeds.items() if name not in constants}
    outputs = {name: (tensor.dtype, None) for name, tensor in op.outputs.items()}
    functions = [BODIES[op.name](**attributes)] if body or library is None else []
    nodes = [node(op, op.inputs, op.outputs, **attributes)]
    return load(model(nodes, inputs, outputs, {name: feeds[name] for name in constants}, functions), library, **how)


def run(op: Op, feeds: Feeds, attributes: Feeds, *, library: Library | None, constants: Names = (), **how: Any) -> Any:
    """-> the node's outputs."""
    fed = {name: array for name, array in feeds.items() if name not in constants}
    return session(op, feeds, attributes, library=library, constants=constants, **how).run(None, fed)


def runnable(library: Library, name: str) -> dict[str, int]:
    """Instruction set -> address, for those of this processor, and those that can be emulated here."""
    listed = [kernel for kernel in library.kernels if kernel.name == name]
    places = {kernel.isa: kernel.address for kernel in listed if kernel.runs}
    for kernel in listed:
        if kernel.isa in build.EMULATED and kernel.isa not in places and "avx2" in places:
            places[kernel.isa] = emulated.addresses(kernel.isa)[name]
    return places


def kernels(library: Library, name: str, prototype: Prototype) -> dict[str, Callable[..., Any]]:
    """Instruction set -> function, for the instruction sets that run here."""
    return {isa: prototype(address) for isa, address in runnable(library, name).items()}


def kernel(library: Library, name: str, isa: str, prototype: Prototype) -> Callable[..., Any]:
    """The kernel's function; the test is skipped if the processor lacks the instructions."""
    assert (name, isa) in {(k.name, k.isa) for k in library.kernels}, f"the library has no {name} of {isa}"
    functions = kernels(library, name, prototype)
    if isa not in functions:
        pytest.skip(f"no {isa} here")
    return functions[isa]


def near(y: np.ndarray, exact: np.ndarray, *, most: float = 0.01) -> bool:
    """Whether y is ``exact`` (float64, in steps of y) rounded: at most a step off, and that at most ``most`` times."""
    expected = np.clip(np.rint(exact), 0, 255)
    difference = np.abs(y.astype(np.float64) - expected)
    return bool(difference.max(initial=0) <= 1 and (difference > 0).sum() <= np.ceil(most * difference.size))


class Edge:
    """Tensors whose last byte is the last byte of readable memory."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def lay(self, x: np.ndarray) -> int:
        """The address of a copy that ends at the end of its memory."""
        readable = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
        self.maps.append(memory)
        edge = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        ctypes.memmove(edge - x.nbytes, x.ctypes.data, x.nbytes)
        return edge - x.nbytes


def run_separately(file: str, library: Library, *arguments: object) -> list[str]:
    """The words that a file prints, run in a separate process, so that a crash fails the test and not the run."""
    command = [sys.executable, file, str(library.path.parent), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.split()
