"""Dense maps of timm's ViTs: EVA02, PE-Core, MobileCLIP-B, ViTamin. See `calmclip.export.towers.dense`.

Source: timm (doi 10.5281/zenodo.4414861), `VisionTransformer` and `Eva`. Their blocks are pre-norm, x + s attention(
norm1(x)), then x + t mlp(norm2(x)), with optional scales s and t of each channel. Attention may rotate q and k by
positions, norm the answers of the heads, and gate them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calmclip.export.checkpoints.files import require_package
from calmclip.export.towers.dense import Heads, Layer, Positions, Reader
from calmclip.export.towers.image import Trunk
from calmclip.export.towers.modules import Linear, Module, constant, constant_linear

_PARTS = ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "attn_pool", "global_pool", "fc_norm", "head")
_BLOCKS, _ATTENTION = ("Block", "EvaBlock"), ("Attention", "EvaAttention", "AttentionRope")


def vit_in(image: Trunk) -> Any | None:
    """timm's ViT: the trunk itself, or its part if open_clip puts a head behind it."""
    trunks: tuple[Any, ...] = (image.trunk, getattr(image.trunk, "trunk", None))
    return next((trunk for trunk in trunks if trunk is not None and all(hasattr(trunk, p) for p in _PARTS)), None)


def why_not(vit: Any) -> str | None:
    """Why there is no map of this ViT."""
    for block in vit.blocks:
        kind, attention = type(block).__name__, type(getattr(block, "attn", None)).__name__
        if kind not in _BLOCKS or attention not in _ATTENTION:
            return f"its blocks are {kind} with {attention}; expected {' or '.join(_BLOCKS)} of timm's"
        if getattr(block.attn, "num_kv_groups", 1) > 1:
            return "its heads share keys and values"
    pool = vit.attn_pool
    if pool is not None:
        usual = type(pool).__name__ == "AttentionPoolLatent" and pool.latent_len == 1 and pool.pos_embed is None
        return (
            None
            if usual
            else f"its pool is a {type(pool).__name__} with positions, several queries or of an unknown kind"
        )
    return None if vit.global_pool in ("token", "avg") else f"its pool is {vit.global_pool or 'none'!r}"


class TimmTransformer(Reader):
    """timm's ViT with a class token, a mean or a learned query as its pool. A learned query: each patch's value takes
    the place of its answer; ``bare``: without the feed-forward of the pool. A mean: the patches behind the blocks are
    the map; if no norm follows the mean, the mean of the map is the picture's vector. ``size``: of the picture."""

    def __init__(self, image: Trunk, positions: Positions, size: tuple[int, int]) -> None:
        super().__init__()
        self.image, self.positions, self.size = image, positions, size
        self.gathers = self.vit.attn_pool is None and self.vit.global_pool == "token"

    @property
    def vit(self) -> Any:
        return vit_in(self.image)

    def fold(self) -> None:
        vit = self.vit
        before = vit.pos_embed
        if self.positions.old != self.positions.new:
            vit.set_input_size(img_size=self.size)
            if before is not None:
                vit.pos_embed = constant(self.positions.of(before[0])[None])
        fold: Any = self.image.fold
        fold()
        for block in vit.blocks:
            if getattr(block.attn, "q_bias", None) is not None:
                block.attn.qkv.bias = constant(torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias]))
        self.products = nn.ModuleList(separate(vit.blocks[-1].attn) or parts(vit.blocks[-1].attn.qkv, 3))
        if vit.attn_pool is not None:
            self.value = parts(vit.attn_pool.kv, 2)[1]

    def layers(self) -> Sequence[Layer]:
        vit = self.vit
        rotations = [None] * len(vit.blocks)
        if getattr(vit, "rope", None) is not None:
            shape = {} if hasattr(vit.rope, "feat_shape") else {"shape": vit.patch_embed.grid_size}
            rotation = vit.rope.get_embed(**shape)
            rotations = [*rotation] if getattr(vit, "rope_mixed", False) else [rotation] * len(vit.blocks)
        *others, last = zip(vit.blocks, rotations, strict=True)
        products: Any = self.products
        return [*(TimmLayer(*layer) for layer in others), TimmLayer(*last, products)]

    def tokens(self, pixels: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(pixels))
        x = self.vit.norm_pre(x[0] if isinstance(x, tuple) else x)  # behind it come the rotations
        tokens: Tensor = x
        return tokens

    def project(self, x: Tensor, bare: bool) -> Tensor:
        vit = self.vit
        x, pool = vit.norm(x), vit.attn_pool
        if pool is not None:
            x = pool.proj(self.value(x))
            x = x if bare or pool.mlp is None else x + pool.mlp(pool.norm(x))
        x = vit.head(vit.fc_norm(x))
        if vit is not self.image.trunk:
            head: Any = self.image.trunk.head
            x = head(x)
        return self.image.projection(x)


class TimmLayer(Layer):
    """A block of timm's. ``rotation``: of q and k by the positions of the patches, sines and cosines."""

    block: Any

    def __init__(self, block: Any, rotation: Tensor | None, products: Sequence[Module] = ()) -> None:
        self.block, self.rotation, self.products = block, rotation, products
        self.number = block.attn.num_heads
        self.factors = 1 / block.attn.scale, block.attn.scale, block.attn.scale

    def tokens(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.block.norm1(x)
        return tokens

    def heads(self, tokens: Tensor) -> Heads:
        attention = self.block.attn
        if products := self.products or separate(attention):
            parts = [product(tokens) for product in products]
        else:
            parts = [*attention.qkv(tokens).chunk(3, dim=-1)]
        q, k, v = (torch.unflatten(part, -1, (self.number, -1)).transpose(1, 2) for part in parts)
        q, k = self._rotated(attention.q_norm(q)), self._rotated(attention.k_norm(k))
        return Heads(q * attention.scale, k, v)

    def _rotated(self, x: Tensor) -> Tensor:
        if self.rotation is None:
            return x
        layers, attention = require_package("timm.layers", "an image tower of timm's"), self.block.attn
        first, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        rotated = layers.apply_rot_embed_cat(x[:, :, first:], self.rotation, half=half)
        return torch.cat([x[:, :, :first], rotated], dim=2)

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def out(self, answers: Tensor, tokens: Tensor) -> Tensor:
        attention = self.block.attn
        answers = attention.norm(answers)
        if attention.gate is not None:
            answers = answers * attention.gate(tokens).sigmoid()
        return self._scaled(attention.proj(answers), 1)

    def middle(self, x: Tensor) -> Tensor:
        middle: Tensor = self.block.norm2(x)
        return middle

    def forward(self, middle: Tensor) -> Tensor:
        return self._scaled(self.block.mlp(middle), 2)

    def _scaled(self, added: Tensor, number: int) -> Tensor:
        """By the scale of the attention (1) or of the feed-forward (2)."""
        if hasattr(self.block, f"ls{number}"):
            scaled: Tensor = getattr(self.block, f"ls{number}")(added)
            return scaled
        gamma = getattr(self.block, f"gamma_{number}")
        return added if gamma is None else gamma * added


def separate(attention: Any) -> list[Module]:
    """The layers that compute q, k and v, if there are three."""
    return [] if attention.qkv is not None else [attention.q_proj, attention.k_proj, attention.v_proj]


def parts(layer: nn.Linear, number: int) -> list[Linear]:
    """The rows of ``layer`` in ``number`` layers."""
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
    return [
        constant_linear(weight.clone(), shift.clone())
        for weight, shift in zip(layer.weight.chunk(number), bias.chunk(number), strict=True)
    ]
