"""SigLIP's tokenizers as a tokenizer.json: SentencePiece after a canonical form, or Gemma's after lower case.

Source: Zhai et al. 2023 (arXiv 2303.15343), whose code (big_vision) lower-cases a text, drops ASCII punctuation and
joins white space to one blank; transformers' `SiglipTokenizer` does the same before SentencePiece. SigLIP 2: Tschannen
et al. 2025 (arXiv 2502.14786), section 2: Gemma's tokenizer on lower-cased text (`Siglip2Tokenizer`).

Two differences to transformers: a literal "</s>" in a text is a word here and the special token there; and the
tokenizers library drops stray combining marks after a letter that the model maps (½, ﬁ).
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, processors
from tokenizers.normalizers import Normalizer

from calmclip.export.checkpoints import Checkpoint, hugging_face
from calmclip.export.checkpoints.files import read_json, require_package
from calmclip.models.errors import UnknownCheckpoint

SENTENCEPIECE = "spiece.model"
_BLANK = "▁"
WHITE = Regex(r"[\s\x1c-\x1f]+")  # Python's \s, four separators more than Unicode's
_PUNCTUATION = Regex(r"[!-/:-@\[-`{-~]")  # Python's string.punctuation
_LAST_SIGMA = Regex(r"(?<=\p{L})Σ(?![\p{L}])")  # of a word: the only letter whose lower case depends on its place
_UNIGRAM = 1  # of SentencePiece's model types


def lower_case() -> list[Normalizer]:
    """As Python's str.lower does."""
    return [normalizers.Replace(_LAST_SIGMA, "ς"), normalizers.Lowercase()]


def canonical(*, underscores: str = "") -> list[Normalizer]:
    """Lower case, no ASCII punctuation, one blank for any white space. ``underscores``: the text that replaces them."""
    return [
        normalizers.Replace("_", underscores),
        *lower_case(),
        normalizers.Replace(_PUNCTUATION, ""),
        normalizers.Replace(WHITE, " "),
    ]


def read_tokenizer(checkpoint: Checkpoint) -> tuple[bytes, int]:
    """-> tokenizer.json, and the id of the padding. Raises `UnknownCheckpoint` with the file at fault."""
    directory = checkpoint.directory
    if (directory / SENTENCEPIECE).is_file():
        tokenizer, pad = sentencepiece(directory / SENTENCEPIECE), "</s>"
    else:
        files = ("tokenizer.json", SENTENCEPIECE)
        tokenizer, pad = Tokenizer.from_str(hugging_face.tokenizer_json(checkpoint, files).decode()), "<pad>"
        normalize_first(tokenizer, [normalizers.Lowercase()])
    return tokenizer.to_str().encode(), pad_id(directory, tokenizer, pad)


def normalize_first(tokenizer: Tokenizer, steps: list[Normalizer]) -> None:
    """``steps`` before the normalizer of ``tokenizer``, in place."""
    last = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([*steps, *last])


def pad_id(directory: Path, tokenizer: Tokenizer, usual: str) -> int:
    """Raises `UnknownCheckpoint` for a padding that is not in the vocabulary, or that precedes the text."""
    file = directory / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    if (side := config.get("padding_side", "right")) != "right":
        raise UnknownCheckpoint(f"{file}: padding_side is {side!r}; a bundle pads on the right, as SigLIP was trained")
    pad = config.get("pad_token") or usual
    pad = pad.get("content") if isinstance(pad, dict) else pad
    number = tokenizer.token_to_id(str(pad))
    if number is None:
        raise UnknownCheckpoint(f"{file}: pad_token {pad!r} is not in the tokenizer's vocabulary")
    return number


def sentencepiece(file: Path) -> Tokenizer:
    """A unigram model as `SiglipTokenizer` uses it: ▁ before the canonical text, the model's own normalization, then
    </s>. Raises `UnknownCheckpoint` for a file that is no such model."""
    transformers = require_package("transformers.convert_slow_tokenizer", "a SentencePiece model")
    proto = transformers.import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
        ends = [index for index, piece in enumerate(proto.pieces) if piece.piece == "</s>"]
        kind, (end,) = proto.trainer_spec.model_type, ends
    except Exception as error:  # protobuf raises any kind; ValueError: not exactly one end
        raise UnknownCheckpoint(f"{file} is no SentencePiece model with the piece </s>: {error}") from None
    if kind != _UNIGRAM:
        raise UnknownCheckpoint(f"{file} is a SentencePiece model of type {kind}; SigLIP's are unigram models")
    tokenizer = Tokenizer(
        models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces],
            unk_id=proto.trainer_spec.unk_id,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    spec = proto.normalizer_spec
    blanks = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r" +\z"), "")]
    tokenizer.normalizer = normalizers.Sequence(
        [
            # SentencePiece's own prefix comes before the canonical form, so leading blanks become one blank
            normalizers.Replace(_BLANK, " "),
            normalizers.Prepend(_BLANK),
            *canonical(),
            normalizers.Strip(left=False, right=True),
            *([normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []),
            *(blanks if spec.remove_extra_whitespaces else []),
            normalizers.Replace(" ", _BLANK),
            normalizers.Replace(Regex(f"{_BLANK}+\\z"), ""),  # the prefix of a text without other characters
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return tokenizer
