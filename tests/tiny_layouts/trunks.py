"""open_clip checkpoints whose image tower timm builds: a ConvNeXt, and MobileCLIP's FastViT with its branches."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny import spread

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


def write(directory: Path, kind: str, vision: dict[str, Any], text: dict[str, Any], preprocess: dict[str, Any]) -> Path:
    import open_clip.model

    register()
    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": {**vision, "timm_model_pretrained": False}, "text_cfg": text}
    clip = getattr(open_clip.model, kind)(**config)
    for part in (clip.token_embedding, clip.transformer, clip.ln_final) if kind == "CLIP" else (clip.text,):
        spread(part)
    trained(clip.visual)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    whole = {"interpolation": "bicubic", "resize_mode": "shortest", "size": [64, 64], **preprocess}
    config = {**config, "custom_text": kind == "CustomTextCLIP"}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": whole}))
    return directory


def trained(module: torch.nn.Module) -> None:
    """Statistics and scales as training leaves them: what is 0 or 1 at the start hides what a fold gets wrong.

    Batch norms get the statistics of what they read, so that signals keep their size whatever the depth.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.uniform_(0.05, 0.5)
            elif parameter.ndim < 2:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2))
        for norm in norms:
            norm.momentum = None  # of the batches it sees, the plain mean
            norm.reset_running_stats()
        module.train()
        module(torch.rand(4, 3, 64, 64))
        module.eval()


def convnext_tiny_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    from timm.models.convnext import convnext_tiny

    return convnext_tiny(pretrained, **{"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 48), **more})


def fastvit_mci_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    from timm.models.fastvit import fastvit_mci0

    return fastvit_mci0(pretrained, **{"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), **more})


def fastvit_mci_2_test(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    return fastvit_mci_test(pretrained, **{"layers": (1, 1, 2, 1), **more})


def register() -> None:
    """Make timm know the tiny models."""
    import timm

    for model in (convnext_tiny_test, fastvit_mci_test, fastvit_mci_2_test):
        if not timm.is_model(model.__name__):
            timm.models.register_model(model)
