"""open_clip directories: open_clip_config.json beside open_clip_model.safetensors (or a .bin).

Source: Ilharco et al., OpenCLIP (doi 10.5281/zenodo.5143773); modules are open_clip's own.
Graphs: image pixels [B, 3, S, S] -> image_embeds [B, D]; text ids [B, 77] -> text_embeds [B, D]; unit rows.
A model with `logit_bias` (SigLIP's loss) gets the sigmoid head.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor as TorchTensor

from export.nets import NETS, Net, NetPlugin, Tower
from export.nets._clip_bpe import tokenizer_json
from export.nets._files import read_json, require_package, weights_sha256
from models.bundle.manifest import ImagePreprocess, Plugin, Source, Tensor, TextPreprocess
from models.errors import UnknownCheckpoint
from models.ops.spec import SOFTMAX

CONFIG = "open_clip_config.json"
_RESIZE = {"shortest": "shortest", "squash": "exact"}


class ImageTower(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: TorchTensor) -> TorchTensor:
        return self.model.encode_image(pixels, normalize=True)


class TextTower(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: TorchTensor) -> TorchTensor:
        return self.model.encode_text(ids, normalize=True)


def recognise(checkpoint: str) -> bool:
    return (Path(checkpoint) / CONFIG).is_file()


def load(checkpoint: str) -> Net:
    """Raises `UnknownCheckpoint` naming what is missing or not supported yet."""
    open_clip = require_package("open_clip", "the net open_clip")
    directory = Path(checkpoint)
    config = read_json(directory / CONFIG)
    match config.get("model_cfg"):
        case {"embed_dim": int(dim), "text_cfg": dict(text)}:
            pass
        case _:
            raise UnknownCheckpoint(f"{directory / CONFIG} has no model_cfg with embed_dim and text_cfg")
    if "hf_tokenizer_name" in text or "hf_model_name" in text:
        raise UnknownCheckpoint(
            f"{directory}: text towers from Hugging Face ({text}) are not read yet; only open_clip's own"
        )
    model = open_clip.create_model(f"local-dir:{directory}", precision="fp32", device="cpu").eval()
    context = text.get("context_length", 77)
    preprocess = image_preprocess(config.get("preprocess_cfg", {}), model.visual.image_size)
    bias = getattr(model, "logit_bias", None)
    scale = float(model.logit_scale.detach().exp())
    return Net(
        name="open_clip",
        source=Source(
            net="open_clip",
            model=directory.name,
            weights=weights_sha256(directory),
            license="not stated in the checkpoint",
        ),
        tasks=("classify", "embed", "raw"),
        towers={
            "image": Tower(
                ImageTower(model),
                {"pixels": Tensor(dtype="float32", shape=("B", 3, *preprocess.size))},
                {"image_embeds": Tensor(dtype="float32", shape=("B", dim))},
                preprocess,
                quantizer="search",
                promises=_attention(config["model_cfg"].get("vision_cfg", {})),
            ),
            "text": Tower(
                TextTower(model),
                {"ids": Tensor(dtype="int64", shape=("B", context))},
                {"text_embeds": Tensor(dtype="float32", shape=("B", dim))},
                TextPreprocess(context=context, pad="context", pad_id=0),
                quantizer="search",
                promises=_attention(text),
            ),
        },
        files={"tokenizer.json": tokenizer_json()},
        prompts=Plugin(name="single", params={"template": "a photo of a {}."}),
        head=Plugin(name="cosine", params={"scale": scale})
        if bias is None
        else Plugin(name="sigmoid", params={"scale": scale, "bias": float(bias.detach())}),
    )


def _attention(config: dict[str, Any]) -> dict[str, int]:
    """One Softmax a layer; a ResNet's stages are a list, and only its pooling attends. What timm builds, timm knows."""
    if config.get("timm_model_name"):
        return {}
    layers = config.get("layers", 12)  # open_clip's default
    return {SOFTMAX.name: layers if isinstance(layers, int) else 1}


def image_preprocess(config: dict[str, Any], size: Any) -> ImagePreprocess:
    """`preprocess_cfg` -> ours. Defaults are open_clip's."""
    size = config.get("size", size)
    rows, cols = (size, size) if isinstance(size, int) else size[-2:]
    mode = config.get("resize_mode", "shortest")
    if mode not in _RESIZE:
        raise UnknownCheckpoint(f"{CONFIG}: resize_mode {mode!r} is not supported; expected {' or '.join(_RESIZE)}")
    return ImagePreprocess(
        size=(rows, cols),
        resize=_RESIZE[mode],  # type: ignore[arg-type]
        shortest=max(rows, cols) if mode == "shortest" else None,
        crop_offset="round",
        resample=config.get("interpolation", "bicubic"),
        mean=config.get("mean", (0.48145466, 0.4578275, 0.40821073)),
        std=config.get("std", (0.26862954, 0.26130258, 0.27577711)),
    )


NETS.register("open_clip")(NetPlugin(recognise, load))
