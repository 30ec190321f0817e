"""The torch modules of towers, shaped so that their graphs are fast. Every layout is translated to them.

A tower is built from its tensors (`State`: name -> tensor) and a `Style`, which holds the settings that the shapes of
tensors do not show. Names (``?``: optional):

    patch.weight  patch.bias?  cls?  positions  norm_pre?.*              image
    tokens.weight  positions                                            text (`bert` lists more)
    blocks.{i}.norm1.*  .attn.qkv.*  .attn.q_norm?.*  .attn.k_norm?.*  .attn.gate?.*  .attn.out.*
    blocks.{i}.norm2.*  .mlp.up.*  .mlp.down.*      or  .mlp.gate.weight  .mlp.experts.{e}.up.*  .down.*
    norm_post?.*  pool?.*  projection?.weight  projection?.bias

`Style.pool` reduces the tokens to the vector that is projected. If it takes one token, the last block computes that
token alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from calmclip.export.towers.attention import AttentionSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Style:
    """The settings of a transformer that the shapes of its tensors do not show.

    ``pool``: cls, first   token 0
              eot          the first token with the id `end`; if `end` is None, the token with the highest id
              last         the last token of the context, whose length is then fixed
              mean         the mean of all tokens, after `norm_post`
              map          a learned query attends to all tokens (SigLIP)
              none         no pooling: all tokens, projected
    ``top``: the number of experts per token, in a mixture of experts.
    ``routed``: an expert computes only its own tokens, instead of all.
    """

    heads: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    pool: Literal["cls", "first", "eot", "last", "mean", "map", "none"] = "cls"
    end: int | None = None
    causal: bool = False
    eps: float = 1e-5
    qk_eps: float = 1e-6
    top: int = 2
    routed: bool = False
    attention: AttentionSpec = field(default_factory=AttentionSpec)


class Part(dict[str, Tensor]):
    """The tensors whose names begin with a prefix, without it. A `KeyError` shows the full name."""

    def __init__(self, state: State, prefix: str) -> None:
        super().__init__({n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)})
        self.prefix = getattr(state, "prefix", "") + prefix

    def __missing__(self, name: str) -> Tensor:
        raise KeyError(self.prefix + name)


def part(state: State, prefix: str) -> Part:
    return Part(state, prefix)


def count(state: State, prefix: str) -> int:
    """One more than the highest number that follows ``prefix`` in a name."""
    numbers = [int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)]
    return max(numbers, default=-1) + 1
