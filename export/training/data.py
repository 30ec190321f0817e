"""Training data in memory: rows of tokens, pictures of classes, pictures with captions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from calmclip.models.datasets import read_captions
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import SUFFIXES, ImagePreparer, decode

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # each one's index is its id, as in BERT's vocabularies


def word_pieces(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary of BERT's kind, lower case, at most ``size`` tokens: [CLS] text [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = ((name, SPECIAL.index(name)) for name in ("[SEP]", "[CLS]"))
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def byte_pairs(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary of GPT-2's kind, as in OPT: every text begins with </s>. At most ``size`` tokens."""
    return _framed(_pairs(texts, size, ["<s>", "<pad>", "</s>", "<unk>"]), "</s> $A", ["</s>"])  # OPT's ids 0 to 3


def clip_pairs(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary for a CLIP, lower case; the end's token has the highest id. At most ``size`` tokens."""
    tokenizer, ends = _pairs((text.lower() for text in texts), size - 2, []), ["<|startoftext|>", "<|endoftext|>"]
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens(ends)
    return _framed(tokenizer, "<|startoftext|> $A <|endoftext|>", ends)


def _pairs(texts: Iterable[str], size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _framed(tokenizer: Tokenizer, template: str, special: Sequence[str]) -> Tokenizer:
    """Every text is encoded by ``template``, in which $A is the text."""
    ids = [(name, tokenizer.token_to_id(name)) for name in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=None, special_tokens=ids)
    return tokenizer


def rows(texts: Sequence[str], tokenizer: Tokenizer, length: int, start: int, end: int | None) -> Array:
    """-> int64 [N, length]: the tokens of all texts in one stream, cut into rows. ``end`` follows each text; if it is
    None, ``start`` does.

    A row begins with ``start`` and ends with ``end``, if it is not None. Tokens that do not fill a row are dropped.
    Raises `BadRequest` if no row is filled.
    """
    border = start if end is None else end
    encodings = tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
    stream = np.asarray([token for encoding in encodings for token in (*encoding.ids, border)], np.int64)
    inner = length - (1 if end is None else 2)
    count = len(stream) // inner
    if not count:
        raise BadRequest(
            f"the texts have {len(stream)} tokens, less than one row of {inner}; give more, or a smaller length"
        )
    rows = np.full((count, length), border, np.int64)
    rows[:, 0] = start
    rows[:, 1 : 1 + inner] = stream[: count * inner].reshape(count, inner)
    return rows


@dataclass(frozen=True)
class Pictures:
    """``pixels`` float32 [N, 3, S, S], prepared; ``labels`` int64 [N]; ``names`` of the classes."""

    pixels: Array
    labels: Array
    names: tuple[str, ...]


def classes(directory: Path) -> tuple[str, ...]:
    """The names of the classes, sorted: one folder each. Raises `BadRequest` for less than two."""
    names = sorted(p.name for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
    if len(names) < 2:
        raise BadRequest(f"{directory} holds folders of {len(names)} classes; expected two or more, with pictures")
    return tuple(names)


def pictures(directory: Path, preparer: ImagePreparer) -> Pictures:
    """The pictures in ``directory``, which has a folder for each class. Raises `BadRequest`."""
    names = classes(directory)
    files = [(file, i) for i, name in enumerate(names) for file in sorted((directory / name).iterdir())]
    files = [(file, i) for file, i in files if file.suffix.lower() in SUFFIXES]
    if absent := {*range(len(names))} - {i for _, i in files}:
        raise BadRequest(f"{directory / names[min(absent)]} holds no pictures; expected {', '.join(SUFFIXES)} files")
    pixels = np.concatenate([prepared(file, preparer) for file, _ in files])
    return Pictures(pixels, np.asarray([i for _, i in files]), names)


def captioned(captions: Path, directory: Path, preparer: ImagePreparer) -> tuple[Array, list[list[str]]]:
    """-> pixels float32 [N, 3, S, S] and the captions of each. Raises `BadRequest`."""
    texts = read_captions(captions)
    return np.concatenate([prepared(directory / name, preparer) for name in texts]), [*texts.values()]


def prepared(file: Path, preparer: ImagePreparer) -> Array:
    """[1, 3, S, S], prepared as in the service."""
    try:
        return preparer.prepare(decode(file.read_bytes()))[0]
    except (OSError, InputError) as error:
        raise BadRequest(f"{file} cannot be read as a picture: {error}. Replace or remove the file") from None


def shifted(pixels: Array, draw: np.random.Generator, most: int) -> Array:
    """Each picture [3, S, S] moved by up to ``most`` pixels in each direction; its edge is repeated."""
    side = pixels.shape[-1]
    padded = np.pad(pixels, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    corners = draw.integers(0, 2 * most + 1, (len(pixels), 2))
    return np.stack([picture[:, y : y + side, x : x + side] for picture, (y, x) in zip(padded, corners, strict=True)])
