"""Hugging Face directories: tokenizer, image processor, activation and licence, read from their files."""

from pathlib import Path
from typing import Any

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.files import read_json, require_package
from calmclip.export.checkpoints.locate import one_line
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import UnknownCheckpoint

RESAMPLE = {2: "bilinear", 3: "bicubic"}
_STEPS = {  # the steps of CLIP's preprocessing as its config names them; a bundle cannot leave one out
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True
}  # fmt: skip
CLIP_TOKENIZER = ("tokenizer.json", "vocab.json+merges.txt")
_FEWEST_WORDS = 10  # beside special tokens; for a T5 without a vocabulary transformers makes up a blank
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def activation(config: dict[str, Any]) -> str:
    """Raises `UnknownCheckpoint` for an activation that our towers do not have."""
    name = config.get("hidden_act", "quick_gelu")
    if name not in ACTIVATIONS:
        raise UnknownCheckpoint(f"config.json: hidden_act is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def tokenizer_json(checkpoint: Checkpoint, file_sets: tuple[str, ...] = CLIP_TOKENIZER) -> bytes:
    """``file_sets``: names of files, joined by "+". All files of one set must be there: without them transformers makes
    a tokenizer of special tokens alone.

    Raises `UnknownCheckpoint` with the directory, and the files if they are absent or hold no words.
    """
    transformers = require_package("transformers", "the tokenizer of a Hugging Face directory")
    directory = checkpoint.directory
    expected = ", or ".join(files.replace("+", " with ") for files in file_sets)
    if not any(all((directory / name).is_file() for name in files.split("+")) for files in file_sets):
        raise UnknownCheckpoint(f"{directory} has no tokenizer; expected {expected}, as published beside the weights")
    if (directory / "tokenizer.json").is_file():
        read_json(directory / "tokenizer.json")
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        words = tokenizer.backend_tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}
        content: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the parts of transformers raise any kind
        raise UnknownCheckpoint(f"{directory} has no tokenizer that transformers reads: {one_line(error)}") from None
    if len(words) < _FEWEST_WORDS:
        raise UnknownCheckpoint(
            f"the tokenizer of {directory} knows {len(words)} words; expected a complete {expected}"
        )
    return content.encode()


def processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """The image processor's config: a file of its own or, as transformers 5 saves it, a part of the processor's."""
    alone, combined = (checkpoint.configs.get(f"{name}_config.json") for name in ("preprocessor", "processor"))
    part = combined.get("image_processor") if combined and not alone else None
    return part if isinstance(part, dict) else alone or read_json(checkpoint.directory / "preprocessor_config.json")


def image_preprocess(config: dict[str, Any], side: int) -> ImagePreprocess:
    """The config of `CLIPImageProcessor` -> ours. A size is a number or {"shortest_edge": n}. Null means the default.

    Raises `UnknownCheckpoint` with the setting that is absent or not CLIP's.
    """
    config = {name: value for name, value in config.items() if value is not None}
    squash = not config.get("do_center_crop", True) and {"height", "width"} == set(config.get("size") or ())
    if squash:  # to the size itself, so a crop changes nothing
        config |= {"do_center_crop": True, "crop_size": config["size"]}
    for name, usual in _STEPS.items():
        if (value := config.get(name, usual)) != usual:
            raise UnknownCheckpoint(f"the image processor has {name} = {value}; only CLIP's own {usual} is supported")
    if absent := {"image_mean", "image_std"} - config.keys():
        raise UnknownCheckpoint(f"the image processor's config lacks {' and '.join(sorted(absent))}")
    size, crop = config.get("size", side), config.get("crop_size", side)
    shortest = size["shortest_edge"] if isinstance(size, dict) and "shortest_edge" in size else size
    crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    if not (squash or isinstance(shortest, int)) or config.get("resample", 3) not in RESAMPLE:
        raise UnknownCheckpoint(
            f"the image processor's size {size} with resample {config.get('resample')} is not CLIP's"
        )
    return ImagePreprocess(
        size=crop,
        resize="exact" if squash else "shortest",
        shortest=None if squash else shortest,
        crop_offset="floor",
        resample=RESAMPLE[config.get("resample", 3)],  # type: ignore[arg-type]
        mean=config["image_mean"],
        std=config["image_std"],
    )


def license_of(directory: Path) -> str:
    """The licence that the model card states in its first 40 lines."""
    card = directory / "README.md"
    for line in card.read_text(encoding="utf-8").splitlines()[:40] if card.is_file() else ():
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return "not stated in the checkpoint"
