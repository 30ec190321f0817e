"""The files of data sets for evals and training: JSON, CSV, lines of text, captions of pictures, pairs."""

import csv
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.formats import SUFFIXES

T = TypeVar("T")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
LANGUAGES = 'captions.LANG.json for each other language, or "lang" in lines of captions.jsonl: BCP 47 tags, such as de'
FORM = '{"file": [captions]}, or as .jsonl {"image": file, "captions": [captions]} a line'
CLASSES = "a folder of pictures for each class, such as cat/1.jpg and dog/1.jpg in it"
PAIRS = (
    'pairs.jsonl ({"images": [one or two], "captions": [two], "category"} a line) and images/, or MMVP_VLM or '
    "SugarCrepe as published"
)


def read_classes(folder: Path, without: Container[str] = ()) -> dict[str, list[Path]]:
    """Class -> its pictures, from a folder with a folder of pictures for each class; both in the order of their names.

    ``without``: names of folders that are no class. Pictures may lie deeper in the folder of their class. They are not
    opened. Raises `BadRequest`.
    """
    if not folder.is_dir():
        raise BadRequest(f"{folder} is not a folder; expected {CLASSES}")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = [name for name in names if name not in without]
    classes = {name: pictures_in(folder / name) for name in names}
    if not classes:
        count = len(pictures_in(folder))
        raise BadRequest(f"{folder} has no folder in it, and {count} pictures; expected {CLASSES}")
    if empty := [name for name, pictures in classes.items() if not pictures]:
        raise BadRequest(
            f"{folder / empty[0]} has no picture ({', '.join(SUFFIXES)}); expected {CLASSES}. Add pictures or remove it"
        )
    return classes


def pictures_in(folder: Path) -> list[Path]:
    """The files under ``folder`` that are called like pictures, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def first(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """The first ``limit`` rows, or all. Raises `BadRequest` for a limit below 1."""
    if limit is not None and limit < 1:
        raise BadRequest(f"limit is {limit}; expected at least 1")
    return rows[:limit]


def read_json(path: Path, expected: str) -> Any:
    """The JSON in ``path``. Raises `BadRequest`; ``expected`` describes the data directory in the message."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}); the data directory must hold {expected}") from None


@dataclass(frozen=True)
class CsvTable:
    """``columns``: the head. ``rows``: column -> cell, without white space at the ends; an absent cell is "".
    ``lines``: the line of the file where each row ends, from 1."""

    file: Path
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    lines: tuple[int, ...]

    def wrong(self, row: int, column: str, expected: str) -> BadRequest:
        """The error of a cell that is not what was ``expected``; ``row`` counts from 0."""
        cell = self.rows[row][column]
        return BadRequest(f"{self.file} line {self.lines[row]}, column {column!r}: {cell!r}; expected {expected}")


def read_table(file: Path, required: Sequence[str], expected: str) -> CsvTable:
    """A CSV file in UTF-8, with or without a byte order mark: a head, and at least one row. Empty lines do not count.

    Raises `BadRequest`, naming line and column: for a file that cannot be read, a head that lacks one of ``required``
    or has a column twice or without a name, and a row with more or fewer cells than the head. ``expected`` describes
    the data directory in the message.
    """
    must = f"the data directory must hold {expected}"
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            every = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise BadRequest(f"{file} cannot be read as CSV in UTF-8 ({error}); {must}") from None
    filled = [(line, row) for line, row in every if any(row)]
    if not filled:
        raise BadRequest(f"{file} is empty; {must}")
    (line, head), *body = filled
    if absent := [name for name in required if name not in head]:
        raise BadRequest(f"{file} line {line}: there is no column {absent[0]!r} in {head}; {must}")
    if repeated := [name for place, name in enumerate(head) if not name or name in head[:place]]:
        raise BadRequest(f"{file} line {line}: the column {repeated[0]!r} is without a name or there twice; {must}")
    for line, row in body:
        if len(row) != len(head):
            raise BadRequest(f"{file} line {line} has {len(row)} cells; expected {len(head)}, one for each of {head}")
    if not body:
        raise BadRequest(f"{file} has a head and no rows; {must}")
    rows = tuple(dict(zip(head, row, strict=True)) for _, row in body)
    return CsvTable(file, tuple(head), rows, tuple(line for line, _ in body))


def lines(file: Path) -> list[str]:
    """The lines of ``file`` that are not empty. Raises `BadRequest`."""
    try:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} is not text in UTF-8 ({error}); expected one document per line") from None
    if not texts:
        raise BadRequest(f"{file} has no text; expected one document per line")
    return texts


def read_captions(file: Path) -> dict[str, list[str]]:
    """Picture -> its captions, at least one, in the order of the file. Raises `BadRequest`."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            pictures = {row["image"]: row["captions"] for row in rows}
        else:
            pictures = json.loads(text)
        for picture, captions in pictures.items():
            if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
                raise ValueError(f"{picture!r} has no list of captions")
        if not pictures:
            raise ValueError("no pictures")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(f"{file} cannot be read ({error!r}); it must hold {FORM}") from None
    return pictures


def read_languages(directory: Path) -> dict[str, dict[str, list[str]]]:
    """Language -> picture -> its captions in it, from captions.jsonl or captions.json and captions.LANG.json.

    "" stands for the captions without a language: captions.json, or lines without "lang". Raises `BadRequest`.
    """
    file = directory / "captions.jsonl"
    if file.is_file():
        return _by_language(file)
    captions = {"": read_captions(directory / "captions.json")}
    for path in sorted(directory.glob("captions.*.json")):
        language = path.name.removeprefix("captions.").removesuffix(".json")
        if not _LANGUAGE.fullmatch(language):
            raise BadRequest(f"{path}: {language!r} is no BCP 47 tag; expected {LANGUAGES}")
        captions[language] = read_captions(path)
        if unknown := [name for name in captions[language] if name not in captions[""]]:
            raise BadRequest(f"{path} has {unknown[0]!r}, which captions.json has not; expected captions in each")
    return captions


def _by_language(file: Path) -> dict[str, dict[str, list[str]]]:
    """Lines of one picture and one language are joined."""
    captions: dict[str, dict[str, list[str]]] = {"": {}}
    for number, line in enumerate(lines(file), start=1):
        try:
            row = json.loads(line)
            language, picture, texts = row.get("lang", ""), row["image"], row["captions"]
            if language and not _LANGUAGE.fullmatch(language):
                raise ValueError(f"lang is {language!r}, no BCP 47 tag")
            if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"{picture!r} has no list of captions")
            captions.setdefault(language, {}).setdefault(picture, []).extend(texts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadRequest(f"{file} line {number} cannot be read ({error!r}); it must hold {FORM}") from None
    return captions


PairRow = tuple[list[Path], list[str], str]  # one picture or two, two captions, the category or ""


def read_pairs(directory: Path) -> list[PairRow]:
    """The pairs in ``directory``, in the order of the files; at least one. It holds one of

        pairs.jsonl     {"images": ["a.jpg", "b.jpg"], "captions": ["…", "…"], "category": "colour"} a line; the first
                        caption belongs to the first picture. With one picture the second caption is false. The category
                        may be absent. The pictures are under images/
        Questions.csv   MMVP_VLM (Tong et al. 2024, arXiv 2401.06209): a head; number, pattern, statement. Rows 1 and 2
                        are a pair, so are 3 and 4. The pictures are "MLLM_VLM Images"/PATTERN/NUMBER.jpg. A caption is
                        "a photo of STATEMENT", as in the published evaluation
        *.json          SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610): {key: {"filename", "caption",
                        "negative_caption"}}; each file is a category. The pictures are under images/

    Pictures are not opened. Raises `BadRequest` naming the file, the place in it and what was expected.
    """
    files = {pattern: sorted(directory.glob(pattern)) for pattern in _PAIR_FILES}
    pattern = next((pattern for pattern in files if files[pattern]), None)
    if pattern is None:
        raise BadRequest(f"{directory} holds no pairs; the data directory must hold {PAIRS}")
    expected, rows_of = _PAIR_FILES[pattern]
    pairs: list[PairRow] = []
    for file in files[pattern]:
        try:
            rows = [*rows_of(file)]
        except (OSError, ValueError, csv.Error) as error:
            raise BadRequest(f"{file} cannot be read ({error}); expected {expected}") from None
        if not rows:
            raise BadRequest(f"{file} has no pairs; expected {expected}")
        pairs += rows
    return pairs


def _pairs_of_lines(file: Path) -> Iterator[PairRow]:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        match row:
            case {"images": [str()] | [str(), str()] as names, "captions": [str(), str()] as captions}:
                category = row.get("category", "")
                if isinstance(category, str) and all([*names, *captions]):
                    yield [file.parent / "images" / name for name in names], captions, category
                    continue
        raise ValueError(f"line {number}: {line.strip()[:200]}")


def _pairs_of_questions(file: Path) -> Iterator[PairRow]:
    """Each pair is an odd number and the next number, of the same pattern."""
    folder = file.parent / "MLLM_VLM Images"
    questions: list[tuple[int, str, str, int]] = []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        next(reader, None)  # the head
        for row in reader:
            match [cell.strip() for cell in row]:
                case [number, pattern, statement] if number.isdecimal() and pattern and statement:
                    questions.append((int(number), pattern, statement, reader.line_num))
                case _:
                    raise ValueError(f"line {reader.line_num}: {','.join(row)[:200]!r}")
    for place in range(0, len(questions), 2):
        first, *second = questions[place : place + 2]
        odd, pattern, _, line = first
        if odd % 2 == 0 or [other[:2] for other in second] != [(odd + 1, pattern)]:
            raise ValueError(f"line {line}: {odd} of {pattern!r} is no pair with the next line")
        pair = [first, *second]
        captions = [f"a photo of {statement}" for _, _, statement, _ in pair]
        yield [folder / pattern / f"{number}.jpg" for number, *_ in pair], captions, pattern


def _pairs_of_sugar_crepe(file: Path) -> Iterator[PairRow]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    for key, row in content.items():
        match row:
            case {"filename": str(name), "caption": str(true), "negative_caption": str(false)} if (
                name and true and false
            ):
                yield [file.parent / "images" / name], [true, false], file.stem
            case _:
                raise ValueError(f"entry {key!r}: {json.dumps(row)[:200]}")


# pattern of file names -> the form of such a file, and the function that reads it; the first pattern with files counts
_PAIR_FILES: dict[str, tuple[str, Callable[[Path], Iterator[PairRow]]]] = {
    "pairs.jsonl": (
        '{"images": [one or two names], "captions": [two texts], "category": text or absent} a line', _pairs_of_lines
    ),
    "Questions.csv": (
        "a head, and a line NUMBER,PATTERN,STATEMENT for each picture; an odd number and the next one of the same "
        "pattern are a pair", _pairs_of_questions
    ),
    "*.json": (
        'SugarCrepe\'s {"0": {"filename": text, "caption": text, "negative_caption": text}}', _pairs_of_sugar_crepe
    ),
}  # fmt: skip
