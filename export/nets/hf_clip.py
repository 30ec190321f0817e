"""Hugging Face CLIP directories: config.json (model_type "clip"), weights, the processor's config, tokenizer.

Source: Radford et al. 2021 (arXiv 2103.00020); modules are transformers' own `CLIPModel`.
Graphs: image pixels [B, 3, S, S] -> image_embeds [B, D]; text ids [B, T] -> text_embeds [B, D]; unit rows.
The text tower is causal and pools at the end-of-text token, so padding behind it changes nothing and no mask
is needed; T is as long as the longest text of a batch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor as TorchTensor
from torch.nn.functional import normalize

from export.nets import NETS, Net, NetPlugin, Tower
from export.nets._files import read_json, require_package, weights_sha256
from models.bundle.manifest import ImagePreprocess, Plugin, Source, Tensor, TextPreprocess
from models.errors import UnknownCheckpoint
from models.ops.spec import SOFTMAX

_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_STEPS = {  # of CLIP's preprocessing, as its config says them; a bundle's cannot leave one out
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True
}  # fmt: skip


class ImageTower(torch.nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, pixels: TorchTensor) -> TorchTensor:
        return normalize(self.projection(self.vision(pixel_values=pixels).pooler_output), dim=-1)


class TextTower(torch.nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.text, self.projection = clip.text_model, clip.text_projection

    def forward(self, ids: TorchTensor) -> TorchTensor:
        return normalize(self.projection(self.text(input_ids=ids).pooler_output), dim=-1)


def recognise(checkpoint: str) -> bool:
    try:
        return read_json(Path(checkpoint) / "config.json").get("model_type") == "clip"
    except UnknownCheckpoint:
        return False


def load(checkpoint: str) -> Net:
    """Raises `UnknownCheckpoint` naming the file or the setting that is missing or not supported."""
    transformers = require_package("transformers", "the net hf_clip")
    directory = Path(checkpoint)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    clip, info = transformers.CLIPModel.from_pretrained(
        directory, local_files_only=True, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    if absent := sorted(info["missing_keys"]):
        raise UnknownCheckpoint(f"{directory}: the weights lack {len(absent)} tensors, {absent[0]!r} among them")
    clip.eval()
    context, dim = clip.config.text_config.max_position_embeddings, clip.config.projection_dim
    side = clip.config.vision_config.image_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return Net(
        name="hf_clip",
        source=Source(
            net="hf_clip", model=directory.name, weights=weights_sha256(directory), license=_license(directory)
        ),
        tasks=("classify", "embed", "raw"),
        towers={
            "image": Tower(
                ImageTower(clip),
                {"pixels": Tensor(dtype="float32", shape=("B", 3, side, side))},
                {"image_embeds": Tensor(dtype="float32", shape=("B", dim))},
                image_preprocess(_processor(directory), side),
                quantizer="search",
                promises={SOFTMAX.name: clip.config.vision_config.num_hidden_layers},
            ),
            "text": Tower(
                TextTower(clip),
                {"ids": Tensor(dtype="int64", shape=("B", "T"))},
                {"text_embeds": Tensor(dtype="float32", shape=("B", dim))},
                TextPreprocess(context=context, pad="longest", pad_id=0),
                quantizer="search",
                promises={SOFTMAX.name: clip.config.text_config.num_hidden_layers},
            ),
        },
        files={"tokenizer.json": tokenizer.backend_tokenizer.to_str().encode()},
        prompts=Plugin(name="single", params={"template": "a photo of a {}."}),
        head=Plugin(name="cosine", params={"scale": float(clip.logit_scale.detach().exp())}),
    )


def image_preprocess(config: dict[str, Any], side: int) -> ImagePreprocess:
    """The config of `CLIPImageProcessor` -> ours. A size may be a number or {"shortest_edge": n}; null is the default.

    Raises `UnknownCheckpoint` naming the setting that is absent or not CLIP's.
    """
    config = {name: value for name, value in config.items() if value is not None}
    for name, usual in _STEPS.items():
        if (value := config.get(name, usual)) != usual:
            raise UnknownCheckpoint(f"the image processor has {name} = {value}; only CLIP's own {usual} is supported")
    if absent := {"image_mean", "image_std"} - config.keys():
        raise UnknownCheckpoint(f"the image processor's config lacks {' and '.join(sorted(absent))}")
    size, crop = config.get("size", side), config.get("crop_size", side)
    shortest = size["shortest_edge"] if isinstance(size, dict) and "shortest_edge" in size else size
    crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    if not isinstance(shortest, int) or config.get("resample", 3) not in _RESAMPLE:
        raise UnknownCheckpoint(
            f"the image processor's size {size} with resample {config.get('resample')} is not CLIP's"
        )
    return ImagePreprocess(
        size=crop,
        resize="shortest",
        shortest=shortest,
        crop_offset="floor",
        resample=_RESAMPLE[config.get("resample", 3)],  # type: ignore[arg-type]
        mean=config["image_mean"],
        std=config["image_std"],
    )


def _processor(directory: Path) -> dict[str, Any]:
    """The image processor's config: a file of its own or, as transformers 5 saves it, a part of the processor's."""
    own, whole = directory / "preprocessor_config.json", directory / "processor_config.json"
    part = read_json(whole).get("image_processor") if whole.is_file() and not own.is_file() else None
    return part if isinstance(part, dict) else read_json(own)


def _license(directory: Path) -> str:
    card = directory / "README.md"
    for line in card.read_text(encoding="utf-8").splitlines()[:40] if card.is_file() else ():
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return "not stated in the checkpoint"


NETS.register("hf_clip")(NetPlugin(recognise, load))
