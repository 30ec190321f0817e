"""The texts of a distillation: what the student reads, what the teacher reads, and the teacher's vectors."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calmclip.export.training.settings import PARALLEL, Distillation
from calmclip.models.datasets import lines, read_captions
from calmclip.models.errors import BadRequest
from calmclip.models.evals.samples import fingerprint, write
from calmclip.models.flow import Array
from calmclip.models.runner import Runner

_CHUNK = 64  # texts in one call of the teacher


@dataclass(frozen=True)
class Source:
    """Texts in groups, of which a batch holds one each: the captions of a picture, or a text in several languages.

    ``groups``: places in `Corpus.texts`. ``pictures``: of each group, an index, or nothing.
    """

    groups: Sequence[Sequence[int]]
    pictures: Sequence[int] = ()


@dataclass(frozen=True)
class Corpus:
    """``texts``: all that the student reads. ``goals``: of each, its place in ``taught``, the texts that the teacher
    reads. ``languages``: of each text, or ""."""

    texts: Sequence[str]
    goals: Array
    languages: Sequence[str]
    taught: Sequence[str]
    pictures: Sequence[Path]
    sources: Sequence[Source]


def read_corpus(settings: Distillation) -> Corpus:
    """Raises `BadRequest` naming the file and the line."""
    if settings.pictures:
        captions = read_captions(settings.texts)
        pictures = [settings.pictures / name for name in captions]
        if absent := [path for path in pictures if not path.is_file()]:
            raise BadRequest(
                f"{len(absent)} of {len(pictures)} pictures are absent, for example {absent[0]}; pictures is the "
                f"folder that the names in {settings.texts} are relative to"
            )
        grouped = [*captions.values()]
    else:
        pictures, grouped = [], [[text] for text in dict.fromkeys(lines(settings.texts))]
    rows = read_parallel(settings.parallel, settings.source) if settings.parallel else []
    texts = [text for group in grouped for text in group]
    taught = [*texts, *(row[settings.source] for row in rows)]  # a copy: `texts` grows
    goals, languages = [*range(len(texts))], [""] * len(texts)
    ends = np.cumsum([0, *map(len, grouped)]).tolist()
    sources = [Source([range(*pair) for pair in pairwise(ends)], range(len(pictures)))]
    translated = []
    for goal, row in enumerate(rows, start=len(taught) - len(rows)):
        translated.append(range(len(goals), len(goals) + len(row)))
        goals += [goal] * len(row)
        languages += row
        texts += row.values()
    sources += [Source(translated)] if rows else []
    return Corpus(texts, np.array(goals), languages, taught, pictures, sources)


def read_parallel(file: Path, source: str) -> list[dict[str, str]]:
    """Language -> text of each line. Raises `BadRequest`."""
    rows = []
    for number, line in enumerate(lines(file), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRequest(f"{file} line {number} is no JSON ({error}); expected {PARALLEL}") from None
        if not (isinstance(row, dict) and all(isinstance(text, str) and text.strip() for text in row.values())):
            raise BadRequest(f"{file} line {number}: {line[:80]}; expected {PARALLEL}")
        if source not in row:
            raise BadRequest(
                f"{file} line {number} has no text in {source!r}, which the teacher reads; add it, or set source to "
                f"one of {', '.join(row)}"
            )
        rows.append(row)
    return rows


def cached(folder: Path, name: str, key: object, compute: Callable[[], Array]) -> Array:
    """``compute()``, or its result of an earlier run with the same ``key``: a file in ``folder``."""
    file = folder / f"{name}-{fingerprint(key)[:12]}.npy"
    if file.is_file():
        return np.asarray(np.load(file, allow_pickle=False))
    array = compute()
    write(file, lambda stream: np.save(stream, array))
    return array


def taught_vectors(teacher: Runner, corpus: Corpus, folder: Path) -> tuple[Array, Array]:
    """Unit rows float32 [taught, D] and [pictures, D] of the teacher. Raises `TaskNotServed`."""
    teacher.bundle.require("embed")
    digest = teacher.bundle.digest

    def texts() -> Array:
        chunks = range(0, len(corpus.taught), _CHUNK)
        parts = [
            teacher.embed(texts=corpus.taught[i : i + _CHUNK]) for i in tqdm(chunks, "teacher's texts", disable=None)
        ]
        return np.concatenate(parts)

    def pictures() -> Array:
        return teacher.embed(images=tqdm(corpus.pictures, "teacher's pictures", disable=None))

    goals = cached(folder, "texts", [digest, corpus.taught], texts)
    if not corpus.pictures:
        return goals, np.empty((0, goals.shape[1]), np.float32)
    return goals, cached(folder, "pictures", [digest, corpus.pictures], pictures)
