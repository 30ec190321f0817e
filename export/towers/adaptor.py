"""The text side of LLM2CLIP: vectors of a language model float32 [B, d] -> unit vectors float32 [B, D].

    n x [x + down(GELU(up(norm(x))))], then LayerNorm, then Linear

Source: Huang et al. 2024, LLM2CLIP (arXiv 2411.04997), and its published code; ProCLIP, Hu et al. 2025, has the same
shape. Names: ``layers.{i}.norm.*  .up.*  .down.*`` for i < n, ``layers.{n}.*`` the norm, ``layers.{n+1}.*`` the linear
layer. n and all widths are those of the tensors: LLM2CLIP has 4 blocks of twice the width, ProCLIP 1 of eight times.
"""

import re

from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers import State, part
from calmclip.export.towers.decoder import DecoderText
from calmclip.export.towers.modules import LayerNorm, Module, unit
from calmclip.export.towers.transformer import linear

_BLOCK = re.compile(r"layers\.(\d+)\.(norm|up|down)\.")


def depth(state: State) -> int:
    """n, one more than the highest number of a block."""
    return max((int(match[1]) for match in map(_BLOCK.match, state) if match), default=-1) + 1


class Block(Module):
    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.up = linear(state, "up", width)
        self.down = linear(state, "down", len(state["up.weight"]), width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class TextAdaptor(Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        count, width = depth(state), len(state["layers.0.norm.weight"])
        bias = f"layers.{count + 1}.bias" in state
        self.layers = nn.ModuleList(
            [
                *(Block(part(state, f"layers.{i}."), width) for i in range(count)),
                LayerNorm(width),
                linear(state, f"layers.{count + 1}", width, bias=bias),
            ]
        )

    def fold(self) -> None:
        """There is nothing to fold."""

    def forward(self, vectors: Tensor) -> Tensor:
        for layer in self.layers:
            vectors = layer(vectors)
        return unit(vectors)


class AdaptedText(Module):
    """`TextAdaptor` over a decoder inside: ids, mask and perhaps ``pooled`` int64 [B, T] -> unit vectors [B, D]. The
    pooled vectors are not made unit vectors in between, as in LLM2CLIP's training with the language model inside."""

    def __init__(self, encoder: DecoderText, adaptor: TextAdaptor) -> None:
        super().__init__()
        self.encoder, self.adaptor = encoder, adaptor

    def fold(self) -> None:
        self.encoder.fold()
        self.adaptor.fold()

    def forward(self, ids: Tensor, mask: Tensor, pooled: Tensor | None = None) -> Tensor:
        return self.adaptor(self.encoder.encode(self.encoder.embed(ids), mask, pooled))
