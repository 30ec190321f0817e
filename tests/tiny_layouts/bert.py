"""Tiny checkpoints whose text tower is of BERT's kind: Chinese-CLIP, AltCLIP, open_clip with one of Hugging Face's."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests import tiny

TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.06,  # at the usual 0.02 and this width all texts come out as one
}  # fmt: skip
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
PIECES = """[PAD] [UNK] [CLS] [SEP] [MASK] a photo of red green blue cat dog two . , ! ? ' ##s ##ing ##l ##a ##b ##c
cafe na ##ive x 1 2 3 0 ##0 ##1 一 只 猫 狗 的 照 片 张 红 色 两 \uff0c 。 \uff01 日 本 語 の \uff76 ##\uff80
# & ; http : / ( )"""
WORDPIECE = {piece: index for index, piece in enumerate(dict.fromkeys(PIECES.split()))}
CORPUS = [
    "a photo of a red cat.", "two green dogs and a blue bird on the grass", "it's the cat's, isn't it?",
    "一只猫的照片。", "两只红色的狗", "日本語のカタカナ", "naïve café déjà vu", "http://example.org/a?b=1&c=2",
    "1234567890 42 3.14", "Ein großes Haus, über dem Fluß", "это кошка и собака", "هذا كلب", "🐱 and 🐶 emoji",
]  # fmt: skip


def unigram() -> Tokenizer:
    """XLM-R's kind: <s> pieces </s>, spaces as ▁, <pad> 1, <unk> 3, trained on `CORPUS`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        CORPUS * 4, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def vocab_txt(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(WORDPIECE) + "\n", encoding="utf-8")


def xlmr_tokenizer(directory: Path) -> None:
    """As the hub has it: tokenizer.json and its config."""
    transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=unigram(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", mask_token="<mask>",
    ).save_pretrained(directory)  # fmt: skip


def _processor(directory: Path, config: dict[str, Any]) -> None:
    usual = {"resample": 3, "image_mean": tiny.MEAN, "image_std": tiny.STD, "do_resize": True}
    (directory / "preprocessor_config.json").write_text(json.dumps(usual | config))


def bert_module(vocabulary: int) -> torch.nn.Module:
    config = transformers.BertConfig(**TOWER | {"hidden_size": 64, "num_attention_heads": 1}, vocab_size=vocabulary)
    return transformers.BertModel(config, add_pooling_layer=False)


class ChineseClip(torch.nn.Module):
    """Chinese-CLIP by its definition, of open_clip's image tower and transformers' BERT; heads 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = tiny.openai_module().visual
        self.bert: Any = bert_module(len(WORDPIECE))
        self.text_projection = torch.nn.Parameter(torch.randn(64, 16) / 8)
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def encode_text(self, ids: torch.Tensor) -> Any:
        return self.bert(ids, attention_mask=(ids != 0).long())[0][:, 0] @ self.text_projection


def chinese_clip_module() -> ChineseClip:
    torch.manual_seed(0)
    clip = ChineseClip()
    tiny.spread(clip.bert)
    return clip.eval()


def chinese_clip(directory: Path) -> Path:
    """As its authors save it: a training's .pt with a pooler nobody uses, and vocab.txt beside it."""
    state = {f"module.{name}": tensor for name, tensor in chinese_clip_module().state_dict().items()}
    unused = {f"module.bert.pooler.dense.{p}": torch.zeros(shape) for p, shape in (("weight", (64, 64)), ("bias", 64))}
    vocab_txt(directory)
    torch.save({"epoch": 3, "state_dict": state | unused}, directory / "clip_cn.pt")
    return directory


def hf_chinese_clip(directory: Path) -> Path:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(WORDPIECE), "max_position_embeddings": 64}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    clip = transformers.ChineseCLIPModel(config)
    tiny.spread(clip)
    clip.save_pretrained(directory)
    vocab_txt(directory)
    _processor(directory, {"size": {"height": 32, "width": 32}, "do_center_crop": False})
    return directory


def altclip_resaved(directory: Path) -> Path:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 300, "max_position_embeddings": 60, "project_dim": 24}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    clip = transformers.AltCLIPModel(config)
    tiny.spread(clip)
    clip.save_pretrained(directory)
    xlmr_tokenizer(directory)
    _processor(directory, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    return directory


def altclip(directory: Path) -> Path:
    """The same in the names of the published weights."""
    from safetensors.torch import load_file

    file = altclip_resaved(directory) / "model.safetensors"
    names = {
        name: name.replace("vision_model.encoder.layer.", "vision_model.encoder.layers.") for name in load_file(file)
    }
    save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return directory


ROBERTA: dict[str, Any] = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}  # of published configs
HF_KINDS: dict[str, Any] = {
    "xlm-roberta": lambda **sizes: transformers.XLMRobertaConfig(**sizes, **ROBERTA),
    "roberta": lambda **sizes: transformers.RobertaConfig(**sizes, **ROBERTA),
    "bert": transformers.BertConfig,
}


def open_clip_bert_module(
    scratch: Path, kind: str, pooler: str, projection: str | None, width: int = 64
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """open_clip's own model, its text tower built from a config in ``scratch``; and its model_cfg as the hub has it."""
    from open_clip.model import CustomTextCLIP

    sizes = {**TOWER, "hidden_size": width, "num_attention_heads": max(1, width // 64), "max_position_embeddings": 90}
    HF_KINDS[kind](**sizes, vocab_size=300).save_pretrained(scratch)
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "hf_model_name": str(scratch), "hf_tokenizer_name": "none", "hf_pooler_type": pooler,
            "hf_model_pretrained": False, "hf_proj_type": projection,
        },
    }  # fmt: skip
    if projection is None:
        config["embed_dim"] = width
    torch.manual_seed(0)
    clip = CustomTextCLIP(**config)
    tiny.spread(clip)
    named = {**config["text_cfg"], "hf_model_name": f"{kind}-base", "hf_tokenizer_name": f"{kind}-base"}
    return clip.eval(), {**config, "text_cfg": named}


def save_open_clip(directory: Path, clip: torch.nn.Module, config: dict[str, Any]) -> Path:
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    preprocess = {"mean": tiny.MEAN, "std": tiny.STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return directory


def open_clip_bert(directory: Path) -> Path:
    """xlm-roberta-base-ViT-B-32 in small: mean pooler, two products behind it, no config.json."""
    xlmr_tokenizer(directory)
    scratch = directory.parent / "text-config"
    return save_open_clip(directory, *open_clip_bert_module(scratch, "xlm-roberta", "mean_pooler", "mlp"))
