"""What pixels and ids come to by the code that defines each layout: its library's own model with the tiny checkpoint's
weights, or, where there is no library, the definition in these tests."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.checkpoints import read
from tests import tiny
from tests.export.layouts import test_mobileclip, test_openai_names
from tests.tiny_layouts import bert, openai_like

Feeds = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """``image``: pixels [B, 3, H, W] -> rows; ``text``: what the text graph reads, ids [B, T] and a mask -> rows."""

    image: Callable[[Tensor], Tensor]
    text: Callable[[Feeds], Tensor]


def _hugging_face(kind: type[transformers.PreTrainedModel], checkpoint: Path) -> Reference:
    model = kind.from_pretrained(checkpoint).eval()

    def text(feeds: Feeds) -> Tensor:
        mask = {"attention_mask": feeds["mask"]} if "mask" in feeds else {}
        return model.get_text_features(input_ids=feeds["ids"], **mask).pooler_output

    return Reference(lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output, text)


def _altclip(checkpoint: Path) -> Reference:
    """The same weights in the names that transformers has now."""
    return _hugging_face(transformers.AltCLIPModel, bert.altclip_resaved(checkpoint.parent / "altclip-again"))


def _of(module: nn.Module, context: int | None = 77) -> Reference:
    """Of a module as open_clip has it, which reads ``context`` tokens (None: as many as there are)."""

    def text(feeds: Feeds) -> Tensor:
        ids = feeds["ids"]
        return module.encode_text(F.pad(ids, (0, context - ids.shape[1])) if context else ids)

    image = module.encode_image if hasattr(module, "encode_image") else module.visual
    return Reference(image, text)


def _open_clip(kind: type[nn.Module], checkpoint: Path) -> Reference:
    config = json.loads((checkpoint / "open_clip_config.json").read_text())["model_cfg"]
    module = kind(**{key: value for key, value in config.items() if key != "custom_text"})
    module.load_state_dict(load_file(checkpoint / "open_clip_model.safetensors"))
    return _of(module.eval(), config["text_cfg"]["context_length"])


def _open_clip_bert(checkpoint: Path) -> Reference:
    scratch = checkpoint.parent / "text-config-again"
    return _of(bert.open_clip_bert_module(scratch, "xlm-roberta", "mean_pooler", "mlp")[0], None)


def _mobileclip(name: str, checkpoint: Path) -> Reference:
    state = dict(read(checkpoint).tensors)
    text = test_mobileclip.text_reference(name, state)
    return Reference(
        test_mobileclip.image_reference(name, state),
        lambda feeds: text(F.pad(feeds["ids"], (0, 77 - feeds["ids"].shape[1]))),
    )


def _long_clip(checkpoint: Path) -> Reference:
    state, context = openai_like.long_clip_state(), openai_like.CONTEXT
    module = openai_like.openai(context=context)
    table = torch.cat([state["positional_embedding"][:20], state["positional_embedding_res"][20:]])
    module.positional_embedding = nn.Parameter(table)
    return _of(module, context)


def _clip_moe(checkpoint: Path) -> Reference:
    """In float64."""
    state, context = openai_like.clip_moe_state(), openai_like.CONTEXT
    some = {"images": torch.zeros(1, 3, 32, 32), "ids": torch.zeros(1, context, dtype=torch.int64)}
    both = partial(test_openai_names.moe_reference, state)
    return Reference(
        lambda pixels: both(pixels, some["ids"])[0],
        lambda feeds: both(some["images"], F.pad(feeds["ids"], (0, context - feeds["ids"].shape[1])))[1],
    )


def _grain(checkpoint: Path) -> Reference:
    backbone, decoder = openai_like.Slip(qk_norm=True), openai_like.Decoder()
    return Reference(lambda pixels: decoder(backbone.visual.forward_features(pixels)), _of(backbone).text)


REFERENCES: dict[str, Callable[[Path], Reference]] = {
    "altclip": _altclip,
    "altclip_resaved": partial(_hugging_face, transformers.AltCLIPModel),
    "chinese_clip": lambda checkpoint: _of(bert.chinese_clip_module(), None),
    "clip_moe": _clip_moe,
    "clip_svd": lambda checkpoint: _of(openai_like.openai()),
    "cloob": lambda checkpoint: _of(openai_like.resnet_module()),
    "cloob_flat": lambda checkpoint: _of(openai_like.resnet_module()),
    "cloob_vit": lambda checkpoint: _of(openai_like.openai()),
    "cloob_vit_flat": lambda checkpoint: _of(openai_like.openai()),
    "grain": _grain,
    "hf_chinese_clip": partial(_hugging_face, transformers.ChineseCLIPModel),
    "hf_clip": partial(_hugging_face, transformers.CLIPModel),
    "hf_siglip": partial(_hugging_face, transformers.SiglipModel),
    "long_clip": _long_clip,
    "mobileclip": partial(_mobileclip, "mixed"),
    "mobileclip_b": partial(_mobileclip, "b"),
    "open_clip": partial(_open_clip, CLIP),
    "open_clip_bert": _open_clip_bert,
    "open_clip_custom_text": partial(_open_clip, CustomTextCLIP),
    "open_clip_resnet": partial(_open_clip, CLIP),
    "open_clip_siglip": partial(_open_clip, CustomTextCLIP),
    "open_clip_timm": partial(_open_clip, CLIP),
    "open_clip_timm_custom_text": partial(_open_clip, CustomTextCLIP),
    "openai": lambda checkpoint: _of(tiny.openai_module()),
    "openai_resnet": lambda checkpoint: _of(openai_like.resnet_module()),
    "slip": lambda checkpoint: _of(openai_like.Slip(qk_norm=True)),
}
