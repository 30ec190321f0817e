"""The net to be trained, and its task. A new one is written as a checkpoint first, with the weights that transformers
draws for it, so that there is one way to read a net; its attention is changed once it is read.
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
from calmclip.export.layouts import LAYOUTS
from calmclip.export.nets import Net, Tower
from calmclip.export.recipe import recognise
from calmclip.export.towers.attention import AttentionSpec, Gate, Softmax, new_gate
from calmclip.export.towers.transformer import Attention
from calmclip.export.training import data
from calmclip.export.training.objectives import Captions, Classes, MaskedWords, NextToken, Pair, Task
from calmclip.export.training.settings import STATE, Training
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.datasets import lines, read_captions
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.image import ImagePreparer
from calmclip.models.preprocess.text import TextPreparer

START = "start"  # a new net before its first step, in the training's directory
_NETS = {"mlm": ("bert", ("mlm",)), "clm": ("opt", ("lm",)), "classes": ("vit", ("logits",)),
         "contrastive": ("clip", ("image", "text"))}  # fmt: skip


@dataclass(frozen=True)
class Student:
    """``directory``: the checkpoint it came from; ``attention``: what its config is to say."""

    net: Net
    task: Task
    directory: Path
    attention: AttentionSpec


def student(settings: Training, out: Path) -> Student:
    """Raises `BadRequest`, `UnknownCheckpoint` for a checkpoint or data that do not fit the objective."""
    directory = settings.start or out / START
    if directory.resolve() == out.resolve():
        raise BadRequest(f"{out} is the checkpoint that is to be gone on from; choose another --out")
    if settings.start is None and not (out / STATE).is_file():  # else it is that of the state
        torch.manual_seed(settings.seed)
        new(settings, directory)
    kind, roles = _NETS[settings.objective]
    name, plugin = recognise(str(directory))
    if name != kind:
        raise BadRequest(f"{directory} is a net of the kind {name}; {settings.objective} trains {kind}")
    assert plugin.unfolded is not None
    net = plugin.unfolded(str(directory))
    if absent := [role for role in roles if role not in net.towers]:
        raise BadRequest(
            f"{directory} has no {absent[0]}, which {settings.objective} trains; it has {', '.join(net.towers)}"
        )
    if settings.objective == "contrastive" and net.layout is not LAYOUTS.get("hf_clip"):
        raise BadRequest(
            f"{directory} is {net.source.notes or name}; contrastive trains the directory of a Hugging Face CLIP"
        )
    torch.manual_seed(settings.seed)
    towers = [net.towers[role] for role in roles]
    for tower in towers:
        tower.module.requires_grad_(True).train()
    attention = _attend(towers, settings)
    return Student(net, _TASKS[settings.objective](net, towers, settings, directory), directory, attention)


def _attend(towers: Sequence[Tower], settings: Training) -> AttentionSpec:
    """Give every attention the softmax and the gate that are asked for; -> what the config is to say of them.

    A new gate in a trained net is multiplied by 1 / its start, so that the net starts as it was.
    """
    layers = [layer for tower in towers for layer in tower.module.modules() if isinstance(layer, Attention)]
    if not layers:
        raise BadRequest("the net has no attention of ours to be given a softmax or a gate")
    softmax, scale = Softmax.parse(settings.softmax), layers[0].gate_scale
    own = ", ".join(sorted({str(layer.softmax) for layer in layers} - {str(softmax)}))
    if own and settings.start is not None and "softmax" not in settings.model_fields_set:
        raise BadRequest(
            f"the checkpoint has the softmax {own}; ask for it by --softmax, or for the one that it is to become"
        )
    fresh = settings.gate != "none" and all(layer.gate is None for layer in layers)
    if fresh and settings.start is not None:
        scale = 1 / settings.gate_start
    for layer in layers:
        width = layer.out.in_features
        if fresh:
            drawn = new_gate(settings.gate, layer.heads, width, settings.gate_start, settings.gate_hidden)
            layer.gate = Gate(drawn, layer.heads, width)
            layer.gate.load_state_dict(drawn)
        there = layer.gate.kind if layer.gate is not None else "none"
        if there != settings.gate:
            raise BadRequest(f"the checkpoint has the gate {there}; it cannot become {settings.gate}. Ask for {there}")
        layer.softmax, layer.gate_scale = softmax, scale
    return AttentionSpec(softmax, scale)


# --- tasks: what a net of each kind learns from ----------------------------------------------------------------------


def _mlm(net: Net, towers: Sequence[Tower], settings: Training, directory: Path) -> Task:
    tokenizer, length = _tokens(net, towers[0], settings)
    ids = {name: tokenizer.token_to_id(name) for name in data.SPECIAL}
    if None in ids.values():
        raise BadRequest(f"the tokenizer has no {next(n for n, i in ids.items() if i is None)}; mlm needs BERT's")
    rows = data.rows(lines(_given(settings.text)), tokenizer, length, ids["[CLS]"], ids["[SEP]"])
    spared = [ids[name] for name in ("[PAD]", "[CLS]", "[SEP]")]
    return MaskedWords(towers[0].module, rows, settings, ids["[MASK]"], tokenizer.get_vocab_size(), spared)


def _clm(net: Net, towers: Sequence[Tower], settings: Training, directory: Path) -> Task:
    tokenizer, length = _tokens(net, towers[0], settings)
    first = tokenizer.encode("a").ids[0]  # what every text begins with
    return NextToken(
        towers[0].module, data.rows(lines(_given(settings.text)), tokenizer, length, first, None), settings
    )


def _classes(net: Net, towers: Sequence[Tower], settings: Training, directory: Path) -> Task:
    spec = towers[0].preprocess
    assert isinstance(spec, ImagePreprocess)
    found = data.pictures(_given(settings.pictures), ImagePreparer(spec))
    known = json.loads(net.files["labels.json"])
    if [*found.names] != known:
        raise BadRequest(
            f"{settings.pictures} has the classes {', '.join(found.names[:5])}…; the net's are {', '.join(known[:5])}…"
        )
    return Classes(towers[0].module, found, settings)


def _contrastive(net: Net, towers: Sequence[Tower], settings: Training, directory: Path) -> Task:
    image, text = towers
    assert isinstance(image.preprocess, ImagePreprocess)
    assert isinstance(text.preprocess, TextPreprocess)
    assert net.classifier is not None
    assert net.classifier.head is not None
    pixels, captions = data.captioned(
        _given(settings.captions), _given(settings.pictures), ImagePreparer(image.preprocess)
    )
    spec = text.preprocess.model_copy(update={"truncate": True})
    with TemporaryDirectory() as folder:  # the directory's own may be in other files
        (Path(folder) / spec.tokenizer).write_bytes(net.files["tokenizer.json"])
        tokens = TextPreparer(spec, Path(folder))
    scale = net.classifier.head.params["scale"]
    return Captions(Pair(image.module, text.module, scale), pixels, captions, tokens, settings)


_TASKS: Mapping[str, Callable[[Net, Sequence[Tower], Training, Path], Task]] = {
    "mlm": _mlm, "clm": _clm, "classes": _classes, "contrastive": _contrastive
}  # fmt: skip


def _tokens(net: Net, tower: Tower, settings: Training) -> tuple[Tokenizer, int]:
    assert isinstance(tower.preprocess, TextPreprocess)
    if settings.length > tower.preprocess.context:
        raise BadRequest(f"length is {settings.length}; the net reads at most {tower.preprocess.context} tokens")
    made = Tokenizer.from_str(net.files["tokenizer.json"].decode())
    made.no_padding()  # rows are full, and cut where they are
    made.no_truncation()
    return made, settings.length


def _given(path: Path | None) -> Path:
    assert path is not None  # `Training` has seen to it
    return path


# --- new nets, as transformers draws their weights -------------------------------------------------------------------


def new(settings: Training, directory: Path) -> None:
    """A Hugging Face directory with the sizes that ``settings`` names."""
    transformers = require_package("transformers", "a new net")
    transformers.logging.disable_progress_bar()
    size: dict[str, Any] = {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "initializer_range": settings.spread,
    }
    inner = settings.inner or 4 * settings.width
    directory.mkdir(parents=True, exist_ok=True)
    if settings.objective == "mlm":
        words = _vocabulary(settings, data.word_pieces)
        config = transformers.BertConfig(
            **size, intermediate_size=inner, vocab_size=words.get_vocab_size(), max_position_embeddings=settings.length
        )
        made = transformers.BertForMaskedLM(config)
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    elif settings.objective == "clm":
        words = _vocabulary(settings, data.byte_pairs)
        config = transformers.OPTConfig(
            **size, ffn_dim=inner, vocab_size=words.get_vocab_size(), max_position_embeddings=settings.length,
            word_embed_proj_dim=settings.width,
            init_std=settings.spread,
        )  # fmt: skip
        made, names = (
            transformers.OPTForCausalLM(config),
            {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"},
        )
    elif settings.objective == "classes":
        labels = dict(enumerate(data.classes(_given(settings.pictures))))
        config = transformers.ViTConfig(
            **size, intermediate_size=inner, image_size=settings.side, patch_size=settings.patch, id2label=labels,
            label2id={name: i for i, name in labels.items()},
        )  # fmt: skip
        made, words, names = transformers.ViTForImageClassification(config), None, {}
        _processor(
            directory,
            {"do_resize": True, "resample": 2, "size": {"height": settings.side, "width": settings.side}},
            0.5,
        )
    else:
        captions = [one for many in read_captions(_given(settings.captions)).values() for one in many]
        words = _vocabulary(settings, data.clip_pairs, captions)
        end = words.token_to_id("<|endoftext|>")
        tower = {**size, "intermediate_size": inner}
        own = {"bos_token_id": words.token_to_id("<|startoftext|>"), "eos_token_id": end, "pad_token_id": end}
        texts = {"vocab_size": words.get_vocab_size(), "max_position_embeddings": settings.length, **own}
        config = transformers.CLIPConfig(
            text_config={**tower, **texts},
            vision_config={**tower, "image_size": settings.side, "patch_size": settings.patch},
            projection_dim=settings.width,
        )
        made = transformers.CLIPModel(config)
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        crop = {"height": settings.side, "width": settings.side}
        _processor(directory, {"resample": 3, "size": {"shortest_edge": settings.side}, "crop_size": crop}, 0.5)
    if words is not None:
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
    made.save_pretrained(directory)


def _vocabulary(
    settings: Training, make: Callable[[Sequence[str], int], Tokenizer], texts: Sequence[str] | None = None
) -> Tokenizer:
    if settings.tokenizer is not None:
        try:
            return Tokenizer.from_file(str(settings.tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise BadRequest(f"{settings.tokenizer} is no tokenizer.json: {error}") from None
    return make(texts or lines(_given(settings.text)), settings.words)


def _processor(directory: Path, config: Mapping[str, Any], half: float) -> None:
    more = {"image_mean": [half] * 3, "image_std": [half] * 3}
    (directory / "preprocessor_config.json").write_text(
        json.dumps({**config, **more}, indent=1) + "\n", encoding="utf-8"
    )
