"""SigLIP checkpoints of two layers: Hugging Face's, 64 wide, by transformers; open_clip's by timm and open_clip."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.tiny import spread

DATA = Path(__file__).parents[1] / "data" / "siglip"  # a SentencePiece model of 420 pieces, and what it makes of texts
KNOWN = json.loads((DATA / "ids.json").read_text(encoding="utf-8"))  # 500 strings, and SigLIP's ids of them
CONTEXT = 64
_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def hf_siglip(directory: Path) -> Path:
    """SigLIP's directory: 32-pixel pictures, bicubic, a SentencePiece tokenizer, 64-d vectors."""
    _hf(directory, words=600, resample=3)
    shutil.copy(DATA / "spiece.model", directory)
    return directory


def hf_siglip2(directory: Path) -> Path:
    """SigLIP 2's: bilinear, and a tokenizer of Gemma's kind that the directory calls GemmaTokenizer, as hubs do."""
    _hf(directory, words=600, resample=2)
    gemma().save(str(directory / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token", "mask_token"), _SPECIAL, strict=True))
    config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right", "model_max_length": CONTEXT, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _hf(directory: Path, words: int, resample: int) -> None:
    import transformers

    torch.manual_seed(0)
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.SiglipConfig(
        text_config={**_TOWER, "vocab_size": words, "max_position_embeddings": CONTEXT, **ids},
        vision_config={**_TOWER, "image_size": 32, "patch_size": 8},
    )
    model = transformers.SiglipModel(config)
    spread(model)
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-9.0)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 32, "width": 32}, "resample": resample, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def gemma() -> Tokenizer:
    """Byte-pair with byte fallback behind blanks that became ▁; <eos> at the end; cases apart, as Gemma's are."""
    vocab = {name: index for index, name in enumerate(_SPECIAL)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for letter in "▁abcdefghijklmnopqrstuvwxyzABCDT.,!'":
        vocab[letter] = len(vocab)
    merges = [("▁", "a"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("d", "o"), ("do", "g"), ("▁", "dog")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in _SPECIAL])
    return made


def open_clip_siglip(directory: Path) -> Path:
    """open_clip's: a timm ViT with attention pooling, custom text, its tokenizer beside it."""
    from open_clip.model import CustomTextCLIP

    register()
    torch.manual_seed(0)
    config = {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": 32, "timm_model_name": "vit_tiny_patch8_siglip_32", "timm_model_pretrained": False,
            "timm_pool": "map", "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": 600, "hf_tokenizer_name": "timm/ViT-T-8-SigLIP",
            "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 32, "heads": 2, "layers": 2,
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        },
    }  # fmt: skip
    clip = CustomTextCLIP(**config)
    spread(clip)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": preprocess})
    )
    t5().save(str(directory / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **names})
    )
    return directory


def t5() -> Tokenizer:
    """The SentencePiece model of `DATA` as T5's tokenizer.json has it: no canonical form, words apart."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    proto.ParseFromString((DATA / "spiece.model").read_bytes())
    made = Tokenizer(models.Unigram([(p.piece, p.score) for p in proto.pieces], unk_id=2))
    made.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("</s>", "<unk>")])
    return made


def vit_tiny_patch8_siglip_32(pretrained: bool = False, **more):  # type: ignore[no-untyped-def]
    """timm's vit_base_patch16_siglip_224, small; GELU by tanh, as its so400m and giant ones have it."""
    from timm.models.vision_transformer import vit_base_patch16_siglip_224

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "act_layer": "gelu_tanh"}
    return vit_base_patch16_siglip_224(pretrained, **{**small, **more})


def reference_tokenizer(checkpoint: Path) -> Callable[[list[str]], torch.Tensor]:
    """Strings -> ids [N, 64], padded: by what transformers has for SigLIP 2, by the recorded ids for SigLIP."""
    import transformers

    if (checkpoint / "spiece.model").is_file():
        known = dict(zip(KNOWN["strings"], KNOWN["ids"], strict=True))
        return lambda texts: torch.tensor([[*known[t], *[1] * (CONTEXT - len(known[t]))] for t in texts])
    tokenizer = transformers.Siglip2Tokenizer.from_pretrained(checkpoint)
    return lambda texts: tokenizer(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def register() -> None:
    """Make timm know the tiny model."""
    import timm

    if not timm.is_model("vit_tiny_patch8_siglip_32"):
        timm.models.register_model(vit_tiny_patch8_siglip_32)
