"""The tokenizer of an open_clip directory whose config names one of Hugging Face's: it lies beside the weights.

Source: open_clip's `HFTokenizer`: a text is cleaned (``tokenizer_kwargs.clean``), then given to the tokenizer. What it
does beside (ftfy, HTML entities) is left out, as for CLIP's own tokenizer.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.normalizers import Normalizer

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import _hugging_face, _siglip_text
from calmclip.models.errors import UnknownCheckpoint

_FILES = (*_hugging_face.CLIP_TOKENIZER, "vocab.txt", _siglip_text.SENTENCEPIECE, "sentencepiece.bpe.model")
_WHITE = [normalizers.Replace(_siglip_text.WHITE, " "), normalizers.Strip()]
_CLEAN: dict[str, list[Normalizer]] = {
    "whitespace": _WHITE,
    "lower": [*_WHITE, *_siglip_text.lower_case()],
    "canonicalize": [*_siglip_text.canonical(underscores=" "), *_WHITE],
}


def tokenizer(checkpoint: Checkpoint, text: Mapping[str, Any]) -> tuple[bytes, int]:
    """``text``: text_cfg -> tokenizer.json, and the id of its padding.

    Raises `UnknownCheckpoint` naming the setting that changes ids and is not supported.
    """
    how = dict(text.get("tokenizer_kwargs") or {})
    clean = how.pop("clean", "whitespace")
    if clean not in _CLEAN:
        raise UnknownCheckpoint(f"text_cfg.tokenizer_kwargs.clean is {clean!r}; expected one of {', '.join(_CLEAN)}")
    mode = {"tokenizer_mode": text.get("tokenizer_mode")}
    if odd := {name: value for name, value in {**how, **mode}.items() if value}:
        raise UnknownCheckpoint(f"text_cfg: the tokenizer is used with {odd}, which is not supported")
    found = Tokenizer.from_str(_hugging_face.tokenizer_json(checkpoint, _FILES).decode())
    own = [] if found.normalizer is None else [found.normalizer]
    found.normalizer = normalizers.Sequence([*_CLEAN[clean], *own])  # type: ignore[assignment]
    return found.to_str().encode(), _siglip_text.pad_id(checkpoint.directory, found, "<pad>")
