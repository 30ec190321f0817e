"""The tokenizer of an open_clip directory whose config names a tokenizer of Hugging Face: its files lie beside the
weights.

Source: open_clip's `HFTokenizer`: a text is cleaned (``tokenizer_kwargs.clean``), then tokenized. Its repair of
encodings (ftfy, HTML entities) is left out, as for CLIP's own tokenizer.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.normalizers import Normalizer

from calmclip.export.checkpoints import Checkpoint, hugging_face
from calmclip.export.layouts.common import siglip_tokenizer
from calmclip.models.errors import UnknownCheckpoint

_FILES = (*hugging_face.CLIP_TOKENIZER, "vocab.txt", siglip_tokenizer.SENTENCEPIECE, "sentencepiece.bpe.model")
_WHITE = [normalizers.Replace(siglip_tokenizer.WHITE, " "), normalizers.Strip()]
_CLEAN: dict[str, list[Normalizer]] = {
    "whitespace": _WHITE,
    "lower": [*_WHITE, *siglip_tokenizer.lower_case()],
    "canonicalize": [*siglip_tokenizer.canonical(underscores=" "), *_WHITE],
}


def read_tokenizer(checkpoint: Checkpoint, text: Mapping[str, Any]) -> tuple[bytes, int]:
    """``text``: text_cfg -> tokenizer.json, and the id of its padding.

    Raises `UnknownCheckpoint` with the setting that changes ids and is not supported.
    """
    options = dict(text.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace")
    if clean not in _CLEAN:
        raise UnknownCheckpoint(f"text_cfg.tokenizer_kwargs.clean is {clean!r}; expected one of {', '.join(_CLEAN)}")
    options["tokenizer_mode"] = text.get("tokenizer_mode")
    if unknown := {name: value for name, value in options.items() if value}:
        raise UnknownCheckpoint(f"text_cfg: the tokenizer is used with {unknown}, which is not supported")
    tokenizer = Tokenizer.from_str(hugging_face.tokenizer_json(checkpoint, _FILES).decode())
    siglip_tokenizer.normalize_first(tokenizer, _CLEAN[clean])
    return tokenizer.to_str().encode(), siglip_tokenizer.pad_id(checkpoint.directory, tokenizer, "<pad>")
