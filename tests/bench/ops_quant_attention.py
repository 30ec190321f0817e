"""The quantized ops except products and convolutions, in ONNX Runtime, against its own ops and torch.

    python -m tests.bench.ops_quant_attention --threads 1 [--quick]

Attention from q, k and v in three tensors to the input of the output projection, one picture or text: 12 heads of 64
over 50 tokens is ViT-B/32, over 197 B/16; 16 heads over 257 L/14; 8 heads over 77, causal, a text tower of CLIP, over
16 a short text; one row of 197 a last block's. "op" normalizes probabilities by the row maximum, "op 1/255" is the
paper's; "function" runs without the library; "QDQ" also quantizes the logits, so that both products are QLinearMatMul;
"float" is the same chain in float32, "sdpa" torch's scaled_dot_product_attention. Sessions write, by IO binding, to a
buffer that was touched before. QuantLookup stands beside DequantizeLinear, a function and QuantizeLinear; "copy" is
numpy's, of as many bytes. QuantAdd has one scale for each tensor, beside QLinearAdd, or ("of channels") one for each
channel, beside the standard nodes. The first side runs after the slowest one and with its caches, so "op 1/255" has an
advantage over "op". The ratio after a side is the speed-up of the first side.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, parser

from calmclip.export.functions import BODIES
from calmclip.models.ops.spec import (
    DOMAIN,
    QUANT_ADD,
    QUANT_ATTENTION,
    QUANT_LAYER_NORM,
    QUANT_LOOKUP,
    QUANT_PATCHES,
    VERSION,
    Op,
)
from tests.bench.alternate import alternate, line, machine
from tests.bench.ops import library, options

OPS = (QUANT_ATTENTION, QUANT_LAYER_NORM, QUANT_PATCHES, QUANT_LOOKUP, QUANT_ADD)
# name, query rows, keys, heads of 64, causal
ATTENTION = [("B/32", 50, 50, 12, False), ("B/16", 197, 197, 12, False), ("L/14", 257, 257, 16, False),
             ("text", 77, 77, 8, True), ("short text", 16, 16, 8, True), ("B/16 last", 1, 197, 12, False)]  # fmt: skip
NORM = [("B/32", 50, 768), ("B/16", 197, 768), ("L/14", 257, 1024), ("text", 77, 512), ("B/16 x 8", 1576, 768)]
# side of the picture, of a patch, strides, pads
PATCHES = [
    ("B/32", 224, 32, 0, (0, 0, 0, 0)),
    ("B/16", 224, 16, 0, (0, 0, 0, 0)),
    ("L/14", 224, 14, 0, (0, 0, 0, 0)),
    ("EfficientNet", 260, 3, 2, (0, 0, 1, 1)),
    ("FastViT", 256, 3, 2, (1, 1, 1, 1)),
]
LOOKUP = [("50 k", 50_000), ("1 M", 1 << 20)]
ADD = [("64x64x80", (1, 64, 64, 80)), ("32x32x160", (1, 32, 32, 160)), ("50x768", (1, 50, 768))]
Feeds = Mapping[str, Any]
SCALE, STEP = 3 / (74 * 74 * 8), 1 / 255

# quantized logits and all; {kind} of its inputs
CHAIN = """
<ir_version: 10, opset_import: ["": 20]>
chain ({kind}[1, T, W] q, {kind}[1, S, W] k, {kind}[1, S, W] v, float[M, N] mask) => ({kind}[1, T, W] y)
<float q_scale = {{{q_scale}}}, float one = {{1.0}}, float v_scale = {{0.02}}, float logit_scale = {{0.1}},
 float p_scale = {{{step}}}, float y_scale = {{0.02}}, uint8 middle = {{128}}, uint8 zero = {{0}},
 int64[4] apart = {{1, -1, {heads}, 64}}, int64[3] together = {{1, -1, {width}}}>
{{
    {open}
    q_apart = Reshape (q_real, apart)
    k_apart = Reshape (k_real, apart)
    v_apart = Reshape (v_real, apart)
    queries = Transpose <perm = [0, 2, 1, 3]> (q_apart)
    keys = Transpose <perm = [0, 2, 3, 1]> (k_apart)
    values = Transpose <perm = [0, 2, 1, 3]> (v_apart)
    logits = MatMul (queries, keys)
    {logits}
    p = Softmax <axis = -1> (masked)
    {p}
    y_apart = MatMul (weights, values)
    y_rows = Transpose <perm = [0, 2, 1, 3]> (y_apart)
    y_real = Reshape (y_rows, together)
    y = {close}
}}
"""
QDQ = {
    "kind": "uint8",
    "open": """q_real = DequantizeLinear (q, q_scale, middle)
    k_real = DequantizeLinear (k, one, middle)
    v_real = DequantizeLinear (v, v_scale, middle)""",
    "logits": """logit_bytes = QuantizeLinear (logits, logit_scale, middle)
    logits_real = DequantizeLinear (logit_bytes, logit_scale, middle)
    masked = {} (logits_real{})""",
    "p": """p_bytes = QuantizeLinear (p, p_scale, zero)
    weights = DequantizeLinear (p_bytes, p_scale, zero)""",
    "close": "QuantizeLinear (y_real, y_scale, middle)",
}
FLOAT = {
    "kind": "float",
    "open": "\n".join(f"{name}_real = Identity ({name})" for name in "qkv"),
    "logits": "masked = {} (logits{})",
    "p": "weights = Identity (p)",
    "close": "Identity (y_real)",
}


def main() -> None:
    arguments = options(__doc__, 3.0, "less time").parse_args()
    built = library()
    torch.set_num_threads(arguments.threads)
    seconds = 0.5 if arguments.quick else arguments.seconds
    bench = Bench(arguments.threads, str(built.path))
    print(machine(arguments.threads))
    print("\nQuantAttention")
    for name, rows, keys, heads, causal in ATTENTION:
        print(
            line(
                f"{name} {rows}x{keys}x{heads}",
                alternate(bench.attention(rows, keys, heads, causal), seconds=seconds),
                "op",
            )
        )
    print("\nQuantLayerNorm, with the sum as an output")
    for name, rows, width in NORM:
        print(line(f"{name} {rows}x{width}", alternate(bench.norm(rows, width), seconds=seconds), "op"))
    print("\nQuantPatches")
    for name, size, patch, stride, pads in PATCHES:
        sides = bench.patches(size, patch, stride, pads)
        print(line(f"{name} {size}/{stride or patch}", alternate(sides, seconds=seconds), "op"))
    print("\nQuantLookup")
    for name, count in LOOKUP:
        print(line(name, alternate(bench.lookup(count), seconds=seconds), "op"))
    print("\nQuantAdd")
    for name, shape in ADD:
        print(line(name, alternate(bench.add(shape), seconds=seconds), "op"))


class Bench:
    """The sides of one case by name; each is a call."""

    def __init__(self, threads: int, library: str) -> None:
        self.threads, self.library = threads, library

    def attention(self, rows: int, keys: int, heads: int, causal: bool) -> dict[str, Callable[[], object]]:
        rng = np.random.default_rng(0)
        width = 64 * heads
        q, k, v = (rng.integers(0, 256, (1, count, width)).astype(np.uint8) for count in (rows, keys, keys))
        mask = np.triu(np.full((rows, keys), -np.inf, np.float32), 1) if causal else np.zeros(1, np.float32)
        feeds = {
            "q": q, "q_scale": np.float32(SCALE), "q_zero": np.uint8(128), "k": k, "k_scale": np.float32(1), "v": v,
            "v_scale": np.float32(0.02), "p_scale": np.float32(0), "mask": mask, "y_scale": np.float32(0.02),
            "y_zero": np.uint8(128),
        }  # fmt: skip
        how = QUANT_ATTENTION.attributes | {"heads": heads, "width": width}
        paper = feeds | {"p_scale": np.float32(STEP)}
        lends = {"q": q, "k": k, "v": v}
        y = {"y": np.zeros((1, rows, width), np.uint8)}
        sides = {
            "op": self.node(QUANT_ATTENTION, feeds, lends, y, how),
            "op 1/255": self.node(QUANT_ATTENTION, paper, lends, y, how),
            "function": self.node(QUANT_ATTENTION, paper, lends, y, how, function=True),
        }
        mask = mask if causal else mask[None]
        floats = {name: x.astype(np.float32) - 128 for name, x in lends.items()}
        floats["q"] *= np.float32(SCALE)
        for name, text, inputs, kind in (("QDQ", QDQ, lends, np.uint8), ("float", FLOAT, floats, np.float32)):
            parts = text | {"logits": text["logits"].format(*(("Add", ", mask") if causal else ("Identity", "")))}
            chain = parser.parse_model(CHAIN.format(**parts, q_scale=SCALE, step=STEP, heads=heads, width=width))
            target = {"y": np.zeros((1, rows, width), kind)}
            sides[name] = _bound(self.session(chain), inputs | {"mask": mask}, target)
        for dtype in (torch.float32, torch.bfloat16):
            rows_of = (torch.from_numpy(x).to(dtype).view(1, -1, heads, 64).transpose(1, 2) for x in floats.values())
            sides[f"sdpa {str(dtype)[6:]}"] = partial(_sdpa, causal, *rows_of)
        return sides

    def norm(self, rows: int, width: int) -> dict[str, Callable[[], object]]:
        rng = np.random.default_rng(0)
        x, residual = rng.normal(0, 1, (2, 1, rows, width)).astype(np.float32)
        feeds = {
            "x": x, "residual": residual, "weight": np.ones(width, np.float32), "bias": np.zeros(width, np.float32),
            "y_scale": np.float32(0.03), "y_zero": np.uint8(128),
        }  # fmt: skip
        lends = {"x": x, "residual": residual}
        outputs = {"y": np.zeros(x.shape, np.uint8), "sum": np.zeros_like(x)}
        skip = parser.parse_model("""
            <ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
            skip (float[1, T, W] x, float[1, T, W] residual, float[W] weight, float[W] bias)
                => (uint8[1, T, W] y, float[1, T, W] sum) <float y_scale = {0.03}, uint8 y_zero = {128}>
            {
                normed, mean, deviation, sum = com.microsoft.SkipLayerNormalization <epsilon = 1e-5>
                    (x, residual, weight, bias)
                y = QuantizeLinear (normed, y_scale, y_zero)
            }
        """)
        both = lends | {name: feeds[name] for name in ("weight", "bias")}
        return {
            "op": self.node(QUANT_LAYER_NORM, feeds, lends, outputs, QUANT_LAYER_NORM.attributes),
            "LayerNormalization": self.node(
                QUANT_LAYER_NORM, feeds, lends, outputs, QUANT_LAYER_NORM.attributes, function=True
            ),
            "SkipLayerNormalization": _bound(self.session(skip), both, outputs),
        }

    def patches(self, size: int, patch: int, stride: int, pads: tuple[int, ...]) -> dict[str, Callable[[], object]]:
        x = np.random.default_rng(0).normal(0, 1, (1, 3, size, size)).astype(np.float32)
        feeds = {"x": x, "y_scale": np.float32(0.02), "y_zero": np.uint8(128)}
        count = (size + pads[0] + pads[2] - patch) // (stride or patch) + 1
        y = {"y": np.zeros((1, count**2, 3 * patch**2), np.uint8)}
        how = {"patch": (patch, patch), "strides": (stride, stride), "pads": pads}
        return {
            "op": self.node(QUANT_PATCHES, feeds, {"x": x}, y, how),
            "QuantizeLinear, Gather": self.node(QUANT_PATCHES, feeds, {"x": x}, y, how, function=True),
        }

    def lookup(self, count: int) -> dict[str, Callable[[], object]]:
        rng = np.random.default_rng(0)
        x, table = (rng.integers(0, 256, size).astype(np.uint8) for size in ((1, count), 256))
        feeds, lends, y = {"x": x, "table": table}, {"x": x}, {"y": np.zeros_like(x)}
        sides = {
            "op": self.node(QUANT_LOOKUP, feeds, lends, y, {}),
            "function": self.node(QUANT_LOOKUP, feeds, lends, y, {}, function=True),
            "copy": lambda: np.copyto(y["y"], x),
        }
        for kind in ("Gelu", "LeakyRelu"):
            chain = parser.parse_model(f"""
                <ir_version: 10, opset_import: ["": 20]>
                chain (uint8[1, N] x) => (uint8[1, N] y) <float scale = {{0.05}}, uint8 zero = {{100}}>
                {{ a = DequantizeLinear (x, scale, zero) b = {kind} (a) y = QuantizeLinear (b, scale, zero) }}
            """)
            sides[kind] = _bound(self.session(chain), lends, y)
        return sides

    def add(self, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
        a, b = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
        scalar = {"scale": np.float32(0.02), "zero": np.uint8(128)}
        each = {name: np.full(shape[-1], number) for name, number in scalar.items()}
        lends, y = {"a": a, "b": b}, {"y": np.zeros_like(a)}

        def fed(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
            made = {f"{name}_{kind}": number for name in "aby" for kind, number in numbers.items()} | lends
            return {name: made[name] for name in QUANT_ADD.inputs}

        sizes, gains = ", ".join(map(str, shape)), ", ".join(["1.1"] * shape[-1])
        chain = parser.parse_model(f"""
            <ir_version: 10, opset_import: ["": 20]>
            chain (uint8[{sizes}] a, uint8[{sizes}] b) => (uint8[{sizes}] y)
            <float scale = {{0.02}}, uint8 zero = {{128}}, float[{shape[-1]}] gain = {{{gains}}}>
            {{ c = DequantizeLinear (a, scale, zero) d = DequantizeLinear (b, scale, zero) e = Mul (d, gain)
               f = Add (c, e) g = Mul (f, gain) y = QuantizeLinear (g, scale, zero) }}
        """)
        return {
            "op": self.node(QUANT_ADD, fed(scalar), lends, y, {}),
            "QLinearAdd": self.node(QUANT_ADD, fed(scalar), lends, y, {}, function=True),
            "of channels": self.node(QUANT_ADD, fed(each), lends, y, {}),
            "nodes of channels": _bound(self.session(chain), lends, y),
        }

    def node(
        self, op: Op, feeds: Feeds, lends: Feeds, outputs: Feeds, attributes: Feeds, *, function: bool = False
    ) -> Callable[[], object]:
        """A model of one node: ``lends`` are its inputs, the other ``feeds`` initializers."""
        names = [name if name in outputs else "" for name in op.outputs]
        made = helper.make_node(op.name, list(feeds), names, domain=DOMAIN, **attributes)
        initializers = [
            helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape, np.ravel(x))
            for n, x in feeds.items()
            if n not in lends
        ]
        graph = helper.make_graph([made], "alone", _declare(lends), _declare(outputs), initializers)
        body = BODIES[op.name](**attributes)
        opsets = [*body.opset_import, helper.make_opsetid(DOMAIN, VERSION)]
        model = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
        return _bound(self.session(model, library=not function), lends, outputs)

    def session(self, model: onnx.ModelProto, *, library: bool = False) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # chains have unused constants
        if library:
            options.register_custom_ops_library(self.library)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _declare(tensors: Feeds) -> list[onnx.ValueInfoProto]:
    types = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.float32): TensorProto.FLOAT}
    return [helper.make_tensor_value_info(name, types[x.dtype], x.shape) for name, x in tensors.items()]


def _sdpa(causal: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)
    return rows.transpose(1, 2).flatten(2)


def _bound(session: ort.InferenceSession, inputs: Feeds, outputs: Feeds) -> Callable[[], object]:
    binding = session.io_binding()
    for name, x in inputs.items():
        binding.bind_input(name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
    for name, x in outputs.items():
        binding.bind_output(name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
    return lambda: (session.run_with_iobinding(binding), inputs, outputs)[0]  # keeps them alive


if __name__ == "__main__":
    main()
