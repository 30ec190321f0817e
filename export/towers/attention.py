"""Attention beyond softmax(q k^T) v: a clipped softmax, a gate on each head, or both (`AttentionSpec`).

    clipped   p = clip((zeta - gamma) softmax(x) + gamma, 0, 1)                  gamma <= 0, zeta >= 1; equation 4
    gated     out = gate_scale * sigmoid(logits(x)) * (p v), head by head        section 4.2

x is the input of attention; in a pre-norm block it is the output of the norm. Both let a head answer nothing for a
token without large logits, and so without the outliers that these need. Rows of a clipped softmax do not sum to 1.

Source: Bondarenko et al. 2023 (arXiv 2306.12929). The logits [B, T, H] of a gate, by the tensors under ``gate.``:

    per_head    logits [H]                                               the same for every token
    linear      weight [H, d]   bias [H]                                 head h reads its own d numbers of x
    mlp         hidden.weight [H, n, d]  hidden.bias [H, n]  weight [H, n]  bias [H]      as linear, with a hidden ReLU
    all_heads   weight [H, W]   bias [H]                                 every head reads all W = H d numbers
    linear_mean, mlp_mean                                    as linear and mlp, with the logits averaged over tokens

The last two are the paper's ``conditional_per_head``: one value for each head and row, [B, H, 1, 1], from the mean over
all tokens that are not padding. No tensor tells it; a config does (``attn_gate_type``).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from calmclip.export.gates import MEAN, GateKind
from calmclip.export.towers.modules import Module, constant
from calmclip.models.errors import BadRequest, UnknownCheckpoint

KEYS = (  # of a config
    "attn_softmax", "alpha", "max_seq_length", "attn_gate_scale", "fine_tuning", "attn_gate_init", "attn_gate_type",
)  # fmt: skip
PER_HEAD = "conditional_per_head"
_TYPES: Mapping[str, tuple[GateKind, ...]] = {  # attn_gate_type -> the gates that it allows
    "none": ("none",),
    "unconditional_per_head": ("per_head",),
    PER_HEAD: ("linear_mean", "mlp_mean"),
    "conditional_per_token": ("linear", "mlp", "all_heads"),
}
_CLIPPED = re.compile(r"clipped\(([^:()]+):([^:()]+)\)")
_block_diagonal: Callable[..., Tensor] = torch.block_diag  # torch does not type it


@dataclass(frozen=True)
class Softmax:
    """clip((zeta - gamma) softmax(x) + gamma, 0, 1). With gamma 0 and zeta 1 it is the plain softmax."""

    gamma: float = 0.0
    zeta: float = 1.0

    def __post_init__(self) -> None:
        if not (-1.0 < self.gamma <= 0.0 and 1.0 <= self.zeta < 2.0):
            raise BadRequest(f"gamma is {self.gamma:g} and zeta {self.zeta:g}; expected -1 < gamma <= 0, 1 <= zeta < 2")

    @property
    def clipped(self) -> bool:
        return (self.gamma, self.zeta) != (0.0, 1.0)

    @classmethod
    def of_length(cls, alpha: float, length: int) -> "Softmax":
        """gamma = -alpha / length. ``length``: tokens per row in training, a constant of the checkpoint."""
        return cls(gamma=-alpha / length)

    @classmethod
    def parse(cls, text: str) -> "Softmax":
        """Read "vanilla" or "clipped(gamma:zeta)", the names in the paper's code. Raises `BadRequest`."""
        if text == "vanilla":
            return cls()
        try:
            match = _CLIPPED.fullmatch(text.replace(" ", ""))
            return cls(*map(float, match.groups())) if match else cls(float("nan"))
        except (BadRequest, ValueError):
            raise BadRequest(
                f"softmax is {text!r}; expected vanilla, or clipped(gamma:zeta) with -1 < gamma <= 0 and 1 <= zeta "
                "< 2, for example clipped(-0.025:1)"
            ) from None

    def __str__(self) -> str:
        return f"clipped({_shortest(self.gamma)}:{_shortest(self.zeta)})" if self.clipped else "vanilla"

    def __call__(self, logits: Tensor) -> Tensor:
        probabilities = logits.softmax(dim=-1)
        if not self.clipped:
            return probabilities
        return (probabilities * (self.zeta - self.gamma) + self.gamma).clamp(0.0, 1.0)


@dataclass(frozen=True)
class AttentionSpec:
    """``gate_scale`` multiplies the gate. A gate that is added to a trained net starts at pi and has the scale 1 / pi,
    so that the net starts unchanged. The kind of gate follows from its tensors, except for ``gate_type``
    conditional_per_head, whose tensors are those of linear or mlp. None: not stated, a gate for each token."""

    softmax: Softmax = field(default_factory=Softmax)
    gate_scale: float = 1.0
    gate_type: str | None = None

    @property
    def gate_mean(self) -> bool:
        """Whether the logits of a gate are averaged over tokens."""
        return self.gate_type == PER_HEAD

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "config.json") -> "AttentionSpec":
        """Read the keys of a checkpoint's config; no value is guessed. Softmax: ``attn_softmax``, or ``alpha`` and
        ``max_seq_length`` (they win). Scale: ``attn_gate_scale``, or ``fine_tuning`` and ``attn_gate_init``. Gates
        that are averaged over tokens: ``attn_gate_type``.

        Raises `UnknownCheckpoint`, which names the key.
        """
        keys = {name: value for name, value in config.items() if value is not None}
        try:
            softmax = Softmax.parse(str(keys.get("attn_softmax", "vanilla")))
            if "alpha" in keys:
                softmax = Softmax.of_length(float(keys["alpha"]), int(keys["max_seq_length"]))
            scale = 1.0
            if keys.get("fine_tuning") and "attn_gate_init" in keys:
                scale = 1.0 / float(keys["attn_gate_init"])
            scale = float(keys.get("attn_gate_scale", scale))
            if not (math.isfinite(scale) and scale > 0):
                raise BadRequest(f"attn_gate_scale is {scale:g}; expected a number above 0")
            gate_type = keys.get("attn_gate_type")
            if gate_type is not None and gate_type not in _TYPES:
                raise BadRequest(f"attn_gate_type is {gate_type!r}; expected one of {', '.join(_TYPES)}")
        except KeyError:
            raise UnknownCheckpoint(
                f"{where}: alpha without max_seq_length; gamma is -alpha / max_seq_length. Add max_seq_length, the "
                "number of tokens per row in training"
            ) from None
        except (BadRequest, TypeError, ValueError, ArithmeticError) as error:
            raise UnknownCheckpoint(f"{where}: attention: {error}") from None
        return cls(softmax, scale, gate_type)

    def to_config(self) -> dict[str, Any]:
        """The keys of a config that `of` reads as this value."""
        softmax = {"attn_softmax": str(self.softmax)} if self.softmax.clipped else {}
        scale = {} if self.gate_scale == 1.0 else {"attn_gate_scale": self.gate_scale}
        return softmax | scale | ({} if self.gate_type is None else {"attn_gate_type": self.gate_type})

    def check_gate(self, kind: GateKind) -> None:
        """Raises `UnknownCheckpoint` if the config states another type of gate than the tensors are of."""
        if self.gate_type is not None and kind not in (allowed := _TYPES[self.gate_type]):
            gate, expected = kind.removesuffix(MEAN), " or ".join(name.removesuffix(MEAN) for name in allowed)
            raise UnknownCheckpoint(
                f"config.json: attn_gate_type is {self.gate_type!r}, but the tensors are those of the gate {gate}; "
                f"expected the gate {expected}, or another attn_gate_type"
            )


class Gate(Module):
    """x [B, T, W] -> sigmoid of the logits, [B, H, T, 1]; with ``mean``, of their mean over tokens, [B, H, 1, 1]. A
    folded gate is one product for all heads: its matrix holds a zero for each number of x that a head does not read."""

    def __init__(self, state: Mapping[str, Tensor], heads: int, width: int, mean: bool = False) -> None:
        super().__init__()
        self.kind = kind(state, heads, width, mean)
        self.mean = self.kind.endswith(MEAN)
        if self.kind == "per_head":
            self.logits = nn.Parameter(torch.empty(heads))
            return
        self.mlp = "hidden.weight" in state
        head_width = width // heads
        inputs = width if self.kind == "all_heads" else head_width
        if self.mlp:
            inputs = state["hidden.weight"].shape[1]
            weight, bias = torch.empty(heads, inputs, head_width), torch.empty(heads, inputs)
            self.hidden = nn.ParameterDict((("weight", weight), ("bias", bias)))
        self.weight = nn.Parameter(torch.empty(heads, inputs))
        self.bias = nn.Parameter(torch.empty(heads))
        self.folded = False

    def fold(self) -> None:
        """The heads' weights become the blocks of a block-diagonal matrix, stored in the order that a product reads."""
        if self.kind == "per_head":
            return
        if self.mlp:
            self.hidden["weight"] = constant(_block_diagonal(*self.hidden["weight"]).T.contiguous())
            self.hidden["bias"] = constant(self.hidden["bias"].flatten())
        weight = self.weight if self.kind == "all_heads" else _block_diagonal(*self.weight[:, None].unbind())
        self.weight, self.bias = constant(weight.T.contiguous()), constant(self.bias)
        self.folded = True

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``valid`` [B or 1, T]: 1 for the tokens of the mean, 0 for padding; None: all tokens."""
        if self.kind == "per_head":
            return self.logits.sigmoid()[:, None, None]
        scores = self.scores(x)
        if self.mean and valid is None:
            scores = scores.mean(dim=1, keepdim=True)
        elif self.mean:
            valid = cast(Tensor, valid)[..., None]
            scores = (scores * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
        return scores.sigmoid().transpose(1, 2).unsqueeze(-1)

    def scores(self, x: Tensor) -> Tensor:
        """The logits, [B, T, H]."""
        if self.folded:
            if self.mlp:
                x = torch.relu(x @ self.hidden["weight"] + self.hidden["bias"])
            return x @ self.weight + self.bias
        if self.kind == "all_heads":
            return x @ self.weight.T + self.bias
        x = torch.unflatten(x, -1, (len(self.weight), -1))
        if self.mlp:
            x = torch.relu(torch.einsum("bthd,hnd->bthn", x, self.hidden["weight"]) + self.hidden["bias"])
        return (x * self.weight).sum(dim=-1) + self.bias


def kind(state: Mapping[str, Tensor], heads: int, width: int, mean: bool = False) -> GateKind:
    """The kind of the gate with these tensors, by names and shapes; ``mean``: its logits are averaged over tokens, if
    the kind allows it. Raises `KeyError` if a tensor is missing."""
    if not state:
        return "none"
    if "logits" in state:
        return "per_head"
    if {"hidden.weight", "hidden.bias"} & state.keys():
        return "mlp_mean" if mean else "mlp"
    if state["weight"].shape[-1] == width and heads > 1:
        return "all_heads"
    return "linear_mean" if mean else "linear"


def new_gate(
    kind: GateKind, heads: int, width: int, start: float = 0.5, hidden: int | None = None
) -> dict[str, Tensor]:
    """The tensors under ``gate.`` of a new gate, whose value is ``start`` for every input. With ``gate_scale``
    1 / ``start`` a trained net starts unchanged. The paper draws the weights from N(0, 0.01); here they are 0.

    ``hidden``: of mlp; None is a quarter of a head's width, at least 4. Raises `BadRequest` if ``start`` is not between
    0 and 1.
    """
    if not 0 < start < 1:
        raise BadRequest(f"a gate starts at {start}; expected a number between 0 and 1")
    bias, head_width = torch.full((heads,), math.log(start / (1 - start))), width // heads
    hidden = hidden or max(4, head_width // 4)
    if kind == "none":
        return {}
    if kind == "per_head":
        return {"logits": bias}
    base = kind.removesuffix(MEAN)
    inputs = {"linear": head_width, "mlp": hidden, "all_heads": width}[base]
    state = {"weight": torch.zeros(heads, inputs), "bias": bias}
    if base == "mlp":
        state["hidden.weight"] = torch.randn(heads, hidden, head_width) * head_width**-0.5
        state["hidden.bias"] = torch.zeros(heads, hidden)
    return state


def _shortest(number: float) -> str:
    """The shortest text that is read as the same number."""
    return short if float(short := f"{number:g}") == number else repr(number)
