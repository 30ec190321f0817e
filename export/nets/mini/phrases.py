"""Parallel texts in five languages, for `calmclip distil --parallel`: the words and captions of phrases.txt, sentences
that are composed of its parts, the names of emoji, and on request the captions of captions.txt.

`python -m calmclip.export.nets.mini.phrases --emoji emoji/unicode_codes > parallel.jsonl`
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from calmclip.export.nets.mini.multilingual import TAGS
from calmclip.models.errors import BadRequest

FILE, CAPTIONS = (Path(__file__).with_name(name) for name in ("phrases.txt", "captions.txt"))
COMPOSED = 1500
Row = Sequence[str]  # of one meaning, in the order of `TAGS`
_KINDS = (  # the part of sentences, subjects, what they do, whether they wear clothes
    (0.55, "people", "doings", True),
    (0.2, "groups", "doings of groups", False),
    (0.25, "animals", "doings of animals", False),
)
_CLOTHED, _PLACED = 0.6, 0.8  # of the sentences of people, and of all
_JOINER, _PEOPLE = 0x200D, {0x1F468, 0x1F469, 0x1F9D1}  # code points
_SKIN, _FLAGS = range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200)  # variants of one picture, countries


def sections(file: Path = FILE) -> dict[str, list[Row]]:
    """The rows under each heading. Raises `BadRequest` for a line that has not one text for each language."""
    parts: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("["):
            rows = parts.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            row = line.split("|")
            if len(row) != len(TAGS) or not all(row):
                raise BadRequest(f"{file} line {number} has {len(row)} texts; expected {len(TAGS)} between bars")
            rows.append(row)
    return parts


def composed(parts: dict[str, list[Row]], count: int, seed: int = 0) -> list[Row]:
    """``count`` different sentences: a subject, perhaps its clothes, what it does, perhaps a place."""
    draw, rows = random.Random(seed), dict[str, Row]()
    while len(rows) < count:
        (_, subjects, doings, dressed), *_ = draw.choices(_KINDS, [kind[0] for kind in _KINDS])
        subject, doing = draw.choice(parts[subjects]), draw.choice(parts[doings])
        clothes = draw.choice(parts["clothes"]) if dressed and draw.random() < _CLOTHED else None
        place = draw.choice(parts["places"]) if draw.random() < _PLACED else None
        row = [_sentence(tag, i, subject, clothes, doing, place) for i, tag in enumerate(TAGS)]
        rows.setdefault(row[0], row)
    return [*rows.values()]


def _sentence(tag: str, index: int, subject: Row, clothes: Row | None, doing: Row, place: Row | None) -> str:
    who, what = subject[index], doing[index]
    worn, where = (part[index] if part else "" for part in (clothes, place))
    if tag == "zh":
        return f"{who.replace('~', worn)}{where or '正在'}{what}"
    return " ".join(filter(None, (who, worn, what, where)))


def emoji(folder: Path) -> Iterator[Row]:
    """The names of emoji in ``folder``, the unicode_codes of the package emoji: CLDR's (Unicode licence). Without skin
    tones, flags and combined people, which repeat a name."""
    names = {tag: json.loads((folder / f"emoji_{tag}.json").read_text(encoding="utf-8")) for tag in TAGS[1:]}
    for picture, entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")).items():
        codes = {*map(ord, picture)}
        repeats = codes & {*_SKIN, *_FLAGS} or (_JOINER in codes and codes & _PEOPLE)
        if entry["status"] == 2 and not repeats and all(picture in known for known in names.values()):
            yield [_name(entry["en"]), *(_name(known[picture]) for known in names.values())]


def _name(code: str) -> str:
    """:dog_face: -> dog face"""
    return re.sub(r"[\s_]+", " ", code.strip(":")).strip()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--emoji", type=Path, help="the folder unicode_codes of the package emoji")
    options.add_argument("--composed", type=int, default=COMPOSED, help="sentences (default %(default)s)")
    options.add_argument("--captions", action="store_true", help="the captions of captions.txt too")
    arguments = options.parse_args()
    parts = sections()
    rows = [*parts["nouns"], *parts["captions"], *composed(parts, arguments.composed)]
    rows += emoji(arguments.emoji) if arguments.emoji else []
    rows += sections(CAPTIONS)["captions"] if arguments.captions else []
    for row in rows:
        print(json.dumps(dict(zip(TAGS, row, strict=True)), ensure_ascii=False))


if __name__ == "__main__":
    main()
