"""Tiny checkpoints of layouts whose reference code is no library: torch modules in their names, random and seeded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny

openai = tiny.openai_module
MARKS = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}


def saved(state: dict[str, Any], directory: Path, name: str = "clip.pt", wrap: Callable[..., object] = dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(wrap(state), directory / name)
    return directory / name


def resnet_module(seed: int = 0) -> Any:
    """CLIP's ResNet with one block a stage, 64-pixel pictures, statistics of batch norms that are no fresh ones."""
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    clip = CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
        quick_gelu=True,
    )
    with torch.no_grad():
        for part in clip.modules():
            if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.2)
        tiny.spread(clip)
        pool = clip.visual.attnpool
        pool.positional_embedding.mul_(2)
        for layer in (pool.q_proj, pool.k_proj):  # logits of some size: a softmax of one place hides what is wrong
            layer.weight.mul_(0.03)
            layer.bias.normal_(0, 0.5)
    return clip.eval()


def openai_resnet(directory: Path) -> Path:
    marks = {**MARKS, "input_resolution": 64}
    return saved(
        {**resnet_module().state_dict(), **{name: torch.tensor(value) for name, value in marks.items()}}, directory
    )


def open_clip_resnet(directory: Path) -> Path:
    import json

    from safetensors.torch import save_file

    clip = resnet_module()
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    preprocess = {"mean": tiny.MEAN, "std": tiny.STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return directory


CONTEXT = 40  # of the tiny Long-CLIP and CLIP-MoE


def long_clip_state() -> dict[str, Tensor]:
    state = dict(openai(context=CONTEXT).state_dict())
    state["positional_embedding_res"] = torch.randn_like(state["positional_embedding"]) * 0.1
    return state


def long_clip(directory: Path) -> Path:
    return saved(long_clip_state(), directory, "longclip.pt")


def clip_moe_state(experts: int = 4, first: int = 1) -> dict[str, Tensor]:
    """The blocks from ``first`` on are of experts, which are kin, as those tuned from one MLP: a token that rounding
    sends to another expert finds an answer that is another, but not any other."""
    state = long_clip_state()
    torch.manual_seed(5)
    for prefix in ("visual.transformer.resblocks", "transformer.resblocks"):
        for i in range(first, 2):
            for name in ("c_fc", "c_proj"):
                for p in ("weight", "bias"):
                    tensor = state.pop(f"{prefix}.{i}.mlp.{name}.{p}")
                    for e in range(experts):
                        state[f"{prefix}.{i}.experts.{e}.{name}.{p}"] = tensor + 0.3 * tensor.std() * torch.randn_like(
                            tensor
                        )
            width = state[f"{prefix}.{i}.ln_1.weight"].shape[0]
            state[f"{prefix}.{i}.gate.weight"] = torch.randn(experts, width)
    return state


def clip_moe(directory: Path) -> Path:
    return saved(clip_moe_state(), directory, "clipmoe.pt")


def svd_state(scale: float = 1.0, rank: int | None = None) -> dict[str, Tensor]:
    """Every matrix of a block factored; the singular values times ``scale``."""
    state = dict(openai().state_dict())
    for name in list(state):
        if ".resblocks." not in name or ".ln_" in name or name.endswith("bias"):
            continue
        weight = state.pop(name)
        bias = state.pop(name.replace("weight", "bias"))
        layer = name.removesuffix(".weight").removesuffix(".in_proj_weight").replace("attn.out_proj", "attn.proj")
        parts = {"": (weight, bias)}
        if name.endswith("in_proj_weight"):
            pairs = zip(weight.chunk(3), bias.chunk(3), strict=True)
            parts = {f".{letter}_proj": pair for letter, pair in zip("qkv", pairs, strict=True)}
        for part, (matrix, offset) in parts.items():
            u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
            state[f"{layer}{part}.fc_V.weight"] = v[:rank].float()
            state[f"{layer}{part}.vector_S"] = (s[:rank] * scale).float()[None]
            state[f"{layer}{part}.fc_U.weight"] = u[:, :rank].float()
            state[f"{layer}{part}.fc_U.bias"] = offset
    return state


def clip_svd(directory: Path) -> Path:
    return saved(svd_state(), directory, "svd.pth", lambda state: {"state_dict": state, "epoch": 3})


def cloob_state(module: nn.Module, nested: bool) -> dict[str, Tensor]:
    state = {}
    for name, tensor in module.state_dict().items():
        if name == "logit_scale":
            state["logit_inv_tau"] = torch.tensor(14.3).log()
        else:
            state[name if name.startswith("visual.") or not nested else f"transformer.{name}"] = tensor
    return {f"module.{name}": tensor for name, tensor in state.items()}


def cloob(directory: Path) -> Path:
    return saved(cloob_state(resnet_module(), True), directory, "cloob.pt", lambda s: {"epoch": 1, "state_dict": s})


def cloob_flat(directory: Path) -> Path:
    return saved(cloob_state(resnet_module(), False), directory, "cloob.pt")


def cloob_vit(directory: Path) -> Path:
    return saved(cloob_state(openai(), True), directory, "cloob.pt")


def cloob_vit_flat(directory: Path) -> Path:
    return saved(cloob_state(openai(), False), directory, "cloob.pt")


class Slip(nn.Module):
    """timm's ViT, open_clip's text tower, and a projection: SLIP's names but for those of the text."""

    def __init__(self, *, qk_norm: bool, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        self.visual = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=heads, qk_norm=qk_norm, num_classes=0
        )
        self.text: Any = openai()
        self.image_projection = nn.Parameter(torch.randn(width, 16) * 0.2)
        tiny.spread(self.visual)
        self.eval()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.visual(pixels) @ self.image_projection, dim=-1)

    def encode_text(self, ids: Tensor) -> Any:
        return self.text.encode_text(ids, normalize=True)

    def state(self) -> dict[str, Tensor]:
        state = {f"visual.{name}": tensor for name, tensor in self.visual.state_dict().items()}
        text = {n: t for n, t in self.text.state_dict().items() if not n.startswith("visual.") and n != "attn_mask"}
        return {**state, **text, "image_projection": self.image_projection.detach()}


def slip(directory: Path) -> Path:
    """LaCLIP's, as DataParallel saved it."""
    state = {f"module.{name}": tensor for name, tensor in Slip(qk_norm=True).state().items()}
    return saved(state, directory, "laclip.pt", lambda state: {"epoch": 1, "state_dict": state})


class Decoder(nn.Module):
    """GRAIN's decoder in its names, on torch's own attention: two layers, three queries, the picture's the last."""

    def __init__(self, width: int = 64, inner: int = 32) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.proj = nn.Linear(width, inner, bias=False)
        self.query_embed = nn.Embedding(3, inner)
        self.img_proj = nn.Parameter(torch.randn(inner, 16) * 0.3)
        self.obj_proj = nn.Parameter(torch.randn(inner, 16))
        self.class_embed, self.pos_embed = nn.Linear(inner, 5), nn.Parameter(torch.zeros(1, 17, inner))
        self.bbox_embed: Any = nn.Module()
        self.bbox_embed.layers = nn.ModuleList(nn.Linear(inner, n) for n in (inner, inner, 4))
        self.transformer: Any = nn.Module()
        self.transformer.pre_norm = nn.LayerNorm(inner)
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.layers = nn.ModuleList(nn.Module() for _ in range(2))
        self.transformer.decoder.norm = nn.LayerNorm(inner)
        for layer in self.transformer.decoder.layers:
            layer.self_attn, layer.multihead_attn = (nn.MultiheadAttention(inner, 8) for _ in range(2))
            layer.linear1, layer.linear2 = nn.Linear(inner, 2 * inner), nn.Linear(2 * inner, inner)
            layer.norm1, layer.norm2, layer.norm3 = (nn.LayerNorm(inner) for _ in range(3))
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, tokens: Tensor) -> Any:
        return self.answers(tokens)[-1] @ self.img_proj

    def regions(self, tokens: Tensor, side: float) -> tuple[Tensor, Tensor]:
        """Vectors [B, Q, D] and boxes [B, Q, 4] x0 y0 x1 y1 in pixels; the decoder itself answers cx cy w h in 0..1."""
        answers = self.answers(tokens)[:-1].transpose(0, 1)
        first, second, third = self.bbox_embed.layers
        x, y, width, height = third(second(first(answers).relu()).relu()).sigmoid().unbind(-1)
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return nn.functional.normalize(answers @ self.obj_proj, dim=-1), torch.stack(corners, dim=-1) * side

    def answers(self, tokens: Tensor) -> Any:
        """[Q, B, W]."""
        memory = self.transformer.pre_norm(self.proj(tokens)).transpose(0, 1)
        names = self.query_embed.weight[:, None].expand(-1, len(tokens), -1)
        x = torch.zeros_like(names)
        for layer in self.transformer.decoder.layers:
            normed = layer.norm1(x)
            x = x + layer.self_attn(normed + names, normed + names, normed)[0]
            x = x + layer.multihead_attn(layer.norm2(x) + names, memory, memory)[0]
            x = x + layer.linear2(layer.linear1(layer.norm3(x)).relu())
        return self.transformer.decoder.norm(x)


def grain(directory: Path) -> Path:
    states = {"state_dict": Decoder().state_dict(), "backbone_state_dict": Slip(qk_norm=True).state()}
    return saved({name: {f"module.{n}": t for n, t in state.items()} for name, state in states.items()}, directory)
