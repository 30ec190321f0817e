"""Our torch modules of the towers, shaped so that their graphs are fast; everything a layout is translated to.

A tower is made of its tensors (`State`: name -> tensor) and a `Style`, which says what shapes do not. Names:

    patch.weight  patch.bias?  cls?  positions  norm_pre?.*              image
    tokens.weight  positions                                            text (more of BERT's kind: `bert`)
    blocks.{i}.norm1.*  .attn.qkv.*  .attn.q_norm?.*  .attn.k_norm?.*  .attn.gate?.*  .attn.out.*
    blocks.{i}.norm2.*  .mlp.up.*  .mlp.down.*      or  .mlp.gate.weight  .mlp.experts.{e}.up.*  .down.*
    norm_post?.*  pool?.*  projection?.weight  projection?.bias

A vector before the projection is what `pool` takes of the tokens. Where that is one token, the last block computes
that token alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from calmclip.export.towers.attention import AttentionSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Style:
    """What the shapes of its tensors do not say of a transformer.

    ``pool``: cls, first   token 0
              eot          the first token with the id `end`; without `end` the one with the highest id
              last         the last token of the context (its length is then fixed)
              mean         of all tokens, after `norm_post`
              map          a learned query attends to all tokens (SigLIP)
              none         no pooling: all tokens, projected
    """

    heads: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    pool: Literal["cls", "first", "eot", "last", "mean", "map", "none"] = "cls"
    end: int | None = None
    causal: bool = False
    eps: float = 1e-5
    qk_eps: float = 1e-6
    top: int = 2  # of a mixture of experts, how many a token goes to
    routed: bool = False  # experts compute only the tokens that go to them, instead of all
    attention: AttentionSpec = field(default_factory=AttentionSpec)


class Part(dict[str, Tensor]):
    """The tensors under a prefix, by what follows it; a `KeyError` names one in full."""

    def __init__(self, state: State, prefix: str) -> None:
        super().__init__({n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)})
        self.prefix = getattr(state, "prefix", "") + prefix

    def __missing__(self, name: str) -> Tensor:
        raise KeyError(self.prefix + name)


def part(state: State, prefix: str) -> Part:
    return Part(state, prefix)


def count(state: State, prefix: str) -> int:
    """One more than the highest number that follows ``prefix``."""
    numbers = [int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)]
    return max(numbers, default=-1) + 1
