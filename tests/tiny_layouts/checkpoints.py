"""A writer of a tiny checkpoint for each layout; `MORE`: other kinds of some of them, and their layouts."""

from collections.abc import Callable
from pathlib import Path

from tests import tiny
from tests.tiny_layouts import bert, llm2clip, mobileclip, openai_like, siglip, trunks

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "altclip": bert.altclip,
    "altclip_resaved": bert.altclip_resaved,
    "chinese_clip": bert.chinese_clip,
    "hf_chinese_clip": bert.hf_chinese_clip,
    "open_clip_bert": bert.open_clip_bert,
    "hf_clip": tiny.hf_clip,
    "hf_siglip": siglip.hf_siglip,
    "mobileclip": mobileclip.mobileclip,
    "mobileclip_b": mobileclip.mobileclip_b,
    "open_clip": tiny.open_clip,
    "open_clip_custom_text": tiny.open_clip_custom_text,
    "open_clip_siglip": siglip.open_clip_siglip,
    "open_clip_timm": trunks.open_clip_timm,
    "open_clip_timm_custom_text": trunks.open_clip_timm_custom_text,
    "openai": tiny.openai,
    "openai_resnet": openai_like.openai_resnet,
    "open_clip_resnet": openai_like.open_clip_resnet,
    "long_clip": openai_like.long_clip,
    "clip_moe": openai_like.clip_moe,
    "clip_svd": openai_like.clip_svd,
    "cloob": openai_like.cloob,
    "cloob_flat": openai_like.cloob_flat,
    "cloob_vit": openai_like.cloob_vit,
    "cloob_vit_flat": openai_like.cloob_vit_flat,
    "slip": openai_like.slip,
    "grain": openai_like.grain,
    "llm2clip": llm2clip.llm2clip,
    "llm2clip_eva": llm2clip.llm2clip_eva,
    "llm2clip_eva_inside": llm2clip.llm2clip_eva_inside,
    "llm2clip_inside": llm2clip.llm2clip_inside,
    "llm2clip_siglip": llm2clip.llm2clip_siglip,
    "llm2clip_timm": llm2clip.llm2clip_timm,
}
MORE: dict[str, Callable[[Path], Path]] = {
    "eva02": trunks.eva02,
    "hf_siglip2": siglip.hf_siglip2,
    "hf_tinyclip": tiny.hf_tinyclip,
    "mobileclip_plain": mobileclip.mobileclip_plain,
    "mobileclip_s3": trunks.mobileclip_s3,
    "mobileclip_s4": trunks.mobileclip_s4,
    "pe_core": trunks.pe_core,
    "proclip": llm2clip.proclip,
    "tinyclip": tiny.tinyclip,
    "vitamin": trunks.vitamin,
}
LAYOUT = {
    "hf_siglip2": "hf_siglip",
    "hf_tinyclip": "hf_clip",
    "mobileclip_plain": "mobileclip",
    "proclip": "llm2clip",
    "tinyclip": "open_clip",
    **dict.fromkeys(("eva02", "mobileclip_s3", "mobileclip_s4", "pe_core", "vitamin"), "open_clip_timm_custom_text"),
}
