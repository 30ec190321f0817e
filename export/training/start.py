"""Makes the net to train, and its task. A new net is first written as a checkpoint, with weights that transformers
draws, so that every net is read in the same way. Its attention is set after it is read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer

from calmclip.export.checkpoints.files import require_package
from calmclip.export.gates import MEAN
from calmclip.export.layouts import LAYOUTS
from calmclip.export.nets import Net, Tower
from calmclip.export.recipe import recognise
from calmclip.export.towers.attention import PER_HEAD, AttentionSpec, Gate, Softmax, new_gate
from calmclip.export.towers.bert import MaskedLM
from calmclip.export.towers.transformer import Attention
from calmclip.export.training import data
from calmclip.export.training.objectives import Captions, Classes, MaskedWords, NextToken, Pair, Penalised, Task
from calmclip.export.training.settings import STATE, Training
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.datasets import lines, read_captions
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.image import ImagePreparer
from calmclip.models.preprocess.text import TextPreparer, check_unknown_token

START = "start"  # folder of a new net before its first step, in the training's directory
_NETS = {"mlm": ("bert", ("mlm",)), "clm": ("opt", ("lm",)), "classes": ("vit", ("logits",)),
         "contrastive": ("clip", ("image", "text"))}  # fmt: skip


@dataclass(frozen=True)
class Student:
    """``directory``: the checkpoint that it was read from. ``attention``: the settings for its config."""

    net: Net
    task: Task
    directory: Path
    attention: AttentionSpec


def student(settings: Training, out: Path) -> Student:
    """Raises `BadRequest` or `UnknownCheckpoint` if the checkpoint or the data do not fit the objective."""
    directory = settings.start or out / START
    if directory.resolve() == out.resolve():
        raise BadRequest(f"{out} is also the checkpoint to start from; choose another --out")
    if settings.start is None and not (out / STATE).is_file():  # a saved state continues from its own start
        torch.manual_seed(settings.seed)
        new(settings, directory)
    kind, roles = _NETS[settings.objective]
    name, plugin = recognise(str(directory))
    if name != kind:
        raise BadRequest(f"{directory} is a net of the kind {name}; {settings.objective} trains the kind {kind}")
    assert plugin.unfolded is not None
    net = plugin.unfolded(str(directory))
    if absent := [role for role in roles if role not in net.towers]:
        raise BadRequest(f"{directory} has the towers {', '.join(net.towers)}; {settings.objective} trains {absent[0]}")
    if settings.objective == "contrastive" and net.layout is not LAYOUTS.get("hf_clip"):
        raise BadRequest(f"{directory} is {net.source.notes or name}; contrastive trains a Hugging Face CLIP directory")
    torch.manual_seed(settings.seed)
    towers = [net.towers[role] for role in roles]
    for tower in towers:
        tower.module.requires_grad_(True).train()
    attention = _set_attention(towers, settings)
    task = _TASKS[settings.objective](net, towers, settings)
    return Student(net, Penalised(task, settings.penalty) if settings.penalty else task, directory, attention)


def _set_attention(towers: Sequence[Tower], settings: Training) -> AttentionSpec:
    """Set the softmax and the gate of every attention; -> the settings for the config.

    A new gate in a trained net is divided by its start value, so that the net starts unchanged.
    """
    layers = [layer for tower in towers for layer in tower.module.modules() if isinstance(layer, Attention)]
    if not layers:
        raise BadRequest("the net has no attention module of calmclip, which softmax and gate need; train another net")
    softmax, scale = Softmax.parse(settings.softmax), layers[0].gate_scale
    others = ", ".join(sorted({str(layer.softmax) for layer in layers} - {str(softmax)}))
    if others and settings.start is not None and "softmax" not in settings.model_fields_set:
        raise BadRequest(f"the checkpoint has the softmax {others}; set --softmax to keep or to change it")
    fresh = settings.gate != "none" and all(layer.gate is None for layer in layers)
    if fresh and settings.start is not None:
        scale = 1 / settings.gate_start
    for layer in layers:
        width = layer.out.in_features
        if fresh:
            drawn = new_gate(settings.gate, layer.heads, width, settings.gate_start, settings.gate_hidden)
            layer.gate = Gate(drawn, layer.heads, width, settings.gate.endswith(MEAN))
            layer.gate.load_state_dict(drawn)
        kind = layer.gate.kind if layer.gate is not None else "none"
        if kind != settings.gate:
            raise BadRequest(f"the checkpoint has the gate {kind}; it cannot become {settings.gate}. Set --gate {kind}")
        layer.softmax, layer.gate_scale = softmax, scale
    return AttentionSpec(softmax, scale, PER_HEAD if settings.gate.endswith(MEAN) else None)


# --- the task of each objective ---------------------------------------------------------------------------------------


def _mlm(net: Net, towers: Sequence[Tower], settings: Training) -> Task:
    tokenizer, module = _tokenizer(net, towers[0], settings), towers[0].module
    assert isinstance(module, MaskedLM)
    ids = {name: i for name in data.SPECIAL if (i := tokenizer.token_to_id(name)) is not None}
    if absent := [name for name in data.SPECIAL if name not in ids]:
        raise BadRequest(f"the tokenizer has no {absent[0]}; mlm needs a tokenizer of BERT's kind")
    rows = data.rows(lines(_path(settings.text)), tokenizer, settings.length, ids["[CLS]"], ids["[SEP]"])
    spared = [ids[name] for name in ("[PAD]", "[CLS]", "[SEP]")]
    return MaskedWords(module, rows, settings, ids["[MASK]"], tokenizer.get_vocab_size(), spared)


def _clm(net: Net, towers: Sequence[Tower], settings: Training) -> Task:
    tokenizer = _tokenizer(net, towers[0], settings)
    first = tokenizer.encode("a").ids[0]  # the first token of every text
    rows = data.rows(lines(_path(settings.text)), tokenizer, settings.length, first, None)
    return NextToken(towers[0].module, rows, settings)


def _classes(net: Net, towers: Sequence[Tower], settings: Training) -> Task:
    spec = towers[0].preprocess
    assert isinstance(spec, ImagePreprocess)
    pictures = data.pictures(_path(settings.pictures), ImagePreparer(spec))
    labels = json.loads(net.files["labels.json"])
    if [*pictures.names] != labels:
        raise BadRequest(
            f"{settings.pictures} has the classes {', '.join(pictures.names[:5])}…; expected those of the net, "
            f"{', '.join(labels[:5])}…"
        )
    return Classes(towers[0].module, pictures, settings)


def _contrastive(net: Net, towers: Sequence[Tower], settings: Training) -> Task:
    image, text = towers
    assert isinstance(image.preprocess, ImagePreprocess)
    assert isinstance(text.preprocess, TextPreprocess)
    assert net.classifier is not None
    assert net.classifier.head is not None
    pixels, captions = data.captioned(
        _path(settings.captions), _path(settings.pictures), ImagePreparer(image.preprocess)
    )
    spec = text.preprocess.model_copy(update={"truncate": True})
    with TemporaryDirectory() as folder:  # the checkpoint may have its tokenizer in other files
        (Path(folder) / spec.tokenizer).write_bytes(net.files["tokenizer.json"])
        tokens = TextPreparer(spec, Path(folder))
    scale = net.classifier.head.params["scale"]
    return Captions(Pair(image.module, text.module, scale), pixels, captions, tokens, settings)


_TASKS: Mapping[str, Callable[[Net, Sequence[Tower], Training], Task]] = {
    "mlm": _mlm, "clm": _clm, "classes": _classes, "contrastive": _contrastive
}  # fmt: skip


def _tokenizer(net: Net, tower: Tower, settings: Training) -> Tokenizer:
    assert isinstance(tower.preprocess, TextPreprocess)
    if settings.length > tower.preprocess.context:
        raise BadRequest(f"length is {settings.length}; the net reads at most {tower.preprocess.context} tokens")
    tokenizer = Tokenizer.from_str(net.files["tokenizer.json"].decode())
    tokenizer.no_padding()  # `data.rows` cuts full rows
    tokenizer.no_truncation()
    return tokenizer


def _path(path: Path | None) -> Path:
    assert path is not None  # `Training` checks it
    return path


# --- new nets, with weights that transformers draws ------------------------------------------------------------------


def new(settings: Training, directory: Path) -> None:
    """Write a Hugging Face directory with the sizes of ``settings``."""
    transformers = require_package("transformers", "a new net")
    transformers.logging.disable_progress_bar()
    size: dict[str, Any] = {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "initializer_range": settings.spread,
    }
    inner, square = settings.inner or 4 * settings.width, {"height": settings.side, "width": settings.side}
    directory.mkdir(parents=True, exist_ok=True)
    if settings.objective == "mlm":
        words = _vocabulary(settings, data.word_pieces)
        config = transformers.BertConfig(
            **size, intermediate_size=inner, vocab_size=words.get_vocab_size(), max_position_embeddings=settings.length
        )
        model = transformers.BertForMaskedLM(config)
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    elif settings.objective == "clm":
        words = _vocabulary(settings, data.byte_pairs)
        config = transformers.OPTConfig(
            **size, ffn_dim=inner, vocab_size=words.get_vocab_size(), max_position_embeddings=settings.length,
            word_embed_proj_dim=settings.width, init_std=settings.spread,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
        names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    elif settings.objective == "classes":
        labels = dict(enumerate(data.classes(_path(settings.pictures))))
        config = transformers.ViTConfig(
            **size, intermediate_size=inner, image_size=settings.side, patch_size=settings.patch, id2label=labels,
            label2id={name: i for i, name in labels.items()},
        )  # fmt: skip
        model, words, names = transformers.ViTForImageClassification(config), None, {}
        _processor(directory, {"do_resize": True, "resample": 2, "size": square})
    else:
        captions = [text for texts in read_captions(_path(settings.captions)).values() for text in texts]
        words = _vocabulary(settings, data.clip_pairs, captions)
        end = words.token_to_id("<|endoftext|>")
        tower = {**size, "intermediate_size": inner}
        ids = {"bos_token_id": words.token_to_id("<|startoftext|>"), "eos_token_id": end, "pad_token_id": end}
        vocabulary = {"vocab_size": words.get_vocab_size(), "max_position_embeddings": settings.length}
        config = transformers.CLIPConfig(
            text_config={**tower, **vocabulary, **ids},
            vision_config={**tower, "image_size": settings.side, "patch_size": settings.patch},
            projection_dim=settings.width,
        )
        model = transformers.CLIPModel(config)
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        _processor(directory, {"resample": 3, "size": {"shortest_edge": settings.side}, "crop_size": square})
    if words is not None:
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
    model.save_pretrained(directory)


def _vocabulary(
    settings: Training, make: Callable[[Sequence[str], int], Tokenizer], texts: Sequence[str] | None = None
) -> Tokenizer:
    if settings.tokenizer is not None:
        try:
            tokenizer = Tokenizer.from_file(str(settings.tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise BadRequest(f"{settings.tokenizer} is not a tokenizer.json of tokenizers: {error}") from None
        try:
            check_unknown_token(tokenizer)
        except ValueError as error:
            raise BadRequest(f"{settings.tokenizer}: {error}") from None
        return tokenizer
    return make(texts or lines(_path(settings.text)), settings.words)


def _processor(directory: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps({**config, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, indent=1)
    (directory / "preprocessor_config.json").write_text(f"{text}\n", encoding="utf-8")
