"""Whole checkpoints with two layers and width 32, written in a second, with no download.

The weights are random but seeded, and large enough that a vector of the wrong picture or text is far away.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("a", "photo", "of", "red", "green", "blue", "cat", "dog", "two", ".")
START, END = 598, 599
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_TOWER, "vocab_size": 600, "max_position_embeddings": 40}
_OPEN_VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
_OPEN_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def hf_clip(directory: Path) -> Path:
    """A Hugging Face CLIP directory: 32-pixel pictures, 40 tokens of context, 16-d vectors."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "intermediate_size": 64, "eos_token_id": END, "bos_token_id": START},
        vision_config={**_TOWER, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    clip = transformers.CLIPModel(config)
    spread(clip)
    _with_tokenizer(clip, directory)
    preprocessor = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def open_clip(directory: Path) -> Path:
    """An open_clip directory with its own tokenizer (77 tokens): 32-pixel pictures, 16-d vectors."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": _OPEN_VISION, "text_cfg": _OPEN_TEXT}
    return _open_clip(CLIP(**config), config, "shortest", directory)


def open_clip_custom_text(directory: Path) -> Path:
    """The same with the text tower under a name of its own, not causal, pooled at the last of 77 tokens (SigLIP's)."""
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    more = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
    words = {**_OPEN_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, **more}
    config = {"embed_dim": 16, "init_logit_bias": -10, "vision_cfg": _OPEN_VISION, "text_cfg": words}
    return _open_clip(CustomTextCLIP(**config), config | {"custom_text": True}, "squash", directory)


def _open_clip(clip: torch.nn.Module, config: Mapping[str, object], resize: str, directory: Path) -> Path:
    spread(clip)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": resize}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return directory


def openai_module() -> torch.nn.Module:
    """A CLIP in OpenAI's names and with its three marks, as open_clip builds it: heads 64 wide, QuickGELU."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    clip = CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 2, "width": 128, "head_width": 64, "patch_size": 8},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
        quick_gelu=True,
    )
    spread(clip)
    return clip.eval()


def openai(directory: Path) -> Path:
    """OpenAI's state dict in a file: DIRECTORY/clip.pt."""
    marks = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    state = {**openai_module().state_dict(), **{name: torch.tensor(value) for name, value in marks.items()}}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state, directory / "clip.pt")
    return directory / "clip.pt"


def owl(directory: Path, kind: str = "owlv2", side: int = 96, patch: int = 16) -> Path:
    """A Hugging Face OWL-ViT (kind "owlvit") or OWLv2 directory: 16 tokens of context, 32-d vectors."""
    torch.manual_seed(0)
    names = {"owlvit": ("OwlViT", 3), "owlv2": ("Owlv2", 2)}
    name, resample = names[kind]
    tower = {**_TOWER, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(
        text_config={**tower, "vocab_size": 600, "max_position_embeddings": 16},
        vision_config={**tower, "hidden_size": 64, "image_size": side, "patch_size": patch},
        projection_dim=32,
    )
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    spread(getattr(model, kind))
    spread(model.layer_norm)
    owl_heads(model)
    _with_tokenizer(model, directory)
    processor = getattr(transformers, f"{name}ImageProcessor")(size={"height": side, "width": side}, resample=resample)
    processor.save_pretrained(directory)
    return directory


def bert(directory: Path, kind: str = "BertForMaskedLM") -> Path:
    """A Hugging Face BERT directory, masked words or (kind "BertModel") bare: 40 tokens of context."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**_TEXT, intermediate_size=64))
    return _with_tokenizer(spread(model), directory)


def sentences(directory: Path, pool: str = "mean", dense: Mapping[str, int] | None = None) -> Path:
    """A directory of sentence-transformers: BERT, a pooling, and ``dense`` layers by their activation and width."""
    bert(directory, "BertModel")
    parts: list[tuple[str, str, dict[str, object]]] = [
        ("Transformer", "", {}),
        ("Pooling", "1_Pooling", {f"pooling_mode_{name}": name == pool for name in ("cls_token", "mean_tokens")}),
    ]
    width = 32
    for place, (act, outputs) in enumerate((dense or {}).items(), 2):
        said = {"in_features": width, "out_features": outputs, "bias": True,
                "activation_function": f"torch.nn.modules.activation.{act}"}  # fmt: skip
        parts.append(("Dense", f"{place}_Dense", said))
        width = outputs
    parts.append(("Normalize", f"{len(parts)}_Normalize", {}))
    kinds = "sentence_transformers.models"
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{kinds}.{kind}"} for i, (kind, path, _) in enumerate(parts)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    for kind, path, said in parts[1:]:
        (directory / path).mkdir()
        (directory / path / "config.json").write_text(json.dumps(said))
        if kind == "Dense":
            layer = torch.nn.Linear(int(said["in_features"]), int(said["out_features"]))  # type: ignore[call-overload]
            save_file({f"linear.{n}": t for n, t in layer.state_dict().items()}, directory / path / "model.safetensors")
    return directory


def opt(directory: Path, **more: object) -> Path:
    """A Hugging Face OPT directory: 40 tokens of context."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(**{**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, **more})
    return _with_tokenizer(spread(transformers.OPTForCausalLM(config)), directory)


def vit(directory: Path) -> Path:
    """A Hugging Face ViT directory: 32-pixel pictures, 3 classes."""
    torch.manual_seed(0)
    names = dict(enumerate(("cat", "dog", "naïve café")))
    config = transformers.ViTConfig(**_TOWER, intermediate_size=64, image_size=32, patch_size=8, id2label=names)
    spread(transformers.ViTForImageClassification(config)).save_pretrained(directory)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def _with_tokenizer(model: torch.nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)
    return directory


def owl_heads(model: torch.nn.Module) -> None:
    """Heads that say something, and do not drown in their sigmoids, as transformers' fresh ones do."""
    with torch.no_grad():
        for head, gain in (("box_head", 1.0), ("objectness_head", 1.0), ("class_head", 0.5)):
            for layer in getattr(model, head, torch.nn.Module()).modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.normal_(std=gain * layer.in_features**-0.5)
                    layer.bias.normal_(std=0.1)
        model.class_head.logit_scale.bias.fill_(4.0)


def tokenizer() -> Tokenizer:
    """Whole words for `WORDS`, single letters for the rest; <s> text </s>."""
    letters = "abcdefghijklmnopqrstuvwxyz'?!,"
    vocab = {f"{word}</w>": index for index, word in enumerate(WORDS)}
    for offset, end in ((100, ""), (200, "</w>")):
        for index, letter in enumerate(letters):
            vocab.setdefault(letter + end, offset + index)
    vocab |= {"<s>": START, "</s>": END}
    found = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab), end_of_word_suffix="</w>", unk_token="</s>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return found


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Left to right, letter by letter, until each of `WORDS` is whole."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for place in range(1, len(word)):
            right = word[place] + ("</w>" if place == len(word) - 1 else "")
            merges[left, right] = None
            vocab.setdefault(right, 300 + len(vocab))
            left += right
            vocab.setdefault(left, 300 + len(vocab))
    return list(merges)


def changed(checkpoint: Path, to: Path, file: str = "config.json", **said: object) -> Path:
    """A copy at ``to`` whose ``file`` says something else, by key; objects are merged."""
    shutil.copytree(checkpoint, to)
    (to / file).write_text(json.dumps(_merged(json.loads((to / file).read_text()), said)))
    return to


def _merged(one: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(one[k], v) for k, v in other.items() if isinstance(v, dict) and isinstance(one.get(k), dict)}
    return {**one, **other, **both}


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Matrices three times as large, for random initialisations are too small to tell inputs apart; and no norm or bias
    left at its 1 or 0, where one stands for another and what is dropped is not missed. Returns ``module`` to evaluate.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
            elif parameter.ndim == 1 and "logit" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()
