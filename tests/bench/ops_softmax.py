"""Softmax: the op in ONNX Runtime against ONNX Runtime's own and torch's, the clipped op against four standard ops, and
every form of the kernel alone.

    python -m tests.bench.ops_softmax --threads 1 [--quick]

Sessions have the same options (ONNX Runtime's arena on). All sides, torch too, write to one buffer that was touched
before, by IO binding, so no side pays for fresh pages or for the caches of another side. Rows are heads * tokens
of a batch: 600x50 is ViT-B/32 (12 heads), 2464x77 the text tower (8 heads, batch 4), 2364x197 ViT-B/16 (12 heads),
4112x257 ViT-L/14 (16 heads), 9232x577 the same at 336 pixels. Values are normal, times 3. "causal" is masked with
-inf as in text towers. Kernels run on one thread; "copy" is numpy's, the same bytes read and written. The ratio after a
side is the speed-up of the first side.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import NodeProto, TensorProto, helper

from calmclip.models.ops.spec import DOMAIN, SOFTMAX, VERSION
from tests.bench.alternate import alternate, line, machine
from tests.bench.ops import library, options

OPS = (SOFTMAX,)
ATTENTION = [(600, 50), (2464, 77), (2364, 197), (4112, 257), (9232, 577)]
OTHERS = [(512, 1000), (128, 8192), (1, 1_000_000)]
LONG = [(1, 64_000_000)]
KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2, *[ctypes.c_float] * 2, ctypes.c_bool)
FORMS = [("two_pass", True), ("two_pass", False), ("reload", False), ("recompute", False), ("recompute", True)]
GAMMA = -0.03
CHAIN = 12
Sides = dict[str, Callable[[], object]]


def main() -> None:
    arguments = options(__doc__, 3.0, "less time, and no row of 64 million").parse_args()
    built = library()
    torch.set_num_threads(arguments.threads)
    seconds = 0.5 if arguments.quick else arguments.seconds
    long = [] if arguments.quick else LONG
    print(machine(arguments.threads))

    print("\nplain: the op (function: what runs without the library)")
    ours = _session([_node()], arguments.threads, str(built.path))
    theirs = _session([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], arguments.threads)
    function = _session([_node()], arguments.threads, function=True)
    for shape in [*ATTENTION, *OTHERS, *long]:
        for name, x in _inputs(shape):
            y = np.zeros_like(x)
            source, target = torch.from_numpy(x), torch.from_numpy(y)
            sides: Sides = {
                "op": _bound(ours, x, y),
                "onnxruntime": _bound(theirs, x, y),
                "torch": partial(torch.softmax, source, -1, out=target),
            }
            if shape in ATTENTION:
                sides["function"] = _bound(function, x, y)
            _measure(name, sides, seconds)

    print(f"\nin a graph, where it writes over its input: {CHAIN} of Neg and Softmax in turn")
    ours = _session(_chain(domain=DOMAIN), arguments.threads, str(built.path))
    theirs = _session(_chain(axis=-1), arguments.threads)
    for shape in ATTENTION:
        for name, x in _inputs(shape)[:1]:  # a chain's inputs are not masked
            y = np.zeros_like(x)
            _measure(name, {"op": _bound(ours, x, y), "onnxruntime": _bound(theirs, x, y)}, seconds)

    print(f"\nclipped (gamma {GAMMA}, zeta 1): the op, against Softmax, Mul, Add, Clip")
    ours = _session([_node(gamma=GAMMA)], arguments.threads, str(built.path))
    theirs = _session(_four(), arguments.threads)
    for shape in ATTENTION:
        for name, x in _inputs(shape):
            y = np.zeros_like(x)
            _measure(name, {"op": _bound(ours, x, y), "four ops": _bound(theirs, x, y)}, seconds)

    best = {kernel.name: kernel for kernel in built.kernels if kernel.runs}  # the last that runs
    print(f"\nkernels alone ({best['softmax_reload'].isa}, one thread; + s: stores past the caches)")
    for shape in [*ATTENTION, *OTHERS, *([] if arguments.quick else [(1, 16_000_000), (16, 1_000_000)]), *long]:
        x = _normal(shape)
        y = np.zeros_like(x)
        fits = x.nbytes * 2 < 32 << 20
        sides = {
            form + (" + s" if stream else ""): _kernel(best[f"softmax_{form}"].address, x, y, stream)
            for form, stream in FORMS
            if not (stream and fits)  # a streamed y would be out of the caches for the next side
        }
        sides["copy"] = partial(np.copyto, y, x)
        _measure(_shape(shape), sides, seconds)


def _normal(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * 3


def _inputs(shape: tuple[int, int]) -> list[tuple[str, np.ndarray]]:
    x = _normal(shape)
    inputs = [(_shape(shape), x)]
    if shape[1] == 77:
        hidden = np.tril(np.ones((77, 77), bool))[np.arange(shape[0]) % 77]
        inputs.append((f"{_shape(shape)} causal", np.where(hidden, x, -np.inf).astype(np.float32)))
    return inputs


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _measure(case: str, sides: Sides, seconds: float) -> None:
    print(line(case, alternate(sides, seconds=seconds), next(iter(sides))))


def _node(**attributes: Any) -> NodeProto:
    return helper.make_node(SOFTMAX.name, ["x"], ["y"], domain=DOMAIN, axis=-1, **attributes)


def _chain(**how: Any) -> list[NodeProto]:
    names = ["x", *(f"t{i}" for i in range(2 * CHAIN - 1)), "y"]
    return [
        helper.make_node("Softmax" if i % 2 else "Neg", [a], [b], **(how if i % 2 else {}))
        for i, (a, b) in enumerate(pairwise(names))
    ]


def _four() -> list[NodeProto]:
    numbers = {"span": 1 - GAMMA, "low": GAMMA, "nil": 0.0, "one": 1.0}
    return [
        *(helper.make_node("Constant", [], [name], value_float=number) for name, number in numbers.items()),
        helper.make_node("Softmax", ["x"], ["p"], axis=-1),
        helper.make_node("Mul", ["p", "span"], ["wide"]),
        helper.make_node("Add", ["wide", "low"], ["moved"]),
        helper.make_node("Clip", ["moved", "nil", "one"], ["y"]),
    ]


def _session(
    nodes: list[NodeProto], threads: int, library: str | None = None, *, function: bool = False
) -> ort.InferenceSession:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "cols"]) for name in "xy")
    graph = helper.make_graph(nodes, "bench", [x], [y])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    functions = []
    if function:
        from calmclip.export.functions.softmax import softmax

        functions = [softmax()]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(session: ort.InferenceSession, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return lambda: (session.run_with_iobinding(binding), x, y)[0]  # keeps both alive


def _kernel(address: int, x: np.ndarray, y: np.ndarray, stream: bool) -> Callable[[], object]:
    function, (rows, cols) = KERNEL(address), x.shape
    return lambda: function(x.ctypes.data, y.ctypes.data, rows, cols, 0.0, 1.0, stream)


if __name__ == "__main__":
    main()
