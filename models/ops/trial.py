"""Every operator against its local function, on shapes of real towers: which is faster on this processor?

`calmclip ops build` measures once, and `calmclip.models.ops.breakeven` decides by the result. The models ship in
``trials/``, because making them takes the onnx package; their weights are drawn here. `python -m
calmclip.export.functions` writes the models anew.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from PIL import Image

from calmclip.models.bundle.manifest import Graph, ImagePreprocess, Tensor
from calmclip.models.flow import Array
from calmclip.models.ops import spec
from calmclip.models.ops.breakeven import PICTURES, Measured, processor, ratios_file
from calmclip.models.ops.library import Library, Mode
from calmclip.models.ops.spec import ACTIVATIONS, Attribute, Op
from calmclip.models.preprocess.image import ImagePreparer
from calmclip.models.runtime.session import Memory, Session, SessionOptions

FOLDER = Path(__file__).with_name("trials")
ROUNDS = 5
TURN_S = 0.004  # a side is repeated for this time before the other one's turn
SMALL = 1 << 15  # bytes; ONNX Runtime fuses products only with scales that it reads from the model
_random = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """One node. ``draw``: all its inputs, at random; those in ``constants`` are initializers, and random ones if they
    have over `SMALL` bytes. ``outputs``: name -> shape."""

    op: Op
    draw: Callable[[], dict[str, Any]]
    outputs: Mapping[str, tuple[int | str, ...]]
    constants: tuple[str, ...] = ()
    attributes: dict[str, Attribute] = field(default_factory=dict)
    name: str = ""  # of an operator's second case

    @property
    def graph(self) -> Graph:
        outputs = {
            name: Tensor(dtype=tensor.dtype, shape=self.outputs[name]) for name, tensor in self.op.outputs.items()
        }
        inputs = {name: _tensor(array) for name, array in self.feeds().items() if name not in self.constants}
        file = f"{self.op.key}{self.name and '_' + self.name}.onnx"
        return Graph(file=file, batch=False, inputs=inputs, outputs=outputs, preprocess=None)

    def feeds(self) -> dict[str, Array]:
        """All inputs, of the dtypes of the spec."""
        return {name: np.asarray(array, self.op.inputs[name].dtype) for name, array in self.draw().items()}

    def drawn(self) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        """The inputs of a run, the constants in the model, and those that a session gets beside it."""
        feeds = self.feeds()
        constants = {name: feeds.pop(name) for name in self.constants}
        small = {name: array for name, array in constants.items() if array.nbytes <= SMALL}
        return feeds, small, {name: array for name, array in constants.items() if name not in small}


def _tensor(array: Array) -> Tensor:
    """A batch is of any size, as in bundles: ONNX Runtime fuses other nodes if it knows the size."""
    shape = ("B", *array.shape[1:]) if array.ndim > 2 and array.shape[0] == 1 else array.shape
    dtype: Any = array.dtype.name
    return Tensor(dtype=dtype, shape=shape)


def _bytes(*shape: int) -> Array:
    return _random.integers(0, 256, shape, np.uint8)


def _floats(*shape: int) -> Array:
    return _random.normal(0, 1, shape)


_X = {"x_scale": 0.02, "x_zero": 120}
_Y = {"y_scale": 0.02, "y_zero": 120}
_LAYER = ("x_scale", "x_zero", "weight", "weight_scale", "bias")


def _weight(*shape: int) -> dict[str, Any]:
    """The last side is the columns. Results are about 1. Normal, as trained weights are: AVX2 takes a third longer for
    uniform ones."""
    draw = _random if np.prod(shape) > SMALL else np.random.default_rng(0)
    return {
        "weight": draw.normal(0, 36, shape).clip(-127, 127),
        "weight_scale": np.linspace(0.5, 1, shape[-1]) / (39 * np.sqrt(np.prod(shape[:-1]))),
        "bias": np.linspace(-1, 1, shape[-1]),
    }


def _boxes() -> dict[str, Any]:
    corner = _random.uniform(0, 300, (300, 2))
    return {
        "boxes": np.hstack([corner, corner + _random.uniform(10, 60, (300, 2))]), "scores": _random.random(300),
        "classes": _random.integers(0, 4, 300), "method": [2], "per_class": [1], "iou_threshold": [0.3],
        "sigma": [0.5], "min_score": [0.05], "max_output": [50],
    }  # fmt: skip


def _attention() -> dict[str, Any]:
    qkv = _bytes(1, 197, 3 * 768)
    return {
        "q": qkv, "q_scale": 0.002, "q_zero": 130, "k": qkv, "k_scale": 0.02, "v": qkv, "v_scale": 0.02,
        "p_scale": 0, "mask": [0], **_Y,
    }  # fmt: skip


def _rotary() -> dict[str, Any]:
    qkv, angle = _floats(1, 64, 16 * 64 + 2 * 8 * 64), _random.uniform(-3, 3, (64, 64))
    return {
        "q": qkv, "k": qkv, "v": qkv, "q_weight": np.ones(64), "k_weight": np.ones(64), "q_cos": np.cos(angle),
        "q_sin": np.sin(angle), "k_cos": np.cos(angle), "k_sin": np.sin(angle),
        "mask": np.triu(np.full((64, 64), -np.inf), 1),
    }  # fmt: skip


_PICTURE: dict[str, Attribute] = {"gain": (0.017, 0.017, 0.017), "bias": (-2.1, -2.0, -1.8)}
_EDGES: dict[str, Attribute] = {"pads": (1, 1, 1, 1)}

CASES = (
    Case(spec.SOFTMAX, lambda: {"x": _floats(2364, 197)}, {"y": (2364, 197)}),
    Case(spec.SOFT_NMS, _boxes, dict.fromkeys(spec.SOFT_NMS.outputs, ("K",))),
    Case(spec.IMAGE_TO_PIXELS, lambda: {"image": _bytes(240, 320, 3)}, {"pixels": (1, 3, 224, 224)},
         attributes=_PICTURE),
    Case(spec.IMAGE_TO_QUANTIZED_PIXELS, lambda: {"image": _bytes(240, 320, 3)}, {"pixels": (1, 3, 224, 224)},
         attributes=_PICTURE | {"scale": 0.02, "zero_point": 120}),
    Case(spec.QUANT_LINEAR, lambda: {"x": _bytes(1, 50, 768), **_X, **_weight(768, 3072), **_Y},
         {"y": ("B", 50, 3072)}, (*_LAYER, "y_scale", "y_zero"), {"activation": ACTIVATIONS.index("gelu")}),
    Case(spec.QUANT_LINEAR_TO_FLOAT,
         lambda: {"x": _bytes(1, 50, 3072), **_X, **_weight(3072, 768), "residual": _floats(1, 50, 768)},
         {"y": ("B", 50, 768)}, _LAYER),
    Case(spec.QUANT_ROWS_LINEAR,
         lambda: {"x": _bytes(1, 16, 1024), "x_scale": _random.uniform(0.01, 0.03, (1, 16, 1)), "x_zero": 128,
                  **_weight(1024, 4096), "residual": [0]},
         {"y": ("B", 16, 2048)}, ("x_zero", "weight", "weight_scale", "bias", "residual"),
         {"activation": ACTIVATIONS.index("silu"), "gated": 1}),
    Case(spec.QUANT_POINTWISE, lambda: {"x": _bytes(1, 32, 32, 128), **_X, **_weight(128, 384), **_Y},
         {"y": ("B", 32, 32, 384)}, (*_LAYER, "y_scale", "y_zero")),
    Case(spec.QUANT_CONV, lambda: {"x": _bytes(1, 28, 28, 64), **_X, **_weight(3, 3, 64, 64), **_Y},
         {"y": ("B", 28, 28, 64)}, (*_LAYER, "y_scale", "y_zero"), _EDGES),
    Case(spec.QUANT_ATTENTION, _attention, {"y": ("B", 197, 768)},
         ("q_scale", "q_zero", "k_scale", "v_scale", "p_scale", "mask", "y_scale", "y_zero"),
         {"heads": 12, "width": 768, "k_start": 768, "v_start": 1536}),
    Case(spec.ROTARY_ATTENTION, _rotary, {"y": ("B", 64, 1024)}, ("q_weight", "k_weight"),
         {"heads": 16, "groups": 8, "k_start": 1024, "v_start": 1536}),
    Case(spec.QUANT_LAYER_NORM,
         lambda: {"x": _floats(197, 768), "residual": _floats(197, 768), "weight": np.ones(768), "bias": np.zeros(768),
                  **_Y},
         dict.fromkeys(("y", "normed", "sum"), (197, 768)), ("weight", "bias", "y_scale", "y_zero")),
    Case(spec.QUANT_ROWS, lambda: {"x": _floats(1, 16, 1024), "weight": np.ones(1024)},
         {"y": ("B", 16, 1024), "scale": ("B", 16, 1)}, ("weight",), {"normalize": 1}),
    Case(spec.QUANT_PATCHES, lambda: {"x": _floats(1, 3, 224, 224), **_Y}, {"y": ("B", 49, 3072)},
         ("y_scale", "y_zero")),
    Case(spec.QUANT_DEPTHWISE, lambda: {"x": _bytes(1, 56, 56, 96), **_X, **_weight(3, 3, 96), **_Y},
         {"y": ("B", 56, 56, 96)}, (*_LAYER, "y_scale", "y_zero"), _EDGES | {"group": 96}),
    Case(spec.QUANT_DEPTHWISE, lambda: {"x": _bytes(1, 28, 28, 192), **_X, **_weight(7, 7, 192), **_Y},
         {"y": ("B", 28, 28, 192)}, (*_LAYER, "y_scale", "y_zero"), {"pads": (3, 3, 3, 3), "group": 192}, "7x7"),
    Case(spec.QUANT_MAX_POOL, lambda: {"x": _bytes(1, 112, 112, 32)}, {"y": ("B", 56, 56, 32)}, (),
         _EDGES | {"window": (3, 3), "strides": (2, 2)}),
    Case(spec.QUANT_LOOKUP, lambda: {"x": _bytes(1, 197, 3072), "table": np.arange(255, -1, -1)},
         {"y": ("B", 197, 3072)}, ("table",)),
    Case(spec.QUANT_ADD,
         lambda: {"a": _bytes(1, 28, 28, 192), "a_scale": 0.02, "a_zero": 120, "b": _bytes(1, 28, 28, 192),
                  "b_scale": 0.03, "b_zero": 130, **_Y},
         {"y": ("B", 28, 28, 192)}, ("a_scale", "a_zero", "b_scale", "b_zero", "y_scale", "y_zero")),
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One thing, done in two ways."""

    compiled: Callable[[], tuple[Array, ...]]
    function: Callable[[], tuple[Array, ...]]


def measure(library: Library, cases: tuple[Case, ...] = CASES) -> dict[str, float]:
    """Operator -> time of the function by time of the operator, in processor time of one thread; 2: twice as fast.

    The two take turns, and the least time of each counts: other load on the machine only adds. The cases of an operator
    are summed. No operator has a ratio whose function answers otherwise: on x86-64 without VNNI, ONNX Runtime's
    products of bytes saturate.
    """
    pairs = [(case.op.name, pair(case)) for case in cases]
    if cases is CASES:
        pairs.append((PICTURES, _of_pictures(library)))
    spent: dict[str, list[float]] = {}
    wrong = set()
    for name, of in pairs:
        if not _agree(of.compiled(), of.function()):
            wrong.add(name)
        total = spent.setdefault(name, [0.0, 0.0])
        for at, least in enumerate(seconds(of)):
            total[at] += least
    return {name: function / compiled for name, (compiled, function) in spent.items() if name not in wrong}


def pair(case: Case) -> Pair:
    """The node of ``case``, by the library and by its function."""
    graph, (feeds, _, weights) = case.graph, case.drawn()
    memory = Memory((FOLDER / graph.file).read_bytes(), weights)

    def run(way: Mode) -> Callable[[], tuple[Array, ...]]:
        session = Session(FOLDER / graph.file, graph, SessionOptions(threads=1, ops=way), memory)
        return lambda: tuple(session.run(feeds).values())

    return Pair(run("all"), run("off"))


def _of_pictures(library: Library) -> Pair:
    preprocess = ImagePreprocess(size=(224, 224), shortest=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    picture = Image.fromarray(_bytes(480, 640, 3))
    compiled, pillow = ImagePreparer(preprocess, library), ImagePreparer(preprocess)
    return Pair(lambda: compiled.prepare(picture)[:1], lambda: pillow.prepare(picture)[:1])


def _agree(a: tuple[Array, ...], b: tuple[Array, ...]) -> bool:
    """Within two steps of bytes, or a thousandth of the largest number."""
    return all(
        x.shape == y.shape
        and np.abs(x.astype(np.float64) - y).max(initial=0) <= (2 if x.dtype == np.uint8 else 1e-3 * np.abs(y).max())
        for x, y in zip(a, b, strict=True)
    )


def seconds(of: Pair) -> tuple[float, float]:
    """The least processor time of a run of each way, which take turns."""
    runs = (of.compiled, of.function)
    least = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for at, run in enumerate(runs):
            run()  # brings its weights into the caches
            start = last = process_time()
            while last - start < TURN_S:
                run()
                now = process_time()
                least[at], last = min(least[at], now - last), now
    return least[0], least[1]


def store(library: Library) -> Measured:
    """Measure, and write the ratios beside the library for `breakeven` to read."""
    measured = Measured(library.sha256, processor(library), measure(library))
    ratios_file(library).write_text(json.dumps(measured.as_json(), indent=2) + "\n", encoding="utf-8")
    return measured
