"""Which operators are worth their kernels on this processor. The others are left to their local functions.

A table says what is expected of each instruction set. `calmclip ops build` measures (`calmclip.models.ops.trial`), and
what it measured on this processor overrules the table. A ratio near 1 overrules nothing: there either way is as good,
and noise must not decide.
"""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from calmclip.models.ops.library import Library, Mode

MARGIN = 0.1  # a measured ratio counts under 1 - MARGIN and over 1 + MARGIN

PICTURES = "pictures"  # no operator: what prepares pictures outside of graphs, the kernel or Pillow
# Operator -> the kernel that does its work.
KERNELS = {
    PICTURES: "resize_rows",
    "Softmax": "softmax_reload",
    "SoftNMS": "soft_nms",
    "ImageToPixels": "resize_rows",
    "ImageToQuantizedPixels": "resize_rows",
    "QuantLinear": "quant_linear",
    "QuantLinearToFloat": "quant_linear",
    "QuantRowsLinear": "quant_linear",
    "QuantPointwise": "quant_linear",
    "QuantConv": "quant_conv",
    "QuantAttention": "quant_attention",
    "RotaryAttention": "rotary_attention",
    "QuantLayerNorm": "quant_layer_norm",
    "QuantRows": "quant_rows",
    "QuantPatches": "quant_patches",
    "QuantDepthwise": "quant_depthwise",
    "QuantMaxPool": "quant_max_pool",
    "QuantLookup": "quant_lookup",
    "QuantAdd": "quant_add",
}
# Operator -> the instruction sets whose kernels lose to the function, as `tests/bench/ops_breakeven.py` measures them.
# The kernels that compute number by number take 1.7 times (QuantPatches) to 30 times as long (QuantConv) as ONNX
# Runtime's vectors. All kernels of vectors win, or are the only exact ones: without VNNI, ONNX Runtime's products of
# bytes on x86-64 saturate.
_SCALAR = frozenset({"scalar"})
LOSES: Mapping[str, frozenset[str]] = {
    "Softmax": _SCALAR,
    "QuantLinear": _SCALAR,
    "QuantLinearToFloat": _SCALAR,
    "QuantRowsLinear": _SCALAR,
    "QuantPointwise": _SCALAR,
    "QuantConv": _SCALAR,
    "QuantAttention": _SCALAR,
    "RotaryAttention": _SCALAR,
    "QuantLayerNorm": _SCALAR,
    "QuantPatches": _SCALAR,
    "QuantDepthwise": _SCALAR,
    "QuantAdd": _SCALAR,
}


@dataclass(frozen=True)
class Measured:
    """The ratios of one build: operator -> time of the function by time of the operator."""

    sha256: str  # of the library
    processor: str
    ratios: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratios": {name: round(ratio, 3) for name, ratio in self.ratios.items()}}


@dataclass(frozen=True)
class Choice:
    """``compiled``: whether the operator's kernel runs; else its function. ``ratio``: as measured here, None if it was
    not."""

    compiled: bool
    isa: str
    ratio: float | None
    why: str


def choices(library: Library) -> dict[str, Choice]:
    """Operator -> the choice on this processor, in the order of the operators' table."""
    measured = read(library)
    isas, result = library.isas, {}
    for op, kernel in KERNELS.items():
        isa, ratio = isas[kernel], measured.ratios.get(op) if measured else None
        expected = isa not in LOSES.get(op, ())
        if ratio is not None and abs(ratio - 1) > MARGIN:
            result[op] = Choice(ratio > 1, isa, ratio, "measured on this processor")
        else:
            result[op] = Choice(expected, isa, ratio, f"the table, for {isa} kernels")
    return result


def left(library: Library, mode: Mode = "auto") -> tuple[str, ...]:
    """The operators that run by their functions here; none if ``mode`` is all."""
    return tuple(op for op, choice in choices(library).items() if not choice.compiled) if mode != "all" else ()


def ratios_file(library: Library) -> Path:
    return library.path.with_name(f"{library.path.name}.ratios.json")


def read(library: Library) -> Measured | None:
    """What `calmclip ops build` measured; None if it did not, or with another library, processor or set of masks."""
    try:
        value = json.loads(ratios_file(library).read_bytes())
        ratios = {str(name): float(ratio) for name, ratio in value["ratios"].items()}
        measured = Measured(value["sha256"], value["processor"], ratios)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return measured if (measured.sha256, measured.processor) == (library.sha256, processor(library)) else None


def processor(library: Library) -> str:
    """The processor, and the instruction sets whose kernels run."""
    return f"{_model()}; {', '.join(sorted({kernel.isa for kernel in library.kernels if kernel.runs}))}"


@cache
def _model() -> str:
    """Linux's name of the processor. ARM has none, but numbers of its maker and its parts."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = re.findall(r"^(?:model name|cpu family|model|CPU implementer|CPU part)\s*:\s*(.*\S)", text, re.MULTILINE)
    return " ".join(dict.fromkeys(names)) or platform.processor() or platform.machine()
