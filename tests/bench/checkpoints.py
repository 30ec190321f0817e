"""Checkpoints of full size with random weights, written by the libraries that define their layouts.

The tokenizer is CLIP's if open_clip ships it, else a small one: a tower sees ids alone.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.tiny_layouts import siglip, trunks


def hugging_face_clip(directory: Path, width: int = 512, **vision: int) -> None:
    """Hugging Face CLIP, by default ViT-B/32. ``width``: of its vectors. ``vision``: changes of the image tower."""
    import transformers

    from calmclip.export.layouts.common import clip_bpe

    config = transformers.CLIPConfig(vision_config=vision | {"projection_dim": width}, projection_dim=width)
    transformers.CLIPModel(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(clip_bpe.tokenizer_json())
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end_of_text>", "pad_token": "<end_of_text>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    transformers.CLIPImageProcessor().save_pretrained(directory)


def mobileclip_s2(directory: Path) -> None:
    """open_clip's MobileCLIP-S2, with timm's image tower; batch norms and scales as if trained (`trunks.trained`)."""
    _open_clip(directory, "MobileCLIP-S2", trunks.trained, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")


def siglip_b_16(directory: Path) -> None:
    """Hugging Face SigLIP-B/16, 224 pixels, 64 tokens: transformers' defaults."""
    import transformers

    transformers.SiglipModel(transformers.SiglipConfig()).save_pretrained(directory)
    transformers.SiglipImageProcessor().save_pretrained(directory)
    shutil.copy(siglip.DATA / "spiece.model", directory)


def owlvit_b_32(directory: Path) -> None:
    """Hugging Face OWL-ViT-B/32, 768 pixels: transformers' defaults except the heads."""
    import transformers

    detector = transformers.OwlViTForObjectDetection(transformers.OwlViTConfig())
    tiny.owl_heads(detector)
    detector.save_pretrained(directory)
    tiny.save_tokenizer(directory)
    transformers.OwlViTImageProcessor().save_pretrained(directory)


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "ViT-B-32": hugging_face_clip,
    "ViT-B-16": lambda directory: _open_clip(directory, "ViT-B-16"),
    "SigLIP-B-16": siglip_b_16,
    "MobileCLIP-S2": mobileclip_s2,
    "OWL-ViT-B-32": owlvit_b_32,
    "ViT-L-14-336": lambda directory: _open_clip(directory, "ViT-L-14-336"),
}


def write(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    directory.mkdir(parents=True)
    CHECKPOINTS[name](directory)
    return directory


def _open_clip(
    directory: Path, name: str, change: Callable[[torch.nn.Module], None] | None = None, **preprocess: Any
) -> None:
    """``change`` is applied to the image tower before it is saved."""
    import open_clip
    from safetensors.torch import save_model

    clip = open_clip.create_model(name, pretrained=None)
    if change:
        change(clip.visual)
    save_model(clip, str(directory / "open_clip_model.safetensors"))
    preprocess = {
        "mean": tiny.MEAN, "std": tiny.STD, "interpolation": "bicubic", "resize_mode": "shortest", **preprocess
    }  # fmt: skip
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    import sys

    write(sys.argv[1], Path(sys.argv[2]))
