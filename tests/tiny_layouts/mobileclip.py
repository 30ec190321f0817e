"""MobileCLIP in its authors' names: image towers by timm, renamed; the text tower written from the paper."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny import spread
from tests.tiny_layouts.trunks import trained

DIM = 64
WIDTH = 64


def mobileclip(directory: Path) -> Path:
    """As S0: DIRECTORY/mobileclip.pt, its text tower with a convolution at either end."""
    return write(directory, small_fastvit(), OriginalText(["mix", "attend", "attend", "mix"]))


def mobileclip_plain(directory: Path) -> Path:
    """As S1 and S2."""
    return write(directory, small_fastvit(), OriginalText(["attend", "attend"]))


def mobileclip_b(directory: Path) -> Path:
    """As B, one block deep and 768 wide, for timm's stem is no narrower."""
    import timm

    torch.manual_seed(0)
    image = timm.create_model("vit_base_mci_224", depth=1, img_size=64, num_classes=DIM, global_pool="token")
    return write(directory, image, OriginalText(["attend", "attend"]))


def small_fastvit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    small: dict[str, Any] = {"layers": (1, 1, 2, 1), "embed_dims": (16, 32, 32, 64)}
    return timm.create_model("fastvit_mci0", **small, num_classes=DIM)


def write(directory: Path, image: nn.Module, text: "OriginalText") -> Path:
    trained(image)
    spread(text)
    trained_text(text)
    names = _vit_names if hasattr(image, "pos_embed") else _fastvit_names
    state = {f"image_encoder.model.{key}": tensor for key, tensor in names(image.state_dict()).items()}
    state |= {f"text_encoder.{key}": tensor for key, tensor in text.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "logit_scale": torch.tensor(4.9)}, directory / "mobileclip.pt")
    return directory / "mobileclip.pt"


def _fastvit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> the authors': the other way round than `timm.models.fastvit.checkpoint_filter_fn`."""
    renamed = {}
    for key, tensor in state.items():
        if key == "head.fc.bias":
            continue  # the authors' projection has none, and timm reads zeros
        if key == "head.fc.weight":
            renamed["head.proj"] = tensor.T.contiguous()
            continue
        name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"network.{2 * int(m[1]) - 1}", key)
        name = name.replace("stages.3.pos_emb.pos_enc", "network.6.pe").replace("stages.3.blocks", "network.7")
        name = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"network.{2 * int(m[1])}", name)
        for timms, theirs in (
            ("stem.", "patch_embed."), ("conv_kxk", "rbr_conv"), ("conv_scale", "rbr_scale"), ("identity", "rbr_skip"),
            ("final_conv", "conv_exp"), ("large_conv", "lkb_origin"), ("mlp", "convffn"), ("se.fc1", "se.reduce"),
            ("se.fc2", "se.expand"), (".gamma", ""),
        ):  # fmt: skip
            name = name.replace(timms, theirs)
        renamed[name] = tensor
    return renamed


def _vit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        if key == "head.bias":
            continue
        if key == "head.weight":
            renamed["classifier.proj"] = tensor.T.contiguous()
            continue
        if key == "pos_embed":
            renamed["pos_embed.pos_embed.pos_embed"] = tensor[None]
            continue
        name = re.sub(r"^norm\.", "post_transformer_norm.", key)
        for timms, theirs in (
            ("patch_embed.backbone.", "patch_emb."), (".conv.", ".block.conv."), (".bn.", ".block.norm."),
            ("blocks.", "transformer."), ("norm1", "pre_norm_mha.0"), ("attn.qkv", "pre_norm_mha.1.qkv_proj"),
            ("attn.proj", "pre_norm_mha.1.out_proj"), ("norm2", "pre_norm_ffn.0"), ("mlp.fc1", "pre_norm_ffn.1"),
            ("mlp.fc2", "pre_norm_ffn.4"),
        ):  # fmt: skip
            name = name.replace(timms, theirs)
        renamed[name] = tensor
    return renamed


def trained_text(text: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            if "layer_scale" in name:
                parameter.uniform_(0.2, 0.8)
        for layer in text.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.uniform_(-0.3, 0.3)
                layer.running_var.uniform_(0.5, 2.0)


class OriginalText(nn.Module):
    """The authors' text tower, module by module, unfolded: ids int64 [B, 77] -> unit vectors [B, 16]."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding_layer = nn.Embedding(49408, WIDTH)
        self.positional_embedding: Any = nn.Module()
        self.positional_embedding.pos_embed = nn.Module()
        self.positional_embedding.pos_embed.pos_embed = nn.Parameter(torch.randn(1, 1, 77, WIDTH) * 0.3)
        self.transformer = nn.ModuleList(_Attend() if kind == "attend" else _Mix() for kind in kinds)
        self.final_layer_norm = nn.LayerNorm(WIDTH)
        self.projection_layer = nn.Parameter(torch.randn(WIDTH, DIM) * WIDTH**-0.5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding_layer(ids) + self.positional_embedding.pos_embed.pos_embed[0]
        for layer in self.transformer:
            x = layer(x, mask)
        x = self.final_layer_norm(x)[torch.arange(len(ids)), ids.argmax(dim=-1)]
        return nn.functional.normalize(x @ self.projection_layer, dim=-1)


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class _Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre_norm_mha: Any = nn.ModuleList([nn.LayerNorm(WIDTH), _Heads()])
        self.pre_norm_ffn = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128), nn.GELU(), nn.Dropout(0.0), nn.Linear(128, WIDTH)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        norm, heads = self.pre_norm_mha
        q, k, v = heads.qkv_proj(norm(x)).chunk(3, dim=-1)  # one head of 64
        logits = q @ k.transpose(1, 2) / WIDTH**0.5
        x = x + heads.out_proj((logits if mask is None else logits + mask).softmax(dim=-1) @ v)
        return x + self.pre_norm_ffn(x)


class _Branch(nn.Module):
    """``rbr_skip``: a batch norm; with ``conv`` also a convolution along the text with one of its own."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(WIDTH)
        if conv:
            branch = nn.Sequential()
            branch.add_module("conv", nn.Conv2d(WIDTH, WIDTH, (1, 11), padding=(0, 5), groups=WIDTH, bias=False))
            branch.add_module("bn", nn.BatchNorm2d(WIDTH))
            self.rbr_conv = nn.ModuleList([branch])

    def forward(self, x: Tensor) -> Any:
        return self.rbr_skip(x) + (self.rbr_conv[0](x) if hasattr(self, "rbr_conv") else 0)


class _Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_mixer: Any = nn.Module()
        self.token_mixer.norm, self.token_mixer.mixer = _Branch(conv=False), _Branch(conv=True)
        self.token_mixer.layer_scale = nn.Parameter(torch.empty(WIDTH, 1, 1))
        self.convffn: Any = nn.Module()
        self.convffn.conv = nn.Sequential()
        self.convffn.conv.add_module("conv", nn.Conv2d(WIDTH, WIDTH, (1, 11), padding=(0, 5), groups=WIDTH, bias=False))
        self.convffn.conv.add_module("bn", nn.BatchNorm2d(WIDTH))
        self.convffn.fc1, self.convffn.fc2 = nn.Conv2d(WIDTH, 128, 1), nn.Conv2d(128, WIDTH, 1)
        self.layer_scale = nn.Parameter(torch.empty(WIDTH, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.permute(0, 2, 1)[:, :, None]
        mixer = self.token_mixer
        x = x + mixer.layer_scale * (mixer.mixer(x) - mixer.norm(x))
        inner = self.convffn.fc2(nn.functional.gelu(self.convffn.fc1(self.convffn.conv(x))))
        x = x + self.layer_scale * inner
        return x[:, :, 0].permute(0, 2, 1)
