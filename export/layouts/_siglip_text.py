"""SigLIP's tokenizers as a tokenizer.json: SentencePiece behind a canonical form, or Gemma's behind lower case.

Source: Zhai et al. 2023 (arXiv 2303.15343), whose code (big_vision) lower-cases a text, drops ASCII punctuation and
joins white space to one blank; transformers' `SiglipTokenizer` does the same before SentencePiece. SigLIP 2: Tschannen
et al. 2025 (arXiv 2502.14786), section 2: Gemma's tokenizer on lower-cased text (`Siglip2Tokenizer`).

Not equal: literal "</s>" in a text, here a word, there the special token; and stray combining marks behind a letter
that the model maps (½, ﬁ), which the tokenizers library drops.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, processors
from tokenizers.normalizers import Normalizer

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.files import read_json, require_package
from calmclip.export.layouts import _hugging_face
from calmclip.models.errors import UnknownCheckpoint

SENTENCEPIECE = "spiece.model"
_BLANK = "▁"
WHITE = Regex(r"[\s\x1c-\x1f]+")  # Python's \s, four separators more than Unicode's
_PUNCTUATION = Regex(r"[!-/:-@\[-`{-~]")  # Python's string.punctuation
_LAST_SIGMA = Regex(r"(?<=\p{L})Σ(?![\p{L}])")  # of a word: the one letter whose lower case hangs on its place
_UNIGRAM = 1  # of SentencePiece's model types


def lower_case() -> list[Normalizer]:
    """As Python's str.lower does."""
    return [normalizers.Replace(_LAST_SIGMA, "ς"), normalizers.Lowercase()]


def canonical(*, underscores: str = "") -> list[Normalizer]:
    """Lower case, no ASCII punctuation, one blank for any white space. ``underscores``: what becomes of them."""
    return [
        normalizers.Replace("_", underscores),
        *lower_case(),
        normalizers.Replace(_PUNCTUATION, ""),
        normalizers.Replace(WHITE, " "),
    ]


def tokenizer(checkpoint: Checkpoint) -> tuple[bytes, int]:
    """-> tokenizer.json, and the id that fills a text up. Raises `UnknownCheckpoint` naming the file at fault."""
    directory = checkpoint.directory
    if (directory / SENTENCEPIECE).is_file():
        found = sentencepiece(directory / SENTENCEPIECE)
        usual = "</s>"
    else:
        found = Tokenizer.from_str(_hugging_face.tokenizer_json(checkpoint, ("tokenizer.json", SENTENCEPIECE)).decode())
        before = [] if found.normalizer is None else [found.normalizer]
        found.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])  # type: ignore[assignment]
        usual = "<pad>"
    return found.to_str().encode(), pad_id(directory, found, usual)


def pad_id(directory: Path, tokenizer: Tokenizer, usual: str) -> int:
    """Raises `UnknownCheckpoint` for a padding that is not in the vocabulary, or stands before the text."""
    file = directory / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    if (side := config.get("padding_side", "right")) != "right":
        raise UnknownCheckpoint(f"{file}: padding_side is {side!r}; a bundle pads on the right, as SigLIP was trained")
    pad = config.get("pad_token") or usual
    pad = pad.get("content") if isinstance(pad, dict) else pad
    found = tokenizer.token_to_id(str(pad))
    if found is None:
        raise UnknownCheckpoint(f"{file}: pad_token {pad!r} is not in the tokenizer's vocabulary")
    return found


def sentencepiece(file: Path) -> Tokenizer:
    """A unigram model, read as `SiglipTokenizer` uses it: ▁ before the canonical text, the model's own normalisation,
    </s> behind. Raises `UnknownCheckpoint` for a file that is no such model."""
    transformers = require_package("transformers.convert_slow_tokenizer", "a SentencePiece model")
    proto = transformers.import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
        ends = [index for index, piece in enumerate(proto.pieces) if piece.piece == "</s>"]
        kind, (end,) = proto.trainer_spec.model_type, ends
    except Exception as error:  # whatever protobuf raises, and ValueError for no or two ends
        raise UnknownCheckpoint(f"{file} is no SentencePiece model with the piece </s>: {error}") from None
    if kind != _UNIGRAM:
        raise UnknownCheckpoint(f"{file} is a SentencePiece model of type {kind}; SigLIP's are unigram models")
    found = Tokenizer(
        models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces],
            unk_id=proto.trainer_spec.unk_id,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    found.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [
            # SentencePiece's own prefix comes before the canonical form: blanks that lead a text stay, as one
            normalizers.Replace(_BLANK, " "),
            normalizers.Prepend(_BLANK),
            *canonical(),
            normalizers.Strip(left=False, right=True),
            *_own(proto.normalizer_spec),
            normalizers.Replace(" ", _BLANK),
            normalizers.Replace(Regex(f"{_BLANK}+\\z"), ""),  # the prefix alone, where nothing is left of a text
        ]
    )
    found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])  # type: ignore[assignment]
    return found


def _own(spec: Any) -> list[Normalizer]:
    found: list[Normalizer] = []
    if spec.precompiled_charsmap:
        found.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        found += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r" +\z"), "")]
    return found
