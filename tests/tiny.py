"""Complete checkpoints with two layers and width 32, written in a second without a download.

The weights are random with a seed. They are so large that the vectors of two pictures or texts differ clearly.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("a", "photo", "of", "red", "green", "blue", "cat", "dog", "two", ".")
START, END = 598, 599
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TOWER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT: dict[str, Any] = {**_TOWER, "vocab_size": 600, "max_position_embeddings": 40}
_OPEN_VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
_OPEN_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def hf_clip(directory: Path, blocks: int = 2) -> Path:
    """A Hugging Face CLIP directory: 32-pixel pictures, 40 tokens of context, 16-d vectors. ``blocks``: of the image
    tower."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "intermediate_size": 64, "eos_token_id": END, "bos_token_id": START},
        vision_config={
            **_TOWER,
            "num_hidden_layers": blocks,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    _with_tokenizer(spread(transformers.CLIPModel(config)), directory)
    preprocessor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    preprocessor |= {"image_mean": MEAN, "image_std": STD}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def hf_clip_kin(directory: Path, seed: int = 1, part: str = ".mlp.") -> Path:
    """`hf_clip` with other numbers in the tensors of its blocks whose names hold ``part``."""
    file = hf_clip(directory) / "model.safetensors"
    torch.manual_seed(seed)
    state = load_file(file)
    for name in sorted(state):
        if part in name:
            state[name] = state[name] + 0.3 * state[name].std() * torch.randn_like(state[name])
    save_file(state, file, metadata={"format": "pt"})
    return directory


def open_clip(directory: Path) -> Path:
    """An open_clip directory with its own tokenizer (77 tokens): 32-pixel pictures, 16-d vectors."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": _OPEN_VISION, "text_cfg": _OPEN_TEXT}
    return _open_clip(CLIP(**config), config, "shortest", directory)


def hf_tinyclip(directory: Path) -> Path:
    """TinyCLIP as a `CLIPModel`: towers of unequal depth, CLIP's own tokenizer, an old config that says eos_token_id
    2."""
    from calmclip.export.layouts.common.clip_bpe import tokenizer_json

    torch.manual_seed(0)
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "intermediate_size": 256}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 256}
    config = transformers.CLIPConfig(
        text_config={**text, "hidden_act": "gelu", "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**vision, "hidden_act": "gelu", "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    spread(transformers.CLIPModel(config)).save_pretrained(directory)
    names = {"start_of_text": "|startoftext|", "end_of_text": "|endoftext|"}  # Hugging Face's for open_clip's
    text_json = tokenizer_json().decode()
    for old, new in names.items():
        text_json = text_json.replace(f"<{old}>", f"<{new}>")
    (directory / "tokenizer.json").write_text(text_json, encoding="utf-8")
    start, end = (f"<{name}>" for name in names.values())
    special = {"bos_token": start, **dict.fromkeys(("eos_token", "pad_token", "unk_token"), end)}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))
    preprocessor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    preprocessor |= {"image_mean": MEAN, "image_std": STD}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def tinyclip(directory: Path) -> Path:
    """TinyCLIP as an open_clip directory: towers of unequal depth."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    return _open_clip(CLIP(**config), config, "shortest", directory)


def open_clip_custom_text(directory: Path) -> Path:
    """The same with a text tower in a submodule, as SigLIP's: not causal, pooled at the last of 77 tokens."""
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    more = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
    text = {**_OPEN_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, **more}
    config = {"embed_dim": 16, "init_logit_bias": -10, "vision_cfg": _OPEN_VISION, "text_cfg": text}
    return _open_clip(CustomTextCLIP(**config), config | {"custom_text": True}, "squash", directory)


def _open_clip(clip: torch.nn.Module, config: Mapping[str, object], resize: str, directory: Path) -> Path:
    spread(clip)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": resize}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return directory


def openai_module(seed: int = 0, context: int = 77) -> Any:
    """A CLIP with OpenAI's tensor names, as open_clip builds it: heads of width 64, QuickGELU."""
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    clip = CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 2, "width": 128, "head_width": 64, "patch_size": 8},
        text_cfg={"context_length": context, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
        quick_gelu=True,
    )
    return spread(clip)


def openai(directory: Path) -> Path:
    """The state dict of OpenAI, with its three numbers beside the tensors, in the file DIRECTORY/clip.pt."""
    marks = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    state = {**openai_module().state_dict(), **{name: torch.tensor(value) for name, value in marks.items()}}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state, directory / "clip.pt")
    return directory / "clip.pt"


def owl(directory: Path, kind: str = "owlv2", side: int = 96, patch: int = 16) -> Path:
    """A Hugging Face OWL-ViT (kind "owlvit") or OWLv2 directory: 16 tokens of context, 32-d vectors."""
    torch.manual_seed(0)
    name, resample = {"owlvit": ("OwlViT", 3), "owlv2": ("Owlv2", 2)}[kind]
    tower = {**_TOWER, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(
        text_config={**tower, "vocab_size": 600, "max_position_embeddings": 16},
        vision_config={**tower, "hidden_size": 64, "image_size": side, "patch_size": patch},
        projection_dim=32,
    )
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    spread(getattr(model, kind), attend=1.0)
    spread(model.layer_norm)
    owl_heads(model)
    _with_tokenizer(model, directory)
    processor = getattr(transformers, f"{name}ImageProcessor")(size={"height": side, "width": side}, resample=resample)
    processor.save_pretrained(directory)
    return directory


def bert(directory: Path, kind: str = "BertForMaskedLM") -> Path:
    """A Hugging Face BERT directory, with the head for masked words unless kind is "BertModel"; 40 tokens."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**_TEXT, intermediate_size=64))
    return _with_tokenizer(spread(model), directory)


def sentences(directory: Path, pool: str = "mean", dense: Mapping[str, int] | None = None) -> Path:
    """A directory of sentence-transformers: BERT, a pooling, and ``dense`` layers (activation -> width)."""
    bert(directory, "BertModel")
    parts: list[tuple[str, str, dict[str, Any]]] = [
        ("Transformer", "", {}),
        ("Pooling", "1_Pooling", {f"pooling_mode_{name}": name == pool for name in ("cls_token", "mean_tokens")}),
    ]
    width = 32
    for number, (act, outputs) in enumerate((dense or {}).items(), 2):
        config: dict[str, Any] = {"in_features": width, "out_features": outputs, "bias": True,
                                  "activation_function": f"torch.nn.modules.activation.{act}"}  # fmt: skip
        parts.append(("Dense", f"{number}_Dense", config))
        width = outputs
    parts.append(("Normalize", f"{len(parts)}_Normalize", {}))
    kinds = "sentence_transformers.models"
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{kinds}.{kind}"} for i, (kind, path, _) in enumerate(parts)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    for kind, path, config in parts[1:]:
        (directory / path).mkdir()
        (directory / path / "config.json").write_text(json.dumps(config))
        if kind == "Dense":
            layer = torch.nn.Linear(config["in_features"], config["out_features"])
            save_file({f"linear.{n}": t for n, t in layer.state_dict().items()}, directory / path / "model.safetensors")
    return directory


def opt(directory: Path, **changes: Any) -> Path:
    """A Hugging Face OPT directory: 40 tokens of context."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(**{**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, **changes})
    return _with_tokenizer(spread(transformers.OPTForCausalLM(config)), directory)


def vit(directory: Path) -> Path:
    """A Hugging Face ViT directory: 32-pixel pictures, 3 classes."""
    torch.manual_seed(0)
    names = dict(enumerate(("cat", "dog", "naïve café")))
    config = transformers.ViTConfig(**_TOWER, intermediate_size=64, image_size=32, patch_size=8, id2label=names)
    spread(transformers.ViTForImageClassification(config)).save_pretrained(directory)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def light_map(directory: Path, channels: int = 1, **changes: torch.Tensor) -> Path:
    """The state dict of CLIP-LIT's network, as its parallel training saves it, in the file DIRECTORY/light.pth."""
    torch.manual_seed(0)
    convolutions = {"cond1": (32, 3, 3), "condx": (64, 32, 3), "condy": (32, 64, 3), "cond_add1": (channels, 32, 3)}
    for block in range(1, 7):
        width = 64 if block in (3, 4) else 32
        convolutions |= {f"ResidualBlock{block}.conv{i}": (width, width, 3) for i in (1, 2)}
    convolutions |= {f"PPM1.features.{i}.1": (8, 32, 1) for i in range(4)} | {"PPM1.fuse.0": (32, 64, 3)}
    state = {}
    for name, (outputs, inputs, side) in convolutions.items():
        state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side) * (inputs * side**2) ** -0.5
        if name.startswith("cond"):
            state[f"{name}.bias"] = torch.randn(outputs) * 0.1
    state["cond_add1.bias"] += 1.5  # a map near 1, as a trained one
    slopes = [*(f"PPM1.features.{i}.2" for i in range(4)), "PPM1.fuse.1"]
    state |= {f"{name}.weight": torch.rand(1) for name in slopes} | changes
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, directory / "light.pth")
    return directory / "light.pth"


def _with_tokenizer(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)


def owl_heads(model: Any) -> None:
    """Heads whose outputs differ and do not saturate the sigmoids, unlike the initial ones of transformers."""
    with torch.no_grad():
        for head, gain in (("box_head", 1.0), ("objectness_head", 1.0), ("class_head", 0.5)):
            for layer in getattr(model, head, torch.nn.Module()).modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.normal_(std=gain * layer.in_features**-0.5)
                    layer.bias.normal_(std=0.1)
        model.class_head.logit_scale.bias.fill_(4.0)


def tokenizer() -> Tokenizer:
    """One token for each of `WORDS`, one per letter otherwise; <s> text </s>."""
    letters = "abcdefghijklmnopqrstuvwxyz'?!,"
    vocab = {f"{word}</w>": index for index, word in enumerate(WORDS)}
    for offset, end in ((100, ""), (200, "</w>")):
        for index, letter in enumerate(letters):
            vocab.setdefault(letter + end, offset + index)
    vocab |= {"<s>": START, "</s>": END}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab), end_of_word_suffix="</w>", unk_token="</s>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return bpe


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Merges from left to right, letter by letter, that make each of `WORDS` one token; adds them to ``vocab``."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        start = word[0]
        for place in range(1, len(word)):
            letter = word[place] + ("</w>" if place == len(word) - 1 else "")
            merges[start, letter] = None
            vocab.setdefault(letter, 300 + len(vocab))
            start += letter
            vocab.setdefault(start, 300 + len(vocab))
    return list(merges)


def changed(checkpoint: Path, to: Path, file: str = "config.json", **changes: object) -> Path:
    """A copy at ``to`` with ``changes`` of the JSON ``file``, by key; objects are merged."""
    shutil.copytree(checkpoint, to)
    (to / file).write_text(json.dumps(_merged(json.loads((to / file).read_text()), changes)))
    return to


def _merged(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return {**old, **new, **both}


def spread(module: Any, attend: float = 0.5) -> Any:
    """Enlarge random weights, so that tests see errors; returns ``module`` in evaluation mode.

    Matrices are three times as large, because outputs of initial weights hardly depend on the input. Those of
    queries and keys are ``attend`` times that: scores nine times as large make attention a choice of one token, and a
    rounding error then changes the choice (a row at a cosine of 0.87 among 64). Norms and biases leave 1 and 0,
    because those values hide a tensor that is swapped or dropped.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
                if re.search(r"(q_proj|k_proj|query|key)\.weight$", name):
                    parameter.mul_(attend)
                elif re.search(r"(in_proj_weight|qkv\.weight)$", name):  # queries, keys, values
                    parameter[: 2 * len(parameter) // 3].mul_(attend)
            elif parameter.ndim == 1 and "logit" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()
