"""QuantConv and QuantMaxPool in ONNX Runtime, against ONNX Runtime's own convolutions and pools in 8 bits.

    python -m tests.bench.ops_quant_conv --threads 1 [--quick]

Layers of NanoDet-g at 416 pixels and of ResNet-50 at 224: side, channels in and out, window, stride. Each line is two
of them in one session, each with an x and weights of its own, channels last. "onnxruntime" is the local function that a
bundle carries, which becomes QLinearConv with channels last; of a pool, MaxPool between Transposes, and its own MaxPool
with channels last. "peak" is as many products in registers as a line has; tiles (csrc/kernels/quant_conv.h) have fewer.
Sessions write, by IO binding, to buffers that were touched before. One thread is timed by processor time, more by the
clock.
"""

from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from calmclip.export.functions.quant_conv import quant_conv
from calmclip.export.functions.quant_max_pool import quant_max_pool
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import DOMAIN, QUANT_CONV, QUANT_MAX_POOL, VERSION
from tests.bench.alternate import alternate, machine
from tests.bench.ops import library, options
from tests.bench.ops_quant_linear import peak

OPS = (QUANT_CONV, QUANT_MAX_POOL)
LAYERS = 2
CASES: dict[str, list[tuple[int, int, int, int, int]]] = {
    "NanoDet-g": [
        (104, 32, 32, 3, 1), (104, 32, 16, 3, 1), (104, 16, 16, 3, 1), (104, 64, 64, 3, 2), (52, 64, 32, 3, 1),
        (52, 32, 32, 3, 1), (52, 64, 64, 3, 1), (52, 128, 128, 3, 2), (52, 128, 128, 3, 1), (26, 128, 64, 3, 1),
        (26, 64, 64, 3, 1), (26, 128, 128, 3, 1), (26, 256, 256, 3, 2), (13, 256, 128, 3, 1), (13, 128, 128, 3, 1),
        (13, 256, 256, 3, 1), (52, 128, 124, 1, 1), (26, 256, 128, 1, 1), (13, 512, 128, 1, 1),
    ],
    "ResNet-50": [
        (112, 32, 32, 3, 1), (112, 32, 64, 3, 1), (56, 64, 64, 3, 1), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1),
        (7, 512, 512, 3, 1), (56, 256, 512, 1, 2),
    ],
}  # fmt: skip
POOLS = [(208, 32), (112, 64)]  # side, channels; windows of 3 x 3, strides of 2
Side = Callable[[], object]


def main() -> None:
    arguments = options(__doc__, 2.0, "less time").parse_args()
    built = library()
    clock = process_time if arguments.threads == 1 else perf_counter
    print(machine(arguments.threads))
    for net, cases in CASES.items():
        print(f"\n{net}")
        for side, channels, columns, window, stride in cases:
            sides = _sides(built, arguments.threads, side, channels, columns, window, stride)
            timings = alternate(sides, seconds=0.4 if arguments.quick else arguments.seconds, clock=clock)
            spent = {name: timing.p50 for name, timing in timings.items()}
            case = f"{side} x {side} x {channels} -> {columns}, {window} x {window} / {stride}"
            print(
                f"{case:38s} op {spent['op'] / LAYERS * 1e6:7.1f} us, {spent['peak'] / spent['op']:.0%} of the peak   "
                f"onnxruntime {spent['onnxruntime'] / LAYERS * 1e6:.1f} us ({spent['onnxruntime'] / spent['op']:.2f}x)",
                flush=True,
            )
    print("\nmaximum, 3 x 3 / 2")
    for side, channels in POOLS:
        timings = alternate(_pools(built, arguments.threads, side, channels), seconds=arguments.seconds, clock=clock)
        cells = [f"{name} {timing.p50 * 1e6:7.1f} us" for name, timing in timings.items()]
        print(f"{side} x {side} x {channels}   " + "   ".join(cells), flush=True)


def _pools(library: Library, threads: int, side: int, channels: int) -> dict[str, Side]:
    how: dict[str, Any] = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    x = np.random.default_rng(0).integers(0, 256, (1, side, side, channels)).astype(np.uint8)
    y = np.ones((1, (side + 1) // 2, (side + 1) // 2, channels), np.uint8)
    ours = helper.make_node(QUANT_MAX_POOL.name, ["x0"], ["y0"], domain=DOMAIN, window=[3, 3], **how)
    theirs = helper.make_node("NhwcMaxPool", ["x0"], ["y0"], domain="com.microsoft", kernel_shape=[3, 3], **how)
    model, other = (_model([node], {}, x, y, quant_max_pool()) for node in (ours, theirs))
    return {
        "op": _bound(_session(model, threads, library), x, y),
        "function": _bound(_session(model, threads, None), x, y),
        "onnxruntime": _bound(_session(other, threads, None), x, y),
    }


def _sides(
    library: Library, threads: int, side: int, channels: int, columns: int, window: int, stride: int
) -> dict[str, Side]:
    random = np.random.default_rng(0)
    how: dict[str, Any] = {"strides": [stride] * 2, "pads": [window // 2] * 4}
    constants: dict[str, Any] = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(60),
        "weight_scale": (random.uniform(0.5, 1, columns) / (80 * window * np.sqrt(channels))).astype(np.float32),
        "bias": random.normal(0, 1, columns).astype(np.float32),
        "y_scale": np.float32(0.02),
        "y_zero": np.uint8(60),
    }
    nodes = []
    for number in range(LAYERS):
        constants[f"weight{number}"] = random.integers(-127, 128, (window, window, channels, columns), np.int8)
        inputs = [f"{name}{number}" if name in ("x", "weight") else name for name in QUANT_CONV.inputs]
        nodes.append(helper.make_node(QUANT_CONV.name, inputs, [f"y{number}"], domain=DOMAIN, **how))
    out = (side + window // 2 * 2 - window) // stride + 1
    x = random.integers(0, 256, (1, side, side, channels)).astype(np.uint8)
    y = np.ones((1, out, out, columns), np.uint8)
    model = _model(nodes, constants, x, y, quant_conv())
    macs = LAYERS * y.size * window * window * channels
    return {
        "peak": peak(library, macs, threads),
        "op": _bound(_session(model, threads, library), x, y),
        "onnxruntime": _bound(_session(model, threads, None), x, y),
    }


def _model(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], x: np.ndarray, y: np.ndarray, body: onnx.FunctionProto
) -> bytes:
    values = [
        helper.make_tensor_value_info(f"{name}{number}", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in (("x", x), ("y", y))
        for number in range(len(nodes))
    ]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "bench", values[: len(nodes)], values[len(nodes) :], held)
    opsets = [helper.make_opsetid(*opset) for opset in (("", 20), (DOMAIN, VERSION), ("com.microsoft", 1))]
    model = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _session(model: bytes, threads: int, library: Library | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _bound(session: ort.InferenceSession, x: np.ndarray, y: np.ndarray) -> Side:
    binding = session.io_binding()
    read = [x.copy() for _ in session.get_inputs()]
    for value, array in zip(session.get_inputs(), read, strict=True):
        binding.bind_input(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    made = [y.copy() for _ in session.get_outputs()]
    for value, array in zip(session.get_outputs(), made, strict=True):
        binding.bind_output(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return lambda: (session.run_with_iobinding(binding), read, made)[0]  # keeps all of them alive


if __name__ == "__main__":
    main()
