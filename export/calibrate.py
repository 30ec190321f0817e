"""Calibration pictures and texts -> feeds, through the service's own preprocessing; and ranges that ship.

A ranges file holds what one observation of a net's float graphs found, so that every export of that net makes
the same bundle:

    {"source": "which pictures and texts, and the command",
     "graphs": {"image": {"fingerprint": "…", "quantizer": "static", "params": {}, "ranges": {"Conv_0": [-1.0, 2.0]}}}}

A quantizer that looks at channels records a list of minima and one of maxima instead of two numbers.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import samples
from export.nets import Net, Tower
from export.quantizers import Ranges
from export.recipe import Calibration, Quantize
from models.bundle.manifest import ImagePreprocess, TextPreprocess
from models.errors import BadRequest
from models.flow import Arrays
from models.preprocess.image import ImagePreparer, decode
from models.preprocess.text import TextPreparer

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def inputs(calibration: Calibration) -> tuple[list[Path], list[str]]:
    """``count`` pictures and texts drawn by ``seed``; those that ship where the recipe names none."""
    pictures, texts = samples.pictures(), samples.texts()
    if calibration.images:
        pictures = sorted(p for p in calibration.images.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not pictures:
            raise BadRequest(f"{calibration.images} holds no pictures; expected files ending in {', '.join(_SUFFIXES)}")
    if calibration.texts:
        texts = [line for line in calibration.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise BadRequest(f"{calibration.texts} holds no texts; expected one a line")
    draw = random.Random(calibration.seed)
    return (
        draw.sample(pictures, min(calibration.count, len(pictures))),
        draw.sample(texts, min(calibration.count, len(texts))),
    )


def describe(calibration: Calibration, pictures: Sequence[Path], texts: Sequence[str]) -> str:
    """In words, for the report: what this export's ranges were observed on."""
    places = [place.name if place else "samples that ship" for place in (calibration.images, calibration.texts)]
    return f"{len(pictures)} pictures ({places[0]}) and {len(texts)} texts ({places[1]}), seed {calibration.seed}"


def feeds(tower: Tower, directory: Path, pictures: Sequence[Path], texts: Sequence[str]) -> Iterator[Arrays]:
    """One row at a time, as the service prepares it; ``directory`` holds the tokenizer.

    Raises `BadRequest` for a tower that takes neither pictures nor texts.
    """
    if isinstance(tower.preprocess, ImagePreprocess):
        preparer = ImagePreparer(tower.preprocess)
        for path in pictures:
            yield {tower.preprocess.input: preparer.prepare(decode(path.read_bytes()))[0]}
    elif tower.preprocess:
        text = TextPreparer(tower.preprocess, directory)
        for sentence in texts:
            yield text.prepare([sentence])
    else:
        raise BadRequest(f"a tower with the inputs {list(tower.inputs)} has no preprocessing, so nothing calibrates it")


def fitting(net: Net, directory: Path, texts: Sequence[str]) -> list[str]:
    """Those of ``texts`` that are not longer than the net's context (the samples suit most, not all)."""
    specs = [t.preprocess for t in net.towers.values() if isinstance(t.preprocess, TextPreprocess)]
    preparers = [TextPreparer(spec, directory) for spec in specs]
    return [text for text in texts if all(p.count(text) <= p.spec.context for p in preparers)]


@dataclass(frozen=True)
class Recorded:
    ranges: Ranges
    source: str


def recorded(file: Path, role: str, fingerprint: str, how: Quantize) -> Recorded | None:
    """The ranges in ``file`` for ``role``; None where they were recorded for another graph or quantizer."""
    data = json.loads(file.read_text(encoding="utf-8"))
    entry = data["graphs"].get(role)
    if entry is None or (entry["fingerprint"], entry["quantizer"], entry["params"]) != (
        fingerprint,
        how.name,
        how.params,
    ):
        return None
    return Recorded({name: (low, high) for name, (low, high) in entry["ranges"].items()}, data["source"])


def record(
    file: Path, role: str, fingerprint: str, how: Quantize, ranges: Ranges, source: str, pictures: Sequence[str] = ()
) -> None:
    """Write or replace the entry of ``role``; one line a tensor. ``source`` in words, ``pictures`` by name."""
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"graphs": {}}
    data["source"] = source
    data["graphs"][role] = {"fingerprint": fingerprint, "quantizer": how.name, "params": how.params, "ranges": ranges}
    graphs = ",\n".join(f"{json.dumps(name)}: {_entry(entry)}" for name, entry in sorted(data["graphs"].items()))
    file.write_text(
        f'{{"source": {json.dumps(source)},\n"pictures": {json.dumps([*pictures])},\n"graphs": {{\n{graphs}}}}}\n',
        encoding="utf-8",
    )


def _entry(entry: dict[str, Any]) -> str:
    facts = ", ".join(f"{json.dumps(key)}: {json.dumps(entry[key])}" for key in ("fingerprint", "quantizer", "params"))
    lines = ",\n".join(f"{json.dumps(name)}: {_numbers(limits)}" for name, limits in sorted(entry["ranges"].items()))
    return f'{{{facts}, "ranges": {{\n{lines}}}}}'


def _numbers(value: Any) -> str:
    """A number or nested lists of them as JSON, six digits each."""
    return f"{value:.6g}" if isinstance(value, float | int) else f"[{','.join(map(_numbers, value))}]"
