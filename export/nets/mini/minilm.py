"""MiniLM, the text encoder: BERT with 6 layers, width 384 and 12 heads; ids + mask -> mean token state. The encoder of
many languages has 12 layers and another vocabulary (`e5`).

Source: Devlin et al. 2018 (arXiv 1810.04805); the weights are all-MiniLM-L6-v2 (Wang et al. 2020, arXiv
2002.10957; Reimers & Gurevych 2019, arXiv 1908.10084). For a small graph one product gives query, key and value, the
query's weights include 1/sqrt(32), the positions include the only token type, and the mask becomes an addend once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.nets.mini.facts import CONTEXT, HEADS, INNER, LAYERS, VOCABULARY, WIDTH

MASKED = -1e4  # added to a padded token's logits: after the softmax its float32 weight is exactly 0


class Layer(nn.Module):
    """Attention and feed-forward, each followed by the residual sum and a LayerNorm."""

    gain: Tensor | None = None  # [B, T, 1], a factor of the values while `towers.attribution` differentiates by it

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-12)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, addend: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        value = value if self.gain is None else value * self.gain
        q, k, v = (
            part.view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2) for part in (query, key, value)
        )  # [B, 12, T, 32] each
        logits = q @ k.transpose(2, 3)
        mixed = F.softmax(logits if addend is None else logits + addend, dim=-1) @ v
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH)))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return x


class MiniLM(nn.Module):
    """ids int64 [B, T] (T <= 256), mask int64 [B, T] (1 = a token; None: all are) -> float32 [B, 384], not unit."""

    def __init__(self, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x: Tensor = self.norm(self.words(ids) + self.positions[: ids.shape[1]])
        if mask is None:
            for layer in self.layers:
                x = layer(x, None)
            return x.mean(1)
        weights = mask.to(x.dtype)
        addend = ((1 - weights) * MASKED)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, addend)
        return (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


_OURS = {
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}
_UNUSED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}  # the mean is the pooling here


def from_state(state: Mapping[str, Tensor], layers: int = LAYERS) -> MiniLM:
    """The encoder with the published weights, in the names of transformers' BertModel. Any other key is an error."""
    remaining = {key: value.float() for key, value in state.items() if key not in _UNUSED}
    positions = remaining.pop("embeddings.position_embeddings.weight")[:CONTEXT]
    ours = {
        "words.weight": remaining.pop("embeddings.word_embeddings.weight"),
        "positions": positions + remaining.pop("embeddings.token_type_embeddings.weight")[0],
        "norm.weight": remaining.pop("embeddings.LayerNorm.weight"),
        "norm.bias": remaining.pop("embeddings.LayerNorm.bias"),
    }
    for index in range(layers):
        old, new = f"encoder.layer.{index}.", f"layers.{index}."
        for kind in ("weight", "bias"):
            q, k, v = (remaining.pop(f"{old}attention.self.{part}.{kind}") for part in ("query", "key", "value"))
            ours[f"{new}qkv.{kind}"] = torch.cat([q / (WIDTH // HEADS) ** 0.5, k, v])
            ours |= {f"{new}{name}.{kind}": remaining.pop(f"{old}{theirs}.{kind}") for theirs, name in _OURS.items()}
    if remaining:
        raise ValueError(f"the weights hold keys that are no MiniLM's: {sorted(remaining)}")
    encoder = MiniLM(layers, len(ours["words.weight"]))
    encoder.load_state_dict(ours, strict=True)
    return encoder.eval().requires_grad_(False)
