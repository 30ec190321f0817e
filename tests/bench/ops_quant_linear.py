"""QuantLinear and QuantLinearToFloat: the ops beside ONNX Runtime's own nodes, torch's quantized linear, and the peak.

    python -m tests.bench.ops_quant_linear --threads 1 [--quick]

The products of a tower: of every layer q, k and v in one, what attention hands on, and the two of the MLP, the first
with gelu; the second and the last are float32 and added to a residual. Each line is one of the four in all 12 layers,
each with weights of its own, 85 MB a vision tower: none are in a cache when they are wanted. Rows are tokens: 50 is
ViT-B/32, 197 ViT-B/16, 400 ViT-B/32 at batch 8, 77 and 16 texts, 1 the last block's token.

"onnxruntime" is the local function that a bundle carries, as ONNX Runtime fuses it: MatMulIntegerToFloat, Add and what
follows. "torch" has neither activation nor residual, and bytes throughout. "peak" is as many products in registers as a
line has, in the widest form that the processor has. One thread is timed by processor time, more by the clock.
"""

import ctypes
import warnings
from collections.abc import Callable
from time import perf_counter, process_time

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from calmclip.export.functions.quant_linear import quant_linear, quant_linear_to_float
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import (
    ACTIVATIONS,
    DOMAIN,
    QUANT_LINEAR,
    QUANT_LINEAR_TO_FLOAT,
    QUANT_POINTWISE,
    VERSION,
    Activation,
)
from tests.bench.alternate import alternate, machine
from tests.bench.ops import library, options

OPS = (QUANT_LINEAR, QUANT_LINEAR_TO_FLOAT, QUANT_POINTWISE)  # the last runs the kernel of the first
LAYERS = 12
TOWERS = {"B/32": (50, 768), "B/16": (197, 768), "B/32 x 8": (400, 768), "text": (77, 512), "label": (16, 512)}
TOWERS |= {"last token": (1, 768)}
# columns in and out in widths, the activation, whether bytes come out
PRODUCTS: list[tuple[str, int, int, Activation, bool]] = [
    ("qkv", 1, 3, "none", True),
    ("out", 1, 1, "none", False),
    ("up", 1, 4, "gelu", True),
    ("down", 4, 1, "none", False),
]
PEAK_MACS = 1536  # kPeakMacs of csrc/kernels/quant_linear.h
Side = Callable[[], object]


def main() -> None:
    parser = options(__doc__, 4.0, "less time, and no batch")
    parser.add_argument("--tower", choices=TOWERS, action="append", help="measure this tower only; repeatable")
    arguments = parser.parse_args()
    built = library()
    torch.set_num_threads(arguments.threads)
    clock = process_time if arguments.threads == 1 else perf_counter
    print(machine(arguments.threads))
    for tower in arguments.tower or TOWERS:
        rows, width = TOWERS[tower]
        if arguments.quick and rows > 200:
            continue
        total: dict[str, float] = {}
        macs = 0
        for name, wide_in, wide_out, activation, quantized in PRODUCTS:
            k, n = wide_in * width, wide_out * width
            sides = _sides(built, arguments.threads, rows, k, n, activation, quantized)
            timings = alternate(sides, seconds=0.5 if arguments.quick else arguments.seconds, clock=clock)
            spent = {side: timing.p50 for side, timing in timings.items()}
            _show(f"{tower}: {rows} x {k} -> {n} {name}", LAYERS * rows * k * n, spent)
            total = {side: total.get(side, 0.0) + seconds for side, seconds in spent.items()}
            macs += LAYERS * rows * k * n
        _show(f"{tower}: all", macs, total)


def _show(case: str, macs: int, spent: dict[str, float]) -> None:
    cells = [
        f"{side} {seconds * 1e3:7.3f} ms {macs / seconds / 1e9:6.1f} GMAC/s {spent['peak'] / seconds:6.1%}"
        for side, seconds in spent.items()
    ]
    print(f"{case:36s} " + "   ".join(cells), flush=True)


def _sides(
    library: Library, threads: int, rows: int, k: int, n: int, activation: Activation, quantized: bool
) -> dict[str, Side]:
    random = np.random.default_rng(0)
    weights = [random.integers(-127, 128, (k, n), np.int8) for _ in range(LAYERS)]
    feeds = {"x": random.integers(0, 256, (1, rows, k), np.uint8)}
    if not quantized:
        feeds["residual"] = random.standard_normal((1, rows, n), np.float32)
    ours = _session(weights, feeds, activation, threads, library)
    theirs = _session(weights, feeds, activation, threads, None)
    return {
        "peak": peak(library, LAYERS * rows * k * n, threads),
        "op": _bound(ours, feeds, rows, n),
        "onnxruntime": _bound(theirs, feeds, rows, n),
        "torch": _torch(weights, feeds["x"]),
    }


def _session(
    weights: list[np.ndarray],
    feeds: dict[str, np.ndarray],
    activation: Activation,
    threads: int,
    library: Library | None,
) -> ort.InferenceSession:
    """A node for each weight, each with its own x; without the library, by the function.

    The batch is unknown, as in a tower: with known sides ONNX Runtime fuses MatMul and Add to a float Gemm.
    """
    quantized = "residual" not in feeds
    op = QUANT_LINEAR if quantized else QUANT_LINEAR_TO_FLOAT
    k, n = weights[0].shape
    random = np.random.default_rng(1)
    constants = {
        "x_scale": np.array(0.02, np.float32),
        "x_zero": np.array(120, np.uint8),
        "weight_scale": (random.uniform(0.5, 1, n) / (80 * np.sqrt(k))).astype(np.float32),
        "bias": random.normal(0, 1, (n,)).astype(np.float32),
    }
    if quantized:
        constants |= {"y_scale": np.array(0.02, np.float32), "y_zero": np.array(120, np.uint8)}
    constants |= {f"weight{number}": weight for number, weight in enumerate(weights)}
    nodes = [
        helper.make_node(
            op.name,
            [f"{name}{number}" if name in ("x", "weight", "residual") else name for name in op.inputs],
            [f"y{number}"],
            domain=DOMAIN,
            activation=ACTIVATIONS.index(activation),
        )
        for number in range(len(weights))
    ]
    inputs = [
        helper.make_tensor_value_info(
            f"{name}{number}", helper.np_dtype_to_tensor_dtype(array.dtype), ("B", *array.shape[1:])
        )
        for name, array in feeds.items()
        for number in range(len(weights))
    ]
    dtype = TensorProto.UINT8 if quantized else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(node.output[0], dtype, ("B", feeds["x"].shape[1], n)) for node in nodes]
    graph = helper.make_graph(
        nodes, "bench", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [quant_linear() if quantized else quant_linear_to_float()]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(session: ort.InferenceSession, feeds: dict[str, np.ndarray], rows: int, n: int) -> Side:
    """Bound to buffers that were touched before, so no side pays for fresh pages."""
    binding = session.io_binding()
    for value in session.get_inputs():
        array = feeds[value.name.rstrip("0123456789")]
        binding.bind_input(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    made = [np.ones((1, rows, n), np.float32 if "residual" in feeds else np.uint8) for _ in session.get_outputs()]
    for output, array in zip(session.get_outputs(), made, strict=True):
        binding.bind_output(output.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return lambda: (session.run_with_iobinding(binding), feeds, made)[0]  # keeps all of them alive


def _torch(weights: list[np.ndarray], x: np.ndarray) -> Side:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these tensors are deprecated, and their successor is slower
        n = weights[0].shape[1]
        scales, zeros = torch.full((n,), 1e-4), torch.zeros(n, dtype=torch.long)
        rows = torch.quantize_per_tensor(
            torch.from_numpy((x - 120.0).astype(np.float32) * 0.02), 0.02, 120, torch.quint8
        )
        packed = [
            torch.ops.quantized.linear_prepack(
                torch.quantize_per_channel(
                    torch.from_numpy(np.ascontiguousarray(weight.T)).float() * 1e-4, scales, zeros, 0, torch.qint8
                ),
                torch.zeros(n),
            )
            for weight in weights
        ]
    return lambda: [torch.ops.quantized.linear(rows, weight, 0.02, 120) for weight in packed]


def peak(library: Library, macs: int, threads: int) -> Side:
    """The peak of one thread, times the threads."""
    address = next(k.address for k in library.kernels if k.name == "int8_peak" and k.isa == library.isas["int8_peak"])
    function, rounds = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_size_t)(address), macs // (PEAK_MACS * threads)
    return lambda: function(rounds)


if __name__ == "__main__":
    main()
