"""The graph `dense` of timm's ViTs. Oracle: what timm's own model gives to torch's attention, put into the formulas."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import timm
import torch
from timm.models import vision_transformer_hybrid
from torch import Tensor
from torch.nn import functional as F

from calmclip.export import parity
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights, read
from calmclip.export.nets import Net
from calmclip.export.pipeline import load
from calmclip.export.towers.dense import Positions
from calmclip.export.towers.timm_dense import why_not
from calmclip.export.trace import to_onnx
from tests.tiny_layouts import mobileclip, trunks


def dense(checkpoint: Path, method: str, **params: Any) -> Net:
    return load("clip", str(checkpoint), Weights(), [Adapt(name="dense", params={"method": method, **params})])


class Block(NamedTuple):
    """Its module, its input [B, T, W], and the heads [B, H, T, d]."""

    module: Any
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Reference:
    """``head``: what open_clip puts behind timm's ViT."""

    def __init__(self, vit: Any, head: Any = None) -> None:
        self.vit, self.head = vit.eval(), head or torch.nn.Identity()

    def resized(self, size: tuple[int, int]) -> None:
        table, before = self.vit.pos_embed, self.vit.patch_embed.grid_size
        self.vit.set_input_size(img_size=size)
        if table is not None:
            positions = Positions(before, self.vit.patch_embed.grid_size)
            self.vit.pos_embed = torch.nn.Parameter(positions.of(table[0])[None])

    def blocks(self, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Block]:
        heads: list[Sequence[Tensor]] = []
        inputs: list[Tensor] = []
        plain = F.scaled_dot_product_attention

        def seen(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
            heads.append((q, k, v))
            return plain(q, k, v, **settings)

        hooks = [block.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for block in self.vit.blocks]
        for module in self.vit.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(F, "scaled_dot_product_attention", seen)
            self.vit(pixels)
        for hook in hooks:
            hook.remove()
        return [Block(*parts, *three) for *parts, three in zip(self.vit.blocks, inputs, heads, strict=False)]

    def map(self, blocks: Sequence[Block], method: str) -> Tensor:
        """[B, h w, D] by ``method``, on all ``blocks`` if it has a path of its own."""
        vit, last = self.vit, blocks[-1]
        with torch.inference_mode():
            if method == "values" and vit.global_pool == "token":
                x = last.x + _attention(last.module, last.v)
                x = x + _scaled(last.module, 2, last.module.mlp(last.module.norm2(x)))
            elif method == "values":
                x = last.x + _attention(
                    last.module, ((last.q @ last.k.mT) * last.q.shape[-1] ** -0.5).softmax(-1) @ last.v
                )
                x = x + _scaled(last.module, 2, last.module.mlp(last.module.norm2(x)))
            else:
                x = blocks[0].x
                for block in blocks:
                    x = x + _attention(block.module, _alike(block, method))
            x = vit.norm(x[:, vit.num_prefix_tokens :])
            if vit.attn_pool is not None:
                width = x.shape[-1]
                x = F.linear(x, vit.attn_pool.kv.weight[width:], vit.attn_pool.kv.bias[width:])
                x = vit.attn_pool.proj(x)
                x = x + vit.attn_pool.mlp(vit.attn_pool.norm(x))
            rows: Tensor = self.head(vit.head(vit.fc_norm(x)))
            return rows


def _alike(block: Block, method: str) -> Tensor:
    def weights(z: Tensor) -> Tensor:
        return (z @ z.mT * z.shape[-1] ** -0.5).softmax(-1)

    if method == "vv":
        return weights(block.v) @ block.v
    mean = (weights(block.q) + weights(block.k) + weights(block.v)) / 3
    return mean.sum(1, keepdim=True) @ block.v


def _attention(block: Any, answers: Tensor) -> Tensor:
    """Behind the heads' answers [B, H, T, d]."""
    return _scaled(block, 1, block.attn.proj(block.attn.norm(answers.transpose(1, 2).flatten(2))))


def _scaled(block: Any, number: int, x: Tensor) -> Tensor:
    if hasattr(block, f"ls{number}"):
        scaled: Tensor = getattr(block, f"ls{number}")(x)
        return scaled
    gamma = getattr(block, f"gamma_{number}")
    return x if gamma is None else gamma * x


def _open_clip(checkpoint: Path) -> Reference:
    visual = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")[0].eval().visual
    return Reference(visual.trunk, visual.head)


def _mobileclip_b(checkpoint: Path) -> Reference:
    vit = timm.create_model("vit_base_mci_224", depth=1, img_size=64, num_classes=mobileclip.DIM, global_pool="token")
    vit.load_state_dict(vision_transformer_hybrid.checkpoint_filter_fn(dict(read(checkpoint).tensors), vit))
    return Reference(vit)


CASES = {
    "eva02": (trunks.eva02, _open_clip),
    "pe_core": (trunks.pe_core, _open_clip),
    "vitamin": (trunks.vitamin, _open_clip),
    "mobileclip_b": (mobileclip.mobileclip_b, _mobileclip_b),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["values", "self", "vv"])
@pytest.mark.parametrize("name", CASES)
def test_a_map_of_timms_vit_is_the_formula(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At another size than the checkpoint's, traced."""
    write, reference_of = CASES[name]
    checkpoint = write(tmp_path / name)
    reference = reference_of(checkpoint)
    depth, side = len(reference.vit.blocks), reference.vit.patch_embed.img_size[0]
    size = 2 * side, 3 * side
    net = dense(checkpoint, method, size=f"{size[0]}x{size[1]}", **({} if method == "values" else {"blocks": depth}))
    tower = net.towers["dense"]
    reference.resized(size)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    want = reference.map(reference.blocks(pixels, monkeypatch), method).reshape(
        2, *reference.vit.patch_embed.grid_size, -1
    )
    patches = parity.onnx_run(to_onnx(tower))({"pixels": pixels.numpy()})["patches"]
    assert tower.outputs["patches"].shape == ("B", *patches.shape[1:])
    assert (torch.from_numpy(patches) - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"global_pool": "max"}, "its pool is 'max'"),
        ({"global_pool": ""}, "its pool is 'none'"),
        ({"attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False}, "its heads share keys and values"),
        ({"use_post_norm": True}, "its blocks are EvaBlockPostNorm with EvaAttention; expected Block or EvaBlock"),
    ],
)
def test_why_a_vit_has_no_map(params: dict[str, Any], reason: str):
    trunks.register()
    with torch.device("meta"):
        vit = timm.create_model("eva02_clip_test", **params)
    assert str(why_not(vit)).startswith(reason)


def test_the_vits_that_have_one():
    trunks.register()
    with torch.device("meta"):
        assert [why_not(timm.create_model(f"{name}_test")) for name in ("eva02_clip", "vit_pe_core", "vitamin")] == [
            None
        ] * 3
