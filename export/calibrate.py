"""Calibration pictures and texts -> feeds, by the service's preprocessing; and recorded ranges that ship.

A ranges file holds the observed ranges of a net's float graphs, so that every export of that net makes the same bundle:

    {"source": "which pictures and texts, and the command", "pictures": ["…"], "weights": {"heads.safetensors": "…"},
     "graphs": {"image": {"fingerprint": "…", "quantizer": "search", "params": {},
                          "settled": {"name": "smooth", "params": {"alpha": 0.75}}, "ranges": {"Conv_0": [-1.0, 2.0]}}}}

A quantizer that works by channel records a list of minima and a list of maxima instead of two numbers. ``settled`` is
the result of a search (`Settled`), so that an export need not search again.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmclip.export import samples
from calmclip.export.nets import Net, Tower
from calmclip.export.quantizers import Ranges
from calmclip.export.recipe import Calibration, Quantize
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Arrays
from calmclip.models.preprocess.image import ImagePreparer, decode
from calmclip.models.preprocess.text import TextPreparer

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def inputs(calibration: Calibration) -> tuple[list[Path], list[str]]:
    """``count`` pictures and texts drawn by ``seed``, from the recipe's paths or from the samples that ship."""
    pictures, texts = samples.pictures(), samples.texts()
    if calibration.images:
        pictures = sorted(p for p in calibration.images.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not pictures:
            raise BadRequest(f"{calibration.images} holds no pictures; expected files ending in {', '.join(_SUFFIXES)}")
    if calibration.texts:
        try:
            lines = calibration.texts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BadRequest(f"{calibration.texts} is no text in UTF-8 ({error}); expected one text per line") from None
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise BadRequest(f"{calibration.texts} holds no texts; expected one per line")
    draw = random.Random(calibration.seed)
    return (
        draw.sample(pictures, min(calibration.count, len(pictures))),
        draw.sample(texts, min(calibration.count, len(texts))),
    )


def describe(calibration: Calibration, pictures: Sequence[Path], texts: Sequence[str]) -> str:
    """In words, for the report: the inputs that this export's ranges were observed on."""
    sources = [path.name if path else "samples that ship" for path in (calibration.images, calibration.texts)]
    return f"{len(pictures)} pictures ({sources[0]}) and {len(texts)} texts ({sources[1]}), seed {calibration.seed}"


def feeds(tower: Tower, directory: Path, pictures: Sequence[Path], texts: Sequence[str]) -> Iterator[Arrays]:
    """One row at a time, as the service prepares it; ``directory`` holds the tokenizer.

    Raises `BadRequest` for a tower that takes neither pictures nor texts.
    """
    if isinstance(tower.preprocess, ImagePreprocess):
        preparer = ImagePreparer(tower.preprocess)
        for path in pictures:
            try:
                picture = decode(path.read_bytes())
            except InputError as error:
                raise type(error)(f"{path.name}: {error}") from None
            yield {tower.preprocess.input: preparer.prepare(picture)[0]}
    elif tower.preprocess:
        text = TextPreparer(tower.preprocess, directory)
        for sentence in texts:
            yield text.prepare([sentence])
    else:
        raise BadRequest(f"a tower with the inputs {list(tower.inputs)} has no preprocessing, so nothing calibrates it")


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
    ``graph``: its fingerprint; ``weights``: name -> sha256, as in the net's `Source`."""
    data = json.loads(file.read_text(encoding="utf-8"))
    entry = data["graphs"].get(role)
    if entry is None or data["weights"] != dict(weights):
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
