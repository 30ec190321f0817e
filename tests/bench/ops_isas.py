"""Every kernel of bytes in every instruction set of this processor, as a table: kernel x instruction set.

    python -m tests.bench.ops_isas [--kernel quant_linear] [--seconds 1] [--scalar]
    python -m tests.bench.ops_isas --calls 20 --row 4 --isa vnni

Each row is one kernel at one shape, called without ONNX Runtime, one thread, processor time. The instruction sets of a
row take turns in one run. Products are in GMAC/s, other work in ns a number; "int8_peak" is the most that an
instruction set can do, in registers. "avxvnni (EVEX)" is the code of AVX-VNNI with its two instructions in the encoding
of AVX-512, in the same 16 registers, where the processor has AVX-512 VNNI and not AVX-VNNI.

The second form calls one kernel without measuring, for a counter of instructions around this program: `perf stat -e
instructions:u`, or an emulator's; the difference of two numbers of calls is that of the kernel alone. ``--rows`` lists
the numbers of the rows.
"""

import argparse
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from time import process_time
from typing import Any

import numpy as np

from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import ACTIVATIONS, Op
from tests.bench.alternate import alternate, machine
from tests.bench.ops import library
from tests.models.ops import emulated
from tests.models.ops.harness import ISAS, gather

# files of tests are not typed
test_quant_attention: Any = import_module("tests.models.ops.test_quant_attention")
test_quant_depthwise: Any = import_module("tests.models.ops.test_quant_depthwise")
test_quant_linear: Any = import_module("tests.models.ops.test_quant_linear")

OPS: tuple[Op, ...] = ()  # every operator has a bench of its own
EVEX = "avxvnni (EVEX)"
PEAK_MACS = 1536  # kPeakMacs of csrc/kernels/quant_linear.h
Address = Callable[[np.ndarray], int]


@dataclass(frozen=True)
class Row:
    """A kernel at a shape. ``work``: multiply-accumulates of one call, or numbers of it; ``case``: for `CALLS`."""

    kernel: str
    shape: str
    work: int
    case: tuple[Any, ...]
    products: bool = True


class Memory:
    """Lays arrays out in ordinary memory, as `harness.Edge` does at the end of it."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def lay(self, array: np.ndarray) -> int:
        room = np.empty(array.nbytes + 192, np.uint8)
        start = -room.ctypes.data % 64
        room[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.arrays.append(room)
        return int(room.ctypes.data) + start


def peak(function: Callable[..., Any], memory: Memory, rounds: int) -> None:
    function(rounds)


def linear(function: Callable[..., Any], memory: Memory, rows: int, k: int, n: int, activation: str, kind: str) -> None:
    """``kind``: bytes, bytes by a floor, or floats with a residual."""
    random = np.random.default_rng(0)
    panels = -(-n // test_quant_linear.PANEL)
    columns = panels * test_quant_linear.PANEL
    weight = random.normal(0, 36, (k, n)).clip(-127, 127).astype(np.int8)
    step = 1 / (80 * np.sqrt(k))
    arrays = {
        "x": random.integers(0, 256, (rows, k)).astype(np.uint8),
        "panels": test_quant_linear.packed(weight),
        "start": np.resize(-120 * weight.sum(0, dtype=np.int32), columns),
        "scale": np.full(columns, step if kind == "floor" else 0.02 * step, np.float32),
        "bias": random.normal(0, 1, columns).astype(np.float32),
        "inverse": np.full(columns, 50, np.float32),
        "zero": np.full(columns, 120, np.int32),
    }
    if "avx2" in ISAS:  # only that kernel reads an order
        arrays["order"] = test_quant_linear.ordered(library(), test_quant_linear.packed(weight[: k // 4 * 4]))
    if kind == "floor":
        arrays["floor"] = np.zeros(columns, np.uint8)
    if kind == "floats":
        arrays["residual"] = random.normal(0, 1, (rows, n)).astype(np.float32)
    work = test_quant_linear.Work(
        **{name: memory.lay(array) for name, array in arrays.items()},
        **{"values" if kind == "floats" else "bytes": memory.lay(np.zeros(rows * n * 4, np.uint8))},
        rows=rows, k=k, n=n, activation=ACTIVATIONS.index(activation),
    )  # fmt: skip
    function(ctypes.byref(work), 0, panels)


def attention(function: Callable[..., Any], memory: Memory, tokens: int, dims: int) -> None:
    feeds = test_quant_attention.draw(0, 1, tokens, tokens, 1, dims)
    places = {name: memory.lay(feeds[name]) for name in ("q", "k", "v", "y_scale", "y_zero")}
    head = test_quant_attention.Head(
        **places, y=memory.lay(np.zeros(tokens * dims, np.uint8)), q_step=dims, k_step=dims, v_step=dims, y_step=dims,
        rows=tokens, keys=tokens, dims=dims, y_scale_step=1, y_zero_step=1, scale=1e-4, v_scale=0.02, zeta=1.0,
        q_zero=9,
    )  # fmt: skip
    function(ctypes.byref(head), memory.lay(np.zeros(test_quant_attention.scratch_bytes(tokens, dims), np.uint8)))


def depthwise(function: Callable[..., Any], memory: Memory, side: int, channels: int, window: int, stride: int) -> None:
    shape, strides, pads = (1, side, side, channels), (stride, stride), (window // 2,) * 4
    feeds = test_quant_depthwise.draw(0, shape, (window, window))
    y = np.zeros(test_quant_depthwise.out_shape(shape, feeds["weight"].shape, strides, pads), np.uint8)
    each = {name: np.full(channels, 1e-3, np.float32) for name in ("scale", "bias", "inverse")}
    each |= {name: np.full(channels, 100, np.int32) for name in ("start", "zero")}
    work = test_quant_depthwise.Work(
        **{name: memory.lay(test_quant_depthwise.blocks(numbers)) for name, numbers in each.items()},
        x=memory.lay(feeds["x"]), y=memory.lay(y), batch=1, height=side, width=side, channels=channels,
        out_height=y.shape[1], out_width=y.shape[2], top=pads[0], left=pads[1], h=window, w=window, down=stride,
        across=stride, weights=memory.lay(test_quant_depthwise.packed(feeds["weight"], strides)),
        around=memory.lay(np.zeros(channels, np.uint8)),
    )  # fmt: skip
    function(ctypes.byref(work), 0, test_quant_depthwise.units(y, (window, window), strides))


def calls() -> dict[str, tuple[Any, Callable[..., None]]]:
    """Kernel -> its prototype, and a function of it, a `Memory` and a row's case."""
    return {name: (prototype, call) for name, prototype, call, _ in gather("EDGES")} | {
        "int8_peak": (ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_size_t), peak),
        "quant_linear": (test_quant_linear.PROTOTYPE, linear),
        "quant_attention": (test_quant_attention.PROTOTYPE, attention),
        "quant_depthwise": (test_quant_depthwise.PROTOTYPE, depthwise),
    }


def _linear(rows: int, k: int, n: int, activation: str, kind: str) -> Row:
    name = f"{rows} x {k} into {n}, {activation + ', ' if activation != 'none' else ''}{kind}"
    return Row("quant_linear", name, rows * k * n, (rows, k, n, activation, kind))


def _conv(side: int, channels: int, n: int, stride: int = 1) -> Row:
    out = (side - 1) // stride + 1
    case = ((1, side, side, channels), (3, 3), n, (stride, stride), (1, 1, 1, 1))
    name = f"{side} x {side}, {channels} into {n}, 3 x 3" + (f" / {stride}" if stride > 1 else "")
    return Row("quant_conv", name, out * out * 9 * channels * n, case)


def _tiles(side: int, channels: int, n: int) -> Row:
    case = ((1, side, side, channels), n, (1, 1, 1, 1))
    return Row("quant_conv_tiles", f"{side} x {side}, {channels} into {n}", side * side * 9 * channels * n, case)


def _attention(tokens: int, dims: int) -> Row:
    return Row("quant_attention", f"{tokens} tokens, {dims} a head", 2 * tokens * tokens * dims, (tokens, dims))


def _depthwise(side: int, channels: int, window: int, stride: int) -> Row:
    out = (side - 1) // stride + 1
    name = f"{side} x {side} x {channels}, {window} x {window} / {stride}"
    work = out * out * channels * window * window
    return Row("quant_depthwise", name, work, (side, channels, window, stride))


# The shapes of towers: ViT-B/32, /16, a text of 16 tokens and one; the built-in image tower; MobileCLIP-S2; NanoDet.
ROWS = [
    Row("int8_peak", "registers", 2000 * PEAK_MACS, (2000,)),
    _linear(197, 768, 768, "none", "bytes"),
    _linear(50, 768, 3072, "gelu", "bytes"),
    _linear(50, 3072, 768, "none", "floats"),
    _linear(16, 512, 1536, "none", "bytes"),
    *(_linear(rows, 512, 512, "none", "floor") for rows in (1, 2, 4, 8, 12, 16)),
    _linear(4225, 24, 144, "none", "floor"),
    _linear(1089, 240, 40, "none", "floor"),
    _conv(104, 16, 16),
    _conv(52, 64, 128, 2),
    _conv(26, 128, 128),
    _tiles(52, 64, 64),
    _tiles(28, 128, 128),
    _attention(197, 64),
    _attention(50, 64),
    _attention(16, 64),
    _depthwise(65, 144, 3, 1),
    _depthwise(33, 240, 5, 1),
    _depthwise(32, 160, 7, 1),
    _depthwise(64, 80, 7, 2),
    Row("quant_rows", "16 x 1024", 16 * 1024, (16, 1024), False),
    Row("quant_layer_norm", "197 x 768", 197 * 768, (197, 768), False),
    Row("rotary_attention", "16 tokens, 2 heads of 128", 2 * 16 * 128, (16, 2, 2, 128), False),
    Row("quant_patches", "32 rows of 224", 32 * 224, (32, 224), False),
    Row("cut_windows", "3 lines of 9, 130 windows", 3 * 9 * 130, (3, 9, 6, 130), False),
    Row("quant_max_pool", "52 x 52 x 32, 3 x 3 / 2", 26 * 26 * 32, ((1, 52, 52, 32), (3, 3), (2, 2), (1,) * 4), False),
    Row("quant_add", "256 x 64", 256 * 64, (256, 64), False),
    Row("quant_lookup", "16,384", 16384, (16384,), False),
]  # fmt: skip


def bind(row: Row, addresses: dict[str, int]) -> dict[str, Callable[[], object]]:
    """Instruction set -> a call of the kernel at an address, each with the same arguments."""
    prototype, call = calls()[row.kernel]
    memory = Memory()
    given: list[tuple[Any, ...]] = []
    call(lambda *arguments: given.append(arguments), memory, *row.case)

    def bound(function: Callable[..., Any]) -> Callable[[], object]:
        return lambda: (function(*given[0]), memory)[0]  # memory lives as long as the call

    return {isa: bound(prototype(address)) for isa, address in addresses.items()}


def addresses(built: Library, name: str) -> dict[str, int]:
    """Instruction set -> the kernel, for those of this processor, in the order of dispatch."""
    runs = [kernel.isa for kernel in built.kernels if kernel.name == name and kernel.runs]
    places = {kernel.isa: kernel.address for kernel in built.kernels if kernel.name == name}
    if "vnni" in runs and "avxvnni" in places and "avxvnni" not in runs:
        places[EVEX] = emulated.addresses("avxvnni", emulated.EVEX)[name]
        runs.insert(runs.index("vnni"), EVEX)
    return {isa: places[isa] for isa in runs}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--kernel", action="append", help="measure this kernel alone; repeatable")
    parser.add_argument("--row", type=int, action="append", help="measure this row alone; repeatable")
    parser.add_argument("--isa", action="append", help="measure this instruction set alone; repeatable")
    parser.add_argument("--scalar", action="store_true", help="measure the scalar kernels, too")
    parser.add_argument("--rows", action="store_true", help="list the rows")
    parser.add_argument("--calls", type=int, help="call the kernels so often, and measure nothing")
    arguments = parser.parse_args(argv)
    built = library()
    chosen = [
        (number, row)
        for number, row in enumerate(ROWS)
        if (not arguments.kernel or row.kernel in arguments.kernel) and (not arguments.row or number in arguments.row)
    ]
    if arguments.rows:
        for number, row in chosen:
            print(f"{number:3d} {row.kernel}: {row.shape}")
        return
    table: list[tuple[Row, dict[str, float]]] = []
    for _, row in chosen:
        places = {
            isa: address
            for isa, address in addresses(built, row.kernel).items()
            if (isa in arguments.isa if arguments.isa else isa != "scalar" or arguments.scalar)
        }
        sides = bind(row, places)
        if arguments.calls is not None:
            for side in sides.values():
                for _ in range(arguments.calls):
                    side()
            continue
        timings = alternate(sides, seconds=arguments.seconds, clock=process_time, turn=0.0005) if sides else {}
        table.append((row, {isa: timing.p50 for isa, timing in timings.items()}))
    if arguments.calls is None:
        _show(table)


def _show(table: list[tuple[Row, dict[str, float]]]) -> None:
    print(machine(1) + "\n")
    for products in (True, False):
        part = [(row, spent) for row, spent in table if row.products == products]
        names = list(dict.fromkeys(isa for _, spent in part for isa in spent))
        if not part:
            continue
        print(f"| {'GMAC/s' if products else 'ns a number'} | " + " | ".join(names) + " |")
        print("| --- |" + " --- |" * len(names))
        for row, spent in part:
            cells = [("" if isa not in spent else _figure(row, spent[isa])) for isa in names]
            print(f"| {row.kernel}: {row.shape} | " + " | ".join(cells) + " |")
        print(flush=True)


def _figure(row: Row, seconds: float) -> str:
    return f"{row.work / seconds / 1e9:.1f}" if row.products else f"{seconds / row.work * 1e9:.3f}"


if __name__ == "__main__":
    main()
