"""What pixels and ids come to by the code that defines each layout: its library's own model with the tiny checkpoint's
weights, or, where there is no library, the definition in these tests."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from timm.models import fastvit, vision_transformer_hybrid
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.checkpoints import read
from tests import tiny
from tests.tiny_layouts import bert, llm2clip, openai_like
from tests.tiny_layouts.mobileclip import DIM, OriginalText, small_fastvit

Feeds = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """``image``: pixels [B, 3, H, W] -> rows; ``text``: what the text graph reads, ids [B, T] and a mask, or vectors
    [B, d] -> rows."""

    image: Callable[[Tensor], Tensor]
    text: Callable[[Feeds], Tensor]


def _hugging_face(kind: Any, checkpoint: Path) -> Reference:
    model = kind.from_pretrained(checkpoint).eval()

    def text(feeds: Feeds) -> Any:
        mask = {"attention_mask": feeds["mask"]} if "mask" in feeds else {}
        return model.get_text_features(input_ids=feeds["ids"], **mask).pooler_output

    return Reference(lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output, text)


def _altclip(checkpoint: Path) -> Reference:
    """The same weights in the names that transformers has now."""
    return _hugging_face(transformers.AltCLIPModel, bert.altclip_resaved(checkpoint.parent / "altclip-again"))


def _of(module: Any, context: int | None = 77) -> Reference:
    """Of a module as open_clip has it, which reads ``context`` tokens (None: as many as there are)."""

    def text(feeds: Feeds) -> Any:
        ids = feeds["ids"]
        return module.encode_text(F.pad(ids, (0, context - ids.shape[1])) if context else ids)

    image = module.encode_image if hasattr(module, "encode_image") else module.visual
    return Reference(image, text)


def _open_clip(checkpoint: Path) -> Reference:
    """By open_clip's own factory, from the directory."""
    module = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")[0].eval()
    return _of(module, module.context_length)


def _open_clip_bert(checkpoint: Path) -> Reference:
    scratch = checkpoint.parent / "text-config-again"
    return _of(bert.open_clip_bert_module(scratch, "xlm-roberta", "mean_pooler", "mlp")[0], None)


def _mobileclip(name: str, checkpoint: Path) -> Reference:
    """The image tower as timm reads the authors' names, branches and norms unfolded; their text tower."""
    state = dict(read(checkpoint).tensors)
    image: Any
    convert: Callable[..., Any]
    if name == "b":
        image = timm.create_model("vit_base_mci_224", depth=1, img_size=64, num_classes=DIM, global_pool="token")
        convert = vision_transformer_hybrid.checkpoint_filter_fn
    else:
        image, convert = small_fastvit(), fastvit.checkpoint_filter_fn
    image.load_state_dict(convert(state, image))
    text = OriginalText(["mix", "attend", "attend", "mix"] if name == "mixed" else ["attend", "attend"]).eval()
    start = "text_encoder."
    text.load_state_dict({key.removeprefix(start): t for key, t in state.items() if key.startswith(start)})
    mask = torch.full((77, 77), -math.inf).triu(1) if name == "b" else None
    return Reference(image.eval(), lambda feeds: text(F.pad(feeds["ids"], (0, 77 - feeds["ids"].shape[1])), mask))


def _long_clip(checkpoint: Path) -> Reference:
    state, context = openai_like.long_clip_state(), openai_like.CONTEXT
    module: Any = openai_like.openai(context=context)
    table = torch.cat([state["positional_embedding"][:20], state["positional_embedding_res"][20:]])
    module.positional_embedding = nn.Parameter(table)
    return _of(module, context)


def moe_block(state: dict[str, Tensor], prefix: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """y = x + sum_k p_k expert_k(ln_2(x)), p = softmax(gate), the two best renormalised. Float64, token by token."""
    weights = {name.removeprefix(prefix): tensor.double() for name, tensor in state.items() if name.startswith(prefix)}
    width = x.shape[-1]
    normed = F.layer_norm(x, (width,), weights["ln_1.weight"], weights["ln_1.bias"])
    qkv = F.linear(normed, weights["attn.in_proj_weight"], weights["attn.in_proj_bias"]).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, 64)).transpose(1, 2) for part in qkv)  # type: ignore[no-untyped-call]
    logits = q @ k.mT / 8 + (0 if mask is None else mask)
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    x = x + F.linear(mixed, weights["attn.out_proj.weight"], weights["attn.out_proj.bias"])
    normed = F.layer_norm(x, (width,), weights["ln_2.weight"], weights["ln_2.bias"])

    def mlp(token: Tensor, name: str) -> Tensor:
        up = F.linear(token, weights[f"{name}.c_fc.weight"], weights[f"{name}.c_fc.bias"])
        return F.linear(
            up * torch.sigmoid(1.702 * up), weights[f"{name}.c_proj.weight"], weights[f"{name}.c_proj.bias"]
        )

    if "gate.weight" not in weights:
        return x + mlp(normed, "mlp")
    y = x.clone()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            p = F.linear(normed[b, t], weights["gate.weight"]).softmax(-1)
            best = p.argsort(descending=True)[:2]
            for e in best:
                y[b, t] += p[e] / p[best].sum() * mlp(normed[b, t], f"experts.{e}")
    return y


def moe_reference(state: dict[str, Tensor], images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    wide = {name: tensor.double() for name, tensor in state.items()}
    x = F.conv2d(images.double(), wide["visual.conv1.weight"], stride=8).flatten(2).mT
    x = (
        torch.cat([wide["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
        + wide["visual.positional_embedding"]
    )
    x = F.layer_norm(x, x.shape[-1:], wide["visual.ln_pre.weight"], wide["visual.ln_pre.bias"])
    for i in range(2):
        x = moe_block(state, f"visual.transformer.resblocks.{i}.", x, 2, None)
    x = F.layer_norm(x[:, 0], x.shape[-1:], wide["visual.ln_post.weight"], wide["visual.ln_post.bias"])
    first = F.normalize(x @ wide["visual.proj"], dim=-1)
    table = torch.cat([wide["positional_embedding"][:20], wide["positional_embedding_res"][20:]])
    x = wide["token_embedding.weight"][ids] + table
    mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
    for i in range(2):
        x = moe_block(state, f"transformer.resblocks.{i}.", x, 1, mask)
    x = F.layer_norm(x, x.shape[-1:], wide["ln_final.weight"], wide["ln_final.bias"])
    x = x[torch.arange(len(x)), ids.argmax(-1)] @ wide["text_projection"]
    return first, F.normalize(x, dim=-1)


def _clip_moe(checkpoint: Path) -> Reference:
    """In float64."""
    state, context = openai_like.clip_moe_state(), openai_like.CONTEXT
    some = {"images": torch.zeros(1, 3, 32, 32), "ids": torch.zeros(1, context, dtype=torch.int64)}
    both = partial(moe_reference, state)
    return Reference(
        lambda pixels: both(pixels, some["ids"])[0],
        lambda feeds: both(some["images"], F.pad(feeds["ids"], (0, context - feeds["ids"].shape[1])))[1],
    )


def _grain(checkpoint: Path) -> Reference:
    backbone, decoder = openai_like.Slip(qk_norm=True), openai_like.Decoder()
    return Reference(lambda pixels: decoder(backbone.visual.forward_features(pixels)), _of(backbone).text)


def _llm2clip(image: Callable[[Path], Callable[[Tensor], Tensor]], checkpoint: Path) -> Reference:
    """The adaptor by its formula, in float64; the bundle's vectors are unit vectors already."""
    state = dict(read(checkpoint).tensors)
    start = next(name for name in state if name.endswith("text_adaptor.0.ln.bias")).removesuffix("0.ln.bias")
    text = partial(llm2clip.adaptor, state, start=start, normalize=False)
    return Reference(image(checkpoint), lambda feeds: text(feeds["vectors"]))


_OPEN_CLIP = ("eva02", "mobileclip_s3", "mobileclip_s4", "pe_core", "tinyclip", "vitamin")
REFERENCES: dict[str, Callable[[Path], Reference]] = {
    **dict.fromkeys(_OPEN_CLIP, _open_clip),
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
    "hf_siglip2": partial(_hugging_face, transformers.SiglipModel),
    "hf_tinyclip": partial(_hugging_face, transformers.CLIPModel),
    **dict.fromkeys(
        ("llm2clip", "llm2clip_inside", "proclip"),
        partial(_llm2clip, lambda checkpoint: llm2clip.image_module().visual),
    ),
    **dict.fromkeys(
        ("llm2clip_eva", "llm2clip_eva_inside"), partial(_llm2clip, lambda checkpoint: llm2clip.eva_module())
    ),
    "llm2clip_siglip": partial(_llm2clip, llm2clip.open_clip_image),
    "llm2clip_timm": partial(_llm2clip, llm2clip.open_clip_image),
    "long_clip": _long_clip,
    "mobileclip": partial(_mobileclip, "mixed"),
    "mobileclip_b": partial(_mobileclip, "b"),
    "mobileclip_plain": partial(_mobileclip, "plain"),
    "open_clip": _open_clip,
    "open_clip_bert": _open_clip_bert,
    "open_clip_custom_text": _open_clip,
    "open_clip_resnet": _open_clip,
    "open_clip_siglip": _open_clip,
    "open_clip_timm": _open_clip,
    "open_clip_timm_custom_text": _open_clip,
    "openai": lambda checkpoint: _of(tiny.openai_module()),
    "openai_resnet": lambda checkpoint: _of(openai_like.resnet_module()),
    "slip": lambda checkpoint: _of(openai_like.Slip(qk_norm=True)),
}
