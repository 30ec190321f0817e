"""Calibration pictures and texts -> feeds, by the service's preprocessing; and recorded ranges that ship.

A ranges file holds the observed ranges of a net's float graphs, so that every export of that net makes the same bundle:

    {"source": "which pictures and texts, and the command", "pictures": ["…"], "weights": {"heads.safetensors": "…"},
     "graphs": {"image": {"fingerprint": "…", "quantizer": "search", "params": {},
                          "settled": {"name": "smooth", "params": {"alpha": 0.75}}, "ranges": {"Conv_0": [-1.0, 2.0]}}}}

A quantizer that works by channel records a list of minima and a list of maxima instead of two numbers. ``settled`` is
the result of a search (`Settled`), so that an export need not search again.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from calmclip.export import samples
from calmclip.export.nets import Net, Tower
from calmclip.export.parity import Run
from calmclip.export.quantizers import Ranges
from calmclip.export.recipe import Calibration, Quantize
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess, VectorPreprocess
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Array, Arrays
from calmclip.models.preprocess.image import SUFFIXES, ImagePreparer, decode
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.preprocess.vectors import VectorPreparer
from calmclip.models.vector_files import read_vectors

PARTS = ("calibration", "search", "certificate")
NEEDED = 32  # different pictures, or texts, of a user: 8 for the certificate, 6 to search with, 18 to calibrate on
EVERY = 4  # one of so many inputs is held out, both for the certificate and for the search
HELD = 32  # at most, for the search
CERTIFIED = 64  # at most, for the certificate, of a user's inputs
TOGETHER = 8  # pictures in one feed of a tower that reads the answers of other towers

T = TypeVar("T")
Text = str | Array  # of a net that reads vectors in place of texts, a vector [d]


@dataclass(frozen=True)
class Parts(Generic[T]):
    """Three sets of pictures or of texts that share no content: what ranges are observed on, what a search measures its
    candidates on, and what the finished bundle is measured on. ``source``: in words."""

    calibration: tuple[T, ...]
    search: tuple[T, ...]
    certificate: tuple[T, ...]
    source: str

    def counts(self) -> dict[str, Any]:
        """For the report."""
        return {"source": self.source, **{part: len(getattr(self, part)) for part in PARTS}}


@dataclass(frozen=True)
class Inputs:
    """The pictures and the texts of one export. A net without a tower for one of the two has none of them."""

    pictures: Parts[Path]
    texts: Parts[Text]
    seed: int

    def part(self, name: str) -> tuple[Sequence[Path], Sequence[Text]]:
        """``name``: one of `PARTS`."""
        return getattr(self.pictures, name), getattr(self.texts, name)

    def facts(self) -> dict[str, Any]:
        """For the report: how many of each set, their source, and the seed that drew them."""
        sets: dict[str, Parts[Any]] = {"pictures": self.pictures, "texts": self.texts}
        return {"seed": self.seed, **{kind: parts.counts() for kind, parts in sets.items() if parts.certificate}}

    def describe(self, tower: Tower) -> str:
        """In words: the inputs that the ranges of ``tower`` were observed on by this export. A tower that reads other
        towers has a feed for each picture or more."""
        kinds = {TextPreprocess: "texts", VectorPreprocess: "vectors"}
        kind = kinds.get(type(tower.preprocess), "pictures")  # type: ignore[arg-type]
        parts = self.pictures if kind == "pictures" else self.texts
        counts = f"{len(parts.calibration)} {kind}, and {len(parts.search)} others to search with"
        return f"{counts} ({parts.source}), seed {self.seed}"


def inputs(
    calibration: Calibration, net: Net, directory: Path, say: Callable[[str], None] = lambda line: None
) -> Inputs:
    """The inputs of an export, drawn by the recipe's seed; ``directory`` holds the tokenizer.

    Texts that do not fit the net's context are left out. A net that reads vectors in place of texts takes those of the
    recipe's file; without a file they are random, because no vectors ship. Raises `BadRequest` if the recipe's folder
    or file has fewer than `NEEDED` different pictures, texts or vectors.
    """
    kinds = {type(tower.preprocess) for tower in net.towers.values()}
    draw = random.Random(calibration.seed)
    pictures: Parts[Path] = Parts((), (), (), "none")
    texts: Parts[Text] = Parts((), (), (), "none")
    if ImagePreprocess in kinds or any(tower.feeds for tower in net.towers.values()):
        if (folder := calibration.images) is None:
            pictures = _shipped(samples.calibration_pictures(), samples.pictures(), calibration.count, draw)
        else:
            pictures = _divided(_files(folder), _contents, calibration.count, draw, folder.name, f"--images {folder}")
    if TextPreprocess in kinds:
        if (file := calibration.texts) is None:
            rows, certificate = (
                fitting(net, directory, rows) for rows in (samples.calibration_texts(), samples.texts())
            )
            texts = _shipped(rows, certificate, calibration.count, draw)
        else:
            lines = _lines(file)
            short = fitting(net, directory, lines)
            if len(short) < len(lines):
                say(f"{len(lines) - len(short)} calibration texts are longer than the context and left out")
            texts = _divided(short, _words, calibration.count, draw, file.name, f"--texts {file}")
    elif specs := [t.preprocess for t in net.towers.values() if isinstance(t.preprocess, VectorPreprocess)]:
        if (file := calibration.texts) is None:
            say("the text side is measured on random vectors; --texts FILE.npy gives it those of its language model")
            size = (calibration.count + CERTIFIED, specs[0].dim)
            drawn = [*np.random.default_rng(calibration.seed).standard_normal(size)]
            texts = Parts(*hold_out(drawn[: calibration.count]), tuple(drawn[calibration.count :]), "random vectors")
        else:
            vectors = [*read_vectors(file)]
            VectorPreparer(specs[0]).prepare(vectors, f"{file}: vector {{}}")
            texts = _divided(vectors, _contents, calibration.count, draw, file.name, f"--texts {file}")
    return Inputs(pictures, texts, calibration.seed)


def hold_out(rows: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """-> the rows to calibrate on, and those to search with: every `EVERY`-th row, at most `HELD`."""
    held = rows[EVERY - 1 :: EVERY][:HELD]
    places = {*range(EVERY - 1, len(held) * EVERY, EVERY)}
    return tuple(row for place, row in enumerate(rows) if place not in places), tuple(held)


def _shipped(rows: Sequence[T], certificate: Sequence[T], count: int, draw: random.Random) -> Parts[T]:
    return Parts(*hold_out(draw.sample(rows, min(count, len(rows)))), tuple(certificate), "samples that ship")


def _divided(
    rows: Sequence[T], content: Callable[[T], Any], count: int, draw: random.Random, source: str, flag: str
) -> Parts[T]:
    """A user's ``rows`` in three parts: a quarter for the certificate, at most `CERTIFIED`; then at most ``count``.
    Of rows of one ``content`` the first that is drawn counts."""
    different: dict[Any, T] = {}
    for row in draw.sample(rows, len(rows)):
        different.setdefault(content(row), row)
        if len(different) == count + CERTIFIED:
            break
    if len(different) < NEEDED:
        raise BadRequest(
            f"{flag} has {len(different)} different inputs that fit; calibration, search and certificate share none, "
            f"so at least {NEEDED} are needed. Add some, or leave the option out: then the samples that ship are used"
        )
    drawn = [*different.values()]
    first = min(CERTIFIED, len(drawn) // EVERY)
    return Parts(*hold_out(drawn[first : first + count]), tuple(drawn[:first]), source)


def _files(folder: Path) -> list[Path]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise BadRequest(f"{folder} holds no pictures; expected files ending in {', '.join(SUFFIXES)}")
    return pictures


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{file} is no text in UTF-8 ({error}); expected one text per line") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise BadRequest(f"{file} holds no texts; expected one per line")
    return texts


def _contents(row: Path | Text) -> bytes:
    return hashlib.sha256(row.read_bytes() if isinstance(row, Path) else np.asarray(row).tobytes()).digest()


def _words(text: Text) -> str:
    """A tokenizer may ignore case and spaces."""
    return " ".join(str(text).split()).casefold()


def feeds(tower: Tower, directory: Path, pictures: Sequence[Path], texts: Sequence[Text]) -> Iterator[Arrays]:
    """One row at a time, as the service prepares it; ``directory`` holds the tokenizer.

    Raises `BadRequest` for a tower that takes neither pictures nor texts nor vectors.
    """
    if tower.feeds:
        yield from tower.feeds(pictures)
    elif isinstance(tower.preprocess, ImagePreprocess):
        preparer = ImagePreparer(tower.preprocess)
        for path in pictures:
            try:
                picture = decode(path.read_bytes())
            except InputError as error:
                raise type(error)(f"{path.name}: {error}") from None
            yield {tower.preprocess.input: preparer.prepare(picture)[0]}
    elif isinstance(tower.preprocess, VectorPreprocess):
        vectors = VectorPreparer(tower.preprocess)
        for vector in texts:
            yield vectors.prepare([vector])
    elif tower.preprocess:
        text = TextPreparer(tower.preprocess, directory)
        for sentence in texts:
            yield text.prepare([str(sentence)])
    else:
        raise BadRequest(f"a tower with the inputs {list(tower.inputs)} has no preprocessing, so nothing calibrates it")


def chained(
    tower: Tower,
    sources: Mapping[str, tuple[Tower, Run]],
    directory: Path,
    pictures: Sequence[Path],
    texts: Sequence[Text],
) -> list[Arrays]:
    """Feeds of a tower that reads the answers of ``sources``, which are run in float: `TOGETHER` pictures and one text
    each; of a tower that sees pictures or tokens itself, one picture each. ``sources``: role -> tower and its run."""
    together = 1 if tower.preprocess or tower.borrows else TOGETHER
    groups = [range(len(pictures))[start : start + together] for start in range(0, len(pictures), together)]
    rows: dict[str, list[Array]] = {}
    several = set()  # inputs with a row for each picture
    for name, read in tower.reads.items():
        role, _, output = read.partition(".")
        source, run = sources[role]
        given = feeds(source, directory, pictures, texts[: len(groups)])
        rows[name] = [feed[name] if name in source.inputs else run(feed)[output or name] for feed in given]
        several |= {name} if isinstance(source.preprocess, ImagePreprocess) else set()
    if isinstance(tower.preprocess, ImagePreprocess):
        rows[tower.preprocess.input] = [feed[tower.preprocess.input] for feed in feeds(tower, directory, pictures, ())]
        several.add(tower.preprocess.input)
    return [
        {
            name: np.concatenate([given[place if name in several else number % len(given)] for place in group])
            for name, given in rows.items()
        }
        for number, group in enumerate(groups)
    ]


def fitting(net: Net, directory: Path, texts: Sequence[str]) -> list[str]:
    """The ``texts`` that fit the net's context (a few samples may be too long).

    Raises `BadRequest` if none fits.
    """
    specs = [t.preprocess for t in net.towers.values() if isinstance(t.preprocess, TextPreprocess)]
    preparers = [TextPreparer(spec, directory) for spec in specs]
    fitting = [text for text in texts if all(p.count(text) <= p.spec.context for p in preparers)]
    if texts and not fitting:
        context = min(spec.context for spec in specs)
        raise BadRequest(f"all {len(texts)} calibration texts have more than {context} tokens; give shorter ones")
    return fitting


@dataclass(frozen=True)
class Recorded:
    """``settled``: the quantizer that the ranges are for: the recipe's, or the result of its search."""

    ranges: Ranges
    source: str
    settled: Quantize


def recorded(file: Path, role: str, graph: str, how: Quantize, weights: Mapping[str, str]) -> Recorded | None:
    """The ranges in ``file`` for ``role``; None if they are of another graph, other weights or another quantizer.
    ``graph``: its fingerprint; ``weights``: name -> sha256, as in the net's `Source`, which may name more weights."""
    data = json.loads(file.read_text(encoding="utf-8"))
    entry = data["graphs"].get(role)
    if entry is None or not data["weights"].items() <= weights.items():
        return None
    if (entry["fingerprint"], entry["quantizer"], entry["params"]) != (graph, how.name, how.params):
        return None
    ranges = {name: (low, high) for name, (low, high) in entry["ranges"].items()}
    return Recorded(ranges, data["source"], Quantize(**entry["settled"]) if "settled" in entry else how)


def record(
    file: Path,
    source: str,
    pictures: Sequence[str],
    weights: Mapping[str, str],
    graphs: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write ranges that ship, one line per tensor. ``source``: in words; ``pictures``: by name; ``weights``: name ->
    sha256; ``graphs``: by role {"fingerprint", "quantizer", "params", "ranges"}, with "settled" after a search."""
    facts = {"source": source, "pictures": [*pictures], "weights": dict(weights)}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    entries = ",\n".join(f"{json.dumps(role)}: {_entry(entry)}" for role, entry in sorted(graphs.items()))
    file.write_text("{" + ",\n".join([*lines, f'"graphs": {{\n{entries}}}']) + "}\n", encoding="utf-8")


def _entry(entry: Mapping[str, Any]) -> str:
    keys = [key for key in ("fingerprint", "quantizer", "params", "settled") if key in entry]
    facts = ", ".join(f"{json.dumps(key)}: {json.dumps(entry[key])}" for key in keys)
    lines = ",\n".join(f"{json.dumps(name)}: {_numbers(limits)}" for name, limits in sorted(entry["ranges"].items()))
    return f'{{{facts}, "ranges": {{\n{lines}}}}}'


def _numbers(value: Any) -> str:
    """A number, or nested lists of numbers, as JSON with six digits each."""
    return f"{value:.6g}" if isinstance(value, float | int) else f"[{','.join(map(_numbers, value))}]"
