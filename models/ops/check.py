"""Each operator beside its oracle: compiled, and by the function that bundles carry, on the same small models.

The models ship in ``probes/``, for to make one takes the onnx package; `python -m calmclip.export.functions` prints
them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.bundle.manifest import Graph, Tensor
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops import reference
from calmclip.models.ops.library import Mode, find, why_not
from calmclip.models.ops.spec import (
    ACTIVATIONS,
    IMAGE_TO_PIXELS,
    IMAGE_TO_QUANTIZED_PIXELS,
    METHODS,
    QUANT_ADD,
    QUANT_ATTENTION,
    QUANT_DEPTHWISE,
    QUANT_LAYER_NORM,
    QUANT_LINEAR,
    QUANT_LINEAR_TO_FLOAT,
    QUANT_LOOKUP,
    QUANT_PATCHES,
    QUANT_POINTWISE,
    SOFT_NMS,
    SOFTMAX,
    Attribute,
    Op,
)
from calmclip.models.runtime.session import Session, SessionOptions

FOLDER = Path(__file__).with_name("probes")
ROUNDS = 20

Random = np.random.Generator


@dataclass(frozen=True)
class Probe:
    """One node of ``op``. ``draw`` makes inputs, ``expected`` the oracle's outputs of them, in order.

    ``most``: how far an output may be from the oracle. ``inputs``, ``outputs``: where they say more than the spec.
    """

    name: str
    op: Op
    draw: Callable[[Random], dict[str, Array]]
    expected: Callable[[Arrays], tuple[Array, ...]]
    most: float
    attributes: dict[str, Attribute] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        inputs, outputs = self.op.inputs | self.inputs, self.op.outputs | self.outputs
        return Graph(file=f"{self.name}.onnx", batch=False, inputs=inputs, outputs=outputs, preprocess=None)


def _rows(random: Random) -> dict[str, Array]:
    """Rows at, below and beyond a few vectors; masked ones among them."""
    x = random.normal(0, 5, (int(random.integers(1, 30)), int(random.integers(1, 700)))).astype(np.float32)
    x[random.random(x.shape) < 0.1] = -np.inf if random.random() < 0.5 else np.finfo(np.float32).min
    return {"x": x}


def _softmax(**attributes: Any) -> Callable[[Arrays], tuple[Array, ...]]:
    return lambda feeds: (reference.softmax(feeds["x"], **attributes),)


def _boxes(random: Random) -> dict[str, Array]:
    count = int(random.integers(0, 200))
    corner = random.uniform(0, 100, (count, 2))
    boxes = np.hstack([corner, corner + random.uniform(0, 40, (count, 2))]).astype(np.float32)
    return {
        "boxes": boxes,
        "scores": random.random(count).astype(np.float32),
        "classes": random.integers(0, 4, count),
        "method": random.integers(0, len(METHODS), 1),
        "per_class": random.integers(0, 2, 1),
        "iou_threshold": np.array([0.3], np.float32),
        "sigma": np.array([0.5], np.float32),
        "min_score": np.array([0.01], np.float32),
        "max_output": np.array([100]),
    }


def _suppressed(feeds: Arrays) -> tuple[Array, ...]:
    how = {name: feeds[name].item() for name in ("iou_threshold", "sigma", "min_score", "max_output")}
    how |= {"method": METHODS[feeds["method"].item()], "per_class": bool(feeds["per_class"].item())}
    kept = reference.soft_nms(feeds["boxes"], feeds["scores"], feeds["classes"], **how)
    return *kept, np.zeros(len(kept.indices), np.int64)


def _picture(random: Random) -> dict[str, Array]:
    height, width = (int(side) for side in random.integers(1, 400, 2))
    return {"image": random.integers(0, 256, (height, width, 3), np.uint8)}


def _layer(random: Random) -> dict[str, Array]:
    """A linear layer whose sides fill its panels and tiles, or not; its results are about 1."""
    rows, k, n = (int(random.integers(1, most)) for most in (40, 200, 100))
    return {
        "x": random.integers(0, 256, (2, rows, k), np.uint8),
        "x_scale": np.array(0.02, np.float32),
        "x_zero": np.array(random.integers(0, 256), np.uint8),
        "weight": random.integers(-128, 128, (k, n), np.int8),
        "weight_scale": (random.uniform(0.5, 1, n) / (80 * np.sqrt(k))).astype(np.float32),
        "bias": random.normal(0, 1, n).astype(np.float32),
    }


def _quantized_layer(random: Random) -> dict[str, Array]:
    feeds = _layer(random)
    n = len(feeds["bias"])
    scale = random.uniform(0.01, 0.03, n).astype(np.float32)
    return feeds | {"y_scale": scale, "y_zero": random.integers(0, 256, n, np.uint8)}


def _places(random: Random) -> dict[str, Array]:
    """Pictures of one column, in one step each for what comes in and goes out."""
    feeds = _layer(random)
    feeds["x"] = feeds["x"][:, :, None]
    feeds["y_scale"], feeds["y_zero"] = np.array(0.02, np.float32), np.array(random.integers(0, 256), np.uint8)
    return feeds


def _added_layer(random: Random) -> dict[str, Array]:
    feeds = _layer(random)
    shape = (*feeds["x"].shape[:-1], len(feeds["bias"]))
    return feeds | {"residual": random.normal(0, 1, shape).astype(np.float32)}


def _float(value: float) -> Array:
    return np.array(value, np.float32)


def _bytes(random: Random, *shape: int) -> Array:
    return np.asarray(random.integers(0, 256, shape), np.uint8)


def _attention(random: Random, step: float) -> dict[str, Array]:
    """q, k and v are columns of one tensor, as a product of all three gives them; causal."""
    batch, tokens = int(random.integers(1, 4)), int(random.integers(1, 90))
    qkv = _bytes(random, batch, tokens, 3 * 96)
    return {
        "q": qkv, "q_scale": _float(0.002), "q_zero": _bytes(random), "k": qkv, "k_scale": _float(0.02),
        "v": qkv, "v_scale": _float(0.02), "p_scale": _float(step),
        "mask": np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1),
        "y_scale": random.uniform(0.012, 0.03, 96).astype(np.float32), "y_zero": _bytes(random, 96),
    }  # fmt: skip


def _stream(random: Random) -> dict[str, Array]:
    rows, width = int(random.integers(1, 30)), int(random.integers(1, 300))
    x, residual = random.normal(0, 1, (2, rows, width)).astype(np.float32)
    weight, bias = random.normal(0, 1, (2, width)).astype(np.float32)
    scale = {"y_scale": _float(0.03), "y_zero": _bytes(random)}
    return {"x": x, "residual": residual, "weight": weight, "bias": bias} | scale


def _pixels(random: Random) -> dict[str, Array]:
    """As large as a patch of 14, or larger."""
    batch, height, width = (int(side) for side in random.integers((1, 14, 14), (5, 70, 70)))
    x = random.normal(0, 1, (batch, 3, height, width)).astype(np.float32)
    return {"x": x, "y_scale": _float(0.02), "y_zero": _bytes(random)}


def _convolved(random: Random) -> dict[str, Array]:
    """Pictures whose sides fill strips and tiles, or not; a block of channels and a part of one. Results near 1."""
    return {
        "x": _bytes(random, *(int(random.integers(1, most)) for most in (3, 12, 60)), 80),
        "x_scale": _float(0.02), "x_zero": _bytes(random),
        "weight": random.integers(-128, 128, (3, 3, 80), np.int8),
        "weight_scale": (random.uniform(0.5, 1, 80) / 240).astype(np.float32),
        "bias": random.normal(0, 1, 80).astype(np.float32),
        "y_scale": random.uniform(0.01, 0.03, 80).astype(np.float32), "y_zero": _bytes(random, 80),
    }  # fmt: skip


def _looked_up(random: Random) -> dict[str, Array]:
    """Fewer bytes than a vector holds, and more."""
    return {"x": _bytes(random, int(random.integers(1, 9)), int(random.integers(1, 90))), "table": _bytes(random, 256)}


def _added(random: Random) -> dict[str, Array]:
    """Fewer numbers than a block holds, and more; a in one scale, b and the sum in one for each of 80 columns."""
    shape = (int(random.integers(1, 9)), int(random.integers(1, 9)), 80)
    return {
        "a": _bytes(random, *shape), "a_scale": _float(0.02), "a_zero": _bytes(random),
        "b": _bytes(random, *shape), "b_scale": random.uniform(0.01, 0.03, 80).astype(np.float32),
        "b_zero": _bytes(random, 80),
        "y_scale": random.uniform(0.02, 0.05, 80).astype(np.float32), "y_zero": _bytes(random, 80),
    }  # fmt: skip


_CLIP: dict[str, Attribute] = {"gamma": -0.003, "zeta": 1.003}
_ROWS = Tensor(dtype="float32", shape=("R", "C"))
_PLACE: dict[str, Attribute] = {"size": (48, 40), "shortest": 56, "gain": (0.02, 0.01, 0.03), "bias": (-2.5, 0.4, 1.0)}
_STEPS: dict[str, Attribute] = _PLACE | {"scale": 0.02, "zero_point": 120}
_BYTES = Tensor(dtype="uint8", shape=("B", "T", "K"))
_ADDED = Tensor(dtype="float32", shape=("B", "T", "N"))
_GELU: dict[str, Attribute] = {"activation": ACTIVATIONS.index("gelu")}
_HEADS: dict[str, Attribute] = {"heads": 2, "width": 96, "q_start": 0, "k_start": 96, "v_start": 192}
_COLUMNS = {"y_scale": Tensor(dtype="float32", shape=(96,)), "y_zero": Tensor(dtype="uint8", shape=(96,))}
_MASKED = _COLUMNS | {"mask": Tensor(dtype="float32", shape=("T", "T"))}
_SUMS = dict.fromkeys(("x", "residual", "normed", "sum"), Tensor(dtype="float32", shape=("R", "W")))
_ONE = {"y_scale": Tensor(dtype="float32", shape=()), "y_zero": Tensor(dtype="uint8", shape=())}
_GRID = Tensor(dtype="uint8", shape=("R", "C"))
_WINDOW: dict[str, Attribute] = {"strides": (2, 1), "pads": (2, 1, 0, 1), "group": 80}
_CHANNELS = {"y_scale": Tensor(dtype="float32", shape=(80,)), "y_zero": Tensor(dtype="uint8", shape=(80,))}
_SCALED = {"a": Tensor(dtype="uint8", shape=("B", "T", 80)), "b": Tensor(dtype="uint8", shape=("B", "T", 80)),
           "a_scale": _ONE["y_scale"], "a_zero": _ONE["y_zero"],
           "b_scale": _CHANNELS["y_scale"], "b_zero": _CHANNELS["y_zero"]} | _CHANNELS  # fmt: skip
_PATCH: dict[str, Attribute] = {"patch": (14, 14)}
_OVERLAP: dict[str, Attribute] = {"patch": (3, 3), "strides": (2, 2), "pads": (0, 1, 1, 0)}

PROBES = (
    Probe("softmax", SOFTMAX, _rows, _softmax(), 1e-6, {}, {"x": _ROWS}, {"y": _ROWS}),
    Probe("clipped_softmax", SOFTMAX, _rows, _softmax(**_CLIP), 1e-6, _CLIP, {"x": _ROWS}, {"y": _ROWS}),
    Probe("soft_nms", SOFT_NMS, _boxes, _suppressed, 1e-5),
    Probe("image_to_pixels", IMAGE_TO_PIXELS, _picture, lambda f: (reference.image_to_pixels(f["image"], **_PLACE),),
          0, _PLACE, outputs={"pixels": Tensor(dtype="float32", shape=(1, 3, 48, 40))}),
    Probe("image_to_quantized_pixels", IMAGE_TO_QUANTIZED_PIXELS, _picture,
          lambda f: (reference.image_to_quantized_pixels(f["image"], **_STEPS),),  # type: ignore[arg-type]
          0, _STEPS, outputs={"pixels": Tensor(dtype="uint8", shape=(1, 3, 48, 40))}),
    Probe("quant_linear", QUANT_LINEAR, _quantized_layer,
          lambda f: (reference.quant_linear(**f, **_GELU),), 1, _GELU,  # type: ignore[arg-type]
          {"x": _BYTES, "y_scale": Tensor(dtype="float32", shape=("N",)),
           "y_zero": Tensor(dtype="uint8", shape=("N",))},
          {"y": Tensor(dtype="uint8", shape=("B", "T", "N"))}),
    Probe("quant_pointwise", QUANT_POINTWISE, _places, lambda f: (reference.quant_pointwise(**f),), 1, {},
          _ONE | {"x": Tensor(dtype="uint8", shape=("B", "H", "W", "K"))},
          {"y": Tensor(dtype="uint8", shape=("B", "H", "W", "N"))}),
    Probe("quant_linear_to_float", QUANT_LINEAR_TO_FLOAT, _added_layer,
          lambda f: (reference.quant_linear_to_float(**f, **_GELU),), 1e-5, _GELU,  # type: ignore[arg-type]
          {"x": _BYTES, "residual": _ADDED}, {"y": _ADDED}),
    # of bytes: a step next to a tie
    Probe("quant_attention", QUANT_ATTENTION, lambda random: _attention(random, 0),
          lambda f: (reference.quant_attention(**f, **_HEADS),), 1, _HEADS, _MASKED),  # type: ignore[arg-type]
    Probe("clipped_quant_attention", QUANT_ATTENTION, lambda random: _attention(random, 1 / 255),
          lambda f: (reference.quant_attention(**f, **_HEADS | _CLIP),),  # type: ignore[arg-type]
          1, _HEADS | _CLIP, _MASKED),
    Probe("quant_layer_norm", QUANT_LAYER_NORM, _stream, lambda f: reference.quant_layer_norm(**f),  # type: ignore[arg-type]
          1, {}, {name: _SUMS[name] for name in ("x", "residual")} | _ONE,
          {name: _SUMS[name] for name in ("normed", "sum")} | {"y": Tensor(dtype="uint8", shape=("R", "W"))}),
    Probe("quant_patches", QUANT_PATCHES, _pixels,
          lambda f: (reference.quant_patches(**f, **_PATCH),), 1, _PATCH),  # type: ignore[arg-type]
    Probe("overlapping_quant_patches", QUANT_PATCHES, _pixels,
          lambda f: (reference.quant_patches(**f, **_OVERLAP),), 1, _OVERLAP),  # type: ignore[arg-type]
    Probe("quant_depthwise", QUANT_DEPTHWISE, _convolved,
          lambda f: (reference.quant_depthwise(**f, **_WINDOW),), 1, _WINDOW,  # type: ignore[arg-type]
          _CHANNELS | {"x": Tensor(dtype="uint8", shape=("B", "H", "W", 80)), "x_scale": _ONE["y_scale"],
                       "x_zero": _ONE["y_zero"]},
          {"y": Tensor(dtype="uint8", shape=("B", "h", "w", 80))}),
    Probe("quant_lookup", QUANT_LOOKUP, _looked_up, lambda f: (reference.quant_lookup(**f),),
          0, {}, {"x": _GRID}, {"y": _GRID}),
    Probe("quant_add", QUANT_ADD, _added, lambda f: (reference.quant_add(**f),), 1, {}, _SCALED, {"y": _SCALED["a"]}),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How far the farthest output of a probe was from the oracle; ``trouble``: why nothing could be said."""

    probe: str
    way: str
    rounds: int = ROUNDS
    difference: float = 0.0
    trouble: str = ""
    passed: bool = True


def check(probes: tuple[Probe, ...] = PROBES) -> Iterator[Result]:
    """Every probe, by the library and by its function. A missing library is a failure: it is what is asked about."""
    if find() is None:
        yield Result("library", "library", 0, trouble=why_not(), passed=False)
    for probe in probes:
        ways: tuple[tuple[str, Mode], ...] = (("library", "required"), ("function", "off"))
        for way, mode in ways:
            if mode == "off" or find() is not None:
                yield _compare(probe, way, mode)


def _compare(probe: Probe, way: str, mode: Mode) -> Result:
    result = Result(probe.name, way)
    random = np.random.default_rng(0)
    session = Session(FOLDER / f"{probe.name}.onnx", probe.graph, SessionOptions(threads=1, ops=mode))
    farthest = 0.0
    for _ in range(ROUNDS):
        feeds = probe.draw(random)
        try:
            found = session.run(feeds)
        except Exception as error:  # also those of ONNX Runtime, whose types are not public
            return replace(result, trouble=str(error), passed=False)
        for (name, array), expected in zip(found.items(), probe.expected(feeds), strict=True):
            if array.shape != expected.shape or array.dtype != expected.dtype:
                is_, should = (f"{a.dtype} {list(a.shape)}" for a in (array, expected))
                trouble = f"{name} is {is_}; expected {should}"
                return replace(result, trouble=trouble, passed=False)
            if array.size:
                apart = np.abs(array.astype(np.float64) - expected.astype(np.float64))
                farthest = max(farthest, float(apart.max()) if np.isfinite(apart).all() else np.inf)
    return replace(result, difference=farthest, passed=farthest <= probe.most)


def as_json(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}
