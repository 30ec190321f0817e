"""What Hugging Face directories have in common: tokenizer, image processor, licence, and the names of their blocks."""

from pathlib import Path
from typing import Any

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.files import read_json, require_package
from calmclip.export.checkpoints.weights import one_line
from calmclip.export.layouts import Rule
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import UnknownCheckpoint

_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_STEPS = {  # of CLIP's preprocessing, as its config says them; a bundle's cannot leave one out
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True
}  # fmt: skip
CLIP_TOKENIZER = ("tokenizer.json", "vocab.json+merges.txt")
_FEW = 10  # words: beside special tokens transformers makes up a blank of its own for a T5
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    names = {
        "layer_norm1.{p}": "norm1.{p}",
        "self_attn.out_proj.{p}": "attn.out.{p}",
        "layer_norm2.{p}": "norm2.{p}",
        "mlp.fc1.{p}": "mlp.up.{p}",
        "mlp.fc2.{p}": "mlp.down.{p}",
    }
    return (
        *(Rule(f"{theirs}.{{i}}.{one}", f"{ours}.blocks.{{i}}.{other}") for one, other in names.items()),
        *(
            Rule(f"{theirs}.{{i}}.self_attn.{name}_proj.{{p}}", f"{ours}.blocks.{{i}}.attn.qkv.{{p}}", piece=piece)
            for piece, name in enumerate("qkv")
        ),
    )


def activation(config: dict[str, Any]) -> str:
    """Raises `UnknownCheckpoint` for one our towers do not have."""
    name = config.get("hidden_act", "quick_gelu")
    if name not in ACTIVATIONS:
        raise UnknownCheckpoint(f"config.json: hidden_act is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def tokenizer_json(checkpoint: Checkpoint, wanted: tuple[str, ...] = CLIP_TOKENIZER) -> bytes:
    """``wanted``: sets of files, one of which must be there: where none is, transformers makes a tokenizer of nothing
    but special tokens.

    Raises `UnknownCheckpoint` naming the directory, and the files where they are absent or hold no words.
    """
    transformers = require_package("transformers", "the tokenizer of a Hugging Face directory")
    where = checkpoint.directory
    expected = ", or ".join(files.replace("+", " with ") for files in wanted)
    if not any(all((where / name).is_file() for name in files.split("+")) for files in wanted):
        raise UnknownCheckpoint(f"{where} has no tokenizer; expected {expected}, as published beside the weights")
    if (where / "tokenizer.json").is_file():
        read_json(where / "tokenizer.json")
    transformers.logging.set_verbosity_error()
    try:
        found = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        words = found.backend_tokenizer.get_vocab().keys() - {*found.all_special_tokens}
    except Exception as error:  # whatever its parts raise
        raise UnknownCheckpoint(f"{where} has no tokenizer that transformers reads: {one_line(error)}") from None
    if len(words) < _FEW:
        raise UnknownCheckpoint(f"the tokenizer of {where} knows {len(words)} words; expected a whole {expected}")
    return found.backend_tokenizer.to_str().encode()


def processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """The image processor's config: a file of its own or, as transformers 5 saves it, a part of the processor's."""
    own, whole = (checkpoint.configs.get(f"{name}_config.json") for name in ("preprocessor", "processor"))
    part = whole.get("image_processor") if whole and not own else None
    return part if isinstance(part, dict) else own or read_json(checkpoint.directory / "preprocessor_config.json")


def image_preprocess(config: dict[str, Any], side: int) -> ImagePreprocess:
    """The config of `CLIPImageProcessor` -> ours. A size may be a number or {"shortest_edge": n}; null is the default.

    Raises `UnknownCheckpoint` naming the setting that is absent or not CLIP's.
    """
    config = {name: value for name, value in config.items() if value is not None}
    squash = not config.get("do_center_crop", True) and {"height", "width"} == set(config.get("size") or ())
    if squash:  # to the size itself, which leaves nothing to crop
        config |= {"do_center_crop": True, "crop_size": config["size"]}
    for name, usual in _STEPS.items():
        if (value := config.get(name, usual)) != usual:
            raise UnknownCheckpoint(f"the image processor has {name} = {value}; only CLIP's own {usual} is supported")
    if absent := {"image_mean", "image_std"} - config.keys():
        raise UnknownCheckpoint(f"the image processor's config lacks {' and '.join(sorted(absent))}")
    size, crop = config.get("size", side), config.get("crop_size", side)
    shortest = size["shortest_edge"] if isinstance(size, dict) and "shortest_edge" in size else size
    crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    if not (squash or isinstance(shortest, int)) or config.get("resample", 3) not in _RESAMPLE:
        raise UnknownCheckpoint(
            f"the image processor's size {size} with resample {config.get('resample')} is not CLIP's"
        )
    return ImagePreprocess(
        size=crop,
        resize="exact" if squash else "shortest",
        shortest=None if squash else shortest,
        crop_offset="floor",
        resample=_RESAMPLE[config.get("resample", 3)],  # type: ignore[arg-type]
        mean=config["image_mean"],
        std=config["image_std"],
    )


def license_of(directory: Path) -> str:
    card = directory / "README.md"
    for line in card.read_text(encoding="utf-8").splitlines()[:40] if card.is_file() else ():
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return "not stated in the checkpoint"
