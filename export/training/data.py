"""What is trained on, in memory: rows of tokens, pictures of classes, pictures with captions. Drawn by a seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from calmclip.models.datasets import read_captions
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import ImagePreparer, decode

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their places are their ids, as in BERT's vocabularies
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def word_pieces(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary of BERT's kind, lower case, at most ``size`` tokens: [CLS] text [SEP]."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL], show_progress=False)
    )
    made.post_processor = processors.BertProcessing(
        ("[SEP]", SPECIAL.index("[SEP]")), ("[CLS]", SPECIAL.index("[CLS]"))
    )
    return made


def byte_pairs(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary of GPT-2's kind as OPT has it: every text begins with </s>. At most ``size`` tokens."""
    return _pairs(texts, size, ["<s>", "<pad>", "</s>", "<unk>"], "</s> $A")  # OPT's ids 0 to 3


def clip_pairs(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary for a CLIP, lower case, the token of the end the highest id. At most ``size`` tokens."""
    made = _pairs((text.lower() for text in texts), size - 2, [], "$A")
    made.normalizer = normalizers.Lowercase()
    made.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    ends = [(name, made.token_to_id(name)) for name in ("<|startoftext|>", "<|endoftext|>")]
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", pair=None, special_tokens=ends
    )
    return made


def _pairs(texts: Iterable[str], size: int, special: Sequence[str], single: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if single != "$A":
        made.post_processor = processors.TemplateProcessing(
            single=single,
            pair=None,
            special_tokens=[(name, made.token_to_id(name)) for name in special if name in single],
        )
    return made


def rows(texts: Sequence[str], tokenizer: Tokenizer, length: int, start: int, end: int | None) -> Array:
    """-> int64 [N, length]: the texts' tokens one after another, ``end`` (or else ``start``) behind each, cut.

    A row begins with ``start`` and, where there is an ``end``, ends with it. What does not fill a row is left out.
    Raises `BadRequest` where that is all.
    """
    border = start if end is None else end
    stream = np.concatenate(
        [
            np.empty(0, np.int64),
            *(
                np.asarray([*one.ids, border], np.int64)
                for one in tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
            ),
        ]
    )
    inner = length - (1 if end is None else 2)
    count = len(stream) // inner
    if not count:
        raise BadRequest(
            f"the texts have {len(stream)} tokens, less than one row of {inner}; give more, or a smaller length"
        )
    found = np.full((count, length), border, np.int64)
    found[:, 0] = start
    found[:, 1 : 1 + inner] = stream[: count * inner].reshape(count, inner)
    return found


@dataclass(frozen=True)
class Pictures:
    """``pixels`` float32 [N, 3, S, S], prepared; ``labels`` int64 [N]; ``names`` of the classes."""

    pixels: Array
    labels: Array
    names: tuple[str, ...]


def classes(directory: Path) -> tuple[str, ...]:
    """A folder for each class: their names, sorted. Raises `BadRequest` where there are less than two."""
    names = sorted(p.name for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
    if len(names) < 2:
        raise BadRequest(f"{directory} holds folders of {len(names)} classes; expected two or more, pictures in each")
    return tuple(names)


def pictures(directory: Path, preparer: ImagePreparer) -> Pictures:
    """The pictures in the folders of ``directory``, one for each class. Raises `BadRequest`."""
    names = classes(directory)
    files = [(file, i) for i, name in enumerate(names) for file in sorted((directory / name).iterdir())]
    files = [(file, i) for file, i in files if file.suffix.lower() in _SUFFIXES]
    if absent := {*range(len(names))} - {i for _, i in files}:
        raise BadRequest(f"{directory / names[min(absent)]} holds no pictures; expected some of each class")
    pixels = np.concatenate([_prepared(file, preparer) for file, _ in files])
    return Pictures(pixels, np.asarray([i for _, i in files]), names)


def captioned(captions: Path, directory: Path, preparer: ImagePreparer) -> tuple[Array, list[list[str]]]:
    """-> pixels float32 [N, 3, S, S] and the captions of each. Raises `BadRequest`."""
    found = read_captions(captions)
    return np.concatenate([_prepared(directory / name, preparer) for name in found]), [*found.values()]


def _prepared(file: Path, preparer: ImagePreparer) -> Array:
    """As the service prepares it, [1, 3, S, S]."""
    try:
        return preparer.prepare(decode(file.read_bytes()))[0]
    except (OSError, InputError) as error:
        raise BadRequest(f"{file} is no picture that can be read: {error}") from None


def shifted(pixels: Array, draw: np.random.Generator, most: int) -> Array:
    """Each picture [3, S, S] moved by up to ``most`` pixels either way, its edge repeated."""
    side = pixels.shape[-1]
    padded = np.pad(pixels, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    places = draw.integers(0, 2 * most + 1, (len(pixels), 2))
    return np.stack([one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, places, strict=True)])
