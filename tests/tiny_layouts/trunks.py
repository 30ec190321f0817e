"""open_clip checkpoints whose image tower timm builds, by the builders of the published models, with fewer and narrower
layers: a ConvNeXt, MobileCLIP's FastViT with its branches, PE-Core, EVA02 and ViTamin."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from calmclip.export import samples
from tests.tiny import MEAN, STD, spread

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def open_clip_timm(directory: Path) -> Path:
    """A ConvNeXt as open_clip's are: timm's own pooling, a linear projection; texts without a prefix."""
    vision = {"image_size": 64, "timm_model_name": "convnext_tiny_test", "timm_pool": "", "timm_proj": "linear"}
    return write(directory, "CLIP", vision, TEXT, {"mean": [0.48] * 3, "std": [0.27] * 3})


def open_clip_timm_custom_text(directory: Path) -> Path:
    """A MobileCLIP-S: FastViT with batch norms and branches that have been trained, a text tower that is not causal."""
    vision = {"image_size": 64, "timm_model_name": "fastvit_mci_test", "timm_pool": "avg", "timm_proj": None}
    mobile = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    return write(directory, "CustomTextCLIP", vision, {**TEXT, "no_causal_mask": True}, mobile)


def mobileclip_s3(directory: Path) -> Path:
    """MobileCLIP 2 S3: five stages, norms of layers instead of batch norms before attention."""
    return _mobileclip_2(directory, "fastvit_mci3_test")


def mobileclip_s4(directory: Path) -> Path:
    return _mobileclip_2(directory, "fastvit_mci4_test")


def _mobileclip_2(directory: Path, name: str) -> Path:
    vision = {"image_size": 128, "timm_model_name": name, "timm_pool": "avg", "timm_proj": None}
    vision |= {"timm_drop": 0.0, "timm_drop_path": 0.0}
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bilinear"}
    return write(directory, "CustomTextCLIP", vision, {**TEXT, "no_causal_mask": True}, preprocess)


def pe_core(directory: Path) -> Path:
    """Rotary positions in two dimensions, attention pooling, 32 tokens of context; pictures are squashed."""
    vision = {"image_size": 32, "timm_model_name": "vit_pe_core_test", "timm_pool": "map", "timm_proj": None}
    squash = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    return write(directory, "CustomTextCLIP", vision, {**TEXT, "context_length": 32}, squash, plain=True)


def eva02(directory: Path) -> Path:
    """Rotary positions in two dimensions, a norm behind attention, SwiGLU."""
    vision = {"image_size": 32, "timm_model_name": "eva02_clip_test", "timm_pool": "token", "timm_proj": None}
    return write(directory, "CustomTextCLIP", vision, TEXT, {"mean": MEAN, "std": STD}, plain=True)


def vitamin(directory: Path) -> Path:
    """Two stages of convolutions before a transformer, GeGLU."""
    vision = {"image_size": 64, "timm_model_name": "vitamin_test", "timm_pool": "", "timm_proj": "linear"}
    vision |= {"timm_drop": 0.0, "timm_drop_path": 0.1}
    return write(directory, "CustomTextCLIP", vision, TEXT, {"mean": MEAN, "std": STD})


def write(
    directory: Path, kind: str, vision: dict[str, Any], text: dict[str, Any], preprocess: dict[str, Any], *,
    plain: bool = False,
) -> Path:  # fmt: skip
    """``plain``: the trunk has neither batch norms nor layer scales."""
    import open_clip.model

    register()
    torch.manual_seed(0)
    config = {"embed_dim": 64, "vision_cfg": {**vision, "timm_model_pretrained": False}, "text_cfg": text}
    clip = getattr(open_clip.model, kind)(**config)
    for part in (clip.token_embedding, clip.transformer, clip.ln_final) if kind == "CLIP" else (clip.text,):
        spread(part)
    side = vision["image_size"]
    (drawn if plain else partial(trained, side=side))(clip.visual)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    whole = {"interpolation": "bicubic", "resize_mode": "shortest", "size": [side, side], **preprocess}
    config = {**config, "custom_text": kind == "CustomTextCLIP"}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": whole}))
    return directory


def trained(module: torch.nn.Module, side: int = 64) -> None:
    """Statistics and scales as training leaves them: what is 0 or 1 at the start hides what a fold gets wrong.

    Batch norms get the statistics of what they read in photographs, so that signals keep their size at any depth.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.uniform_(0.1, 0.5)
            elif parameter.ndim < 2:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        for norm in norms:
            norm.momentum = None  # of the batches it sees, the plain mean
            norm.reset_running_stats()
        module.train()
        module(photographs(side))
        module.eval()


def photographs(side: int) -> torch.Tensor:
    """float32 [21, 3, side, side], squashed: those that ship for calibration, and none that certifies an export."""
    paths = [path for path in samples.calibration_pictures() if not path.stem.startswith("leaves")]
    pictures = [Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for path in paths]
    stacked = np.stack([np.asarray(picture, np.float32) for picture in pictures]).transpose(0, 3, 1, 2)
    return (torch.from_numpy(stacked) / 255 - 0.48) / 0.27


def drawn(module: torch.nn.Module) -> None:
    """Matrices that keep the size of what they read; norms and biases that are not 1 and 0."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                inputs = parameter[0].numel() if name.endswith("weight") else 4
                parameter.normal_(std=1.5 * inputs**-0.5)


def convnext_tiny_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    from timm.models.convnext import convnext_tiny

    return convnext_tiny(pretrained, **{"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 48), **more})


def fastvit_mci_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    from timm.models.fastvit import fastvit_mci0

    return fastvit_mci0(pretrained, **{"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), **more})


def fastvit_mci_2_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    return fastvit_mci_test(pretrained, **{"layers": (1, 1, 2, 1), **more})


_WIDTHS = (32, 64, 64, 64, 64)  # a stem of 16 random channels leaves a sum of few products, which 8 bits blur


def fastvit_mci3_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    from timm.models.fastvit import fastvit_mci3

    return fastvit_mci3(pretrained, **{"layers": (1, 1, 1, 1, 1), "embed_dims": _WIDTHS, **more})


def fastvit_mci4_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    from timm.models.fastvit import fastvit_mci4

    return fastvit_mci4(pretrained, **{"layers": (1, 1, 1, 1, 2), "embed_dims": _WIDTHS, **more})


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def vit_pe_core_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    from timm.models.eva import vit_pe_core_base_patch16_224

    return vit_pe_core_base_patch16_224(pretrained, **{**_VIT, "ref_feat_shape": (4, 4), **more})


def eva02_clip_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    """Rotary positions of a grid that is not the picture's, as in the published models."""
    from timm.models.eva import eva02_base_patch16_clip_224

    return eva02_base_patch16_clip_224(pretrained, **{**_VIT, "ref_feat_shape": (5, 5), **more})


def vitamin_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    vitamin: Any = import_module("timm.models.vitamin")
    stages = vitamin.VitCfg(
        embed_dim=(16, 32, 64),
        depths=(1, 1, 1),
        stem_width=16,
        conv_cfg=vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    )
    small = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_layer": vitamin.GeGluMlp,
             "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}  # fmt: skip
    return vitamin._create_vitamin("vitamin_small_224", pretrained, embed_cfg=stages, **{**small, **more})


_MODELS = (
    convnext_tiny_test, fastvit_mci_test, fastvit_mci_2_test, fastvit_mci3_test, fastvit_mci4_test, vit_pe_core_test,
    eva02_clip_test, vitamin_test,
)  # fmt: skip


def register() -> None:
    """Make timm know the tiny models."""
    import timm

    for model in _MODELS:
        if not timm.is_model(model.__name__):
            timm.models.register_model(model)
