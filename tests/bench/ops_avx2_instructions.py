"""Instructions of a product without AVX-512: ours and ONNX Runtime's kernel, and whether each is exact.

    python -m tests.bench.ops_avx2_instructions [--rows 50] [--k 768] [--n 3072]

ONNX Runtime has no setting that limits its instruction sets, but valgrind offers none after AVX2 to a program: there
both run their AVX2 kernels. Each case runs in two processes, one with more calls than the other; cachegrind counts
their instructions, and the difference is that of the calls. Ours includes the epilogue, quantization to uint8;
MatMulInteger ends with the sums in int32. Weights are Gaussian in 8 bits per column, or uniform. A second call with the
extremes of x and w says whether the sums are exact. Takes minutes, and needs valgrind.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from calmclip.models.ops.library import find
from calmclip.models.ops.spec import DOMAIN, QUANT_LINEAR, VERSION

OPS = ()  # every operator has a bench of its own
CALLS = (2, 6)
CASES = (("calmclip", "gaussian"), ("calmclip", "uniform"), ("onnxruntime", "gaussian"))
# Imports as little as possible, because valgrind takes fifty times as long.
CHILD = """
import ctypes, json, sys
import numpy as np
import onnxruntime as ort
folder, library, calls = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
if library:
    ctypes.CDLL(library).calmclip_mask(b"avx512,vnni,vbmi,avxvnni")
    options.register_custom_ops_library(library)
def run(name, calls):
    session = ort.InferenceSession(f"{folder}/{name}.onnx", options, providers=["CPUExecutionProvider"])
    x = np.load(f"{folder}/{name}.npy")
    return [session.run(None, {"x": x})[0] for _ in range(calls)][-1]
run("product", int(calls))
np.save(f"{folder}/y.npy", run("extremes", 1))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 50), ("k", 768), ("n", 3072)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sides = parser.parse_args()
    rows, k, n = sides.rows, sides.k, sides.n
    print(f"{rows} x {k} -> {n}; instructions for 32 products, a vector of bytes")
    for side, kind in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            exact = _prepare(folder, side, kind, rows, k, n)
            counts = [_counted(folder, side, calls) for calls in CALLS]
            wrong = float((np.load(folder / "y.npy") != exact).mean())
        each = (counts[1] - counts[0]) / (CALLS[1] - CALLS[0]) / (rows * k * n)
        verdict = f"{wrong:.0%} of the sums are wrong at the extremes" if wrong else "exact at the extremes"
        print(f"{side:12s} {kind:9s} {32 * each:6.2f}   {verdict}", flush=True)


def _counted(folder: Path, side: str, calls: int) -> int:
    """The instructions of a whole process."""
    library = find("required")
    assert library is not None
    done = subprocess.run(
        ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", sys.executable, "-c",
         CHILD, str(folder), str(library.path) if side == "calmclip" else "", str(calls)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (count,) = re.findall(r"I\s+refs:\s+([\d,]+)", done.stderr)
    return int(count.replace(",", ""))


def _prepare(folder: Path, side: str, kind: str, rows: int, k: int, n: int) -> np.ndarray:
    """Writes the product and the extremes; -> what the extremes' result must be."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal((k, n))
    gaussian, uniform = np.rint(normal / np.abs(normal).max(axis=0) * 127), draw.integers(-127, 128, (k, n))
    w = (gaussian if kind == "gaussian" else uniform).astype(np.int8)
    np.save(folder / "product.npy", draw.integers(0, 256, (rows, k), np.uint8))
    (folder / "product.onnx").write_bytes(_model(side, w))
    # columns of 127, of -128, and of neighbours of either sign
    w = np.resize([127, -128, 127, 127, -128, -128, 127, 127], (8, 8)).astype(np.int8).repeat(4, axis=0)
    w[:, 0], w[:, 1] = 127, -128
    x = np.full((6, 32), 255, np.uint8)
    np.save(folder / "extremes.npy", x)
    (folder / "extremes.onnx").write_bytes(_model(side, w))
    sums = x.astype(np.int64) @ w.astype(np.int64)
    return np.clip(np.rint(sums / STEP) + 128, 0, 255) if side == "calmclip" else sums


STEP = 2.0**14  # of calmclip's bytes, around 128


def _model(side: str, w: np.ndarray) -> bytes:
    k, n = w.shape
    constants = {"w": w}
    if side == "calmclip":
        scalars = {"x_scale": np.float32(1), "x_zero": np.uint8(0), "weight_scale": np.float32(1)}
        scalars |= {"y_scale": np.float32(STEP), "y_zero": np.uint8(128)}
        constants |= {name: np.array(value) for name, value in scalars.items()} | {"bias": np.zeros(n, np.float32)}
        inputs = [{"weight": "w"}.get(name, name) for name in QUANT_LINEAR.inputs]
        node = helper.make_node(QUANT_LINEAR.name, inputs, ["y"], domain=DOMAIN, activation=0)
        kind = TensorProto.UINT8
    else:
        node, kind = helper.make_node("MatMulInteger", ["x", "w"], ["y"]), TensorProto.INT32
    graph = helper.make_graph(
        [node], "bench",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", k])],
        [helper.make_tensor_value_info("y", kind, ["rows", n])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return data


if __name__ == "__main__":
    main()
