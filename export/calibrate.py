"""Calibration pictures and texts -> feeds, through the service's own preprocessing; and ranges that ship.

A ranges file holds what one observation of a net's float graphs found, so that every export of that net makes
the same bundle:

    {"source": "which pictures and texts, and the command", "pictures": ["…"], "weights": {"heads.safetensors": "…"},
     "graphs": {"image": {"fingerprint": "…", "quantizer": "search", "params": {},
                          "settled": {"name": "smooth", "params": {"alpha": 0.75}}, "ranges": {"Conv_0": [-1.0, 2.0]}}}}

A quantizer that looks at channels records a list of minima and one of maxima instead of two numbers. ``settled`` is
what a search found (`Settled`), so that it need not search again.
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
    """``count`` pictures and texts drawn by ``seed``; those that ship where the recipe names none."""
    pictures, texts = samples.pictures(), samples.texts()
    if calibration.images:
        pictures = sorted(p for p in calibration.images.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not pictures:
            raise BadRequest(f"{calibration.images} holds no pictures; expected files ending in {', '.join(_SUFFIXES)}")
    if calibration.texts:
        try:
            lines = calibration.texts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BadRequest(f"{calibration.texts} is no text in UTF-8 ({error}); expected one text a line") from None
        texts = [line for line in lines if line.strip()]
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
    """Those of ``texts`` that are not longer than the net's context (the samples suit most, not all).

    Raises `BadRequest` when none is left.
    """
    specs = [t.preprocess for t in net.towers.values() if isinstance(t.preprocess, TextPreprocess)]
    preparers = [TextPreparer(spec, directory) for spec in specs]
    found = [text for text in texts if all(p.count(text) <= p.spec.context for p in preparers)]
    if texts and not found:
        context = min(spec.context for spec in specs)
        raise BadRequest(f"all {len(texts)} calibration texts have more than {context} tokens; give shorter ones")
    return found


@dataclass(frozen=True)
class Recorded:
    """``settled``: the quantizer that the ranges are for; what was asked for, or what a search made of it."""

    ranges: Ranges
    source: str
    settled: Quantize


def recorded(file: Path, role: str, graph: str, how: Quantize, weights: Mapping[str, str]) -> Recorded | None:
    """The ranges in ``file`` for ``role``; None where they are of another graph, of other weights or for another
    quantizer. ``graph``: its fingerprint; ``weights``: name -> sha256, as in the net's `Source`."""
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
    """Write ranges that ship, one line a tensor: ``source`` in words, ``pictures`` by name, ``weights`` name -> sha256,
    and by role of the graph {"fingerprint", "quantizer", "params", "ranges"}; "settled" too where there was a search.
    """
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
    """A number or nested lists of them as JSON, six digits each."""
    return f"{value:.6g}" if isinstance(value, float | int) else f"[{','.join(map(_numbers, value))}]"
