"""QuantDepthwise in ONNX Runtime, against ONNX Runtime's own depthwise convolutions.

    python -m tests.bench.ops_quant_depthwise --threads 1 [--quick]

Layers of EfficientNet-Lite at 260 pixels and of MobileCLIP-S2 (FastViT) at 256: side, channels, window, stride. Each
line is four of them in one session, each with an x and weights of its own, channels last. "onnxruntime" is the local
function that a bundle carries, which becomes QLinearConv with channels last and nothing else; "float" is Conv in
float32, channels first. Sessions write, by IO binding, to buffers that were touched before. One thread is timed by
processor time, more by the clock.
"""

from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from calmclip.export.functions.quant_depthwise import quant_depthwise
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import DOMAIN, QUANT_DEPTHWISE, VERSION
from tests.bench.alternate import alternate, machine
from tests.bench.ops import library, options

OPS = (QUANT_DEPTHWISE,)
LAYERS = 4
CASES = {
    "EfficientNet-Lite": [
        (130, 32, 3, 1), (130, 96, 3, 2), (65, 144, 3, 1), (65, 144, 5, 2), (33, 240, 5, 1), (33, 240, 3, 2),
        (17, 480, 3, 1), (17, 480, 5, 1), (17, 672, 5, 2), (9, 1152, 5, 1), (9, 1152, 3, 1),
    ],
    "MobileCLIP-S2": [
        (64, 80, 3, 1), (64, 80, 7, 1), (64, 80, 7, 2), (32, 160, 3, 1), (32, 160, 7, 1), (32, 160, 7, 2),
        (16, 320, 3, 1), (16, 320, 7, 1), (8, 640, 7, 1), (8, 1280, 3, 1),
    ],
}  # fmt: skip
Side = Callable[[], object]


def main() -> None:
    arguments = options(__doc__, 2.0, "less time").parse_args()
    built = library()
    clock = process_time if arguments.threads == 1 else perf_counter
    print(machine(arguments.threads))
    for net, cases in CASES.items():
        print(f"\n{net}")
        for side, channels, window, stride in cases:
            sides, numbers = _sides(built, arguments.threads, side, channels, window, stride)
            timings = alternate(sides, seconds=0.4 if arguments.quick else arguments.seconds, clock=clock)
            spent = {name: timing.p50 for name, timing in timings.items()}
            cells = [f"op {spent['op'] / numbers * 1e9:.3f} ns a number"]
            cells += [
                f"{name} {spent[name] / numbers * 1e9:.3f} ({spent[name] / spent['op']:.2f}x)"
                for name in ("onnxruntime", "float")
            ]
            macs = numbers * window * window / spent["op"] / 1e9
            case = f"{side} x {side} x {channels}, {window} x {window} / {stride}"
            print(f"{case:30s} " + "   ".join(cells) + f"   {macs:.1f} GMAC/s", flush=True)


def _sides(
    library: Library, threads: int, side: int, channels: int, window: int, stride: int
) -> tuple[dict[str, Side], int]:
    """-> each side, and the numbers of one call."""
    random = np.random.default_rng(0)
    how: dict[str, Any] = {"strides": [stride] * 2, "pads": [window // 2] * 4, "group": channels}
    x = random.integers(0, 256, (1, side, side, channels)).astype(np.uint8)
    scale, middle = np.float32(0.02), np.uint8(120)
    constants: dict[str, Any] = {
        "x_scale": scale,
        "x_zero": middle,
        "weight_scale": (random.uniform(0.5, 1, channels) / (80 * window)).astype(np.float32),
        "bias": random.normal(0, 1, channels).astype(np.float32),
        "y_scale": scale,
        "y_zero": middle,
    }
    nodes, floats = [], []
    kernels, real = {}, {"bias": constants["bias"]}
    for number in range(LAYERS):
        weight = random.integers(-127, 128, (window, window, channels), np.int8)
        kernels[f"weight{number}"] = weight
        real[f"weight{number}"] = (weight * constants["weight_scale"]).transpose(2, 0, 1)[:, None].astype(np.float32)
        inputs = [f"{name}{number}" if name in ("x", "weight") else name for name in QUANT_DEPTHWISE.inputs]
        nodes.append(helper.make_node(QUANT_DEPTHWISE.name, inputs, [f"y{number}"], domain=DOMAIN, **how))
        floats.append(helper.make_node("Conv", [f"x{number}", f"weight{number}", "bias"], [f"y{number}"], **how))
    out = (side + window // 2 * 2 - window) // stride + 1
    y = np.ones((1, out, out, channels), np.uint8)
    first = (x.astype(np.float32) * scale).transpose(0, 3, 1, 2).copy()
    quantized = _model(nodes, constants | kernels, x, y)
    sides = {
        "op": _bound(_session(quantized, threads, library), x, y),
        "onnxruntime": _bound(_session(quantized, threads, None), x, y),
        "float": _bound(
            _session(_model(floats, real, first, y.transpose(0, 3, 1, 2).astype(np.float32)), threads, None),
            first,
            np.ones((1, channels, out, out), np.float32),
        ),
    }
    return sides, LAYERS * y.size


def _model(nodes: list[onnx.NodeProto], constants: dict[str, Any], x: np.ndarray, y: np.ndarray) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(f"{name}{number}", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in (("x", x), ("y", y))
        for number in range(LAYERS)
    ]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "bench", values[:LAYERS], values[LAYERS:], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [quant_depthwise()] if x.dtype == np.uint8 else []
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def _session(model: onnx.ModelProto, threads: int, library: Library | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(session: ort.InferenceSession, x: np.ndarray, y: np.ndarray) -> Side:
    binding = session.io_binding()
    kept = []
    for bind, values, array in (
        (binding.bind_input, session.get_inputs(), x),
        (binding.bind_output, session.get_outputs(), y),
    ):
        for value in values:
            kept.append(array.copy())
            bind(value.name, "cpu", 0, array.dtype, array.shape, kept[-1].ctypes.data)
    return lambda: (session.run_with_iobinding(binding), kept)[0]  # keeps all of them alive


if __name__ == "__main__":
    main()
