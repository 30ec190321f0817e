"""The kinds of gates of attention (arXiv 2306.12929, section 4.2), apart from their torch modules."""

from typing import Literal, get_args

GateKind = Literal["none", "linear", "mlp", "all_heads", "per_head", "linear_mean", "mlp_mean"]
GATES: tuple[GateKind, ...] = get_args(GateKind)
MEAN = "_mean"  # the end of a kind whose logits are averaged over tokens
